"""Tables from measured records: their columns, marks (`significance`), tested claims, files (`render`) and plots."""
