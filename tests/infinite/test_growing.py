"""Activations that grow like exp: their duals are known, and large values meet weights that are right however small."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ntkwatch.infinite import Activation
from ntkwatch.infinite.quadrature import _hermite

Q = torch.tensor([0.3, 1.0, 4.0], dtype=torch.float64)


def exp_pairs(a: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """E[exp(au)·exp(av)]."""
    return lambda k, q, r: torch.exp(a * a * (q / 2 + r / 2 + k))


CASES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "exp": (torch.exp, exp_pairs(1.0)),
    "exp(2x)": (lambda x: torch.exp(2 * x), exp_pairs(2.0)),
    "exp(-x)": (lambda x: torch.exp(-x), exp_pairs(-1.0)),
    "sinh": (torch.sinh, lambda k, q, r: torch.exp(q / 2 + r / 2) * torch.sinh(k)),
    "cosh": (torch.cosh, lambda k, q, r: torch.exp(q / 2 + r / 2) * torch.cosh(k)),
    "x^3": (lambda x: x**3, lambda k, q, r: 6 * k**3 + 9 * q * r * k),
}


@pytest.mark.parametrize("sizes", [(128, 512), (512, 2048)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_duals_are_exact(case: str, sizes: tuple[int, int]) -> None:
    function, exact = CASES[case]
    activation = Activation(function, degree=sizes[0], nodes=sizes[1])
    saved = activation.prepare(Q)
    for c in (-1.0, -0.7, 0.0, 0.5, 1.0):
        k = c * Q.sqrt() * Q.flip(0).sqrt()
        other = activation.prepare(Q.flip(0))
        found, _ = activation.dual(k.clone(), saved, other)
        right, size = exact(k, Q, Q.flip(0)), (exact(Q, Q, Q) * exact(Q, Q, Q).flip(0)).sqrt()
        assert ((found - right).abs() <= 1e-9 * size).all(), f"{case} at correlation {c}: {found} beside {right}"


@pytest.mark.parametrize("nodes", [16, 512, 2048])
def test_the_rule_is_orthonormal_and_its_weights_add_up_to_one(nodes: int) -> None:
    z, weighted = _hermite(nodes, 9)
    assert float((weighted[:, 0].sum() - 1).abs()) < 1e-12
    assert float((weighted[:, 0] @ z**4 - 3).abs()) < 1e-10, "E[z⁴]"
    seen = weighted[:, 0] > 0
    h = weighted[seen] / weighted[seen, :1]
    assert torch.allclose(weighted[seen].T @ h, torch.eye(9, dtype=torch.float64), atol=1e-10)
