"""A causal language model whose followers reuse the attention matrix of the layer below them that computes one.

The layers are the base model's own, with another attention in them; the loop over them is here, since they have more
in common than the base model's loop hands on.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModel, AutoModelForCausalLM
from transformers.utils.generic import can_return_tuple

from preceptor.errors import UserError
from preceptor.models.shared_attention.attention import Follower, ForwardState, Leader, padding_of, removed_parts
from preceptor.models.shared_attention.blocks import ALIGNED
from preceptor.models.shared_attention.cache import SharedCache
from preceptor.models.shared_attention.config import SharedAttentionConfig, check_architecture, window_of

STANDS_FOR = "preceptor_shared_cache"  # an attribute of a foreign cache


class SharedAttentionPreTrainedModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """What both models below tell transformers."""

    config_class = SharedAttentionConfig
    config: SharedAttentionConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = False
    # So that whoever asks for it by name gets this model; it computes its attention in its own way all the same.
    _supports_sdpa = True
    _skip_keys_device_placement = ["past_key_values"]


class SharedAttentionModel(SharedAttentionPreTrainedModel):
    """The model without its head. ``decoder``: the base model's parts, with `Leader` and `Follower` in its layers."""

    def __init__(self, config: SharedAttentionConfig) -> None:
        super().__init__(config)
        self.decoder = AutoModel.from_config(config.text_config)  # type: ignore[no-untyped-call]
        leaders = config.leaders()
        for index, layer in enumerate(self.decoder.layers):
            if index in leaders:
                layer.self_attn = Follower(layer.self_attn, index)
            else:
                window = window_of(config.text_config, index)
                layer.self_attn = Leader(layer.self_attn, index, window=window, followed=index in leaders.values())
        self._no_split_modules = self.decoder._no_split_modules
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        """The token embeddings."""
        embeddings: nn.Module = self.decoder.embed_tokens
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embeddings."""
        self.decoder.embed_tokens = value

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, past_key_values: Any = None, inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None, output_hidden_states: bool | None = None,
    ) -> BaseModelOutputWithPast:  # fmt: skip
        """The last hidden states (B, T, D), after the final norm.

        Args:
            input_ids: (B, T); or ``inputs_embeds``, (B, T, D), of the new tokens.
            attention_mask: (B, S) over remembered and new tokens, 0 at padding. Rows are one sequence each.
            position_ids: (B, T); by default they go on from what is remembered.
            past_key_values: a `SharedCache`, or an empty cache of another kind: one is made in its place, which the
                other hands on when it is given again.
            inputs_embeds: see ``input_ids``.
            use_cache: remember what is read, and return it; by default as the configuration says, not in training.
            output_hidden_states: also return what enters each layer, and last what leaves the final norm.

        Raises:
            UserError: neither or both of ids and embeddings, another model's cache, or a mask of another shape.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("Give either input_ids or inputs_embeds.")
        hidden: Tensor = self.decoder.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        wanted = self.config.text_config.use_cache and not self.training if use_cache is None else use_cache
        cache = self._cache(past_key_values, wanted)
        past = 0 if cache is None else cache.get_seq_length()
        new = hidden.shape[1]
        padding = padding_of(attention_mask, past + new, aligned=cache is not None and new < ALIGNED)
        if position_ids is None:
            position_ids = torch.arange(past, past + new, device=hidden.device).unsqueeze(0)
        reading, positions = ForwardState(new, past, padding, cache), self._rotations(hidden, position_ids)
        entered: list[Tensor] = []
        for index, layer in enumerate(self.decoder.layers):
            if output_hidden_states:
                entered.append(hidden)
            hidden = layer(hidden, position_embeddings=positions[index], sharing=reading)
        hidden = self.decoder.norm(hidden)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=cache,
            hidden_states=(*entered, hidden) if output_hidden_states else None,
        )

    def _cache(self, given: Any, wanted: bool) -> SharedCache | None:
        if given is not None and not isinstance(given, SharedCache):
            if given.get_seq_length() > 0:
                raise UserError("The cache given is another model's: start with past_key_values=None.")
            # A caller that goes on with its own cache, and not with the one returned, must not lose what was read.
            given = vars(given).setdefault(STANDS_FOR, self._new_cache())
        return self._new_cache() if given is None and wanted else given

    def _new_cache(self) -> SharedCache:
        return SharedCache(len(self.decoder.layers), tuple(self.config.followers))

    def _rotations(self, hidden: Tensor, position_ids: Tensor) -> list[tuple[Tensor, Tensor] | None]:
        """Cosines and sines for each layer; None for followers, which do not turn."""
        config, followers = self.config.text_config, set(self.config.followers)
        count = len(self.decoder.layers)
        kinds = config.layer_types if config.model_type == "gemma3_text" else [""] * count
        made: dict[str, tuple[Tensor, Tensor]] = {}
        for kind in {kinds[layer] for layer in range(count) if layer not in followers}:
            made[kind] = self.decoder.rotary_emb(hidden, position_ids, *([kind] if kind else []))
        return [None if layer in followers else made[kinds[layer]] for layer in range(count)]


class SharedAttentionForCausalLM(SharedAttentionPreTrainedModel, GenerationMixin):
    """The model with its head; ``generate`` as any other."""

    _tied_weights_keys = {"lm_head.weight": "model.decoder.embed_tokens.weight"}

    def __init__(self, config: SharedAttentionConfig) -> None:
        super().__init__(config)
        self.model = SharedAttentionModel(config)
        text = config.text_config
        self.vocab_size: int = text.vocab_size
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **settings: Any,  # of the loss, as transformers' Trainer hands them on
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V), and the loss where labels (B, T) are given; the rest as in `SharedAttentionModel`.

        ``logits_to_keep``: of how many of the last positions logits are made, or of which; 0: of all.

        Raises:
            UserError: ``output_attentions`` is true: the matrices exist in blocks only.
        """
        if output_attentions:
            raise UserError("A model with shared attention keeps no whole attention matrices: leave output_attentions.")
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        cap = self.config.text_config.to_dict().get("final_logit_softcapping")
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **settings)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )


def share(model: PreTrainedModel, followers: Sequence[int]) -> SharedAttentionForCausalLM:
    """A copy of a causal model in which these layers reuse the attention of the nearest layer below that computes it.

    What followers do without (queries, keys, their norms and biases) is left out; all other weights are copied, in
    their precision. See `removed` for the account.

    Raises:
        UserError: the architecture is not supported, or the followers do not fit it.
    """
    check_architecture(model.config.model_type)
    config = SharedAttentionConfig(text_config=type(model.config)(**model.config.to_dict()), followers=followers)
    dropped = tuple(f"{name}." for name, _ in removed(model, followers))
    state = {name: value.detach().clone() for name, value in model.state_dict().items() if not name.startswith(dropped)}
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    state = {_renamed(name): value for name, value in state.items()}
    shared = SharedAttentionForCausalLM.from_pretrained(None, config=config, state_dict=state, dtype=model.dtype)
    shared.generation_config = copy.deepcopy(model.generation_config)
    shared.train(model.training)
    return shared


def removed(model: PreTrainedModel, followers: Sequence[int]) -> list[tuple[str, int]]:
    """The parts of a base model that these followers do without: names, and how many parameters each has."""
    base: Any = model.base_model
    found = []
    for layer in sorted(followers):
        attention = base.layers[layer].self_attn
        for name in removed_parts(attention):
            size = sum(parameter.numel() for parameter in getattr(attention, name).parameters())
            found.append((f"{model.base_model_prefix}.layers.{layer}.self_attn.{name}", size))
    return found


def _renamed(name: str) -> str:
    return name.replace("model.", "model.decoder.", 1) if name.startswith("model.") else name


if SharedAttentionConfig not in AutoModelForCausalLM._model_mapping:
    AutoModel.register(SharedAttentionConfig, SharedAttentionModel)
    AutoModelForCausalLM.register(SharedAttentionConfig, SharedAttentionForCausalLM)
