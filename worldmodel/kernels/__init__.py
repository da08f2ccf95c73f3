"""Scan, attention and normalisation: plain references, and kernels for CUDA beside them."""
