import json
from collections.abc import Sequence as Listed
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from preceptor.data.encoding import encode_prompt
from preceptor.dialogue.dialogue import Dialogue, Turn
from preceptor.dialogue.examples import worked_dialogues
from preceptor.dialogue.tutors import ChatTutor, Voice
from preceptor.errors import UserError
from preceptor.language import Answer, Chat, Request, Scripted
from preceptor.language.local import LocalModel
from preceptor.methods.mathdial import recipe as mathdial, reproduction as experiment
from preceptor.methods.mathdial.common_errors import (
    CommonErrors,
    answer_of,
    arithmetic,
    chat_sampler,
    common_errors,
    marks_of,
    pick,
    read_problems,
    steps_of,
)
from preceptor.methods.mathdial.examination import loss_by_problems
from preceptor.methods.mathdial.next_move import NextMove, counts, read_moves
from preceptor.methods.mathdial.recipe import Config, ReadingSettings, as_trained
from preceptor.methods.mathdial.released_data import (
    filters,
    next_move_claims,
    scripted_play,
    uptake_claims,
    uptake_ratings,
)
from preceptor.methods.mathdial.turns import encode_pair, lessons, make_pairs, read_data, split
from preceptor.models.language_model import LanguageModel
from preceptor.models.loading import load
from preceptor.statistics import compare
from tests.data_folder import DATA, needs

WORKED = "Three boxes of 4.\n3 * 4 = <<3*4=12>>12\n#### 12"
FREE = CommonErrors(shortest=1, longest=1000)


def drawn(answer: object, text: str = "I think <<3+4=7>>7 and so on") -> str:
    return f"{text}\n#### {answer}"


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return load("smollm2")


def test_the_most_frequent_wrong_answer_is_picked() -> None:
    samples = [drawn(12)] * 20 + [drawn(7)] * 6 + [drawn(15)] * 9 + ["no answer"] * 15
    found = pick(WORKED, samples, FREE)
    assert (found.answer, found.count, found.refused) == (15, 9, "")
    assert found.solution == drawn(15)


def test_a_tie_goes_to_the_answer_drawn_first() -> None:
    assert pick(WORKED, [drawn(12), drawn(7), drawn(15), drawn(15), drawn(7)], FREE).answer == 7


@pytest.mark.parametrize(
    ("worked", "samples", "settings", "refused"),
    [
        ("a\nb\nc\nd\ne\n#### 12", [drawn(7)], FREE, "steps"),
        ("a\nb\nc\nd\ne\n#### 12", [drawn(7), drawn(12)], replace(FREE, max_steps=5), ""),
        (WORKED, [drawn(12), drawn("12.0"), "nothing"], FREE, "no wrong answer"),
        (WORKED, [drawn("12.05"), drawn("11.9")], FREE, "rounding"),
        (WORKED, [drawn("12.05"), drawn(12)], replace(FREE, rounding=0.01), ""),
        (WORKED, [drawn(7, "<<3+4=8>>"), drawn(12)], FREE, "arithmetic"),
        (WORKED, [drawn(7, "<<3+4=8>>"), drawn(12)], replace(FREE, arithmetic=None), ""),
        (WORKED, [drawn(7), drawn(12)], CommonErrors(), "length"),
        (WORKED, [drawn(7, "x" * 600), drawn(12)], CommonErrors(), "length"),
        (WORKED, [drawn(7, "x" * 400), drawn(12)], CommonErrors(), ""),
        (WORKED, [drawn(7)] * 49 + [drawn(12)], FREE, "unanimity"),
        (WORKED, [drawn(7)] * 48 + [drawn(12)] * 2, FREE, ""),
    ],
)
def test_every_filter_is_a_setting(worked: str, samples: list[str], settings: CommonErrors, refused: str) -> None:
    assert pick(worked, samples, settings).refused == refused


def test_a_sound_member_of_the_largest_group_is_taken() -> None:
    samples = [drawn(7, "<<3+4=8>>"), drawn(7, "<<3+4=7>> sound"), drawn(15)]
    assert "sound" in pick(WORKED, samples, FREE).solution


@pytest.mark.parametrize(
    ("text", "answer"),
    [("#### 12", 12), ("x #### $1,200.50 left", 1200.5), ("#### -3", -3), ("12", None), ("#### none", None)],
)
def test_the_answer_is_the_first_number_after_the_mark(text: str, answer: float | None) -> None:
    assert answer_of(text) == answer


@pytest.mark.parametrize(
    ("expression", "value"), [("2+3*4", 14), ("(2+3)*-4", -20), ("10/4", 2.5), ("7//2", 3), (".5*4", 2), ("1,0", None)]
)
def test_arithmetic_is_computed_and_nothing_else(expression: str, value: float | None) -> None:
    if value is None:
        with pytest.raises(ValueError, match="no arithmetic"):
            arithmetic(expression)
    else:
        assert arithmetic(expression) == value
    for bad in ("2**9", "(2", "x", "", "2 3"):
        with pytest.raises(ValueError):  # noqa: PT011
            arithmetic(bad)


def test_marks_and_steps() -> None:
    assert marks_of("<<50%*8=4>> <<1/0=1>> <<2*2=4>>") == [("50%*8", 0.0), ("1/0", float("inf")), ("2*2", 0.0)]
    assert steps_of(WORKED) == 2
    with pytest.raises(UserError, match="no number"):
        pick("no answer", [], FREE)
    with pytest.raises(UserError, match="turn them round"):
        CommonErrors(shortest=9, longest=3)


def test_a_sampler_with_known_frequencies_gives_the_dialogues() -> None:
    asked: list[Request] = []

    def say(request: Request) -> str:
        asked.append(request)
        return drawn(12) if request.seed % 5 < 2 else drawn(7)

    settings = replace(FREE, samples=10)
    problems = [("Three boxes?", WORKED), ("Too long?", "a\nb\nc\nd\ne\n#### 12")]
    sampler = chat_sampler(Chat(Scripted(say), shown=False), settings)
    [dialogue], counts_ = common_errors(problems, sampler, settings, ["Ines is here."])
    assert counts_ == {"asked": 1, "picked": 1, "steps": 1}
    assert (dialogue.problem, dialogue.gold, dialogue.persona) == ("Three boxes?", "12", "Ines is here.")
    assert dialogue.wrong_solution == "I think 7 and so on\n 7"
    assert len(asked) == 10
    assert {request.temperature for request in asked} == {0.7}
    assert len(asked[0].messages) == 5


def test_calls_that_fail_are_told_and_are_no_samples() -> None:
    settings = replace(FREE, samples=10)
    with pytest.warns(UserWarning, match="4 of 10 calls for solutions failed"):
        chat_sampler(Chat(Scripted([drawn(7)] * 6), shown=False), settings)(["Three boxes?"])
    with pytest.raises(UserError, match="No call for a solution was answered"):
        chat_sampler(Chat(Scripted([]), shown=False), settings)(["Three boxes?"])


def test_problems_of_another_form_are_refused() -> None:
    Path("x.jsonl").write_text('{"question": "Q"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="question, answer"):
        read_problems(Path("x.jsonl"))


def test_only_the_turn_to_be_learned_counts_and_its_loss_is_the_formula(model: LanguageModel) -> None:
    config = Config(reading=ReadingSettings(history=2))
    dialogue = worked_dialogues()[0]
    pairs = make_pairs([dialogue], config, model.tokenizer)
    assert len(pairs) == len(dialogue.of("teacher")) - 1
    sums, count = 0.0, 0
    for pair in pairs:
        tokens = pair.tokens
        learned = [token for token, response in zip(tokens.ids, tokens.response) if response]
        assert model.tokenizer.decode(learned, skip_special_tokens=True) == pair.turn.text
        text = model.tokenizer.decode(tokens.ids)
        assert f"Your next move is {pair.turn.move}" in text
        assert dialogue.problem in text
        with torch.no_grad():
            logits = model.model(input_ids=torch.tensor([tokens.ids])).logits[0, :-1]
        start = len(tokens.ids) - len(learned)
        sums += float(cross_entropy(logits[start - 1 :], torch.tensor(learned), reduction="sum"))
        count += len(learned)
    found = loss_by_problems(model, [(pair.tokens, place == 0) for place, pair in enumerate(pairs)])
    assert found["all"] == pytest.approx(sums / count, rel=1e-4)
    assert set(found) == {"all", "seen", "unseen"}


def test_a_long_history_loses_its_oldest_turns_and_no_problem(model: LanguageModel) -> None:
    dialogue = worked_dialogues()[0]
    before = replace(dialogue, turns=dialogue.turns[:7])
    whole = encode_pair(
        before, Turn("teacher", "Next?"), Config(reading=ReadingSettings(max_length=2048)), model.tokenizer
    )
    assert whole is not None
    cut = encode_pair(
        before,
        Turn("teacher", "Next?"),
        Config(reading=ReadingSettings(max_length=len(whole.ids) - 1)),
        model.tokenizer,
    )
    assert cut is not None
    text = model.tokenizer.decode(cut.ids)
    assert dialogue.problem in text
    assert dialogue.solution.split("\n")[0] in text
    assert dialogue.turns[0].text not in text
    assert dialogue.turns[6].text in text
    assert (
        encode_pair(before, Turn("teacher", "Next?"), Config(reading=ReadingSettings(max_length=20)), model.tokenizer)
        is None
    )


def test_conversations_are_split_and_problems_known(model: LanguageModel) -> None:
    dialogues = worked_dialogues()
    train, held_out = split(dialogues, 0.34, 0)
    assert len(held_out) == 2
    assert not {one.problem for one in train} & {one.problem for one in held_out}
    assert split(dialogues, 0.34, 0) == (train, held_out)
    twin = replace(train[0], persona="Another.")
    _, exam = lessons(train, [*held_out, twin], Config(), model)
    assert {pair.before.problem for pair in exam if not pair.unseen} == {twin.problem}
    with pytest.raises(UserError, match="cannot be split"):
        split(dialogues[:1], 0.2, 0)
    with pytest.raises(UserError, match=r"raise reading\.max_length"):
        lessons(train, held_out, Config(reading=ReadingSettings(max_length=10)), model)


def test_data_that_is_not_there_is_told() -> None:
    assert read_data("") == worked_dialogues()
    with pytest.raises(UserError, match="cannot be read"):
        read_data("absent.jsonl")
    for settings in ({"held_out": 0.0}, {"held_out": 1.0}, {"played": 0}, {"rounds": 0}):
        with pytest.raises(UserError):
            Config(**settings)  # type: ignore[arg-type]


def test_a_reproduction_without_data_says_where_it_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRECEPTOR_DATA", str(Path("nowhere").absolute()))
    with pytest.raises(UserError, match=r"PRECEPTOR_DATA .*mathdial/test\.jsonl"):
        experiment.reproduce(1, Path("out"), False)


def test_what_was_measured_is_kept() -> None:
    calls: list[int] = []

    def measure() -> dict[str, list[float]]:
        calls.append(1)
        return {"a": [1.0]}

    assert experiment.keep(Path("a.json"), measure) == experiment.keep(Path("a.json"), measure) == {"a": [1.0]}
    assert len(calls) == 1


def test_the_papers_settings() -> None:
    assert mathdial.paper.training.learning_rate == 6.25e-5
    assert (mathdial.paper.training.epochs, mathdial.paper.training.schedule) == (10, "linear")
    assert mathdial.paper.training.warmup == 0


def test_the_move_classifier_learns_what_can_be_learned() -> None:
    random = np.random.default_rng(0)
    cues = {"generic": "Thanks, bye!", "focus": "I started by adding 3.", "probing": "It is 7.", "telling": "Hm?"}
    moves = [str(move) for move in random.choice(list(cues), 200)]
    turns = [f"Student: {cues[move]} {number}" for number, move in enumerate(moves)]
    guesses = NextMove(turns[:150], moves[:150]).predict(turns[150:])
    assert np.mean([guess == move for guess, move in zip(guesses, moves[150:])]) > 0.9
    assert NextMove(turns, moves, seed=1).predict(turns[:9]) == NextMove(turns, moves, seed=1).predict(turns[:9])
    assert len(counts("Student: ")) == len(counts("Teacher: 1,000 = 5"))


def test_moves_of_another_form_are_refused() -> None:
    Path("m.csv").write_text("index,text,label\n0,x,scold\n", encoding="utf-8")
    with pytest.raises(UserError, match="has the move 'scold'"):
        read_moves(Path("m.csv"))
    with pytest.raises(UserError, match="cannot be read"):
        read_moves(Path("absent.csv"))


def test_a_classifier_that_only_guesses_the_majority_does_not_pass() -> None:
    same = {"right": [1.0, 0.0] * 50, "majority": [1.0, 0.0] * 50, "accuracy": [0.5], "f1": [0.2]}
    assert not next_move_claims(same).claims[0].holds
    assert not compare(same["right"], same["majority"], "x", better="higher").claim.holds


def test_uptake_without_correlation_does_not_pass() -> None:
    figures = {"n": [100.0], "share": [0.01, 0.9], "pjsd": [0.4, -0.1], "p": [1e-9, 0.2]}
    assert [claim.holds for claim in uptake_claims(figures, "x").claims] == [False, False]


@needs("mathdial", "test.jsonl")
def test_scripted_play_on_the_released_problems_gives_the_closed_forms() -> None:
    found = scripted_play(DATA / "mathdial" / "test.jsonl")
    assert len(found.claims) == 10
    assert all(claim.holds for claim in found.claims)


@needs("gsm8k")
def test_gsm8k_passes_the_filters_as_counted_and_real_errors_are_picked() -> None:
    assert [claim for claim in filters(DATA / "gsm8k").claims if not claim.holds] == []


@needs("uptake", "uptake_data.csv")
def test_uptake_follows_the_human_ratings_without_an_encoder_too() -> None:
    figures = uptake_ratings(DATA / "uptake" / "uptake_data.csv", 1, None)
    assert figures["n"] == [1998]
    assert figures["share"][0] > 0.45
    assert figures["pjsd"][0] > 0.35


@needs("mathdial", "moves_test_window_1.csv")
def test_released_moves_are_read() -> None:
    turns, moves = read_moves(DATA / "mathdial" / "moves_test_window_1.csv")
    assert len(turns) == 3100
    assert moves.count("focus") == 1192
    assert turns[0].startswith("Student: Sure. I started by")


def test_the_hubs_records_have_the_same_form(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    record = {"question": "Q", "ground_truth": "x\n 6", "conversation": "Teacher: (focus)Hi|EOM|Student: 6"}
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name: {"train": [record], "test": [json.loads(json.dumps(record))]}
    )
    first, second = read_data("eth-nlped/mathdial")
    assert first == second
    assert isinstance(first, Dialogue)
    assert [turn.move for turn in first.turns] == ["focus", ""]


class Recorded:
    """A local model that writes nothing and keeps the prompts that it was given."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = LocalModel(model)
        self.identity, self.group, self.prompts = "recorded", 64, []

    def prompt_bound(self, request: Request) -> int:
        return self.model.prompt_bound(request)

    async def answer(self, requests: Listed[Request]) -> list[Answer]:
        self.prompts += [request.messages for request in requests]
        return [Answer("Next?", 1, 1) for _ in requests]

    async def close(self) -> None:
        pass


@pytest.mark.parametrize("history", [0, 1, 3])
def test_a_tutor_reads_in_play_what_it_read_in_training(model: LanguageModel, history: int) -> None:
    """For every turn of every dialogue, at budgets that cut nothing, something, and all but the newest turn."""
    cut = set()
    for dialogue in worked_dialogues():
        for place in range(1, len(dialogue.turns)):
            before, turn = replace(dialogue, turns=dialogue.turns[:place]), Turn("teacher", "Next?")
            if before.turns[-1].role == "teacher":
                continue
            for length in (140, 180, 220, 260, 300, 400, 2048):
                reading = ReadingSettings(history=history, max_length=length)
                tokens = encode_pair(before, turn, Config(reading=reading), model.tokenizer)
                if tokens is None:
                    continue
                backend = Recorded(model)
                voice = Voice(context=length, max_tokens=len(tokens.ids) - len(tokens.prompt))
                ChatTutor(Chat(backend, shown=False), voice, reading.knowledge, history=history)([before])
                assert tuple(tokens.prompt) == tuple(encode_prompt(backend.prompts[0], model.tokenizer))
                cut.add(len(backend.prompts[0]) < 1 + place)
    assert cut == ({True} if history == 1 else {True, False})


def test_the_fine_tuned_tutor_is_played_as_it_was_trained(model: LanguageModel) -> None:
    config = Config(reading=ReadingSettings(("problem",), history=3, max_length=222))
    tutor = as_trained(config, model)
    assert (tutor.history, tutor.voice.context, tutor.knowledge) == (3, 222, ("problem",))
