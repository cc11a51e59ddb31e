"""Linear attention with a ReLU kernel: definition, closed-form gradients, Triton kernels."""
