"""Readers for the shapes in which text data comes: JSON Lines, JSON, Parquet, folders of these, and the hub.

The shape of a record is known from its columns: ``messages`` · ``conversations`` (ShareGPT) · ``prompt`` with
``completion`` (or ``response``) · ``prompt`` alone · ``chosen`` and ``rejected`` · ``instruction`` with ``input`` and
``output`` (Alpaca) or ``context`` and ``response`` (Dolly) · ``question`` and ``answer`` · ``text``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from preceptor.errors import UserError

Message = dict[str, str]


ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "model": "assistant"}


ENDINGS = (".jsonl", ".json", ".parquet")


SHAPES = (
    "messages, conversations, prompt + completion, prompt, chosen + rejected, instruction + output, question + answer, "
    "or text"
)


@dataclass(frozen=True)
class Example:
    """A conversation (its last message the assistant's, if there is a response) or a plain text.

    ``messages``: role and content each. ``text``: plain text, when there are no messages. ``rejected``: the answer that
    was preferred less than the last message, in preference data.
    """

    messages: tuple[Message, ...] = ()
    text: str = ""
    rejected: str = ""


def read(source: str, *, split: str = "train", limit: int | None = None) -> list[Example]:
    """Examples from a file (.jsonl, .json, .parquet), a folder of such files, or a data set on the hub.

    Args:
        source: a path, or a hub name; ``owner/name:config`` picks a configuration.
        split: which split of a hub data set; in a folder, files whose name holds it are taken if there are any.
        limit: how many examples at most.

    Raises:
        UserError: nothing is there, the file is empty, a line is not JSON (with its number), or a record has no shape
            that is known (with its number and its columns).
    """
    path = Path(source)
    if path.is_dir():
        located = _folder(path, split)
    elif path.is_file():
        located = _file(path)
    elif path.suffix in ENDINGS or source.startswith((".", "/", "~")):
        raise UserError(
            f"There is no data at {source}: give a .jsonl, .json or .parquet file, a folder, or a hub name."
        )
    else:
        located = _hub(source, split)
    examples = [_example(record, where) for where, record in islice(located, limit)]
    if not examples:
        raise UserError(f"{source} is empty: it holds no example.")
    return examples


def _folder(path: Path, split: str) -> Iterator[tuple[str, Any]]:
    files = sorted(file for file in path.iterdir() if file.suffix in ENDINGS)
    files = [file for file in files if split in file.stem] or files
    if not files:
        raise UserError(f"The folder {path} holds no {', '.join(ENDINGS)} file.")
    for file in files:
        yield from _file(file)


def _file(path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix == ".parquet":
        return _parquet(path)
    if path.suffix == ".jsonl":
        return _json_lines(path)
    if path.suffix == ".json":
        return _json(path)
    raise UserError(f"{path} is not a {', '.join(ENDINGS)} file.")


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}, line {number}", json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {number} is not JSON ({error.msg} at column {error.colno}): mend or remove it."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (after line {number}): convert it.") from error


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    """A list of records, one record, or an object whose only value lists them; JSON Lines are read as such."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig") or "[]")
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _json_lines(path)
            return
        raise UserError(
            f"{path}, line {error.lineno} is not JSON ({error.msg} at column {error.colno}): mend or remove it."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: convert it.") from error
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(content) == 1 and lists and "messages" not in content else [content]
    if not isinstance(content, list):
        raise UserError(f"{path} holds neither a list of records nor a record.")
    for number, record in enumerate(content, start=1):
        yield f"{path}, record {number}", record


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]

    try:
        for number, record in enumerate(_rows(parquet.ParquetFile(path)), start=1):
            yield f"{path}, record {number}", record
    except (ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet ({str(error).splitlines()[0]}).") from error


def _rows(file: Any) -> Iterator[Any]:
    for batch in file.iter_batches():
        yield from batch.to_pylist()


def _hub(source: str, split: str) -> Iterator[tuple[str, Any]]:
    import datasets

    name, _, config = source.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # the hub's client raises a dozen kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise UserError(
            f"{source} is neither a file, nor a folder, nor a data set on the hub that can be read ({reason}); "
            "`owner/name:config` picks a configuration."
        ) from error
    for number, record in enumerate(rows, start=1):
        yield f"{source}, record {number}", record


def _example(record: Any, where: str) -> Example:
    if not isinstance(record, Mapping):
        raise UserError(f"{where} is not a record of named columns: give one of {SHAPES}.")
    present = {key for key, value in record.items() if value is not None}
    example = _by_columns(record, present, where)
    if example is None:
        raise UserError(f"{where} has the columns {', '.join(sorted(record)) or 'none'}; give {SHAPES}.")
    if not example.messages and not example.text.strip():
        raise UserError(f"{where} has no text in it: fill or remove it.")
    return example


def _by_columns(record: Mapping[str, Any], present: set[str], where: str) -> Example | None:
    if {"chosen", "rejected"} <= present:
        return _preference(record, where)
    for column in ("messages", "conversations", "conversation"):
        if column in present:
            return Example(messages=_messages(record[column], where))
    if "prompt" in present:
        answers = [record[column] for column in ("completion", "response") if column in present]
        asked = _turn(record["prompt"], where, role="user")
        return Example(messages=asked + (_turn(answers[0], where, role="assistant") if answers else ()))
    if "instruction" in present:
        return _alpaca(record, present, where)
    if "question" in present:
        answer = _turn(record["answer"], where, role="assistant") if "answer" in present else ()
        return Example(messages=_turn(record["question"], where, role="user") + answer)
    if "text" in present:
        return Example(text=_string(record["text"], where))
    return None


def _alpaca(record: Mapping[str, Any], present: set[str], where: str) -> Example:
    asked = "\n\n".join(
        _string(record[key], where) for key in ("instruction", "input", "context") if key in present and record[key]
    )
    answers = [record[key] for key in ("output", "response") if key in present]
    system = _turn(record["system"], where, role="system") if "system" in present and record["system"] else ()
    answer = _turn(answers[0], where, role="assistant") if answers else ()
    return Example(messages=system + _turn(asked, where, role="user") + answer)


def _preference(record: Mapping[str, Any], where: str) -> Example:
    """Chosen and rejected answers; without a prompt column, conversations that differ in the last turn."""
    if record.get("prompt") is not None:
        asked = _turn(record["prompt"], where, role="user")
        chosen = _turn(record["chosen"], where, role="assistant")
        if chosen[: len(asked)] == asked:
            chosen = chosen[len(asked) :]
        messages = asked + chosen
    else:
        if isinstance(record["chosen"], str):
            raise UserError(f"{where} has chosen and rejected texts but no prompt: add a prompt column.")
        messages = _messages(record["chosen"], where)
    return Example(messages=messages, rejected=_turn(record["rejected"], where, role="assistant")[-1]["content"])


def _turn(value: Any, where: str, *, role: str) -> tuple[Message, ...]:
    """One message of a role from a text or a number; messages from a list of them."""
    if isinstance(value, (str, int, float)):
        return ({"role": role, "content": str(value)},)
    return _messages(value, where)


def _messages(value: Any, where: str) -> tuple[Message, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable) or isinstance(value, Mapping):
        raise UserError(f"{where}: expected a text or a list of messages, found {type(value).__name__}.")
    messages = tuple(_message(item, where) for item in value)
    if not messages:
        raise UserError(f"{where} has an empty list of messages: fill or remove it.")
    return messages


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, Mapping) or not ({"role", "content"} <= item.keys() or {"from", "value"} <= item.keys()):
        raise UserError(f"{where} has a message without role and content (or from and value).")
    role = str(item["role"] if "role" in item else item["from"]).lower()
    content = item["content"] if "content" in item else item["value"]
    return {"role": ROLES.get(role, role), "content": _string(content, where)}


def _string(value: Any, where: str) -> str:
    """A text; a number as it is written; a list of typed parts as their texts joined; nothing as the empty text."""
    if value is None:
        return ""
    if isinstance(value, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in value):
        return "".join(str(part["text"]) for part in value)
    if isinstance(value, (str, int, float)):
        return str(value)
    raise UserError(f"{where}: expected a text, found {type(value).__name__}.")
