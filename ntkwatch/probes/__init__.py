"""Probes: the inputs on which a run is watched. Chosen once, frozen, named by a content hash."""

from __future__ import annotations

from ntkwatch.probes.choose import choose
from ntkwatch.probes.loaders import batches_of, is_streaming
from ntkwatch.probes.probeset import ProbeSet, Wanted, content_hash, given, resolve
from ntkwatch.probes.stream import FEWEST, Gathered, form_of, from_stream
from ntkwatch.probes.taken import taken
from ntkwatch.probes.targets import encode_targets

__all__ = [
    "FEWEST",
    "Gathered",
    "ProbeSet",
    "Wanted",
    "batches_of",
    "choose",
    "content_hash",
    "encode_targets",
    "form_of",
    "from_stream",
    "given",
    "is_streaming",
    "resolve",
    "taken",
]
