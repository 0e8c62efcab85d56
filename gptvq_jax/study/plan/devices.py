"""Rates of accelerators that are not here, as their makers publish them."""

from typing import NamedTuple

# Of the published rates, what large products reach; an assumption.
REACHED = 0.7
# Seconds from one kernel to the next in a loop of XLA's; an assumption.
GPU_LAUNCH, TPU_LAUNCH = 4e-6, 1e-6


class Device(NamedTuple):
    """One chip.

    Attributes:
      title: what it is.
      float32: FLOP/s of products of float32 numbers to float32 accuracy.
      basis: where that comes from.
      bfloat16: FLOP/s of products of bfloat16 numbers summed in float32, without sparsity.
      bandwidth: bytes/s of its memory.
      memory: bytes.
      launch: seconds of a kernel that has nothing to do.
      host_link: bytes/s from the host.
      host_memory: bytes, of a machine with this one chip.
    """

    title: str
    float32: float
    basis: str
    bfloat16: float
    bandwidth: float
    memory: float
    launch: float
    host_link: float
    host_memory: float


DEVICES = {
    # NVIDIA H100 Tensor Core GPU data sheet, SXM: 67 TFLOP/s FP32, 1979 BF16 with sparsity, which
    # doubles it; 3.35 TB/s, 80 GB; PCIe 5 x16. The host is Google Cloud's a3-highgpu-1g: 234 GB.
    "h100": Device(
        "NVIDIA H100 SXM",
        *(67e12, "FP32 without tensor cores", 989.5e12, 3.35e12, 80e9, GPU_LAUNCH, 64e9, 234e9),
    ),
    # NVIDIA A100 Tensor Core GPU data sheet, SXM 80 GB: 19.5 TFLOP/s FP32, 312 BF16, 2.039 TB/s;
    # PCIe 4 x16. The host is a2-ultragpu-1g: 170 GB.
    "a100": Device(
        "NVIDIA A100 SXM 80GB",
        *(19.5e12, "FP32 without tensor cores", 312e12, 2.039e12, 80e9, GPU_LAUNCH, 32e9, 170e9),
    ),
    # Google Cloud, "TPU v5e": 197 TFLOP/s bf16, 819 GB/s, 16 GB. Six bf16 products make a float32
    # one at precision "highest". The host is ct5lp-hightpu-1t: 48 GB.
    "v5e": Device(
        "TPU v5e",
        *(197e12 / 6, "bf16 in six passes", 197e12, 819e9, 16e9, TPU_LAUNCH, 32e9, 48e9),
    ),
    # Google Cloud, "TPU v6e": 918 TFLOP/s bf16, 1638 GB/s, 32 GB. The host is ct6e-standard-1t:
    # 176 GB.
    "v6e": Device(
        "TPU v6e",
        *(918e12 / 6, "bf16 in six passes", 918e12, 1638e9, 32e9, TPU_LAUNCH, 64e9, 176e9),
    ),
}
