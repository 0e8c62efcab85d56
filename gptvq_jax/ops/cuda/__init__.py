"""CUDA kernels for products of few rows of x; what stands for a warp is in decode.h."""
