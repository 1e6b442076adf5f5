"""The configuration of a model with shared attention: the base model's own, and the layers that follow.

It imports no torch, and makes itself known to transformers' ``AutoConfig`` (see the package).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers.configuration_utils import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

from preceptor.errors import UserError

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text")


"""The architectures whose attention can be shared, by transformers' names."""


class SharedAttentionConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """``text_config``: the base model's configuration. ``followers``: layers without an attention matrix of their own.

    Raises:
        UserError: the architecture is not supported, or the followers do not fit it (see `check_followers`).
    """

    model_type = "preceptor_shared_attention"
    sub_configs = {"text_config": AutoConfig}
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self, text_config: PretrainedConfig | dict[str, Any] | None = None, followers: Sequence[int] = (), **rest: Any
    ) -> None:
        if isinstance(text_config, dict):
            kind = text_config.get("model_type", "llama")
            check_architecture(kind)
            text_config = CONFIG_MAPPING[kind](**text_config)
        self.text_config = CONFIG_MAPPING["llama"]() if text_config is None else text_config
        check_architecture(self.text_config.model_type)
        check_followers(self.text_config, followers)
        self.followers = sorted(int(layer) for layer in followers)
        # transformers reads these two of the outer configuration.
        rest["tie_word_embeddings"] = self.text_config.tie_word_embeddings
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            rest.setdefault(name, getattr(self.text_config, name, None))
        super().__init__(**rest)

    def leaders(self) -> dict[int, int]:
        """Each follower's leader: the nearest layer below it that computes its attention."""
        return leaders_of(self.followers)


def leaders_of(followers: Sequence[int]) -> dict[int, int]:
    """Each follower's leader: the nearest layer below it that is no follower."""
    chosen = set(followers)
    found: dict[int, int] = {}
    for layer in sorted(chosen):
        found[layer] = found.get(layer - 1, layer - 1)
    return found


def check_architecture(kind: str) -> None:
    """Refuse an architecture whose attention is not known here.

    Raises:
        UserError: it is not one of `SUPPORTED`.
    """
    if kind not in SUPPORTED:
        raise UserError(f'The attention of "{kind}" models cannot be shared: choose a model of {", ".join(SUPPORTED)}.')


def window_of(config: PretrainedConfig, layer: int) -> int | None:
    """How many keys back a layer sees, itself included; None: all."""
    known = config.to_dict()
    kinds = known.get("layer_types")
    if kinds and kinds[layer] != "sliding_attention":
        return None
    window = known.get("sliding_window")
    return None if window is None else int(window)


def windows_of(config: PretrainedConfig) -> list[int | None]:
    """How many keys back each layer sees."""
    return [window_of(config, layer) for layer in range(int(config.num_hidden_layers))]


def check_followers(config: PretrainedConfig, followers: Sequence[int]) -> None:
    """Refuse followers that a model of this configuration cannot have.

    Raises:
        UserError: a layer is out of range, named twice, has no leader below it, or sees another window than its leader;
            or the model's attention has dropout, soft-capped scores or no causal order.
    """
    known, total = config.to_dict(), int(config.num_hidden_layers)
    wrong = [layer for layer in followers if not 0 <= layer < total]
    if wrong:
        raise UserError(f"The follower {wrong[0]} is out of range: the model has layers 0 to {total - 1}.")
    if len(set(followers)) < len(followers):
        twice = next(layer for layer in followers if list(followers).count(layer) > 1)
        raise UserError(f"The follower {twice} is named twice: name each layer once.")
    if 0 in followers:
        raise UserError("Layer 0 cannot follow: no layer below it computes attention; leave it out.")
    for layer, leader in leaders_of(followers).items():
        mine, other = window_of(config, layer), window_of(config, leader)
        if mine != other:
            raise UserError(
                f"Layer {layer} sees {_sight(mine)} and its leader, layer {leader}, {_sight(other)}: choose followers "
                "whose nearest computing layer below sees the same."
            )
    for name in ("attn_logit_softcapping", "use_bidirectional_attention", "attention_dropout"):
        if known.get(name):
            raise UserError(f"Attention with {name}={known[name]} cannot be shared: choose a model without it.")


def _sight(window: int | None) -> str:
    return "all keys" if window is None else f"a window of {window}"


if SharedAttentionConfig.model_type not in CONFIG_MAPPING:
    AutoConfig.register(SharedAttentionConfig.model_type, SharedAttentionConfig)
