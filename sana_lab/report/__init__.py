"""Tables, plots and significance marks from measured rows."""
