"""from_module predicts the mean of a module's empirical K_0, or names what it cannot convert."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ntkwatch import infinite
from ntkwatch.infinite import ConversionError

Factory = Callable[[int], nn.Module]


class BasicBlock(nn.Module):
    """torchvision's, with a projection where the shape changes."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample: nn.Module | None = None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """A torchvision-style stem, two blocks and a head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layers = nn.Sequential(BasicBlock(width, width, 1), BasicBlock(width, 2 * width, 2))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(2 * width, 2)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.layers(F.relu(self.bn1(self.conv1(x)))))
        return self.fc(torch.flatten(x, 1))


class PreActivation(nn.Module):
    """A residual CNN whose stream stays Gaussian: in closed form."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.fc = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv2(F.relu(self.conv1(F.relu(self.norm(x)))))
        return self.fc(F.relu(x).mean((2, 3)))


class Mixer(nn.Module):
    """Tokens, pre-norm residual MLPs, a mean over tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(3, width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.mlp(self.norm(x))
        return self.head(x.mean(dim=1))


class NTKParametrized(nn.Module):
    """N(0, 1) weights with multipliers 1/√fan_in, and an output scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.w1 = nn.Parameter(torch.randn(width, 5))
        self.w2 = nn.Parameter(torch.randn(2, width))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(F.linear(x, self.w1) * (1.3 / math.sqrt(5)))
        return 0.5 * F.linear(h, self.w2 / math.sqrt(self.width))


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))


def xavier(width: int) -> nn.Module:
    model = nn.Sequential(
        nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, 2)
    )
    for m in model:
        if isinstance(m, nn.Linear):
            nn.init.xavier_uniform_(m.weight)
            nn.init.zeros_(m.bias)
    model[2].weight.requires_grad_(False)
    return model


def normed(width: int) -> nn.Module:
    """LayerNorm on what has a mean: the output of an activation."""
    return nn.Sequential(
        nn.Linear(5, width), nn.ReLU(), nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
    )


def cnn(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, stride=2, padding=1, padding_mode="circular"),
        nn.LeakyReLU(0.1),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(width, 2),
    )


def cnn1d(width: int) -> nn.Module:
    model = nn.Sequential(nn.Conv1d(2, width, 3, padding="same"), nn.ReLU(), nn.Flatten(), nn.Linear(width * 6, 2))
    nn.init.kaiming_normal_(model[0].weight)
    nn.init.zeros_(model[0].bias)  # a blank patch is then exactly at the kink
    return model


CASES: dict[str, tuple[Factory, tuple[int, ...], int, int]] = {  # module of a width, input shape, width, seeds
    "mlp": (mlp, (5,), 128, 30),
    "xavier, frozen layer": (xavier, (5,), 96, 30),
    "ntk parametrization": (NTKParametrized, (5,), 256, 30),
    "layer norm": (normed, (5,), 128, 30),
    "cnn": (cnn, (2, 4, 4), 64, 20),
    "cnn 1d": (cnn1d, (2, 6), 96, 30),
    "resnet": (ResNet, (2, 4, 4), 32, 10),
    "pre-activation resnet": (PreActivation, (2, 4, 4), 32, 16),
    "mixer": (Mixer, (4, 3), 96, 20),
}


def probes(shape: tuple[int, ...], n: int = 3) -> Tensor:
    x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(5))
    if len(shape) > 1:
        x[0, :, :2] = 0  # blank patches
    return x


def empirical(model: nn.Module, x: Tensor) -> Tensor:
    """K_0 by plain autograd in float64: one backward pass per input and output."""
    model = copy.deepcopy(model).double().eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    f = model(x.double())
    k = torch.zeros(len(x), len(x), dtype=torch.float64)
    for c in range(f.shape[1]):
        rows = [torch.autograd.grad(f[i, c], parameters, retain_graph=True) for i in range(len(x))]
        j = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
        k += j @ j.T / f.shape[1]
    return k


def draws(factory: Factory, width: int, seeds: int, x: Tensor) -> Tensor:
    """[seeds, n, n]."""
    out = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        out.append(empirical(factory(width), x))
    return torch.stack(out)


@pytest.mark.parametrize("name", CASES)
def test_mean_of_the_empirical_kernel(name: str) -> None:
    factory, shape, width, seeds = CASES[name]
    x = probes(shape)
    torch.manual_seed(1000)
    predicted = infinite.kernel(infinite.from_module(factory(width)), x.double()).ntk
    k = draws(factory, width, seeds, x)
    gap = float((k.mean(0) - predicted).norm() / predicted.norm())
    error = float((k.std(0) / seeds**0.5).norm() / predicted.norm())
    assert gap < 3 * error + 1 / width, f"{name}: {gap:.4f} off where the Monte Carlo error is {error:.4f}"
    assert 3 * error + 1 / width < 0.2, f"{name}: too few draws to tell a right prediction from a wrong one"


def test_negative_control() -> None:
    """The comparison can fail: the NTK parametrization of the same network is another kernel."""
    x = probes((5,))
    k = draws(mlp, 128, 10, x)
    layers = [infinite.Dense(3**-0.5, 15**-0.5), infinite.Relu(), infinite.Dense(3**-0.5), infinite.Relu()]
    wrong = infinite.kernel(infinite.Serial(*layers, infinite.Dense(3**-0.5)), x.double()).ntk
    assert float((k.mean(0) - wrong).norm() / wrong.norm()) > 1


def kaiming(factory: Factory) -> Factory:
    """torch's default shrinks signals threefold a layer, so that bias gradients, which do not fluctuate, make up most
    of K_0 up to widths of thousands and hide the law; at Kaiming's scale the law shows from the start."""

    def build(width: int) -> nn.Module:
        model = factory(width)
        for m in model.modules():
            if isinstance(m, nn.Linear | nn.Conv2d):
                nn.init.kaiming_normal_(m.weight)
        return model

    return build


def deviations(factory: Factory, shape: tuple[int, ...], widths: list[int], seeds: int) -> float:
    """The slope of log rms ‖K_0 - K_∞‖/‖K_∞‖ on log width.

    Root mean squares, since most of a deviation is one mode, the scale of K_0: single ones come close to 0, and their
    logarithms scatter by more than 1.
    """
    x, rms = probes(shape, n=8), []
    for width in widths:
        limit = infinite.kernel(infinite.from_module(factory(width)), x.double()).ntk
        gaps = (draws(factory, width, seeds, x) - limit).flatten(1).norm(dim=1) / limit.norm()
        rms.append(float(gaps.square().mean().sqrt()))
    a, b = torch.tensor(widths, dtype=torch.float64).log(), torch.tensor(rms, dtype=torch.float64).log()
    return float(((a - a.mean()) * (b - b.mean())).sum() / (a - a.mean()).square().sum())


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_deviation_falls_with_width(name: str) -> None:
    factory, shape, _, _ = CASES[name]
    slope = deviations(kaiming(factory), shape, [64, 200, 640] if name == "mlp" else [16, 64, 192], 10)
    assert slope == pytest.approx(-0.5, abs=0.2), f"{name}: {slope:.3f}"


@pytest.mark.soak
@pytest.mark.parametrize("name", ["mlp", "cnn", "pre-activation resnet", "resnet"])
def test_deviation_falls_as_one_over_the_square_root_of_width(name: str) -> None:
    factory, shape, _, _ = CASES[name]
    slope = deviations(kaiming(factory), shape, [64, 128, 256, 512, 1024] if name == "mlp" else [24, 48, 96, 192], 120)
    print(f"\n{name}: slope {slope:+.3f} of log rms distance to K_∞ on log width, 120 seeds")
    assert slope == pytest.approx(-0.5, abs=0.07), f"{name}: {slope:.3f}"


def test_initialisation_is_read_from_the_weights() -> None:
    torch.manual_seed(0)
    cases: list[tuple[Callable[[Tensor], object], str]] = [
        (lambda w: nn.init.kaiming_uniform_(w, a=math.sqrt(5)), "PyTorch default"),
        (nn.init.kaiming_normal_, "Kaiming, 2/fan_in"),
        (lambda w: nn.init.kaiming_uniform_(w, mode="fan_out"), "Kaiming, 2/fan_out"),
        (nn.init.xavier_normal_, "Xavier"),
        (lambda w: nn.init.normal_(w, std=w.shape[1] ** -0.5), "LeCun"),
        (nn.init.normal_, "standard normal"),
        (lambda w: nn.init.trunc_normal_(w, std=0.02), "normal(0, 0.02)"),
        (lambda w: nn.init.normal_(w, std=0.2), "measured"),
        (nn.init.zeros_, "zero"),
    ]
    for init, expected in cases:
        model = nn.Sequential(nn.Linear(40, 100), nn.ReLU(), nn.Linear(100, 300), nn.ReLU(), nn.Linear(300, 10))
        for m in model:
            if isinstance(m, nn.Linear):
                init(m.weight)
        got = infinite.initialisation(model)
        for layer in (0, 2, 4):
            assert got[f"{layer}.weight"].startswith(expected), f"{expected}: read {got}"
            assert got[f"{layer}.bias"].startswith("PyTorch default"), f"{expected}: read {got}"


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if x.sum() > 0 else x


class Gated(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * torch.sigmoid(x)


class Crossed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        return (a + x) + a


def trained_batch_norm() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    model(torch.randn(5, 4))
    return model


def offset() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 2))
    nn.init.constant_(model[0].bias, 0.3)
    return model


REFUSED: dict[str, tuple[nn.Module, str]] = {
    "max pooling": (nn.Sequential(nn.Conv2d(1, 4, 3), nn.MaxPool2d(2)), "1 .MaxPool2d.*maximum"),
    "grouped convolution": (nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), "0 .Conv with groups=2"),
    "tied weights": (Shared(), "used twice"),
    "control flow": (Branching(), "torch.fx cannot trace Branching"),
    "gating": (Gated(), "mul.*not a constant"),
    "correlated branches": (Crossed(), "correlated"),
    "tracked BatchNorm": (trained_batch_norm(), "1 .BatchNorm1d. has statistics of batches"),
    "constant bias": (offset(), "0.bias has a mean"),
    "linear on positions": (nn.Sequential(nn.Conv1d(4, 4, 3), nn.Linear(4, 2)), "1 .Linear. follows a convolution"),
    "weight norm": (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))), "parametrized"),
    "unknown module": (nn.Sequential(nn.LSTM(4, 4)), "0 .LSTM. cannot be converted"),
}


class Calls(nn.Module):
    """A function of the layers, for what has no module."""

    def __init__(self, call: Callable[[nn.ModuleList, Tensor], Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.call = nn.ModuleList(layers), call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.layers, x)


def two(call: Callable[[nn.ModuleList, Tensor], Tensor]) -> nn.Module:
    return Calls(call, nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2))


REFUSED |= {
    "concatenation": (two(lambda m, x: m[2](torch.cat([m[0](x), m[0](x)], -1))), "0.weight is used twice|cat does not"),
    "a constant added": (two(lambda m, x: m[2](torch.relu(m[0](x) + 1))), "adds what does not come from the input"),
    "several tokens": (two(lambda m, x: m[2](torch.relu(m[0](x))[:, :2].flatten(1))), r"takes one token, x\[:, i\]"),
    "a group norm": (nn.Sequential(nn.Linear(4, 8), nn.GroupNorm(2, 8), nn.Linear(8, 2)), "1 .GroupNorm"),
    "a learned slope": (nn.Sequential(nn.Linear(4, 8), nn.PReLU(), nn.Linear(8, 2)), "1 .PReLU"),
    "reflection": (nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, padding_mode="reflect")), "padding_mode='reflect'"),
    "spectral norm": (nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 2))), "parametrized"),
    "one layer used twice": (two(lambda m, x: m[2](m[1](torch.relu(m[1](m[0](x)))))), "used twice"),
    "an activation of raw inputs": (nn.Sequential(nn.ReLU(), nn.Linear(4, 2)), "needs Gaussian inputs"),
    "an activation after flatten": (
        nn.Sequential(nn.Conv1d(4, 4, 1), nn.Flatten(), nn.ReLU()),
        "needs Gaussian inputs",
    ),
}


@pytest.mark.parametrize(
    ("call", "spec"),
    [
        (lambda u: F.elu(u, 0.3), infinite.Activation(lambda u: F.elu(u, 0.3))),
        (lambda u: F.elu(u, alpha=0.3, inplace=True), infinite.Activation(lambda u: F.elu(u, 0.3))),
        (lambda u: F.softplus(u, beta=2.0), infinite.Activation(lambda u: F.softplus(u, 2.0))),
        (lambda u: F.relu(u, True), infinite.Relu()),
        (lambda u: F.leaky_relu(u, 0.3), infinite.LeakyRelu(0.3)),
    ],
)
def test_arguments_of_activations_count(call: Callable[[Tensor], Tensor], spec: infinite.Layer) -> None:
    x = probes((4,)).double()
    first, last = nn.Linear(4, 8), nn.Linear(8, 2)
    got = infinite.kernel(infinite.from_module(Calls(lambda m, x: m[1](call(m[0](x))), first, last)), x).ntk
    dense = infinite.from_module(nn.Sequential(first, last)).layers
    assert torch.allclose(got, infinite.kernel(infinite.Serial(dense[0], spec, dense[1]), x).ntk, rtol=1e-12)


def test_a_module_in_training_mode_is_read_as_in_evaluation() -> None:
    """Stochastic depth and its like ask for the mode."""

    def call(m: nn.ModuleList, x: Tensor) -> Tensor:
        return m[1](F.dropout(torch.relu(m[0](x)), 0.5, m.training))

    model = Calls(call, nn.Linear(4, 8), nn.Linear(8, 2)).train()
    x = probes((4,)).double()
    plain = nn.Sequential(model.layers[0], nn.ReLU(), model.layers[1])
    expected = infinite.kernel(infinite.from_module(plain), x).ntk
    assert torch.equal(infinite.kernel(infinite.from_module(model), x).ntk, expected)
    assert all(m.training for m in model.modules())


def test_hooks_are_not_run() -> None:
    seen: list[object] = []
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), nn.Linear(8, 2))
    for m in model.modules():
        m.register_forward_hook(lambda m, args, out: seen.append(out))
    infinite.from_module(model)
    assert not seen


def test_a_large_weight_is_read_from_a_sample() -> None:
    model = nn.Sequential(nn.Linear(2000, 3000), nn.ReLU(), nn.Linear(3000, 2))
    assert infinite.initialisation(model)["0.weight"].startswith("PyTorch default")


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_converted_is_named(name: str) -> None:
    module, message = REFUSED[name]
    with pytest.raises(ConversionError, match=message):
        infinite.from_module(module)


def test_conversion_leaves_the_module_alone() -> None:
    model = ResNet(8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    infinite.kernel(infinite.from_module(model), torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0)))
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
