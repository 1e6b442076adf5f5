"""Which questions are asked, from files and generated."""

import json
from pathlib import Path

import pytest

from preceptor.errors import UserError
from preceptor.methods.soft_bootstrapping.questions import QuestionSource, draw, read_file
from preceptor.tasks.boxed import read_math

GSM8K = '{"question": "2 and 3?", "answer": "2 + 3 = <<2+3=5>>5\\n#### 5"}\n'


def test_math_is_read_from_a_folder_and_from_lines(tmp_path: Path):
    folder = tmp_path / "algebra"
    folder.mkdir()
    problem = {"problem": "1+1?", "solution": r"It is $\boxed{2}$.", "level": "Level 1", "type": "Algebra"}
    (folder / "1.json").write_text(json.dumps(problem))
    (one,) = read_math(tmp_path)
    assert (one.instruction, one.truth, one.skill, one.subskill) == ("1+1?", "2", "Algebra", "Level 1")
    lines = tmp_path / "test.jsonl"
    lines.write_text(json.dumps({"problem": "1+2?", "solution": "", "answer": "3", "subject": "Algebra"}) + "\n\n")
    assert [one.truth for one in read_math(lines)] == ["3"]
    assert [one.truth for one in read_file(lines)] == ["3"]
    assert [one.truth for one in read_file(tmp_path)] == ["2"]
    for name, box in (("2", r"$\boxed 7$"), ("3", r"$\fbox{8}$")):
        (folder / f"{name}.json").write_text(json.dumps({**problem, "solution": f"It is {box}."}))
    assert [one.truth for one in read_math(tmp_path)] == ["2", "7", "8"]


def test_questions_are_chosen_by_name(tmp_path: Path):
    path = tmp_path / "train.jsonl"
    path.write_text(GSM8K + GSM8K.replace("2 and 3", "5"))
    assert [one.truth for one in read_file(path)] == ["5", "5"]
    learned, exam = draw(QuestionSource(source=str(path), exam=1), seed=0)
    assert len(learned) == len(exam) == 1
    assert learned[0].instruction != exam[0].instruction
    for source in ("sums", "problems"):
        learned, exam = draw(QuestionSource(source=source, count=20, exam=10), seed=3)
        assert (len(learned), len(exam)) == (20, 10)
        assert not {one.instruction for one in learned} & {one.instruction for one in exam}
        assert draw(QuestionSource(source=source, count=20, exam=10), seed=3) == (learned, exam)


def test_an_exam_from_another_file_shares_no_question(tmp_path: Path):
    for name, numbers in (("train", range(1, 9)), ("test", range(7, 11))):
        lines = [json.dumps({"problem": f"{n} and 3?", "answer": f"{n + 3}"}) for n in numbers]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    files = {"source": str(tmp_path / "train.jsonl"), "exam_source": str(tmp_path / "test.jsonl")}
    learned, exam = draw(QuestionSource(**files, exam=4), seed=0)
    assert sorted(one.truth for one in exam) == ["10", "11", "12", "13"]
    assert sorted(int(one.truth) for one in learned) == [4, 5, 6, 7, 8, 9]


def test_a_sum_in_another_order_is_no_other_question():
    learned, exam = draw(QuestionSource(smallest=2, largest=35, count=1000, exam=200), seed=0)
    numbers = [one.instruction.removeprefix("What is ").removesuffix("?").split(" + ") for one in (*learned, *exam)]
    assert len(numbers) == len({tuple(sorted(pair)) for pair in numbers}) == 34 * 35 // 2
    assert 0.3 < sum(int(first) > int(second) for first, second in numbers) / len(numbers) < 0.7


def test_the_difficulty_of_sums_is_tuned():
    hard, _ = draw(QuestionSource(terms=3, smallest=100, largest=999, count=8, exam=1), seed=1)
    for one in hard:
        numbers = [int(word) for word in one.instruction.removeprefix("What is ").removesuffix("?").split(" + ")]
        assert len(numbers) == 3
        assert all(100 <= number <= 999 for number in numbers)
        assert str(sum(numbers)) == one.truth


def test_what_gives_no_question_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"no file or folder nowhere\.jsonl with questions: give sums, problems"):
        draw(QuestionSource(source="nowhere.jsonl"), seed=0)
    path = tmp_path / "train.jsonl"
    path.write_text(GSM8K)
    with pytest.raises(UserError, match=r"1 different questions, and 200 are for the exam"):
        draw(QuestionSource(source=str(path)), seed=0)
    two = tmp_path / "test.jsonl"
    two.write_text(GSM8K + GSM8K.replace("2 and 3", "5"))
    with pytest.raises(UserError, match=r"test\.jsonl has 2 different questions, and 5 are for the exam"):
        draw(QuestionSource(source=str(path), exam_source=str(two), exam=5), seed=0)
    with pytest.raises(UserError, match=r"All 1 questions of .*train\.jsonl are in .*test\.jsonl too"):
        draw(QuestionSource(source=str(path), exam_source=str(two), exam=2), seed=0)
    for name in ("sums", "problems"):
        with pytest.raises(UserError, match=rf"exam_source is {name}, and only a file or a folder"):
            QuestionSource(source=str(path), exam_source=name)
    path.write_text('{"question": "2 and 3?", "answer": "five"}\n')
    with pytest.raises(UserError, match="does not end with ####"):
        draw(QuestionSource(source=str(path)), seed=0)
    with pytest.raises(UserError, match=r"questions\.exam is 0"):
        QuestionSource(exam=0)
    with pytest.raises(UserError, match="from 9 to 3"):
        QuestionSource(smallest=9, largest=3)


@pytest.mark.parametrize("text", [GSM8K, '{"problem": "1+1?", "answer": "2"}\n'])
def test_a_file_in_another_encoding_is_named(tmp_path: Path, text):
    for path in (tmp_path / "train.jsonl", tmp_path / "folder" / "1.json"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.replace("?", " caf\u00e9?").encode("latin-1"))
        with pytest.raises(UserError, match=rf"{path.name} is not text in UTF-8"):
            read_file(path if path.suffix == ".jsonl" else path.parent)
