"""Triton kernels of the masked RNN and what launches them."""
