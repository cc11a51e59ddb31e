"""MLflow: the run store, the Lightning logger, the server and the view of the runs that it opens."""
