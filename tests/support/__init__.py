"""What tests share: models, cases, runs, and scripts that run in processes of their own."""

from __future__ import annotations

from pathlib import Path

SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parents[1]
