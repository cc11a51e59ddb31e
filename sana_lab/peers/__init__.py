"""Text-to-image pipelines of diffusers, sampled and measured like sana_lab's systems."""
