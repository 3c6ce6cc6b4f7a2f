"""Whether examples are coupled: whether an example's output depends on which others are in its batch.

A model may couple them in batches of some sizes alone (a normalisation from ten rows on), so that every size in which
examples are run together is looked at.
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

MANY = 64  # the most examples that are run together in search of what couples them, where none has to be
_SOME = 3  # examples that are run alone


class Sizes:
    """The sizes of batch in which a network's examples were found not to be coupled."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[Network, set[int]] = weakref.WeakKeyDictionary()

    def add(self, network: Network, x: Any) -> None:
        """Somebody has passed x to `check_uncoupled`."""
        self._known.setdefault(network, {1}).add(min(MANY, batch_size(inputs_of(x))))

    def known(self, network: Network) -> frozenset[int]:
        """The sizes of one network."""
        return frozenset(self._known.get(network, {1}))

    def restore(self, network: Network, sizes: Iterable[int]) -> None:
        """Takes over the sizes that were found of another Network of the same module."""
        self._known[network] = set(sizes)

    def check(self, network: Network, parts: Iterable[Any], state: Mapping[str, Tensor] | None) -> None:
        """Raises UnsupportedModel where examples are coupled in a part of a size that is not known yet."""
        known = self._known.setdefault(network, {1})
        for part in parts:
            size = batch_size(inputs_of(part))
            if size not in known:
                check_uncoupled(network, part, state, size)
                known.add(size)


def check_uncoupled(network: Network, x: Any, state: Mapping[str, Tensor] | None = None, most: int = MANY) -> None:
    """Raises UnsupportedModel where an example's output depends on which others are in its batch, or on chance.

    A few examples are run together, each alone, and among up to `most` of the others: a maximum or a median over the
    batch may sit in any of them. Where the model does not take one example, all but the first are run instead.

    Outputs that are zero (a readout that starts so) show no coupling, and a small difference of large numbers (f − f_0
    near θ_0) shows its rounding: there the weights `elsewhere` decide, and say how large an output is.
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
    """How examples are coupled at a state, "" where they are not, and the largest output. least: size of outputs."""
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
                outputs(slice(0, 1))  # raises: no engine can be checked on a model that takes no single example
        return "", size
    if bool(((whole - outputs(slice(0, n))).abs() > limit).any()):  # asked only now: chance shows in the others too
        raise UnsupportedModel(describe_randomness(network, x, outputs, whole, limit))
    return next(filter(None, found), ""), size


@contextlib.contextmanager
def of_some(network: Network, x: Any, state: Mapping[str, Tensor] | None = None) -> Iterator[None]:
    """Inside, some examples are run; UnsupportedModel says so where that fails although all together go through."""
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
    """How the outputs of part of the batch differ from those in the whole, "" for not at all; None where it fails.

    It may be a number of examples that the model does not take, or that there is no memory for.
    """
    one = whole[part]
    try:
        other = outputs(part)[: len(one)]
    except LookupError:
        if part.stop > len(whole):
            raise  # no smaller part of a graph, but probes that the model does not know (ids)
        return None
    except (RuntimeError, ValueError, MemoryError):
        return None
    if one.shape[1] != other.shape[1]:
        return (
            f"{len(whole)} examples have {one.shape[1]} outputs each, another number of them {other.shape[1]}: an "
            "example's output depends on the other examples of its batch"
        )
    coupled = bool(((one - other).abs() > limit).any())
    return "an example's output depends on the other examples of its batch" if coupled else ""
