"""Vector quantization of large language models in JAX: GPTVQ (arXiv 2402.15319) and relatives."""

__version__ = "0.1.0"
