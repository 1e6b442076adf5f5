"""A model folder on disk: written beside and renamed, with its tokenizer and an honest model card."""

from __future__ import annotations

import errno
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from preceptor.data.tokenizer import Tokenizer
from preceptor.errors import UserError
from preceptor.models.embedded import without_progress_bars
from preceptor.models.gguf import forget_quantisation

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def write_model(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    *,
    card: Mapping[str, object],
    state: dict[str, Tensor] | None = None,
    adapter: nn.Module | None = None,
) -> None:
    """Write a model folder whole or not at all; an older model folder in its place is replaced.

    ``state`` replaces the model's own tensors (where those are sharded); ``adapter`` is written into ``adapter/``.

    Raises:
        UserError: the folder holds something else than a model, or cannot be written.
    """
    if folder.exists() and not (folder.is_dir() and (_is_model(folder) or not any(folder.iterdir()))):
        raise UserError(f"{folder} holds something else than a model: choose another folder, or remove it first.")
    beside = folder.parent / f".{folder.name}-{uuid.uuid4().hex}"
    try:
        beside.mkdir(parents=True)
        forget_quantisation(model)
        with without_progress_bars():
            model.save_pretrained(beside, state_dict=state)
        tokenizer.save_pretrained(beside)
        if adapter is not None:
            adapter.save_pretrained(beside / "adapter")  # type: ignore[operator]
            (beside / "adapter" / "README.md").unlink(missing_ok=True)
        (beside / "README.md").write_text(model_card(folder.name, model, card), encoding="utf-8")
        _replace(folder, beside)
    except OSError as error:
        what = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise UserError(
            f"The model cannot be saved to {folder} ({what}): make room there or choose another."
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def model_card(name: str, model: PreTrainedModel, card: Mapping[str, object]) -> str:
    """The model card: what the model is, how it was made as the caller states it, how to load it, what to beware of."""
    config = model.config.get_text_config()
    tags = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- distillation\n- preceptor\n---\n\n"
    size = sum(parameter.numel() for parameter in model.parameters())
    facts = {
        "architecture": type(model).__name__,
        "parameters": f"{size:,}",
        "layers": config.num_hidden_layers,
        "hidden width": config.hidden_size,
        "vocabulary": config.vocab_size,
        **card,
    }
    rows = "".join(f"| {key} | {_cell(value)} |\n" for key, value in facts.items())
    teacher = f" by the teacher {_cell(card['teacher'])}" if "teacher" in card else ""
    return (
        f"{tags}# {name}\n\nA language model taught{teacher} with Preceptor.\n\n| | |\n| --- | --- |\n{rows}\n"
        f"## Use\n\n```python\n{_import_needed(model)}from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")\n```\n\n'
        "## Limits\n\nA student inherits its teacher's mistakes and biases and adds its own; it is no better "
        "tested than the figures above and those of its run say. The licences of teacher and data apply to it.\n"
    )


def _import_needed(model: PreTrainedModel) -> str:
    """A line that makes transformers know a class of this package."""
    ours = type(model).__module__.startswith("preceptor.")
    return "import preceptor  # pip install preceptor: transformers then knows this kind of model\n" if ours else ""


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").exists() and any(folder.glob("*.safetensors"))


def _replace(folder: Path, beside: Path) -> None:
    """Put ``beside`` where ``folder`` is. A folder cannot be renamed over a full one: the old one steps aside first."""
    if not folder.exists():
        beside.rename(folder)
        return
    aside = folder.parent / f".{folder.name}-old-{uuid.uuid4().hex}"
    folder.rename(aside)
    try:
        beside.rename(folder)
    except OSError:
        aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)
