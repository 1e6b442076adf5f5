"""Lessons: the text that a student reads, and the part of it that is kept apart for the exam.

Text comes from a file, a folder, the hub, or the embedded instructions. Where an answer is missing, or every answer is
wanted from the teacher (sequence-level distillation: Kim & Rush 2016, https://arxiv.org/abs/1606.07947), it is written
once. The ids that were generated are kept as they are: decoding and tokenising them again may give other ids.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from preceptor.data.embedded_prompts import make_prompts
from preceptor.data.encoding import encode, encode_prompt
from preceptor.data.readers import Example, Message, read
from preceptor.data.sequences import Sequence
from preceptor.data.tokenizer import Tokenizer
from preceptor.engine import distribution
from preceptor.engine.progress_bar import Bar
from preceptor.engine.settings import Training
from preceptor.errors import UserError
from preceptor.files import write_whole
from preceptor.models.language_model import LanguageModel

EMBEDDED = "prompts"


TOGETHER = 64  # answers that are written at a time


SHOWN = 6  # conversations of the exam whose answers a report shows


@dataclass(frozen=True)
class Text:
    """What a student reads."""

    source: str = EMBEDDED
    """A file (JSONL, JSON, Parquet), a folder, a hub data set, or ``prompts``: embedded instructions, answered by the
    teacher."""
    limit: int | None = None
    """At most so many examples; None reads all (of the embedded instructions: 512)."""
    held_out: int = 48
    """Examples kept apart for the exam; those of the embedded instructions have topics of their own."""
    answers: Literal["given", "missing", "teacher"] = "given"
    """Who answers: the text itself (``given``), the teacher where an answer is ``missing``, or the ``teacher`` always.
    The embedded instructions are answered by the teacher."""
    max_length: int = 512
    """Tokens of an example, prompt and answer together; what exceeds them is cut off."""
    answer_length: int = 64
    """Tokens of an answer that a model writes, at most."""

    def __post_init__(self) -> None:
        """Refuse sizes that leave nothing to read."""
        sizes = {"held_out": self.held_out, "answer_length": self.answer_length, "limit": self.limit}
        for name, value in sizes.items():
            if value is not None and value < 1:
                raise UserError(f"text.{name} is {value}; it must be at least 1.")


@dataclass(frozen=True)
class Lessons:
    """``train`` is learned from; ``exam`` is held out, and no prompt stands in both.

    ``questions``: the first conversations of the exam without their answers, to show samples of.
    """

    train: list[Sequence]
    exam: list[Sequence]
    questions: list[tuple[Message, ...]]


def prepare(text: Text, teacher: LanguageModel, *, seed: int, path: Path) -> Lessons:
    """The lessons of ``path`` (JSON Lines), or new ones, written there when all of them are made.

    Drawing answers leaves torch's random state as it was, so that a resumed run draws what the first one drew.

    Raises:
        UserError: the data has too few examples, no readable shape, or no response is left (see ``data.encode``); or
            the path holds lessons that were made by other settings.
    """
    made_by = json.dumps({"part": "settings", "text": asdict(text), "seed": seed})
    if path.exists():
        with path.open(encoding="utf-8") as file:
            first = file.readline().rstrip("\n")
        if first.startswith('{"part": "settings"') and first != made_by:
            raise UserError(f"{path} was made by other settings of the text or another seed: choose another folder.")
        return read_lessons(path)
    train, exam = _examples(text, seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        questions = [_without_answer(example).messages for example in exam if example.messages][:SHOWN]
        lessons = Lessons(_answered(train, teacher, text), _answered(exam, teacher, text), questions)
    _write(path, made_by, lessons, teacher.tokenizer)
    return lessons


def prepare_together(text: Text, teacher: LanguageModel, training: Training, folder: Path) -> Lessons:
    """The lessons of a run that is about to begin, in its folder: the main process makes them, the others wait.

    The teacher writes on the run's device, unless it will have to be split over several.

    Raises:
        UserError: as `prepare`.
    """
    accelerator = distribution.start(training.precision, training.trackers, folder)
    with accelerator.main_process_first():
        asked = teacher if training.shard else teacher.to(accelerator.device)
        return prepare(text, asked, seed=training.seed, path=folder / "lessons.jsonl")


def recorded(source: str) -> list[Sequence]:
    """All sequences of a ``lessons.jsonl``, as a run has written it; empty for any other data."""
    path = Path(source)
    if path.name != "lessons.jsonl" or not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        if not file.readline().startswith('{"part": '):
            return []
    lessons = read_lessons(path)
    return lessons.train + lessons.exam


def read_lessons(path: Path) -> Lessons:
    """The lessons that a run has written, whatever its settings of the text were."""
    lessons = Lessons([], [], [])
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        record = json.loads(line)
        if record["part"] == "question":
            lessons.questions.append(tuple(record["messages"]))
        if record["part"] not in ("train", "exam"):
            continue
        sequence = Sequence(tuple(record["ids"]), tuple(mark == "1" for mark in record["response"]))
        (lessons.train if record["part"] == "train" else lessons.exam).append(sequence)
    return lessons


def _examples(text: Text, seed: int) -> tuple[list[Example], list[Example]]:
    if text.source == EMBEDDED:
        prompts = (make_prompts(text.limit or 512, seed), make_prompts(text.held_out, seed, held_out=True))
        train, exam = ([Example(messages=prompt) for prompt in part] for part in prompts)
        return train, exam
    examples = read(text.source, limit=text.limit)
    random.Random(seed).shuffle(examples)
    exam, rest = examples[: text.held_out], examples[text.held_out :]
    asked = {_question(example) for example in exam}
    train = [example for example in rest if _question(example) not in asked]
    if not train:
        raise UserError(
            f"{text.source} has {len(examples)} examples and {text.held_out} are held out: give more data, or set "
            "text.held_out lower."
        )
    return train, exam


def _question(example: Example) -> str:
    asked = [message["content"] for message in example.messages if message["role"] != "assistant"]
    return "\n".join(asked) or example.text


def _answered(examples: list[Example], teacher: LanguageModel, text: Text) -> list[Sequence]:
    """Sequences of the examples: first those whose answers are given, then those that the teacher writes."""
    rewrite = text.answers == "teacher"
    asked = [_without_answer(example) if rewrite else example for example in examples]
    given = [example for example in asked if example.text or example.messages[-1]["role"] == "assistant"]
    missing = [example for example in asked if example.messages and example.messages[-1]["role"] != "assistant"]
    if missing and text.answers == "given" and text.source != EMBEDDED:
        raise UserError(
            f"{len(missing)} of {len(examples)} examples have no response to learn from: give data with answers, or "
            "let the teacher write those that are missing (--text.answers missing)."
        )
    sequences = encode(given, teacher.tokenizer, max_length=text.max_length) if given else []
    prompts = [encode_prompt(example.messages, teacher.tokenizer) for example in missing]
    prompts = [prompt for prompt in prompts if len(prompt) < text.max_length]
    if missing and not prompts:
        raise UserError(f"Every prompt has {text.max_length} tokens or more: raise text.max_length.")
    return sequences + _written(teacher, prompts, text)


def _written(teacher: LanguageModel, prompts: list[tuple[int, ...]], text: Text) -> list[Sequence]:
    """The teacher's answers, in the order of the prompts; written longest prompt first, with progress on stderr."""
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    parts = [order[start : start + TOGETHER] for start in range(0, len(order), TOGETHER)]
    written: dict[int, Sequence] = {}
    with Bar("the teacher's answers") as bar:
        for places in parts:
            if not written or bar.due:
                bar.show(len(written), len(prompts))
            asked = [prompts[place] for place in places]
            answers = write_answers(teacher, asked, text.answer_length, max_length=text.max_length)
            written |= zip(places, answers, strict=True)
    return [written[place] for place in range(len(prompts))]


def _without_answer(example: Example) -> Example:
    messages = example.messages
    return replace(example, messages=messages[:-1]) if messages and messages[-1]["role"] == "assistant" else example


def write_answers(
    model: LanguageModel, prompts: list[tuple[int, ...]], length: int, *, max_length: int, temperature: float = 1.0
) -> list[Sequence]:
    """Sequences of prompts, each with an answer drawn from ``model``, its end of turn kept.

    An answer has at most ``length`` tokens, and ``max_length`` with its prompt; a prompt as long as that is left out.
    """
    prompts = [prompt for prompt in prompts if len(prompt) < max_length]
    if not prompts:
        return []
    limits = [min(length, max_length - len(prompt)) for prompt in prompts]
    answers = model.generate(
        prompts, max_new_tokens=length, temperature=temperature, batch_size=TOGETHER, limits=limits
    )
    return [Sequence(p + a, (False,) * len(p) + (True,) * len(a)) for p, a in zip(prompts, answers)]


def _write(path: Path, made_by: str, lessons: Lessons, tokenizer: Tokenizer) -> None:
    lines: list[dict[str, Any]] = [{"part": "question", "messages": list(asked)} for asked in lessons.questions]
    for part, sequences in (("train", lessons.train), ("exam", lessons.exam)):
        for sequence in sequences:
            response = "".join("1" if answers else "0" for answers in sequence.response)
            text = tokenizer.decode(sequence.ids)
            lines.append({"part": part, "text": text, "ids": sequence.ids, "response": response})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, made_by + "\n" + "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
