"""How much memory a training needs, from the models' configurations alone: no weight is loaded or allocated.

The models are built of fake tensors, which have shapes and no data. What autograd keeps for the backward pass is
counted by running the student's forward on them at batch sizes 1 and 2: the rest is a straight line in the batch. In
bytes, with P the student's parameters, P' those that learn, Q the teacher's, and tokens = batch × length:

    student      4 P                        gradients    4 P'
    optimizer    8 P' (adam, adamw), 4 P' (sgd)
    activations  kept(1) + (batch - 1) (kept(2) - kept(1))
    teacher      Q × bytes of its precision
    loss         256 MiB of chunks + 8 × tokens × width, for the hidden states' gradient
    slack        a third of gradients, activations and loss: what allocators keep of memory that was given back
    process      what this process holds already: Python, torch, transformers

Their sum is the estimate; tests/test_doctor.py holds it to a measured peak.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from preceptor.data.tokenizer import Tokenizer
from preceptor.errors import UserError
from preceptor.models import embedded
from preceptor.models.language_model import LanguageModel
from preceptor.models.student import make_student
from preceptor.models.student_spec import FollowersSpec, FreshSpec, LayersSpec, LoraSpec, StudentSpec, parse_student

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LOSS_BYTES = 256 << 20


STATES = {"adamw": 8, "adam": 8, "sgd": 4}


WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Need:
    """What a training needs: ``parts`` in bytes by name, and the parameters of ``teacher`` and ``student``."""

    parts: dict[str, int]
    teacher: int
    student: int
    learning: int

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.parts.values())


class LowRank(nn.Module):
    """A linear layer with a low-rank term beside it, of the shapes that LoRA gives it (Hu et al., 2021, eq. 3)."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear
        self.down = nn.Linear(linear.in_features, rank, bias=False)
        self.up = nn.Linear(rank, linear.out_features, bias=False)

    def forward(self, value: Tensor) -> Tensor:
        """The layer's output and the term's, (..., out_features)."""
        term: Tensor = self.linear(value) + self.up(self.down(value))
        return term


class Vocabulary:
    """Stands for a tokenizer where only the number of tokens matters."""

    chat_template: str | None = None
    eos_token_id = pad_token_id = 0

    def __init__(self, size: int) -> None:
        self.size = size

    def get_vocab(self) -> dict[str, int]:
        """Names that mean nothing, one an id."""
        return {str(index): index for index in range(self.size)}


def memory_needed(
    teacher: str,
    student: str,
    *,
    batch: int,
    length: int,
    precision: Literal["fp32", "bf16"] = "fp32",
    teacher_dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw",
) -> Need:
    """The memory of one process that trains ``student`` (as ``make_student`` reads it) with ``teacher`` beside it.

    Args:
        teacher: a language model's name, as ``load`` reads it; only its configuration is read.
        student: the student's specification.
        batch: examples of one micro-batch.
        length: tokens of an example.
        precision: of the student's forward pass; its weights stay in float32.
        teacher_dtype: of the teacher's weights.
        optimizer: decides how many states a learning parameter has.

    Raises:
        UserError: a size is not positive, a configuration cannot be read, or the student's form is not known.
    """
    if batch < 1 or length < 1:
        raise UserError(f"The batch is {batch} examples of {length} tokens: both must be at least 1.")
    config, spec = read_config(teacher), parse_student(student)
    with FakeTensorMode(allow_non_fake_inputs=True):
        large = _build(config)
        small = _shape_of(spec, large)
        weights = sum(parameter.numel() for parameter in small.parameters())
        learning = sum(parameter.numel() for parameter in small.parameters() if parameter.requires_grad)
        beside = 0 if isinstance(spec, LoraSpec) and spec.base is None else _count(large)
        one = _kept(small, 1, length, precision)
        more = _kept(small, 2, length, precision) - one if batch > 1 else 0
    parts = {
        "student": 4 * weights,
        "gradients": 4 * learning,
        "optimizer": STATES[optimizer] * learning,
        "activations": one + (batch - 1) * more,
        "teacher": WIDTHS[teacher_dtype] * beside,
        "loss": LOSS_BYTES + 8 * batch * length * small.width,
    }
    parts["slack"] = (parts["gradients"] + parts["activations"] + parts["loss"]) // 3
    parts["process"] = resident()
    return Need(parts, teacher=_count(large), student=weights, learning=learning)


def read_config(name: str) -> PretrainedConfig:
    """A language model's configuration, without its weights.

    Raises:
        UserError: there is no such model, or it cannot be read.
    """
    from transformers import AutoConfig

    folder, extra = name, dict[str, str]()
    if name == embedded.LANGUAGE_MODEL[0] or name.endswith(".gguf"):
        path = embedded.find(embedded.LANGUAGE_MODEL) if name == embedded.LANGUAGE_MODEL[0] else Path(name)
        kept = sorted(embedded.cache_folder().glob(f"{path.stem}-*/config.json"))
        folder, extra = (str(kept[0].parent), {}) if kept else (str(path.parent), {"gguf_file": path.name})
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, **extra)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"No configuration of '{name}' can be read ({reason}): give a folder or a hub name.") from None
    return config


def resident() -> int:
    """Bytes of memory that this process holds now (its peak, where the system reports no more)."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[1])
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    import os

    return pages * os.sysconf("SC_PAGE_SIZE")


def _build(config: PretrainedConfig) -> LanguageModel:
    from transformers import AutoModelForCausalLM

    size = int(config.get_text_config().vocab_size)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    return LanguageModel(model, cast("Tokenizer", Vocabulary(size)))  # nothing is encoded here


def _shape_of(spec: StudentSpec, teacher: LanguageModel) -> LanguageModel:
    """A model with the shapes of the student: a pruned copy has those of a fresh one with as many layers."""
    from preceptor.models.shared_attention.config import SharedAttentionConfig

    match spec:
        case FollowersSpec(followers):
            return _build(SharedAttentionConfig(text_config=teacher.causal.config, followers=followers))
        case LayersSpec():
            total = int(teacher.causal.config.get_text_config().num_hidden_layers)
            return make_student(FreshSpec(layers=len(spec.kept(total))), teacher, seed=0)
        case FreshSpec():
            return make_student(spec, teacher, seed=0)
        case LoraSpec():
            return _adapted(spec, teacher)
        case _:
            return _build(read_config(spec.name))


def _adapted(spec: LoraSpec, teacher: LanguageModel) -> LanguageModel:
    base = _build(read_config(spec.base) if spec.base else teacher.causal.config).requires_grad_(False)
    head = base.causal.get_output_embeddings()  # type: ignore[no-untyped-call]
    for parent in list(base.modules()):
        for name, part in list(parent.named_children()):
            if isinstance(part, nn.Linear) and part is not head:
                setattr(parent, name, LowRank(part, spec.rank))
    return base


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _kept(student: LanguageModel, batch: int, length: int, precision: str) -> int:
    """Bytes that autograd keeps from a forward pass, parameters not counted."""
    storages: dict[int, tuple[int, Any]] = {}
    with _watched(storages), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        ids = torch.zeros(batch, length, dtype=torch.long)
        student.causal.base_model(input_ids=ids, use_cache=False)
    for parameter in student.parameters():
        storages.pop(_storage(parameter), None)
    return sum(size for size, _ in storages.values())


@contextmanager
def _watched(storages: dict[int, tuple[int, Any]]) -> Iterator[None]:
    """Writes down each storage once; the tensor is held with it, so that no other takes its place meanwhile."""

    def keep(tensor: Tensor) -> Tensor:
        storages[_storage(tensor)] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
