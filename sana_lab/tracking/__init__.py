"""MLflow: the run store, the Lightning logger, the server."""
