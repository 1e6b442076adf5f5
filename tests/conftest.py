"""Every test runs without a network and with one thread, so that figures do not depend on the machine's cores."""

import os
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test writes under a relative path, such as runs/, stays out of the working copy."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def root() -> Path:
    """The repository's folder."""
    return ROOT


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """SmolLM2's tokenizer, read once: that takes seconds."""
    from preceptor.models.loading import load

    return load("smollm2", dtype="bfloat16").tokenizer


@pytest.fixture(scope="session", autouse=True)
def _speeds_are_measured_once() -> None:
    """A table's tokens a second are the median of five measurements; no test looks at them: one short one will do."""
    from preceptor.evaluation import language

    language.PREFILL_TOKENS, language.DECODED_TOKENS, language.REPEATS = 16, 2, 1
