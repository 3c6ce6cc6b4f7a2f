"""python -m ntkwatch"""

from __future__ import annotations

from ntkwatch.cli import main

if __name__ == "__main__":
    main()
