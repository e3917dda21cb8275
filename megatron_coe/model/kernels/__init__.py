"""Triton kernels, as functions without autograd; they import only where triton is installed."""
