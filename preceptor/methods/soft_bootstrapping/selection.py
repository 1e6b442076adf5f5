"""Selection: questions are tried until enough of them have a right and a wrong rollout and a verified hinted answer.

Every finished round of questions is a block of lines in ``questions.jsonl``, so that a run that was stopped goes on
with the next one. A round draws from its own random state, which follows from the seed and its first question: what is
drawn does not depend on where a run was stopped.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence as Listed
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch

from preceptor.engine.progress_bar import Bar
from preceptor.errors import UserError
from preceptor.files import writable
from preceptor.methods.soft_bootstrapping.hints import Prompts
from preceptor.methods.soft_bootstrapping.rollouts import MEANING, Rollout, Tried, judged, pair, roll_out, statistics
from preceptor.methods.soft_bootstrapping.sampling import write
from preceptor.models.language_model import LanguageModel
from preceptor.models.sampling import Sampling
from preceptor.report.table import Table
from preceptor.tasks.boxed import Verifier
from preceptor.tasks.records import Item


@dataclass(frozen=True)
class Rolling:
    """How rollouts and hinted replies are drawn."""

    copies: int = 4
    """K, rollouts of a question."""
    length: int = 512
    """Tokens of a rollout and of a hinted reply, at most."""
    temperature: float = 0.8
    """Of the rollouts."""
    hint_temperature: float = 0.4
    """Of the hinted replies."""
    top_k: int = 50
    """Only the k likeliest tokens are drawn; 0 draws from all."""
    round: int = 16
    """Questions that are tried together, and written to the disk together."""
    batch_size: int = 128
    """Answers that are written at a time."""

    def __post_init__(self) -> None:
        """Refuse what can give no pair."""
        if self.copies < 2:
            raise UserError(f"rolling.copies is {self.copies}: a right and a wrong rollout need at least 2.")
        if not 0 < self.temperature < math.inf:
            raise UserError(
                f"rolling.temperature is {self.temperature}: rollouts that differ, and mean something, need a number "
                "above 0; choose 0.8, for example."
            )
        for name, size in (("round", self.round), ("batch_size", self.batch_size), ("length", self.length)):
            if size < 1:
                raise UserError(f"rolling.{name} is {size}; it must be at least 1.")
        self.sampling(self.hint_temperature).check()

    def sampling(self, temperature: float) -> Sampling:
        """How tokens are drawn at a temperature."""
        return Sampling(self.length, temperature, self.top_k)


def collect(
    model: LanguageModel,
    items: Listed[Item],
    rolling: Rolling,
    prompts: Prompts,
    verify: Verifier,
    *,
    wanted: int,
    seed: int,
    path: Path,
) -> list[Tried]:
    """Try questions in their order until ``wanted`` are kept or none is left; those in the file are not tried again.

    Args:
        model: tutor and writer of hinted answers.
        items: the questions, each with its true answer.
        rolling: how answers are drawn.
        prompts: what the model reads.
        verify: reads and judges an answer.
        wanted: how many kept questions are enough.
        seed: of everything that is drawn; torch's own generators are left as they were.
        path: the file, JSON lines; made if absent.

    Raises:
        UserError: a question without a true answer, a file of other questions, or nothing can be written.
    """
    for item in items:
        if not item.truth.strip():
            raise UserError(f"The question {item.id} has no true answer to verify with: give one, or leave it out.")
    tried = _read(path, items, rolling)
    with writable(path.parent, path.name):
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut(path, len(tried))
    kept = sum(one.outcome == "kept" for one in tried)
    with Bar("rollouts") as bar, torch.random.fork_rng():
        for start in range(len(tried), len(items), rolling.round):
            if kept >= wanted:
                break
            torch.manual_seed(Random(f"{seed}/{start}").getrandbits(63))
            found = _try(model, items[start : start + rolling.round], rolling, prompts, verify, seed)
            with writable(path.parent, path.name):
                _append(path, found)
            tried += found
            kept += sum(one.outcome == "kept" for one in found)
            bar.show(kept, wanted, _progress(tried, len(items)))
    return tried


def enough(tried: Listed[Tried], least: int) -> None:
    """See that enough questions were kept to learn from.

    Raises:
        UserError: there are fewer; with all counts, and advice on what to change.
    """
    kept = sum(one.outcome == "kept" for one in tried)
    if kept < least:
        counted = statistics(tried)
        raise UserError(f"{kept} questions were kept, and {least} are needed at least ({counted}): {counted.advice()}.")


def statistics_table(tried: Listed[Tried]) -> Table:
    """What was kept and why, as a table: a row an outcome."""
    counted = statistics(tried)
    table = Table("What was kept of the questions, and why", ["questions", "share"], units={"share": "%"})
    for name, count in counted.outcomes.items():
        table.rows[name] = {"questions": count, "share": 100 * count / counted.questions}
    table.notes = [f"{name}: {what}." for name, what in MEANING.items() if counted.outcomes[name]]
    hinted = "" if counted.hinted is None else f" Of the hinted answers {100 * counted.hinted:.1f} % are right."
    table.notes.append(
        f"A rollout is right in {100 * counted.pass_rate.mean:.1f} % of the cases, gives an answer in "
        f"{100 * counted.boxed:.1f} %, and has {counted.tokens:.1f} tokens.{hinted}"
    )
    return table


def write_statistics(folder: Path, tried: Listed[Tried]) -> None:
    """Write ``selection.json``: all counts, and the table of them."""
    counted = dataclasses.asdict(statistics(tried)) | {"table": statistics_table(tried).json()}
    with writable(folder, "selection.json"):
        (folder / "selection.json").write_text(json.dumps(counted, indent=2) + "\n", encoding="utf-8")


def _try(
    model: LanguageModel, items: Listed[Item], rolling: Rolling, prompts: Prompts, verify: Verifier, seed: int
) -> list[Tried]:
    """Rollouts of a round of questions, and hinted replies to those of a mixed result."""
    drawn = roll_out(
        model,
        items,
        lambda item: prompts.ask(item, model.tokenizer),
        rolling.sampling(rolling.temperature),
        verify,
        copies=rolling.copies,
        batch_size=rolling.batch_size,
    )
    tried = [_paired(item, rollouts, seed) for item, rollouts in zip(items, drawn)]
    mixed = [one for one in tried if one.outcome == "kept"]
    asked = [prompts.show(one, model.tokenizer) for one in mixed]
    sampling = rolling.sampling(rolling.hint_temperature)
    replies = write(model, asked, sampling, batch_size=rolling.batch_size) if asked else []
    answers = (judged(one.item, ids, model, verify) for one, ids in zip(mixed, replies))
    settled = iter([_settled(one, answer, model.stop_ids, prompts) for one, answer in zip(mixed, answers)])
    return [next(settled) if one.outcome == "kept" else one for one in tried]  # by place: ids may be equal


def _paired(item: Item, rollouts: tuple[Rollout, ...], seed: int) -> Tried:
    places = pair(rollouts, Random(f"{seed}/{item.id}"))
    if isinstance(places, str):
        return Tried(item, rollouts, places)
    return Tried(item, rollouts, "kept", *places)


def _settled(one: Tried, reply: Rollout, stop: frozenset[int], prompts: Prompts) -> Tried:
    """A question with two exemplars and its hinted reply: whether it is kept."""
    ended = bool(reply.ids) and reply.ids[-1] in stop and bool(reply.text)
    outcome = one.outcome
    if not reply.correct:
        outcome = "hint failed" if ended else "hint unfinished"
    elif not ended:
        outcome = "hint unfinished"
    elif prompts.leak(reply.text, one.item.instruction) is not None:
        outcome = "hint leaked"
    return dataclasses.replace(one, outcome=outcome, reply=reply)


def _append(path: Path, found: Listed[Tried]) -> None:
    lines = "".join(json.dumps(dataclasses.asdict(one), ensure_ascii=False) + "\n" for one in found)
    with path.open("a", encoding="utf-8") as file:
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path, items: Listed[Item], rolling: Rolling) -> list[Tried]:
    """The whole rounds that are in the file; what a kill left of one is not."""
    if not path.exists():
        return []
    found: list[Tried] = []
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        try:
            found.append(_tried(json.loads(line)))
        except (ValueError, KeyError, TypeError):
            break
    for one, item in zip(found, items):
        if one.item != item:
            raise UserError(
                f"{path} holds the question {one.item.id} where {item.id} belongs: these are other questions; choose "
                "another folder."
            )
    whole = len(found) if len(found) >= len(items) else len(found) // rolling.round * rolling.round
    return found[: min(whole, len(items))]


def _tried(record: dict[str, Any]) -> Tried:
    rollouts = tuple(_rollout(one) for one in record["rollouts"])
    reply = None if record["reply"] is None else _rollout(record["reply"])
    item = Item(**{**record["item"], "image": None})
    return Tried(item, rollouts, record["outcome"], record["right"], record["wrong"], reply)


def _rollout(record: dict[str, Any]) -> Rollout:
    return Rollout(tuple(record["ids"]), record["text"], record["answer"], record["correct"])


def _cut(path: Path, lines: int) -> None:
    """Leave only the first lines of the file: those of whole rounds."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        for _ in range(lines):
            file.readline()
        file.truncate(file.tell())


def _progress(tried: Listed[Tried], questions: int) -> str:
    """What the bar shows of a selection: of how many questions those kept are, and how many rollouts were right."""
    shown = statistics(tried)
    return f"kept of {shown.questions} tried (at most {questions}), {100 * shown.pass_rate.mean:.0f} % right"
