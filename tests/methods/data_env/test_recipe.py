"""The recipe data_env: what its arms see, what it leaves on the disk, and how it goes on after a stop."""

from __future__ import annotations

import hashlib
import inspect
import json
import random
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("gymnasium")

from preceptor.cli import main as command  # noqa: E402
from preceptor.engine.settings import Training  # noqa: E402
from preceptor.errors import UserError  # noqa: E402
from preceptor.language import Chat, ChatSettings, Request, Scripted  # noqa: E402
from preceptor.methods.data_env import recipe as data_env  # noqa: E402
from preceptor.methods.data_env.environment import Episode  # noqa: E402
from preceptor.methods.data_env.exam import Exam, answer_length, draw_questions  # noqa: E402
from preceptor.methods.data_env.pretraining import School, check_weak, pretrain  # noqa: E402
from preceptor.methods.data_env.recipe import Config, paper, teach, tiny  # noqa: E402
from preceptor.methods.data_env.reproduction import shuffled  # noqa: E402
from preceptor.methods.data_env.rounds import datum_from, datum_json, read_iterations, read_lines  # noqa: E402
from preceptor.methods.data_env.small_models import small_student  # noqa: E402
from preceptor.methods.data_env.student import TaskStudent  # noqa: E402
from preceptor.methods.data_env.world import make_task, make_task_student, make_world  # noqa: E402
from preceptor.tasks.contamination import leaks  # noqa: E402
from preceptor.tasks.figures import Figures  # noqa: E402
from tests.drawings import look  # noqa: E402


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_run_leaves_its_rounds_its_pictures_and_its_student(tmp_path: Path) -> None:
    config = replace(tiny, environment="skill_tree", output=str(tmp_path / "run"))
    table = data_env.main(config)
    rounds = read_iterations(tmp_path / "run" / "iterations")
    assert [one.number for one in rounds] == list(range(len(rounds)))
    assert 0 < sum(len(one.data) for one in rounds) == table.rows["all"]["items"] <= config.episode.budget
    assert sum(len(one.rejected) for one in rounds) == table.rows["all"]["rejected"]
    items = read_lines(tmp_path / "run" / "iterations" / "001" / "items.jsonl")
    assert {"question", "answer", "truth", "correct", "skill"} <= items[0].keys()
    shown = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    for name in ("1_skill_tree", "2_allocation", "3_accuracy", "4_rejected"):
        look(tmp_path / "run" / "pictures" / f"{name}.png", colours=0)
    assert "The skill tree" in shown
    assert (tmp_path / "run" / "student" / "model.safetensors").exists()


@pytest.mark.parametrize("environment", ["open_ended", "skill_tree"])
def test_a_stopped_run_goes_on_from_its_last_whole_round(tmp_path: Path, environment: str) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    config = replace(tiny, environment=environment)  # type: ignore[arg-type]
    data_env.main(replace(config, output=str(whole)))
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "student")
    (stopped / "result.json").unlink()
    last = read_iterations(stopped / "iterations")[-1]
    path = stopped / "iterations" / f"{last.number:03d}" / "data.jsonl"
    path.write_text(path.read_text(encoding="utf-8")[:-15], encoding="utf-8")
    with pytest.warns(UserWarning, match="was cut off"):
        data_env.main(replace(config, output=str(stopped), resume=True))
    assert digest(whole / "student" / "model.safetensors") == digest(stopped / "student" / "model.safetensors")
    assert read_iterations(whole / "iterations") == read_iterations(stopped / "iterations")


def test_an_agent_without_state_sees_nothing_and_checks_nothing_of_the_student(tmp_path: Path) -> None:
    for agent, seen in (("with_state", True), ("no_state", False), ("random", False)):
        config = replace(tiny, agent=agent, output=str(tmp_path / agent))  # type: ignore[arg-type]
        task = make_task(config)
        questions = draw_questions(config.exam, task, seed=0)
        student = make_task_student(config, task, questions, teach, tmp_path / "school")
        environment, _ = make_world(config, task, student, questions, None)
        assert environment.episode.reject_known is seen
        assert environment.episode.blind is not seen


def test_no_question_is_a_test_item_and_a_validation_item(tmp_path: Path) -> None:
    config = Config()
    questions = draw_questions(config.exam, make_task(config), seed=0)
    validation = {item.instruction for item in questions.validation}
    assert not validation & {item.instruction for item in questions.test}
    assert min(Counter(item.skill for item in questions.test).values()) >= 200


def test_school_gives_few_items_of_what_is_to_stay_weak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learned: list[Counter[str]] = []

    def learn(self: object, data: list, folder: Path) -> None:
        learned.append(Counter(datum.subskill for datum in data))

    monkeypatch.setattr(TaskStudent, "learn", learn)
    config = Config(skills=("reversal",))
    task = make_task(config)
    questions = draw_questions(config.exam, task, seed=0)
    pretrain(config.school, task, questions, teach, tmp_path / "school", seed=0)
    assert config.school.few - 5 <= learned[0]["four_digits"] <= config.school.few
    assert config.school.few - 5 <= learned[0]["five_digits"] <= config.school.few
    assert learned[0]["three_digits"] > 1000  # some of these are in the exam, and left out


def test_the_control_exchanges_answers_within_each_subskill() -> None:
    task = make_task(Config())
    data = [task.datum(item) for item in task.items(60, seed=3)]
    wrong = shuffled(data, 0)
    assert [one.instruction for one in wrong] == [one.instruction for one in data]
    for name in {one.subskill for one in data}:
        before, after = ([one.response for one in rows if one.subskill == name] for rows in (data, wrong))
        assert sorted(before) == sorted(after)
        assert sum(a == b for a, b in zip(before, after)) <= 2


def test_data_with_images_come_back_from_the_disk() -> None:
    task = Figures()
    for datum in (task.datum(item) for item in task.items(3, seed=1)):
        back = datum_from(json.loads(json.dumps(datum_json(datum))))
        assert back == datum
        assert (back.image == datum.image).all()


def test_a_missing_key_is_said_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        data_env.main(replace(paper, output=str(tmp_path / "paper")))
    assert command(["run", "data_env", "--paper", "--output", str(tmp_path / "paper")]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_the_paper_s_settings() -> None:
    assert paper.student.startswith("lora:")
    assert "gemma-2-2b-it" in paper.student
    assert (paper.training.epochs, paper.training.learning_rate, paper.training.batch_size) == (3, 1e-4, 16)
    assert (paper.training.schedule, paper.training.warmup) == ("cosine", 0.1)
    assert paper.items == 120


def test_a_teacher_that_writes_nothing_is_reported_as_it_is(tmp_path: Path) -> None:
    config = replace(
        tiny,
        teacher=ChatSettings(model="echo"),
        least=0.0,
        episode=Episode(budget=8, rounds=1),
        output=str(tmp_path / "run"),
    )
    with pytest.warns(UserWarning, match="not taught again"):
        table = data_env.main(config)
    assert table.rows["all"]["items"] == 0
    assert table.rows["all"]["rejected"] > 0
    assert any("the call failed" in note for note in table.notes)


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(UserError, match="asks a language model"):
        Config(policy="accumulate")
    with pytest.raises(UserError, match="a student that sees"):
        Config(task="visual", student="lora:rank=8,base=smollm2")
    with pytest.raises(UserError, match="needs a base"):
        Config(student="lora:rank=8")
    with pytest.raises(UserError, match="items is 0"):
        Config(items=0)
    for wrong in ({"test": 0}, {"validation": 0}, {"answer_length": 0}):
        with pytest.raises(UserError, match="must be 1 or more"):
            Exam(**wrong)
    with pytest.raises(UserError, match="school.items is 0"):
        School(items=0)


def test_weak_subskills_are_those_that_there_are() -> None:
    check_weak(School(), make_task(Config(task="code")))
    with pytest.raises(UserError, match="no subskill 'three_digit'"):
        data_env.main(replace(tiny, school=School(weak=("reversal/three_digit",)), output="out"))


def test_an_exam_leaves_half_of_a_small_subskill_to_be_taught() -> None:
    task = make_task(Config(skills=("multiplication/tables",)))
    with pytest.warns(UserWarning, match="The exam asks only 32 of multiplication/tables"):
        questions = draw_questions(Exam(), task, seed=0)
    asked = [*questions.validation, *questions.test]
    assert len({item.instruction for item in asked}) == len(asked) == 32
    assert len(questions.validation) == 7
    assert len(leaks(task.items(64, seed=5), asked)) < 40


def test_answers_are_read_to_their_end() -> None:
    task = make_task(Config(student="lora:rank=8,base=smollm2"))
    items, tokenizer = task.items(60, seed=1), small_student(seed=0).tokenizer
    with pytest.raises(UserError, match="exam.answer_length is 12, and right answers take up to"):
        answer_length(Exam(answer_length=12), task, items, tokenizer)
    length = answer_length(Exam(), task, items, tokenizer)
    assert task.score(items, [task.datum(item).response[:length] for item in items]) == [True] * len(items)


def test_language_models_are_asked_in_words(tmp_path: Path) -> None:
    TaskStudent(small_student(seed=0), make_task(Config()), Training(steps=1), teach).save(tmp_path / "small", card={})
    forms = {
        student: vars(make_task(Config(student=student)))["form"]
        for student in ("small", "smollm2", str(tmp_path / "small"))
    }
    assert list(forms.values()) == ["compact", "worded", "compact"]


def test_the_pool_that_a_teacher_is_shown_holds_no_question_of_the_exam(tmp_path: Path) -> None:
    config = Config(skills=("subtraction/one_digit",), output=str(tmp_path))
    task = make_task(config)
    with pytest.warns(UserWarning, match="The exam asks only"):
        questions = draw_questions(config.exam, task, seed=0)
    student = TaskStudent(small_student(seed=0), task, config.training, teach)
    _, act = make_world(config, task, student, questions, None)
    pool = inspect.getclosurevars(act).nonlocals["writes"].pool
    assert pool
    assert not leaks(pool, [*questions.validation, *questions.test])


@pytest.mark.parametrize("task", ["math", "code", "visual"])
def test_each_task_has_skills_by_default(task):
    assert make_task(Config(task=task)).items(4, seed=0)


def discovering(request: Request) -> str:
    """A language model that finds two skills, by the length of a question, and writes sums for one subskill of each."""
    text, fields = request.messages[-1]["content"], request.schema["properties"]
    if "action" in fields:
        return json.dumps({"reasoning": "", "action": "explore", "new_subskills": 1, "items_each": 4})
    if "subskills" in fields:
        return json.dumps({"subskills": ["sums"]})
    if "categories" in fields:
        names = ["a_question", "a_reversal"]
        return json.dumps({"categories": [{"name": f"all of {name}", "skills": [name]} for name in names]})
    if "skill" in fields:
        question = text.rpartition("Question: ")[2]
        name = "a_reversal" if len(question) % 2 else "a_question"
        return json.dumps({"reason": "", "skill": f"all of {name}" if "from this list" in text else name})
    number = random.Random(text + str(request.seed)).randint(100, 999)
    items = [{"index": i, "problem": f"What is {number} + {i}?", "answer": str(number + i)} for i in range(4)]
    hypotheses = [{"weak_subskill": "sums", "items": items}]
    return json.dumps({"hypotheses": hypotheses} if "hypotheses" in fields else {"items": items})


@pytest.mark.parametrize(
    ("environment", "policy"),
    [
        ("open_ended", "proportional"),
        ("skill_list", "proportional"),
        ("skill_tree", "proportional"),
        ("skill_tree", "train_retrain"),
    ],
)
def test_skills_are_discovered_by_the_teacher_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: str, policy: str
) -> None:
    asked: list[str] = []

    def answer(request: Request) -> str:
        asked.append(request.messages[-1]["content"])
        return discovering(request)

    monkeypatch.setattr(data_env, "open_chat", lambda settings: Chat(Scripted(answer)))
    config = replace(
        tiny,
        skills=("discovered",),
        environment=environment,  # type: ignore[arg-type]
        policy=policy,  # type: ignore[arg-type]
        teacher=ChatSettings(model="scripted"),
        school=replace(tiny.school, weak=School().weak),
        exam=Exam(validation=8, test=8),
        episode=Episode(budget=8, rounds=1, reject_known=False),
        hypotheses=1,
        items=4,
        output=str(tmp_path / "run"),
    )
    table = data_env.main(config)
    skills = json.loads((tmp_path / "run" / "skills.json").read_text(encoding="utf-8"))
    assert set(skills["categories"]) == {"all of a_question", "all of a_reversal"}
    assert set(table.rows) == {"all of a_question", "all of a_reversal", "all"}
    items = read_lines(tmp_path / "run" / "iterations" / "000" / "items.jsonl")
    assert {item["skill"] for item in items} == set(skills["categories"])
    assert table.rows["all"]["items"] > 0
    if environment == "skill_tree":  # every item was written for a subskill that the teacher proposed
        written = [datum for one in read_iterations(tmp_path / "run" / "iterations") for datum in one.data]
        assert {datum.skill for datum in written} <= set(skills["categories"])
        assert {datum.subskill for datum in written} == {"sums"}
    asked.clear()
    data_env.main(replace(config, resume=True))
    assert not [text for text in asked if "Name the one skill" in text or "Choose the category" in text]


@pytest.mark.parametrize("skills", [("discovered",), ("discovered", "units")])
def test_skills_are_not_discovered_without_a_language_model_or_beside_others(skills: tuple[str, ...]) -> None:
    teacher = ChatSettings(model="scripted" if len(skills) > 1 else "symbolic")
    with pytest.raises(UserError, match="discovered by a language model, in all items"):
        Config(skills=skills, teacher=teacher)
