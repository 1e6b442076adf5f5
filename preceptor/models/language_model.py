"""Language models and encoders: loaded, run up to the head, sampled from, and saved.

``LanguageModel`` wraps any transformers causal model. Its forward stops at the last hidden states; the output head is
handed to the loss as a ``Head``, so that no (tokens, vocabulary) matrix is ever made.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from preceptor.data.tokenizer import Tokenizer
from preceptor.errors import UserError
from preceptor.knowledge import Head
from preceptor.models.model_folder import write_model
from preceptor.models.sampling import Prefix, Sampling, sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from preceptor.data.sequences import Batch


T = TypeVar("T")


class LanguageModel(nn.Module):
    """A causal model with its tokenizer.

    ``model``: the transformers model, or the PEFT model around it. ``tokenizer``: its tokenizer. ``vocabulary``: how
    many ids the tokenizer has; rows of the head beyond it are padding and are sliced off wherever logits are made.

    Raises:
        UserError: the tokenizer has more ids than the head has rows, or the model has no output head, or no cache to
            write with.
    """

    def __init__(self, model: nn.Module, tokenizer: Tokenizer) -> None:
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
        from transformers import PreTrainedModel

        inner = self.model
        return inner if isinstance(inner, PreTrainedModel) else inner.get_base_model()  # type: ignore[operator]

    @property
    def adapted(self) -> bool:
        """Whether the model carries an adapter (LoRA)."""
        from transformers import PreTrainedModel

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
        """The id to pad with. It may equal the end-of-turn id: padding is known from lengths, never from its id."""
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
        outputs = self.causal.base_model(
            input_ids=prefix.ids,
            attention_mask=prefix.mask,
            position_ids=prefix.positions,
            past_key_values=prefix.cache,
            use_cache=True,
        )
        return project(outputs.last_hidden_state[:, -1], self.head), outputs.past_key_values

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
        from transformers import AutoModelForCausalLM

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


def _head_facts(config: dict[str, Any]) -> tuple[float, float | None]:
    """Scale and soft cap, under the names that transformers' configurations use."""
    scale = float(config.get("logit_scale") or 1.0) / float(config.get("logits_scaling") or 1.0)
    scale *= float(config.get("lm_head_multiplier") or 1.0)
    cap = config.get("final_logit_softcapping")
    return scale, None if cap is None else float(cap)
