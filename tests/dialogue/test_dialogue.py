import json
from dataclasses import replace
from pathlib import Path

import pytest

from preceptor.dialogue.dialogue import (
    MOVES,
    Dialogue,
    Turn,
    as_record,
    ended,
    fit_turns,
    last_line,
    parse_dialogue,
    parse_move,
    parse_turn,
    play,
    read_dialogues,
    strip_turn,
    write_dialogues,
)
from preceptor.dialogue.examples import worked_dialogues
from preceptor.dialogue.tutors import (
    DIFFICULTIES,
    ChatStudent,
    ChatTutor,
    Voice,
    next_step_tutor,
    parrot_student,
    persona,
    scaffolding_tutor,
    self_correcting_student,
    student_messages,
    teller,
    tutor_messages,
)
from preceptor.errors import UserError
from preceptor.language import Chat, Echo, Request, Scripted
from tests.data_folder import DATA, needs

CASE = Dialogue("Two and four make?", "2 + 4 = 6\n 6", "2 * 4 = 8\n 8", "Ines is a student in grade 7.")


def bare() -> list[Dialogue]:
    return [replace(one, turns=()) for one in worked_dialogues()]


def record(**fields: object) -> dict[str, object]:
    plain = {"question": "Q?", "ground_truth": "a\\n 6", "student_incorrect_solution": "8", "conversation": ""}
    return {**plain, "student_profile": "Mariana is a 7th grade student.", **fields}


@pytest.mark.parametrize(
    ("written", "role", "move", "text"),
    [
        ("Teacher: (focus)What now?", "teacher", "focus", "What now?"),
        ("Teacher: (leaking)It is 6.", "teacher", "telling", "It is 6."),
        ("Teacher: (Probbing) Why?", "teacher", "probing", " Why?"),
        ("Teacher: What now?", "teacher", "", "What now?"),
        ("Teacher: (1 x dozen) = ?", "teacher", "", "(1 x dozen) = ?"),
        ("Teacher: (focus)(1 x dozen) = ?", "teacher", "focus", "(1 x dozen) = ?"),
        ("Student: (focus) is no move of mine", "student", "", "(focus) is no move of mine"),
        ("Mariana: Hi", "student", "", "Hi"),
        ("Note: this is text", "teacher", "", "Note: this is text"),
        ("no speaker", "teacher", "", "no speaker"),
        ("Teacher:", "teacher", "", ""),
        ("", "teacher", "", ""),
    ],
)
def test_turns_are_parsed_and_written_again(written: str, role: str, move: str, text: str) -> None:
    turn = parse_turn(written, "teacher", name="Mariana")
    assert (turn.role, turn.move, turn.text) == (role, move, text)
    assert turn.written == written


def test_a_turn_that_was_changed_is_written_as_it_is_now() -> None:
    turn = parse_turn("Teacher: (leaking)It is 6.", "teacher")
    assert replace(turn, text="No.").written == "Teacher: (leaking)No."
    assert replace(turn, move="focus").written == "Teacher: (focus)It is 6."
    assert Turn("student", "Yes").written == "Student: Yes"


@pytest.mark.parametrize(("mark", "move"), [("FOCUS", "focus"), ("telllng", "telling"), ("aside", ""), ("", "")])
def test_moves_are_read_with_their_misspellings(mark: str, move: str) -> None:
    assert parse_move(mark) == move


def test_a_move_or_intent_that_there_is_not_is_refused() -> None:
    with pytest.raises(UserError, match="no move"):
        Turn("teacher", "x", "scold")
    with pytest.raises(UserError, match="no intent of the move 'focus'"):
        Turn("teacher", "x", "focus", "reveal answer")
    for move, intents in MOVES.items():
        assert [Turn("teacher", "x", move, intent).intent for intent in intents] == list(intents)


@pytest.mark.parametrize(
    ("solution", "answer"),
    [("a\n 6", "6"), ("a\\nb\\n 2,520,000", "2520000"), ("a\n 0.75 ", "0.75"), ("7", "7"), ("x\n -3", "-3")],
)
def test_the_gold_answer_is_the_last_line(solution: str, answer: str) -> None:
    assert Dialogue("p", solution).gold == answer
    assert last_line(solution).replace(",", "") == answer


def test_a_record_comes_back_with_intents_and_outcomes() -> None:
    turns = (Turn("teacher", "Why?", "probing", "ask for explanation"), Turn("student", "So."))
    for outcome in ("solved", "revealed", "unsolved", "out of turns", "stopped", "failed", None):
        dialogue = replace(CASE, turns=turns, outcome=outcome)
        again = parse_dialogue(json.loads(json.dumps(as_record(dialogue))))
        assert again.outcome == outcome
        assert [(t.role, t.move, t.intent, t.text) for t in again.turns] == [
            (t.role, t.move, t.intent, t.text) for t in turns
        ]


def test_unknown_fields_and_nulls_are_kept() -> None:
    said = record(
        qid="5", conversation="Teacher: (generic)Hi|EOM|Mariana: Hello|EOM|x", more=[1], **{"self-correctness": None}
    )
    dialogue = parse_dialogue(said)
    assert as_record(dialogue) == said
    assert [turn.role for turn in dialogue.turns] == ["teacher", "student", "teacher"]
    assert parse_dialogue(record()).turns == ()


def test_files_that_are_no_dialogues_are_refused() -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_dialogues(Path("absent.jsonl"))
    Path("x.jsonl").write_text('{"question": "Q"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="Line 1 .*ground_truth"):
        read_dialogues(Path("x.jsonl"))
    Path("x.jsonl").write_text("[]\n", encoding="utf-8")
    with pytest.raises(UserError, match="Line 1"):
        read_dialogues(Path("x.jsonl"))


@needs("mathdial")
@pytest.mark.parametrize("name", ["test", "example", "example_model_output"])
def test_released_files_are_written_byte_for_byte(name: str) -> None:
    dialogues = read_dialogues(DATA / "mathdial" / f"{name}.jsonl")
    write_dialogues(Path("out/again.jsonl"), dialogues)
    assert Path("out/again.jsonl").read_bytes() == (DATA / "mathdial" / f"{name}.jsonl").read_bytes()
    for dialogue in dialogues:
        fresh = tuple(replace(turn, prefix="") for turn in dialogue.turns)
        assert [turn.role for turn in parse_dialogue(as_record(replace(dialogue, turns=fresh))).turns] == [
            turn.role for turn in dialogue.turns
        ]


@pytest.mark.parametrize(
    ("text", "role", "expected"),
    [
        ("**Student:** Ines: Hi\nmore\nTeacher: no", "student", "Hi\nmore"),
        ("Student: Student: I say 6. <EOM> Teacher: right", "student", "I say 6."),
        ("I say 6|EOM|Student: x", "student", "I say 6"),
        ("teacher - a word in a sentence: no prefix", "student", "teacher - a word in a sentence: no prefix"),
        ("Tutor: (1+2) is 3", "teacher", "(1+2) is 3"),
        ("<|im_end|>", "student", ""),
        ("", "student", ""),
        ("My teacher: she said so", "student", "My teacher: she said so"),
    ],
)
def test_prefixes_end_markers_and_the_other_side_are_stripped(text: str, role: str, expected: str) -> None:
    assert strip_turn(text, role, name="Ines").text == expected  # type: ignore[arg-type]


def test_a_tutor_may_begin_with_its_move() -> None:
    assert strip_turn("Teacher: (Focus) What is next?", "teacher") == Turn("teacher", "What is next?", "focus")


def test_the_oldest_pairs_go_first() -> None:
    turns = tuple(Turn("teacher" if i % 2 == 0 else "student", f"turn {i}") for i in range(7))
    within = lambda most: lambda kept: 2 * len(kept) <= most  # noqa: E731
    assert fit_turns(turns, within(14)) == turns
    assert fit_turns(turns, within(13)) == turns[2:]
    assert fit_turns(turns, within(5)) == turns[-1:]
    assert fit_turns(turns, within(-3)) == turns[-1:]
    assert fit_turns((), within(-3)) == ()
    assert fit_turns(turns, within(14), history=3) == turns[-3:]
    assert fit_turns(turns, within(5), history=3) == turns[-1:]


@pytest.mark.parametrize("after", [1, 2, 4])
def test_scripted_sides_end_as_they_must(after: int) -> None:
    held = play(next_step_tutor, self_correcting_student(after), bare(), rounds=4)
    assert {one.outcome for one in held} == {"solved"}
    assert {len(one.of("teacher")) for one in held} == {after + 1}
    told = play(teller(after), parrot_student, bare(), rounds=4)
    assert {one.outcome for one in told} == {"revealed"}
    assert {len(one.of("student")) for one in told} == {after + 1}


def test_an_answer_that_a_teacher_mentions_in_passing_is_told() -> None:
    told = Turn("teacher", "12 plus 5 gives 17, right? And how many are 2 of them?")
    said = Turn("student", "It is 17.")
    assert ended(Dialogue("p", "s\n17", "w", turns=(told, said))).outcome == "revealed"


def test_out_of_turns_is_not_solved_and_the_last_turn_may_solve() -> None:
    assert {one.outcome for one in play(next_step_tutor, parrot_student, bare(), rounds=3)} == {"out of turns"}
    assert {one.outcome for one in play(next_step_tutor, self_correcting_student(3), bare(), rounds=3)} == {"solved"}
    assert {one.outcome for one in play(next_step_tutor, self_correcting_student(4), bare(), rounds=3)} == {
        "out of turns"
    }
    [none] = play(next_step_tutor, parrot_student, [CASE], rounds=0)
    assert [turn.role for turn in none.turns] == ["teacher", "student"]
    with pytest.raises(UserError, match="rounds"):
        play(next_step_tutor, parrot_student, [CASE], rounds=-1)


def test_a_dialogue_is_taken_up_where_it_stands_and_a_finished_one_is_left() -> None:
    whole = play(next_step_tutor, self_correcting_student(3), [CASE], rounds=4)
    for count in range(1, len(whole[0].turns)):
        part = replace(CASE, turns=whole[0].turns[:count])
        assert play(next_step_tutor, self_correcting_student(3), [part], rounds=4) == whole
    assert play(next_step_tutor, parrot_student, whole, rounds=9) == whole


def test_a_scaffolding_tutor_goes_from_probing_to_focus_and_tells_only_the_stuck() -> None:
    [held] = play(scaffolding_tutor(tell_after=5), parrot_student, [CASE], rounds=9)
    moves = [turn.move for turn in held.of("teacher")]
    assert moves == ["generic", "probing", "probing", "focus", "focus", "focus", "telling"]
    assert held.outcome == "revealed"
    [never] = play(scaffolding_tutor(), parrot_student, [CASE], rounds=9)
    assert "telling" not in [turn.move for turn in never.turns]


def test_what_a_student_says_last_decides() -> None:
    def after(text: str) -> str | None:
        return ended(replace(CASE, turns=(Turn("student", text),))).outcome

    assert after("First 6, then 8") is None
    assert after("Not 8 but 6.") == "solved"
    assert after("six") == "solved"


def test_a_model_that_fails_ends_its_dialogue_with_the_reason() -> None:
    chat = Chat(Scripted(["Hm."]), shown=False)
    held = play(next_step_tutor, ChatStudent(chat), [CASE, CASE], rounds=2)
    assert [one.outcome for one in held] == ["failed", "failed"]
    assert "script has only 1" in held[1].turns[-1].error
    assert len(held[0].turns) == 4


def test_each_round_is_one_batch() -> None:
    asked: list[str] = []

    def say(request: Request) -> str:
        asked.append(request.messages[-1]["content"])
        return "Student: I think 8. <EOM>\nTeacher: It is 6."

    held = play(next_step_tutor, ChatStudent(Chat(Scripted(say), shown=False)), bare(), rounds=1)
    assert len(asked) == 2 * len(held)
    assert {turn.text for one in held for turn in one.of("student")} == {"I think 8."}


def test_the_student_reads_the_blocks_in_the_papers_order() -> None:
    dialogue = replace(CASE, turns=(Turn("teacher", "Hi"), Turn("student", "8"), Turn("teacher", "Why?")))
    system, *history = student_messages(dialogue, dialogue.turns)
    places = [
        system["content"].index(part) for part in (CASE.persona, CASE.problem, CASE.wrong_solution, "believes", "<EOM>")
    ]
    assert places == sorted(places)
    assert CASE.solution not in system["content"]
    assert [(m["role"], m["content"]) for m in history] == [("user", "Hi"), ("assistant", "8"), ("user", "Why?")]


def test_the_tutor_reads_what_it_is_given_and_roles_alternate() -> None:
    turns = (Turn("teacher", "Hi"), Turn("teacher", "there"), Turn("student", "8"), Turn("student", "or 9"))
    system, *history = tutor_messages(CASE, turns, ("problem",), "focus")
    assert CASE.problem in system["content"]
    assert "2 + 4" not in system["content"]
    assert "focus" in system["content"]
    assert [message["role"] for message in history] == ["user", "assistant", "user"]
    assert history[-1]["content"] == "8\nor 9"
    assert "2 * 4" in tutor_messages(CASE, (), ("wrong solution",))[0]["content"]
    assert [message["role"] for message in tutor_messages(CASE, (), ())] == ["system", "user"]


def test_a_full_context_forgets_turns_and_keeps_problem_and_solution() -> None:
    seen: list[Request] = []

    def say(request: Request) -> str:
        seen.append(request)
        return "still 8"

    voice = Voice(context=230, max_tokens=20)
    [held] = play(next_step_tutor, ChatStudent(Chat(Scripted(say), shown=False), voice), [CASE], rounds=40)
    assert held.outcome == "out of turns"
    last = seen[-1].messages
    assert CASE.problem in last[0]["content"]
    assert CASE.wrong_solution in last[0]["content"]
    assert sum(len(message["content"].split()) for message in last) <= 210
    assert len(last) < len(held.turns)


def test_empty_turns_and_an_echo_do_not_stop_a_dialogue() -> None:
    silent = Chat(Scripted(lambda request: "<EOM>"), shown=False)
    [held] = play(ChatTutor(silent), ChatStudent(Chat(Echo(), shown=False)), [CASE], rounds=2)
    assert held.outcome == "out of turns"
    assert [turn.text for turn in held.of("teacher")[1:]] == ["", ""]


def test_personas() -> None:
    assert len(DIFFICULTIES) == 6
    assert persona("Ines", "facts", grade=6).startswith("Ines is a student in grade 6. Ines has trouble telling")
    with pytest.raises(UserError, match="no difficulty"):
        persona("Ines", "laziness")


def test_our_own_dialogues_are_whole() -> None:
    for dialogue in worked_dialogues():
        assert dialogue.gold != last_line(dialogue.wrong_solution)
        assert {turn.move for turn in dialogue.of("teacher")} <= set(MOVES)
        assert dialogue.name
        assert dialogue.turns[0].move == "generic"


def test_smollm2_plays_within_its_turns_and_repeats_itself() -> None:
    from preceptor.language.local import LocalModel
    from preceptor.models.loading import load

    model = load("smollm2", dtype="bfloat16")
    voice = Voice(temperature=0.7, max_tokens=8, seed=3)

    def talk() -> list[Dialogue]:
        chat = Chat(LocalModel(model), shown=False)
        return play(ChatTutor(chat, voice), ChatStudent(chat, voice), [CASE], rounds=1)

    first, second = talk(), talk()
    assert first == second
    for one in first:
        assert len(one.of("teacher")) <= 2
        assert one.outcome in ("solved", "revealed", "out of turns")
        for turn in one.turns:
            assert not turn.text.lower().startswith(("student:", "teacher:", "tutor:", "ines:"))
            assert "\nTeacher:" not in turn.text
            assert "<EOM>" not in turn.text
