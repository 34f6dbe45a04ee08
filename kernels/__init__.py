"""Attention over a compressed KV cache: memory layout, PyTorch references, Triton kernels."""
