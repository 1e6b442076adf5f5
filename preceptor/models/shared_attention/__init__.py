"""Language models in which several layers share one attention matrix (Rajabzadeh et al., 2024, arXiv 2409.14595).

``share`` makes one of a pretrained model; it saves, loads and generates as any transformers model does. ``import
preceptor`` is enough for ``AutoModelForCausalLM.from_pretrained`` to know the kind: nothing is imported for it before
transformers itself is (`announce`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

HOMES = {
    "transformers.models.auto.configuration_auto": "preceptor.models.shared_attention.config",
    "transformers.models.auto.modeling_auto": "preceptor.models.shared_attention.model",
}


"""transformers' modules that keep the list of models, and ours that add to it when they are imported."""


class Follow(Loader):
    """Loads a module as its own loader does, and then imports ours after it."""

    def __init__(self, loader: Loader, after: str) -> None:
        self.loader, self.after = loader, after

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the module's own loader does."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module, then import ours, unless that is what asked for the module."""
        self.loader.exec_module(module)
        if self.after not in sys.modules:
            import_module(self.after)


class Watch(MetaPathFinder):
    """Finds transformers' lists of models when somebody imports them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's own specification, with `Follow` around its loader; None for all other modules."""
        spec = PathFinder.find_spec(fullname, path) if fullname in HOMES else None
        if spec is not None and spec.loader is not None:
            spec.loader = Follow(spec.loader, HOMES[fullname])
        return spec


def announce() -> None:
    """Make models with shared attention known to transformers: now where it is imported already, else when it is."""
    for theirs, ours in HOMES.items():
        if theirs in sys.modules:
            import_module(ours)
    if not any(isinstance(finder, Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, Watch())
