"""The teacher and the sequences that most tests of the cache read; none of them changes them."""

import pytest

from preceptor.data.sequences import Sequence
from preceptor.models.language_model import LanguageModel
from tests.cache_models import make_sequences, make_teacher


@pytest.fixture(scope="session")
def teacher() -> LanguageModel:
    return make_teacher()


@pytest.fixture(scope="session")
def sequences() -> list[Sequence]:
    return make_sequences(60)
