"""Other text-to-image models, through diffusers, under the same measurements."""
