"""Whether two models are the same one, and whether their tokenizers agree: fingerprints and hashes."""

from __future__ import annotations

import hashlib
import json
import warnings
from typing import Literal

import torch
from torch import Tensor

from preceptor.data.tokenizer import Tokenizer
from preceptor.errors import UserError
from preceptor.models.language_model import LanguageModel

_SAMPLED_WEIGHTS = 4096  # of each parameter, for the fingerprint


def fingerprint(model: LanguageModel) -> str:
    """BLAKE2b of names, shapes and up to 4,096 evenly spaced values of each parameter."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.causal.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        flat: Tensor = parameter.detach().reshape(-1)
        digest.update(flat[:: max(1, flat.numel() // _SAMPLED_WEIGHTS)].to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()


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


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """SHA-256 of the token map, in the order of ids; equal for two tokenizers whose ids mean the same tokens."""
    return hashlib.sha256(json.dumps(sorted(_by_id(tokenizer).items())).encode()).hexdigest()


def provenance(teacher: str, text: str, tokenizer: Tokenizer) -> dict[str, str]:
    """What a run of language models rests on, for its environment.json: names of teacher and text, and two hashes."""
    return {
        "teacher": teacher,
        "text": text,
        "tokenizer": tokenizer_hash(tokenizer),
        "chat template": template_hash(tokenizer),
    }


def template_hash(tokenizer: Tokenizer) -> str:
    """SHA-256 of the chat template; that of the empty text where there is none."""
    template = tokenizer.chat_template or ""
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _by_id(tokenizer: Tokenizer) -> dict[int, str]:
    return {index: token for token, index in tokenizer.get_vocab().items()}
