"""Base models without a head: loaded, made fresh and smaller, and given plain text.

An encoder, or a causal model up to its last hidden states. What a recipe that learns from inner states needs.
"""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from preceptor.data.tokenizer import Tokenizer
from preceptor.errors import UserError
from preceptor.files import write_whole
from preceptor.models.loading import load, load_encoder
from preceptor.models.model_folder import write_model
from preceptor.models.student_spec import FreshSpec, parse_student

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SIZES = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "intermediate": "intermediate_size",
}


_CARD = """---
library_name: transformers
pipeline_tag: feature-extraction
tags:
- distillation
- preceptor
---

# {name}

A model without a head, taught with Preceptor.

| | |
| --- | --- |
{rows}
## Use

```python
from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

## Limits

What lies above the projections of the layer that was taught is as it was initialised: fine-tune the model, or read the
hidden states that enter that layer. A student inherits its teacher's mistakes and biases; the licences of teacher and
data apply to it.
"""


_RATES = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "attention_dropout",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
)


def load_body(name: str) -> tuple[PreTrainedModel, Tokenizer]:
    """An encoder, or a causal model without its head, and its tokenizer, by a name that ``load`` takes.

    Raises:
        UserError: no such model, a missing package, or pickled weights.
    """
    if name == "smollm2" or name.endswith(".gguf"):
        language = load(name)
        body: PreTrainedModel = language.causal.base_model  # type: ignore[assignment]
        return body, language.tokenizer
    return load_encoder(name)


def make_body(spec: str, like: PreTrainedModel, tokenizer: Tokenizer, *, dropout: float, seed: int) -> PreTrainedModel:
    """A student: a fresh model of the architecture of ``like``, or one by name, with the same tokens.

    Args:
        spec: ``fresh:layers=3,hidden=192[,heads=,kv_heads=,intermediate=]`` (as many heads as ``like`` and its
            proportion of feed-forward width), or a name that `load_body` takes.
        like: the teacher.
        tokenizer: the teacher's.
        dropout: every dropout rate of a fresh model.
        seed: of its weights; torch's own generator is left as it was.

    Raises:
        UserError: the specification does not fit, or the named model has another tokenizer.
    """
    from transformers import AutoModel

    fresh_spec = parse_student(spec)
    if not isinstance(fresh_spec, FreshSpec):
        model, own = load_body(spec)
        check_tokens(tokenizer, own)
        return model
    config = copy.deepcopy(like.config)
    for name, value in {**_fresh_sizes(fresh_spec, config), **dict.fromkeys(_RATES, dropout)}.items():
        if hasattr(config, name):
            setattr(config, name, value)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[-config.num_hidden_layers :]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh: PreTrainedModel = AutoModel.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    return fresh


def _fresh_sizes(spec: FreshSpec, config: Any) -> dict[str, int]:
    if spec.layers is None or spec.hidden is None:
        raise UserError(
            "A fresh student without layers or hidden is not complete: give "
            "fresh:layers=3,hidden=192[,heads=,kv_heads=,intermediate=]."
        )
    sizes: dict[str, int] = {_SIZES[key]: size for key, size in asdict(spec).items() if size is not None}
    heads = sizes.setdefault("num_attention_heads", config.num_attention_heads)
    groups = sizes.get("num_key_value_heads", getattr(config, "num_key_value_heads", None) or heads)
    if sizes["hidden_size"] % heads or heads % groups:
        raise UserError(
            f"A fresh student of hidden={spec.hidden} does not fit: hidden must be a multiple of the {heads} heads, "
            f"and these of the {groups} key and value heads."
        )
    width = sizes["hidden_size"] // heads
    if hasattr(config, "rope_parameters") and width % 2:
        raise UserError(
            f"A fresh student of hidden={spec.hidden} does not fit: rotary embedding needs heads of an even width, and "
            f"theirs is {width}."
        )
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    sizes.setdefault("intermediate_size", round(inner / config.hidden_size * sizes["hidden_size"]))
    return {**sizes, "head_dim": width}


def check_tokens(teacher: Any, student: Any) -> None:
    """Refuse two tokenizers unless every id means the same token in both."""
    first, second = ({number: token for token, number in one.get_vocab().items()} for one in (teacher, student))
    if first != second:
        number = min(key for key in first.keys() | second.keys() if first.get(key) != second.get(key))
        raise UserError(
            f"The tokenizers of teacher and student differ: token {number} is {first.get(number)!r} in the one and "
            f"{second.get(number)!r} in the other; choose a student with the teacher's tokenizer, or a fresh one."
        )


def save_body(folder: Path, model: PreTrainedModel, tokenizer: Tokenizer, card: dict[str, object]) -> None:
    """Write model, tokenizer and model card to a folder that ``AutoModel.from_pretrained`` loads; whole or not at all.

    Raises:
        UserError: the folder holds something else than a model, or cannot be written.
    """
    write_model(folder, model, tokenizer, adapter=None, card=card)
    size = sum(parameter.numel() for parameter in model.parameters())
    facts = {"architecture": type(model).__name__, "parameters": f"{size:,}", **card}
    rows = "".join(f"| {key} | {value} |\n" for key, value in facts.items())
    write_whole(folder / "README.md", _CARD.format(name=folder.name, rows=rows))
