"""EchoAtt: inner layers share one attention matrix; the student that shares learns from the model it was made of.

Paper: EchoAtt: Attend, Copy, then Adjust for More Efficient Large Language Models (Rajabzadeh et al., ENLSP at NeurIPS
2024), https://arxiv.org/abs/2409.14595
Reproduction: holds over 3 seeds; with 23 of 30 layers sharing, distillation is ahead after 64 steps, not after 16
Command: ``preceptor run echoatt --teacher smollm2 --followers similar=12``

The attention matrices of inner layers are alike (``similarity.py``). The student is the teacher without the queries
and keys of the followers; each reuses the matrix of the nearest layer below that computes one:

    A = softmax(Q Kᵀ/√d) of the leader,     output of each layer j of its group: A V_j

Stage 1, on the same tokens x for teacher T and student S, with m groups and h_i what leaves the last layer of group i:

    L_I = 1/m Σ_i ‖ h_i of S - h_i of T ‖²,     L_S = KL( S(x) ‖ T(x) ),     L_H = CE( S(x), argmax T(x) )
    L = α L_I + β L_S + γ L_H,     α, β, γ = 0.25, 0.25, 0.5

Stage 2 goes on with next-token cross-entropy on the text itself.

Decided here, where the source is silent or not clear:

* The paper ranks layers by similarity and lists the followers. ``similar=N`` takes the N followers whose similarities
  to the layers they copy from have the largest sum, found exactly; ``gap=k`` is the paper's cut at the largest gap.
* L_I is a mean over a token's elements, and over tokens as the other terms are, without the first token of a text: its
  hidden states are outliers that hold attention and carry no content, and their distance would be all of the loss. The
  output of the model's last layer is compared after the final norm.
* The paper prints L_S with the student first; ``direction`` turns it, and both directions of the held-out text are
  logged.
* Both stages are one run under one learning-rate schedule; ``continued`` is the share of its steps in stage 2. The
  rate is constant by default: one that falls to 0 leaves stage 2 little to learn with.
* The followers' query and key norms and biases are left out too. The teacher's attention matrices are not a target.
* Text is read in pieces of equal length without padding, so no term counts a padded token.

The two stages are in ``teach``; their losses in ``stage_one_loss`` and ``stage_two_loss``.
"""

from __future__ import annotations

from collections.abc import Sequence as Listed
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from preceptor.data.sequences import Batch, Sequence, collate
from preceptor.engine import distribution
from preceptor.engine.run import Run
from preceptor.engine.run_folder import check_folder
from preceptor.engine.settings import Training
from preceptor.errors import UserError
from preceptor.knowledge import Head
from preceptor.losses import Loss
from preceptor.losses.divergences import divergence
from preceptor.methods.echoatt.examination import examine_student, held_out
from preceptor.methods.echoatt.followers import block_ends, check_spec, choose_followers
from preceptor.methods.echoatt.layer_teacher import LayerTargets, Original, TeacherOfLayers
from preceptor.methods.echoatt.observed import Observed
from preceptor.methods.echoatt.passages import Passages, read_passages
from preceptor.methods.echoatt.similarity import Similarity, measure_similarity
from preceptor.models.identity import tokenizer_hash
from preceptor.models.language_model import LanguageModel
from preceptor.models.loading import load
from preceptor.models.student import sharing
from preceptor.report.table import Table

REQUIRES = "text"


TRAINING = Training(steps=200, batch_size=4, learning_rate=2e-4, schedule="constant", warmup=0.05, precision="bf16")


@dataclass(frozen=True)
class Config:
    """Settings of one student."""

    teacher: str = "smollm2"
    """The teacher, of which the student is made: ``smollm2`` (embedded), a folder, a GGUF file or a hub name."""
    followers: str = "similar=12"
    """The layers that share: ``similar=N``, ``gap=k``, ``blocks=k[,skip=b]``, or a list ``2,5,4,3,7``."""
    calibration: int = 16
    """Pieces of text on which the similarity of layers is measured, in float32."""
    text: Passages = Passages()
    """What is read, in pieces of equal length."""
    inner_weight: float = 0.25
    """α of L_I."""
    soft_weight: float = 0.25
    """β of L_S."""
    hard_weight: float = 0.5
    """γ of L_H."""
    direction: Literal["student_first", "teacher_first"] = "student_first"
    """The order of L_S: KL(S ‖ T), as printed, or KL(T ‖ S)."""
    continued: float = 0.2
    """Share of the steps in stage 2, in [0, 1]; at 1 the teacher is asked for evaluations only."""
    teacher_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of the teacher while the student learns; the table at the end uses float32."""
    output: str = "runs/echoatt/run"
    """Folder of the run."""
    resume: bool = False
    """Go on with the run in ``output``."""
    training: Training = TRAINING
    """Steps, optimizer, precision, seed."""

    def __post_init__(self) -> None:
        """Refuse weights and shares that make no loss."""
        weights = (self.inner_weight, self.soft_weight, self.hard_weight)
        if min(weights) < 0 or not any(weights):
            raise UserError(f"The weights of L_I, L_S and L_H are {weights}: give 0 or more, and one above 0.")
        check_spec(self.followers)
        if self.calibration < 1:
            raise UserError(f"calibration is {self.calibration}; give at least 1 piece of text.")
        if not 0 <= self.continued <= 1:
            raise UserError(f"continued is {self.continued}; choose a share in [0, 1].")
        if self.training.shard:
            raise UserError("The outputs of inner layers are not gathered from shards: set training.shard to false.")


tiny = Config(
    followers="5,6,7,15,24,25",
    text=Passages(limit=30, length=32, held_out=4),
    output="runs/echoatt/tiny",
    training=replace(TRAINING, steps=4, batch_size=2, evaluate_every=2),
)


# 3.7B tokens in stage 1 and a quarter of them in stage 2, 1024 sequences of 2048 tokens a step.
paper = Config(
    teacher="TinyLlama/TinyLlama_v1.1",
    followers="2,5,4,3,7,6,18,9,8,11,12,1,17,10,14,13,16",
    text=Passages(source="cerebras/SlimPajama-627B", limit=5_000_000, length=2048, held_out=500),
    output="runs/echoatt/paper",
    training=Training(
        steps=2205,
        batch_size=1024,
        accumulate=128,
        learning_rate=1e-4,
        schedule="cosine",
        warmup=0.005,
        precision="bf16",
        evaluate_every=200,
        save_every=200,
    ),
)


def stage_one_loss(
    hidden: Tensor, head: Head, inner: list[Tensor], *, batch: Batch, targets: LayerTargets, config: Config
) -> Loss:
    """Stage 1: α L_I + β L_S + γ L_H, summed over the tokens that predict another."""
    kind: Literal["reverse_kl", "forward_kl"] = "reverse_kl" if config.direction == "student_first" else "forward_kl"
    loss = divergence(
        hidden,
        head,
        targets.soft,
        kind=kind,
        mask=batch.predicts,
        labels=targets.likeliest,
        weight=config.soft_weight,
        label_weight=config.hard_weight,
    )
    tokens = batch.predicts.clone()
    tokens[:, 0] = False
    apart = inner_distance(inner, targets.inner, tokens)
    parts = {
        "L_I": apart.detach(),
        "L_S": loss.parts["divergence"],
        "L_H": loss.parts["cross_entropy"],
        "agreement": loss.parts["agreement"],
    }
    return Loss(loss.sum + config.inner_weight * apart, loss.count, parts)


def inner_distance(ours: list[Tensor], theirs: list[Tensor], tokens: Tensor) -> Tensor:
    """L_I summed over tokens: of each the squared distance, a mean over elements and over the m groups.

    Args:
        ours: what leaves the last layer of each group of the student, (B, T, width).
        theirs: the same of the teacher.
        tokens: (B, T) boolean, those that count.
    """
    if not ours:
        return torch.zeros((), device=tokens.device)
    apart = [
        (mine[tokens].float() - other[tokens].float()).square().mean(-1).sum() for mine, other in zip(ours, theirs)
    ]
    return torch.stack(apart).mean()


def stage_two_loss(hidden: Tensor, head: Head, inner: list[Tensor], *, batch: Batch) -> Loss:
    """Stage 2: cross-entropy to the text's own next tokens."""
    return divergence(hidden, head, None, mask=batch.predicts, labels=batch.labels, weight=0.0, label_weight=1.0)


def teach(
    run: Run, teacher: TeacherOfLayers, train: Listed[Sequence], exam: list[Sequence], pad_id: int, config: Config
) -> None:
    """The loop: stage 1 until ``continued`` of the steps are left, then stage 2."""
    batches = partial(collate, pad_id=pad_id)
    for examples in run.steps(train):
        first_stage = run.step < round(run.total * (1 - config.continued))
        for batch in run.split(examples, batches):
            if first_stage:
                loss = run.student(batch, partial(stage_one_loss, batch=batch, targets=teacher(batch), config=config))
            else:
                loss = run.student(batch, partial(stage_two_loss, batch=batch))
            run.update(loss.sum, loss.count, loss.parts)
        if run.evaluate_due:
            run.log(**held_out(run, teacher, exam, batches, config))
    run.finish()


def compare_layers(config: Config, teacher: LanguageModel, texts: Listed[Sequence]) -> Similarity:
    """The similarity of the teacher's layers on the first pieces of text."""
    pieces = [sequence.ids for sequence in texts[: config.calibration]]
    return measure_similarity(teacher.causal, pieces, length=config.text.length)


def main(config: Config) -> Table | None:
    """Compare layers, let some share, teach in two stages, evaluate; write student, table, picture and report.

    Returns the table, on the main process.

    Raises:
        UserError: the architecture or the followers do not fit, the folder holds another run, or the text is short.
    """
    from preceptor.models.shared_attention.config import check_architecture, windows_of

    folder, kept = Path(config.output), Path(config.output) / "similarity.json"
    check_folder(folder, config, resume=config.resume)
    teacher = load(config.teacher)
    check_architecture(teacher.causal.config.model_type)
    train, exam = read_passages(config.text, teacher.tokenizer, seed=config.training.seed)

    @cache
    def measured() -> Similarity:
        teacher.to(distribution.start(config.training.precision, (), folder).device)
        return Similarity.read(kept) if config.resume and kept.exists() else compare_layers(config, teacher, train)

    followers = choose_followers(config.followers, windows_of(teacher.causal.config), measured)
    student, ends = sharing(teacher, followers), block_ends(followers)
    similarity = measured()  # the page shows it beside followers that were given, too
    run = start(config, student, ends, teacher)
    if run.is_main:
        similarity.write(kept)
    original = Original(teacher.to(getattr(torch, config.teacher_dtype)), ends)
    run.shard(teacher)
    teach(run, original, train, exam, student.pad_id, config)
    return examine_student(config, student.eval(), followers, exam, similarity) if run.is_main else None


def start(config: Config, student: LanguageModel, ends: tuple[int, ...], teacher: LanguageModel) -> Run:
    """The run of one student, with what it rests on written down."""
    return Run(
        config.training,
        student=Observed(student, ends if config.continued < 1 else ()),
        folder=Path(config.output),
        config=config,
        resume=config.resume,
        provenance={
            "teacher": config.teacher,
            "text": config.text.source,
            "tokenizer": tokenizer_hash(teacher.tokenizer),
        },
    )
