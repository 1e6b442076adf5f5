"""What the reproduction measures: students on held-out text, corrected samples, and f_sub without a student."""

from __future__ import annotations

import random
from collections.abc import Sequence as Listed
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from preceptor.data.sequences import Sequence, collate
from preceptor.distillation.lessons import Lessons, write_answers
from preceptor.distillation.teachers import FrozenTeacher, MemoisedTeacher
from preceptor.evaluation.language import ModelOutputs, ask, evaluate_language
from preceptor.knowledge import HiddenTargets
from preceptor.losses.dac_kl import Classes, Clipping, Quantiles, clipped_kl, clipped_rows, gates, quantile_loss
from preceptor.losses.span_consistency import span_consistency
from preceptor.methods.semantic_revision.correction import Correction, correct
from preceptor.methods.semantic_revision.phrases import adjacent, phrase_marker, phrases, token_spans
from preceptor.models.language_model import LanguageModel, project
from preceptor.statistics import mean_of

# How the samples of the fine-tuned student are corrected: row -> (rounds, place)
CORRECTIONS = {
    "its samples, corrected once": (1, "divergent"),
    "its samples, corrected 3 times": (3, "divergent"),
    "its samples, corrected at a random place": (1, "random"),
}


RAW = "its samples"


class HeldOutStudy:
    """Held-out measures of students; the teacher's outputs are computed once."""

    def __init__(self, lessons: Lessons, exact: LanguageModel) -> None:
        self.exam, self.teacher_outputs = lessons.exam, ask(exact, lessons.exam)
        self.prompts = [sequence.prompt for sequence in lessons.exam]
        self.length = max(sum(sequence.response) for sequence in lessons.exam)
        marker = phrase_marker(exact, phrases)
        batch = marker.collate(marker.mark(self.exam, given=self.exam))
        self.pairs, self.greedy = batch.pairs, self._greedy(exact)

    def _greedy(self, model: LanguageModel) -> list[str]:
        with torch.autocast("cpu", torch.bfloat16):
            answers = model.generate(self.prompts, max_new_tokens=self.length, temperature=0.0)
        return [model.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]

    @torch.no_grad()
    def figures(self, student: LanguageModel) -> dict[str, float]:
        """KL (nat a token), ROUGE-L (%) to the teacher's greedy answers, and the mean of the span term."""
        outputs = ask(student, self.exam)
        measures = evaluate_language(student, self.teacher_outputs, self.exam, outputs=outputs, speed=False)
        assert measures.kl is not None
        rows = torch.cat(outputs.rows)
        targets = HiddenTargets(torch.cat(self.teacher_outputs.rows), self.teacher_outputs.head)
        span = span_consistency(rows, outputs.head, targets, self.pairs, mask=torch.ones(len(rows), dtype=torch.bool))
        return {
            "KL": measures.kl.mean,
            "ROUGE-L": rouge_l(self._greedy(student), self.greedy),
            "span": float(span.sum / span.count),
        }


def rouge_l(answers: list[str], references: list[str]) -> float:
    """The mean ROUGE-L F-measure in per cent, stemmed, as rouge-score has it."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = zip(references, answers, strict=True)
    return 100 * mean_of([float(scorer.score(truth, text)["rougeL"].fmeasure) for truth, text in pairs]).mean


def corrections_measured(
    student: LanguageModel, teacher: LanguageModel, prompts: list[tuple[int, ...]], length: int, seed: int
) -> dict[str, dict[str, Any]]:
    """The student's samples for prompts, raw and corrected: the teacher's NLL of each, and their distinct-2."""
    longest = max(map(len, prompts)) + length
    found: dict[str, dict[str, Any]] = {}
    with torch.random.fork_rng(), torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(seed)
        raw = write_answers(student, prompts, length, max_length=longest)
        found[RAW] = _samples(teacher, raw, [()] * len(raw)) | {"no candidate": 0.0}
        for way, (rounds, place) in CORRECTIONS.items():
            torch.manual_seed(seed)
            settings, frozen = Correction(rounds=rounds), FrozenTeacher(teacher)
            done = correct(student, frozen, raw, settings, length=length, place=place)  # type: ignore[arg-type]
            share = {"no candidate": 100 * done.without / done.tried}
            found[way] = _samples(teacher, done.sequences, done.places) | share
            found[way]["raw elsewhere"] = _samples(teacher, raw, done.places)["NLL elsewhere"]
    return found


def _samples(teacher: LanguageModel, sequences: list[Sequence], places: Listed[tuple[int, ...]]) -> dict[str, Any]:
    """The teacher's NLL a token of each sequence, with and without some places, and distinct-2 of them all (%)."""
    whole, elsewhere, two = [], [], list[tuple[int, int]]()
    for sequence, nll, corrected in zip(sequences, _nll(ask(teacher, sequences), sequences), places):
        answer = sequence.ids[len(sequence.prompt) :]
        others = [float(value) for place, value in enumerate(nll) if place not in corrected]
        whole.append(float(nll.mean()))
        elsewhere.append(sum(others) / len(others) if others else float(nll.mean()))
        two += zip(answer, answer[1:])
    return {"NLL": whole, "NLL elsewhere": elsewhere, "distinct-2": 100 * len(set(two)) / len(two)}


@torch.no_grad()
def _nll(outputs: ModelOutputs, sequences: list[Sequence]) -> list[Tensor]:
    labels = [torch.tensor(sequence.ids[len(sequence.prompt) :]).unsqueeze(-1) for sequence in sequences]
    log_p = [project(rows, outputs.head).float().log_softmax(-1) for rows in outputs.rows]
    return [-rows.gather(-1, wanted).squeeze(-1) for rows, wanted in zip(log_p, labels)]


def clipping_measured(
    student: LanguageModel, teacher: MemoisedTeacher, lessons: Lessons, seed: int
) -> dict[str, float]:
    """f_sub alone, on the outputs of the fine-tuned student and its teacher for the text, with and without the guard.

    Also how many positions have a DAC-KL below 0 or above the KL of all considered classes, which bounds the whole one.
    """
    clipping = Clipping()
    untaught = Quantiles(clipping, classes=student.vocabulary, seed=seed)
    batch = collate(lessons.train[:64], student.pad_id)
    with torch.no_grad():
        _, classes = clipped_kl(
            student(batch), student.head, teacher(batch), clipping, mask=batch.predicts, targets=batch.labels,
            quantiles=untaught,
        )  # fmt: skip
    found: dict[str, float] = {"rows": 0, "outside": 0}
    for name, guard in (("kept", clipping.guard), ("kept without guard", 0.0)):
        settings = replace(clipping, guard=guard)
        f_sub = _learned(settings, classes, student.vocabulary, seed)
        with torch.no_grad():
            lower, upper = f_sub(classes.features)
            kept = gates(classes, lower, upper, settings)
            value, whole = (clipped_rows(classes, gate)[0] for gate in (kept, torch.ones_like(kept)))
            found[name] = float((kept * classes.p.exp()).sum(-1).mean())
        found["rows"] += len(value)
        found["outside"] += int(((value < -1e-5) | (value > whole + 1e-5)).sum())
    return found


def _learned(clipping: Clipping, classes: Classes, vocabulary: int, seed: int, steps: int = 300) -> Quantiles:
    """An f_sub that learned from constant classes, 128 positions a step."""
    f_sub = Quantiles(clipping, classes=vocabulary, seed=seed)
    optimizer = torch.optim.Adam(f_sub.parameters(), clipping.learning_rate)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        some = torch.randint(len(classes.p), (128,), generator=draw)
        part = Classes(*(getattr(classes, name)[some] for name in Classes.__dataclass_fields__))
        loss = quantile_loss(part, f_sub, clipping)
        optimizer.zero_grad()
        torch.autograd.backward(loss.sum / loss.count)
        optimizer.step()
    return f_sub


def pairs_elsewhere(model: LanguageModel, sequences: list[Sequence], seed: int) -> dict[Sequence, tuple[int, ...]]:
    """For the control: pairs in spans of the same lengths as the phrases, at random places of each response."""
    draw, moved = random.Random(seed), dict[Sequence, tuple[int, ...]]()
    for sequence in sequences:
        answer = sequence.ids[len(sequence.prompt) :]
        lengths = [end - begun for begun, end in token_spans(answer, model.tokenizer, phrases)]
        parts = [(length, True) for length in lengths] + [(1, False)] * (len(answer) - sum(lengths))
        draw.shuffle(parts)
        place, found = 0, []
        for length, inside in parts:
            found += [(place, place + length)] if inside else []
            place += length
        moved[sequence] = tuple(adjacent(found))
    return moved
