"""Semantic revision: its three terms, each alone; f_sub, in the run and not in the student; refused settings."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from preceptor.data.sequences import Sequence, collate
from preceptor.distillation.lessons import Lessons, Text
from preceptor.distillation.on_policy import OnPolicyMixer, OwnSamples
from preceptor.distillation.teachers import FrozenTeacher
from preceptor.engine.run import NonFiniteLoss
from preceptor.engine.settings import Training
from preceptor.errors import UserError
from preceptor.knowledge import LogitTargets
from preceptor.losses.dac_kl import Clipping
from preceptor.methods.semantic_revision.correction import Correction, correct
from preceptor.methods.semantic_revision.phrases import phrase_marker, plain_phrases
from preceptor.methods.semantic_revision.recipe import (
    TRAINING,
    Config,
    Weights,
    loss_of_exam,
    main,
    paper,
    teach,
    terms,
)
from preceptor.methods.semantic_revision.scales import Scales
from preceptor.methods.semantic_revision.student_run import start
from preceptor.models.language_model import LanguageModel
from preceptor.models.loading import load
from preceptor.models.memory import memory_needed
from tests.small_llama import small_llama

SHORT = Training(steps=6, batch_size=4, learning_rate=3e-3, schedule="constant")
TEXT = Text(answer_length=6, max_length=24)
OFF = Clipping(mode="off")


def small(tokenizer, seed, layers=2):
    return LanguageModel(small_llama(seed, layers), tokenizer)


def sequences(tokenizer, count=12):
    """Prompts and answers of words."""
    text = " the old dog sleeps under a green table in our small garden while rain falls"
    words = [" " + word for word in text[1:].split(" ")]
    made = []
    for n in range(count):
        prompt = tokenizer(f"Tell {n}:")["input_ids"]
        answer = tokenizer("".join(words[n % 5 : n % 5 + 6]))["input_ids"]
        made.append(Sequence((*prompt, *answer), (False,) * len(prompt) + (True,) * len(answer)))
    return made


def taught(folder, tokenizer, config, *, student=1, teacher=2):
    learner, model = small(tokenizer, student), small(tokenizer, teacher)
    config = replace(config, output=str(folder), text=TEXT)
    run = start(config, learner, model)
    needs = config.weights.divergence or config.weights.spans
    lessons = Lessons(sequences(tokenizer), sequences(tokenizer, 4), [])
    teach(run, phrase_marker(learner, plain_phrases), FrozenTeacher(model) if needs else None, lessons, config)
    return learner


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(checkpoint):
    """All tensors of a checkpoint."""
    return {name: value for file in checkpoint.glob("*.safetensors") for name, value in load_file(file).items()}


def test_the_objective_is_the_sum_of_its_three_terms(tokenizer):
    """Means over tokens, given tokens and pairs, unit weights, from both models' dense distributions in float64."""
    student, teacher = small(tokenizer, 1), small(tokenizer, 2)
    marker = phrase_marker(student, plain_phrases)
    read = sequences(tokenizer, 5)
    marked = marker.mark(read, given=[one for n, one in enumerate(read) if n != 1])
    batch = marker.collate(marked)
    mask = batch.text.predicts
    config = Config(clipping=OFF)
    tokens, found, given = int(mask.sum()), len(batch.pairs), int((batch.labels >= 0).sum())
    assert found
    scales = Scales(tokens / given, tokens / found)
    with torch.no_grad():
        loss, _ = student(batch.text, terms(config, FrozenTeacher(teacher)(batch.text), batch, None, scales))
        z = student.causal(batch.text.input_ids).logits.double()[mask]
        log_q = z.log_softmax(-1)
        log_p = teacher.causal(batch.text.input_ids).logits.double()[mask].log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    labels = batch.labels[mask]
    entropy = torch.nn.functional.cross_entropy(z, labels)
    p, q = log_p.exp(), log_q.exp()
    spans = [(p[i] * p[i + 1] - q[i] * q[i + 1]).norm() for i in batch.pairs.tolist()]
    expected = float(divergence + entropy + sum(spans) / len(spans))
    assert float(loss.sum / loss.count) == pytest.approx(expected, rel=1e-5)
    assert float(loss.parts["cross_entropy"] / loss.count) == pytest.approx(float(entropy), rel=1e-5)
    assert int((labels == -100).sum()) == sum(marked[1].sequence.response)


@pytest.mark.parametrize(
    ("terms_of", "part"),
    [
        (Weights(divergence=0.0, spans=0.0), "cross_entropy"),
        (Weights(labels=0.0, spans=0.0), "divergence"),
        (Weights(labels=0.0, divergence=0.0), "span"),
    ],
)
def test_each_term_alone_is_learned(tmp_path, tokenizer, terms_of, part):
    config = Config(weights=terms_of, own=OwnSamples(), training=replace(SHORT, steps=12))
    taught(tmp_path / "run", tokenizer, config)
    seen = [line[part] for line in lines(tmp_path / "run")]
    assert seen[-1] < seen[0]


@pytest.mark.parametrize("clipping", [Clipping(), Clipping(mode="fixed", upper=0.9), OFF])
def test_everything_together_runs_in_each_mode_and_logs_its_measures(tmp_path, tokenizer, clipping):
    config = Config(clipping=clipping, own=OwnSamples(share=1.0), correction=Correction(rounds=2), training=SHORT)
    taught(tmp_path / "run", tokenizer, config)
    line = lines(tmp_path / "run")[-1]
    assert line["corrections"] > 0
    assert 0 <= line["no_candidate"] <= 1
    assert line["cross_entropy"] == 0.0
    if clipping.mode == "off":
        assert "kept_mass" not in line
        return
    assert 0 <= line["divergence"] <= line["kl"]
    assert 0 < line["kept_mass"] <= 1
    assert 0 < line["lower"] < line["upper"] < 1
    assert line["kept_classes"] >= 1
    assert 0 <= line["span_share"] <= 1
    assert ("f_sub_guard" in line) == (clipping.mode == "learned")


def test_f_sub_learns_and_is_not_in_the_student(tmp_path, tokenizer):
    config = Config(own=OwnSamples(), training=replace(SHORT, save_every=3))
    student = taught(tmp_path / "run", tokenizer, config)
    kept = sorted((tmp_path / "run" / "checkpoints").iterdir())
    states = [weights(folder) for folder in kept]
    f_sub = [{name: value for name, value in state.items() if name.startswith("f_sub")} for state in states]
    assert "f_sub.first.weight" in f_sub[0]
    assert not torch.equal(f_sub[0]["f_sub.first.weight"], f_sub[-1]["f_sub.first.weight"])
    student.save(tmp_path / "student")
    assert not [name for name in load_file(tmp_path / "student" / "model.safetensors") if "f_sub" in name]


def rises(own, loss):
    """In place of ``OnPolicyMixer.see``: the share of own samples is a half from the first evaluation on."""
    own.threshold = 0.5


@pytest.mark.slow
def test_a_resumed_run_ends_as_one_that_was_never_stopped(tmp_path, tokenizer, monkeypatch):
    """Bit by bit: student, f_sub, its optimizer, the replay buffer and the draws."""
    monkeypatch.setattr(OnPolicyMixer, "see", rises)
    training = replace(SHORT, steps=9, save_every=3, evaluate_every=1)
    config = Config(own=OwnSamples(adaptive=True), training=training)
    whole = taught(tmp_path / "whole", tokenizer, config)

    folder, asked = tmp_path / "halved", 0
    halved = replace(config, output=str(folder), text=TEXT)
    lessons = Lessons(sequences(tokenizer), sequences(tokenizer, 4), [])
    learner, teacher = small(tokenizer, 1), FrozenTeacher(small(tokenizer, 2))
    run = start(halved, learner, learner)

    def tires(batch):
        nonlocal asked
        asked += 1
        if asked > 16:
            raise InterruptedError
        return teacher(batch)

    with pytest.raises(InterruptedError):
        teach(run, phrase_marker(learner, plain_phrases), tires, lessons, halved)
    again = small(tokenizer, 7)
    run = start(replace(halved, resume=True), again, again)
    assert 0 < run.step < 9
    monkeypatch.setattr(OnPolicyMixer, "load_state_dict", seen_by(OnPolicyMixer.load_state_dict, taken_up := []))
    teach(run, phrase_marker(again, plain_phrases), teacher, lessons, halved)
    assert taken_up[0].buffer
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), again.parameters(), strict=True))
    files = [weights(max((run / "checkpoints").iterdir())) for run in (tmp_path / "whole", folder)]
    names = [name for name in files[0] if name.startswith("f_sub")]
    assert len(names) > 4
    assert all(torch.equal(files[0][name], files[1][name]) for name in names)


def seen_by(method, things):
    """The method, which first puts the things that it is called on into a list."""

    def seen(self, *args):
        things.append(self)
        return method(self, *args)

    return seen


def test_the_replay_buffer_holds_corrected_samples(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(OnPolicyMixer, "see", rises)
    found = []

    def corrects(*words, **settings):
        found.append(correct(*words, **settings))
        return found[-1]

    monkeypatch.setattr("preceptor.methods.semantic_revision.correction_log.correct", corrects)
    monkeypatch.setattr(OnPolicyMixer, "state_dict", seen_by(OnPolicyMixer.state_dict, kept := []))
    config = Config(own=OwnSamples(adaptive=True), training=replace(SHORT, evaluate_every=1))
    taught(tmp_path / "run", tokenizer, config)
    corrected = [sequence for done in found for sequence in done.sequences]
    assert corrected
    assert kept[-1].buffer == corrected
    assert [line["own_share"] for line in lines(tmp_path / "run")] == [0.5] * 6


def test_a_step_without_a_span_has_none_of_its_loss(tmp_path, tokenizer):
    def nothing(text):
        return []

    student, teacher = small(tokenizer, 1), small(tokenizer, 2)
    config = Config(own=OwnSamples(), training=replace(SHORT, steps=2), output=str(tmp_path / "run"), text=TEXT)
    run = start(config, student, teacher)
    lessons = Lessons(sequences(tokenizer), sequences(tokenizer, 4), [])
    teach(run, phrase_marker(student, nothing), FrozenTeacher(teacher), lessons, config)
    assert [line["span"] for line in lines(tmp_path / "run")] == [0.0, 0.0]


def test_accumulation_changes_nothing(tmp_path, tokenizer):
    """The terms are means over the tokens, given tokens and pairs of the step, whatever its micro-batches."""
    seen = []
    for accumulate in (1, 3):
        config = Config(own=OwnSamples(share=0.5), training=replace(SHORT, steps=3, accumulate=accumulate))
        taught(tmp_path / str(accumulate), tokenizer, config)
        seen.append(lines(tmp_path / str(accumulate)))
    names = ("loss", "divergence", "cross_entropy", "span", "gradient_norm", "f_sub_loss")
    for one, other in zip(*seen, strict=True):
        assert all(one[name] == pytest.approx(other[name], rel=1e-3) for name in names)


def test_terms_are_logged_as_means_whatever_the_share(tmp_path, tokenizer):
    """Nothing is learned: at half the share the cross-entropy of given answers is what it is at none."""
    found = {}
    for share in (0.0, 0.5):
        training = replace(SHORT, learning_rate=1e-9, steps=12)
        config = Config(own=OwnSamples(share=share), training=training, clipping=OFF, correction=Correction(rounds=0))
        taught(tmp_path / str(share), tokenizer, config)
        found[share] = [line["cross_entropy"] for line in lines(tmp_path / str(share)) if line["cross_entropy"]]
    low, high = min(found[0.0]), max(found[0.0])
    assert all(0.9 * low < value < 1.1 * high for value in found[0.5])


def test_the_span_is_a_mean_over_pairs(tmp_path, tokenizer):
    training = replace(SHORT, learning_rate=1e-9, steps=1, batch_size=12)
    config = Config(weights=Weights(0.0, 0.0, 1.0), own=OwnSamples(), training=training)
    student, teacher = taught(tmp_path / "run", tokenizer, config), small(tokenizer, 2)
    marker = phrase_marker(student, plain_phrases)
    read = sequences(tokenizer)
    batch = marker.collate(marker.mark(read, given=read))
    with torch.no_grad():
        p, q = (
            model.causal(batch.text.input_ids).logits[batch.text.predicts].softmax(-1) for model in (teacher, student)
        )
    spans = [(p[i] * p[i + 1] - q[i] * q[i + 1]).norm() for i in batch.pairs.tolist()]
    assert lines(tmp_path / "run")[0]["loss"] == pytest.approx(float(sum(spans) / len(spans)), rel=1e-3)


@pytest.mark.parametrize("weights_of", [Weights(), Weights(labels=0.5, divergence=2.0, spans=0.0)])
def test_the_held_out_loss_has_the_whole_divergence(tmp_path, tokenizer, weights_of):
    """It does not move with f_sub, which shapes the loss that is minimised."""
    config = Config(weights=weights_of, own=OwnSamples(), training=SHORT, output=str(tmp_path / "run"), text=TEXT)
    student, teacher, exam = small(tokenizer, 1), FrozenTeacher(small(tokenizer, 2)), sequences(tokenizer, 4)
    run, marker = start(config, student, small(tokenizer, 2)), phrase_marker(student, plain_phrases)
    first = loss_of_exam(run, teacher, exam, marker, config)
    with torch.no_grad():
        for parameter in run.modules["f_sub"].parameters():
            parameter.fill_(0.3)
    assert loss_of_exam(run, teacher, exam, marker, config) == pytest.approx(first, abs=1e-5)
    plain = loss_of_exam(run, teacher, exam, marker, replace(config, clipping=OFF))
    assert first == pytest.approx(plain, abs=1e-4)
    labels = replace(config, weights=Weights(1.0, 0.0, 0.0))
    batch = collate(exam, student.pad_id)
    with torch.no_grad():
        logits = student.causal(batch.input_ids).logits[batch.predicts]
    expected = float(torch.nn.functional.cross_entropy(logits, batch.labels[batch.predicts]))
    assert loss_of_exam(run, None, exam, marker, labels) == pytest.approx(expected, rel=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run_before_f_sub_has_moved(tmp_path, tokenizer):
    config = Config(own=OwnSamples(), training=SHORT, output=str(tmp_path / "run"), text=TEXT)
    student, teacher = small(tokenizer, 1), small(tokenizer, 2)
    run = start(config, student, teacher)
    before = [parameter.clone() for parameter in run.modules["f_sub"].parameters()]
    with torch.no_grad():
        student.head.weight[0, 0] = torch.nan
    lessons = Lessons(sequences(tokenizer), sequences(tokenizer, 4), [])
    with pytest.raises(NonFiniteLoss, match="The student's loss is nan at step 1"):
        teach(run, phrase_marker(student, plain_phrases), FrozenTeacher(teacher), lessons, config)
    assert all(torch.equal(old, new) for old, new in zip(before, run.modules["f_sub"].parameters(), strict=True))


def test_a_student_taught_in_half_precision_is_evaluated_in_full(tmp_path, tokenizer):
    """In memory its outputs are those of the saved and loaded student, bit by bit."""
    config = Config(own=OwnSamples(share=0.5), training=replace(SHORT, precision="bf16"))
    student = taught(tmp_path / "run", tokenizer, config).eval()
    student.save(tmp_path / "student")
    batch = collate(sequences(tokenizer), student.pad_id)
    with torch.no_grad():
        assert torch.equal(student(batch), load(str(tmp_path / "student"))(batch))


def test_a_float32_teacher_chooses_in_float32_while_the_student_learns_in_bf16(tmp_path, tokenizer):
    seen = []
    teacher = FrozenTeacher(small(tokenizer, 2))

    def observed(batch):
        seen.append(torch.is_autocast_enabled("cpu"))
        return teacher(batch)

    config = Config(own=OwnSamples(share=1.0), training=replace(SHORT, steps=2, precision="bf16"), text=TEXT)
    student, config = small(tokenizer, 1), replace(config, output=str(tmp_path / "run"))
    lessons = Lessons(sequences(tokenizer), sequences(tokenizer, 4), [])
    teach(start(config, student, student), phrase_marker(student, plain_phrases), observed, lessons, config)
    assert len(seen) == 4
    assert not any(seen)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"own": OwnSamples(adaptive=True)}, r"training\.evaluate_every"),
        ({"training": replace(TRAINING, shard=True)}, r"training\.shard to False"),
        ({"weights": Weights(divergence=0.0, spans=0.0)}, r"set own\.share to 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, says):
    with pytest.raises(UserError, match=says):
        Config(**settings)


def test_weights_that_leave_nothing_are_refused():
    with pytest.raises(UserError, match="one of them above 0"):
        Weights(0.0, 0.0, 0.0)
    for wrong in (-1.0, math.nan, math.inf):
        with pytest.raises(UserError, match="0 or more"):
            Weights(wrong)


def test_a_missing_chunker_is_reported_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("preceptor.methods.semantic_revision.phrases.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="textblob"):
        main(Config(teacher="nowhere", output=str(tmp_path / "run")))


def test_another_vocabulary_is_refused(tokenizer):
    student = small(tokenizer, 1)
    marker = phrase_marker(student, plain_phrases)
    read = sequences(tokenizer, 2)
    batch = marker.collate(marker.mark(read, given=read))
    other = LogitTargets(torch.zeros(*batch.text.input_ids.shape, 100))
    for weights in (Weights(0.0, 1.0, 0.0), Weights(0.0, 0.0, 1.0)):
        with pytest.raises(UserError, match="vocabulary has 100 entries"):
            student(
                batch.text,
                terms(Config(weights=weights, clipping=Clipping(mode="fixed")), other, batch, None, Scales(1.0, 1.0)),
            )


def test_a_lora_student_is_taught_by_its_own_base(tmp_path, tokenizer):
    """Its KL is 0 until labels have moved it, and its samples are corrected by the base."""
    small(tokenizer, 2).save(tmp_path / "teacher")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Say {n}.", "completion": f"{n}!"}) + "\n" for n in range(12)))
    config = Config(
        teacher=str(tmp_path / "teacher"),
        student="lora:rank=2",
        teacher_dtype="float32",
        text=Text(source=str(data), held_out=2, answer_length=6),
        chunker="plain",
        output=str(tmp_path / "run"),
        training=SHORT,
    )
    assert main(config) is not None
    seen = lines(tmp_path / "run")
    assert abs(seen[0]["kl"]) < 1e-5
    assert seen[-1]["kl"] > 1e-6


def test_the_papers_settings_start(tmp_path, tokenizer, monkeypatch):
    """The same classes at a tiny width, the replay schedule, 512 tokens and all."""
    for name, layers, width in (("teacher", 2, 16), ("student", 1, 8)):
        torch.manual_seed(layers)
        config = GPT2Config(
            vocab_size=49152, n_embd=width, n_layer=layers, n_head=2, n_positions=512, eos_token_id=2, bos_token_id=1
        )
        LanguageModel(GPT2LMHeadModel(config), tokenizer).save(tmp_path / name)
    monkeypatch.setattr(OnPolicyMixer, "see", rises)
    monkeypatch.setattr(OnPolicyMixer, "state_dict", seen_by(OnPolicyMixer.state_dict, kept := []))
    monkeypatch.setattr("preceptor.distillation.on_policy.BUFFER", 2)
    data = tmp_path / "data.jsonl"
    record = {"messages": [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "The old dog."}]}
    data.write_text("".join(json.dumps(record).replace("it.", f"{n}.") + "\n" for n in range(24)))
    config = replace(
        paper,
        teacher=str(tmp_path / "teacher"),
        student=str(tmp_path / "student"),
        chunker="plain",
        own=replace(paper.own),
        text=replace(paper.text, source=str(data), held_out=8, answer_length=6),
        output=str(tmp_path / "run"),
        training=replace(paper.training, epochs=None, steps=4, batch_size=4, evaluate_every=1),
    )
    assert main(config) is not None
    seen = lines(tmp_path / "run")
    assert [line["step"] for line in seen] == [1, 2, 3, 4]
    assert any("corrections" in line for line in seen)
    assert len(kept[-1].buffer) == 2


def test_the_doctor_estimates_its_memory(tmp_path, tokenizer):
    for name, layers in (("teacher", 2), ("student", 1)):
        config = GPT2Config(vocab_size=49152, n_embd=16, n_layer=layers, n_head=2, eos_token_id=2, bos_token_id=1)
        LanguageModel(GPT2LMHeadModel(config), tokenizer).save(tmp_path / name)
    need = memory_needed(str(tmp_path / "teacher"), str(tmp_path / "student"), batch=4, length=64)
    assert need.total > need.parts["student"] > 0


def test_own_samples_are_not_labels(tokenizer):
    student = small(tokenizer, 1)
    marker = phrase_marker(student, None)
    read = sequences(tokenizer, 3)
    batch = marker.collate(marker.mark(read, given=[]))
    assert (batch.labels == -100).all()
    assert torch.equal(batch.text.labels, collate(sequences(tokenizer, 3), student.pad_id).labels)
