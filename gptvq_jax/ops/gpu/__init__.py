"""Parts of the kernel for NVIDIA GPUs, ../pallas_gpu.py."""
