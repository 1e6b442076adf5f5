"""What this package asks of a tokenizer: the part of transformers' tokenizers that is used here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class Tokenizer(Protocol):
    """Text to token ids and back: every tokenizer of transformers fits, and so does any object with these members.

    The id of a special token is None where the tokenizer has no such token. ``chat_template`` is the Jinja template of
    a conversation, a mapping of several by name, or None.
    """

    chat_template: Any

    @property
    def pad_token_id(self) -> Any:
        """The id of the padding token."""

    @property
    def eos_token_id(self) -> Any:
        """The id of the end-of-sequence token."""

    @property
    def mask_token_id(self) -> Any:
        """The id of the token that hides another one."""

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of all special tokens."""

    @property
    def all_special_tokens(self) -> list[str]:
        """The texts of all special tokens."""

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]:
        """The tokens added to the vocabulary by their ids; each has ``special`` and its text as ``str``."""

    def __call__(self, text: Any, *, add_special_tokens: bool = True, **settings: Any) -> Mapping[str, Any]:
        """The ids of a text, or of each text of a list, under ``input_ids``."""

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **settings: Any) -> Any:
        """The text of a sequence of ids."""

    def get_vocab(self) -> dict[str, int]:
        """Each token's id."""

    def apply_chat_template(self, conversation: Any, **settings: Any) -> Any:
        """A conversation as text, or as ids."""

    def save_pretrained(self, save_directory: str | Path) -> Any:
        """Write the tokenizer's files to a folder."""
