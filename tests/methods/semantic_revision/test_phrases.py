"""Phrases, the tokens that lie in them, and the pairs of neighbours, on real and on byte-level tokens."""

import importlib.util
import warnings

import pytest

from preceptor.data.sequences import Sequence
from preceptor.errors import UserError
from preceptor.methods.semantic_revision import phrases as chunks
from preceptor.methods.semantic_revision.phrases import (
    adjacent,
    chunker,
    pairs,
    phrase_marker,
    phrases,
    plain_phrases,
    token_characters,
    token_spans,
)

FOX = "The quick brown fox jumped over the lazy dog, and it doesn't care."
needs_textblob = pytest.mark.skipif(importlib.util.find_spec("textblob") is None, reason="needs preceptor[phrases]")


def words(spans, text):
    return [text[start:end] for start, end in spans]


def whole(text):
    """A chunker for which the whole text is one phrase."""
    return [(0, len(text))] if text else []


@needs_textblob
def test_textblob_finds_noun_verb_and_prepositional_phrases():
    found = words(phrases(FOX), FOX)
    assert found[:3] == ["The quick brown fox", "jumped", "over the lazy dog"]
    assert "it" in found
    assert all(not set(phrase) & set(",.") for phrase in found)


@needs_textblob
@pytest.mark.parametrize("text", ["", " \n\n", "!!! ...", "né 🙂 — 3.5%", "a/b\nc", "I've “quoted” it’s"])
def test_any_text_is_read_and_places_are_in_order(text):
    for found in (phrases(text), plain_phrases(text)):
        assert all(0 <= start < end <= len(text) for start, end in found)
        assert all(one[1] <= other[0] for one, other in zip(found, found[1:]))


def test_the_plain_chunker_splits_at_punctuation_and_function_words():
    found = words(plain_phrases(FOX), FOX)
    assert found == ["The quick brown fox jumped", "over the lazy dog", "and it doesn't care"]
    assert words(plain_phrases("One line\nanother line"), "One line\nanother line") == ["One line", "another line"]


def test_a_missing_chunker_is_reported_and_replaced_where_that_is_allowed(monkeypatch):
    monkeypatch.setattr(chunks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "preceptor\[phrases\]", or choose the chunker "plain"'):
        chunker("textblob")
    with pytest.warns(UserWarning, match="punctuation and by function words alone"):
        assert chunker("either") is plain_phrases
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chunker("plain") is plain_phrases


@pytest.mark.parametrize(
    "text", [FOX, "naïve café — 🙂 done", "  leading and\n\ntwo lines ", "数学は楽しい。", "tab\tand 12.5 % of it"]
)
def test_the_characters_of_byte_level_tokens(tokenizer, text):
    """As the tokenizer itself says it when it encodes; what a token shares of a character it has."""
    encoded = tokenizer(text, return_offsets_mapping=True)
    decoded, spans = token_characters(encoded["input_ids"], tokenizer)
    assert decoded == text
    for (start, end), (first, last) in zip(spans, encoded["offset_mapping"]):
        # The tokenizer leaves out the space before a word.
        assert (start, end) == (first, last) or (end == last and text[start:first].isspace())
    assert all(end > start for start, end in spans)


def test_a_character_of_several_tokens_belongs_to_each(tokenizer):
    ids = tokenizer("🦥")["input_ids"]
    assert len(ids) > 1
    assert token_characters(ids, tokenizer) == ("🦥", [(0, 1)] * len(ids))
    assert token_spans(ids, tokenizer, whole) == [(0, len(ids))]


def test_bytes_that_are_no_text_and_special_tokens_do_no_harm(tokenizer):
    broken = tokenizer("🦥")["input_ids"][:-1]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    text, spans = token_characters([*broken, end], tokenizer)
    assert len(spans) == len(broken) + 1
    assert spans[-1][0] == spans[-1][1]
    assert token_spans([*tokenizer("so it goes")["input_ids"], end], tokenizer, whole) == [(0, 3)]
    assert token_characters([], tokenizer) == ("", [])


def test_a_token_belongs_to_the_phrase_that_holds_most_of_it(tokenizer):
    ids = tokenizer("dogs bark loudly")["input_ids"]
    text, characters = token_characters(ids, tokenizer)
    assert text == "dogs bark loudly"
    middle = characters[1]
    more = (0, middle[1] - 1)
    assert token_spans(ids, tokenizer, lambda text: [more, (middle[1] - 1, len(text))]) == [(0, 2), (2, 3)]


def test_pairs_lie_inside_one_span():
    assert adjacent([(0, 3), (3, 4), (6, 8)]) == [0, 1, 6]
    assert adjacent([]) == []


def test_pairs_never_lie_in_the_prompt(tokenizer):
    prompt, answer = tokenizer("What runs?")["input_ids"], tokenizer("The quick brown fox")["input_ids"]
    sequence = Sequence((*prompt, *answer), (False,) * len(prompt) + (True,) * len(answer))
    assert pairs(sequence, tokenizer, whole) == (0, 1, 2)
    text = Sequence((*prompt, *answer), (True,) * (len(prompt) + len(answer)))
    # Nothing predicts the first token, so that the rows begin with the second.
    assert pairs(text, tokenizer, whole) == tuple(range(len(prompt) + len(answer) - 2))


def test_several_responses_have_their_pairs_apart(tokenizer):
    one, other = tokenizer("a red door")["input_ids"], tokenizer("in the park")["input_ids"]
    ids = (1, *one, 2, *other)
    response = (False, *(True for _ in one), False, *(True for _ in other))
    assert pairs(Sequence(ids, response), tokenizer, whole) == (0, 1, 3, 4)


def test_an_empty_response_has_no_pair(tokenizer):
    assert pairs(Sequence((1, 2), (False, False)), tokenizer, whole) == ()


class Student:
    """What a marker needs of a student."""

    pad_id = 2

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer


def test_a_batch_counts_its_pairs_over_the_rows_of_all_sequences(tokenizer):
    ids = tokenizer("The quick brown fox")["input_ids"]
    one = Sequence((5, 6, *ids), (False, False, *(True for _ in ids)))
    other = Sequence((5, *ids[:2]), (False, True, True))
    marker = phrase_marker(Student(tokenizer), whole)
    batch = marker.collate(marker.mark([one, other], given=[one]))
    assert batch.pairs.tolist() == [0, 1, 2, 4]
    assert int(batch.text.predicts.sum()) == 6
    assert (batch.labels[0] != -100).sum() == 4
    assert (batch.labels[1] == -100).all()
    assert list(marker.known) == [one]
