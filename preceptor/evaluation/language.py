"""Measures of a language model: how close to its teacher, how good, how large and how fast.

Held-out text is read once by the teacher (``ask``) and once by each student. All errors are standard errors over
sequences: the tokens of one sequence depend on one another, so a sequence is one observation (a cluster).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence as Listed
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from preceptor.data.encoding import encode_prompt
from preceptor.data.readers import Message
from preceptor.data.sequences import Sequence, collate
from preceptor.distillation.lessons import write_answers
from preceptor.errors import UserError
from preceptor.knowledge import Head
from preceptor.models.identity import same_tokenizer
from preceptor.models.language_model import LanguageModel, in_evaluation, project
from preceptor.report.table import Table
from preceptor.statistics import Cell, Value, mean_of, ratio_of

OWN_SAMPLES = "KL(model ‖ teacher), own samples"


ROWS = (
    "KL(teacher ‖ model)", OWN_SAMPLES, "agreement with the teacher", "perplexity", "calibration error", "parameters",
    "weights", "prefill", "decode",
)  # fmt: skip


TEACHER, UNTAUGHT, LABELS_ONLY, TAUGHT = "teacher", "untaught student", "taught by labels only", "taught student"


BINS = 15  # of the calibration error (Guo et al., 2017)


CHUNK_BYTES = 128 << 20  # of float32 matrices (rows, vocabulary) at a time; five of them are held


PREFILL_TOKENS, DECODED_TOKENS, REPEATS = 128, 16, 5


@dataclass(frozen=True)
class ModelOutputs:
    """A model's last hidden states where they predict response tokens: (rows, width) a sequence, and its head."""

    rows: list[Tensor]
    head: Head


@dataclass(frozen=True)
class OwnSampleMeasures:
    """On the student's own samples: both KL divergences in nat a token, and the samples' length in tokens."""

    reverse_kl: Value
    forward_kl: Value
    length: Value


@dataclass(frozen=True)
class LanguageMeasures:
    """What one model does on held-out sequences.

    ``kl``: KL(teacher ‖ model) in nat a response token. ``agreement``: share of response tokens where both have the
    same likeliest token. ``perplexity``: exp of the cross-entropy to the text's own tokens. ``calibration``: expected
    calibration error of the likeliest token's probability, 15 bins of equal width, 0 to 1. ``megabytes``: the
    parameters as they are held and saved, in 10^6 bytes, each tied tensor once. Speeds in tokens a second, medians.
    """

    kl: Value | None
    agreement: Value | None
    perplexity: Value
    calibration: Value
    parameters: int
    megabytes: float
    prefill: Value | None = None
    decode: Value | None = None
    setting: str = ""

    def rows(self) -> dict[str, Cell]:
        """The measures by the row labels of the table."""
        percent = None if self.agreement is None else _scaled(self.agreement, 100.0)
        return {
            "KL(teacher ‖ model)": self.kl,
            "agreement with the teacher": percent,
            "perplexity": self.perplexity,
            "calibration error": _scaled(self.calibration, 100.0),
            "parameters": self.parameters / 1e6,
            "weights": self.megabytes,
            "prefill": self.prefill,
            "decode": self.decode,
        }


@torch.no_grad()
def ask(model: LanguageModel, sequences: Listed[Sequence], *, batch_size: int = 8) -> ModelOutputs:
    """A model's outputs for sequences, computed once for the evaluation of any number of students.

    Holds (response tokens, width) values in the model's precision, in the computer's memory; no logits.

    Raises:
        UserError: no sequence has a response token.
    """
    if not any(any(sequence.response[1:]) for sequence in sequences):
        raise UserError("No sequence has a response token to evaluate; give data that hold answers.")
    order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index].ids))
    rows: list[Tensor] = [torch.empty(0)] * len(sequences)
    with in_evaluation(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = collate([sequences[index] for index in chosen], model.pad_id).to(model.device)
            hidden = model(batch)
            for index, states, predicts in zip(chosen, hidden, batch.predicts):
                rows[index] = states[predicts].cpu()
    head = model.head
    return ModelOutputs(rows, replace(head, weight=head.weight.detach()))


def evaluate_language(
    student: LanguageModel,
    teacher: LanguageModel | ModelOutputs | None,
    sequences: Listed[Sequence],
    *,
    outputs: ModelOutputs | None = None,
    batch_size: int = 8,
    speed: bool = True,
    chunk_bytes: int = CHUNK_BYTES,
) -> LanguageMeasures:
    """Measure a model on held-out sequences, beside its teacher where there is one.

    Args:
        student: the model to measure (the teacher itself too: leave ``teacher`` None).
        teacher: the teacher, or its outputs for these sequences (``ask``), or None: no KL and no agreement.
        sequences: encoded text; only response tokens count.
        outputs: those of the model to measure for these sequences, if they were computed already.
        batch_size: sequences at a time.
        speed: measure tokens a second too.
        chunk_bytes: bound of the float32 matrices (rows, vocabulary) that are held.

    Raises:
        UserError: the tokenizers differ, the teacher's outputs are of other sequences, or nothing is to be evaluated.
    """
    if isinstance(teacher, LanguageModel):
        same_tokenizer(teacher, student)
        teacher = ask(teacher, sequences, batch_size=batch_size)
    outputs = outputs or ask(student, sequences, batch_size=batch_size)
    labels = [_labels(sequence) for sequence in sequences]
    counts = [len(row) for row in labels]
    if [len(rows) for rows in outputs.rows] != counts:
        raise UserError("The model's outputs are of other sequences: give those for the sequences that are evaluated.")
    figures = [torch.split(figure, counts) for figure in _figures(outputs, teacher, labels, chunk_bytes)]
    forward_kl, _, agreement, entropy, confidence, right = figures
    cross_entropy = _per_token(entropy, counts)
    perplexity = math.exp(cross_entropy.mean) if cross_entropy.mean < 700 else math.inf
    error = None if cross_entropy.error is None else perplexity * cross_entropy.error
    prefill, decode = _speed(student) if speed else (None, None)
    parameters = list(student.model.parameters())
    return LanguageMeasures(
        kl=_per_token(forward_kl, counts) if teacher else None,
        agreement=_per_token(agreement, counts) if teacher else None,
        perplexity=Value(perplexity, error, cross_entropy.count),
        calibration=_calibration(confidence, right),
        parameters=sum(parameter.numel() for parameter in parameters),
        megabytes=sum(parameter.numel() * parameter.element_size() for parameter in parameters) / 1e6,
        prefill=prefill,
        decode=decode,
        setting=_setting(student),
    )


def evaluate_own_samples(
    student: LanguageModel,
    teacher: LanguageModel,
    prompts: Listed[tuple[int, ...]],
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 8,
    chunk_bytes: int = CHUNK_BYTES,
) -> OwnSampleMeasures:
    """Let the student answer prompts, and compare both models on what it wrote, token by token.

    Each KL is taken exactly over the vocabulary at each token of the samples. The seed decides the samples; torch's
    generators are left as they were.

    Raises:
        UserError: the tokenizers differ, or no prompt is given.
    """
    same_tokenizer(teacher, student)
    if not prompts:
        raise UserError("There is no prompt for the student to answer; give at least one.")
    longest = max(len(prompt) for prompt in prompts) + max_new_tokens
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        written = write_answers(student, list(prompts), max_new_tokens, max_length=longest, temperature=temperature)
    labels = [_labels(sequence) for sequence in written]
    counts = [len(row) for row in labels]
    outputs = ask(student, written, batch_size=batch_size)
    figures = _figures(outputs, ask(teacher, written, batch_size=batch_size), labels, chunk_bytes)
    forward_kl, reverse_kl = (_per_token(torch.split(figure, counts), counts) for figure in figures[:2])
    return OwnSampleMeasures(reverse_kl, forward_kl, mean_of([float(count) for count in counts]))


def samples(
    models: Mapping[str, LanguageModel], prompts: Listed[Listed[Message]], *, max_new_tokens: int = 96
) -> list[dict[str, Any]]:
    """What each model answers to conversations, greedily: a list of ``{"prompt": str, "answers": {label: str}}``.

    An answer that the limit cuts off ends with "…".
    """
    answered: list[dict[str, Any]] = []
    for conversation in prompts:
        answered.append({"prompt": "\n\n".join(message["content"] for message in conversation), "answers": {}})
    for label, model in models.items():
        ids = [encode_prompt(conversation, model.tokenizer) for conversation in prompts]
        answers = model.generate(ids, max_new_tokens=max_new_tokens, temperature=0.0)
        for one, answer in zip(answered, answers):
            cut = "" if not answer or answer[-1] in model.stop_ids else " …"
            one["answers"][label] = model.tokenizer.decode(answer, skip_special_tokens=True).strip() + cut
    return answered


def language_table(
    title: str, models: Mapping[str, LanguageMeasures], own: Mapping[str, OwnSampleMeasures] | None = None
) -> Table:
    """A table of measures by models; ``own`` adds what was found on each student's own samples."""
    table = Table(title, list(models))
    for name, measures in models.items():
        found = (own or {}).get(name)
        cells = measures.rows()
        cells[OWN_SAMPLES] = found.reverse_kl if found else None
        for row in ROWS:
            table.rows.setdefault(row, {})[name] = cells[row]
    table.rows = {row: cells for row, cells in table.rows.items() if any(cell is not None for cell in cells.values())}
    units = {
        "KL(teacher ‖ model)": "nat/token",
        OWN_SAMPLES: "nat/token",
        "agreement with the teacher": "%",
        "calibration error": "%",
        "parameters": "million",
        "weights": "MB",
        "prefill": "tokens/s",
        "decode": "tokens/s",
    }
    table.units = {row: unit for row, unit in units.items() if row in table.rows}
    higher = {"agreement with the teacher", "prefill", "decode"}
    table.better = {
        row: "higher" if row in higher else "lower" for row in table.rows if row not in ("parameters", "weights")
    }
    first = next(iter(models.values()))
    table.notes.append(
        f"Held-out text, {first.perplexity.count} sequences; mean ± standard error over sequences. Agreement: same "
        f"likeliest next token. Calibration error: of the likeliest token's probability, {BINS} bins."
    )
    if first.prefill is not None:
        table.notes.append(
            f"Speed: one prompt of {PREFILL_TOKENS} tokens, then {DECODED_TOKENS} tokens one by one; median of "
            f"{REPEATS}; {first.setting}."
        )
    return table


def language_headline(models: Mapping[str, LanguageMeasures]) -> str:
    """One sentence with the main figure, in plain words; empty without a taught student that was compared."""
    shares = {name: 100 * found.agreement.mean for name, found in models.items() if found.agreement is not None}
    if TAUGHT not in shares:
        return ""
    others = [
        f"{words} it is {shares[name]:.0f} %"
        for name, words in ((LABELS_ONLY, "by labels only"), (UNTAUGHT, "untaught"))
        if name in shares
    ]
    beside = f"; {', '.join(others)}" if others else ""
    return f"The taught student and its teacher agree on {shares[TAUGHT]:.0f} % of next tokens{beside}."


def _labels(sequence: Sequence) -> Tensor:
    """The response tokens (rows,) that positions of a sequence predict; its first token is predicted by none."""
    return torch.tensor(
        [token for token, counts in zip(sequence.ids[1:], sequence.response[1:]) if counts], dtype=torch.int64
    )


def _figures(
    outputs: ModelOutputs, teacher: ModelOutputs | None, labels: Listed[Tensor], chunk_bytes: int
) -> list[Tensor]:
    """Six float64 columns (rows,): forward KL, reverse KL, agreement, cross-entropy, confidence, whether right."""
    size = outputs.head.weight.shape[0]
    if teacher is not None and teacher.head.weight.shape[0] != size:
        raise UserError(
            f"The teacher has {teacher.head.weight.shape[0]} tokens and the student {size}: choose models of one "
            "tokenizer."
        )
    if teacher is not None and [len(rows) for rows in teacher.rows] != [len(rows) for rows in outputs.rows]:
        raise UserError(
            "The teacher's outputs are of other sequences: give those for the sequences that the student reads."
        )
    truth, hidden = torch.cat(list(labels)), torch.cat(outputs.rows)
    taught = None if teacher is None else torch.cat(teacher.rows)
    step = max(1, chunk_bytes // (5 * 4 * size))
    parts = []
    for start in range(0, len(truth), step):
        there = slice(start, start + step)
        log_p = None if teacher is None or taught is None else _log_probs(taught[there], teacher.head)
        parts.append(_chunk(_log_probs(hidden[there], outputs.head), log_p, truth[there]))
    return [torch.cat(column) for column in zip(*parts)]


@torch.no_grad()
def _log_probs(hidden: Tensor, head: Head) -> Tensor:
    return project(hidden.to(head.weight.device), head).float().log_softmax(-1)


@torch.no_grad()
def _chunk(log_q: Tensor, log_p: Tensor | None, labels: Tensor) -> list[Tensor]:
    labels = labels.to(log_q.device)
    entropy = -log_q.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    confidence, likeliest = log_q.max(-1)
    missing = torch.full_like(entropy, torch.nan)
    columns = [missing, missing, missing]
    if log_p is not None:
        log_p = log_p.to(log_q.device)
        columns = [_kl(log_p, log_q), _kl(log_q, log_p), log_p.argmax(-1) == likeliest]
    return [column.double().cpu() for column in [*columns, entropy, confidence.exp(), likeliest == labels]]


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) (rows,); a token without mass under p counts nothing, one that only q excludes makes it infinite."""
    terms = (log_p - log_q).mul_(log_p.exp())
    return terms.masked_fill_(log_p == -torch.inf, 0.0).sum(-1)


def _per_token(figure: Listed[Tensor], counts: Listed[int]) -> Value:
    return ratio_of([float(rows.sum()) for rows in figure], counts)


def _calibration(confidence: Listed[Tensor], right: Listed[Tensor]) -> Value:
    """Σ_bins |Σ (right - confidence)| / tokens over bins of equal width; its error by the jackknife over sequences."""
    gaps, counts = torch.zeros(len(right), BINS, dtype=torch.float64), torch.zeros(len(right), dtype=torch.float64)
    for index, (sure, correct) in enumerate(zip(confidence, right)):
        bins = (sure * BINS).long().clamp(max=BINS - 1)
        gaps[index].index_add_(0, bins, correct - sure)
        counts[index] = len(sure)
    whole = float(gaps.sum(0).abs().sum() / counts.sum())
    number = int((counts > 0).sum())
    if number < 2:
        return Value(whole, None, number)
    gaps, counts = gaps[counts > 0], counts[counts > 0]
    without = (gaps.sum(0) - gaps).abs().sum(-1) / (counts.sum() - counts)
    spread = float(((without - without.mean()) ** 2).sum())
    return Value(whole, math.sqrt((number - 1) / number * spread), number)


@torch.no_grad()
def _speed(model: LanguageModel) -> tuple[Value, Value]:
    """Tokens a second of reading one prompt and of writing after it: medians, errors from the median deviation."""
    limit = int(model.causal.config.get_text_config().max_position_embeddings or PREFILL_TOKENS) - DECODED_TOKENS
    length = max(1, min(PREFILL_TOKENS, limit))
    ids = torch.arange(length, device=model.device).remainder(model.vocabulary).unsqueeze(0)
    prefill, decode = [], []
    with in_evaluation(model):
        for repeat in range(REPEATS + 1):
            begun = _now(model.device)
            token, cache = _read(model, ids, None)
            read = _now(model.device)
            for _ in range(DECODED_TOKENS):
                token, cache = _read(model, token, cache)
            written = _now(model.device)
            if repeat:  # the first time warms up
                prefill.append(length / (read - begun))
                decode.append(DECODED_TOKENS / (written - read))
    return _median(prefill), _median(decode)


def _read(model: LanguageModel, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
    step = model.causal.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
    return project(step.last_hidden_state[:, -1:], model.head).argmax(-1), step.past_key_values


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _median(values: list[float]) -> Value:
    middle = statistics.median(values)
    deviation = 1.4826 * statistics.median(abs(value - middle) for value in values)
    return Value(middle, 1.2533 * deviation / math.sqrt(len(values)), len(values))


def _setting(model: LanguageModel) -> str:
    kind = str(next(model.parameters()).dtype).removeprefix("torch.")
    if model.device.type == "cuda":
        return f"{torch.cuda.get_device_name(model.device)}, {kind}"
    threads = torch.get_num_threads()
    return f"{model.device.type}, {threads} thread{'' if threads == 1 else 's'}, {kind}"


def _scaled(value: Value, factor: float) -> Value:
    return Value(value.mean * factor, None if value.error is None else value.error * factor, value.count)
