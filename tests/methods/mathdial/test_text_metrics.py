"""Measures of a tutor's text, uptake, and the published tables."""

import math
from pathlib import Path

import pytest

from preceptor.errors import UserError
from preceptor.methods.mathdial.text_metrics import TextEncoder, bert_f1, knowledge_f1, sbleu
from preceptor.methods.mathdial.uptake import Rarity, Vectors, cross_fitted, features, overlap_share
from tests.data_folder import DATA, needs

needs_data = needs("mathdial")


def test_text_measures() -> None:
    assert sbleu(["the cat sat on the mat"], ["the cat sat on the mat"]) == pytest.approx(100)
    assert sbleu(["the cat sat on"], ["the cat sat on the mat today"]) == pytest.approx(100 * math.exp(1 - 7 / 4))
    assert knowledge_f1("The spoon!", "a spoon is new") == pytest.approx(2 * 1 * (1 / 3) / (4 / 3))
    assert knowledge_f1("spoon spoon", "spoon") == pytest.approx(2 / 3)
    assert knowledge_f1("", "x") == knowledge_f1("x", "") == 0
    with pytest.raises(UserError, match="one reference"):
        sbleu(["a"], [])


def test_bert_f1_names_a_real_encoder() -> None:
    encoder = TextEncoder("minilm-l6")
    same, near, far, empty = bert_f1(
        ["What is next?", "What is next?", "What is next?", ""],
        ["What is next?", "What comes next?", "Bread needs flour.", "What?"],
        encoder,
    )
    assert same == pytest.approx(100, abs=1e-3)
    assert same > near > far > empty == 0
    vectors = encoder.tokens(["What is next?", "Bread needs flour and water."])
    cosine = vectors[0] @ vectors[1].T
    precision = sum(float(row.max()) for row in cosine) / len(cosine)
    recall = sum(float(column.max()) for column in cosine.T) / len(cosine.T)
    [found] = bert_f1(["What is next?"], ["Bread needs flour and water."], encoder)
    assert found == pytest.approx(200 * precision * recall / (precision + recall), abs=1e-3)
    with pytest.raises(UserError):
        TextEncoder("no/such-encoder")


def test_uptake_by_words() -> None:
    assert overlap_share("I have 5 red apples", "So you have 5 apples?") == pytest.approx(3 / 5)
    assert overlap_share("", "x") == 0
    rarity = Rarity.of([("a b", "b"), ("c", "b d")])
    assert rarity.weight({"b"}) == pytest.approx(math.log(5 / 4))
    assert rarity.weight({"new"}) == pytest.approx(math.log(5))
    row = features("the 5 apples", "the 5 apples, yes", rarity, 0.5)
    assert [row[place] for place in (0, 1, 4, 5)] == pytest.approx([1] * 4)
    assert row[-1] == 0.5


def test_uptake_learned_from_true_exchanges_tells_them_from_others() -> None:
    topics = [f"word{place} thing{place}" for place in range(40)]
    exchanges = [(f"I think {topic}", f"Why {topic}?") for topic in topics] + [("I think so", "Okay then")] * 10
    groups = [str(place % 10) for place in range(len(exchanges))]
    scores = cross_fitted(Vectors.of(exchanges, None), groups, folds=5)
    assert min(scores[:40]) > max(scores[40:])
    assert (scores <= math.log(2) + 1e-12).all()
    assert (scores == cross_fitted(Vectors.of(exchanges, None), groups, folds=5)).all()
    with pytest.raises(UserError, match="conversations"):
        cross_fitted(Vectors.of(exchanges[:3], None), ["a", "a", "b"], folds=5)


@needs_data
def test_the_published_tables_come_out_exactly() -> None:
    from preceptor.methods.mathdial.released_data import AT_K, released_dialogues

    found = released_dialogues(DATA / "mathdial" / "test.jsonl", Path())
    assert len(found.claims) == len(AT_K) + 5
    assert [claim for claim in found.claims if not claim.holds] == []
