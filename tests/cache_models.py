"""A tiny teacher, its sequences and its caches, for the tests of the cache."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from preceptor.cache import Cache, CapturePlan, Wanted, capture
from preceptor.data.sequences import Sequence, collate
from preceptor.models.language_model import LanguageModel

VOCABULARY = 211
KINDS = ("top_k", "sampled", "hidden")


def make_teacher(*, vocabulary: int = VOCABULARY, seed: int = 0, template: str = "{{ messages }}") -> LanguageModel:
    """A tiny random model with sharp enough predictions, and a tokenizer of words w0, w1, ..."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3,
    )  # fmt: skip
    words = Tokenizer(WordLevel({f"w{index}": index for index in range(vocabulary)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w1")
    tokenizer.chat_template = template
    return LanguageModel(LlamaForCausalLM(config), tokenizer).eval()


def make_sequences(count: int, seed: int = 0) -> list[Sequence]:
    """Sequences of 8 to 40 random ids, of which the last half is a response."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        length = draw.randint(8, 40)
        ids = tuple(draw.randrange(VOCABULARY) for _ in range(length))
        found.append(Sequence(ids, tuple(place >= length // 2 for place in range(length))))
    return found


def plan_of(kind: str, budget: float = 40, **wanted: float) -> CapturePlan:
    return CapturePlan(Wanted(budget, 64, **wanted), kind, batch_tokens=256, sample=600, shard_bytes=4096)


def kept(teacher: LanguageModel, sequences: list[Sequence], folder: Path, plan: CapturePlan) -> Cache:
    return capture(teacher, sequences, folder, name="tiny", max_length=64, plan=plan, say=lambda _: None)


def exact(teacher: LanguageModel, sequences: list[Sequence]) -> torch.Tensor:
    """The teacher's hidden states at the positions that predict response tokens."""
    batch = collate(sequences, 1)
    with torch.no_grad():
        return teacher(batch)[batch.predicts]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
