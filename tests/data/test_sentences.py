"""The embedded sentences: enough of them, real prose, distinct, and the same each time."""

from __future__ import annotations

from collections import Counter

import pytest

from preceptor.data import embedded_sentences as sentences
from preceptor.errors import UserError


def test_there_are_thousands_of_distinct_sentences_of_prose():
    listed = sentences.embedded_sentences()
    assert len(listed) >= 5000
    assert len({sentence.text.casefold() for sentence in listed}) == len(listed)
    assert all(6 <= len(text.split()) <= 50 and text[0].isupper() and text[-1] in ".!?" for text, _ in listed)
    assert not any(">>>" in text or "::=" in text or "\n" in text for text, _ in listed)
    sources = Counter(source for _, source in listed)
    assert sources["reference"] > 500
    assert sum(count >= 200 for count in sources.values()) >= 4
    assert listed == sentences.embedded_sentences()


def test_markup_and_examples_stay_out():
    document = "Use :func:`open` for *this* kind\nof file.\n\n>>> open('x')\n\n    if_stmt ::= 'if'"
    assert list(sentences._prose(document)) == ["Use open for this kind of file."]


def test_a_python_without_source_says_to_give_a_file(monkeypatch, tmp_path):
    sentences._paragraphs.cache_clear()
    monkeypatch.setattr(sentences.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match="--data"):
        sentences.embedded_sentences()
    sentences._paragraphs.cache_clear()
