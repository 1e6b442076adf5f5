"""Evaluate a student beside its teacher, beside its own untaught state, and beside a student taught by labels only.

    preceptor evaluate runs/gkd/run

The table goes to the terminal; ``result.json``, ``samples.json`` and the page ``report.html`` go beside the student.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from tyro.conf import Positional

from preceptor.data.embedded_prompts import make_prompts
from preceptor.data.encoding import encode, encode_prompt
from preceptor.data.readers import Message, read
from preceptor.data.sequences import Sequence
from preceptor.distillation.lessons import read_lessons, write_answers
from preceptor.errors import UserError
from preceptor.evaluation.examine import examine
from preceptor.evaluation.language import LABELS_ONLY, TAUGHT, UNTAUGHT
from preceptor.evaluation.result import _writable
from preceptor.files import write_whole
from preceptor.models.identity import same_tokenizer
from preceptor.models.language_model import LanguageModel
from preceptor.models.loading import load
from preceptor.models.student import make_student
from preceptor.report import method_of_run


@dataclass(frozen=True)
class Config:
    """What to evaluate, and on what."""

    student: Positional[str]
    """The student: a run's folder, a model's folder, a GGUF file, or a name."""
    teacher: str = ""
    """Its teacher, by name or folder; empty: the run's own, else ``smollm2``."""
    untaught: str = ""
    """The student before it was taught, as ``teacher:layers=10`` or a name; empty: the run's own, else no column."""
    labels_only: str = ""
    """A student that was taught by labels only, by name or folder; empty: no column."""
    data: str = ""
    """Held-out text with answers; empty: the run's own exam, else embedded prompts that the teacher answers."""
    limit: int = 32
    """Largest number of held-out examples."""
    max_length: int = 512
    """Tokens of an example, prompt and answer together."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of all models."""
    answer_length: int = 64
    """Largest number of tokens of an answer that a model writes."""
    shown: int = 4
    """Prompts whose answers are shown side by side."""
    seed: int = 0
    """Seed of all random numbers."""
    output: str = ""
    """Folder of the table and the page; empty: the student's run, else ``runs/evaluate/NAME``."""

    def __post_init__(self) -> None:
        """Refuse sizes that leave nothing to evaluate."""
        for name, size in (("limit", self.limit), ("answer_length", self.answer_length)):
            if size < 1:
                raise UserError(f"{name} is {size}; it must be at least 1.")
        if self.max_length < 2:
            raise UserError(f"max_length is {self.max_length}; it must be at least 2.")
        if self.shown < 0:
            raise UserError(f"shown is {self.shown}; it must be 0 or more.")


def main(config: Config) -> None:
    """Evaluate, print the table, and write ``result.json``, ``samples.json`` and ``report.html``.

    Raises:
        UserError: a model cannot be loaded, tokenizers differ, or the data holds no answer.
    """
    run, settings = _run_of(config.student)
    folder = _writable(Path(config.output) if config.output else run or _folder_named(config.student))
    named = config.teacher or _text(settings, "teacher") or "smollm2"
    if not config.teacher and named.startswith("fresh:"):
        raise UserError(f"The teacher of {run} ({named}) was made within that run: name another one with --teacher.")
    teacher = load(named, dtype=config.dtype)
    student = load(_weights(config.student, run), dtype=config.dtype)
    same_tokenizer(teacher, student)
    others = _others(config, settings, teacher)
    students = {name: others[name] for name in (UNTAUGHT, LABELS_ONLY) if name in others} | {TAUGHT: student}
    sequences, shown = _held_out(config, run, teacher)
    _name_method(run, folder)
    examine(
        folder,
        teacher,
        students,
        sequences,
        questions=shown,
        title=f"{config.student} beside its teacher",
        command=_command(config),
        answer_length=config.answer_length,
        seed=config.seed,
    )


def _name_method(run: Path | None, folder: Path) -> None:
    """Write the method of the run beside an evaluation that lies elsewhere, so that its page names it."""
    method = method_of_run(run) if run is not None and run != folder else ""
    if method:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "environment.json", json.dumps({"method": method, "run": str(run)}) + "\n")


def _command(config: Config) -> str:
    """The command that repeats an evaluation: the student, and every setting that is not the default."""
    words = ["preceptor", "evaluate", config.student]
    for setting in fields(config)[1:]:
        value = getattr(config, setting.name)
        words += [] if value == setting.default else [f"--{setting.name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def _run_of(student: str) -> tuple[Path | None, dict[str, Any]]:
    """The run's folder that a student lies in, if any, and its settings."""
    path = Path(student)
    if (path / "environment.json").is_file() and not (path / "student").is_dir():
        raise UserError(
            f"{path} is a run without a student: it has not ended (--resume goes on), or its method keeps none."
        )
    for folder in (path, path.parent):
        if (folder / "config.json").is_file() and (folder / "student").is_dir():
            try:
                settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(f"{folder / 'config.json'} is not JSON ({error}): is this a run's folder?") from error
            return folder, settings if isinstance(settings, dict) else {}
    return None, {}


def _weights(student: str, run: Path | None) -> str:
    return str(run / "student") if run is not None and Path(student) == run else student


def _folder_named(student: str) -> Path:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(student).stem or student).strip("-.") or "student"
    return Path("runs") / "evaluate" / name


def _text(settings: dict[str, Any], name: str) -> str:
    value = settings.get(name, "")
    return value if isinstance(value, str) else ""


def _others(config: Config, settings: dict[str, Any], teacher: LanguageModel) -> dict[str, LanguageModel]:
    seed = settings.get("training", {}).get("seed", config.seed)
    spec = config.untaught or _text(settings, "student")
    models: dict[str, LanguageModel] = {}
    if spec:
        models[UNTAUGHT] = make_student(spec, teacher, seed=seed).eval().to(next(teacher.parameters()).dtype)
    if config.labels_only:
        models[LABELS_ONLY] = load(config.labels_only, dtype=config.dtype)
    for model in models.values():
        same_tokenizer(teacher, model)
    return models


def _held_out(
    config: Config, run: Path | None, teacher: LanguageModel
) -> tuple[list[Sequence], list[tuple[Message, ...]]]:
    """The text of the evaluation, and the conversations whose answers are shown.

    It is the data given, else the run's own exam, else embedded prompts with answers that the teacher writes now.
    """
    lessons = None if run is None else run / "lessons.jsonl"
    if config.data:
        examples = read(config.data, limit=config.limit)
        turns = [example.messages for example in examples if example.messages]
        asked = [messages[:-1] if messages[-1]["role"] == "assistant" else messages for messages in turns]
        shown = [conversation for conversation in asked if conversation]
        return encode(examples, teacher.tokenizer, max_length=config.max_length), shown[: config.shown]
    if lessons is not None and lessons.is_file():
        prepared = read_lessons(lessons)
        return prepared.exam[: config.limit], prepared.questions[: config.shown]
    asked = make_prompts(config.limit, config.seed, held_out=True)
    ids = [encode_prompt(messages, teacher.tokenizer) for messages in asked]
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        written = write_answers(teacher, ids, config.answer_length, max_length=config.max_length)
    return written, asked[: config.shown]
