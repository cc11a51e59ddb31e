"""Tables of measured records: columns, significance marks, tested claims, output formats and plots."""
