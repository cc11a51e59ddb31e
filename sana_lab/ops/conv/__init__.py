"""Convolutions of the autoencoders in inference."""
