"""The only collectives; the identity when alone."""

from __future__ import annotations

from functools import cache

from torch import nn

_MANAGERS = ("FSDPModule", "FullyShardedDataParallel")


def sharded(module: nn.Module) -> str | None:
    """Why the parameters of `module` live on several ranks (one clause, naming one), or None if they do not."""
    kinds = {type(child) for child in module.modules()}
    for kind in kinds:
        if (manager := _known(kind, _MANAGERS)) is not None:
            name = next(name for name, child in module.named_modules() if type(child) is kind)
            return f"{name or type(module).__name__} is managed by {manager}"
    if any(_known(type(parameter), ("DTensor",)) for parameter in module.parameters()):
        name = next(name for name, p in module.named_parameters() if _known(type(p), ("DTensor",)))
        return f"{name} is a DTensor"
    return None


@cache
def _known(kind: type, names: tuple[str, ...]) -> str | None:
    """By name, since where these classes live has moved from one torch to the next."""
    bases = [base.__name__ for base in kind.__mro__]
    return next((name for name in names if name in bases), None)
