"""The command line of ntkwatch.

In: arguments. Out: text on the terminal, files, and an exit code (0 fine, 1 a problem found, 2 wrong usage).
Read `commands`, then the file that a command uses: `terminal` with `tables`, `follow`, `glossary`, `doctor` with
`factory`, `demo`, and `output`.
"""

from __future__ import annotations

from ntkwatch.cli.commands import app, main

__all__ = ["app", "main"]
