"""Triton kernels of the ops, for CUDA tensors. Imported by the first call that needs it, never by the package."""
