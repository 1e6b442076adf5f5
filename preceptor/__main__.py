"""``python -m preceptor``: the same as the command ``preceptor``, for launchers such as ``accelerate launch -m``."""

from __future__ import annotations

import sys

from preceptor.cli import main

if __name__ == "__main__":
    sys.exit(main())
