"""Lessons: what is read, what is held out, and what a teacher writes."""

import json

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from preceptor.distillation.lessons import Text, prepare, write_answers
from preceptor.errors import UserError
from preceptor.models.language_model import LanguageModel
from preceptor.models.loading import load


@pytest.fixture(scope="module")
def teacher() -> LanguageModel:
    return load("smollm2", dtype="bfloat16")


def write(path, count, answer=True):
    rows = [{"prompt": f"What is {n} + {n}?", "completion": str(2 * n)} for n in range(count)]
    rows = rows if answer else [{"prompt": row["prompt"]} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_held_out_questions_stand_in_no_lesson(tmp_path, teacher):
    data = tmp_path / "data.jsonl"
    source = write(data, 12)
    data.write_text(data.read_text() * 2)  # each question twice: a copy of a held-out one must not be learned from
    lessons = prepare(Text(source=source, held_out=5), teacher, seed=3, path=tmp_path / "lessons.jsonl")
    learned = {sequence.prompt for sequence in lessons.train}
    asked = {sequence.prompt for sequence in lessons.exam}
    assert len(lessons.exam) == 5
    assert learned
    assert not learned & asked


def test_answers_are_the_teachers_own_ids_and_are_kept(tmp_path, teacher):
    source = write(tmp_path / "data.jsonl", 6, answer=False)
    text = Text(source=source, held_out=2, answer_length=5, answers="missing")
    path = tmp_path / "lessons.jsonl"
    state = torch.random.get_rng_state()
    first = prepare(text, teacher, seed=0, path=path)
    assert torch.equal(state, torch.random.get_rng_state())
    assert len(first.train) == 4
    for sequence in first.train + first.exam:
        assert 1 <= sum(sequence.response) <= 5
        assert sequence.response == (False,) * len(sequence.prompt) + (True,) * sum(sequence.response)
    assert prepare(text, teacher, seed=0, path=path) == first
    path.unlink()
    assert prepare(text, teacher, seed=0, path=path) == first
    path.unlink()
    assert prepare(text, teacher, seed=1, path=path) != first


def test_a_teacher_writes_given_answers_anew_when_asked(tmp_path, teacher):
    source = write(tmp_path / "data.jsonl", 6)
    given = prepare(Text(source=source, held_out=2), teacher, seed=0, path=tmp_path / "a.jsonl")
    anew = prepare(
        Text(source=source, held_out=2, answers="teacher", answer_length=3), teacher, seed=0, path=tmp_path / "b.jsonl"
    )
    assert {s.prompt for s in given.train} == {s.prompt for s in anew.train}
    assert all(sum(s.response) <= 3 for s in anew.train)
    assert {s.ids for s in given.train} != {s.ids for s in anew.train}


def test_too_little_text_is_refused_with_what_to_do(tmp_path, teacher):
    source = write(tmp_path / "data.jsonl", 3)
    with pytest.raises(UserError, match=r"text\.held_out lower"):
        prepare(Text(source=source, held_out=5), teacher, seed=0, path=tmp_path / "lessons.jsonl")
    assert not (tmp_path / "lessons.jsonl").exists()
    with pytest.raises(UserError, match="at least 1"):
        Text(held_out=0)


def test_missing_answers_are_written_only_when_asked(tmp_path, teacher):
    source = write(tmp_path / "data.jsonl", 6, answer=False)
    with pytest.raises(UserError, match="4 of 4 examples have no response"):
        prepare(Text(source=source, held_out=2), teacher, seed=0, path=tmp_path / "lessons.jsonl")


def test_prompts_longer_than_the_limit_are_refused(tmp_path, teacher):
    source = write(tmp_path / "data.jsonl", 6, answer=False)
    with pytest.raises(UserError, match=r"raise text\.max_length"):
        prepare(
            Text(source=source, held_out=2, max_length=4, answers="missing"),
            teacher,
            seed=0,
            path=tmp_path / "lessons.jsonl",
        )


def test_an_answer_ends_where_the_text_may_end(teacher):
    """A model of 32 positions is asked for no more of them."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=49152, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    model = LanguageModel(GPT2LMHeadModel(config), teacher.tokenizer)
    prompts = [tuple(range(3, 3 + length)) for length in (28, 4, 32, 31)]
    written = write_answers(model, prompts, 16, max_length=32)
    assert [sequence.prompt for sequence in written] == [prompts[0], prompts[1], prompts[3]]
    assert [sum(sequence.response) for sequence in written] == [4, 16, 1]


def test_lessons_of_other_settings_are_not_taken_up(teacher, tmp_path):
    source = tmp_path / "data.jsonl"
    source.write_text("".join(f'{{"prompt": "{n} + 1?", "completion": "{n + 1}"}}\n' for n in range(12)))
    path, text = tmp_path / "lessons.jsonl", Text(source=str(source), held_out=2)
    first = prepare(text, teacher, seed=0, path=path)
    assert prepare(text, teacher, seed=0, path=path) == first
    for other, seed in ((text, 1), (Text(source=str(source), held_out=3), 0)):
        with pytest.raises(UserError, match="made by other settings"):
            prepare(other, teacher, seed=seed, path=path)
    with pytest.raises(UserError, match="text.limit is 0"):
        Text(limit=0)
