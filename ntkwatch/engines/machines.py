"""What kinds of devices do fast: the constants that the choice of a contraction, its portions and a plan rest on."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Machine:
    """What a kind of device does in a second, and in what portions it works best.

    Attributes:
        single: operations of large matrix products in float32.
        double: the same in float64.
        bandwidth: bytes of traffic.
        many: the share of the full rate that many products of moderate size reach.
        pad: by how much longer each side of a product is as its time has it: small ones reach a small share.
        call: seconds that an operation takes however little it does, with what autograd and views cost around it.
        pairs: entries of a block of pairs of positions.
        slab: entries of a slab of J, which is cast and multiplied while it is near.
        row_blocks: of a symmetric product, whose upper blocks are left out; one where calls cost more than they save.
        near: whether memory that was just written is much faster to read, so that small portions pay.
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
_SERIAL = 0.25  # of a kernel's time on one core, what more cores do not shorten: two are 1.4 to 1.9 times as fast
_FULL_DOUBLE = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}  # of NVIDIA's: those made for computing centres …
_SLOW_DOUBLE = 64  # … and how much slower float64 is on all others


def machine(device: torch.device) -> Machine:
    """What is known of a kind of device; of a GPU's float64, by what its maker says of it."""
    known = MACHINES.get(device.type, MACHINES["cuda"])
    return known if has_fast_double(device) else replace(known, double=known.single / _SLOW_DOUBLE)


@functools.cache
def has_fast_double(device: torch.device) -> bool:
    """Whether float64 products take no more than a few times as long as float32 ones."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return device.type in ("cpu", "cuda")
    return torch.cuda.get_device_capability(device) in _FULL_DOUBLE


def pace(device: torch.device) -> float:
    """How many times as fast as the constants this process is on its threads: of a plan's seconds, not of a choice."""
    return 1 / (_SERIAL + (1 - _SERIAL) / torch.get_num_threads()) if device.type == "cpu" else 1.0
