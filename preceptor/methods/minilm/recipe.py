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

The losses are in ``losses/attention_relations.py``, the loop is ``teach``; the reproduction has nine arms.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from preceptor.data.sequences import Batch, Sequence, collate
from preceptor.data.tokenizer import Tokenizer
from preceptor.engine.run import Run
from preceptor.engine.settings import Training
from preceptor.errors import UserError
from preceptor.evaluation.result import write_result
from preceptor.losses import Loss, attention_relations as relations
from preceptor.losses.attention_relations import Average, Projections
from preceptor.methods.minilm.attention_reader import AttentionTeacher, SelfAttention
from preceptor.methods.minilm.encoders import load_body, make_body, save_body
from preceptor.methods.minilm.examination import compare_relations
from preceptor.methods.minilm.texts import Texts, read_texts, split_texts
from preceptor.models.identity import tokenizer_hash
from preceptor.report import write_report
from preceptor.report.table import Table

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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


RelationTeacher = Callable[[Batch], Projections]


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


def teach(run: Run, config: Config, teacher: RelationTeacher, student: SelfAttention, texts: Texts) -> None:
    """The loop: the student learns the teacher's relations on the lessons; held-out terms are logged when due."""
    student.train()
    for batch in run.batches(texts.lessons, partial(collate, pad_id=texts.pad)):
        targets = teacher(batch)
        learned = run.student(batch.input_ids, batch.attention_mask, scored=not config.relation_heads)
        loss = objective(config, learned, targets, batch, causal=student.causal)
        run.update(loss.sum, loss.count, loss.parts)
        if run.evaluate_due:
            run.log(**{f"held_out_{name}": value for name, value in measure(config, teacher, student, texts).items()})
    run.finish()


@torch.no_grad()
def measure(config: Config, teacher: RelationTeacher, student: SelfAttention, texts: Texts) -> dict[str, float]:
    """Each term's mean over held-out sequences, and as ``... uniform`` that of a student without any relation."""
    alike = replace(config, average="sequence")
    sums: dict[str, float] = {}
    mode = student.training
    student.eval()
    for start in range(0, len(texts.exam), 64):
        batch = collate(texts.exam[start : start + 64], texts.pad).to(next(student.parameters()).device)
        targets = teacher(batch)
        learned = student(batch.input_ids, batch.attention_mask, scored=not config.relation_heads)
        parts = objective(alike, learned, targets, batch, causal=student.causal).parts
        for name, (x, y) in relations.relation_inputs(targets, config.relation_heads).items():
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


def prepare(config: Config, teacher: SelfAttention, tokenizer: Tokenizer) -> Texts:
    """The texts of a run; which of them are held out does not depend on the run's seed."""
    check_length(config, teacher)
    listed = read_texts(config.data, limit=config.limit)
    return split_texts(listed, tokenizer, max_length=config.max_length, held_out=config.held_out)


def start(config: Config, like: PreTrainedModel, tokenizer: Tokenizer) -> SelfAttention:
    """The student before its first step."""
    body = make_body(config.student, like, tokenizer, dropout=config.dropout, seed=config.training.seed)
    return SelfAttention(body)


def teach_one(
    config: Config, teacher: SelfAttention, student: SelfAttention, tokenizer: Tokenizer, texts: Texts
) -> Table:
    """Teach one student, save it, and compare its held-out relations with those before."""
    folder, asked = Path(config.output), AttentionTeacher(teacher)
    check_fit(config, asked, student, texts)
    relations_of = partial(asked, scored=not config.relation_heads)
    untaught = copy.deepcopy(student)
    hashes = {"teacher": config.teacher, "tokenizer": tokenizer_hash(tokenizer), "text": config.data or "embedded"}
    run = Run(config.training, student=student, folder=folder, config=config, resume=config.resume, provenance=hashes)
    run.shard(teacher)
    before = measure(config, relations_of, untaught.to(run.device), texts)
    teach(run, config, relations_of, student, texts)
    table = compare_relations(config, before, measure(config, relations_of, student, texts))
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
