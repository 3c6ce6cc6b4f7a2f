"""What softmax can see of a kernel: a shift that all logits share changes no probability and no cross-entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from ntkwatch.metrics.arguments import finite, real
from ntkwatch.metrics.undefined import Undefined, metric, nan


@metric(lambda theta, *_, **__: nan(theta).repeat(theta.shape))
def softmax_centred(theta: Tensor, *, floor: float | None = None) -> Tensor:
    """The full kernel of the logits without their common shift, which softmax and cross-entropy cannot see.

    Formula: PΘP, P = I − 11ᵀ/C over outputs: the kernel of f_c − (1/C) Σ_d f_d; exactly 0 where its norm is at most
        `floor`, or rounding, n·C·eps·‖Θ‖
    Shape: full [n, C, m, C] -> [n, C, m, C]
    Range: positive semi-definite if Θ is; undefined for one output, of which softmax is constant, and where Θ is not
        finite
    Source: cross-entropy's gradient sums to 0 over the classes, so df/dt = −Θ∇𝓛 enters it through PΘP alone
    Pitfalls: for softmax only: sigmoids and squared loss see the shift; mean over c of its diagonal blocks is the trace
        kernel minus 1/C of the sum kernel

    >>> theta = torch.einsum("nm,cd->ncmd", torch.eye(2), torch.eye(2) + 5)  # 5: of a function that all outputs share
    >>> softmax_centred(theta)[0, :, 0, :]
    tensor([[ 0.5000, -0.5000],
            [-0.5000,  0.5000]], dtype=torch.float64)
    """
    return _centred(_full(theta), theta.dtype, floor)


def _full(theta: Tensor) -> Tensor:
    x = real(theta, "theta")
    if x.ndim != 4 or x.shape[1] != x.shape[3]:
        raise ValueError(f"theta must be [n, C, m, C]; got shape {tuple(x.shape)}; measure it with reduction='full'")
    if x.shape[1] == 1:
        raise Undefined("softmax of one output is constant: there is nothing that it can see")
    return finite(x, "theta")


def _centred(x: Tensor, dtype: torch.dtype, floor: float | None) -> Tensor:
    centred = x - x.mean(1, keepdim=True)
    centred = centred - centred.mean(3, keepdim=True)
    noise = x.shape[0] * x.shape[1] * torch.finfo(dtype).eps * x.norm()
    return centred if centred.norm() > max(float(noise), floor or 0.0) else torch.zeros_like(x)


@metric()
def softmax_share(theta: Tensor) -> Tensor:
    """How much of the full kernel softmax can see.

    Formula: tr PΘP/tr Θ, P = I − 11ᵀ/C over outputs
    Shape: full [n, C, n, C] -> []
    Range: [0, 1], (C − 1)/C where outputs move independently and alike; undefined for one output and where tr Θ is not
        positive
    Source: the trace of PΘP, by the cyclic property that of (I − 11ᵀ/C)Θ
    Pitfalls: low where outputs share their motion, whatever they share it with: it is no richness

    >>> round(float(softmax_share(torch.einsum("nm,cd->ncmd", torch.eye(3), torch.eye(4)))), 12)
    0.75
    """
    x = _full(theta)
    trace = x.diagonal(dim1=1, dim2=3).diagonal(dim1=0, dim2=1).sum()
    if trace <= 0:
        raise Undefined("the trace of the kernel is not positive")
    shared = x.diagonal(dim1=0, dim2=2).sum() / x.shape[1]  # 1ᵀΘ[n, :, n, :]1/C
    return (1 - shared / trace).clamp(0, 1)
