"""The header: of which teacher, tokenizer, template and truncation a cache is, and how it is encoded."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from preceptor.cache.codecs import Codec, Kind, codebook, codec_from, kind_of
from preceptor.data.tokenizer import Tokenizer
from preceptor.errors import UserError
from preceptor.files import write_whole
from preceptor.knowledge import Head
from preceptor.models.identity import fingerprint, template_hash, tokenizer_hash
from preceptor.models.language_model import LanguageModel

VERSION = 1


UNFINISHED = ("codebook.safetensors", "head.safetensors")


"""Files that a capture killed at its very beginning may leave; header.json is written last."""


@dataclass(frozen=True)
class Header:
    """The contents of header.json.

    ``temperature`` is 1: hidden states give logits at any other, and top-k rows are raised to a power by the divergence
    (their tail taken as flat). ``rows``: which positions are stored: those that predict a response token.
    """

    version: int
    kind: Kind
    parameters: dict[str, Any]
    teacher: str
    weights: str
    tokenizer: str
    template: str
    vocabulary: int
    width: int
    max_length: int
    temperature: float = 1.0
    truncation: str = "the end of a sequence is cut off"
    rows: str = "positions that predict a response token"
    scale: float = 1.0
    softcap: float | None = None
    chosen: str = ""

    @staticmethod
    def of(model: LanguageModel, name: str, codec: Codec, max_length: int, chosen: str) -> Header:
        """The header of a cache of ``model``'s targets."""
        head = model.head
        return Header(
            version=VERSION,
            kind=kind_of(codec),
            parameters=codebook(codec)[0],
            teacher=name,
            weights=fingerprint(model),
            tokenizer=tokenizer_hash(model.tokenizer),
            template=template_hash(model.tokenizer),
            vocabulary=model.vocabulary,
            width=model.width,
            max_length=max_length,
            scale=head.scale,
            softcap=head.softcap,
            chosen=chosen,
        )

    @staticmethod
    def read(folder: Path) -> Header:
        """The header of the cache in a folder.

        Raises:
            UserError: no cache is there, or one of another format.
        """
        path = folder / "header.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} holds no cache (header.json): make one with `preceptor cache`.") from error
        known = {field.name for field in fields(Header)}
        if not isinstance(content, dict) or content.get("version") != VERSION or not set(content) <= known:
            raise UserError(f"{path} is not of cache format {VERSION}: capture the cache again with this version.")
        return Header(**content)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Refuse another tokenizer or chat template.

        Raises:
            UserError: the ids mean other tokens, or sequences would be rendered otherwise.
        """
        if tokenizer_hash(tokenizer) != self.tokenizer:
            raise UserError(
                f"The cache was made with another tokenizer ({self.teacher}'s, {self.vocabulary} tokens): use a "
                "student of that family, or capture again with your teacher."
            )
        if template_hash(tokenizer) != self.template:
            raise UserError(
                f"The cache was made with another chat template ({self.teacher}'s), so its sequences would not be "
                "found: give the student the same template, or capture again."
            )

    def check_teacher(self, teacher: LanguageModel) -> None:
        """Refuse another teacher.

        Raises:
            UserError: the weights differ.
        """
        if fingerprint(teacher) != self.weights:
            raise UserError(
                f"The cache is of another teacher ({self.teacher}, or the same in other weights or another dtype): "
                "choose another folder for this one."
            )


def write(folder: Path, header: Header, codec: Codec, head: Head) -> None:
    """Write codebook, head and, last, the header, which makes the cache exist."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(codebook(codec)[1], folder / "codebook.safetensors")
    if header.kind == "hidden":
        tensors = {"weight": head.weight.detach().cpu().contiguous()}
        if head.bias is not None:
            tensors["bias"] = head.bias.detach().cpu().contiguous()
        save_file(tensors, folder / "head.safetensors")
    write_whole(folder / "header.json", json.dumps(asdict(header), indent=2) + "\n")


def load(folder: Path, header: Header) -> tuple[Codec, Head | None]:
    """The codec of a cache, and the teacher's head where hidden states are kept.

    Raises:
        UserError: a file is missing or damaged.
    """
    try:
        codec = codec_from(header.kind, header.parameters, load_file(folder / "codebook.safetensors"))
        if header.kind != "hidden":
            return codec, None
        tensors = load_file(folder / "head.safetensors")
    except Exception as error:  # safetensors raises its own kinds
        raise UserError(f"The cache {folder} lacks a readable codebook or head ({error}): capture it again.") from error
    return codec, Head(tensors["weight"], tensors.get("bias"), header.scale, header.softcap)
