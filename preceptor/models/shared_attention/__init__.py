"""Language models in which several layers share one attention matrix (Rajabzadeh et al., 2024, arXiv 2409.14595).

``share`` makes one from a pretrained model; it is saved, loaded and sampled like any transformers model. After ``import
preceptor``, ``AutoModelForCausalLM.from_pretrained`` knows this kind of model: `register_on_import` registers it when
transformers is imported, and imports nothing before.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder

TYPE_CHECKING = False  # type checkers take it as true; to import it from typing would take 25 ms
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

HOMES = {
    "transformers.models.auto.configuration_auto": "preceptor.models.shared_attention.config",
    "transformers.models.auto.modeling_auto": "preceptor.models.shared_attention.model",
}
"""transformers' modules that hold the lists of models, and our modules that register ours with them."""


class AutoModelFinder:
    """Finds transformers' lists of models on ``sys.meta_path``, to import our modules right after them."""

    @staticmethod
    def find_spec(fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The module's own specification, whose loader then imports our module; None for all other modules."""
        spec = PathFinder.find_spec(fullname, path) if fullname in HOMES else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            if HOMES[fullname] not in sys.modules:  # else our module is what imports theirs
                import_module(HOMES[fullname])

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_on_import() -> None:
    """Register models with shared attention with transformers: now if it is imported already, else on its import."""
    for theirs, ours in HOMES.items():
        if theirs in sys.modules:
            import_module(ours)
    if AutoModelFinder not in sys.meta_path:
        sys.meta_path.insert(0, AutoModelFinder)
