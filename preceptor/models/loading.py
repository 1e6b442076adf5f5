"""Language models and encoders, loaded by name from a package, a folder, a GGUF file or the hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from preceptor.data.tokenizer import Tokenizer
from preceptor.errors import UserError
from preceptor.models import embedded, gguf
from preceptor.models.language_model import LanguageModel, in_evaluation, project

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = ("float32", "bfloat16", "float16")


def load(name: str, *, dtype: str = "float32") -> LanguageModel:
    """A causal language model by name.

    Args:
        name: ``smollm2`` (embedded, no network), a folder with safetensors, a ``.gguf`` file, or a name on the hub.
        dtype: ``float32``, ``bfloat16`` or ``float16``, of the parameters.

    Raises:
        UserError: no such model, a missing package, pickled weights, or an unknown dtype.
    """
    from transformers import AutoModelForCausalLM

    if dtype not in DTYPES:
        raise UserError(f'The dtype "{dtype}" is not one of {", ".join(DTYPES)}.')
    precision: torch.dtype = getattr(torch, dtype)
    path = Path(name)
    if name == embedded.LANGUAGE_MODEL[0]:
        model, tokenizer = gguf.load_gguf(embedded.find(embedded.LANGUAGE_MODEL), precision)
    elif path.suffix == ".gguf" and path.is_file():
        model, tokenizer = gguf.load_gguf(path, precision)
    else:
        model, tokenizer = _from_pretrained(AutoModelForCausalLM, name, precision)
    loaded = LanguageModel(model, tokenizer).eval()
    _check_head(loaded, name)
    return loaded


def load_tokenizer(name: str) -> Tokenizer:
    """A language model's tokenizer by the model's name, as `load` takes it; no weights are read where files allow it.

    Raises:
        UserError: no such model, or a missing package.
    """
    from transformers import AutoTokenizer

    if name == embedded.LANGUAGE_MODEL[0] or name.endswith(".gguf"):
        return load(name).tokenizer
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=Path(name).is_dir())
    except (OSError, ValueError, KeyError) as error:
        raise _not_loaded(f'The tokenizer of "{name}"', error) from error


def load_encoder(name: str) -> tuple[PreTrainedModel, Tokenizer]:
    """An encoder and its tokenizer: ``minilm-l6`` (embedded, no network), a folder with safetensors, or a hub name.

    Raises:
        UserError: no such model, a missing package, or pickled weights.
    """
    from transformers import AutoModel

    if name == embedded.ENCODER[0]:
        name = str(embedded.find(embedded.ENCODER))
    model, tokenizer = _from_pretrained(AutoModel, name, torch.float32)
    return model.eval(), tokenizer  # type: ignore[no-untyped-call]


def _from_pretrained(kind: Any, name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, Tokenizer]:
    from transformers import AutoTokenizer

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
        raise _not_loaded(f'The model "{name}"', error) from error
    return model, tokenizer


def _not_loaded(what: str, error: Exception) -> UserError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    return UserError(
        f"{what} cannot be loaded ({reason}): give a folder with safetensors and a tokenizer, a .gguf file, a name on "
        f'the hub, or an embedded one ("{embedded.LANGUAGE_MODEL[0]}", "{embedded.ENCODER[0]}").'
    )


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
