"""Networks: attention, DiT, autoencoders, text encoders and their layers."""
