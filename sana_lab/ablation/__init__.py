"""The ablation engine: trials, worker processes, results."""
