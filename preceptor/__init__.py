"""Preceptor teaches a student what a teacher knows, and measures what was learned.

The public names load on first use, so that ``import preceptor`` imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from preceptor.sharing import announce

if TYPE_CHECKING:
    from preceptor.data import collate, encode, make_prompts, read
    from preceptor.errors import UserError
    from preceptor.losses.divergences import divergence
    from preceptor.models import LanguageModel, load
    from preceptor.settings import Training
    from preceptor.student import make_student
    from preceptor.teacher import CachedTeacher, FrozenTeacher, Teacher
    from preceptor.training import Run

__version__ = "0.1.0"

__all__ = [
    "CachedTeacher",
    "FrozenTeacher",
    "LanguageModel",
    "Run",
    "Teacher",
    "Training",
    "UserError",
    "collate",
    "divergence",
    "encode",
    "load",
    "make_prompts",
    "make_student",
    "read",
]

_HOMES = {
    "preceptor.data": ("collate", "encode", "make_prompts", "read"),
    "preceptor.errors": ("UserError",),
    "preceptor.losses.divergences": ("divergence",),
    "preceptor.models": ("LanguageModel", "load"),
    "preceptor.student": ("make_student",),
    "preceptor.teacher": ("CachedTeacher", "FrozenTeacher", "Teacher"),
    "preceptor.settings": ("Training",),
    "preceptor.training": ("Run",),
}

announce()


def __getattr__(name: str) -> object:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'preceptor' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
