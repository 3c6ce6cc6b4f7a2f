"""Performance constants of device types, on which the choice of a contraction, its block sizes and a plan depend."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Machine:
    """Rates of a type of device, and the block sizes at which it works best.

    Attributes:
        single: operations per second of large matrix products in float32.
        double: the same in float64.
        bandwidth: bytes of memory traffic per second.
        many: the share of the full rate that many products of moderate size reach.
        pad: added to each side of a product in its predicted time: small products reach a small share of the rate.
        call: seconds of overhead per operation, including autograd and views.
        pairs: entries of a block of pairs of positions.
        slab: entries of a slab of J, which is cast and multiplied while in cache.
        row_blocks: row blocks of a symmetric product, whose upper blocks are skipped; one if calls cost more than they
            save.
        near: whether recently written memory is much faster to read, so that small blocks pay off.
    """

    single: float
    double: float
    bandwidth: float
    many: float
    pad: int
    call: float
    pairs: int
    slab: int
    row_blocks: int
    near: bool

    def flops(self, dtype: torch.dtype) -> float:
        """Operations per second; factors in half precision are multiplied in float32."""
        return self.double if dtype == torch.float64 else self.single


# Measured by `python tests/bench/constants.py [--device cuda]`, on one CPU core and on an H100. Only ratios decide, and
# they are the same on two cores. They are committed, not measured at run time: a choice that depended on the load would
# change the last bits of K from run to run.
MACHINES = {
    "cpu": Machine(1.8e11, 9e10, 1.3e10, 1.0, 8, 5e-6, pairs=1 << 23, slab=1 << 21, row_blocks=8, near=True),
    "cuda": Machine(4.8e13, 5.5e13, 2.6e12, 0.4, 0, 2e-5, pairs=1 << 26, slab=1 << 24, row_blocks=1, near=False),
}
_SERIAL = 0.25  # serial share of a kernel's time on one core: two cores are 1.4 to 1.9 times as fast
_FULL_DOUBLE = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}  # NVIDIA's data-centre GPUs …
_SLOW_DOUBLE = 64  # … and the slowdown of float64 on all others


def machine(device: torch.device) -> Machine:
    """The constants of a device; a GPU's float64 rate depends on its compute capability."""
    known = MACHINES.get(device.type, MACHINES["cuda"])
    return known if has_fast_double(device) else replace(known, double=known.single / _SLOW_DOUBLE)


@functools.cache
def has_fast_double(device: torch.device) -> bool:
    """Whether float64 products take at most a few times as long as float32 products."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return device.type in ("cpu", "cuda")
    return torch.cuda.get_device_capability(device) in _FULL_DOUBLE


def pace(device: torch.device) -> float:
    """The speed of this process relative to the constants, by its threads; it scales a plan's seconds only."""
    return 1 / (_SERIAL + (1 - _SERIAL) / torch.get_num_threads()) if device.type == "cpu" else 1.0
