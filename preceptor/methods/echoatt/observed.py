"""A language model whose objective also sees what leaves some of its layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn

from preceptor.data.sequences import Batch
from preceptor.knowledge import Head
from preceptor.models.language_model import LanguageModel

T = TypeVar("T")


class Observed(nn.Module):
    """``model``, and the numbers of the layers (from 0) whose outputs its objective is given."""

    def __init__(self, model: LanguageModel, layers: tuple[int, ...]) -> None:
        super().__init__()
        self.model, self.layers = model, layers

    def forward(self, batch: Batch, objective: Callable[[Tensor, Head, list[Tensor]], T]) -> T:
        """What ``objective(hidden, head, inner)`` makes of a batch that is padded on the right.

        ``hidden``: last hidden states (B, T, width). ``inner``: the outputs of the chosen layers, of the same shape;
        that of the model's last layer is taken after the final norm, as transformers hands it out.
        """
        outputs = self.model.causal.base_model(
            input_ids=batch.input_ids, use_cache=False, output_hidden_states=bool(self.layers)
        )
        inner = [outputs.hidden_states[layer + 1] for layer in self.layers]
        return objective(outputs.last_hidden_state, self.model.head, inner)
