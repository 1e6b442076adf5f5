"""What is MiniLM's own: its run end to end, its doors, its assistant, causal models, and what it leaves alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, LlamaConfig

from preceptor.data.sequences import Sequence, collate
from preceptor.engine.run import Run
from preceptor.engine.settings import Training
from preceptor.errors import UserError
from preceptor.evaluation.probing import random_pairs
from preceptor.methods.minilm import recipe as minilm, reproduction as experiment
from preceptor.methods.minilm.attention_reader import AttentionTeacher, SelfAttention, pair_up
from preceptor.methods.minilm.encoders import load_body
from preceptor.methods.minilm.recipe import Config, main, measure, objective, teach, tiny
from preceptor.methods.minilm.sentence_study import SentenceExam, Study
from preceptor.methods.minilm.texts import Texts
from preceptor.models.loading import load

WORDS = "the teacher shows how a row of scores becomes weights and the student learns to give these too"
TRAINING = Training(steps=6, batch_size=8, learning_rate=2e-3, schedule="constant")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A random BERT of 3 layers and 4 heads with the embedded encoder's tokenizer, saved to a folder."""
    _, tokenizer = load_body("minilm-l6")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    model = AutoModel.from_config(BertConfig(vocab_size=30522, initializer_range=0.5, **sizes))
    folder = tmp_path_factory.mktemp("teacher")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def config(teacher, tmp_path):
    lines = [" ".join(WORDS.split()[i % 7 : i % 7 + 5 + i % 9]) + f" {i}" for i in range(60)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return Config(
        teacher=teacher,
        student="fresh:layers=2,hidden=16,heads=4",
        data=str(tmp_path / "text.jsonl"),
        held_out=10,
        max_length=24,
        output=str(tmp_path / "run"),
        training=TRAINING,
    )


def sequences(count, seed=0, size=90):
    source = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 9, (count,), generator=source).tolist()
    return [Sequence(tuple(torch.randint(5, size, (n,), generator=source).tolist()), (True,) * n) for n in lengths]


def llama(seed, layers=2, hidden=32, spread=0.3):
    torch.manual_seed(seed)
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 48}
    return AutoModel.from_config(LlamaConfig(vocab_size=100, num_key_value_heads=2, initializer_range=spread, **sizes))


def test_tiny_teaches_on_real_text_and_ships_a_model_that_loads(tmp_path):
    """The embedded teacher and sentences; both relations fall; all files of a run are there."""
    table = main(replace(tiny, output=str(tmp_path / "run")))
    for row in table.rows.values():
        assert row["taught"] < row["untaught"]
        assert row["taught"] < row["uniform"]
    there = {path.name for path in (tmp_path / "run").iterdir()}
    assert there >= {"config.json", "environment.json", "metrics.jsonl", "result.json", "report.html", "student"}
    model = AutoModel.from_pretrained(tmp_path / "run" / "student")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "student")
    told = model(**tokenizer("A student that loads.", return_tensors="pt")).last_hidden_state
    assert told.shape[-1] == 192
    assert "AutoModel.from_pretrained" in (tmp_path / "run" / "student" / "README.md").read_text()


def test_the_same_seed_gives_the_same_student_and_a_resumed_run_too(config, tmp_path):
    states = []
    for name in ("one", "two"):
        main(replace(config, output=str(tmp_path / name)))
        states.append(AutoModel.from_pretrained(tmp_path / name / "student").state_dict())
    main(replace(config, output=str(tmp_path / "two"), resume=True))
    states.append(AutoModel.from_pretrained(tmp_path / "two" / "student").state_dict())
    for other in states[1:]:
        assert all(torch.equal(states[0][name], other[name]) for name in states[0])


def test_what_the_loss_cannot_reach_stays_as_it_was_and_the_teacher_too(config, tmp_path):
    decayed = replace(config, training=replace(TRAINING, weight_decay=0.5))
    body, tokenizer = load_body(config.teacher)
    before = {name: value.clone() for name, value in body.state_dict().items()}
    student = minilm.start(decayed, body, tokenizer)
    fresh = {name: value.clone() for name, value in student.model.state_dict().items()}
    teacher = AttentionTeacher(SelfAttention(body))
    texts = minilm.prepare(decayed, teacher.teacher, tokenizer)
    run = Run(decayed.training, student=student, folder=tmp_path / "run", config=decayed)
    teach(run, decayed, teacher, student, texts)
    kept = {name for name, value in student.model.state_dict().items() if torch.equal(value, fresh[name])}
    above = ("attention.output.", "intermediate.", "output.")
    expected = {name for name in fresh if name.startswith(tuple(f"encoder.layer.1.{part}" for part in above))}
    expected |= {name for name in fresh if name.startswith("pooler.")}
    untouched = {"encoder.layer.1.attention.self.key.bias", "encoder.layer.0.attention.self.key.bias"}
    assert expected <= kept <= expected | untouched
    assert all(torch.equal(value, before[name]) for name, value in body.state_dict().items())


@pytest.mark.parametrize("heads", [0, 2])
def test_causal_and_grouped_models_learn(heads, tmp_path):
    config = Config(relation_heads=heads, training=replace(TRAINING, steps=60), output=str(tmp_path / "run"))
    student = SelfAttention(llama(1, hidden=16, spread=0.05))
    teacher = AttentionTeacher(SelfAttention(llama(0, layers=3)))
    texts = Texts(sequences(32), sequences(32), 0)

    def targets(batch):
        return teacher(batch, scored=not heads)

    before = measure(config, targets, student, texts)
    teach(
        Run(config.training, student=student, folder=tmp_path / "run", config=config), config, targets, student, texts
    )
    after = measure(config, targets, student, texts)
    for name in ("query", "key", "value") if heads else ("attention", "value"):
        assert after[name] < 0.9 * before[name]
        assert after[name] < after[f"{name} uniform"]


@pytest.mark.parametrize("kind", ["minilm-l6", "llama"])
def test_a_copy_of_the_teacher_has_nothing_to_learn(kind):
    body = load_body("minilm-l6")[0] if kind == "minilm-l6" else llama(0).eval()
    model = SelfAttention(body)
    batch = collate(sequences(4), 0)
    told = model(batch.input_ids, batch.attention_mask)
    loss = objective(Config(), told, told, batch, causal=model.causal)
    assert loss.sum.abs() <= 1e-6
    longer = collate([*sequences(4), Sequence(tuple(range(5, 30)), (True,) * 25)], 0)
    padded = model(longer.input_ids, longer.attention_mask)
    other = SelfAttention(llama(1).eval() if kind == "llama" else load_body("minilm-l6")[0], 1)
    first = objective(Config(), other(batch.input_ids, batch.attention_mask), told, batch, causal=model.causal)
    rest = objective(Config(), other(longer.input_ids, longer.attention_mask), padded, longer, causal=model.causal)
    alone = collate([longer.sequences()[-1]], 0)
    last = objective(
        Config(),
        other(alone.input_ids, alone.attention_mask),
        model(alone.input_ids, alone.attention_mask),
        alone,
        causal=model.causal,
    )
    assert first.sum > 0.01
    assert (first.sum + last.sum).item() == pytest.approx(rest.sum.item(), rel=1e-5)


def test_an_assistant_is_taught_first_and_teaches(config):
    table = main(replace(config, assistant="fresh:layers=3,hidden=16,heads=4"))
    folder = Path(config.output)
    assert (folder / "assistant" / "student" / "model.safetensors").exists()
    assert AutoModel.from_pretrained(folder / "assistant" / "student").config.num_hidden_layers == 3
    assert AutoModel.from_pretrained(folder / "student").config.num_hidden_layers == 2
    assert set(table.rows) == {"attention relation", "value relation"}


@pytest.mark.parametrize(("precision", "apart"), [("fp32", 1e-6), ("bf16", 2e-3)])
def test_relation_heads_and_a_lower_teacher_layer(config, precision, apart):
    other = replace(config, student="fresh:layers=2,hidden=16,heads=2", relation_heads=8, teacher_layer=2)
    table = main(replace(other, training=replace(TRAINING, evaluate_every=3, precision=precision)))
    assert set(table.rows) == {"query relation", "key relation", "value relation"}
    lines = [json.loads(line) for line in (Path(other.output) / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "held_out_query" in line] == [3, 6]
    taught = table.rows["query relation"]["taught"]  # in the student's own precision, not in that of the training
    assert lines[-1]["held_out_query"] == pytest.approx(taught, rel=apart)
    assert lines[2]["held_out_query"] != pytest.approx(taught, rel=apart)


def test_a_remembering_teacher_says_the_same_and_the_control_what_belongs_to_another():
    reader = SelfAttention(llama(0).eval())
    texts = sequences(12)
    batch = collate(texts, 0)
    plain, kept = AttentionTeacher(reader), AttentionTeacher(reader, remember=True)
    for _ in range(2):
        for name in ("query", "key", "value"):
            mine, theirs = getattr(plain(batch), name), getattr(kept(batch), name)
            real = batch.attention_mask[:, None, :, None]
            torch.testing.assert_close(mine * real, theirs * real)
    partners = pair_up(texts)
    assert all(len(ids) == len(partner) for ids, partner in partners.items())
    assert sum(ids != partner for ids, partner in partners.items()) >= 8
    swapped = collate([Sequence(partners[one.ids], one.response) for one in texts], 0)
    control = kept.confused(partners)
    torch.testing.assert_close(control(batch).value * real, plain(swapped).value * real)


def test_bad_settings_are_refused_before_a_folder_is_made(config, tmp_path):
    load("smollm2").tokenizer.save_pretrained(tmp_path / "other")
    llama(0).save_pretrained(tmp_path / "other")
    refused = {
        "student has 2 attention heads and the teacher 4.*relation_heads": {
            "student": "fresh:layers=2,hidden=16,heads=2"
        },
        "3 relation heads do not divide.*choose one of 1, 2, 4, 8, 16": {"relation_heads": 3},
        "tokenizers of teacher and student differ: token 0": {"student": str(tmp_path / "other")},
        "Layer 7 is not one of the model's 3": {"teacher_layer": 7},
        "without layers or hidden": {"student": "fresh:layers=2"},
        "does not fit: hidden must be a multiple": {"student": "fresh:layers=2,hidden=17,heads=4"},
        "max_length is 600": {"max_length": 600},
        "60 texts are held out": {"held_out": 60},
        "give 2 weights": {"weights": (1.0, 1.0, 1.0)},
        "sharded": {"training": replace(TRAINING, shard=True)},
        "1 attention heads": {
            "assistant": "fresh:layers=2,hidden=16,heads=4",
            "student": "fresh:layers=2,hidden=16,heads=1",
        },
    }
    for sentence, change in refused.items():
        with pytest.raises(UserError, match=sentence):
            main(replace(config, **change))
        assert not Path(config.output).exists(), sentence


def test_a_folder_of_another_run_is_left_alone(config):
    main(config)
    before = (Path(config.output) / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="--resume"):
        main(config)
    with pytest.raises(UserError, match="max_length"):
        main(replace(config, max_length=16, resume=True))
    assert (Path(config.output) / "metrics.jsonl").read_bytes() == before


@pytest.fixture
def study(teacher):
    """The arms' study in small: a random teacher of 12 heads, a few texts."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 12, "intermediate_size": 32}
    body = AutoModel.from_config(BertConfig(vocab_size=30522, initializer_range=0.5, **sizes)).eval()
    texts = Texts(sequences(24, size=200), sequences(12, seed=1, size=200), 0)
    exam = SentenceExam(texts.exam, torch.randn(12, 4), random_pairs(20, 12), texts.exam, ["one", "two"] * 6)
    knows = AttentionTeacher(SelfAttention(body), remember=True)
    tokenizer = load_body(teacher)[1]
    return Study(body, tokenizer, knows, knows.confused(pair_up(texts.lessons)), texts, exam)


@pytest.mark.slow
def test_the_reproduction_keeps_its_arms_and_goes_on(study, tmp_path, monkeypatch):
    def short(study, seed, path, *, steps):
        return one_seed(study, seed, path, steps=4)

    one_seed = experiment.one_seed
    monkeypatch.setattr(experiment, "make_study", lambda name, **sizes: study)
    monkeypatch.setattr(experiment, "one_seed", short)
    table = experiment.reproduce(1, tmp_path / "there", full=False)
    assert set(table.rows) == {"uniform", *experiment.ARMS}
    assert table.rows["full"]["L_AT"].mean != table.rows["untaught"]["L_AT"].mean
    assert table.rows["value only"]["loss left"].mean < 100
    refused = [claim for claim in table.claims if "refuses" in claim.text]
    assert refused[0].holds
    assert not table.holds, "one seed has no standard error, so no comparison can hold"
    assert not list((tmp_path / "there").rglob("*.safetensors"))
    monkeypatch.setattr(experiment, "one_arm", None)
    again = experiment.reproduce(1, tmp_path / "there", full=False)
    assert again.json() == table.json()
