"""MiniLM: the student copies the self-attention of one teacher layer, nothing else.

Paper: MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained Transformers (Wang et al.,
NeurIPS 2020), https://arxiv.org/abs/2002.10957
Reproduction: holds over 3 seeds, but value relations do not improve sentence vectors at its size
Command: ``preceptor run minilm --teacher minilm-l6 --student fresh:layers=3,hidden=192,heads=12``

With queries, keys and values of teacher layer L and of the student's last layer M, over A heads and the n tokens of a
sequence x, and each model's own head width d:

    L_AT = 1/(A n) Σ_a Σ_t KL( softmax(QKᵀ/√d) of the teacher ‖ that of the student )
    L_VR = 1/(A n) Σ_a Σ_t KL( softmax(VVᵀ/√d) of the teacher ‖ that of the student ),     L = L_AT + L_VR

There are no labels, no temperature and no projections: widths and depths may differ, tokens must not.

With ``relation_heads`` it is MiniLMv2 (https://arxiv.org/abs/2012.15828): Q-Q, K-K and V-V relations, weight 1 each,
over heads cut anew, so that head counts may differ too.

Decided here, where the sources differ or are silent:

* Padding: keys are masked before the softmax, query rows dropped, 1/(A n) taken for each sequence, then a mean over
  the sequences of the whole step (``average="token"``: one mean over its tokens).
* Causal models: attention and value relations share the causal mask. Queries and keys are taken after rotary embedding
  for L_AT, and before it for MiniLMv2. Grouped queries: keys are repeated for L_AT; L_VR is taken over the key and
  value heads.
* Nothing above the last layer's projections can learn from this loss. Those parameters (the layer's output projection
  and feed-forward part, later norms, the pooler) are frozen: without weight decay and without optimiser state, and data
  parallelism needs no search for unused parameters. The saved student holds them as they were initialised, so fine-tune
  it, or read its hidden state below the last layer.
* With ``assistant``, a teacher assistant is taught first and teaches the student (for students of at most half the
  teacher's layers and half its width).

The losses are in ``losses.relations``, the loop is ``learn``; the file is long because its reproduction has nine arms.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from preceptor.attention import AttentionTeacher, SelfAttention
from preceptor.data import Batch, Sequence, collate
from preceptor.encoders import Texts, load_body, make_body, read_texts, save_body, split_texts
from preceptor.errors import UserError
from preceptor.evaluation import write_result
from preceptor.folder import write_whole
from preceptor.losses import Loss, relations
from preceptor.losses.relations import Average, Projections
from preceptor.masked_language import MaskedLanguage, learn_words
from preceptor.models import tokenizer_hash
from preceptor.report import write_report
from preceptor.sentence_study import Study, make_study
from preceptor.table import Claim, Table, compare, mean_of
from preceptor.training import Run, Training

REQUIRES = "text"


@dataclass(frozen=True)
class Config:
    """Settings of one distillation."""

    teacher: str = "minilm-l6"
    """An encoder or a causal model: ``minilm-l6`` or ``smollm2`` (embedded), a folder or a hub name."""
    student: str = "fresh:layers=3,hidden=192,heads=12"
    """A fresh model of the teacher's kind (``fresh:layers=,hidden=[,heads=,kv_heads=,intermediate=]``), or a name."""
    assistant: str = ""
    """A teacher assistant, specified as a student is; empty: none."""
    teacher_layer: int = 0
    """L, counted from 1; 0 is the last."""
    relation_heads: int = 0
    """Relation heads of MiniLMv2; 0 is MiniLM, with the models' own heads, which must be equally many."""
    weights: tuple[float, ...] = ()
    """Weights of attention and value terms (MiniLM), or of query, key and value terms (MiniLMv2); empty: 1 each."""
    average: Average = "sequence"
    """What weighs the same: every sequence, or every token."""
    data: str = ""
    """A file, folder or hub data set of text; empty: sentences that the Python installation carries."""
    limit: int = 0
    """At most so many texts are read; 0 reads all."""
    held_out: int = 500
    """Texts kept apart for the evaluation."""
    max_length: int = 64
    """Tokens of a text; what is longer is cut."""
    dropout: float = 0.0
    """Dropout of a fresh student."""
    output: str = "runs/minilm/minilm-l6"
    """Folder of the run."""
    resume: bool = False
    """Go on with the run in ``output``."""
    training: Training = field(
        default_factory=lambda: Training(
            steps=1500, batch_size=32, learning_rate=5e-4, schedule="linear", warmup=0.1, weight_decay=0.01
        )
    )
    """Steps, optimizer, precision, seed."""


tiny = Config(
    limit=400, held_out=50, max_length=32, output="runs/minilm/tiny", training=replace(Config().training, steps=8)
)
paper = Config(
    teacher="google-bert/bert-base-uncased",
    student="fresh:layers=6,hidden=384,heads=12",
    data="wikimedia/wikipedia:20231101.en",
    max_length=512,
    dropout=0.1,
    output="runs/minilm/paper",
    training=Training(
        steps=400_000, batch_size=256, learning_rate=3e-4, schedule="linear", warmup=4000, weight_decay=0.01, clip=None
    ),
)

Teach = Callable[[Batch], Projections]


def objective(config: Config, student: Projections, teacher: Projections, batch: Batch, *, causal: bool) -> Loss:
    """MiniLM's loss, or MiniLMv2's where there are relation heads."""
    mask, average, heads = batch.attention_mask, config.average, config.relation_heads
    if not heads:
        weights = config.weights or (1.0, 1.0)
        return relations.attention_value_loss(student, teacher, mask, causal=causal, weights=weights, average=average)
    weights = config.weights or (1.0, 1.0, 1.0)
    return relations.relation_heads_loss(
        student, teacher, mask, relation_heads=heads, causal=causal, weights=weights, average=average
    )


def learn(run: Run, config: Config, teach: Teach, student: SelfAttention, texts: Texts) -> None:
    """The loop: the student learns the teacher's relations on the lessons; held-out terms are logged when due."""
    student.train()
    for batch in run.batches(texts.lessons, partial(collate, pad_id=texts.pad)):
        told = teach(batch)
        learned = run.student(batch.input_ids, batch.attention_mask, scored=not config.relation_heads)
        loss = objective(config, learned, told, batch, causal=student.causal)
        run.update(loss.sum, loss.count, loss.parts)
        if run.evaluate_due:
            run.log(**{f"held_out_{name}": value for name, value in measure(config, teach, student, texts).items()})
    run.finish()


@torch.no_grad()
def measure(config: Config, teach: Teach, student: SelfAttention, texts: Texts) -> dict[str, float]:
    """Each term's mean over held-out sequences, and as ``... uniform`` that of a student without any relation."""
    alike = replace(config, average="sequence")
    sums: dict[str, float] = {}
    mode = student.training
    student.eval()
    for start in range(0, len(texts.exam), 64):
        batch = collate(texts.exam[start : start + 64], texts.pad).to(next(student.parameters()).device)
        told = teach(batch)
        learned = student(batch.input_ids, batch.attention_mask, scored=not config.relation_heads)
        parts = objective(alike, learned, told, batch, causal=student.causal).parts
        for name, (x, y) in relations.relation_inputs(told, config.relation_heads).items():
            uniform = relations.uniform_reference(x, y, batch.attention_mask, causal=student.causal).sum()
            for label, figure in ((name, parts[name]), (f"{name} uniform", uniform)):
                sums[label] = sums.get(label, 0.0) + float(figure) / len(texts.exam)
    student.train(mode)
    return sums


def main(config: Config) -> Table:
    """Teach a student (after an assistant, where there is one), measure it, and write student, table and report.

    Raises:
        UserError: head counts, relation heads, tokenizers, lengths or weights that do not fit; the folder holds another
            run; there is too little text.
    """
    if config.training.shard:
        raise UserError("minilm reads inside a layer, which a sharded model forbids: set training.shard to False.")
    body, tokenizer = load_body(config.teacher)
    teacher = SelfAttention(body, config.teacher_layer)
    texts = prepare(config, teacher, tokenizer)
    if config.assistant:
        there = replace(config, student=config.assistant, assistant="", output=f"{config.output}/assistant")
        between = start(there, body, tokenizer)
        check_fit(config, AttentionTeacher(copy.deepcopy(between)), start(config, body, tokenizer), texts)
        teach_one(there, teacher, between, tokenizer, texts)
        teacher = between
    return teach_one(config, teacher, start(config, body, tokenizer), tokenizer, texts)


def prepare(config: Config, teacher: SelfAttention, tokenizer: Any) -> Texts:
    """The texts of a run; which of them are held out does not depend on the run's seed."""
    check_length(config, teacher)
    listed = read_texts(config.data, limit=config.limit)
    return split_texts(listed, tokenizer, max_length=config.max_length, held_out=config.held_out)


def start(config: Config, like: PreTrainedModel, tokenizer: Any) -> SelfAttention:
    """The student before its first step."""
    body = make_body(config.student, like, tokenizer, dropout=config.dropout, seed=config.training.seed)
    return SelfAttention(body)


def teach_one(config: Config, teacher: SelfAttention, student: SelfAttention, tokenizer: Any, texts: Texts) -> Table:
    """Teach one student, save it, and compare its held-out relations with those before."""
    folder, asked = Path(config.output), AttentionTeacher(teacher)
    check_fit(config, asked, student, texts)
    teach = partial(asked, scored=not config.relation_heads)
    untaught = copy.deepcopy(student)
    hashes = {"teacher": config.teacher, "tokenizer": tokenizer_hash(tokenizer), "text": config.data or "embedded"}
    run = Run(config.training, student=student, folder=folder, config=config, resume=config.resume, provenance=hashes)
    run.shard(teacher)
    before = measure(config, teach, untaught.to(run.device), texts)
    learn(run, config, teach, student, texts)
    table = compare_relations(config, before, measure(config, teach, student, texts))
    if run.is_main:
        card = {"teacher": config.teacher, "student": config.student, "method": "minilm", "layer taught": student.layer}
        save_body(folder / "student", student.model, tokenizer, card)
        falls = ", ".join(f"the {row} by {cells['fall']}" for row, cells in table.rows.items())
        write_result(folder, table, headline=f"The distance from the teacher's relations fell: {falls}.")
        table.print()
        print(f"The student: {folder / 'student'}\nThe page: {write_report(folder)}")
    return table


def check_length(config: Config, model: SelfAttention) -> None:
    """Refuse texts longer than a model has positions for."""
    longest = getattr(model.config, "max_position_embeddings", config.max_length)
    if not 2 <= config.max_length <= longest:
        raise UserError(
            f"max_length is {config.max_length}, and {model.config.model_type} takes 2 to {longest} tokens."
        )


def check_fit(config: Config, teacher: AttentionTeacher, student: SelfAttention, texts: Texts) -> None:
    """Find every mismatch of the two models at the door: two tokens through both, and the loss of them."""
    check_length(config, student)
    ids, scored = texts.exam[0].ids[:2], not config.relation_heads
    batch = collate([Sequence(ids, (True,) * len(ids))], texts.pad)
    with torch.no_grad():
        learned = student(batch.input_ids, batch.attention_mask, scored=scored)
        objective(config, learned, teacher(batch, scored=scored), batch, causal=student.causal)


def compare_relations(config: Config, before: dict[str, float], after: dict[str, float]) -> Table:
    """Held-out KL(teacher ‖ student) of each relation before and after, beside a student without any relation."""
    title = f"{config.student} taught by {config.assistant or config.teacher}"
    table = Table(title, ["uniform", "untaught", "taught", "fall"])
    for name in (name for name in after if not name.endswith(" uniform")):
        figures = {"uniform": after[f"{name} uniform"], "untaught": before[name], "taught": after[name]}
        table.rows[f"{name} relation"] = {**figures, "fall": f"{1 - after[name] / before[name]:.0%}"}
    table.units, table.better = dict.fromkeys(table.rows, "nat"), dict.fromkeys(table.rows, "lower")
    table.notes.append("KL(teacher ‖ student) a row, mean over heads, rows and held-out sequences.")
    return table


ARMS = {
    "untaught": "the student before its first step",
    "full": "attention and value relations",
    "attention only": "weights 1, 0",
    "value only": "weights 0, 1",
    "another sentence": "a control: the teacher reads another sentence of the same length",
    "masked LM": "no teacher: BERT's masked language modelling (its training loss is that of words), as many steps",
    **{f"A_r = {heads}": "MiniLMv2, a student of 6 heads, a quarter of the steps" for heads in (12, 24, 48)},
}
COLUMNS: dict[str, Literal["lower", "higher"]] = {
    **dict.fromkeys(("L_AT", "L_VR", "last training loss", "loss left"), "lower"),
    **dict.fromkeys(("rank agreement", "probe"), "higher"),
}


def reproduce(seeds: int, folder: Path, full: bool) -> Table:
    """A BERT of 3 layers of 192 learns the relations of all-MiniLM-L6-v2's last layer on 5,000 sentences in 400 steps.

    Arms learn one relation, both, those of another sentence, or masked language modelling; MiniLMv2 teaches a student
    of 6 heads. Each is measured by the relations of 1,000 held-out sentences, by how it ranks 1,000 pairs of them
    against the teacher's own sentence vectors, and by a linear probe that tells which of five parts of the Python
    documentation a sentence is from. ``full``: twice the sentences and their length, 2,000 steps.
    """
    study = make_study("minilm-l6", lessons=10_000 if full else 5000, max_length=64 if full else 32)
    path, steps = folder / ("full" if full else "arms"), 2000 if full else 400
    done = [one_seed(study, seed, path, steps=steps) for seed in range(seeds)]
    table = Table("MiniLM: 3 layers of 192 taught by all-MiniLM-L6-v2 (6 of 384)", list(COLUMNS), better=dict(COLUMNS))
    table.units = {"L_AT": "nat", "L_VR": "nat", "last training loss": "nat", "loss left": "%", "probe": "%"}
    table.rows["uniform"] = {name: done[0]["untaught"][f"{name} uniform"] for name in ("L_AT", "L_VR")}
    for arm in ARMS:
        cells = {column: [seed[arm][column] for seed in done if column in seed[arm]] for column in COLUMNS}
        table.rows[arm] = {column: mean_of(values) for column, values in cells.items() if values}
    table.notes = [f"{arm}: {what}." for arm, what in ARMS.items()]
    table.notes += [
        "Loss left: the arm's own held-out relation loss, as a share of that at step 0.",
        f"Student vectors are the mean of the states below its last layer. {seeds} seeds, ± standard error.",
    ]
    for column in ("rank agreement", "probe"):
        both, alone = ([seed[arm][column] for seed in done] for arm in ("full", "attention only"))
        order = compare(both, alone, f"Not claimed: full beats attention only in {column}", better="higher").claim
        table.notes.append(f"{order.text} ({order.figure}).")
    table.claims = [*claims(done), refusal(study)]
    return table


def one_seed(study: Study, seed: int, folder: Path, *, steps: int) -> dict[str, dict[str, float]]:
    """The figures of all arms for one seed; each arm's are kept in the folder once it is done."""
    training = Training(steps=steps, learning_rate=1e-3, schedule="linear", warmup=0.1, weight_decay=0.01, seed=seed)
    plain = Config(training=training)
    narrow = replace(plain, student="fresh:layers=3,hidden=192,heads=6", training=replace(training, steps=steps // 4))
    configs = {
        "attention only": replace(plain, weights=(1.0, 0.0)),
        "value only": replace(plain, weights=(0.0, 1.0)),
        **{arm: replace(narrow, relation_heads=int(arm[6:])) for arm in ARMS if arm.startswith("A_r")},
    }
    figures = {}
    for arm in ARMS:
        path = folder / f"{arm.replace(' ', '_')}_{seed}"
        done = path / "figures.json"
        path.mkdir(parents=True, exist_ok=True)
        if not done.exists():
            write_whole(
                done, json.dumps(one_arm(study, arm, replace(configs.get(arm, plain), output=str(path)))) + "\n"
            )
            shutil.rmtree(path / "checkpoints", ignore_errors=True)
        figures[arm] = json.loads(done.read_text(encoding="utf-8"))
    return figures


def one_arm(study: Study, arm: str, config: Config) -> dict[str, float]:
    """Teach one student and measure it. A folder of an arm that was stopped is taken up where it can be."""
    scored, seed = not config.relation_heads, config.training.seed
    truth = partial(study.teacher, scored=scored)
    pupil = make_body(config.student, study.body, study.tokenizer, dropout=0.0, seed=seed)
    learner = MaskedLanguage(pupil, study.tokenizer) if arm == "masked LM" else SelfAttention(pupil)
    before = figures_of(config, truth, pupil, study, vectors=arm == "untaught")
    if arm == "untaught":
        return before
    run = Run(config.training, student=learner, folder=config.output, config=config, resume=True)
    if isinstance(learner, SelfAttention):
        said = study.control if arm == "another sentence" else study.teacher
        learn(run, config, partial(said, scored=scored), learner, study.texts)
    else:
        learn_words(run, study.texts.lessons, pad_id=study.texts.pad)
    after = figures_of(config, truth, pupil, study)
    lines = (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = [json.loads(line)["loss"] for line in lines[-max(1, len(lines) // 10) :]]
    return {**after, "last training loss": mean_of(last).mean, "loss left": 100 * after["loss"] / before["loss"]}


def figures_of(config: Config, teach: Teach, pupil: Any, study: Study, *, vectors: bool = True) -> dict[str, float]:
    """Held-out relations of one student, and what its vectors are good for. The student is left as it is."""
    student = SelfAttention(copy.deepcopy(pupil).eval())
    told = measure(config, teach, student, study.texts)
    terms = [value for name, value in told.items() if not name.endswith(" uniform")]
    weights = config.weights or (1.0,) * len(terms)
    found = {"loss": sum(weight * term for weight, term in zip(weights, terms, strict=True))}
    if not config.relation_heads:
        for name, label in (("attention", "L_AT"), ("value", "L_VR")):
            found |= {label: told[name], f"{label} uniform": told[f"{name} uniform"]}
    return {**found, **study.exam.figures(student.below)} if vectors else found


def claims(done: list[dict[str, dict[str, float]]]) -> list[Claim]:
    """What must be observed, each with the figure that decides it."""

    def of(arm: str, column: str) -> list[float]:
        return [seed[arm][column] for seed in done]

    def beats(arm: str, other: str, column: str, text: str) -> Claim:
        return compare(of(arm, column), of(other, column), text, better=COLUMNS.get(column, "lower")).claim

    found = []
    for column, alone, other in (("L_AT", "attention only", "value only"), ("L_VR", "value only", "attention only")):
        start, end, own, without = (mean_of(of(arm, column)).mean for arm in ("untaught", "full", alone, other))
        uniform = of("full", f"{column} uniform")
        stays = f"{column} stays within a quarter of its start where it is not taught ({other})"
        suffices = f"{column} falls as far alone as with the other term, within a quarter ({alone})"
        found += [
            beats("full", "untaught", column, f"{column} falls by {1 - end / start:.0%} on held-out text"),
            compare(of("full", column), uniform, f"{column} falls below that of a uniform relation").claim,
            beats("full", other, column, f"{column} falls further than where it is not taught ({other})"),
            Claim(stays, f"{without / start:.0%} of the start", abs(without / start - 1) < 0.25),
            Claim(suffices, f"{own:.3f} nat against {end:.3f}", abs(own / end - 1) < 0.25),
        ]
    for column, what in (("last training loss", "training loss"), ("loss", "held-out distance from the teacher")):
        found.append(beats("full", "another sentence", column, f"The control's {what} stays higher"))
    for column in ("rank agreement", "probe"):
        found.append(beats("full", "untaught", column, f"Both relations beat no lesson: {column}"))
        found.append(beats("attention only", "untaught", column, f"Attention alone beats no lesson: {column}"))
    for arm in ("A_r = 12", "A_r = 24", "A_r = 48"):
        text = f"MiniLMv2 teaches a student of 6 heads, {arm}"
        found.append(compare(of(arm, "loss left"), [100.0] * len(done), text).claim)
    return found


def refusal(study: Study) -> Claim:
    """Whether MiniLM refuses a student of 6 heads of a teacher of 12, and names the way out."""
    config = Config(student="fresh:layers=3,hidden=192,heads=6")
    text, said = "MiniLM refuses a student with another number of heads", "it was accepted"
    try:
        check_fit(config, study.teacher, start(config, study.body, study.tokenizer), study.texts)
    except UserError as error:
        said = str(error)
    return Claim(text, said.partition(":")[0], "relation_heads" in said)
