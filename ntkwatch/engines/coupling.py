"""Detection of coupled examples: an example's output depends on the other examples of its batch.

A model may couple examples only in batches of some sizes (a normalisation from ten rows on), so every batch size in use
is checked.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ntkwatch.engines.memory import is_out_of_memory
from ntkwatch.engines.refusals import coupled, describe_partial_batches, describe_randomness
from ntkwatch.model import Network, UnsupportedModel, batch_size, inputs_of, take
from ntkwatch.model.shared_leaves import elsewhere

MANY = 64  # examples in one batch of the check, unless a kernel uses larger batches
_SOME = 3  # examples that run alone


class Sizes:
    """The batch sizes at which a network's examples were found uncoupled."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[Network, set[int]] = weakref.WeakKeyDictionary()

    def add(self, network: Network, x: Any) -> None:
        """Records that x has passed `check_uncoupled`."""
        self._known.setdefault(network, {1}).add(min(MANY, batch_size(inputs_of(x))))

    def known(self, network: Network) -> frozenset[int]:
        """The recorded sizes of a network; 1 always counts."""
        return frozenset(self._known.get(network, {1}))

    def restore(self, network: Network, sizes: Iterable[int]) -> None:
        """Takes over the sizes recorded for another Network of the same module."""
        self._known[network] = set(sizes)

    def check(self, network: Network, parts: Iterable[Any], state: Mapping[str, Tensor] | None) -> None:
        """Checks the parts whose batch size is new.

        Raises:
            UnsupportedModel: examples of a part are coupled.
        """
        known = self._known.setdefault(network, {1})
        for part in parts:
            size = batch_size(inputs_of(part))
            if size not in known:
                check_uncoupled(network, part, state, size)
                known.add(size)


def check_uncoupled(network: Network, x: Any, state: Mapping[str, Tensor] | None = None, most: int = MANY) -> None:
    """Checks that an example's output depends neither on the other examples of its batch nor on chance.

    A few examples run together, each alone, and in a batch of up to `most` examples: a maximum or a median over the
    batch may come from any example. If the model rejects single examples, all but the first run instead.

    Zero outputs (a readout initialised to zero) hide coupling, and small differences of large numbers (f − f_0 near
    θ_0) contain mostly rounding error. In these cases the check also runs at the weights `elsewhere`, which also
    determine the scale of an output.

    Raises:
        UnsupportedModel: examples are coupled, or outputs are random or depend on stored state.
    """
    why, size = _coupling(network, x, state, most)
    if why or size == 0:
        try:
            there, size = _coupling(network, x, elsewhere(network.parameters, state), most)
        except (RuntimeError, ValueError, MemoryError):
            there, size = "", math.nan
        if math.isfinite(size):
            why = there or (why and _coupling(network, x, state, most, size)[0])
    if why:
        raise UnsupportedModel(f"{why}{coupled(network, x)}")


def _coupling(
    network: Network, x: Any, state: Mapping[str, Tensor] | None, most: int, least: float = 0.0
) -> tuple[str, float]:
    """A description of the coupling at a state ("" if none), and the largest output; least: a lower bound of it."""
    rows = batch_size(inputs_of(x))
    n = min(_SOME, rows)

    def outputs(part: slice) -> Tensor:
        with torch.no_grad():
            return network.outputs(take(x, part), state)

    with of_some(network, x, state):
        whole = outputs(slice(0, n))
    size = float(whole.abs().max())
    if rows < 2:
        return "", size
    limit = torch.finfo(network.rounding(whole.dtype)).eps ** 0.5 * max(size, least)
    alone = [_compare(outputs, whole, slice(i, i + 1), limit) for i in range(n)]
    among = _compare(outputs, whole, slice(0, min(rows, most)), limit) if rows > n else None
    rest = _compare(outputs, whole, slice(1, n), limit) if all(found is None for found in alone) else None
    found = [each for each in (*alone, among, rest) if each is not None]
    if found and not any(found):
        if all(each is None for each in alone):
            with of_some(network, x, state):
                outputs(slice(0, 1))  # raises: a model that rejects single examples cannot be checked
        return "", size
    if bool(((whole - outputs(slice(0, n))).abs() > limit).any()):  # randomness shows above too
        raise UnsupportedModel(describe_randomness(network, x, outputs, whole, limit))
    return next(filter(None, found), ""), size


@contextlib.contextmanager
def of_some(network: Network, x: Any, state: Mapping[str, Tensor] | None = None) -> Iterator[None]:
    """Reports a failure on part of the batch as UnsupportedModel if the whole batch runs."""
    try:
        yield
    except (RuntimeError, ValueError, LookupError) as error:
        if isinstance(error, UnsupportedModel) or is_out_of_memory(error):
            raise
        try:
            with torch.no_grad():
                network.outputs(x, state)
        except Exception:
            raise error from None
        raise UnsupportedModel(describe_partial_batches(network, x, error)) from error


def _compare(outputs: Callable[[slice], Tensor], whole: Tensor, part: slice, limit: float) -> str | None:
    """How outputs on part of the batch differ from those on the whole ("" if equal); None if the part does not run.

    The model may reject that number of examples, or memory may be too short.
    """
    one = whole[part]
    try:
        other = outputs(part)[: len(one)]
    except LookupError:
        if part.stop > len(whole):
            raise  # unknown probes (ids), not a smaller part of a graph
        return None
    except (RuntimeError, ValueError, MemoryError):
        return None
    if one.shape[1] != other.shape[1]:
        return (
            f"a batch of {len(whole)} has {one.shape[1]} outputs per example, one of another size {other.shape[1]}: an "
            "example's output depends on the other examples of its batch"
        )
    coupled = bool(((one - other).abs() > limit).any())
    return "an example's output depends on the other examples of its batch" if coupled else ""
