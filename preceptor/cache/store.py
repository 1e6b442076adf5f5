"""What a cache is on disk, and how it is appended to so that a kill at any instant loses nothing that was finished.

    header.json            what the cache is of and how it is encoded; never changes
    codebook.safetensors   the codec's tensors; head.safetensors: the teacher's output head (hidden states only)
    shard-00000.bin ...    blobs, one a token sequence
    index.bin              records, one a batch: magic, count, CRC-32, then an entry for each sequence

A batch's blobs are written and synced before its index record, which is what makes them exist. At reopening for
writing, an index is cut after its last whole record and the shards after the last blob that it names.
"""

from __future__ import annotations

import errno
import os
import struct
import zlib
from collections.abc import Iterator, Sequence as Listed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from preceptor.errors import UserError

_RECORD = struct.Struct("<4sII")


_MAGIC = b"PCRB"


ENTRY = np.dtype(
    [
        ("key", "V16"), ("shard", "<u4"), ("offset", "<u8"), ("bytes", "<u4"), ("rows", "<u4"), ("crc", "<u4"),
        ("kl", "<f4"), ("mass", "<f4"),
    ]
)  # fmt: skip


"""An index entry. ``kl`` and ``mass``: means over the sequence's rows of KL(teacher ‖ decoded) and of the mass kept."""


@dataclass(frozen=True)
class Finished:
    """An encoded sequence, ready to be written."""

    key: bytes
    blob: bytes
    rows: int
    kl: float
    mass: float


class Shelf:
    """Finds blobs by key. Shards are memory-mapped; the index is one sorted array."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        entries, _ = read_index(folder)
        self.entries = entries[np.argsort(_sortable(entries["key"]), kind="stable")]
        self._keys = _sortable(self.entries["key"])
        self._shards: dict[int, NDArray[np.uint8]] = {}

    def __len__(self) -> int:
        return len(self.entries)

    def find(self, keys: Listed[bytes]) -> NDArray[np.int64]:
        """Places of the keys in the index, -1 where a key is missing."""
        wanted = np.array(keys, "S16") if keys else np.zeros(0, "S16")
        at = np.searchsorted(self._keys, wanted)
        near = np.minimum(at, max(0, len(self._keys) - 1))
        found = self._keys[near] == wanted if len(self._keys) else np.zeros(len(wanted), bool)
        return np.where(found, near, -1)

    def blob(self, place: int) -> bytes:
        """The blob at a place of the index.

        Raises:
            UserError: the shard is damaged or missing.
        """
        entry = self.entries[place]
        shard = int(entry["shard"])
        if shard not in self._shards:
            path = shard_path(self._folder, shard)
            if not path.exists():
                raise UserError(f"{path} is missing: restore it, or capture the cache again.")
            self._shards[shard] = np.memmap(path, np.uint8, "r")
        start = int(entry["offset"])
        blob = self._shards[shard][start : start + int(entry["bytes"])].tobytes()
        if zlib.crc32(blob) != int(entry["crc"]):
            raise UserError(f"{shard_path(self._folder, shard)} is damaged at byte {start}: capture the cache again.")
        return blob


class Appender:
    """Appends batches of finished sequences. Use as a context; one process at a time."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        """Cuts off what a kill left unfinished.

        Raises:
            UserError: another process is writing this cache.
        """
        self._folder, self._limit = folder, shard_bytes
        self._index: IO[bytes] = (folder / "index.bin").open("ab+")
        _lock(self._index, folder)
        entries, size = read_index(folder)
        self._index.truncate(size)
        self.keys: set[bytes] = {bytes(key) for key in entries["key"]}
        self._number = int(entries["shard"].max()) if len(entries) else 0
        last = entries[entries["shard"] == self._number]
        self._end = int((last["offset"] + last["bytes"]).max()) if len(last) else 0
        for path in folder.glob("shard-*.bin"):
            if int(path.stem.partition("-")[2]) > self._number:
                path.unlink()
        self._shard = self._open()

    def __enter__(self) -> Appender:
        return self

    def __exit__(self, *_: object) -> None:
        self._shard.close()
        self._index.close()

    def append(self, batch: Listed[Finished]) -> None:
        """Write a batch; it exists wholly once this returns, and not at all if it does not.

        Raises:
            UserError: the disk is full or does not let us write; what was finished before is kept.
        """
        with _disk(self._folder):
            if self._end >= self._limit:
                self._shard.close()
                self._number, self._end = self._number + 1, 0
                self._shard = self._open()
            entries = np.zeros(len(batch), ENTRY)
            offset = self._end
            for entry, item in zip(entries, batch):
                entry["key"], entry["shard"], entry["offset"] = np.void(item.key), self._number, offset
                entry["bytes"], entry["rows"], entry["crc"] = len(item.blob), item.rows, zlib.crc32(item.blob)
                entry["kl"], entry["mass"] = item.kl, item.mass
                offset += len(item.blob)
            self._shard.write(b"".join(item.blob for item in batch))
            _sync(self._shard)
            body = entries.tobytes()
            self._index.write(_RECORD.pack(_MAGIC, len(batch), zlib.crc32(body)) + body)
            _sync(self._index)
        self._end = offset
        self.keys.update(item.key for item in batch)

    def _open(self) -> IO[bytes]:
        path = shard_path(self._folder, self._number)
        with _disk(self._folder):
            shard = path.open("ab")
            shard.truncate(self._end)
        return shard


def read_index(folder: Path) -> tuple[NDArray[np.void], int]:
    """The entries of all whole records, and how many bytes of the index they take."""
    path = folder / "index.bin"
    data = path.read_bytes() if path.exists() else b""
    parts, at = [np.zeros(0, ENTRY)], 0
    while at + _RECORD.size <= len(data):
        magic, count, crc = _RECORD.unpack_from(data, at)
        body = data[at + _RECORD.size : at + _RECORD.size + count * ENTRY.itemsize]
        if magic != _MAGIC or len(body) < count * ENTRY.itemsize or zlib.crc32(body) != crc:
            break
        parts.append(np.frombuffer(body, ENTRY))
        at += _RECORD.size + len(body)
    return np.concatenate(parts), at


def shard_path(folder: Path, number: int) -> Path:
    """The file of a shard."""
    return folder / f"shard-{number:05d}.bin"


def pack(words: NDArray[np.uint16], lengths: NDArray[np.int64]) -> bytes:
    """A sequence's blob: the width of a length in bytes, each row's words, then all words, little endian."""
    wide = int(lengths.max(initial=0)) > 255
    counts = lengths.astype("<u2" if wide else "u1")
    return bytes([2 if wide else 1]) + counts.tobytes() + words.astype("<u2").tobytes()


def unpack(blob: bytes, rows: int) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    """Words and lengths of a sequence's blob."""
    wide = blob[0] == 2
    lengths = np.frombuffer(blob, "<u2" if wide else "u1", rows, 1).astype(np.int64)
    return np.frombuffer(blob, "<u2", int(lengths.sum()), 1 + rows * (1 + wide)), lengths


def _sortable(keys: NDArray[np.void]) -> NDArray[np.bytes_]:
    return np.ascontiguousarray(keys).view("S16")


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _lock(file: IO[bytes], folder: Path) -> None:
    if os.name != "posix":
        return
    import fcntl

    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(f"Another process is writing the cache {folder}: wait for it, or choose a folder.") from error


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = "has no room left" if error.errno in (errno.ENOSPC, errno.EDQUOT) else f"refuses ({error.strerror})"
        raise UserError(
            f"The disk of the cache {folder} {what}: mend that and run the same command again, it goes on from the "
            "last finished batch."
        ) from error
