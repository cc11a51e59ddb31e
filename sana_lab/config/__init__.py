"""Parts and recipes: the registry of parts, their specs, experiments, ablations and hashes."""
