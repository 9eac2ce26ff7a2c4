"""Bounds of the CUDA kernels from their machine code."""
