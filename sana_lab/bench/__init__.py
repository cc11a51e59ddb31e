"""Command `sana-lab bench`: costs of a system by stage, and its memory."""
