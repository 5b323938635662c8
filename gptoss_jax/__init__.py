"""gpt-oss in JAX: BF16 fine-tuning, MXFP4/NVFP4 quantization-aware training, and export of exactly the trained 4-bit weights."""

__version__ = "0.1.0"
