"""GGUF files, converted once.

A GGUF file holds quantised weights; turning them back into floating point takes ten seconds or more. The first load
writes the result as safetensors into the user's cache folder, the next ones read that.
"""

from __future__ import annotations

import hashlib
import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from preceptor.data.tokenizer import Tokenizer
from preceptor.errors import UserError
from preceptor.models.embedded import LARGEST_CONVERTED, cache_folder, without_progress_bars

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_gguf(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, Tokenizer]:
    """A causal model and its tokenizer from a GGUF file, through the conversion kept in the cache folder.

    Where the cache folder cannot be written, or the file is large, the file is read directly each time.

    Raises:
        UserError: the file cannot be read as GGUF, or holds an architecture that transformers cannot read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if path.stat().st_size > LARGEST_CONVERTED:
        return _read_gguf(path, dtype)
    try:
        kept = cache_folder() / f"{path.stem}-{_digest(path)}"
        if not (kept / "config.json").exists():
            model, tokenizer = _read_gguf(path, torch.float32)
            _keep(model, tokenizer, kept)
            return model.to(dtype), tokenizer  # type: ignore[arg-type]
    except OSError:
        return _read_gguf(path, dtype)
    with without_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(kept, dtype=dtype, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(kept, local_files_only=True)
    return model, tokenizer


def forget_quantisation(model: PreTrainedModel) -> None:
    """Drop a dequantised model's settings of quantisation, so that it saves and loads as a plain model."""
    for holder in (model.config, model.config.get_text_config()):
        if hasattr(holder, "quantization_config"):
            del holder.quantization_config
    model.hf_quantizer = None  # type: ignore[assignment]
    model.config.name_or_path = ""


def _read_gguf(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, Tokenizer]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = str(path.parent), path.name
    try:
        with without_progress_bars():
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name, local_files_only=True)
            model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=dtype, local_files_only=True)
    except (ValueError, KeyError, OSError, NotImplementedError) as error:
        raise UserError(
            f"{path} cannot be read as a GGUF causal model ({_first_line(error)}): check the file, or give the "
            "model's safetensors folder."
        ) from error
    forget_quantisation(model)
    return model, tokenizer


def _keep(model: PreTrainedModel, tokenizer: Tokenizer, kept: Path) -> None:
    """Write beside, then rename: another process sees the whole folder or none, and the first one to finish wins."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    beside = kept.parent / f".{kept.name}-{uuid.uuid4().hex}"
    beside.mkdir()
    try:
        with without_progress_bars():
            model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        beside.rename(kept)
    except OSError:
        if not (kept / "config.json").exists():
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(str(path.stat().st_size).encode(), digest_size=8)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
