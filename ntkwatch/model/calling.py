"""A module called on batches: by the first reading of a batch that it takes, remembered for all of its form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ntkwatch.model.batch_reading import Reading, Signature, readings

CALL_ERRORS = (TypeError, AttributeError, ValueError, LookupError)  # how a model says that it is not called so


class Caller:
    """One module, and how it was seen to take batches."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.signature = module, Signature.of(module)
        self.known: dict[Any, Reading] = {}

    def __call__(self, value: Any) -> Any:
        """What the module gives of a batch."""
        form, failures = form_of(value), []
        known = self.known.get(form)
        for reading in readings(self.signature, value) if known is None else [known]:
            try:
                result = reading.call(self.module, value)
            except CALL_ERRORS as error:
                failures.append(error)
            else:
                self.known[form] = reading
                return result
        raise failures[0]

    def reading(self, value: Any) -> Reading:
        """How the module takes a batch: as it took one of its form, else the likeliest way."""
        return self.known.get(form_of(value)) or next(readings(self.signature, value))

    def is_unambiguous(self, value: Any) -> bool:
        """Whether there is one way, or the module has taken one."""
        return form_of(value) in self.known or len(list(readings(self.signature, value))) == 1


def form_of(value: Any) -> Any:
    """What two batches share that go in alike: their containers, and the dimensions of their tensors."""
    if isinstance(value, Mapping):
        return type(value), tuple((key, form_of(item)) for key, item in value.items())
    if isinstance(value, tuple | list) and not (value and all(isinstance(item, str) for item in value)):
        return type(value), tuple(map(form_of, value))
    return type(value), value.ndim if isinstance(value, Tensor) else None
