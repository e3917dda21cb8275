"""Chain-of-Experts as a Megatron-Core model provider."""

__version__ = "0.1.0"
