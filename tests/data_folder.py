"""Where real data for tests lies: the folder that ``PRECEPTOR_DATA`` names, as for the reproductions."""

import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("PRECEPTOR_DATA") or "nowhere").absolute()
"""The folder of real data; a path that does not exist where ``PRECEPTOR_DATA`` is unset."""


def needs(*parts: str) -> pytest.MarkDecorator:
    """Skips a test where a file of the data is absent, and says what to set."""
    path = DATA.joinpath(*parts)
    wanted = "/".join(parts)
    return pytest.mark.skipif(not path.exists(), reason=f"PRECEPTOR_DATA names no folder with {wanted}")
