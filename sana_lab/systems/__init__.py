"""LightningModules: autoencoder, dit, text2image."""
