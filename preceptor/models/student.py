"""Students: a smaller copy of the teacher, a fresh smaller model, a LoRA on a base, or any model by name."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from preceptor.errors import UserError
from preceptor.models import embedded
from preceptor.models.language_model import LanguageModel
from preceptor.models.loading import load
from preceptor.models.student_spec import FollowersSpec, FreshSpec, LayersSpec, LoraSpec, StudentSpec, parse_student

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def make_student(spec: str | StudentSpec, teacher: LanguageModel, *, seed: int) -> LanguageModel:
    """A student by its specification, in float32 and in training mode; it shares no parameter with the teacher.

    - ``teacher:layers=10``: the teacher with 10 of its layers, evenly spaced, the first and the last among them.
    - ``teacher:layers=0,3,7``: the teacher with these layers, in ascending order.
    - ``teacher:followers=5,6,7``: the teacher, where these layers reuse the attention matrix of the nearest layer below
      that computes one (``preceptor.sharing``).
    - ``fresh:layers=4,hidden=192``: the teacher's architecture and tokenizer, smaller, random weights. ``heads``,
      ``kv_heads`` and ``intermediate`` follow the teacher's proportions when they are not given.
    - ``lora:rank=8,alpha=16``: low-rank adapters on all linear layers but the head, on a copy of the teacher or on
      ``base=NAME`` (Hu et al., 2021).
    - anything else: a model by name or folder, as ``load`` reads it.

    Args:
        spec: the specification, as text or already read.
        teacher: what is copied, or gives architecture and tokenizer.
        seed: decides random weights; torch's own generator is left as it was.

    Raises:
        UserError: the specification is not of these forms, or names layers that the teacher does not have.
    """
    wanted = parse_student(spec) if isinstance(spec, str) else spec
    with _seeded(seed):
        match wanted:
            case LayersSpec():
                total = int(teacher.causal.config.get_text_config().num_hidden_layers)
                student = _pruned(teacher, wanted.kept(total))
            case FollowersSpec(followers):
                student = sharing(teacher, list(followers))
            case FreshSpec():
                student = _fresh(teacher, wanted)
            case LoraSpec():
                student = _lora(teacher, wanted)
            case _:
                student = load(wanted.name)
    return student.train()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _plain(teacher: LanguageModel) -> PreTrainedModel:
    """The teacher's model without an adapter; an adapted one is merged in a copy."""
    if not teacher.adapted:
        return teacher.causal
    merged: PreTrainedModel = copy.deepcopy(teacher.model).merge_and_unload()  # type: ignore[operator]
    return merged


def _pruned(teacher: LanguageModel, keep: tuple[int, ...]) -> LanguageModel:
    source = _plain(teacher)
    _check_unshared(source.config)
    path = _stack(source)
    config = _with_layers(source.config, keep)
    state = dict(_renamed(source.state_dict(), path, {old: new for new, old in enumerate(keep)}))
    with embedded.without_progress_bars():
        model = type(source).from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)
    model.generation_config = copy.deepcopy(source.generation_config)
    return LanguageModel(model, copy.deepcopy(teacher.tokenizer))


def sharing(teacher: LanguageModel, followers: list[int]) -> LanguageModel:
    """The teacher, in float32 and in training mode, where these layers share attention (see ``share``).

    Raises:
        UserError: the architecture is not supported, or the followers do not fit it.
    """
    from preceptor.models.shared_attention.model import share

    with embedded.without_progress_bars():
        model = share(_plain(teacher), followers)
    return LanguageModel(model.to(torch.float32), copy.deepcopy(teacher.tokenizer)).train()  # type: ignore[arg-type]


def _check_unshared(config: Any) -> None:
    from preceptor.models.shared_attention.config import SharedAttentionConfig

    if config.model_type == SharedAttentionConfig.model_type:
        raise UserError(
            "The layers of a model with shared attention do not stand alone, so that none can be left out: choose "
            "layers of the model that it was made of, and let those share."
        )


def _stack(model: PreTrainedModel) -> str:
    """The name of the list of layers inside a model."""
    count = model.config.get_text_config().num_hidden_layers
    parts = ((name, part) for name, part in model.named_modules() if isinstance(part, nn.ModuleList))
    lists: list[str] = [name for name, part in parts if len(part) == count]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if len(outer) != 1:
        raise UserError(f"{type(model).__name__} has no single list of {count} layers to choose from: use `fresh:...`.")
    return outer[0]


def _renamed(state: Mapping[str, Tensor], path: str, places: dict[int, int]) -> Iterator[tuple[str, Tensor]]:
    """Clones of the tensors to keep, layers under their new numbers."""
    pattern = re.compile(rf"{re.escape(path)}\.(\d+)\.(.*)")
    for name, tensor in state.items():
        match = pattern.fullmatch(name)
        if match is None:
            yield name, tensor.detach().clone()
        elif int(match[1]) in places:
            yield f"{path}.{places[int(match[1])]}.{match[2]}", tensor.detach().clone()


def _with_layers(config: Any, keep: tuple[int, ...]) -> Any:
    """A copy of a configuration with these layers: their number, and every list that has an entry a layer."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    total = text.num_hidden_layers
    for name, value in text.to_dict().items():
        if isinstance(value, (list, tuple)) and len(value) == total and "layer" in name:
            setattr(text, name, [value[index % total] for index in keep])
    text.num_hidden_layers = len(keep)
    return config


def _fresh(teacher: LanguageModel, spec: FreshSpec) -> LanguageModel:
    from transformers import AutoModelForCausalLM

    source = teacher.causal
    _check_unshared(source.config)
    text = source.config.get_text_config()
    count = spec.layers or int(text.num_hidden_layers)
    config = _with_layers(source.config, tuple(range(count)))
    sizes = _sizes(text, spec)
    for name, value in sizes.items():
        setattr(config.get_text_config(), name, value)
    with embedded.without_progress_bars():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    model.generation_config = copy.deepcopy(source.generation_config)
    return LanguageModel(model, copy.deepcopy(teacher.tokenizer))


def _sizes(text: Any, spec: FreshSpec) -> dict[str, int]:
    """The widths of a fresh student; what is not given keeps the teacher's width of a head and its proportions."""
    known = text.to_dict()
    hidden = spec.hidden or int(text.hidden_size)
    width = known.get("head_dim") or text.hidden_size // text.num_attention_heads
    heads = spec.heads or max(1, hidden // width)
    grouped = known.get("num_key_value_heads") or text.num_attention_heads
    default = next(k for k in range(max(1, heads * grouped // text.num_attention_heads), 0, -1) if heads % k == 0)
    kv_heads = spec.kv_heads or default
    if hidden % heads or heads % kv_heads or (hidden // heads) % 2:
        raise UserError(
            f"A fresh student of hidden={hidden}, heads={heads}, kv_heads={kv_heads} does not fit: hidden must be an "
            "even multiple of heads, and heads a multiple of kv_heads."
        )
    sizes = {"hidden_size": hidden, "num_attention_heads": heads}
    if known.get("num_key_value_heads"):
        sizes["num_key_value_heads"] = kv_heads
    if known.get("head_dim"):
        sizes["head_dim"] = hidden // heads
    if known.get("intermediate_size"):
        inner = max(8, round(known["intermediate_size"] * hidden / text.hidden_size / 8) * 8)
        sizes["intermediate_size"] = spec.intermediate or inner
    return sizes


def _lora(teacher: LanguageModel, spec: LoraSpec) -> LanguageModel:
    from peft import LoraConfig, TaskType, get_peft_model

    if spec.base is not None:
        named = load(spec.base)
        base, tokenizer = named.causal, named.tokenizer
    else:
        source = _plain(teacher)
        base = (source if teacher.adapted else copy.deepcopy(source)).to(torch.float32)  # type: ignore[arg-type]
        tokenizer = copy.deepcopy(teacher.tokenizer)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules="all-linear",
        task_type=TaskType.CAUSAL_LM,
    )
    return LanguageModel(get_peft_model(base, config), tokenizer)
