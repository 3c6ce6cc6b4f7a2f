"""What the arguments of a metric must be: float tensors, cast to float64, of a shape that is named when it is wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from ntkwatch.metrics.undefined import Undefined

# An optimizer's asymmetric kernel, J·sign(J)ᵀ, is out by a share of order 1 and float32 sums by 1e-6: anything between.
ASYMMETRY = 1e-3

_SUBJECT = {
    "k": "the kernel",
    "k0": "the baseline kernel",
    "k_train": "the training kernel",
    "theta": "the full kernel",
    "y": "the targets",
    "f0": "the outputs",
    "df": "the change of the outputs",
    "jdtheta": "the linearised change of the outputs",
}


def subject(name: str) -> str:
    """The argument as a sentence names it."""
    return _SUBJECT.get(name, name)


def real(x: Tensor, name: str) -> Tensor:
    """x in float64 on its own device; TypeError unless it is a float tensor, ValueError if empty."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(x).__name__}; pass torch.as_tensor({name})")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a float tensor; got {x.dtype}; pass {name}.double()")
    if x.numel() == 0:
        raise ValueError(f"{name} must hold at least one number; got shape {tuple(x.shape)}; pass at least one probe")
    return x.to(torch.float64)


def finite(x: Tensor, name: str) -> Tensor:
    """x itself; undefined if it has an infinite or NaN entry."""
    if not bool(torch.isfinite(x).all()):
        raise Undefined(f"there are non-finite entries in {subject(name)}")
    return x


def alike(a: Tensor, b: Tensor, names: tuple[str, str]) -> tuple[Tensor, Tensor]:
    """Both in float64; ValueError unless the shapes are equal."""
    a, b = real(a, names[0]), real(b, names[1])
    if a.shape != b.shape:
        got = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise ValueError(f"{names[0]} and {names[1]} must have one shape; got {got}; use the same probes and reduction")
    return a, b


def matrices(k: Tensor, name: str = "k") -> Tensor:
    """A kernel as [..., m, m]: [n, n] and blocks [C, n, n] as they are, a full [n, C, n, C] as [nC, nC]."""
    k = real(k, name)
    if k.ndim == 4 and k.shape[:2] == k.shape[2:]:
        k = k.flatten(2).flatten(0, 1)
    if k.ndim not in (2, 3) or k.shape[-1] != k.shape[-2]:
        wanted = "[n, n], [C, n, n] or [n, C, n, C]"
        raise ValueError(f"{name} must be {wanted}; got shape {tuple(k.shape)}; pass a kernel of one probe set")
    return k


def symmetric(k: Tensor, name: str = "k") -> Tensor:
    """A finite symmetric matrix [m, m] (a full kernel is flattened), exactly symmetrised."""
    k = matrices(k, name)
    if k.ndim == 3:
        raise ValueError(f"{name} must be one matrix; got blocks {tuple(k.shape)}; pass one block, {name}[c]")
    finite(k, name)
    skew = (k - k.mT).norm() / k.norm().clamp(min=torch.finfo(k.dtype).tiny)
    if skew > ASYMMETRY:
        hint = "use kernel_angle or kernel_distance, which need no symmetry"
        raise ValueError(f"{name} must be symmetric; got ‖{name} − {name}ᵀ‖/‖{name}‖ = {float(skew):.1e}; {hint}")
    return (k + k.mT) / 2


def probe_kernel(k: Tensor, name: str = "k") -> Tensor:
    """A symmetric kernel [n, n] with one row a probe; a full kernel raises, for its targets would be ambiguous."""
    if isinstance(k, Tensor) and k.ndim != 2:
        raise ValueError(f"{name} must be [n, n]; got shape {tuple(k.shape)}; reduce it to a trace or sum kernel")
    return symmetric(k, name)


def columns(y: Tensor, n: int, name: str = "y") -> Tensor:
    """Finite targets or outputs [n, C]; a 1-D tensor raises, naming `y[:, None]`."""
    y = real(y, name)
    if y.ndim == 1:
        raise ValueError(f"{name} must be [n, C]; got shape {tuple(y.shape)}; pass {name}[:, None]")
    if y.ndim != 2 or len(y) != n:
        raise ValueError(f"{name} must be [{n}, C]; got shape {tuple(y.shape)}; give one row for each probe of k")
    return finite(y, name)
