"""Asking an endpoint many things at once: throughput against the ideal and against peers, the cache, and kills.

A server on loopback, in a process of its own, answers every chat completion after 50 ms; 5,000 requests are asked 64
at a time. The ideal is 5,000 x 50 ms / 64. Every figure comes from a fresh process and counts from the first request
made in memory to the last reply in the list, with connections, cache and bookkeeping; the arms take turns and the
figures are medians. ``floor`` is 64 bare sockets that each send prepared bytes and wait for the answer: what the server
can give.

Then the same requests from the full cache, with one changed row, and with SIGKILL at random moments: an answer counts
as acknowledged when its connection carried another request before the kill.

    python benchmarks/language.py [--quick] [--rounds 3] [--save] [--curator-python PATH] [--skip openai ...]

``bespokelabs-curator`` pins other versions than this project: install it into an environment of its own and name that
one's python. Without it, and without the openai client, those arms are left out.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib.util
import json
import os
import random
import selectors
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

LATENCY = 0.05  # seconds
AT_ONCE = 64
REQUESTS = 5000
QUICK_REQUESTS = 1280
ARMS = ("ours", "floor", "openai", "curator")
REPLY = {
    "id": "1",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "An answer."}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer requests, one round: under a minute")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="write benchmarks/language.json")
    parser.add_argument("--skip", nargs="*", default=[], help="arms to leave out")
    parser.add_argument("--curator-python", default="", help="the python of an environment with bespokelabs-curator")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        # epoll counts whole milliseconds; select does not, and the 50 must be 50.
        asyncio.SelectorEventLoop(selectors.SelectSelector()).run_until_complete(_serve())
        return
    if options.child:
        arm, url, count, folder = options.child
        print(json.dumps(CHILDREN[arm](url, int(count), folder)))
        return
    count = QUICK_REQUESTS if options.quick else REQUESTS
    with Server() as server, tempfile.TemporaryDirectory() as folder:
        arms = _arms(options)
        taken = _rounds(arms, server, count, Path(folder), 1 if options.quick else options.rounds)
        found = {"requests": count, "at_once": AT_ONCE, "latency_s": LATENCY, **_ratios(taken, count)}
        found |= _cached(server, count, Path(folder))
        found["kills"] = _kills(server, count, Path(folder), 2 if options.quick else 5)
    if options.save:
        Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found))


def _arms(options: argparse.Namespace) -> dict[str, str]:
    """The arms that can run here, with the python of each."""
    pythons = dict.fromkeys(ARMS, sys.executable) | {"curator": options.curator_python}
    missing = {"openai"} if importlib.util.find_spec("openai") is None else set()
    missing |= {"curator"} if not options.curator_python else set()
    left_out = missing | set(options.skip)
    if left_out:
        print(f"left out: {', '.join(sorted(left_out))}")
    return {arm: pythons[arm] for arm in ARMS if arm not in left_out}


def _rounds(
    arms: dict[str, str], server: Server, count: int, folder: Path, rounds: int
) -> dict[str, list[dict[str, float]]]:
    taken: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
    for turn in range(rounds):
        for arm, python in arms.items():
            before = len(server.log())
            figures = _child(python, arm, server.url, count, folder / f"{arm}-{turn}")
            asked = len(server.log()) - before
            assert arm == "floor" or asked >= count, f"{arm} asked {asked} times"
            taken[arm].append(figures)
            print(f"{arm:<10}{figures['seconds']:>8.3f} s wall{figures['cpu']:>8.3f} s CPU  {asked} calls", flush=True)
    return taken


def _child(python: str, arm: str, url: str, count: int, folder: Path) -> dict[str, float]:
    folder.mkdir(exist_ok=True)
    words = [python, __file__, "--child", arm, url, str(count), str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{arm} failed:\n{done.stderr[-3000:]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def _ratios(taken: dict[str, list[dict[str, float]]], count: int) -> dict[str, Any]:
    ideal = count * LATENCY / AT_ONCE
    arms = {
        arm: {name: round(statistics.median(one[name] for one in figures), 4) for name in ("seconds", "cpu")}
        for arm, figures in taken.items()
    }
    ratios = {f"{arm}_of_ideal": round(ideal / row["seconds"], 4) for arm, row in arms.items()}
    ratios |= {
        f"{arm}_seconds_to_ours": round(row["seconds"] / arms["ours"]["seconds"], 3)
        for arm, row in arms.items()
        if arm in ("openai", "curator")
    }
    return {"ideal_seconds": round(ideal, 4), "ratios": ratios, "arms": arms}


def _cached(server: Server, count: int, folder: Path) -> dict[str, Any]:
    """The same requests again, and with one row changed: seconds and calls of each."""
    found: dict[str, Any] = {}
    for arm in ("ours", "ours_changed"):
        before = len(server.log())
        figures = _child(sys.executable, arm, server.url, count, folder / "ours-0")
        name = "cached" if arm == "ours" else "one_changed"
        found[name] = {"seconds": round(figures["seconds"], 4), "calls": len(server.log()) - before}
    return found


def _kills(server: Server, count: int, folder: Path, kills: int) -> dict[str, int]:
    """Kill a run at random moments and start it again until it is through; what that cost."""
    start, folder = len(server.log()), folder / "killed"
    folder.mkdir()
    moments, repeated, on_the_wire = [], 0, 0
    words = [sys.executable, __file__, "--child", "ours", server.url, str(count), str(folder)]
    for turn in range(kills):
        known = len(server.log())
        child = subprocess.Popen(words, stdout=subprocess.DEVNULL)
        while len(server.log()) == known:
            time.sleep(0.01)
        time.sleep(random.Random(turn).uniform(0, count * LATENCY / AT_ONCE / kills))
        child.send_signal(signal.SIGKILL)
        moments.append(time.monotonic())
        child.wait()
        time.sleep(3 * LATENCY)
    figures = _child(sys.executable, "ours", server.url, count, folder)
    log = server.log()[start:]
    for moment in moments:
        answered = {call["name"]: call for call in log if call["answered"] and call["answered"] < moment}
        later = [call["name"] for call in log if call["arrived"] > moment and call["name"] in answered]
        acknowledged = [name for name in later if answered[name]["acknowledged"] < moment]
        repeated += len(acknowledged)
        on_the_wire += len(later) - len(acknowledged)
    return {
        "kills": kills,
        "lost": count - int(figures["answered"]),
        "repeated": repeated,
        "repeated_unread": on_the_wire,
        "calls_beyond_requests": len(log) - count,
        "at_once": AT_ONCE,
    }


class Server:
    """The server in its own process, which writes down what it was asked."""

    def __enter__(self) -> Server:
        words = [sys.executable, __file__, "--serve"]
        self._process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.url = f"http://127.0.0.1:{int(self._process.stdout.readline())}/v1"
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()

    def log(self) -> list[dict[str, Any]]:
        """Every call so far, in the order of arrival: what was asked, and when it came, was answered, acknowledged."""
        with urllib.request.urlopen(f"{self.url}/log") as answer:
            calls: list[dict[str, Any]] = json.load(answer)
        return calls


async def _serve() -> None:
    loop = asyncio.get_running_loop()
    calls: list[dict[str, Any]] = []
    body = json.dumps(REPLY).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    answer = head % len(body) + body

    class Connection(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport: Any = transport
            self.held = b""
            self.call: dict[str, Any] | None = None

        def data_received(self, data: bytes) -> None:
            self.held += data
            end = self.held.find(b"\r\n\r\n")
            if end < 0:
                return
            if self.held.startswith(b"GET"):
                listed = json.dumps(calls).encode()
                self.transport.write(head % len(listed) + listed)
                self.transport.close()
                return
            place = self.held.lower().find(b"content-length:")
            length = int(self.held[place + 15 : self.held.find(b"\r\n", place)])
            if len(self.held) < end + 4 + length:
                return
            name = self.held[end + 4 :].partition(b"question ")[2].partition(b'"')[0].decode()
            now, self.held = time.monotonic(), b""
            if self.call is not None:
                self.call["acknowledged"] = now
            self.call = {"name": name, "arrived": now, "answered": 0.0, "acknowledged": float("inf")}
            calls.append(self.call)
            loop.call_at(loop.time() + LATENCY, self.answer)

        def answer(self) -> None:
            if not self.transport.is_closing() and self.call is not None:
                self.call["answered"] = time.monotonic()
                self.transport.write(answer)

    gc.freeze()
    gc.disable()  # the log only grows: collecting would halt the server
    server = await loop.create_server(Connection, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def _timed(work: Callable[[], float]) -> dict[str, float]:
    started, cpu = time.perf_counter(), time.process_time()
    answered = work()
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "cpu": time.process_time() - cpu, "answered": answered}


def _ours(url: str, count: int, folder: str, *, changed: bool = False) -> dict[str, float]:
    from preceptor.language import Chat, Endpoint, Limits, Request

    os.environ["BENCHMARK_KEY"] = "not-a-secret-at-all"
    endpoint = Endpoint(url, "m", key_variable="BENCHMARK_KEY")
    chat = Chat(endpoint, cache=f"{folder}/answers.sqlite", limits=Limits(concurrency=AT_ONCE))

    def work() -> float:
        names = [f"{index} once more" if changed and index == 7 else str(index) for index in range(count)]
        requests = [Request(({"role": "user", "content": f"question {name}"},), max_tokens=16) for name in names]
        return sum(not reply.error for reply in chat.ask(requests))

    return _timed(work)


def _ours_changed(url: str, count: int, folder: str) -> dict[str, float]:
    return _ours(url, count, folder, changed=True)


def _floor(url: str, count: int, folder: str) -> dict[str, float]:
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "question 0"}]}).encode()
    call = b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    port = int(url.split(":")[2].split("/")[0])
    left = iter(range(count))

    async def work_one() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in left:
            writer.write(call)
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.partition(b"Content-Length: ")[2].split(b"\r")[0]))
        writer.close()

    return _timed(lambda: float(count) if asyncio.run(_gather([work_one() for _ in range(AT_ONCE)])) else 0.0)


async def _gather(work: list[Awaitable[None]]) -> bool:
    await asyncio.gather(*work)
    return True


def _openai(url: str, count: int, folder: str) -> dict[str, float]:
    from openai import AsyncOpenAI

    async def work() -> int:
        gate = asyncio.Semaphore(AT_ONCE)
        async with AsyncOpenAI(base_url=url, api_key="not-a-secret-at-all") as client:

            async def one(index: int) -> bool:
                messages: Any = [{"role": "user", "content": f"question {index}"}]
                async with gate:
                    said = await client.chat.completions.create(model="m", messages=messages, max_tokens=16)
                return bool(said.choices[0].message.content)

            return sum(await asyncio.gather(*(one(index) for index in range(count))))

    return _timed(lambda: float(asyncio.run(work())))


def _curator(url: str, count: int, folder: str) -> dict[str, float]:
    os.environ |= {"CURATOR_CACHE_DIR": folder, "TELEMETRY_ENABLED": "false", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"OPENAI_API_KEY": "not-a-secret-at-all", "CURATOR_DISABLE_RICH_DISPLAY": "1"}
    # Its token counts need a file from the network, which litellm, which it brings, has too.
    litellm = importlib.util.find_spec("litellm")
    assert litellm is not None
    assert litellm.origin is not None
    os.environ["TIKTOKEN_CACHE_DIR"] = str(Path(litellm.origin).parent / "litellm_core_utils" / "tokenizers")
    from bespokelabs import curator

    parameters = {
        "base_url": url,
        "max_concurrent_requests": AT_ONCE,
        "max_requests_per_minute": 10_000_000,
        "max_tokens_per_minute": 10_000_000_000,
    }
    model = curator.LLM(
        model_name="gpt-4o-mini",
        backend="openai",
        backend_params=parameters,
        generation_params={"max_tokens": 16},
    )

    def work() -> float:
        said: Any = model([f"question {index}" for index in range(count)])
        rows = said.dataset if hasattr(said, "dataset") else said
        return float(len(rows))

    return _timed(work)


CHILDREN: dict[str, Callable[[str, int, str], dict[str, float]]] = {
    "ours": _ours,
    "ours_changed": _ours_changed,
    "floor": _floor,
    "openai": _openai,
    "curator": _curator,
}


if __name__ == "__main__":
    main()
