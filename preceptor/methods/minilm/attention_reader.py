"""The queries, keys and values of one self-attention layer of a transformers model.

Only what the layer needs is run: the embeddings, the layers below it, and its own projections. Its attention, its
feed-forward part and the layers above are skipped.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from preceptor.data.sequences import Batch, Sequence, collate
from preceptor.errors import UserError
from preceptor.losses.attention_relations import Projections

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Layout:
    """Where an architecture keeps its parts.

    ``layers``: the list of layers in the base model; ``attention``: the self-attention in a layer; ``projections``: its
    query, key and value maps, or one fused map; ``norm``: the layer's norm before attention, "" where attention reads
    the layer's input; ``top``: the base model's parts above its last layer.
    """

    layers: str
    attention: str
    projections: tuple[str, ...]
    norm: str
    top: tuple[str, ...]
    causal: bool


_BERT = Layout("encoder.layer", "attention.self", ("query", "key", "value"), "", ("pooler",), causal=False)


_LLAMA = Layout("layers", "self_attn", ("q_proj", "k_proj", "v_proj"), "input_layernorm", ("norm",), causal=True)


_GPT2 = Layout("h", "attn", ("c_attn",), "ln_1", ("ln_f",), causal=True)


LAYOUTS: Mapping[str, Layout] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), _BERT),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text"), _LLAMA),
    "gpt2": _GPT2,
}


class SelfAttention(nn.Module):
    """Reads the projections of layer ``layer`` (1 is the lowest, 0 the last) of a transformers model, differentiably.

    The parameters that a loss on these projections can never reach (the layer's output projection, norms after
    attention and feed-forward part, every layer above, the model's final norm, pooler and head) are frozen here: they
    get no gradient, no weight decay and no optimiser state, and data parallelism needs no search for unused parameters.

    Attributes:
        model: the base model, without a language model's head.
        layer: the layer read, counted from 1.
        causal: positions see none after them.

    Raises:
        UserError: an architecture whose parts are not known here, or a layer that the model does not have.
    """

    def __init__(self, model: PreTrainedModel, layer: int = 0) -> None:
        super().__init__()
        self.model = cast("PreTrainedModel", model.base_model)
        self.config: Any = model.config
        kind: str = self.config.model_type
        if kind not in LAYOUTS:
            known = ", ".join(LAYOUTS)
            raise UserError(f'No way to read attention is known for "{kind}" models: choose one of {known}.')
        self.layout = LAYOUTS[kind]
        count: int = self.config.num_hidden_layers
        if not 0 <= layer <= count:
            raise UserError(f"Layer {layer} is not one of the model's {count}: choose 1 to {count}, or 0 for the last.")
        self.layer = layer or count
        self.causal = self.layout.causal
        reached = {id(parameter) for parameter in self._reached()}
        for parameter in self.model.parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in reached)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *, scored: bool = True) -> Projections:
        """Projections of tokens (B, T), padded on the right, with their mask (B, T); `project` after `below`."""
        return self.project(self.below(input_ids, attention_mask), scored=scored)

    def below(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The hidden states (B, T, D) that enter the layer: the last ones that a distilled student has learned."""
        options = {"use_cache": False} if self.causal else {}
        outputs = self._trunk()(input_ids=input_ids, attention_mask=attention_mask, **options)
        hidden: Tensor = outputs.last_hidden_state
        return hidden

    def project(self, hidden: Tensor, *, scored: bool = True) -> Projections:
        """Projections of the hidden states (B, T, D) that enter the layer.

        With ``scored``, queries and keys are as the attention scores see them: after rotary embedding where the model
        has one, and with a model's own score scale folded into the queries. Without it they are as projected, free of
        positions.
        """
        if self.layout.norm:
            hidden = self._part(self.layout.norm)(hidden)
        attention = self._part(self.layout.attention)
        query, key, value = self._project(attention, hidden)
        if hasattr(attention, "q_norm"):
            query, key = attention.q_norm(query), attention.k_norm(key)
        if not scored:
            return Projections(query, key, value)
        if hasattr(self.model, "rotary_emb"):
            query, key = self._rotate(query, key, hidden)
        width = query.shape[-1]
        return Projections(query * (getattr(attention, "scaling", width**-0.5) * math.sqrt(width)), key, value)

    @property
    def widths(self) -> tuple[int, int, int]:
        """Query heads, key and value heads, and the width of one."""
        config = self.config
        heads: int = config.num_attention_heads
        groups: int = getattr(config, "num_key_value_heads", None) or heads
        return heads, groups, getattr(config, "head_dim", None) or config.hidden_size // heads

    def _part(self, name: str) -> Any:
        layers: Any = self.model.get_submodule(self.layout.layers)
        return layers[self.layer - 1].get_submodule(name)

    def _trunk(self) -> nn.Module:
        """The base model cut below the layer: shallow copies, down to the list of layers, that share all weights."""
        trunk = _shallow(self.model)
        *path, last = self.layout.layers.split(".")
        holder = trunk
        for name in path:
            below = _shallow(getattr(holder, name))
            setattr(holder, name, below)
            holder = below
        setattr(holder, last, getattr(holder, last)[: self.layer - 1])
        for name in self.layout.top:
            setattr(trunk, name, None if name == "pooler" else nn.Identity())
        return trunk

    def _reached(self) -> Iterator[nn.Parameter]:
        yield from self._trunk().parameters()
        attention = self._part(self.layout.attention)
        parts = [getattr(attention, name) for name in self.layout.projections]
        parts += [getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
        for part in parts + ([self._part(self.layout.norm)] if self.layout.norm else []):
            yield from part.parameters()

    def _project(self, attention: Any, hidden: Tensor) -> list[Tensor]:
        maps = [getattr(attention, name)(hidden) for name in self.layout.projections]
        width = self.widths[2]
        parts = maps[0].chunk(3, dim=-1) if len(maps) == 1 else maps
        return [part.unflatten(-1, (-1, width)).transpose(1, 2) for part in parts]

    def _rotate(self, query: Tensor, key: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        kinds = getattr(self.config, "layer_types", None)
        kind = kinds[self.layer - 1] if kinds else "sliding_attention"
        window = getattr(self.config, "sliding_window", None) if kind == "sliding_attention" else None
        if window is not None and hidden.shape[1] > window:
            raise UserError(
                f"Layer {self.layer} sees a window of {window} tokens and a sequence has {hidden.shape[1]}: choose a "
                "layer with full attention, or a smaller max_length."
            )
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        by_kind = [kind] if self.config.model_type == "gemma3_text" else []
        rotary: Any = self.model.rotary_emb
        cos, sin = rotary(hidden, positions, *by_kind)
        return _turn(query, cos, sin), _turn(key, cos, sin)


def _shallow(module: nn.Module) -> nn.Module:
    clone = copy.copy(module)
    clone.__dict__["_modules"] = dict(module._modules)
    return clone


def _turn(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (Su et al., arXiv 2104.09864) of heads (B, H, T, d), half-split; cos and sin: (1, T, d)."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


class AttentionTeacher:
    """A teacher that is asked for its projections, without gradient.

    With ``remember`` every sequence passes through the layers below only once: the hidden states that enter the layer
    are kept, 4 * width bytes a token (float32), and only the layer's own projections are computed anew.
    """

    def __init__(self, teacher: SelfAttention, *, remember: bool = False) -> None:
        self.teacher = teacher.requires_grad_(False).eval()
        self.remember = remember
        self._partners: Mapping[tuple[int, ...], tuple[int, ...]] = {}
        self._kept: dict[tuple[int, ...], Tensor] = {}

    def confused(self, partners: Mapping[tuple[int, ...], tuple[int, ...]]) -> AttentionTeacher:
        """A control with the same memory, which answers a sequence with another's projections (ids to ids as long)."""
        control = AttentionTeacher(self.teacher, remember=True)
        control._partners, control._kept = partners, self._kept
        return control

    @torch.no_grad()
    def __call__(self, batch: Batch, *, scored: bool = True) -> Projections:
        """The projections of a batch, as `SelfAttention` gives them."""
        if not self.remember:
            return self.teacher.project(self.teacher.below(batch.input_ids, batch.attention_mask), scored=scored)
        asked = [self._partners.get(sequence.ids, sequence.ids) for sequence in batch.sequences()]
        missing = [Sequence(ids, (True,) * len(ids)) for ids in dict.fromkeys(asked) if ids not in self._kept]
        if missing:
            new = collate(missing, 0).to(batch.input_ids.device)
            hidden = self.teacher.below(new.input_ids, new.attention_mask)
            for sequence, row in zip(missing, hidden):
                self._kept[sequence.ids] = row[: len(sequence.ids)].clone()
        rows = nn.utils.rnn.pad_sequence([self._kept[ids] for ids in asked], batch_first=True)
        return self.teacher.project(rows, scored=scored)


def pair_up(sequences: Iterable[Sequence]) -> dict[tuple[int, ...], tuple[int, ...]]:
    """Each sequence's ids to those of the next one of equal length; the only one of its length keeps itself."""
    by_length: dict[int, list[tuple[int, ...]]] = {}
    for sequence in sequences:
        by_length.setdefault(len(sequence.ids), []).append(sequence.ids)
    return {ids: group[(place + 1) % len(group)] for group in by_length.values() for place, ids in enumerate(group)}
