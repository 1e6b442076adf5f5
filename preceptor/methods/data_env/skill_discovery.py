"""Skills found by a language model: names for single items, sorted into a few skills, and the label of every item.

Source: DataEnvGym (Khan et al., ICLR 2025, https://arxiv.org/abs/2410.06215), skill discovery.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from preceptor.errors import UserError
from preceptor.files import write_whole
from preceptor.language import Chat, Request
from preceptor.language.structured import object_schema
from preceptor.tasks.records import Item

TRIES = 3  # further questions after one whose answer is no allowed label


@dataclass(frozen=True)
class Skills:
    """Which skill an item belongs to, found once and kept, so that runs can be compared.

    ``categories``: the skills, each with the names of finer ones that it holds. ``labels``: the skill of each item
    seen, by its text.
    """

    categories: Mapping[str, tuple[str, ...]]
    labels: Mapping[str, str]

    @property
    def names(self) -> tuple[str, ...]:
        """The skills."""
        return tuple(self.categories)

    def save(self, path: Path) -> None:
        """Write the skills as JSON."""
        write_whole(path, json.dumps({"categories": dict(self.categories), "labels": dict(self.labels)}, indent=2))

    @classmethod
    def load(cls, path: Path) -> Skills:
        """Read what ``save`` wrote.

        Raises:
            UserError: the file is not there or is no such file.
        """
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
            return cls({name: tuple(finer) for name, finer in read["categories"].items()}, dict(read["labels"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} holds no skills ({error!r}): discover them anew.") from error


def skills_of(items: Sequence[Item]) -> Skills:
    """The skills that the items themselves name."""
    found: dict[str, dict[str, None]] = {}
    for item in items:
        found.setdefault(item.skill, {})[item.subskill] = None
    return Skills(
        {skill: tuple(names) for skill, names in found.items()}, {item.instruction: item.skill for item in items}
    )


def discover(items: Sequence[Item], chat: Chat, *, least: int = 0) -> Skills:
    """Skills found by a language model, after Metacognitive Capabilities of LLMs (Didolkar et al., 2024).

    A descriptive name is asked for each item; the names are sorted into exclusive, exhaustive categories (at least
    ``least``); an item whose name no category lists is put to the closed list of categories.

    Raises:
        UserError: an item cannot be labelled after ``TRIES`` further tries; the text lists the allowed labels.
    """
    named = [_one(chat, _name_request(item), "skill") for item in items]
    found = sorted({name for name in named if name})
    request = _sort_request(found, least)
    reply = chat.ask([request])[0]
    categories = {
        str(one["name"]): tuple(str(name) for name in one["skills"]) for one in (reply.data or {}).get("categories", [])
    }
    if not categories:
        raise UserError(f"The teacher sorted {len(found)} skills into no category ({reply.error}): try another model.")
    homes = {name: category for category, names in categories.items() for name in names}
    labels = {
        item.instruction: homes.get(name) or label(item, tuple(categories), chat)
        for item, name in zip(items, named, strict=True)
    }
    return Skills(categories, labels)


def label(item: Item, names: tuple[str, ...], chat: Chat) -> str:
    """The skill of an item, out of a closed list.

    Raises:
        UserError: no answer is on the list after ``TRIES`` further tries; the text lists the allowed labels.
    """
    answer = ""
    for attempt in range(TRIES + 1):
        answer = _one(chat, _label_request(item, names, answer, attempt), "skill")
        if answer in names:
            return answer
    raise UserError(
        f"The teacher calls the skill of {item.instruction[:60]!r} {answer!r}, which is not one of {', '.join(names)}: "
        "discover the skills anew, or with another model."
    )


def _one(chat: Chat, request: Request, key: str) -> str:
    reply = chat.ask([request])[0]
    return str((reply.data or {}).get(key, "")).strip()


def _name_request(item: Item) -> Request:
    text = (
        "Name the one skill that a student needs most to answer the question below. Give a short reason, and the name "
        f"in lower case with underscores, such as adding_fractions.\n\nQuestion: {item.instruction}"
    )
    schema = object_schema(reason={"type": "string"}, skill={"type": "string"})
    return Request(({"role": "user", "content": text},), schema=schema)


def _sort_request(names: Sequence[str], least: int) -> Request:
    text = (
        "Sort all the skills below into categories that will guide which practice data to collect. No skill may stand "
        f"in two categories, and none may be left out.{f' Make at least {least} categories.' if least else ''}\n\n"
        + "\n".join(names)
    )
    category = object_schema(name={"type": "string"}, skills={"type": "array", "items": {"type": "string"}})
    schema = object_schema(categories={"type": "array", "items": category})
    return Request(({"role": "user", "content": text},), max_tokens=2048, schema=schema)


def _label_request(item: Item, names: tuple[str, ...], before: str, attempt: int) -> Request:
    again = f" You answered {before!r} before, which is not on the list." if attempt else ""
    text = f"Choose the category of the question from this list: {', '.join(names)}.{again}\n\nQuestion: "
    schema = object_schema(skill={"type": "string"})
    return Request(({"role": "user", "content": text + item.instruction},), seed=attempt, schema=schema)
