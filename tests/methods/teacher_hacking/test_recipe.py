"""What is teacher hacking's own: who wrote what is read, the exact control, resuming, its door, its settings."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from preceptor import cli
from preceptor.errors import UserError
from preceptor.methods.teacher_hacking import recipe as recipe
from preceptor.methods.teacher_hacking.answer_set import AnswerSet
from preceptor.methods.teacher_hacking.examination import sentence
from preceptor.methods.teacher_hacking.label import Label
from preceptor.methods.teacher_hacking.recipe import Config, main, paper, setup, start, teach, tiny
from preceptor.methods.teacher_hacking.reproduction import CONTROL, FIFTH, HALF, OFFLINE, arms
from preceptor.methods.teacher_hacking.stage_one import build
from preceptor.methods.teacher_hacking.text_models import answered
from preceptor.models.language_model import LanguageModel
from preceptor.models.loading import load
from preceptor.models.memory import memory_needed
from preceptor.models.student import make_student


def taught(tmp_path, name, **changes):
    config = replace(tiny, reverse=False, output=str(tmp_path / name), **changes)
    laboratory = build(tmp_path / name / "laboratory", setup(config), resume=False)
    return teach(start(config, laboratory.start), laboratory.start, laboratory, config), laboratory


class Writer:
    """Writes the number of the call, so that one can tell when an answer was written."""

    def __init__(self):
        self.calls, self.prompts = 0, []

    def answer(self, prompts, length):
        self.calls += 1
        self.prompts.append(list(prompts))
        return [answered(prompt, (self.calls,) * length) for prompt in prompts]


FIXED = [answered((place, place), (0, 0, 0)) for place in range(200)]


def test_offline_answers_never_change():
    answers, writer = AnswerSet(FIXED, 0.0), Writer()
    for number in range(3):
        answers.turn(number, writer, 3)
    assert answers.now is answers.fixed
    assert writer.calls == 0


def test_online_answers_are_new_in_every_pass_and_stay_for_the_pass():
    answers, writer = AnswerSet(FIXED, 1.0), Writer()
    for number in (0, 0, 1, 1, 2):
        answers.turn(number, writer, 3)
        assert [one.ids for one in answers.now] == [(*one.prompt, *(number + 1,) * 3) for one in FIXED]
    assert writer.calls == 3


def test_a_share_of_the_answers_is_new_and_drawn_again_in_every_pass():
    torch.manual_seed(0)
    answers, writer = AnswerSet(FIXED, 0.3), Writer()
    news = []
    for number in range(40):
        answers.turn(number, writer, 3)
        news.append([place for place, one in enumerate(answers.now) if one.ids[2] != 0])
        assert [answers.now[place].ids[2] for place in news[-1]] == [number + 1] * len(news[-1])
        assert writer.prompts[-1] == [FIXED[place].prompt for place in news[-1]]
    share = sum(map(len, news)) / 8000
    assert abs(share - 0.3) < 0.02
    assert len({tuple(places) for places in news}) == 40


def test_an_empty_new_answer_leaves_the_fixed_one():
    class Silent:
        def answer(self, prompts, length):
            return [answered(prompt, ()) for prompt in prompts]

    answers = AnswerSet(FIXED[:5], 1.0)
    answers.turn(0, Silent(), 3)
    assert answers.now == FIXED[:5]
    assert answers.empty == 5


def test_an_open_book_comes_back():
    torch.manual_seed(1)
    answers, again, writer = AnswerSet(FIXED, 0.5), AnswerSet(FIXED, 0.5), Writer()
    answers.turn(4, writer, 3)
    again.load_state_dict(json.loads(json.dumps(answers.state_dict())))
    assert again.now == answers.now
    again.turn(4, writer, 3)
    assert writer.calls == 1


@pytest.mark.filterwarnings("ignore:KL")
def test_with_the_oracle_as_teacher_both_metrics_are_one_at_every_step(tmp_path):
    course, _ = taught(tmp_path, "control", teacher="oracle", online=1.0)
    assert course.steps == [0, *range(2, 25, 2)]
    for golden, proxy in zip(course.golden, course.proxy):
        assert torch.equal(golden, proxy)
    assert course.golden[-1].mean() < course.golden[0].mean()


def test_the_student_is_taught_on_its_own_answers(tmp_path, monkeypatch):
    seen = []
    generate = LanguageModel.generate

    def watched(self, prompts, **settings):
        seen.append((self.width, len(prompts)))
        return generate(self, prompts, **settings)

    monkeypatch.setattr(LanguageModel, "generate", watched)
    course, laboratory = taught(tmp_path, "own", online=1.0, writer="student")
    passes = tiny.training.steps * tiny.training.batch_size // tiny.data.prompts
    widths = {"teacher": laboratory.teacher.model.width, "student": laboratory.start.width}
    assert seen == [(widths["teacher"], 8), (widths["teacher"], 16)] + [(widths["student"], 16)] * passes
    assert course.proxy[-1].mean() < course.proxy[0].mean()


def test_prompts_and_responses_make_the_size(tmp_path):
    data = replace(tiny.data, prompts=5, responses=3)
    course, laboratory = taught(tmp_path, "few", data=data, online=0.0)
    lines = [json.loads(line) for line in (tmp_path / "few" / "offline.jsonl").read_text().splitlines()]
    assert [tuple(line["prompt"]) for line in lines] == [prompt for prompt in laboratory.prompts for _ in range(3)]
    assert course.steps[-1] == 24


def test_a_stopped_run_goes_on_alike(tmp_path, monkeypatch):
    config = replace(tiny, training=replace(tiny.training, save_every=5), writer="student")
    main(replace(config, output=str(tmp_path / "whole")))

    def stop(*_, **values):
        if values["step"] == 14:
            raise KeyboardInterrupt
        return look(*_, **values)

    look = recipe.look
    monkeypatch.setattr(recipe, "look", stop)
    stopped = replace(config, output=str(tmp_path / "stopped"))
    with pytest.raises(KeyboardInterrupt):
        main(stopped)
    monkeypatch.setattr(recipe, "look", look)
    main(replace(stopped, resume=True))
    one, other = (load_file(tmp_path / name / "student" / "model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    results = [json.loads((tmp_path / name / "result.json").read_text())["table"] for name in ("whole", "stopped")]
    assert results[0] == results[1]


def test_what_it_leaves_to_look_at(tmp_path):
    table = main(replace(tiny, output=str(tmp_path / "run")))
    assert list(table.rows)[0] == "start"
    assert table.rows["end"]["proxy"].mean < table.rows["start"]["proxy"].mean
    assert {"reverse golden", "reverse proxy"} <= table.rows["end"].keys()
    page = (tmp_path / "run" / "report.html").read_text()
    assert "power law" in page
    pytest.importorskip("matplotlib")
    assert {path.name for path in (tmp_path / "run" / "pictures").glob("*.png")} == {"1_plane.png", "2_law.png"}


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (Label(40, 0.5, 0.1, -0.2, hacked=True, overfitted=False), "The teacher is hacked: golden rose by 0.5 ± 0.1"),
        (Label(40, 0.5, 0.1, 0.3, hacked=False, overfitted=True), "Overfitting, not hacking"),
        (Label(40, 0.1, 0.1, 0.0, hacked=False, overfitted=False), "No hacking: golden rose by 0.1"),
        (Label(40, 0.0, 0.0, 0.0, hacked=False, overfitted=False), "ends at its least value"),
    ],
)
def test_a_label_says_itself_in_a_sentence(label, said):
    assert said in sentence(label)


def test_the_arms_of_the_reproduction_read_as_much_in_as_many_steps():
    compared = arms(Config())
    offline = compared[OFFLINE]
    for name in (HALF, FIFTH):
        data = compared[name].data
        assert 0 <= offline.data.prompts - data.prompts * data.responses < data.responses
    steps = {name: config.training for name, config in compared.items() if name != CONTROL}
    assert set(steps.values()) == {offline.training}
    assert {config.writer for name, config in compared.items() if "student" in name} == {"student"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--online", "1.5"], "online is 1.5"),
        (["--data.prompts", "0"], "data.prompts is 0"),
        (["--data.responses", "0"], "data.responses is 0"),
        (["--oracle", "hmm:order=3"], "not a source"),
        (["--training.evaluate-every", "0"], "evaluate_every"),
        (["--objective.weight", "0", "--objective.label-weight", "1"], "nothing to hack"),
    ],
)
def test_the_door(words, said, capsys):
    assert cli.main(["run", "teacher_hacking", "--tiny", *words]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A folder with a tiny model of SmolLM2's architecture and tokenizer, which stands for language models by name."""
    folder = tmp_path_factory.mktemp("models") / "family"
    make_student("fresh:layers=2,hidden=24", load("smollm2", dtype="bfloat16"), seed=0).save(folder)
    return str(folder)


def shortened(config, family, source):
    """The settings of a large run with its classes and switches as they are, and sizes that take seconds."""
    return replace(
        config,
        oracle=family,
        data=replace(config.data, source=source, oracle=3, prompts=2, held_out=2, answer_length=4),
        teacher_training=replace(config.teacher_training, epochs=None, steps=1),
        student_training=replace(config.student_training, epochs=None, steps=1),
    )


@pytest.mark.filterwarnings("ignore:KL")
def test_an_oracle_language_model_answers_the_embedded_instructions(tmp_path, family):
    """The large setting on a laptop: copies of some of the oracle's layers learn from its answers."""
    config = replace(shortened(tiny, family, "prompts"), teacher="teacher:layers=2", student="teacher:layers=1")
    config = replace(config, data=replace(config.data, prompt_length=64), output=str(tmp_path / "run"))
    table = main(replace(config, training=replace(tiny.training, steps=2, batch_size=2, evaluate_every=1)))
    assert table.rows["end"]["golden"].mean > 0
    assert (tmp_path / "run" / "student" / "tokenizer.json").exists()


@pytest.mark.filterwarnings("ignore:KL")
def test_the_paper_settings_start(tmp_path, family):
    """``paper`` as it is, but for names, sizes and the number of steps; and the doctor estimates its memory."""
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"Post {number}: summarise it.", "completion": " TL;DR"} for number in range(9)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = replace(shortened(paper, family, str(prompts)), teacher=family, student=family)
    config = replace(config, training=replace(paper.training, steps=1), output=str(tmp_path / "run"))
    assert main(config) is not None
    need = memory_needed(family, family, batch=8, length=1024 + 128, precision="bf16")
    assert need.total > need.parts["activations"] > 0


def test_too_few_prompts_of_a_data_set_are_refused(tmp_path, family):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "One post.", "completion": "TL;DR"}\n')
    config = replace(shortened(paper, family, str(prompts)), teacher=family, student=family)
    with pytest.raises(UserError, match="There are 1 distinct prompts"):
        main(replace(config, output=str(tmp_path / "run")))
