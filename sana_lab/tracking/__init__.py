"""MLflow tracking: run store, Lightning logger, server and view of the runs."""
