"""What a manifest, an index line and a snapshot may hold. A checksum shows damage; only this shows a forgery.

Entries that this version does not know are let through: a later one may have written them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

from torch import Tensor

SCHEMA = 1
LAYER_PREFIX = "layer:"  # before a parameter's name, in a snapshot
LIMIT, LIMIT_ROWS, LIMIT_NNGP = "limit", "limit_rows", "limit_nngp"  # infinite width, in a run's first snapshot
MAX_DEPTH = 50  # lists and objects inside each other; a record has five
MAX_COUNT = 2**53  # of steps and counts: what every reader of JSON holds exactly
Check = Callable[[Any], bool]


def check_row(row: Mapping[str, Any], number: int) -> None:
    """ValueError unless the body of an index line is one that this format knows; number: its place in the file."""
    if not is_count(row.get("line")) or row["line"] != number:
        said = row.get("line") if is_number(row.get("line")) else "another"
        raise ValueError(f"it says that it is line {said}, so lines are missing or doubled")
    if "resumed_at" in row:
        _expect(is_count(row["resumed_at"]), "resumed_at")
        return
    for name, check in ROW.items():
        _expect(name in row and check(row[name]), name)


def check_manifest(body: Mapping[str, Any]) -> None:
    """ValueError, naming the entry, unless every entry that this version reads is what this format holds."""
    for name, check in MANIFEST_ENTRIES.items():
        _expect(name not in body or body[name] is None or check(body[name]), name)


def check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """ValueError, naming the tensor, unless a snapshot's tensors have the shapes of kernels of one set of probes."""
    kernel = tensors.get("kernel")
    _expect(kernel is None or _is_kernel(kernel), "kernel")
    rows = None if kernel is None else kernel.shape[-2 if kernel.ndim == 4 else -1]
    for name, tensor in tensors.items():
        if name.startswith(LAYER_PREFIX):
            _expect(_square(tensor) and len(tensor) == rows, name)
        elif name in SHAPES:
            _expect(SHAPES[name](tensor), name)
    if LIMIT in tensors:
        _expect(LIMIT_ROWS in tensors and _are_rows(tensors[LIMIT_ROWS], len(tensors[LIMIT]), rows), LIMIT_ROWS)
        _expect(LIMIT_NNGP not in tensors or tensors[LIMIT_NNGP].shape == tensors[LIMIT].shape, LIMIT_NNGP)


def check_depth(value: Any) -> None:
    """ValueError where lists and objects lie deeper inside each other than any record's."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for item in level if isinstance(item, dict | list) for child in _children(item)]
        if not level:
            return
    raise ValueError(f"it is nested more than {MAX_DEPTH} deep")


def is_number(value: Any) -> TypeGuard[float]:
    """A finite number that a float can hold, and no flag."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False


def is_count(value: Any) -> TypeGuard[int]:
    """A whole number from 0 to 2⁵³."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_COUNT


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_mapping(of: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(map(of, value.values()))


def _is_list(of: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(of, value))


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _is_any(*checks: Check) -> Check:
    return lambda value: any(check(value) for check in checks)


def _has(**entries: Check) -> Check:
    """An object with all of these entries; others may stand beside them."""
    return lambda value: isinstance(value, dict) and all(k in value and check(value[k]) for k, check in entries.items())


def _may_have(**entries: Check) -> Check:
    """An object in which these entries, where they are there and not null, are as said."""
    return lambda value: (
        isinstance(value, dict) and all(value.get(k) is None or check(value[k]) for k, check in entries.items())
    )


_texts, _numbers = _is_mapping(_is_text), _is_mapping(_or_none(is_number))
_file = _has(file=_is_text, sha256=_is_text)
ROW: dict[str, Check] = {
    "step": is_count,
    "global_step": _or_none(is_number),
    "epoch": _or_none(is_number),
    "seconds": _or_none(is_number),
    "metrics": _numbers,
    "layer_metrics": _is_mapping(_numbers),
    "reasons": _texts,
    "context": _is_mapping(_is_any(_or_none(is_number), _is_text, lambda value: isinstance(value, bool))),
    "snapshot": _has(name=_is_text, sha256=_is_text),
}
MANIFEST_ENTRIES: dict[str, Check] = {
    "created": _is_text,
    "id": _is_text,
    "parent": _has(record=_is_text, step=is_count),
    "versions": _texts,
    "model": _is_text,
    "parameters": _is_list(_is_text),
    "n_parameters": is_count,
    "n_outputs": is_count,
    "probes": _may_have(
        n=is_count, source=_is_text, how=_is_text, indices=_is_list(is_count), hash=_is_text, targets_hash=_is_text
    ),
    "reduction": _is_text,
    "engine": _is_text,
    "engine_reason": _is_text,
    "mode": _is_text,
    "precision": _is_text,
    "hparams": lambda value: isinstance(value, dict),
    "optimizer": _is_any(_is_text, _is_list(_is_text)),
    "every": _is_any(_is_text, is_count),
    "budget": is_number,
    "seed": is_number,
    "diagnostics": _is_any(_is_text, _is_list(_is_text)),
    "baseline": _is_text,
    "baseline_step": is_count,
    "infinite": _is_text,
    "theta0": _file,
    "probes_sha256": _is_text,
    "failed_probes": _is_list(is_count),
    "switched_off": _has(step=is_count, why=_is_text),
    "finished": _is_any(_is_text, lambda value: isinstance(value, bool)),
    "completed": lambda value: isinstance(value, bool),
}


def _expect(holds: bool, name: str) -> None:
    if not holds:
        raise ValueError(f"its {name if name.isidentifier() else repr(name)} is not what this format holds")


def _children(item: Any) -> list[Any]:
    return list(item.values()) if isinstance(item, dict) else item


def _square(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.ndim == 2 and tensor.shape[0] == tensor.shape[1] > 0


def _are_rows(tensor: Tensor, count: int, of: int | None) -> bool:
    """So many rows of a kernel of `of` probes?"""
    return len(tensor) == count > 0 and int(tensor.min()) >= 0 and (of is None or int(tensor.max()) < of)


def _is_kernel(kernel: Tensor) -> bool:
    """[n, n], [C, n, n] or [n, C, n, C]?"""
    shape = tuple(kernel.shape)
    halves = shape[:2] == shape[2:] if len(shape) == 4 else len(shape) in (2, 3) and shape[-1] == shape[-2]
    return halves and kernel.is_floating_point() and kernel.numel() > 0


SHAPES: dict[str, Callable[[Tensor], bool]] = {
    "eigenvalues": lambda tensor: tensor.is_floating_point() and tensor.ndim == 1,
    "outputs": lambda tensor: tensor.is_floating_point() and tensor.ndim == 2,
    LIMIT: _square,
    LIMIT_NNGP: _square,
    LIMIT_ROWS: lambda tensor: tensor.ndim == 1 and not tensor.is_floating_point() and not tensor.is_complex(),
}
