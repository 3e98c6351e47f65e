"""What GPUs can do, by their makers' data sheets, and the shares of it that were measured on one of them."""

from __future__ import annotations

from dataclasses import dataclass

from vitscale.errors import ConfigError
from vitscale.text import did_you_mean

# Of one H200 (docs/measurements.md): 788 of 989 TFLOP/s in a bf16 matrix product of 8192^3, 4.26 of 4.8 TB/s in a copy,
# 55 of 64 GB/s from the host. The other GPUs are taken to reach the same shares, and fp32 that of bf16.
MATRIX_SHARE, BANDWIDTH_SHARE, HOST_SHARE = 788 / 989.4, 4.261 / 4.8, 55 / 64


@dataclass(frozen=True)
class Gpu:
    """Decimal units."""

    name: str
    tflops: float  # dense bf16 with sums in fp32, no sparsity
    fp32_tflops: float  # which is not TF32 here
    memory_gb: float
    bandwidth_gb_s: float
    link_gb_s: float  # to the other GPUs of its node, in each direction: NVLink, else PCIe
    host_gb_s: float  # to the host, in each direction: PCIe 4.0 or 5.0 x16
    network_gb_s: float  # of a node to the others, in each direction, by default: as of a DGX of these GPUs, eight
    # adapters of 200 or 400 Gb/s; of cards for PCIe one of 100 Gb/s
    source: str
    step_ratio: float = 1.0  # a step's measured seconds over the planned ones (`vitscale plan --measured`)

    def flops(self, precision: str) -> float:
        """Of large matrix products, a second."""
        return (self.tflops if precision == "bf16" else self.fp32_tflops) * 1e12 * MATRIX_SHARE

    @property
    def bandwidth(self) -> float:
        """Bytes a second, read and written."""
        return self.bandwidth_gb_s * 1e9 * BANDWIDTH_SHARE

    @property
    def host_bandwidth(self) -> float:
        """Bytes a second, to the host or from it."""
        return self.host_gb_s * 1e9 * HOST_SHARE

    @property
    def memory(self) -> int:
        return int(self.memory_gb * 1e9)


GPUS = {
    "a100": Gpu("A100 SXM 80GB", 312, 19.5, 85.0, 2039, 300, 32, 200, "NVIDIA A100 data sheet, 2021"),
    "a100-40gb": Gpu("A100 SXM 40GB", 312, 19.5, 42.3, 1555, 300, 32, 200, "NVIDIA A100 data sheet, 2021"),
    "h100": Gpu("H100 SXM", 989.4, 66.9, 85.0, 3350, 450, 64, 400, "NVIDIA H100 data sheet, 2023"),
    "h200": Gpu("H200 SXM", 989.4, 66.9, 150.1, 4800, 450, 64, 400, "NVIDIA H200 data sheet, 2024"),
    "b200": Gpu("B200 SXM (HGX)", 2250, 75, 192.2, 7700, 900, 64, 400, "NVIDIA HGX B200 data sheet, 2025"),
    "l40s": Gpu("L40S", 362, 91.6, 47.7, 864, 32, 32, 12.5, "NVIDIA L40S data sheet, 2023; PCIe 4.0"),
    "4090": Gpu("GeForce RTX 4090", 165.2, 82.6, 25.3, 1008, 32, 32, 12.5, "NVIDIA Ada architecture, 2022; PCIe 4.0"),
}


def gpu_of(name: str) -> Gpu:
    """By its name in any case. ConfigError for one that is not in the table."""
    key = name.lower().removeprefix("rtx").strip(" -_")
    if key not in GPUS:
        hint = did_you_mean(key, GPUS)
        raise ConfigError(f"--gpu {name}: must be one of {', '.join(GPUS)}{hint}")
    return GPUS[key]
