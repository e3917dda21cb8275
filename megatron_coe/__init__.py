"""Chain-of-Experts as a Megatron-Core model provider."""

import logging

__version__ = "0.2.0"

# Megatron-Core imports torch's builder of C++ extensions, which warns on every machine with a CUDA
# toolkit and no GPU, such as a login node.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
