"""What a watch says to a person: warnings that cannot raise, and lines in the log that Lightning shows."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from ntkwatch.summary import printable

# A child of the logger that Lightning has a handler for, under the import name in use.
log = logging.getLogger(
    f"{'lightning.pytorch' if 'lightning.pytorch' in sys.modules else 'pytorch_lightning'}.ntkwatch"
)


def warn(message: str) -> None:
    """One warning that cannot raise (under `-W error` it is logged) nor, whatever it quotes, steer a terminal."""
    message = "\n".join(map(printable, message.splitlines()))
    try:
        warnings.warn(f"NTKWatch: {message}", stacklevel=2)
    except Warning:
        log.warning(f"NTKWatch: {message}")


@contextmanager
def others_warnings() -> Iterator[None]:
    """Where the run makes warnings errors, those that libraries give during a probe are nobody's error."""
    if not any(action == "error" for action, *_ in warnings.filters):
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?!NTKWatch)")
        yield
