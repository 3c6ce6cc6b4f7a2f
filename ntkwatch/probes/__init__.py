"""Probes: the inputs on which a run is watched. Chosen once, frozen, named by a content hash."""

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
