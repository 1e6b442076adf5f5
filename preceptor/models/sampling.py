"""Sampling from a causal model in batches: left padding, a growing cache, and finished rows dropped as they end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from preceptor.errors import UserError

BLOCK = 256  # classes whose probabilities are summed first, when one of many is drawn


@dataclass(frozen=True, eq=False)
class Prefix:
    """What a model goes on from: tokens not yet read, and the cache of those before them.

    ``ids`` and ``positions``: (B, T) int64. ``mask``: (B, S) int64 over cached and new tokens, 0 at the padding on the
    left. ``cache``: as the model gave it, None at the start.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    cache: Any


Step = Callable[[Prefix], tuple[Tensor, Any]]


"""From a prefix to the logits (B, vocabulary) of the token after it, and the cache that holds it."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Temperature 0 takes the likeliest token; ``top_k`` 0 and ``top_p`` 1 keep the whole vocabulary.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def check(self) -> None:
        """Raise a UserError that names the setting out of its interval."""
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1.")
        if not self.temperature >= 0:
            raise UserError(f"The sampling temperature is {self.temperature}; it must be 0 (greedy) or positive.")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; it must be 0 (the whole vocabulary) or positive.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must lie in (0, 1].")

    def choose(self, logits: Tensor) -> Tensor:
        """The next token ids (B,) from logits (B, V), drawn with torch's global generator of the device.

        Raises:
            UserError: the logits are not finite.
        """
        if not bool(logits.amax(-1).isfinite().all()):
            raise UserError(
                "The model's logits are not finite, so it cannot write: its weights have diverged; lower the learning "
                "rate, or go back to an earlier checkpoint."
            )
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits.float() if self.temperature == 1 else logits.float() / self.temperature
        places: Tensor | None = None
        if 0 < self.top_k < logits.shape[-1]:
            # Only the k need probabilities, not a whole vocabulary.
            logits, places = logits.topk(self.top_k, dim=-1)
        if self.top_p < 1:
            ordered, order = logits.sort(dim=-1, descending=True)
            before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
            logits = torch.full_like(logits, -torch.inf).scatter(
                -1, order, ordered.masked_fill(before >= self.top_p, -torch.inf)
            )
        drawn = draw(logits.softmax(-1))
        return drawn if places is None else places.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)


def draw(probabilities: Tensor) -> Tensor:
    """One class for each row, (B,) int64, from probabilities (B, V), with torch's global generator of the device.

    Inverts cumulative sums, first over blocks of classes, then within the block drawn: two uniform numbers a row, and
    sums so short that single precision is enough. (`torch.multinomial` draws an exponential variable for every class,
    on a CPU more than a tenth of a small model's step.) A class without probability is never drawn.
    """
    rows, classes = probabilities.shape
    blocks = pad(probabilities, (0, -classes % BLOCK)).reshape(rows, -1, BLOCK)
    block = _invert(blocks.sum(-1))
    return block * BLOCK + _invert(blocks[torch.arange(rows, device=block.device), block])


def _invert(weights: Tensor) -> Tensor:
    """An index for each row of weights (B, n), as likely as its weight."""
    sums = weights.cumsum(-1)
    whole = sums[:, -1:]
    drawn = torch.searchsorted(sums, torch.rand_like(whole) * whole, right=True).squeeze(-1)
    # The product may round up to the whole, beyond which there is nothing: then it is the last class with a weight.
    return torch.minimum(drawn, (sums < whole).sum(-1))


def sample(
    step: Step,
    prompts: Sequence[tuple[int, ...]],
    sampling: Sampling,
    *,
    stop: frozenset[int],
    batch_size: int,
    device: torch.device,
    limits: Sequence[int] | None = None,
) -> list[tuple[int, ...]]:
    """Continue every prompt; the new ids only, a stop token kept as the last one.

    Prompts are taken longest first, so that a batch holds little padding; the answers come back in the order given.
    ``limits``: tokens for each prompt, at least 1, in place of ``sampling.max_new_tokens``.

    Raises:
        UserError: a setting is out of its interval, or a prompt is empty.
    """
    sampling.check()
    if batch_size < 1:
        raise UserError(f"The generation batch size is {batch_size}; it must be at least 1.")
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"Prompt {index} is empty: a model needs at least one token to go on from.")
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    limits = limits or [sampling.max_new_tokens] * len(prompts)
    answers: list[tuple[int, ...]] = [()] * len(prompts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids, mask = left_pad([prompts[index] for index in chosen], device)
        prefix = Prefix(ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), None)
        completions = go_on(step, prefix, sampling, stop=stop, limits=[limits[index] for index in chosen])
        for index, answer in zip(chosen, completions):
            answers[index] = tuple(answer)
    return answers


def go_on(
    step: Step, prefix: Prefix, sampling: Sampling, *, stop: frozenset[int], limits: Sequence[int]
) -> list[list[int]]:
    """The new ids of every row of a prefix, a stop token kept as the last one.

    ``limits``: tokens of each row, at least 1, in place of ``sampling.max_new_tokens``. The prefix's cache is used up.
    """
    ids, mask, positions, cache = prefix.ids, prefix.mask, prefix.positions, prefix.cache
    answers: list[list[int]] = [[] for _ in limits]
    alive, ended = list(range(len(limits))), set[int]()
    while True:
        logits, cache = step(Prefix(ids, mask, positions, cache))
        chosen = sampling.choose(logits)
        tokens = chosen.tolist()
        for row, token in zip(alive, tokens):
            if row not in ended:
                answers[row].append(token)
            if token in stop or len(answers[row]) == limits[row]:
                ended.add(row)
        going = [place for place, row in enumerate(alive) if row not in ended]
        if not going:
            return answers
        positions = positions[:, -1:] + 1
        # Recurrent states have no way to drop a row: what has ended is then written on, to no end.
        if len(going) < len(alive) and all(hasattr(layer, "batch_select_indices") for layer in cache.layers):
            keep = torch.tensor(going, device=ids.device)
            alive = [alive[place] for place in going]
            chosen, mask, positions = chosen[keep], mask[keep], positions[keep]
            cache.batch_select_indices(keep)
        ids = chosen.unsqueeze(-1)
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=-1)


def left_pad(prompts: list[tuple[int, ...]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids padded on the left with 0, which the mask hides, and that mask; both (B, longest prompt) int64."""
    width = max(map(len, prompts))
    ids = torch.tensor([(0,) * (width - len(prompt)) + tuple(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return ids, mask
