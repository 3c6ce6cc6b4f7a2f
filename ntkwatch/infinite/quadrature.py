"""Activations without a closed form: Hermite series, with exact terms for their kinks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from ntkwatch.infinite import powers
from ntkwatch.infinite.activations import Elementwise
from ntkwatch.infinite.covariances import Features
from ntkwatch.infinite.kinks import ORDERS, find_jumps, find_kinks

NEGLIGIBLE_ERROR = 1e-9  # relative to E[φ²]: a remainder below is not worth a longer series
WARNING_ERROR = 1e-3  # above it, a warning
EXTENSION = 4  # times degree and nodes, for what varies fast
_ROUNDING = 1e-13  # of a sum of squares
_BLOCK = 2**22  # entries of values at nodes that are held at a time
_RESCALED = 1e100  # a polynomial that is larger is divided by it
_SERIES_TOLERANCE = 1e-13  # of the powers' series, |c|^degree: below, their closed form would add nothing


@dataclass(frozen=True)
class Activation(Elementwise):
    """Any elementwise torch function, by Gauss–Hermite quadrature and exact pieces at its kinks.

    fn(√q z) is expanded in Hermite polynomials (coefficients by a rule with `nodes` nodes, once per input), and
    E[φ(u)φ(v)] = Σ_j a_j(q) a_j(q') c^j by Mehler's formula, up to `degree`. Where φ, φ' or φ'' jump, truncated powers
    take the jumps out of the series, and their own expectation is exact. For piecewise polynomials (hardtanh, relu6,
    sign, rounding) and analytic functions (tanh, SiLU) the error is below 1e-6 at any correlation; where the
    function varies too fast for the series, `error` bounds it and a warning says so.

    φ' is fn's autograd derivative, as a network in torch has it: of sign it is 0, and what jumps has no infinite slope.

    Args:
        fn: the function, of a tensor of any shape.
        degree, nodes: of the series and its quadrature; four times as many are taken where the remainder asks for it.
        kinks: where fn or its first two derivatives jump; None looks for them, () says that there are none.
    """

    fn: Callable[[Tensor], Tensor]
    degree: int = 128
    nodes: int = 512
    kinks: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.degree < self.nodes:
            raise ValueError(f"Activation needs 1 <= degree < nodes, got degree={self.degree} and nodes={self.nodes}.")

    def prepare(self, q: Tensor) -> Features:
        """Hermite coefficients and kink weights at variances q [..., n]; warns where the error bound exceeds 1e-3."""
        saved, error = self._expanded(q)
        worst = int(error.argmax())
        if float(error.flatten()[worst]) > WARNING_ERROR:
            at, by = (float(x.flatten()[worst]) for x in (q, error))
            warnings.warn(
                f"Activation({_name(self.fn)}) at variance {at:.3g} may be off by {by:.1e} of E[φ²] or E[φ'²]: it "
                f"varies faster than its series. Pass a larger degree= and nodes= than {self.degree} and {self.nodes}.",
                stacklevel=2,
            )
        return saved

    def error(self, q: Tensor) -> Tensor:
        """A bound of the error at variances q, over all correlations and relative to E[φ²] and E[φ'²]."""
        return self._expanded(q)[1]

    def dual(self, k: Tensor, a: Features, b: Features, slope: bool = True) -> tuple[Tensor, Tensor | None]:
        """Both expectations by Mehler's formula, with exact terms at the kinks; shapes as `Elementwise.dual`."""
        inverse, values, slopes, s = a
        other_inverse, other_values, other_slopes, t = b
        c = (k * inverse).mul_(other_inverse).clamp_(-1, 1)
        return _expectation(c, values, s, other_values, t), (
            _expectation(c, slopes, s, other_slopes, t) if slope else None
        )

    def first(self, q: Tensor) -> Tensor | None:
        """E[fn(u)], the Hermite coefficient of order 0, of the shape of q."""
        return self._expanded(q)[0][1][0][0]

    def apply(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """fn(u) and its autograd derivative, both of the shape of u.

        Raises:
            ValueError: fn changes the shape of its argument.
        """
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            value = self.fn(u)
            if value.shape != u.shape:
                raise ValueError(
                    f"Activation's fn must be elementwise; it turned shape {list(u.shape)} into {list(value.shape)}."
                )
            if not value.requires_grad:  # a comparison, a constant
                return value.to(u.dtype), torch.zeros_like(u)
            (slope,) = torch.autograd.grad(value.sum(), u, allow_unused=True)
        return value.detach(), torch.zeros_like(value) if slope is None else slope

    def _expanded(self, q: Tensor) -> tuple[Features, Tensor]:
        """The features of variances q, and the bound of their error."""
        reach = powers.KINK_RANGE * float(q.max().clamp_min(0).sqrt()) if q.numel() else 0.0
        kinks, jumps = _kinks_of(self, _octave(reach))
        saved, error = _features(self, q, kinks, jumps, self.degree, self.nodes)
        if float(error.max()) > NEGLIGIBLE_ERROR:
            saved, error = _features(self, q, kinks, jumps, EXTENSION * self.degree, EXTENSION * self.nodes)
        return saved, error


def _name(fn: Callable[[Tensor], Tensor]) -> str:
    return str(getattr(fn, "__name__", type(fn).__name__))


def _octave(reach: float) -> float:
    """The power of two at or above: kinks are looked for once for all smaller variances."""
    return 2.0 ** torch.tensor(max(reach, 1e-300), dtype=torch.float64).log2().ceil().item()


@lru_cache(maxsize=64)
def _kinks_of(activation: Activation, reach: float) -> tuple[tuple[float, ...], tuple[Tensor, Tensor]]:
    """The kinks, as given or as detected, and the jumps at them."""
    kinks = activation.kinks
    found = find_kinks(activation.apply, reach) if kinks is None else tuple(sorted(kinks))
    return found, find_jumps(activation.apply, found)


def _features(
    activation: Activation, q: Tensor, kinks: tuple[float, ...], jumps: tuple[Tensor, Tensor], degree: int, nodes: int
) -> tuple[Features, Tensor]:
    """(1/√q, (series, powers' series, powers' weights) of φ and of φ', places of the kinks), and the error's bound."""
    sigma = q.clamp_min(0).sqrt()
    inverse = ((1 + 2 * torch.finfo(q.dtype).eps) / sigma).masked_fill(sigma == 0, 0)
    places = tuple((t * inverse).clamp(-powers.MAX_KINK_POSITION, powers.MAX_KINK_POSITION) for t in kinks)
    blocks = sigma.flatten().split(max(1, _BLOCK // nodes))
    parts = [_block(activation, block, kinks, jumps, degree, nodes) for block in blocks]
    both, errors = [], []
    for of_one in zip(*parts, strict=True):
        joined = [torch.cat(columns, dim=-1) for columns in zip(*of_one, strict=True)]
        series, own, weights, error = (x.reshape(-1, *q.shape) for x in joined)
        both.append((_trim(series), _trim(own) if kinks else (), tuple(weights)))
        errors.append(error)
    return (inverse, *both, places), torch.cat(errors).amax(0)


def _block(
    activation: Activation,
    sigma: Tensor,
    kinks: tuple[float, ...],
    jumps: tuple[Tensor, Tensor],
    degree: int,
    nodes: int,
) -> list[list[Tensor]]:
    """Of φ and of φ': series and that of its powers alone, [J, m], their weights [3K, m], the error's bound [1, m]."""
    places = [(t / sigma.clamp_min(1e-300)).clamp(-powers.MAX_KINK_POSITION, powers.MAX_KINK_POSITION) for t in kinks]
    closed = [powers.coefficients(s, degree) for s in places]
    rules = [_hermite(m, degree + 1) for m in (nodes, nodes - (nodes - degree) // 8)]
    z, basis = (x.to(sigma) for x in rules[0])
    z_2, basis_2 = (x.to(sigma) for x in rules[1])
    found = []
    both = zip(activation.apply(sigma[:, None] * z), activation.apply(sigma[:, None] * z_2), jumps, strict=True)
    for values, values_2, jump in both:
        values, values_2 = (v.masked_fill(b[:, 0] == 0, 0) for v, b in ((values, basis), (values_2, basis_2)))
        weights = [jump[n, k] * sigma**n * (sigma > 0) for k in range(len(kinks)) for n in range(ORDERS)]
        rest, rest_2, own = values, values_2, sigma.new_zeros(degree + 1, len(sigma))
        for i, weight in enumerate(weights):
            if bool(weight.any()):
                k, n = divmod(i, ORDERS)
                rest = rest - weight[:, None] * powers.power(z, places[k][:, None], n)
                rest_2 = rest_2 - weight[:, None] * powers.power(z_2, places[k][:, None], n)
                own = own + weight * closed[k][n]
        smooth = (rest @ basis).T
        drift = (smooth - (rest_2 @ basis_2).T).square().sum(0)  # what is too fast for the nodes folds into low degrees
        total = rest.square() @ basis[:, 0]  # E[rest²], for h_0 is 1
        size = values.square() @ basis[:, 0]  # E[φ²]
        kept = torch.stack(weights) if weights else sigma.new_zeros(0, len(sigma))
        found.append([smooth + own, own, kept, _bound(total, smooth, own, drift, size)[None]])
    return found


def _bound(total: Tensor, smooth: Tensor, own: Tensor, drift: Tensor, size: Tensor) -> Tensor:
    """Of Σ over j > degree of what is not in closed form: r_j r'_j + r_j p'_j + p_j r'_j, by Cauchy and Schwarz.

    drift: of the coefficients up to the degree, squared, between two quadratures. size: E[φ²], that it is relative to.
    """
    tail = (total - smooth.square().sum(0) - _ROUNDING * total).clamp_min(0)
    last = own[len(own) // 2 :].square().sum(0)  # at least what is beyond the degree
    size = size.clamp_min(torch.finfo(total.dtype).tiny)
    drift = (drift - _ROUNDING * total).clamp_min(0)
    return ((tail + 2 * (tail * last).sqrt()) / size + 2 * (drift / size).sqrt()).masked_fill(total == 0, 0)


def _expectation(c: Tensor, a: Features, s: Features, b: Features, t: Features) -> Tensor:
    """E[φ(u)φ(v)] by the series, and by the powers' own expectation where their series is not yet at its end."""
    (series, own, weights), (others, other_own, other_weights) = a, b
    out = _series(c, series, others)
    if not s or not t:
        return out
    near = c.abs() ** min(len(series), len(others)) > _SERIES_TOLERANCE
    if not bool(near.any()):
        return out

    def some(saved: Features) -> list[Tensor]:
        return [x.expand(c.shape)[near] for x in saved]

    at = c[near]
    exact = powers.pairs(at, some(s), some(weights), some(t), some(other_weights))
    out[near] += exact - _series(at, tuple(some(own)), tuple(some(other_own)))
    return out


def _series(c: Tensor, a: Features, b: Features) -> Tensor:
    """Σ_j a_j b_j c^j by Horner's rule."""
    terms = list(zip(a, b, strict=False))  # the shorter one's tail is below eps
    out = torch.zeros_like(c)
    for x, y in reversed(terms):
        out.mul_(c).add_(x * y)
    return out


def _trim(coefficients: Tensor) -> Features:
    """The coefficients a_j [J, *S, n] as a tuple over j, without the tail that no sum of squares can see."""
    flat = coefficients.flatten(1)
    tail = flat.square().flip(0).cumsum(0).flip(0)
    visible = (tail > torch.finfo(flat.dtype).eps * tail[0] / 8).any(dim=1)
    return tuple(coefficients[: max(1, int(visible.sum()))])


@lru_cache(maxsize=8)
def _hermite(nodes: int, degrees: int) -> tuple[Tensor, Tensor]:
    """Nodes z [m] and w_i·h_j(z_i) [m, degrees], h_j orthonormal under N(0, 1), of the Gauss–Hermite rule.

    The nodes are eigenvalues of the Jacobi matrix (Golub & Welsch 1969). The weights are 1/Σ_j h_j(z_i)², by the
    three-term recurrence with a scale of its own at each node: eigenvectors are right only to 1e-16 of their largest
    entry, and a function that grows like exp would meet that error where weights are 1e-100.
    """
    off = torch.arange(1, nodes, dtype=torch.float64).sqrt()
    z = torch.from_numpy(eigh_tridiagonal(off.new_zeros(nodes).numpy(), off.numpy(), eigvals_only=True))
    before, here, total = torch.zeros_like(z), torch.ones_like(z), torch.ones_like(z)
    scale = torch.zeros_like(z)  # log of what h_j was divided by
    columns, scales = [here], [scale]
    for j in range(1, nodes):
        before, here = here, (z * here - (j - 1) ** 0.5 * before) / j**0.5
        total = total + here.square()
        down = torch.ones_like(z).masked_fill(here.abs() > _RESCALED, 1 / _RESCALED)
        before, here, total, scale = before * down, here * down, total * down.square(), scale - down.log()
        if j < degrees:
            columns.append(here)
            scales.append(scale)
    weighted = torch.stack(columns, 1) / total[:, None]
    return z, weighted * (torch.stack(scales, 1) - 2 * scale[:, None]).exp()
