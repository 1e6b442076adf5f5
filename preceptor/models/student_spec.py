"""The student specification, such as ``teacher:layers=10`` or ``lora:rank=8,base=NAME``, read into typed records."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from preceptor.errors import UserError

FORMS = (
    "teacher:layers=10 (evenly, first and last kept), teacher:layers=0,3,7 (these), teacher:followers=5,6,7 (these "
    "share the attention of the layer below), "
    "fresh:layers=4,hidden=192[,heads=,kv_heads=,intermediate=], lora:rank=8,alpha=16[,dropout=,base=NAME], or a "
    "model's name or folder"
)


@dataclass(frozen=True)
class LayersSpec:
    """``teacher:layers=10`` or ``teacher:layers=0,3,7``. ``layers``: one number is a count, several are layers."""

    layers: tuple[int, ...]

    def kept(self, total: int) -> tuple[int, ...]:
        """The teacher's layers to keep, of ``total``; a count is spread evenly over them, first and last included.

        Raises:
            UserError: the teacher has no such layers, or they are not distinct and ascending.
        """
        if len(self.layers) == 1:
            count = self.layers[0]
            if not 1 <= count <= total:
                raise UserError(
                    f"The student is to have {count} layers, but the teacher has {total}: choose 1 to {total}."
                )
            return tuple(round(place * (total - 1) / max(1, count - 1)) for place in range(count))
        last, listed = max(self.layers), ",".join(map(str, self.layers))
        if last >= total:
            raise UserError(f"The student's layer {last} is out of range: the teacher has layers 0 to {total - 1}.")
        if any(later <= earlier for earlier, later in zip(self.layers, self.layers[1:])):
            raise UserError(f"The student's layers {listed} must be distinct and ascending.")
        return self.layers


@dataclass(frozen=True)
class FollowersSpec:
    """``teacher:followers=5,6,7``: the teacher, where these layers share the attention of a layer below."""

    followers: tuple[int, ...]


@dataclass(frozen=True)
class FreshSpec:
    """``fresh:layers=4,hidden=192``: the teacher's architecture with random weights; None follows the teacher."""

    layers: int | None = None
    hidden: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    intermediate: int | None = None


@dataclass(frozen=True)
class LoraSpec:
    """``lora:rank=8,alpha=16``: low-rank adapters on the teacher, or on the model ``base``."""

    rank: int
    alpha: int
    dropout: float
    base: str | None


@dataclass(frozen=True)
class ModelSpec:
    """Any model by its name or folder."""

    name: str


StudentSpec = LayersSpec | FollowersSpec | FreshSpec | LoraSpec | ModelSpec


def parse_student(spec: str) -> StudentSpec:
    """Read a student specification (see ``make_student`` for its forms); no model is loaded.

    Raises:
        UserError: it has none of the forms, or a value is out of range.
    """
    kind, _, rest = spec.partition(":")
    if kind == "teacher":
        match = re.fullmatch(r"(layers|followers)=(\d+(?:,\d+)*)", rest.replace(" ", ""))
        if match is None:
            raise UserError(f'"{spec}" is not a student: give {FORMS}.')
        numbers = tuple(int(number) for number in match[2].split(","))
        return LayersSpec(numbers) if match[1] == "layers" else FollowersSpec(numbers)
    if kind == "fresh":
        given = _settings(rest, spec, ("layers", "hidden", "heads", "kv_heads", "intermediate"))
        labels = {"hidden": "hidden width", "intermediate": "intermediate width"}
        return FreshSpec(**{name: _positive(value, labels.get(name, name)) for name, value in given.items()})
    if kind == "lora":
        given = _settings(rest, spec, ("rank", "alpha", "dropout", "base"))
        rank = _positive(given.get("rank", "8"), "rank")
        alpha = _positive(given.get("alpha", str(2 * rank)), "alpha")
        dropout = given.get("dropout", "0")
        if not re.fullmatch(r"0?\.\d+|0", dropout):
            raise UserError(f'The dropout in "{spec}" is {dropout}; it must lie in [0, 1).')
        return LoraSpec(rank, alpha, float(dropout), given.get("base"))
    if re.match(r"^[a-z]+:.*=", spec) and not Path(spec).exists():
        raise UserError(f'"{spec}" is not a student: give {FORMS}.')
    return ModelSpec(spec)


def _settings(rest: str, spec: str, names: tuple[str, ...]) -> dict[str, str]:
    pairs = [item.partition("=") for item in rest.split(",")]
    found = {name.strip(): value.strip() for name, _, value in pairs}
    if not all(found.values()) or not found.keys() <= set(names) or len(found) < len(pairs):
        raise UserError(f'"{spec}" is not a student: its settings are {", ".join(names)}; give {FORMS}.')
    return found


def _positive(value: str, name: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise UserError(f"The student's {name} is {value}; it must be a whole number of at least 1.")
    return int(value)
