"""GKD: its objective, its special cases, its teachers, the settings that it refuses."""

import json
from dataclasses import replace

import pytest
import torch

from preceptor import cli
from preceptor.data.sequences import Sequence, collate
from preceptor.distillation.lessons import Lessons, Text
from preceptor.distillation.objective import Objective
from preceptor.distillation.on_policy import OwnSamples
from preceptor.distillation.teachers import FrozenTeacher, MemoisedTeacher
from preceptor.engine.run import Run
from preceptor.engine.settings import Training
from preceptor.errors import UserError
from preceptor.evaluation.language import LABELS_ONLY
from preceptor.knowledge import HiddenTargets
from preceptor.methods.gkd.recipe import Config, main, teach
from preceptor.methods.gkd.reproduction import ShuffledRows
from preceptor.models.language_model import LanguageModel
from preceptor.models.loading import load
from tests.drawings import look
from tests.small_llama import small_llama

TRAINING = Training(steps=12, batch_size=4, learning_rate=3e-3, schedule="constant")


def small(tokenizer, seed, layers=2):
    return LanguageModel(small_llama(seed, layers), tokenizer)


def sequences(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = int(torch.randint(6, 12, (), generator=generator))
        ids = torch.randint(3, 40, (length,), generator=generator).tolist()
        made.append(Sequence(tuple(ids), tuple(place >= 3 for place in range(length))))
    return made


def run(tmp_path, tokenizer, config, teacher=None, seed=1):
    student = small(tokenizer, seed)
    lessons = Lessons(sequences(16), sequences(4, seed=9), [])
    engine = Run(config.training, student=student, folder=tmp_path / "run", config=config)
    teach(engine, student, teacher, lessons, config)
    return student


def on_disk(tmp_path, tokenizer, count, config):
    """The config with a small teacher and text of ``count`` examples, both saved in ``tmp_path``."""
    small(tokenizer, 2).save(tmp_path / "teacher")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Say {n}.", "completion": f"{n}!"}) + "\n" for n in range(count)))
    text = replace(config.text, source=str(data))
    return replace(config, teacher=str(tmp_path / "teacher"), teacher_dtype="float32", text=text)


def dense(student, teacher, batch):
    """The forward KL of one batch, summed, written out in float64."""
    total = 0.0
    p = teacher.causal(batch.input_ids).logits.double().log_softmax(-1)
    q = student.causal(batch.input_ids).logits.double().log_softmax(-1)
    for row in range(len(batch)):
        for place in range(batch.input_ids.shape[1] - 1):
            if batch.response[row, place + 1]:
                total += float((p[row, place].exp() * (p[row, place] - q[row, place])).sum())
    return total


def test_the_objective_is_the_mean_over_response_tokens(tokenizer):
    student, teacher = small(tokenizer, 1), small(tokenizer, 2)
    batch = collate(sequences(5), pad_id=2)
    loss = student(batch, Objective().against(FrozenTeacher(teacher)(batch), batch))
    assert float(loss.sum.detach()) == pytest.approx(dense(student, teacher, batch), rel=1e-4)
    assert int(loss.count) == int(batch.response[:, 1:].sum())


def test_a_student_like_its_teacher_has_nothing_to_learn(tokenizer):
    student, teacher = small(tokenizer, 2), small(tokenizer, 2)
    batch = collate(sequences(5), pad_id=2)
    for kind in ("forward_kl", "reverse_kl", "jensen_shannon", "skew_kl", "skew_reverse_kl", "total_variation"):
        loss = student(batch, Objective(divergence=kind).against(FrozenTeacher(teacher)(batch), batch))
        assert abs(float(loss.sum)) < 1e-4


def test_teaching_brings_the_student_closer_and_leaves_the_teacher_alone(tmp_path, tokenizer):
    teacher = small(tokenizer, 2)
    before = [parameter.clone() for parameter in teacher.parameters()]
    batch = collate(sequences(16), pad_id=2)
    student = run(tmp_path, tokenizer, Config(training=TRAINING), FrozenTeacher(teacher))
    assert dense(student, teacher, batch) < 0.9 * dense(small(tokenizer, 1), teacher, batch)
    assert all(torch.equal(old, new) for old, new in zip(before, teacher.parameters(), strict=True))


def test_weight_zero_teaches_by_labels_alone(tmp_path, tokenizer):
    config = Config(training=TRAINING, objective=Objective(weight=0.0, label_weight=1.0))
    student = run(tmp_path, tokenizer, config)
    batch = collate(sequences(16), pad_id=2)

    def loss(model):
        logits = model.causal(batch.input_ids).logits
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten()))

    assert loss(student) < loss(small(tokenizer, 1))


def test_share_zero_is_plain_distillation_and_share_one_is_not(tmp_path, tokenizer):
    teacher = FrozenTeacher(small(tokenizer, 2))
    text = Text(answer_length=4, max_length=16)
    plain, again, own = (
        run(tmp_path / name, tokenizer, Config(training=TRAINING, text=text, own=OwnSamples(share=share)), teacher)
        for name, share in (("a", 0.0), ("b", 0.0), ("c", 1.0))
    )
    states = [model.state_dict() for model in (plain, again, own)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_the_adaptive_schedule_sees_the_held_out_loss(tmp_path, tokenizer):
    config = Config(own=OwnSamples(adaptive=True), training=replace(TRAINING, evaluate_every=3))
    run(tmp_path, tokenizer, config, FrozenTeacher(small(tokenizer, 2)))
    seen = [line for line in lines(tmp_path) if "held_out_loss" in line]
    assert len(seen) == 4
    assert seen[-1]["held_out_loss"] < seen[0]["held_out_loss"]
    assert [line["own_share"] for line in seen] == [0.0] * 4


def test_a_memoised_teacher_repeats_the_teacher_and_the_control_does_not(tokenizer):
    teacher, read = small(tokenizer, 2), sequences(6)
    memoised, batch = MemoisedTeacher(FrozenTeacher(teacher), read), collate(read[2:5], pad_id=2)
    live: HiddenTargets = FrozenTeacher(teacher)(batch)
    assert torch.allclose(memoised(batch).hidden, live.hidden[batch.predicts], atol=1e-5)
    torch.manual_seed(0)
    shuffled = ShuffledRows(memoised)(batch).hidden
    assert not torch.allclose(shuffled, memoised(batch).hidden, atol=1e-3)
    assert torch.allclose(shuffled.sum(0), memoised(batch).hidden.sum(0), atol=1e-4)


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(UserError, match="own samples"):
        Config(cache="somewhere", own=OwnSamples(share=0.5))
    with pytest.raises(UserError, match=r"training\.evaluate_every"):
        Config(own=OwnSamples(adaptive=True))


def test_own_samples_are_no_labels(tmp_path, tokenizer):
    """The cross-entropy counts given answers only, and labels alone with own samples are refused."""
    text = Text(answer_length=4, max_length=16)
    for share in (0.0, 1.0):
        config = Config(
            training=replace(TRAINING, steps=2),
            text=text,
            own=OwnSamples(share=share),
            objective=Objective(label_weight=1.0),
        )
        run(tmp_path / str(share), tokenizer, config, FrozenTeacher(small(tokenizer, 2)))
        seen = [line["cross_entropy"] for line in lines(tmp_path / str(share))]
        assert all(value == 0.0 for value in seen) == (share == 1.0)
    with pytest.raises(UserError, match=r"set own\.share to 0"):
        Config(own=OwnSamples(share=1.0), objective=Objective(weight=0.0, label_weight=1.0))


@pytest.mark.slow
def test_a_cache_of_the_lessons_teaches_as_the_teacher_does(tmp_path, tokenizer, capsys):
    """The error names the command that captures what is missing; after that command the run goes through."""
    config = Config(
        student="teacher:layers=1", text=Text(held_out=4), output=str(tmp_path / "online"), training=TRAINING
    )
    config = on_disk(tmp_path, tokenizer, 40, config)
    main(config)
    folder = str(tmp_path / "cache")
    words = ["cache", "--data", config.text.source, "--output", folder, "--teacher", config.teacher, "--sample", "64"]
    assert cli.main([*words, "--limit", "30", "--tolerance", "1e-7"]) == 0
    cached = replace(config, output=str(tmp_path / "cached"), cache=folder)
    with pytest.raises(UserError, match="is of the teacher .*teacher, not of smollm2: name that one"):
        main(replace(cached, teacher="smollm2"))
    with pytest.raises(UserError, match="of the lessons are not in the cache.*preceptor cache --data") as missing:
        main(cached)
    command = str(missing.value).split("`")[1].split()[1:]
    assert cli.main([*command, "--teacher", config.teacher]) == 0
    main(replace(cached, resume=True))
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("online", "cached")
    ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)


@pytest.mark.slow
def test_a_lora_student_is_taught_by_its_own_base(tmp_path, tokenizer):
    """Its divergence from the teacher is 0 until labels have moved it, and the base stays as it was."""
    learned = Objective(label_weight=0.5)
    config = Config(student="lora:rank=2", text=Text(held_out=2), objective=learned, training=TRAINING)
    table = main(on_disk(tmp_path, tokenizer, 8, replace(config, output=str(tmp_path / "run"))))
    seen = lines(tmp_path)
    assert abs(seen[0]["divergence"]) < 1e-6
    assert seen[-1]["divergence"] > 1e-6
    assert seen[-1]["cross_entropy"] < seen[0]["cross_entropy"]
    assert table is not None
    base, merged = load(str(tmp_path / "teacher")), load(str(tmp_path / "run" / "student"))
    assert torch.equal(base.head.weight, merged.head.weight)  # the head carries no adapter
    first = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(base.causal.state_dict()[first], merged.causal.state_dict()[first])


WATCHED = replace(TRAINING, steps=30, evaluate_every=2)


@pytest.mark.parametrize("watch", [True, False])
def test_a_watched_run_logs_where_it_left_its_power_law(tmp_path, tokenizer, monkeypatch, watch):
    """The held-out loss is replaced by a power law that is left from step 20 on; an unwatched run logs nothing."""
    losses = (step**-0.5 * (2 if step >= 20 else 1 + step % 4 / 1000) for step in range(2, 31, 2))
    monkeypatch.setattr("preceptor.methods.gkd.recipe.held_out_loss", lambda *_, **__: next(losses))
    config = Config(training=WATCHED, watch_hacking=watch, output=str(tmp_path / "run"))
    watcher, _ = watched(tmp_path, tokenizer, config)
    assert watcher.verdict.flagged == 20
    assert marked(tmp_path) == ([(24, 20), (26, 20), (28, 20), (30, 20)] if watch else [])


def test_a_run_that_turns_out_too_short_has_no_verdict(tmp_path, tokenizer):
    training = replace(WATCHED, steps=None, epochs=2.0)
    config = Config(training=training, watch_hacking=True, output=str(tmp_path / "run"))
    watcher, _ = watched(tmp_path, tokenizer, config)
    assert watcher.verdict.reason.startswith("insufficient data")
    assert [step for step, _ in watcher.points] == [2, 4, 6, 8]
    assert not marked(tmp_path)


def test_a_run_too_short_to_be_watched_is_refused():
    with pytest.raises(UserError, match="needs 9 evaluations after the warm-up, and this run has 4"):
        Config(training=replace(WATCHED, steps=8), watch_hacking=True)


@pytest.mark.slow
def test_a_watched_run_with_a_labels_arm_goes_through_and_prints_its_verdict(tmp_path, tokenizer, capsys):
    config = Config(
        student="teacher:layers=1",
        text=Text(held_out=2, answer_length=4),
        labels_arm=True,
        watch_hacking=True,
        output=str(tmp_path / "run"),
        training=replace(TRAINING, steps=18, evaluate_every=2),
    )
    config = on_disk(tmp_path, tokenizer, 12, config)
    table = main(config)
    assert table is not None
    assert LABELS_ONLY in table.columns
    printed = capsys.readouterr().out
    assert "its power law" in printed
    look(tmp_path / "run" / "pictures" / "hacking.png", colours=1)
    main(replace(config, resume=True))
    assert next(line for line in printed.splitlines() if "power law" in line) in capsys.readouterr().out


def test_the_watch_of_a_stopped_run_goes_on(tmp_path, tokenizer, monkeypatch):
    config = Config(training=replace(WATCHED, steps=20, save_every=5), watch_hacking=True)
    whole, _ = watched(tmp_path / "whole", tokenizer, config)
    log, calls = Run.log, iter(range(5))

    def stop(self, **values):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        log(self, **values)

    monkeypatch.setattr(Run, "log", stop)
    with pytest.raises(KeyboardInterrupt):
        watched(tmp_path / "stopped", tokenizer, config)
    monkeypatch.setattr(Run, "log", log)
    again, _ = watched(tmp_path / "stopped", tokenizer, replace(config, resume=True))
    assert again.points == whole.points


def watched(tmp_path, tokenizer, config):
    student, lessons = small(tokenizer, 1), Lessons(sequences(16), sequences(4, seed=9), [])
    teacher = FrozenTeacher(small(tokenizer, 0))
    engine = Run(config.training, student=student, folder=tmp_path / "run", config=config, resume=config.resume)
    return teach(engine, student, teacher, lessons, config), engine


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]


def marked(tmp_path):
    return [(line["step"], line["left_power_law_at"]) for line in lines(tmp_path) if "left_power_law_at" in line]


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--training.schedule", "constant"],
        ["--training.evaluate-every", "5"],
        ["--training.schedule", "constant", "--training.evaluate-every", "5", "--objective.label-weight", "1"],
    ],
)
def test_a_watch_without_a_constant_rate_or_checkpoints_is_refused(words, capsys):
    assert cli.main(["run", "gkd", "--watch-hacking", *words]) == 2
    printed = capsys.readouterr().err
    assert "training.schedule" in printed
    assert printed.count("\n") == 1


@pytest.mark.slow
def test_text_that_cannot_be_read_leaves_no_run_behind(tmp_path, capsys):
    output, words = tmp_path / "run", ["run", "gkd", "--tiny", "--output", str(tmp_path / "run")]
    assert cli.main([*words, "--text.source", str(tmp_path / "missing.jsonl")]) == 2
    assert "There is no data at" in capsys.readouterr().err
    assert not (output / "config.json").exists()
    (tmp_path / "lines.jsonl").write_text('{"prompt": "2 + 2?", "completion": "4"}\n' * 3 + '{"question": 1}\n')
    assert cli.main([*words, "--text.source", str(tmp_path / "lines.jsonl")]) == 2
    assert not (output / "config.json").exists()
