"""Triton kernels of the penalty and what launches them."""
