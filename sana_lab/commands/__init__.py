"""Verbs about the lab itself: check a part, list what there is, start a new file, look at the machine."""
