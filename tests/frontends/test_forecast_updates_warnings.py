"""A forecast that was asked for by name and cannot be: said once, when the fit starts, with what to do about it.

What no loss would change comes before a loss is asked for, in the warning and in the record.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ntkwatch import Monitor, NTKWatch
from ntkwatch.linearized.forecast import LinearForecast
from tests.frontends.test_forecast_updates import Linear, Manual, NoLoss, TwoOptimizers, data, mse, sgd
from tests.support.runs import trainer

LAZY = ["loss_if_lazy", "forecast_error"]


class Unable(NoLoss):
    """No loss is known, nor is there a forecast under any."""

    def __init__(self, configure: Callable[[Linear], Any] = sgd, manual: type[Linear] | None = None) -> None:
        super().__init__(configure)
        if manual is not None:
            self.automatic_optimization = False
            self.training_step = manual.training_step.__get__(self)
            self.configure_optimizers = manual.configure_optimizers.__get__(self)


class Clipping(NoLoss):
    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None: ...


CASES: dict[str, tuple[Callable[[], Linear], dict[str, Any], str | None]] = {
    "no loss": (lambda: NoLoss(sgd), {}, "pass loss=, a callable (outputs, targets) -> mean loss, or define ntk_loss"),
    "LBFGS": (lambda: Unable(lambda m: torch.optim.LBFGS(m.parameters())), {}, "LBFGS"),
    "manual optimization": (lambda: Unable(manual=Manual), {}, "manual optimization"),
    "two optimizers": (lambda: Unable(manual=TwoOptimizers), {}, "manual optimization"),
    "own clipping": (lambda: Clipping(sgd), {}, "Clipping.configure_gradient_clipping"),
    "a loss": (lambda: NoLoss(sgd), {"loss": mse}, None),
    "the module's own": (lambda: Linear(sgd), {}, None),
    "the full preset": (lambda: NoLoss(sgd), {"diagnostics": "full"}, None),
    "another diagnostic": (lambda: NoLoss(sgd), {"diagnostics": ["kernel_angle"]}, None),
}


def fit(case: str, path: Path, steps: int = 4) -> tuple[NTKWatch, list[str]]:
    make, settings, _ = CASES[case]
    watch = NTKWatch(**{"probes": "train", "budget": None, "every": 1, "diagnostics": LAZY, **settings})
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer(path, watch, max_steps=steps).fit(make(), data())
    return watch, [str(w.message) for w in seen if "no linear forecast" in str(w.message)]


@pytest.mark.parametrize("case", CASES)
def test_it_is_said_once_at_the_start_with_what_to_do(case: str, tmp_path: Path) -> None:
    reason = CASES[case][2]
    watch, said = fit(case, tmp_path)
    assert watch.last.step >= 2, "several probes"
    assert len(said) == (reason is not None), said
    if reason is not None:
        assert "loss_if_lazy, forecast_error, forecast_start_error stay undefined: " in said[0]
        assert reason in said[0]


@pytest.mark.parametrize("case", [name for name, (_, _, reason) in CASES.items() if reason and name != "no loss"])
def test_what_holds_under_any_loss_comes_first(case: str, tmp_path: Path) -> None:
    reason = str(CASES[case][2])
    watch, said = fit(case, tmp_path)
    for text in (*said, *(watch.last.reasons[name] for name in LAZY)):
        assert reason in text, text
        assert "pass loss=" not in text, "it would not help"


def test_a_forecast_made_by_hand_says_the_same() -> None:
    model = torch.nn.Linear(4, 2).double()
    with pytest.raises(ValueError, match="LBFGS"):
        LinearForecast(model, torch.optim.LBFGS(model.parameters()))
    with pytest.raises(ValueError, match="pass loss="):
        LinearForecast(model, torch.optim.SGD(model.parameters(), 0.1))


def test_without_a_trainer_a_loss_is_asked_for_first() -> None:
    """A Monitor's forecast can still be attached, and needs a loss then."""
    batch = next(iter(data()))
    found = Monitor(torch.nn.Linear(4, 2).double(), batch, diagnostics=LAZY).measure(0)
    assert "pass loss=" in found.reasons["loss_if_lazy"]
    assert "LinearForecast" in found.reasons["forecast_error"]
