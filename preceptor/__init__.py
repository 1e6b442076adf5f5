"""Preceptor teaches a student what a teacher knows, and measures what was learned.

The public names load on first use, so that ``import preceptor`` imports no torch.
"""

from __future__ import annotations

from importlib import import_module

from preceptor.models.shared_attention import register_on_import

TYPE_CHECKING = False  # type checkers take it as true; to import it from typing would take 25 ms
if TYPE_CHECKING:
    from preceptor.data.embedded_prompts import make_prompts
    from preceptor.data.encoding import encode
    from preceptor.data.readers import read
    from preceptor.data.sequences import collate
    from preceptor.distillation.teachers import CachedTeacher, FrozenTeacher, Teacher
    from preceptor.engine.run import Run
    from preceptor.engine.settings import Training
    from preceptor.errors import UserError
    from preceptor.losses.divergences import divergence
    from preceptor.models.language_model import LanguageModel
    from preceptor.models.loading import load
    from preceptor.models.student import make_student

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
    "preceptor.data.embedded_prompts": ("make_prompts",),
    "preceptor.data.encoding": ("encode",),
    "preceptor.data.readers": ("read",),
    "preceptor.data.sequences": ("collate",),
    "preceptor.errors": ("UserError",),
    "preceptor.losses.divergences": ("divergence",),
    "preceptor.models.language_model": ("LanguageModel",),
    "preceptor.models.loading": ("load",),
    "preceptor.models.student": ("make_student",),
    "preceptor.distillation.teachers": ("CachedTeacher", "FrozenTeacher", "Teacher"),
    "preceptor.engine.settings": ("Training",),
    "preceptor.engine.run": ("Run",),
}

register_on_import()


def __getattr__(name: str) -> object:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'preceptor' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
