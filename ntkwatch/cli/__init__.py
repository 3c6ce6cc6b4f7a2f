"""The command line of ntkwatch."""

from __future__ import annotations

from ntkwatch.cli.commands import app, main

__all__ = ["app", "main"]
