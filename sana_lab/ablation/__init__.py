"""The ablation engine: a plan of trials from YAML, run in worker processes, recorded in MLflow, shown as a table.

Trials are of two kinds: `quality` trains and evaluates an experiment, `efficiency` counts and times a probe.
"""
