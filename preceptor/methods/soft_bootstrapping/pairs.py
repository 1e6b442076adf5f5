"""The replies to learn from and those held out, and the teacher's targets for them."""

from __future__ import annotations

from collections.abc import Sequence as Listed
from pathlib import Path
from typing import TYPE_CHECKING

from preceptor.cache import CapturePlan, Wanted, capture
from preceptor.cache.header import Header
from preceptor.distillation.teachers import CachedTeacher, Teacher, answer_online
from preceptor.engine.run import Run
from preceptor.errors import UserError
from preceptor.methods.soft_bootstrapping.hints import Hinted, HintedPair, views
from preceptor.methods.soft_bootstrapping.rollouts import Tried
from preceptor.methods.soft_bootstrapping.selection import collect
from preceptor.models.language_model import LanguageModel
from preceptor.tasks.boxed import Verifier
from preceptor.tasks.records import Item

if TYPE_CHECKING:
    from preceptor.methods.soft_bootstrapping.recipe import Config


def gather(config: Config, teacher: LanguageModel, items: Listed[Item], verify: Verifier) -> list[Tried]:
    """The first phase: questions, rollouts and hinted replies, kept in the run's ``questions.jsonl``."""
    return collect(
        teacher,
        items,
        config.rolling,
        config.prompts,
        verify,
        wanted=config.pairs + config.held_out,
        seed=config.training.seed,
        path=Path(config.output) / "questions.jsonl",
    )


def lessons(config: Config, tried: Listed[Tried], teacher: LanguageModel) -> tuple[list[HintedPair], list[HintedPair]]:
    """The replies to learn from, at most ``pairs``, and those held out, in their two views."""
    kept = [one for one in tried if one.outcome == "kept"][: config.pairs + config.held_out]
    tokenizer, stop = teacher.tokenizer, teacher.stop_ids
    found = views(kept, config.prompts, tokenizer, max_length=config.max_length, stop=stop)
    return found[config.held_out :], found[: config.held_out]


def listen(config: Config, run: Run, teacher: LanguageModel, student: LanguageModel, shown: list[HintedPair]) -> Hinted:
    """The targets for hinted replies: from a cache, the student's own base, or the teacher itself."""
    source: Teacher = (
        _cached(config, run, teacher, shown) if config.cache else answer_online(run, teacher, student, config.student)
    )
    return Hinted(source, shown, student.pad_id)


def check_cache(config: Config) -> None:
    """Refuse the cache of another teacher, before anything is loaded.

    Raises:
        UserError: the folder ``config.cache`` holds one.
    """
    folder = Path(config.cache)
    if config.cache and (folder / "header.json").exists() and (other := Header.read(folder).teacher) != config.teacher:
        raise UserError(f"The cache {config.cache} is of the teacher {other}, not of {config.teacher}: choose another.")


def _cached(config: Config, run: Run, teacher: LanguageModel, shown: list[HintedPair]) -> Teacher:
    folder = Path(config.cache)
    plan = CapturePlan(Wanted(budget=200.0, k=2048), kind="hidden")
    with run.accelerator.main_process_first():
        kept = capture(
            teacher,
            [one.teacher for one in shown],
            folder,
            name=config.teacher,
            max_length=config.max_length,
            plan=plan,
        )
    return CachedTeacher(kept.to(run.device))
