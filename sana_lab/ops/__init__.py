"""Operators: a reference implementation in plain torch beside equivalent Triton or CPU kernels."""
