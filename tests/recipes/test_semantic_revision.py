"""What is semantic revision's own: its three terms, each alone; f_sub, in the run and not in the student; its door."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from preceptor.chunks import plain_phrases
from preceptor.correction import Correction
from preceptor.data import Sequence, collate
from preceptor.errors import UserError
from preceptor.knowledge import LogitTargets
from preceptor.lessons import Lessons, Text
from preceptor.losses.clipped import Clipping
from preceptor.memory import memory_needed
from preceptor.models import LanguageModel
from preceptor.own_samples import OwnSamples
from preceptor.phrased import Reader
from preceptor.recipes.semantic_revision import TRAINING, Config, Weights, main, paper, start, teach, terms
from preceptor.teacher import FrozenTeacher
from preceptor.training import Training
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
    learner, said = small(tokenizer, student), small(tokenizer, teacher)
    config = replace(config, output=str(folder), text=TEXT)
    run = start(config, learner, said)
    needs = config.weights.divergence or config.weights.spans
    lessons = Lessons(sequences(tokenizer), sequences(tokenizer, 4), [])
    teach(run, Reader(learner, plain_phrases), FrozenTeacher(said) if needs else None, lessons, config)
    return learner


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(checkpoint):
    """All tensors of a checkpoint."""
    return {name: value for file in checkpoint.glob("*.safetensors") for name, value in load_file(file).items()}


def test_the_objective_is_the_sum_of_its_three_terms(tokenizer):
    """Means over tokens and over pairs, unit weights, from both models' dense distributions in float64."""
    student, teacher = small(tokenizer, 1), small(tokenizer, 2)
    reader = Reader(student, plain_phrases)
    marked = [reader.lesson(one, given=n != 1) for n, one in enumerate(sequences(tokenizer, 5))]
    batch = reader.collate(marked)
    mask = batch.text.predicts
    config = Config(clipping=OFF)
    tokens, found = int(mask.sum()), len(batch.pairs)
    assert found
    with torch.no_grad():
        loss, _ = student(batch.text, terms(config, FrozenTeacher(teacher)(batch.text), batch, None, tokens / found))
        z = student.causal(batch.text.input_ids).logits.double()[mask]
        log_q = z.log_softmax(-1)
        log_p = teacher.causal(batch.text.input_ids).logits.double()[mask].log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    labels = batch.labels[mask]
    entropy = torch.nn.functional.cross_entropy(z, labels, reduction="sum") / tokens
    p, q = log_p.exp(), log_q.exp()
    spans = [(p[i] * p[i + 1] - q[i] * q[i + 1]).norm() for i in batch.pairs.tolist()]
    expected = float(divergence + entropy + sum(spans) / len(spans))
    assert float(loss.sum / loss.count) == pytest.approx(expected, rel=1e-5)
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
def test_everything_together_runs_in_each_mode_and_says_what_it_did(tmp_path, tokenizer, clipping):
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


def test_a_resumed_run_ends_as_one_that_was_never_stopped(tmp_path, tokenizer):
    """Bit by bit: student, f_sub, its optimizer, the replay buffer and the draws."""
    config = Config(own=OwnSamples(share=0.5), training=replace(SHORT, save_every=3))
    whole = taught(tmp_path / "whole", tokenizer, config)

    folder, asked = tmp_path / "halved", 0
    halved = replace(config, output=str(folder), text=TEXT)
    lessons = Lessons(sequences(tokenizer), sequences(tokenizer, 4), [])
    learner, said = small(tokenizer, 1), FrozenTeacher(small(tokenizer, 2))
    run = start(halved, learner, learner)

    def tires(batch):
        nonlocal asked
        asked += 1
        if asked > 9:
            raise InterruptedError
        return said(batch)

    with pytest.raises(InterruptedError):
        teach(run, Reader(learner, plain_phrases), tires, lessons, halved)
    again = small(tokenizer, 7)
    run = start(replace(halved, resume=True), again, again)
    assert 0 < run.step < 6
    teach(run, Reader(again, plain_phrases), said, lessons, halved)
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), again.parameters(), strict=True))
    files = [weights(max((run / "checkpoints").iterdir())) for run in (tmp_path / "whole", folder)]
    names = [name for name in files[0] if name.startswith("f_sub")]
    assert len(names) > 4
    assert all(torch.equal(files[0][name], files[1][name]) for name in names)


def test_a_step_without_a_span_has_none_of_its_loss(tmp_path, tokenizer):
    def nothing(text):
        return []

    student, said = small(tokenizer, 1), small(tokenizer, 2)
    config = Config(own=OwnSamples(), training=replace(SHORT, steps=2), output=str(tmp_path / "run"), text=TEXT)
    run = start(config, student, said)
    lessons = Lessons(sequences(tokenizer), sequences(tokenizer, 4), [])
    teach(run, Reader(student, nothing), FrozenTeacher(said), lessons, config)
    assert [line["span"] for line in lines(tmp_path / "run")] == [0.0, 0.0]


def test_accumulation_changes_nothing(tokenizer):
    """The span term is a mean over the pairs of the step, whatever its micro-batches."""
    student, said = small(tokenizer, 1), FrozenTeacher(small(tokenizer, 2))
    reader, config = Reader(student, plain_phrases), Config(clipping=OFF)
    marked = [reader.lesson(one, given=True) for one in sequences(tokenizer, 6)]
    parts = [reader.collate(marked), reader.collate(marked[:2]), reader.collate(marked[2:])]
    share = int(parts[0].text.predicts.sum()) / len(parts[0].pairs)
    with torch.no_grad():
        sums = [float(student(part.text, terms(config, said(part.text), part, None, share))[0].sum) for part in parts]
    assert sums[0] == pytest.approx(sums[1] + sums[2], rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"own": OwnSamples(adaptive=True)}, r"training\.evaluate_every"),
        ({"training": replace(TRAINING, shard=True)}, r"training\.shard to False"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, says):
    with pytest.raises(UserError, match=says):
        Config(**settings)


def test_weights_that_leave_nothing_are_refused():
    with pytest.raises(UserError, match="one of them above 0"):
        Weights(0.0, 0.0, 0.0)
    with pytest.raises(UserError, match="0 or more"):
        Weights(-1.0)


def test_a_missing_chunker_is_said_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("preceptor.chunks.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="textblob"):
        main(Config(teacher="nowhere", output=str(tmp_path / "run")))


def test_another_vocabulary_is_refused(tokenizer):
    student = small(tokenizer, 1)
    reader = Reader(student, plain_phrases)
    batch = reader.collate([reader.lesson(one, given=True) for one in sequences(tokenizer, 2)])
    other = LogitTargets(torch.zeros(*batch.text.input_ids.shape, 100))
    for weights in (Weights(0.0, 1.0, 0.0), Weights(0.0, 0.0, 1.0)):
        with pytest.raises(UserError, match="vocabulary has 100 entries"):
            student(
                batch.text, terms(Config(weights=weights, clipping=Clipping(mode="fixed")), other, batch, None, 1.0)
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


def test_the_papers_settings_start(tmp_path, tokenizer):
    """The same classes at a tiny width, the replay schedule, 512 tokens and all."""
    for name, layers, width in (("teacher", 2, 16), ("student", 1, 8)):
        torch.manual_seed(layers)
        config = GPT2Config(
            vocab_size=49152, n_embd=width, n_layer=layers, n_head=2, n_positions=512, eos_token_id=2, bos_token_id=1
        )
        LanguageModel(GPT2LMHeadModel(config), tokenizer).save(tmp_path / name)
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
        training=replace(paper.training, epochs=None, steps=2, batch_size=4, evaluate_every=1),
    )
    assert main(config) is not None
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2]


def test_the_doctor_estimates_its_memory(tmp_path, tokenizer):
    for name, layers in (("teacher", 2), ("student", 1)):
        config = GPT2Config(vocab_size=49152, n_embd=16, n_layer=layers, n_head=2, eos_token_id=2, bos_token_id=1)
        LanguageModel(GPT2LMHeadModel(config), tokenizer).save(tmp_path / name)
    need = memory_needed(str(tmp_path / "teacher"), str(tmp_path / "student"), batch=4, length=64)
    assert need.total > need.parts["student"] > 0


def test_own_samples_are_not_labels(tokenizer):
    student = small(tokenizer, 1)
    reader = Reader(student, None)
    batch = reader.collate([reader.lesson(one, given=False) for one in sequences(tokenizer, 3)])
    assert (batch.labels == -100).all()
    assert torch.equal(batch.text.labels, collate(sequences(tokenizer, 3), student.pad_id).labels)
