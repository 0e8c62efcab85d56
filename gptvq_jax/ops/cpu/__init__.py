"""Kernels in C++ for CPUs, called through jax.ffi; built on first use by build.py."""
