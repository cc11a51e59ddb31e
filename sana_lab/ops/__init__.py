"""Operators: the definition in plain torch, beside the kernels that compute the same."""
