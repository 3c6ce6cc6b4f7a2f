"""What a fit goes on from: a checkpoint's state, or an earlier fit of the same callback on the same parameters."""

from __future__ import annotations

import weakref
from typing import Any

from ntkwatch.distributed import Ranks
from ntkwatch.frontends.record_place import place_of
from ntkwatch.watching.checkpoint import near, usable
from ntkwatch.watching.error_policy import ErrorPolicy
from ntkwatch.watching.messages import warn

OTHER = "the earlier fit of this callback was of {}, so its record cannot be continued"


class Continuation:
    """Keeps what the next fit may go on from; `settle` decides, on rank 0 for all.

    Attributes:
        why: why an earlier fit's record is not continued; None where there is none, or where it is.
        session: of the fit that is over, for a checkpoint that is saved now; empty once another has begun.
    """

    def __init__(self) -> None:
        self.why: str | None = None
        self.session: dict[str, Any] = {}
        self._loaded: Any = None
        self._kept: dict[str, Any] | None = None
        self._model: weakref.ref[Any] | None = None
        self._trained: dict[str, tuple[int, ...]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Of another process or a copy, the model is another one."""
        return vars(Continuation())

    def begin(self) -> None:
        """A new fit: a checkpoint's state, if there is one, is still to come."""
        self._loaded, self.why, self.session = None, None, {}

    def load(self, state: Any) -> None:
        """The state of the fit's checkpoint, unchecked."""
        self._loaded = state

    def keep(self, state: dict[str, Any], module: Any) -> None:
        """What a fit has left, for the next one; nothing where it has measured nothing."""
        self.session = state["session"]
        if self.session:
            self._kept, self._model, self._trained = state, weakref.ref(module), _trained(module)

    def settle(self, trainer: Any, module: Any, ranks: Ranks, failures: ErrorPolicy) -> dict[str, Any] | None:
        """The state to go on from, the same on every rank; None to begin anew. It never raises."""
        state = None
        if ranks.first():
            try:
                state = self._settled(trainer, module)
            except Exception as error:
                told = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
                warn(f"the checkpoint's state of NTKWatch cannot be used ({told}): it starts anew")
        return failures.shared(ranks, state, None)

    def _settled(self, trainer: Any, module: Any) -> dict[str, Any] | None:
        if self._loaded is not None and (state := usable(self._loaded, near(trainer, place_of(trainer).folder))):
            return state
        if self._kept is None or getattr(trainer, "ckpt_path", None) is not None:
            return None  # weights of a checkpoint that was written without us are nobody's later ones
        model = self._model() if self._model is not None else None
        if model is not module:
            self.why = OTHER.format("another model")
        elif _trained(module) != self._trained:
            self.why = OTHER.format("other trained parameters")
        return self._kept if self.why is None else None


def _trained(module: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in module.named_parameters() if p.requires_grad}
