"""What GPUs can do at most, by their datasheets: FLOP/s by dtype, memory and its bandwidth."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from depthprobe.errors import BadInput, nearest

DATASHEET = "datasheet"


@dataclass(frozen=True)
class Roof:
    """A device's limits: FLOP/s by dtype, dense; bytes/s and bytes of its memory."""

    name: str
    peak: Mapping[str, float]
    bandwidth: float
    memory: float
    source: str = DATASHEET
    devices: tuple[str, ...] = ()  # as torch calls it

    def seconds(self, flops: float, moved: float, dtype: str) -> float:
        """The least time for so many FLOPs in a dtype and so many bytes moved."""
        return max(flops / self.peak[dtype], moved / self.bandwidth)


# Dense TFLOP/s in half precision and in float32, GB/s, GB, and what torch calls it. Half: of the
# tensor cores, accumulating in float32; many datasheets print twice that, "with sparsity". float32:
# without tensor cores, which is how torch multiplies it unless TF32 is allowed.
_TABLE: tuple[tuple[str, float, float, float, float, tuple[str, ...]], ...] = (
    # NVIDIA A100 Tensor Core GPU datasheet (2021)
    ("A100-40GB", 312, 19.5, 1555, 40, ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB")),
    ("A100-80GB", 312, 19.5, 2039, 80, ("NVIDIA A100-SXM4-80GB",)),
    ("A100-80GB-PCIe", 312, 19.5, 1935, 80, ("NVIDIA A100 80GB PCIe",)),
    # NVIDIA H100 Tensor Core GPU datasheet: 1,979, 1,513 and 1,671 with sparsity
    ("H100-SXM", 989.4, 66.9, 3350, 80, ("NVIDIA H100 80GB HBM3",)),
    ("H100-PCIe", 756.5, 51.2, 2000, 80, ("NVIDIA H100 PCIe",)),
    ("H100-NVL", 835.5, 60, 3900, 94, ("NVIDIA H100 NVL",)),
    # NVIDIA H200 Tensor Core GPU datasheet, SXM: 1,979 with sparsity
    ("H200", 989.4, 66.9, 4800, 141, ("NVIDIA H200",)),
    # NVIDIA L4 Tensor Core GPU datasheet: 242 with sparsity
    ("L4", 121, 30.3, 300, 24, ("NVIDIA L4",)),
    # NVIDIA L40S datasheet
    ("L40S", 362.05, 91.6, 864, 48, ("NVIDIA L40S",)),
    # NVIDIA A10 Tensor Core GPU datasheet
    ("A10", 125, 31.2, 600, 24, ("NVIDIA A10",)),
    # NVIDIA T4 Tensor Core GPU datasheet
    ("T4", 65, 8.1, 300, 16, ("Tesla T4", "NVIDIA T4")),
    # NVIDIA Ada GPU architecture whitepaper, RTX 4090: FP16 tensor with FP32 accumulate
    ("RTX-4090", 165.2, 82.6, 1008, 24, ("NVIDIA GeForce RTX 4090",)),
)
NO_BFLOAT16 = ("T4",)  # Turing


def _roof(
    name: str,
    half: float,
    single: float,
    bandwidth: float,
    memory: float,
    devices: tuple[str, ...],
) -> Roof:
    peak = {"float16": 1e12 * half, "bfloat16": 1e12 * half, "float32": 1e12 * single}
    if name in NO_BFLOAT16:
        del peak["bfloat16"]
    return Roof(name, peak, 1e9 * bandwidth, 1e9 * memory, devices=devices)


GPUS = {row[0]: _roof(*row) for row in _TABLE}
SHORT = {"a100": "A100-80GB", "h100": "H100-SXM", "4090": "RTX-4090"}


def find_gpu(name: str) -> Roof:
    """A GPU of the table, by its name in any spelling: ``h100-sxm``, ``H100 SXM``, ``RTX4090``.

    ``a100`` and ``h100`` alone are those of 80 GB in an SXM socket.

    Raises:
        BadInput: for a name that is not there.
    """
    wanted = _plain(name)
    wanted = _plain(SHORT.get(wanted, wanted))
    for known, roof in GPUS.items():
        if _plain(known) == wanted:
            return roof
    raise BadInput("gpu", name, nearest(name.upper(), GPUS))


def check_gpus(names: str, dtype: str) -> list[Roof]:
    """The GPUs that a comma-separated list names, each able to compute in the dtype.

    Raises:
        BadInput: for a name that is not in the table, or a GPU without the dtype.
    """
    found = [find_gpu(part.strip()) for part in names.split(",")]
    for roof in found:
        check_dtype_on(roof, dtype)
    return found


def check_dtype_on(roof: Roof, dtype: str) -> None:
    """Refuse a dtype that a device has no units for."""
    if dtype not in roof.peak:
        has = ", ".join(sorted(roof.peak))
        raise BadInput("dtype", dtype, f"what {roof.name} computes in: {has}")


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]|^nvidia|geforce", "", name.lower())
