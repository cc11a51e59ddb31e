"""Weight files: formats, key tables, architectures, the lab's own safetensors."""
