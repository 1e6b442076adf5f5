"""Stage one: what is drawn once and kept, what is told apart, what is refused; and exact checks over a whole course."""

import json
import warnings
from dataclasses import replace

import pytest
import torch

from preceptor.data.sequences import collate
from preceptor.engine.settings import Training
from preceptor.errors import UserError
from preceptor.methods.teacher_hacking.markov_sources import log_probs
from preceptor.methods.teacher_hacking.stage_one import Data, Setup, build, open_oracle, written
from preceptor.methods.teacher_hacking.text_models import LanguageAuthor, SourceAuthor, symbol_model

SHORT = Training(steps=3, batch_size=16, learning_rate=5e-3, schedule="constant")
DATA = Data(oracle=24, prompts=10, held_out=6, prompt_length=4, answer_length=3)
SETUP = Setup(
    oracle="hmm:states=4,vocabulary=8",
    teacher="fresh:layers=1,hidden=16,heads=2",
    student="fresh:layers=1,hidden=8,heads=1",
    data=DATA,
    teacher_training=SHORT,
    student_training=SHORT,
    seed=0,
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("laboratory")
    return folder, build(folder, SETUP, resume=False)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_stage_one_leaves(built):
    folder, laboratory = built
    assert [len(lines(folder / f"{name}.jsonl")) for name in ("oracle", "golden", "proxy")] == [24, 6, 6]
    assert len(laboratory.prompts) == 10
    assert laboratory.golden.tokens.tolist() == laboratory.proxy.tokens.tolist() == [3.0] * 6
    assert isinstance(laboratory.oracle, SourceAuthor)
    assert laboratory.imperfection.mean > 0


def test_no_prompt_is_used_twice(built):
    folder, laboratory = built
    oracle = {tuple(line["prompt"]) for line in lines(folder / "oracle.jsonl")}
    held_out = {tuple(line["prompt"]) for line in lines(folder / "golden.jsonl")}
    assert held_out == {tuple(line["prompt"]) for line in lines(folder / "proxy.jsonl")}
    assert len(oracle | held_out | set(laboratory.prompts)) == 24 + 6 + 10


def test_it_comes_back_from_its_folder(built):
    folder, laboratory = built
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    again = build(folder, SETUP, resume=True)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before
    assert again.golden.sequences == laboratory.golden.sequences
    assert again.proxy.sequences == laboratory.proxy.sequences
    for mine, other in zip(again.start.parameters(), laboratory.start.parameters()):
        assert torch.equal(mine, other)
    assert torch.equal(again.proxy.divergence(again.start), laboratory.proxy.divergence(laboratory.start))


def test_another_laboratory_in_the_folder_is_refused(built):
    folder, _ = built
    with pytest.raises(UserError, match="holds"):
        build(folder, SETUP, resume=False)
    with pytest.raises(UserError, match="another run"):
        build(folder, replace(SETUP, seed=1), resume=True)


def test_a_teacher_that_is_the_oracle(tmp_path):
    with pytest.warns(UserWarning, match="cannot be hacked"):
        laboratory = build(tmp_path, replace(SETUP, teacher="oracle"), resume=False)
    assert laboratory.imperfection.mean == 0
    assert laboratory.teacher is laboratory.oracle
    assert laboratory.golden.sequences == laboratory.proxy.sequences
    assert torch.equal(laboratory.golden.divergence(laboratory.start), laboratory.proxy.divergence(laboratory.start))


def test_a_source_says_what_it_is_exactly():
    author, family = open_oracle("markov:order=2,vocabulary=6", DATA, seed=3)
    torch.manual_seed(0)
    sequences = [*author.answer([(0, 1, 2), (3, 4)], 4), *author.answer([(5,)], 2)]
    assert [len(one.ids) for one in sequences] == [7, 6, 3]
    batch = collate(sequences, family.pad_id)
    told = author(batch).logits.split([4, 4, 2])
    for sequence, rows in zip(sequences, told):
        exact = log_probs(author.source, torch.tensor([sequence.ids]))[0]
        assert torch.equal(rows, exact[len(sequence.prompt) : -1])


def test_answers_are_written_once(tmp_path):
    author, _ = open_oracle(SETUP.oracle, DATA, seed=0)
    state = torch.get_rng_state()
    first = written(tmp_path / "a.jsonl", author, [(1, 2), (3, 4)], 3, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert written(tmp_path / "a.jsonl", author, [(0, 0)], 9, seed=6) == first
    assert written(tmp_path / "b.jsonl", author, [(1, 2), (3, 4)], 3, seed=5) == first


def test_empty_answers_are_left_out_with_their_count(tmp_path, monkeypatch):
    author = LanguageAuthor(symbol_model(8, longest=8, seed=0))
    monkeypatch.setattr(type(author.model), "stop_ids", frozenset({0}))
    monkeypatch.setattr(type(author.model), "generate", lambda self, prompts, **_: [(0,), (2, 0), (0,)])
    with pytest.warns(UserWarning, match="2 of 3 answers are empty"):
        kept = written(tmp_path / "a.jsonl", author, [(1,), (2,), (3,)], 4, seed=0)
    assert [one.ids for one in kept] == [(2, 2, 0)]
    monkeypatch.setattr(type(author.model), "generate", lambda self, prompts, **_: [(0,)])
    with pytest.raises(UserError, match="are empty"):
        written(tmp_path / "b.jsonl", author, [(1,)], 4, seed=0)


@pytest.mark.parametrize("name", ["oracle", "prompts", "responses", "prompt_length", "answer_length"])
def test_nothing_to_learn_from_is_refused(name):
    with pytest.raises(UserError, match=f"data.{name} is 0"):
        Data(**{name: 0})


def test_too_few_held_out_or_distinct_prompts_are_refused(tmp_path):
    with pytest.raises(UserError, match="at least 2"):
        Data(held_out=1)
    with pytest.raises(UserError, match="distinct prompts of 1 tokens"):
        build(tmp_path, replace(SETUP, data=replace(DATA, prompt_length=1)), resume=False)


def test_models_of_other_tokens_are_refused_by_name(tmp_path):
    symbol_model(9, longest=8, seed=0).save(tmp_path / "nine")
    for role in ("teacher", "student"):
        with pytest.raises(UserError, match=f"oracle and the {role} do not"), warnings.catch_warnings():
            build(tmp_path / role, replace(SETUP, **{role: str(tmp_path / "nine")}), resume=False)
