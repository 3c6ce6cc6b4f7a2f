"""Probes: the inputs on which a run is measured, chosen once, frozen, and named by a content hash.

In: a data loader, a batch, or the argument `probes=`. Out: a `ProbeSet` of inputs, targets and hashes.
Read `probeset` (what it is), `selection` with `labels` and `loaders` (choosing from a dataset), `stream` (rows of a
stream's first batches), `targets` (the columns that alignments are computed with), then `taken`.
"""

from __future__ import annotations

from ntkwatch.probes.loaders import batches_of, is_streaming
from ntkwatch.probes.probeset import ProbeRequest, ProbeSet, as_probe_set, content_hash, parse_probes
from ntkwatch.probes.selection import choose_probes
from ntkwatch.probes.stream import MIN_PROBES, RowCollector, from_stream, row_format
from ntkwatch.probes.taken import taken
from ntkwatch.probes.targets import encode_targets

__all__ = [
    "MIN_PROBES",
    "ProbeRequest",
    "ProbeSet",
    "RowCollector",
    "as_probe_set",
    "batches_of",
    "choose_probes",
    "content_hash",
    "encode_targets",
    "from_stream",
    "is_streaming",
    "parse_probes",
    "row_format",
    "taken",
]
