"""From a user's module and batch to what the engines need.

In: any nn.Module, a batch in the form that its loader gives, optional `outputs` and `loss` callables.
Out: `Network` (trained parameters by name, outputs [n, C]), a `Batch`, inputs and targets, errors that name the module.
Read `module`, `batch`, `batch_reading` (what goes into forward), `calling`, `shared_leaves`, then `errors` and
`alternatives` (what to pass instead), `loss`, `optimizer`, `batch_statistics`, `wrappers`.
"""

from __future__ import annotations

from ntkwatch.model.batch import (
    Batch,
    as_batch,
    batch_size,
    inputs_of,
    is_per_example,
    leaves,
    map_leaves,
    raw_of,
    take,
    to_device,
)
from ntkwatch.model.module import Network, OutputsFn
from ntkwatch.model.output import UnsupportedModel

__all__ = [
    "Batch",
    "Network",
    "OutputsFn",
    "UnsupportedModel",
    "as_batch",
    "batch_size",
    "inputs_of",
    "is_per_example",
    "leaves",
    "map_leaves",
    "raw_of",
    "take",
    "to_device",
]
