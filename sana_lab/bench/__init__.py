"""The bench verb: costs of a system by stage, and its memory."""
