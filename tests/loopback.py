"""A chat endpoint on loopback that does what a script tells it, faults included, and remembers what it was asked."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Call:
    """One request that arrived. ``acknowledged``: when its connection carried the next one."""

    number: int
    method: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    arrived: float
    answered: float = float("inf")
    acknowledged: float = float("inf")

    @property
    def asked(self) -> str:
        return str(self.body["messages"][-1]["content"]) if "messages" in self.body else ""


Deed = Callable[[asyncio.StreamWriter, Call], Awaitable[None]]
"""What the server does about a call."""


def says(text: str | None = None, *, usage: bool = True, finish: str = "stop", seconds: float = 0.0) -> Deed:
    """A whole answer; by default it repeats what was asked. One word is one token."""

    async def deed(writer: asyncio.StreamWriter, call: Call) -> None:
        await asyncio.sleep(seconds)
        said = f"said {call.asked}" if text is None else text
        body: dict[str, Any] = {
            "choices": [{"message": {"role": "assistant", "content": said}, "finish_reason": finish}]
        }
        if usage:
            body["usage"] = {"prompt_tokens": len(call.asked.split()), "completion_tokens": len(said.split())}
        writer.write(http(200, json.dumps(body)))

    return deed


def refuses(status: int, body: str = '{"error": {"message": "no"}}', **headers: str) -> Deed:
    async def deed(writer: asyncio.StreamWriter, call: Call) -> None:
        writer.write(http(status, body, **headers))

    return deed


def writes(raw: bytes, *, then: str = "stay", seconds: float = 0.0) -> Deed:
    """Bytes as they are; then it stays open, closes, or resets the connection; or waits before it does anything."""

    async def deed(writer: asyncio.StreamWriter, call: Call) -> None:
        writer.write(raw)
        await writer.drain()
        await asyncio.sleep(seconds)
        if then == "reset":
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        if then != "stay":
            writer.close()

    return deed


def http(status: int, body: str, **headers: str) -> bytes:
    raw = body.encode()
    lines = {"Content-Type": "application/json", "Content-Length": str(len(raw))}
    lines |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"HTTP/1.1 {status} Said\r\n{head}\r\n".encode() + raw


@dataclass
class Loopback:
    """``script``: from a call to the deed. ``calls``: what arrived. ``most``: the most that were under way at once."""

    script: Callable[[Call], Deed] = lambda call: says()
    tls: Any = None
    calls: list[Call] = field(default_factory=list)
    under_way: int = 0
    most: int = 0

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://{'localhost' if self.tls else '127.0.0.1'}:{self.port}/v1"

    @property
    def asked(self) -> list[str]:
        return [call.asked for call in self.calls if call.method == "POST"]

    def __enter__(self) -> Loopback:
        ready = threading.Event()
        self._loop = asyncio.new_event_loop()

        async def start() -> None:
            server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.tls, backlog=256)
            self.port = server.sockets[0].getsockname()[1]
            ready.set()

        def run() -> None:
            self._loop.set_exception_handler(lambda *_: None)  # broken connections are the point
            self._loop.run_until_complete(start())
            self._loop.run_forever()

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()
        ready.wait(10)
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        before: Call | None = None
        while not writer.is_closing():
            try:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                first, *lines = head.split("\r\n")[:-2]
                headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
                raw = await reader.readexactly(int(headers.get("content-length", 0)))
            except (asyncio.IncompleteReadError, ConnectionError):
                break
            method, path, _ = first.split()
            body = json.loads(raw) if raw else {}
            call = Call(len(self.calls), method, path, headers, body, time.monotonic())
            self.calls.append(call)
            if before is not None:
                before.acknowledged = call.arrived
            before = call
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            await self.script(call)(writer, call)
            self.under_way -= 1
            if not writer.is_closing():
                call.answered = time.monotonic()
        writer.close()
