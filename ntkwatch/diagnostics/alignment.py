"""Whether the kernel turns towards the targets, against what shuffled labels give, by class and in the features."""

from __future__ import annotations

import torch
from torch import Tensor

from ntkwatch import metrics
from ntkwatch.diagnostics.diagnostic import Diagnostic, Price
from ntkwatch.diagnostics.generalisation import HALVES, halves
from ntkwatch.diagnostics.view import View, ask, ask_vector, known
from ntkwatch.metrics.undefined import Undefined


def centered_alignment(view: View) -> Tensor:
    """CKA of the [n, n] kernel with the targets."""
    return ask("centered_alignment", view.square, known(view.targets))


def centered_alignment_z(view: View) -> Tensor:
    """The alignment against 200 label permutations, the same ones at every step."""
    generator = torch.Generator().manual_seed(view.seed)
    return ask("alignment_z", view.square, known(view.targets), generator)


def target_alignment(view: View) -> Tensor:
    """cos(K, YYᵀ), uncentred, of the [n, n] kernel."""
    return ask("target_alignment", view.square, known(view.targets))


def alignment_null_mean(view: View) -> Tensor:
    """What centered_alignment is on average when the labels are shuffled."""
    return ask("alignment_null_mean", view.square, known(view.targets))


def _power(view: View) -> Tensor:
    return ask_vector("cumulative_power", view.square, known(view.targets), floor=view.square_floor)


def _null(view: View) -> Tensor:
    return ask_vector("cumulative_power_null", view.square, floor=view.square_floor)


def power_auc(view: View) -> Tensor:
    """Area under the cumulative power of the targets in the kernel's directions."""
    return ask("power_auc", _power(view))


def power_auc_null(view: View) -> Tensor:
    """What power_auc is on average when the labels are shuffled over the probes.

    Formula: (1/n) Σ_k Σ_{i≤k} (1 − (v_iᵀ1)²/n)/(n − 1)
    Range: [0, 1], about ½; undefined where the kernel is zero
    Source: the permutation mean of Canatar et al. 2021's cumulative power
    Pitfalls: power_auc means something only above it
    """
    return ask("power_auc", _null(view))


def power_k90(view: View) -> Tensor:
    """Number of top directions that hold nine tenths of the targets."""
    return ask("power_k90", _power(view))


def power_k90_null(view: View) -> Tensor:
    """What power_k90 is for labels shuffled over the probes: the rank at which the null's curve reaches .9.

    Formula: min{k : Σ_{i≤k} (1 − (v_iᵀ1)²/n)/(n − 1) ≥ .9}
    Range: 1 … n; undefined where the kernel is zero
    Source: the permutation mean of Canatar et al. 2021's cumulative power
    Pitfalls: of the mean curve, not the mean of k90
    """
    return ask("power_k90", _null(view))


def _class_blocks(view: View) -> metrics.ClassBlocks:
    fit = metrics.class_block_fit(view.square, view.labels)
    if not bool(torch.isfinite(torch.stack([fit.same_class, fit.different_class, fit.r2])).all()):
        raise Undefined(metrics.why_undefined("class_block_fit", view.square, view.labels) or "it is not finite")
    return fit


def class_block_r2(view: View) -> Tensor:
    """How much of the kernel is three numbers: same example, same class, different class.

    Formula: R² of the fit by the mean of K over each kind of pair
    Range: [0, 1]; undefined without classes, with one class, or where no class has two probes
    Source: Seleznova et al. 2023
    Pitfalls: the diagonal alone can make it high in a wide net: see class_block_gap
    """
    return _class_blocks(view).r2


def class_block_gap(view: View) -> Tensor:
    """How much closer two probes of one class are in the kernel than two of different classes.

    Formula: (mean K over pairs of one class − mean over pairs of different classes)/mean of the diagonal
    Range: (−2, 2), 0 where the kernel does not see the classes; undefined as class_block_r2 is
    Source: Seleznova et al. 2023 (the three means)
    Pitfalls: a mean over all classes: one that stands apart can make it
    """
    fit = _class_blocks(view)
    return (fit.same_class - fit.different_class) / fit.same_example


def class_specialization(view: View) -> Tensor:
    """the mean diagonal of this matrix over the classes among the probes, above 1 where outputs specialise."""
    blocks, y = known(view.blocks), view.labels
    if len(blocks) < 2:
        raise Undefined("specialisation compares outputs and there is one")
    present = (y > 0).any(0) & ~(y > 0).all(0)
    matrix = metrics.class_specialization(blocks, y)
    diagonal = matrix.diagonal()[present]
    if len(diagonal) < 2 or not bool(torch.isfinite(diagonal).all()):
        raise Undefined(metrics.why_undefined("class_specialization", blocks, y) or "fewer than 2 classes are present")
    return diagonal.mean()


def feature_angle(view: View) -> Tensor:
    """Rotation of the last hidden layer's feature kernel since the baseline.

    Formula: 2·arcsin(‖F̂ − F̂₀‖/2), F = hhᵀ, h the input of the last executed trained Linear or convolution
    Range: [0, π/2] radians; undefined without such a layer, or where θ_0 was not kept
    Source: Nam et al. 2024 (the feature kernel); the angle is the arccos of Fort et al. 2020's similarity
    Pitfalls: of the features alone: the tangent kernel also moves by the layers below and above them
    """
    h, h0 = view.ask_model().features, view.ask_model().features_0
    return ask("kernel_angle", h @ h.T, h0 @ h0.T)


def feature_cka(view: View) -> Tensor:
    """Similarity of the last hidden layer's features to the baseline's, without the constant function.

    Formula: CKA(hhᵀ, h₀h₀ᵀ), h the input of the last executed trained Linear or convolution
    Range: [0, 1]; undefined below 3 probes, where centred features are zero, or where θ_0 was not kept
    Source: Kornblith et al. 2019; Nam et al. 2024
    Pitfalls: 1 is no change; a mean that moves leaves it alone
    """
    h, h0 = view.ask_model().features, view.ask_model().features_0
    return ask("cka", h @ h.T, h0 @ h0.T)


def feature_alignment(view: View) -> Tensor:
    """CKA of the last hidden layer's feature kernel with the targets.

    Formula: cos(F̃, ỸỸᵀ), F = hhᵀ, h the input of the last executed trained Linear or convolution
    Range: [0, 1]; undefined as centered_alignment is, or without such a layer
    Source: Cortes et al. 2012; Nam et al. 2024
    Pitfalls: grows where the readout learns too: read it beside feature_angle
    """
    h = view.ask_model().features
    return ask("centered_alignment", h @ h.T, known(view.targets))


def after_kernel_gain(view: View) -> Tensor:
    """Held-out accuracy of ridge regression with K_t minus with K_0, over 8 seeded halvings of the probes."""
    y = view.labels
    gains = []
    for train, test in halves(view):
        order = torch.cat([train, test])
        k, k0 = (kernel[order][:, order] for kernel in (view.square, view.square_0))
        gains.append(ask("after_kernel_gain", k, k0, y[order], len(train)))
    return torch.stack(gains).mean()


TARGETS = ("targets",)
ALIGNMENT: dict[str, Diagnostic] = {
    "centered_alignment": Diagnostic(centered_alignment, default=True, needs=TARGETS),
    "centered_alignment_z": Diagnostic(centered_alignment_z, default=True, needs=TARGETS),
}
FORWARD = Price("a forward pass at θ_0 and one at θ_t", passes=2)
VECTORS = Price("eigenvectors of the kernel", squares=14)
MORE_ALIGNMENT: dict[str, Diagnostic] = {
    "target_alignment": Diagnostic(target_alignment, needs=TARGETS),
    "alignment_null_mean": Diagnostic(alignment_null_mean, needs=TARGETS),
    "power_auc": Diagnostic(power_auc, needs=TARGETS, cost=VECTORS),
    "power_auc_null": Diagnostic(power_auc_null, cost=VECTORS),
    "power_k90": Diagnostic(power_k90, needs=TARGETS, cost=VECTORS),
    "power_k90_null": Diagnostic(power_k90_null, cost=VECTORS),
    "class_block_r2": Diagnostic(class_block_r2, needs=TARGETS),
    "class_block_gap": Diagnostic(class_block_gap, needs=TARGETS),
    "class_specialization": Diagnostic(class_specialization, reduction="blocks", needs=TARGETS),
    "feature_angle": Diagnostic(feature_angle, cost=FORWARD),
    "feature_cka": Diagnostic(feature_cka, cost=FORWARD),
    "feature_alignment": Diagnostic(feature_alignment, needs=TARGETS, cost=FORWARD),
    "after_kernel_gain": Diagnostic(after_kernel_gain, needs=TARGETS, cost=HALVES),
}
