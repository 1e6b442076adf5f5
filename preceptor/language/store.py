"""Answers on disk: one SQLite file, one row a call, found by what was asked of whom."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from preceptor.errors import UserError
from preceptor.language.messages import Answer, Request

VERSION = 1


AT_ONCE = 500  # keys in one query


CHECKPOINT_PAGES = 16384  # 64 MiB of log before it is folded into the file, which waits for the disk


TABLE = """
CREATE TABLE IF NOT EXISTS answers (
    key BLOB PRIMARY KEY,
    backend TEXT NOT NULL,
    request TEXT NOT NULL,
    text TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    cut INTEGER NOT NULL,
    error TEXT NOT NULL,
    time REAL NOT NULL
)
"""


# A good answer that another process wrote meanwhile is not replaced by a failure.
KEEP = """
INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (key) DO UPDATE SET
    text = excluded.text, prompt_tokens = excluded.prompt_tokens, completion_tokens = excluded.completion_tokens,
    cut = excluded.cut, error = excluded.error, time = excluded.time
WHERE excluded.error = '' OR answers.error <> ''
"""


@dataclass(frozen=True)
class StoredAnswer:
    """A row: what one call came to. ``request`` is what the caller asked; ``error`` why that has no answer."""

    key: bytes
    request: Request
    answer: Answer
    error: str = ""


def key_of(identity: str, call: Request) -> bytes:
    """32 bytes that name a call: SHA-256 of the backend's identity and every field of the request, in their order."""
    # Python's literals in ASCII are as plain as JSON and written in half the time, which many requests wait for.
    return hashlib.sha256(ascii((identity, *vars(call).values())).encode()).digest()


class Store:
    """The answers kept in one file, which several processes may share.

    What ``keep`` was given survives the end of the process, however it ends; a loss of power may cost the last moments,
    never the file.

    Raises:
        UserError: the file is something else, or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # One thread at a time uses it: that of the caller, or one that waits for it (see ``Chat.ask``).
            self._file = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
            self._file.execute("PRAGMA journal_mode = WAL")
            self._file.execute("PRAGMA synchronous = NORMAL")
            self._file.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
            [version] = self._file.execute("PRAGMA user_version").fetchone()
            tables = {name for [name] in self._file.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if version == 0 and not tables:
                self._file.execute(TABLE)
                self._file.execute(f"PRAGMA user_version = {VERSION}")
        except (sqlite3.Error, OSError) as error:
            raise UserError(
                f"The cache {path} cannot be opened ({error}): give the path of a file to write."
            ) from error
        if version not in (0, VERSION) or (tables and "answers" not in tables):
            raise UserError(f"{path} is no cache of answers that this version reads: give another path.")

    def find(self, keys: Sequence[bytes]) -> dict[bytes, tuple[Answer, str]]:
        """Answer and error of each key that is kept."""
        found: dict[bytes, tuple[Answer, str]] = {}
        for start in range(0, len(keys), AT_ONCE):
            part = keys[start : start + AT_ONCE]
            rows = self._file.execute(
                "SELECT key, text, prompt_tokens, completion_tokens, cut, error FROM answers "
                f"WHERE key IN ({','.join('?' * len(part))})",
                part,
            )
            found |= {key: (Answer(text, read, wrote, bool(cut)), error) for key, text, read, wrote, cut, error in rows}
        return found

    def keep(self, identity: str, rows: Iterable[StoredAnswer]) -> None:
        """Write rows in one transaction.

        Raises:
            UserError: the disk is full, or the file cannot be written any more.
        """
        now = time.time()
        values = [
            (
                row.key,
                identity,
                _write(row.request),
                _sound(row.answer.text),
                row.answer.prompt_tokens,
                row.answer.completion_tokens,
                row.answer.cut,
                _sound(row.error),
                now,
            )
            for row in rows
        ]
        try:
            if len(values) == 1:  # a transaction of its own
                self._file.execute(KEEP, values[0])
                return
            self._file.execute("BEGIN IMMEDIATE")
            self._file.executemany(KEEP, values)
            self._file.execute("COMMIT")
        except sqlite3.Error as error:
            raise UserError(
                f"The cache {self._path} cannot be written ({error}): mend that and start again; what was answered "
                "before is kept."
            ) from error

    def failures(self, identity: str) -> list[tuple[Request, str]]:
        """What was asked of a backend without success, with the reason; oldest first."""
        rows = self._file.execute(
            "SELECT request, error FROM answers WHERE backend = ? AND error <> '' ORDER BY time, rowid", (identity,)
        )
        return [(_read(request), error) for request, error in rows]

    def close(self) -> None:
        """Fold the log into the file and close it."""
        self._file.close()


def _write(request: Request) -> str:
    return json.dumps(vars(request))  # in the order given: a schema is shown to the model in that order


def _sound(text: str) -> str:
    """The text with a question mark for each half of a character, which no file can hold."""
    return text.encode("utf-8", "replace").decode()


def _read(text: str) -> Request:
    fields = json.loads(text)
    return Request(**{**fields, "messages": tuple(fields["messages"]), "stop": tuple(fields["stop"])})
