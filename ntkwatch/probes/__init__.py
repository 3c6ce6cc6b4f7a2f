"""Probes: the inputs on which a run is watched. Chosen once, frozen, named by a content hash."""

from __future__ import annotations

from ntkwatch.probes.choose import choose, from_stream, is_streaming
from ntkwatch.probes.probeset import ProbeSet, Wanted, content_hash, given, resolve
from ntkwatch.probes.taken import taken
from ntkwatch.probes.targets import encode_targets

__all__ = [
    "ProbeSet",
    "Wanted",
    "choose",
    "content_hash",
    "encode_targets",
    "from_stream",
    "given",
    "is_streaming",
    "resolve",
    "taken",
]
