"""Authors: who writes answers and says how likely each next token was. An exact source, or a language model.

Both are teachers in the sense of ``preceptor.teacher``: called with a batch, they say soft targets. What a source says
is exact, so it can stand for the truth; its symbols are tokens of a tokenizer that is made for it.
"""

from __future__ import annotations

from collections.abc import Sequence as Listed
from typing import Any, Protocol

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from preceptor.data.sequences import Batch, Sequence
from preceptor.distillation.teachers import FrozenTeacher
from preceptor.knowledge import LogitTargets, SoftTargets
from preceptor.methods.teacher_hacking.markov_sources import Source, draw, log_probs
from preceptor.models.language_model import LanguageModel

Prompt = tuple[int, ...]


WIDTH, DEPTH, HEADS = 64, 2, 4  # of the prototype that `fresh:` students take their proportions from


class TextModel(Protocol):
    """Who writes answers and says what it thinks of each next token."""

    def __call__(self, batch: Batch) -> SoftTargets:
        """Soft targets with leading shape (B, T), or packed in the order of ``batch.predicts``."""
        ...

    def answer(self, prompts: Listed[Prompt], length: int) -> list[Sequence]:
        """Each prompt with an answer of at most ``length`` tokens, drawn at temperature 1 from the whole vocabulary.

        Draws come from torch's global generator.
        """
        ...


class SourceAuthor:
    """An exact source that answers prompts of symbols. Every answer has the length that is asked for."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __call__(self, batch: Batch) -> LogitTargets:
        """Exact log-probabilities (rows, vocabulary), float64, packed in the order of ``batch.predicts``."""
        log_p = log_probs(self.source, batch.input_ids.cpu())[:, 1:]
        return LogitTargets(log_p[batch.predicts.cpu()].to(batch.input_ids.device))

    def answer(self, prompts: Listed[Prompt], length: int) -> list[Sequence]:
        """Each prompt with ``length`` symbols drawn from the source; prompts of one length go together."""
        answers: list[Prompt] = [()] * len(prompts)
        for size in {len(prompt) for prompt in prompts}:
            places = [place for place, prompt in enumerate(prompts) if len(prompt) == size]
            ids = torch.tensor([prompts[place] for place in places], dtype=torch.int64).reshape(len(places), size)
            for place, drawn in zip(places, draw(self.source, ids, length).tolist()):
                answers[place] = tuple(drawn)
        return [answered(prompt, answer) for prompt, answer in zip(prompts, answers)]

    def prompts(self, count: int, length: int) -> list[Prompt]:
        """The first ``length`` symbols of ``count`` sequences."""
        return [tuple(ids) for ids in draw(self.source, torch.empty(count, 0, dtype=torch.int64), length).tolist()]


class LanguageAuthor:
    """A language model that writes at temperature 1, the end of turn kept, and says its last hidden states.

    An answer that holds nothing but the end of turn is empty: its sequence has no response token, so that who reads
    the answers can tell it and count it.
    """

    def __init__(self, model: LanguageModel, *, together: int = 64) -> None:
        """``together``: answers that are written at a time."""
        self.model, self.together = model, together

    def __call__(self, batch: Batch) -> SoftTargets:
        """What the model says, without a gradient."""
        return FrozenTeacher(self.model)(batch)

    def answer(self, prompts: Listed[Prompt], length: int) -> list[Sequence]:
        """Each prompt with what the model writes."""
        written = self.model.generate(list(prompts), max_new_tokens=length, batch_size=self.together)
        stop = self.model.stop_ids
        return [answered(prompt, ids if set(ids) - stop else ()) for prompt, ids in zip(prompts, written)]


def answered(prompt: Prompt, answer: Prompt) -> Sequence:
    """A sequence of a prompt and the response to it."""
    return Sequence((*prompt, *answer), (False,) * len(prompt) + (True,) * len(answer))


def symbol_model(vocabulary: int, *, longest: int, seed: int) -> LanguageModel:
    """A small causal transformer (Llama) over the symbols of a source, random weights, its embeddings tied.

    Its tokenizer maps the words ``s0``, ``s1``, ... to the ids 0, 1, ...; there is no end of sequence, so every answer
    has the length that is asked for. ``longest``: tokens of the longest sequence.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    settings: Any = LlamaConfig(
        vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=DEPTH,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=longest,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    words = Tokenizer(WordLevel({f"s{symbol}": symbol for symbol in range(vocabulary)}, unk_token="s0"))
    words.pre_tokenizer = WhitespaceSplit()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(settings)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)  # type: ignore[no-untyped-call]
    return LanguageModel(model, tokenizer)
