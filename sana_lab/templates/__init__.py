"""Complete examples of parts: `sana-lab new part NAME` writes them, and docs/extending.md shows them."""
