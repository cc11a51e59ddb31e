"""Flow matching: one time axis, solvers, guidance."""
