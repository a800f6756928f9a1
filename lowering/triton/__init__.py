"""Triton kernels of vlmopt's operators, for CUDA tensors where Triton is installed."""
