import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from preceptor.cli import main as command
from preceptor.commands import chat
from preceptor.commands.chat import Config, Record, main
from preceptor.errors import UserError
from preceptor.language import ChatSettings

FILE = Path("runs/chat/dialogue.jsonl")
Say = Callable[..., None]


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Say:
    """What the person types, line by line; then the end of the input."""

    def typed(*lines: str) -> None:
        waiting: Iterator[str] = iter(lines)

        def read(prompt: str = "") -> str:
            line = next(waiting, None)
            if line is None:
                raise EOFError
            return line

        monkeypatch.setattr("builtins.input", read)

    return typed


def lines() -> list[dict[str, str]]:
    return [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]


def test_a_person_learns_until_the_problem_is_solved(say: Say, capsys: pytest.CaptureFixture[str]) -> None:
    say("17 - 7 is 10", "", "oh, 5 boxes: 60 - 7 = 53")
    main(Config(partner="next-step"))
    shown = capsys.readouterr().out
    assert "A box holds 12 eggs" in shown
    assert "12 + 5" not in shown
    assert "What is the next step?" in shown
    assert "Solved: the student found the answer" in shown
    assert [line["role"] for line in lines()[1:-1]] == ["teacher", "student"] * 2
    assert lines()[-1] == {"outcome": "solved"}


def test_out_of_turns_is_told_apart_and_shows_a_solution(say: Say, capsys: pytest.CaptureFixture[str]) -> None:
    say("10", "11", "12")
    main(Config(partner="next-step", rounds=2))
    shown = capsys.readouterr().out
    assert "Out of turns" in shown
    assert "Solved" not in shown
    assert "5 * 12 = 60" in shown
    assert lines()[-1] == {"outcome": "out of turns"}
    assert len(lines()) == 1 + 6 + 1


def test_an_answer_that_was_told_is_revealed(say: Say, capsys: pytest.CaptureFixture[str]) -> None:
    say("10", "10", "then 53")
    main(Config(partner="teller"))
    assert "the teacher had given the answer before" in capsys.readouterr().out
    assert lines()[-1] == {"outcome": "revealed"}


def test_a_person_teaches_with_moves_and_intents(say: Say, capsys: pytest.CaptureFixture[str]) -> None:
    say("4", "1", "Hi [there]", "9", "", "probing", "2", "Sure?", "foc", "", "Next?", "3", "reveal answer", "It is 53.")
    main(Config(person="teacher", partner="parrot"))
    shown = capsys.readouterr().out
    for expected in (
        "Right solution",
        "12 + 5 = 17 eggs",
        "Amara is a student",
        "Give a number from 1 to 4",
        "it is 53",
    ):
        assert expected in shown
    mine = [line for line in lines() if line.get("role") == "teacher"]
    assert [(line["move"], line["intent"], line["text"]) for line in mine] == [
        ("generic", "greeting/farewell", "Hi [there]"),
        ("probing", "seek self-correction", "Sure?"),
        ("focus", "", "Next?"),
        ("telling", "reveal answer", "It is 53."),
    ]
    assert lines()[-1] == {"outcome": "revealed"}


@pytest.mark.parametrize("leave", ["/quit", " /QUIT ", None])
def test_who_leaves_can_go_on(say: Say, capsys: pytest.CaptureFixture[str], leave: str | None) -> None:
    say("10", *([leave] if leave else []))
    main(Config(partner="next-step"))
    told = capsys.readouterr().out
    assert "Kept 3 turns. Go on with: preceptor chat --partner next-step --resume" in told
    before = FILE.read_bytes()
    say("it is 53")
    main(Config(partner="next-step", resume=True))
    assert "You: 10" in capsys.readouterr().out
    assert FILE.read_bytes().startswith(before)
    assert lines()[-1] == {"outcome": "solved"}


def test_every_turn_is_kept_before_the_next(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    say("10", "11")
    kept: list[int] = []
    monkeypatch.setattr(chat, "next_step_tutor", lambda dialogues: (kept.append(len(lines())), 1 / 0)[1])
    with pytest.raises(ZeroDivisionError):
        main(Config(partner="next-step"))
    assert kept == [1]


def test_a_line_that_a_crash_cut_short_is_dropped(say: Say) -> None:
    say("10")
    main(Config(partner="next-step"))
    whole = FILE.read_bytes()
    FILE.write_bytes(whole + b'{"role": "student", "te')
    say("it is 53")
    main(Config(partner="next-step", resume=True))
    assert FILE.read_bytes().startswith(whole)
    assert [line["text"] for line in lines()[1:-1]][-1] == "it is 53"
    torn = Record(Path("torn.jsonl"))
    torn.path.write_bytes(b'{"probl')
    assert torn.lines() == []


def test_other_dialogues_are_not_touched(say: Say) -> None:
    say("10")
    main(Config(partner="next-step"))
    before = FILE.read_bytes()
    for config, sentence in (
        (Config(partner="next-step"), "holds a dialogue already"),
        (Config(partner="next-step", problem=2, resume=True), "problem differs"),
        (Config(partner="teller", resume=True), "partner differs"),
    ):
        with pytest.raises(UserError, match=sentence):
            main(config)
    assert FILE.read_bytes() == before
    say("53")
    main(Config(partner="next-step", resume=True))
    with pytest.raises(UserError, match=r"has ended \(solved\)"):
        main(Config(partner="next-step", resume=True))


@pytest.mark.parametrize("text", ["hello\n", "[1]\n", '{"a": 1}\n'])
def test_a_file_that_is_no_dialogue_is_refused(text: str) -> None:
    Path("x.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"x\.jsonl"):
        main(Config(partner="next-step", output="x.jsonl", resume=True))
    assert Path("x.jsonl").read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"partner": "parrot"}, "no partner of a student"),
        ({"person": "teacher", "partner": "teller"}, "no partner of a teacher"),
        ({"rounds": 0}, "rounds is 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Config(**settings)  # type: ignore[arg-type]


def test_a_problem_that_there_is_not_is_refused() -> None:
    with pytest.raises(UserError, match="from 1 to 6"):
        main(Config(partner="next-step", problem=7))
    assert not FILE.exists()


def test_a_model_is_the_other_side_and_its_silence_is_told(say: Say, capsys: pytest.CaptureFixture[str]) -> None:
    """The echo says again what the student said."""
    say("I think 10", "it is 53")
    main(Config(chat=ChatSettings(model="echo")))
    said = [line["text"] for line in lines() if line.get("role") == "teacher"]
    assert said[1] == "I think 10"
    say("4", "", "Student:", "/quit")
    main(Config(person="teacher", chat=ChatSettings(model="echo"), output="silent.jsonl"))
    assert "No answer: the model wrote nothing" in capsys.readouterr().out


def test_the_command_takes_settings_and_problems_of_a_file(say: Say, capsys: pytest.CaptureFixture[str]) -> None:
    record = {"question": "Two and four?", "ground_truth": "x\n 6", "conversation": "Teacher: Hi"}
    Path("mine.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    say("6")
    assert command(["chat", "--partner", "scaffolding", "--data", "mine.jsonl", "--output", "d.jsonl"]) == 0
    assert "Two and four?" in capsys.readouterr().out
    assert command(["chat", "--partner", "sage"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "no partner of a student" in told
