"""Semantic revision: correct the student's samples where the teacher disagrees most, clip the teacher, match phrases.

Paper: Multi-Granularity Semantic Revision for Large Language Model Distillation (Liu et al., ACL 2026),
https://arxiv.org/abs/2407.10068

    L = L_SFT + L_DAC-KL + L_span                                           unit weights

* Sequence: the student's sample is corrected at the token where KL(teacher ‖ student) is largest among those that the
  teacher would not have chosen, and written anew from there, n_rep times (``correction.py``).
* Token: a KL divergence over the part of the teacher's distribution between two quantiles, which a small network f_sub
  predicts and learns jointly, the rest as one class (``losses/dac_kl.py``).
* Span: within noun, verb and prepositional phrases, products of neighbouring tokens' distributions are matched
  (``losses/span_consistency.py``, ``phrases.py``).

Each of the three is switched off by its weight, or by ``correction.rounds`` 0. The paper's equations and code are
not public; those modules list what is reconstructed. Decided here beyond them:

* A step's loss is the mean of DAC-KL over its response tokens, of cross-entropy over those of given answers (the
  student's own are distilled, not imitated), and of the span term over its pairs.
* Whether the student answers an example itself is drawn with ``own.share``, or follows DistiLLM's adaptive schedule
  with its replay buffer, which then holds corrected samples. The held-out loss that the schedule follows has the whole
  KL in DAC-KL's place, because f_sub alone can move DAC-KL.
* f_sub has an optimizer of its own; it is part of the run's resumable state and not of the student that is saved.
* ``clipping.mode = "off"`` gives the plain divergence ``divergence`` in DAC-KL's place.
* K = 256 classes are considered: on SmolLM2's own samples the 64 likeliest hold less than ρ = 0.9 of the mass at a
  quarter of the positions, the 256 likeliest at a tenth.

Reproduction: in part over 3 seeds: corrections help, bounds hold; spans as random ones, no gain over plain KL

Command: ``preceptor run semantic_revision --teacher smollm2 --student teacher:layers=15``
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence as Listed
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from preceptor.data.sequences import Sequence
from preceptor.distillation.held_out import held_out_means
from preceptor.distillation.lessons import Lessons, Text, prepare_together
from preceptor.distillation.marked import MarkedBatch, MarkedSequence, Marker
from preceptor.distillation.on_policy import OnPolicyMixer, OwnSamples
from preceptor.distillation.pair import DISTILLM_TEXT, DISTILLM_TRAINING, load_pair
from preceptor.distillation.teachers import Teacher
from preceptor.engine.run import Run
from preceptor.engine.run_folder import check_folder
from preceptor.engine.settings import Training
from preceptor.errors import UserError
from preceptor.knowledge import Head, SoftTargets
from preceptor.losses import Loss
from preceptor.losses.dac_kl import Classes, Clipping, Quantiles, clipped_kl, quantile_loss
from preceptor.losses.divergences import divergence
from preceptor.losses.rows import Kind
from preceptor.losses.span_consistency import span_consistency
from preceptor.methods.semantic_revision.correction import Corrected, Correction
from preceptor.methods.semantic_revision.correction_log import corrections_of, revise
from preceptor.methods.semantic_revision.examination import examine_student
from preceptor.methods.semantic_revision.phrases import Name, chunker, phrase_marker
from preceptor.methods.semantic_revision.scales import Scales, scales_of
from preceptor.methods.semantic_revision.student_run import quantiles_of, start, teacher_of
from preceptor.report.table import Table

REQUIRES = "text"


TRAINING = Training(steps=200, batch_size=8, learning_rate=5e-4, schedule="linear", warmup=0.05, precision="bf16")


@dataclass(frozen=True)
class Weights:
    """What each term of the objective counts."""

    labels: float = 1.0
    """Weight of L_SFT."""
    divergence: float = 1.0
    """Weight of L_DAC-KL."""
    spans: float = 1.0
    """Weight of L_span; at 0 no chunker is needed."""

    def __post_init__(self) -> None:
        """Refuse weights that leave nothing to learn."""
        weights = (self.labels, self.divergence, self.spans)
        if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
            raise UserError("The weights must be 0 or more, and one of them above 0.")


@dataclass(frozen=True)
class Config:
    """Settings of one distillation."""

    teacher: str = "smollm2"
    """The teacher: ``smollm2`` (embedded), a folder, a GGUF file or a hub name."""
    student: str = "teacher:layers=15"
    """``teacher:layers=N`` or ``=0,3,..``, ``fresh:layers=..,hidden=..``, ``lora:rank=8[,base=..]``, or a name."""
    text: Text = Text()
    """What is read."""
    weights: Weights = Weights()
    """Weights of the three terms."""
    clipping: Clipping = Clipping()
    """Which part of the teacher's distribution is learned."""
    divergence: Kind = "forward_kl"
    """What takes DAC-KL's place when clipping is off."""
    correction: Correction = Correction()
    """How the student's own samples are corrected."""
    own: OwnSamples = OwnSamples(share=0.5)
    """How often the student learns on its own samples."""
    chunker: Name = "textblob"
    """What finds phrases: ``textblob``, ``plain`` (punctuation, function words), or ``either``, as it is installed."""
    squared_spans: bool = False
    """Squared norms in L_span instead of norms."""
    teacher_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of the teacher while it writes and answers; evaluations use float32."""
    output: str = "runs/semantic_revision/run"
    """Folder of the run."""
    resume: bool = False
    """Go on with the run in ``output``."""
    training: Training = TRAINING
    """Steps, optimizer, precision, seed."""

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other."""
        if self.own.adaptive and not self.training.evaluate_every:
            raise UserError("own.adaptive follows the held-out loss: set training.evaluate_every.")
        if not self.weights.divergence and not self.weights.spans and (self.own.share or self.own.adaptive):
            raise UserError(
                "Labels alone teach nothing on the student's own samples: set own.share to 0, or weights.divergence or "
                "weights.spans above 0."
            )
        if self.training.shard:
            raise UserError(
                "semantic_revision cuts the student's key cache, which a sharded model forbids: set training.shard to "
                "False."
            )


tiny = Config(
    student="teacher:layers=2",
    text=Text(limit=8, held_out=4, answer_length=8),
    chunker="either",
    output="runs/semantic_revision/tiny",
    training=replace(TRAINING, steps=3, batch_size=4, evaluate_every=3),
)


# The paper's GPT-2 pair, 1.5B to 0.1B, on Dolly; the rest is the script of the code base that it builds on (DistiLLM).
paper = Config(
    teacher="gpt2-xl",
    student="gpt2",
    text=DISTILLM_TEXT,
    own=OwnSamples(adaptive=True),
    output="runs/semantic_revision/paper",
    training=DISTILLM_TRAINING,
)


def terms(
    config: Config, targets: SoftTargets | None, batch: MarkedBatch, f_sub: Quantiles | None, scales: Scales
) -> Callable[[Tensor, Head], tuple[Loss, Classes | None]]:
    """The loss L of a batch as a function of the student's hidden states and head, and what f_sub learns from."""
    weights, mask = config.weights, batch.text.predicts
    labels: dict[str, Any] = {"labels": batch.labels, "label_weight": weights.labels * scales.labels}

    def loss_of(hidden: Tensor, head: Head) -> tuple[Loss, Classes | None]:
        classes = None
        if config.clipping.mode == "off" or targets is None or not weights.divergence:
            plain = targets if weights.divergence else None
            loss = divergence(
                hidden, head, plain, kind=config.divergence, mask=mask, weight=weights.divergence, **labels
            )
        else:
            loss, classes = clipped_kl(
                hidden, head, targets, config.clipping, mask=mask, targets=batch.text.labels, quantiles=f_sub,
                weight=weights.divergence, **labels,
            )  # fmt: skip
        loss = loss._replace(parts={**loss.parts, "cross_entropy": loss.parts["cross_entropy"] * scales.labels})
        if weights.spans and targets is not None:
            factor = weights.spans * scales.spans
            span = span_consistency(
                hidden, head, targets, batch.pairs, mask=mask, weight=factor, squared=config.squared_spans
            )
            loss = _with_span(loss, span, scales.spans)
        return loss, classes

    return loss_of


def _with_span(loss: Loss, span: Loss, share: float) -> Loss:
    """Both losses as one, with the span's share of the gradient where the slopes of both are known."""
    parts = {**loss.parts, "span": span.parts["span"] * share}
    if "slope" in parts:
        both = parts["slope"] + span.parts["span_slope"]
        parts["span_share"] = loss.count * (span.parts["span_slope"] / both).nan_to_num()
    return Loss(loss.sum + span.sum, loss.count, parts)


def teach(run: Run, marker: Marker, teacher: Teacher | None, lessons: Lessons, config: Config) -> None:
    """The loop. ``teacher`` gives soft targets; without one, labels alone teach. ``marker`` holds the student."""
    own = OnPolicyMixer(config.own)
    run.remember("own", own, apart=True)
    f_sub, bare = run.modules.get("f_sub"), quantiles_of(run)
    for examples in run.steps(lessons.train):
        seen: list[Corrected] = []
        corrected = partial(revise, run, marker, teacher, config, seen)
        mixed = own.mix(marker.student, examples, config.text, progress=run.step / run.total, revise=corrected)
        marked = marker.mark(mixed, given=examples)
        scales = scales_of(run, marked)
        for batch in run.split(marked, marker.collate):
            targets = teacher(batch.text) if teacher else None
            loss, classes = run.student(batch.text, terms(config, targets, batch, bare, scales))
            run.update(loss.sum, loss.count, loss.parts)
            # After the student, whose guard stops the run before f_sub has moved.
            if f_sub is not None and classes is not None:
                guide = quantile_loss(classes, f_sub, config.clipping)
                run.update(guide.sum, guide.count, guide.parts, module="f_sub")
        run.log(**corrections_of(seen))
        if run.evaluate_due:
            held_out = loss_of_exam(run, teacher, lessons.exam, marker, config)
            own.see(held_out)
            run.log(held_out_loss=held_out, own_share=own.share)
    run.finish()


def loss_of_exam(run: Run, teacher: Teacher | None, exam: list[Sequence], marker: Marker, config: Config) -> float:
    """The objective's mean over the tokens (and pairs) of the held-out text, with the whole KL in DAC-KL's place."""
    lessons = marker.mark(exam, given=exam)
    scales = scales_of(run, lessons)

    def losses(examples: Listed[MarkedSequence]) -> Iterable[tuple[str, Loss]]:
        batch = marker.collate(examples).to(run.device)
        targets = teacher(batch.text) if teacher else None
        loss, _ = run.student(batch.text, terms(config, targets, batch, quantiles_of(run), scales))
        tail = loss.parts["kl"] - loss.parts["divergence"] if "kl" in loss.parts else 0.0
        yield "loss", loss._replace(sum=loss.sum + config.weights.divergence * tail)

    return held_out_means(run.student, lessons, losses, batch_size=config.training.batch_size)["loss"]


def main(config: Config) -> Table | None:
    """Distil, evaluate beside the teacher and the untaught student, and write student, table and report.

    Returns the table, on the main process.

    Raises:
        UserError: the tokenizers differ, the chunker is not installed, the folder holds another run, no text is left.
    """
    folder, seed = Path(config.output), config.training.seed
    check_folder(folder, config, resume=config.resume)
    chunk = chunker(config.chunker) if config.weights.spans else None
    teacher, student = load_pair(config.teacher, config.student, dtype=config.teacher_dtype, seed=seed)
    # Before the run begins, so that text which cannot be read leaves no run behind.
    lessons = prepare_together(config.text, teacher, config.training, folder)
    run = start(config, student, teacher)
    teach(run, phrase_marker(student, chunk), teacher_of(config, run, teacher, student), lessons, config)
    return examine_student(config, student.eval(), lessons) if run.is_main else None
