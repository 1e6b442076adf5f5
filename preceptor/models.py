"""Language models and encoders: loaded, run up to the head, sampled from, and saved.

``LanguageModel`` wraps any transformers causal model. Its forward stops at the last hidden states; the output head is
handed to the loss as a ``Head``, so that no (tokens, vocabulary) matrix is ever made.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from preceptor import embedded
from preceptor.errors import UserError
from preceptor.generation import Prefix, Sampling, sample
from preceptor.knowledge import Head
from preceptor.saving import write_model

if TYPE_CHECKING:
    from preceptor.data import Batch

T = TypeVar("T")

DTYPES = ("float32", "bfloat16", "float16")


class LanguageModel(nn.Module):
    """A causal model with its tokenizer.

    ``model``: the transformers model, or the PEFT model around it. ``tokenizer``: its tokenizer. ``vocabulary``: how
    many ids the tokenizer has; rows of the head beyond it are padding and are sliced off wherever logits are made.

    Raises:
        UserError: the tokenizer has more ids than the head has rows, or the model has no output head, or no cache to
            write with.
    """

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.vocabulary = 1 + max(tokenizer.get_vocab().values())
        self.scale, self.softcap = _head_facts(self.causal.config.get_text_config().to_dict())
        output: Any = self.causal.get_output_embeddings()  # type: ignore[no-untyped-call]
        if output is None:
            raise UserError(f"{type(self.causal).__name__} has no output head: give a causal language model.")
        if "past_key_values" not in inspect.signature(self.causal.base_model.forward).parameters:
            raise UserError(
                f"{type(self.causal).__name__} cannot write here, since its forward takes no past_key_values: give a "
                "causal language model with attention."
            )
        self.rows = int(output.weight.shape[0])
        if self.rows < self.vocabulary:
            raise UserError(
                f"The tokenizer has {self.vocabulary} ids but the model's head only {self.rows} rows: use the "
                "tokenizer that belongs to the model, or resize its embeddings."
            )

    @property
    def causal(self) -> PreTrainedModel:
        """The transformers model itself, under a PEFT wrapper where there is one."""
        inner = self.model
        return inner if isinstance(inner, PreTrainedModel) else inner.get_base_model()  # type: ignore[operator]

    @property
    def adapted(self) -> bool:
        """Whether the model carries an adapter (LoRA)."""
        return not isinstance(self.model, PreTrainedModel)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.model.parameters()).device

    @property
    def width(self) -> int:
        """The width of the hidden states."""
        return int(self.causal.config.get_text_config().hidden_size)

    @property
    def pad_id(self) -> int:
        """The id to pad with. It may equal the end-of-turn id: padding is told by lengths, never by its id."""
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0

    @property
    def head(self) -> Head:
        """The output head as it is now, without padded rows; under FSDP, read it inside the forward."""
        output: Any = self.causal.get_output_embeddings()  # type: ignore[no-untyped-call]
        weight: Tensor = output.weight
        bias: Tensor | None = output.bias if isinstance(output, nn.Linear) else None
        if self.rows > self.vocabulary:
            weight = weight[: self.vocabulary]
            bias = None if bias is None else bias[: self.vocabulary]
        return Head(weight=weight, bias=bias, scale=self.scale, softcap=self.softcap)

    @overload
    def forward(self, batch: Batch) -> Tensor: ...

    @overload
    def forward(self, batch: Batch, objective: Callable[[Tensor, Head], T]) -> T: ...

    @overload
    def forward(self, batch: Prefix) -> tuple[Tensor, Any]: ...

    def forward(
        self, batch: Batch | Prefix, objective: Callable[[Tensor, Head], T] | None = None
    ) -> Tensor | T | tuple[Tensor, Any]:
        """The last hidden states (B, T, width), after the final norm, or what the objective makes of them.

        ``objective(hidden, head)`` is evaluated inside this forward, so that DDP sees the loss's graph and FSDP has the
        head gathered. Batches are padded on the right and attention is causal: no real position sees padding, so no
        mask is passed and attention keeps its fast causal path. A ``Prefix`` (while sampling) gives the logits after
        it, and its cache.
        """
        if isinstance(batch, Prefix):
            return self._continue(batch)
        hidden: Tensor = self.causal.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        return hidden if objective is None else objective(hidden, self.head)

    def generate(
        self,
        prompts: list[tuple[int, ...]],
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        batch_size: int = 32,
        limits: Sequence[int] | None = None,
    ) -> list[tuple[int, ...]]:
        """Continue every prompt: the new ids only, with the end-of-turn token kept. Temperature 0 is greedy.

        ``limits``: the most tokens for each prompt, at least 1, in place of ``max_new_tokens``.

        Draws come from torch's global generator. Exactly the model's distribution at that temperature is sampled: the
        checkpoint's own generation settings (repetition penalty, top-p) are not applied, except its stop tokens. One
        sharded by FSDP is gathered whole on each process meanwhile, so that processes may sample different lengths.

        Raises:
            UserError: a setting is out of its interval, or a prompt is empty.
        """
        sampling = Sampling(max_new_tokens, temperature, top_k, top_p)
        with torch.no_grad(), in_evaluation(self), gathered(self):
            return sample(
                self, prompts, sampling, stop=self.stop_ids, batch_size=batch_size, device=self.device, limits=limits
            )

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end a response: those of the generation settings and the tokenizer's end-of-sequence token."""
        settings = self.causal.generation_config
        ends = settings.eos_token_id if settings is not None else None
        listed = list(ends) if isinstance(ends, (list, tuple)) else [ends]
        return frozenset(int(token) for token in [*listed, self.tokenizer.eos_token_id] if token is not None)

    def _continue(self, prefix: Prefix) -> tuple[Tensor, Any]:
        told = self.causal.base_model(
            input_ids=prefix.ids,
            attention_mask=prefix.mask,
            position_ids=prefix.positions,
            past_key_values=prefix.cache,
            use_cache=True,
        )
        return project(told.last_hidden_state[:, -1], self.head), told.past_key_values

    def save(
        self,
        folder: str | Path,
        *,
        card: Mapping[str, object] | None = None,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write the model, its tokenizer and a model card; ``AutoModelForCausalLM.from_pretrained`` loads the folder.

        A LoRA student is written merged (a copy is merged, so this takes the model's memory once more), with the
        adapter alone in ``adapter/``. The folder appears whole or not at all; an older model there is replaced.

        Args:
            folder: where to write.
            card: what the model card states of how the model was made, in the order given ("teacher": ..., ...).
            state: this module's whole state, where its own tensors are sharded (``Run.state_dict()``).

        Raises:
            UserError: the folder holds something else than a model, or cannot be written (no permission, disk full).
        """
        facts = card or {}
        inner = None if state is None else {name.removeprefix("model."): value for name, value in state.items()}
        if not self.adapted:
            write_model(Path(folder), self.causal, self.tokenizer, card=facts, state=inner)
            return
        adapter: Any = self.model if inner is None else self._whole(inner)
        merged = copy.deepcopy(adapter).merge_and_unload()
        write_model(Path(folder), merged, self.tokenizer, card=facts, adapter=adapter)

    def _whole(self, state: Mapping[str, Tensor]) -> nn.Module:
        """An unsharded copy of an adapted model with this state."""
        from peft import get_peft_model

        base = AutoModelForCausalLM.from_config(self.causal.config)  # type: ignore[no-untyped-call]
        copied: nn.Module = get_peft_model(base, self.model.peft_config["default"])  # type: ignore[index, arg-type]
        copied.load_state_dict(state)
        return copied


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Every FSDP unit of a module whole inside; sharded again after.

    From then on units inside the module are sharded after each forward, and what the module holds itself (embeddings
    and head) after each backward, which is FSDP's own default.
    """
    units = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(unit is not module, recurse=False)
            unit.reshard()


def project(hidden: Tensor, head: Head) -> Tensor:
    """Logits (..., vocabulary) of hidden states (..., width) under a head: softcap(scale * (h W^T + b))."""
    logits = nn.functional.linear(hidden, head.weight, head.bias)
    if head.scale != 1.0:
        logits = logits * head.scale
    return logits if head.softcap is None else torch.tanh(logits / head.softcap) * head.softcap


@contextmanager
def in_evaluation(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every submodule's own mode is restored after."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def load(name: str, *, dtype: str = "float32") -> LanguageModel:
    """A causal language model by name.

    Args:
        name: ``smollm2`` (embedded, no network), a folder with safetensors, a ``.gguf`` file, or a name on the hub.
        dtype: ``float32``, ``bfloat16`` or ``float16``, of the parameters.

    Raises:
        UserError: no such model, a missing package, pickled weights, or an unknown dtype.
    """
    if dtype not in DTYPES:
        raise UserError(f'The dtype "{dtype}" is not one of {", ".join(DTYPES)}.')
    precision: torch.dtype = getattr(torch, dtype)
    path = Path(name)
    if name == embedded.LANGUAGE_MODEL[0]:
        model, tokenizer = embedded.load_gguf(embedded.find(embedded.LANGUAGE_MODEL), precision)
    elif path.suffix == ".gguf" and path.is_file():
        model, tokenizer = embedded.load_gguf(path, precision)
    else:
        model, tokenizer = _from_pretrained(AutoModelForCausalLM, name, precision)
    loaded = LanguageModel(model, tokenizer).eval()
    _check_head(loaded, name)
    return loaded


def load_encoder(name: str) -> tuple[PreTrainedModel, Any]:
    """An encoder and its tokenizer: ``minilm-l6`` (embedded, no network), a folder with safetensors, or a hub name.

    Raises:
        UserError: no such model, a missing package, or pickled weights.
    """
    if name == embedded.ENCODER[0]:
        name = str(embedded.find(embedded.ENCODER))
    model, tokenizer = _from_pretrained(AutoModel, name, torch.float32)
    return model.eval(), tokenizer  # type: ignore[no-untyped-call]


def _from_pretrained(kind: Any, name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, Any]:
    path = Path(name)
    local = path.is_dir()
    if local:
        _check_folder(path)
    elif path.exists() or name.startswith((".", "/", "~")) or path.suffix in (".gguf", ".bin", ".pt", ".pth"):
        what = "is a single file; give the folder that holds it" if path.exists() else "does not exist"
        raise UserError(f"The model {name} {what} (a folder with safetensors, a .gguf file, or a hub name).")
    try:
        with embedded.without_progress_bars():
            model = kind.from_pretrained(name, dtype=dtype, local_files_only=local, use_safetensors=True)
            tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise UserError(
            f'The model "{name}" cannot be loaded ({reason}): give a folder with safetensors and a tokenizer, a .gguf '
            f'file, a name on the hub, or an embedded one ("{embedded.LANGUAGE_MODEL[0]}", "{embedded.ENCODER[0]}").'
        ) from error
    return model, tokenizer


def _check_folder(path: Path) -> None:
    if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
        raise UserError(f"{path} holds an adapter only: give the folder of the merged model.")
    if not (path / "config.json").exists():
        raise UserError(f"{path} is not a model folder: it has no config.json.")
    if any(path.glob("*.safetensors")):
        return
    pickled = sorted(file.name for ending in ("bin", "pt", "pth") for file in path.glob(f"*.{ending}"))
    if pickled:
        raise UserError(
            f"{path} holds its weights as a pickle ({pickled[0]}), which can run code when read: convert it to "
            "safetensors (load it where you trust it and call `save_pretrained`)."
        )
    raise UserError(f"{path} has no weights: no *.safetensors file lies in it.")


def _check_head(model: LanguageModel, name: str) -> None:
    """Hidden states and head must give the model's own logits: an unknown scale would change every loss silently."""
    ids = torch.arange(min(8, model.vocabulary), device=model.device).unsqueeze(0)
    with torch.no_grad(), in_evaluation(model):
        own = model.causal(input_ids=ids, use_cache=False).logits[..., : model.vocabulary].float()
        hidden = model.causal.base_model(input_ids=ids, use_cache=False).last_hidden_state
        ours = project(hidden, model.head).float()
    loose = 1e-3 if model.head.weight.dtype == torch.float32 else 5e-2
    if not torch.allclose(own, ours, rtol=loose, atol=loose * float(own.abs().max())):
        raise UserError(
            f"The output head of {name} ({type(model.causal).__name__}) does more than weight, bias, scale and soft "
            "cap: choose another model, or report its class."
        )


def _head_facts(config: dict[str, Any]) -> tuple[float, float | None]:
    """Scale and soft cap, under the names that transformers' configurations use."""
    scale = float(config.get("logit_scale") or 1.0) / float(config.get("logits_scaling") or 1.0)
    scale *= float(config.get("lm_head_multiplier") or 1.0)
    cap = config.get("final_logit_softcapping")
    return scale, None if cap is None else float(cap)


def same_tokenizer(a: LanguageModel, b: LanguageModel) -> Literal["identical", "padded"]:
    """Whether two models speak of the same tokens: "identical", or "padded" when a head has rows that no token uses.

    Another chat template or end token only warns: losses compare distributions over the same ids.

    Raises:
        UserError: the token maps differ; names the first id that means something else.
    """
    first, second = _by_id(a.tokenizer), _by_id(b.tokenizer)
    if first != second:
        ids = sorted(first.keys() | second.keys())
        where = next(index for index in ids if first.get(index) != second.get(index))
        raise UserError(
            f"The tokenizers differ ({len(first)} and {len(second)} tokens), first at id {where}: {first.get(where)!r} "
            f"against {second.get(where)!r}; choose a student of the teacher's family, or `fresh:layers=...`, which "
            "takes the teacher's tokenizer."
        )
    if template_hash(a.tokenizer) != template_hash(b.tokenizer):
        warnings.warn("The two models have the same tokens but different chat templates.", stacklevel=2)
    if a.tokenizer.eos_token_id != b.tokenizer.eos_token_id:
        warnings.warn("The two models have the same tokens but different end-of-sequence tokens.", stacklevel=2)
    padded = a.rows != a.vocabulary or b.rows != b.vocabulary
    if padded:
        warnings.warn(
            f"Heads of {a.rows} and {b.rows} rows are sliced to the {a.vocabulary} ids of the tokenizer.", stacklevel=2
        )
    return "padded" if padded else "identical"


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of the token map, in the order of ids; equal for two tokenizers whose ids mean the same tokens."""
    return hashlib.sha256(json.dumps(sorted(_by_id(tokenizer).items())).encode()).hexdigest()


def template_hash(tokenizer: Any) -> str:
    """SHA-256 of the chat template; that of the empty text where there is none."""
    template = tokenizer.chat_template or ""
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _by_id(tokenizer: Any) -> dict[int, str]:
    return {index: token for token, index in tokenizer.get_vocab().items()}
