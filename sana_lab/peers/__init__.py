"""Text-to-image pipelines of diffusers, sampled and measured like the lab's own systems."""
