"""What a computation costs: time, memory, FLOPs, energy."""
