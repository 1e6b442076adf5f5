"""Masked language modelling (Devlin et al., BERT, https://arxiv.org/abs/1810.04805): an encoder without a teacher.

The baseline against which distilled encoders are held.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from preceptor.data.sequences import Batch, Sequence, collate
from preceptor.data.tokenizer import Tokenizer
from preceptor.engine.run import Run
from preceptor.errors import UserError
from preceptor.losses import Loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class MaskedLanguage(nn.Module):
    """An encoder that learns to name hidden tokens, through BERT's head with the input embeddings tied to it.

    Of the tokens that are not special a share is drawn from torch's generator; 80 % of them become the mask token, 10 %
    a random one, 10 % stay. The head is dropped afterwards: ``encoder`` is what is kept.

    Raises:
        UserError: the tokenizer has no mask token.
    """

    def __init__(self, encoder: PreTrainedModel, tokenizer: Tokenizer, *, share: float = 0.15) -> None:
        super().__init__()
        if tokenizer.mask_token_id is None:
            raise UserError("The tokenizer has no mask token: choose an encoder that was made to have one.")
        width = encoder.config.hidden_size
        self.encoder, self.share, self.mask_id = encoder, share, tokenizer.mask_token_id
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.bias = nn.Parameter(torch.zeros(self._embeddings.shape[0]))
        self.register_buffer("special", torch.tensor(sorted(tokenizer.all_special_ids)), persistent=False)
        for name, parameter in encoder.named_parameters():
            parameter.requires_grad_(not name.startswith("pooler."))

    def forward(self, batch: Batch) -> Loss:
        """Cross-entropy (nat) summed over the drawn tokens; ``count`` is their number."""
        hidden_ids, drawn = self.hide(batch)
        states = self.encoder(input_ids=hidden_ids, attention_mask=batch.attention_mask).last_hidden_state
        logits = nn.functional.linear(self.head(states[drawn]), self._embeddings, self.bias)
        loss = nn.functional.cross_entropy(logits.float(), batch.input_ids[drawn], reduction="sum")
        return Loss(loss, drawn.sum(), {"masked cross-entropy": loss.detach()})

    def hide(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The ids with some of them hidden, and which were drawn, both (B, T)."""
        ids, special = batch.input_ids, self.get_buffer("special")
        ordinary = batch.attention_mask.bool() & ~torch.isin(ids, special)
        drawn = (torch.rand(ids.shape, device=ids.device) < self.share) & ordinary
        fate = torch.rand(ids.shape, device=ids.device)
        noise = torch.randint(self._embeddings.shape[0], ids.shape, device=ids.device)
        masked = torch.where(drawn & (fate < 0.8), self.mask_id, ids)
        return torch.where(drawn & (fate >= 0.9), noise, masked), drawn

    @property
    def _embeddings(self) -> Tensor:
        return cast("Tensor", self.encoder.get_input_embeddings().weight)


def learn_words(run: Run, lessons: list[Sequence], *, pad_id: int) -> None:
    """The loop: a run whose student is a `MaskedLanguage` learns the lessons' tokens."""
    for batch in run.batches(lessons, partial(collate, pad_id=pad_id)):
        loss = run.student(batch)
        run.update(loss.sum, loss.count, loss.parts)
    run.finish()
