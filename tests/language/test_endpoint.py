import asyncio
import email.utils
import json
import logging
import os
import random
import signal
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("httptools", reason="an endpoint needs the extra teachers")

from preceptor.errors import UserError
from preceptor.language import Budget, Chat, ChatSettings, Endpoint, Limits, Reply, Request, open_chat
from preceptor.language.endpoint import _retry_after
from tests.loopback import Call, Deed, Loopback, http, refuses, says, writes

KEY = 'sk-tell+nobody/"ever"-4711'


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("preceptor.language.limits.FIRST_WAIT", 0.01)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def ask(text: str, **fields: Any) -> Request:
    return Request(({"role": "user", "content": text},), **fields)


def chat(server: Loopback, *, budget: Budget | None = None, cache: str = "", **limits: Any) -> Chat:
    return Chat(Endpoint(server.url, "m"), budget=budget, cache=cache or None, limits=Limits(**limits))


def in_turn(*deeds: Deed) -> Loopback:
    """The first calls get these deeds, one each, the others are answered."""
    return Loopback(lambda call: deeds[call.number] if call.number < len(deeds) else says())


def test_a_request_is_sent_and_its_answer_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", KEY)
    with Loopback(lambda call: says("An answer.", finish="length")) as server:
        settings = ChatSettings(model="m", base_url=server.url + "/", key_variable="SOME_KEY", native_schema=True)
        schema = {"type": "string"}
        request = ask("one two", max_tokens=9, temperature=0.5, seed=3, stop=("!",), schema=schema)
        [reply] = Chat(open_chat(settings).backend, limits=Limits(schema_attempts=1)).ask([request])
        [plain] = chat(server).ask([ask("one two")])
    assert plain == Reply("An answer.", 2, 2, cut=True)
    assert reply.error.endswith("it was cut off because it is too long, so it must be shorter")
    first, second = server.calls
    assert (first.method, first.path) == ("POST", "/v1/chat/completions")
    assert first.headers["authorization"] == f"Bearer {KEY}"
    assert first.headers["host"] == server.url.split("/")[2]
    assert {name: first.body[name] for name in ("model", "max_tokens", "temperature", "seed", "stop")} == {
        "model": "m",
        "max_tokens": 9,
        "temperature": 0.5,
        "seed": 3,
        "stop": ["!"],
    }
    assert first.body["response_format"]["json_schema"]["schema"] == schema
    assert "authorization" not in second.headers
    assert second.body == {
        "model": "m",
        "messages": [{"role": "user", "content": "one two"}],
        "max_tokens": 256,
        "temperature": 0.0,
    }


def test_calls_under_way_are_bounded() -> None:
    with Loopback(lambda call: says(seconds=0.02)) as server:
        replies = chat(server, concurrency=3).ask([ask(f"{index}") for index in range(30)])
    assert [reply.text for reply in replies] == [f"said {index}" for index in range(30)]
    assert server.most == 3
    assert sorted(server.asked) == sorted(f"{index}" for index in range(30))


def test_seconds_of_retry_after_are_waited_by_all_calls() -> None:
    with in_turn(refuses(429, Retry_After="1")) as server:
        assert not any(reply.error for reply in chat(server, concurrency=1).ask([ask("x"), ask("y")]))
    refused, *others = server.calls
    assert len(others) == 2
    assert all(call.arrived - refused.arrived >= 1.0 for call in others)


def test_a_date_of_retry_after_is_waited_for() -> None:
    until = int(time.time()) + 2
    with in_turn(refuses(503, Retry_After=email.utils.formatdate(until, usegmt=True))) as server:
        assert chat(server).ask([ask("x")])[0].text == "said x"
        assert time.time() >= until
    assert len(server.calls) == 2


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
        ({"retry-after-ms": "250", "retry-after": "1"}, 0.25),
    ],
)
def test_retry_after_is_read(headers: dict[str, str], seconds: float | None) -> None:
    assert _retry_after(headers) == seconds


def test_too_much_patience_is_a_failure() -> None:
    with in_turn(refuses(429, Retry_After="86400")) as server:
        [reply] = chat(server).ask([ask("x")])
    assert "asks to wait 86400 s" in reply.error
    assert len(server.calls) == 1


SLOW, SHORT = ("silence", "a slow body"), 1.0
FAULTS: dict[str, tuple[Deed, str]] = {
    "500": (refuses(500), "500 no"),
    "502 with a page": (refuses(502, "<html>Bad\n gateway</html>"), "502 <html>Bad gateway</html>"),
    "429 without a time": (refuses(429), "429 no"),
    "reset": (writes(b"", then="reset"), "the connection broke"),
    "closed": (writes(b"", then="close"), "the connection broke"),
    "half an answer": (writes(http(200, '{"choices": [{"message"')[:-5], then="close"), "the connection broke"),
    "half a head": (writes(b"HTTP/1.1 200 OK\r\nContent-Le", then="close"), "the connection broke"),
    "no HTTP": (writes(b"\x16\x03\x01\x02 hello\r\n\r\n"), "the connection broke (the answer is not HTTP"),
    "no JSON": (writes(http(200, "Internal error")), "the answer is not JSON ('Internal error')"),
    "half JSON": (writes(http(200, '{"choices": [')), "the answer is not JSON"),
    "deep JSON": (writes(http(200, "[" * 100_000)), "the answer is not JSON"),
    "a list": (writes(http(200, "[1]")), "the answer is not JSON"),
    "no choices": (writes(http(200, '{"choices": []}')), "the answer has no choices[0]"),
    "wrong choices": (writes(http(200, '{"choices": ["x"]}')), "the answer has no choices[0]"),
    "silence": (writes(b"", seconds=60.0), "no answer within 1 s"),
    "a slow body": (writes(http(200, "{" + " " * 500)[:-400], seconds=60.0), "no answer within 1 s"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_that_pass_are_outlived(fault: str) -> None:
    deed, _ = FAULTS[fault]
    with in_turn(deed, deed) as server:
        asking = chat(server, call_seconds=SHORT if fault in SLOW else 60.0, cache="cache.sqlite")
        assert asking.ask([ask("x")]) == [Reply("said x", 1, 2)]
        assert asking.spent.calls == len(server.calls) == 3
        assert asking.failures() == []


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_that_last_are_told_and_kept(fault: str) -> None:
    deed, reason = FAULTS[fault]
    with Loopback(lambda call: deed if call.asked == "bad" else says()) as server:
        asking = chat(server, call_seconds=SHORT if fault in SLOW else 60.0, attempts=2, cache="cache.sqlite")
        good, bad = asking.ask([ask("good"), ask("bad")])
    assert good.text == "said good"
    assert bad.error.startswith(reason)
    assert bad.error.endswith(", after 2 attempts")
    assert asking.failures() == [(ask("bad"), bad.error)]
    assert sorted(server.asked) == ["bad", "bad", "good"]


@pytest.mark.parametrize(
    ("deed", "reason"),
    [
        (refuses(400, '{"error": {"message": "too long"}}'), "400 too long"),
        (refuses(422, '{"detail": [{"msg": "what?"}]}'), '422 [{"msg": "what?"}]'),
        (refuses(429, '{"error": {"message": "pay", "code": "insufficient_quota"}}'), "429 pay"),
        (refuses(501, '{"error": "no such thing"}'), "501 no such thing"),
        (refuses(308, "", Location="http://elsewhere/v1"), "308, moved to http://elsewhere/v1: correct base_url"),
        (writes(http(200, '{"choices": [{"message": {"content": null}, "finish_reason": "tool"}]}')), "holds no text"),
    ],
)
def test_faults_that_do_not_pass_are_not_tried_again(deed: Deed, reason: str) -> None:
    with in_turn(deed) as server:
        [reply] = chat(server).ask([ask("x")])
    assert reason in reply.error
    assert len(server.calls) == 1


def answer(call: Call) -> str:
    return json.dumps({"choices": [{"message": {"content": f"said {call.asked}"}}]})


def framed(kind: str) -> Deed:
    """One answer in another of HTTP's forms."""

    async def deed(writer: Any, call: Call) -> None:
        raw = answer(call).encode()
        if kind == "chunked":
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            for part in (raw[:7], raw[7:]):
                writer.write(b"%x\r\n%b\r\n" % (len(part), part))
                await writer.drain()
            writer.write(b"0\r\n\r\n")
        elif kind == "until closed":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n" + raw)
            writer.close()
        elif kind == "announced":
            writer.write(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + http(200, raw.decode()))
        elif kind == "closing":
            writer.write(http(200, raw.decode(), Connection="close"))
            writer.close()
        else:
            for byte in http(200, raw.decode()):
                writer.write(bytes([byte]))
                await writer.drain()

    return deed


@pytest.mark.parametrize("kind", ["chunked", "until closed", "announced", "closing", "byte by byte"])
def test_every_form_of_http_is_read(kind: str) -> None:
    with Loopback(lambda call: framed(kind)) as server:
        replies = chat(server, concurrency=2, attempts=1).ask([ask(f"{index}") for index in range(6)])
    assert [reply.text for reply in replies] == [f"said {index}" for index in range(6)]


def test_what_newer_models_call_the_limit_is_learned() -> None:
    def script(call: Call) -> Deed:
        known = "max_completion_tokens" in call.body
        return says() if known else refuses(400, '{"error": {"message": "use max_completion_tokens"}}')

    with Loopback(script) as server:
        replies = chat(server, concurrency=1).ask([ask("x"), ask("y")])
    assert [reply.text for reply in replies] == ["said x", "said y"]
    assert len(server.calls) == 3


def test_a_limit_that_is_too_large_is_not_tried_again() -> None:
    too_large = '{"error": {"message": "max_completion_tokens is too large"}}'
    with Loopback(lambda call: refuses(400, too_large)) as server:
        [reply] = chat(server).ask([ask("x")])
        assert "is too large" in reply.error
        assert len(server.calls) == 2


def test_tokens_not_told_are_counted_at_their_most() -> None:
    with Loopback(lambda call: says(usage=False)) as server:
        [reply] = chat(server).ask([ask("xy", max_tokens=10)])
    assert reply.completion_tokens == 10
    assert reply.prompt_tokens >= 2


def test_calls_with_an_unknown_end_count_at_their_most() -> None:
    with Loopback(lambda call: writes(b"", seconds=60.0)) as server:
        asking = chat(server, call_seconds=0.1, attempts=1)
        asking.ask([ask("xy", max_tokens=10)])
    assert asking.spent.completion_tokens == 10
    with Loopback(lambda call: refuses(500)) as server:
        asking = chat(server, attempts=2)
        asking.ask([ask("xy", max_tokens=10)])
    assert (asking.spent.calls, asking.spent.tokens) == (2, 0)


def test_the_budget_counts_repetitions() -> None:
    with in_turn(refuses(500), refuses(500)) as server:
        asking = chat(server, budget=Budget(calls=4), concurrency=1)
        replies = asking.ask([ask(f"{index}") for index in range(5)])
    assert len(server.calls) == 4
    assert sum(not reply.error for reply in replies) == 2


def test_an_ask_has_its_time() -> None:
    with Loopback(lambda call: says(seconds=0.0 if call.number < 3 else 60.0)) as server:
        asking = chat(server, concurrency=1, total_seconds=2.0, cache="cache.sqlite")
        replies = asking.ask([ask(f"{index}") for index in range(6)])
    assert [bool(reply.error) for reply in replies] == [False] * 3 + [True] * 3
    assert "no answer within" in replies[3].error
    assert replies[5].error == "not answered: the time of 2 s was up"
    assert len(server.calls) == 4


def test_an_endpoint_that_is_gone_is_not_asked_on_and_on() -> None:
    with Loopback(lambda call: refuses(500)) as server:
        replies = chat(server, concurrency=2, attempts=1).ask([ask(f"{index}") for index in range(100)])
    assert len(server.calls) <= 10
    assert replies[99].error.startswith("not answered: 8 calls failed one after another, the last with: 500 no")


def test_nothing_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UserError, match="start the server, or correct the address"):
        Chat(Endpoint(f"http://127.0.0.1:{port}/v1", "m")).ask([ask("x"), ask("y")])


def test_a_refused_key_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", KEY)
    with Loopback(lambda call: refuses(401, json.dumps({"error": {"message": f"bad key {KEY}"}}))) as server:
        with pytest.raises(UserError, match="put a valid key into the environment variable SOME_KEY") as refused:
            Chat(Endpoint(server.url, "m", key_variable="SOME_KEY")).ask([ask("x")] * 20)
        with pytest.raises(UserError, match="name the environment variable that holds the key"):
            chat(server).ask([ask("x")])
    assert KEY not in str(refused.value)
    assert "bad key [key]" in str(refused.value)


def test_a_refused_key_later_on_is_a_failure_of_that_call() -> None:
    with Loopback(lambda call: says() if call.number < 2 else refuses(401)) as server:
        replies = chat(server, concurrency=1).ask([ask(f"{index}") for index in range(4)])
    assert [reply.error for reply in replies] == ["", "", "401 no", "401 no"]


def test_an_unknown_model_is_one_sentence_with_those_known() -> None:
    def script(call: Call) -> Deed:
        listed = json.dumps({"data": [{"id": f"model-{index}"} for index in range(7)]})
        return writes(http(200, listed)) if call.method == "GET" else refuses(404, '{"error": "model not found"}')

    with Loopback(script) as server, pytest.raises(UserError) as refused:
        chat(server).ask([ask("x")])
    assert 'has no model "m"' in str(refused.value)
    assert '"model-0", "model-1"' in str(refused.value)
    with Loopback(lambda call: refuses(404)) as server, pytest.raises(UserError, match="correct one of them"):
        chat(server).ask([ask("x")])


ECHOES: dict[str, Deed] = {
    "in an answer": says(f"your key is {KEY}"),
    "in an error": refuses(400, json.dumps({"error": {"message": f"bad key {KEY} in Authorization: Bearer {KEY}"}})),
    "in a page": refuses(500, f"<pre>Authorization: Bearer {KEY}</pre>"),
    "in an address": refuses(302, "", Location="http://x/?key=sk-tell%2Bnobody%2F%22ever%22-4711"),
    "escaped": writes(http(200, '{"choices": [{"message": {"content": "sk\\u002dtell+nobody/\\u0022ever\\"-4711"}}]}')),
    "in no JSON": writes(http(200, f"{KEY} is not JSON")),
    "in no HTTP": writes(f"HTTP/9.9 {KEY}\r\n\r\n".encode()),
}


@pytest.mark.parametrize("echo", ECHOES)
def test_the_key_reaches_nothing(
    echo: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("SOME_KEY", KEY)
    monkeypatch.setenv("PYTHONASYNCIODEBUG", "1")
    with in_turn(says("first"), *[ECHOES[echo]] * 4) as server:
        endpoint = Endpoint(server.url, "m", key_variable="SOME_KEY")
        asking = Chat(endpoint, cache=tmp_path / "cache.sqlite", limits=Limits(attempts=2, concurrency=1))
        replies = asking.ask([ask("x"), ask("y"), ask("z", schema={"type": "integer"})])
        assert server.calls[1].headers["authorization"] == f"Bearer {KEY}", "the test sends it"
    on_disk = b"".join(path.read_bytes() for path in tmp_path.glob("cache.sqlite*"))
    capture = capfd.readouterr()
    seen = [repr(replies), repr(asking.failures()), repr(vars(endpoint)), endpoint.identity, caplog.text]
    seen += [capture.out, capture.err, on_disk.decode("latin-1")]
    for text in seen:
        assert "4711" not in text
        assert "nobody" not in text
    assert len(on_disk) > 4096, "the answers are there"


@pytest.mark.parametrize("value", ["", "two words", "line\nbreak", "ümlaut"])
def test_keys_that_cannot_be_sent_are_refused_unseen(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", value)
    with pytest.raises(UserError, match="SOME_KEY") as refused:
        Endpoint("http://127.0.0.1:1/v1", "m", key_variable="SOME_KEY")
    assert not value or value not in str(refused.value)


# A real server tells log-probabilities of a text where it knows vLLM's parameters; this one stands in for it.


def scorer(call: Call) -> Deed:
    words = " ".join(str(message["content"]) for message in call.body["messages"]).split()
    body: dict[str, Any] = {
        "choices": [{"message": {"content": "x"}}],
        "usage": {"prompt_tokens": len(words), "completion_tokens": 1},
    }
    if "prompt_logprobs" in call.body:
        rows = [{str(place): {"logprob": -float(len(word))}} for place, word in enumerate(words)]
        body["prompt_logprobs"] = [None, *rows[1:]]
    return writes(http(200, json.dumps(body)))


def test_log_probabilities_of_an_endpoint() -> None:
    with Loopback(scorer) as server:
        asking = chat(server)
        found = asking.log_probabilities(({"role": "user", "content": "one two"},), ["four", "a big answer"])
        assert found == [(-4.0,), (-1.0, -3.0, -6.0)]
        assert asking.spent.calls == len(server.calls) == 3
        last = server.calls[-1].body
        assert last["continue_final_message"] is True
        assert last["add_generation_prompt"] is False
        with pytest.raises(UserError, match="the budget of 2 calls is used up"):
            chat(server, budget=Budget(calls=2)).log_probabilities(({"role": "user", "content": "x"},), ["a", "b"])


def test_one_continuation_that_fails_is_made_again_alone() -> None:
    with Loopback(lambda call: refuses(503) if call.number == 2 else scorer(call)) as server:
        asking = chat(server, concurrency=1)
        found = asking.log_probabilities(({"role": "user", "content": "one two"},), ["four", "nine", "eleven"])
        assert found == [(-4.0,), (-4.0,), (-6.0,)]
        assert asking.spent.calls == len(server.calls) == 5
        assert asking.spent.tokens == 2 + 3 * 3 + 4  # the four that were answered


@pytest.mark.parametrize("known", [says(), refuses(422, '{"detail": "Unexpected field prompt_logprobs"}')])
def test_an_endpoint_without_log_probabilities_says_so(known: Deed) -> None:
    with (
        Loopback(lambda call: known if call.number else says()) as server,
        pytest.raises(UserError, match="gives no log-probabilities"),
    ):
        chat(server).log_probabilities(({"role": "user", "content": "x"},), ["a"])


# The way to the host


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    path = tmp_path / "certificate.pem"
    words = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    try:
        subprocess.run([*words.split(), "-keyout", path, "-out", tmp_path / "x"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("openssl, which makes a certificate for loopback, is not installed")
    path.write_text(path.read_text() + (tmp_path / "x").read_text())
    return path


def test_tls_is_spoken_and_certificates_are_checked(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with Loopback(tls=context) as server:
        with pytest.raises(UserError, match="CERTIFICATE_VERIFY_FAILED"):
            chat(server).ask([ask("x")])
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        replies = chat(server, concurrency=2).ask([ask(f"{index}") for index in range(4)])
    assert [reply.text for reply in replies] == [f"said {index}" for index in range(4)]


class Tunnel(Loopback):
    """A proxy that lets CONNECT through to wherever ``target`` is."""

    target = 0

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        headers = dict(line.split(": ") for line in head.split("\r\n")[1:-2])
        self.calls.append(Call(0, *head.split()[:2], headers, {}, 0.0))
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")

        async def pass_on(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            while part := await source.read(4096):
                sink.write(part)
            sink.close()

        await asyncio.gather(pass_on(reader, far_writer), pass_on(far_reader, writer), return_exceptions=True)


def test_tls_goes_through_the_tunnel_of_a_proxy(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with Loopback(tls=context) as server, Tunnel() as proxy:
        proxy.target = server.port
        monkeypatch.setenv("https_proxy", f"http://me:pass%20word@127.0.0.1:{proxy.port}")
        replies = chat(server, concurrency=2).ask([ask(f"{index}") for index in range(5)])
    assert [reply.text for reply in replies] == [f"said {index}" for index in range(5)]
    assert [call.path for call in proxy.calls] == [f"localhost:{server.port}"] * 2
    assert proxy.calls[0].headers["Proxy-Authorization"] == "Basic bWU6cGFzcyB3b3Jk"
    assert "proxy-authorization" not in server.calls[0].headers


def test_an_answer_that_nobody_asked_for_is_nobodys() -> None:
    async def twice(writer: Any, call: Call) -> None:
        writer.write(http(200, answer(call)) + http(200, '{"choices": [{"message": {"content": "stale"}}]}'))

    with Loopback(lambda call: twice) as server:
        replies = chat(server, concurrency=2, attempts=1).ask([ask(f"{index}") for index in range(8)])
    assert [reply.text for reply in replies] == [f"said {index}" for index in range(8)]


def test_a_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with Loopback() as proxy:
        monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/v1"))
        assert Chat(Endpoint("http://model.test/v1", "m")).ask([ask("x")])[0].text == "said x"
        assert proxy.calls[0].path == "http://model.test/v1/chat/completions"
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        with Loopback() as server:
            chat(server).ask([ask("y")])
            assert server.asked == ["y"]


def test_a_tunnel_that_is_refused_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with Loopback(lambda call: refuses(403)) as proxy:
        monkeypatch.setenv("https_proxy", proxy.url.removesuffix("/v1"))
        with pytest.raises(UserError, match="the proxy answered 403"):
            Chat(Endpoint("https://model.test/v1", "m")).ask([ask("x")])
    assert (proxy.calls[0].method, proxy.calls[0].path) == ("CONNECT", "model.test:443")


# Kill and restart

CLIENT = """
import sys
from preceptor.language import Chat, Endpoint, Limits, Request
requests = [Request(({"role": "user", "content": str(index)},), max_tokens=8) for index in range(400)]
chat = Chat(Endpoint(sys.argv[1], "m"), cache="cache.sqlite", limits=Limits(concurrency=16))
replies = chat.ask(requests)
assert [reply.text for reply in replies] == [f"said {index}" for index in range(400)]
"""


def test_killed_at_any_moment_it_asks_nothing_twice_and_loses_nothing(root: Path, tmp_path: Path) -> None:
    """An answer counts as received once its connection carried the next call: only calls under way are made again."""
    draw = random.Random(4)
    moments: list[float] = []
    environment = {**os.environ, "PYTHONPATH": str(root)}
    with Loopback(lambda call: says(seconds=draw.uniform(0.01, 0.03))) as server:
        words = [sys.executable, "-c", CLIENT, server.url]
        for _ in range(5):
            before, more = len(server.calls), draw.randint(1, 90)
            client = subprocess.Popen(words, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
            while client.poll() is None and len(server.calls) < before + more:
                time.sleep(0.001)
            client.send_signal(signal.SIGKILL)
            moments.append(time.monotonic())
            client.wait()
            time.sleep(0.2)
        subprocess.run(words, cwd=tmp_path, env=environment, check=True, timeout=120)
        calls = list(server.calls)
    for moment in moments:
        received = {call.asked for call in calls if call.acknowledged < moment}
        repeated = [call.asked for call in calls if call.arrived > moment and call.asked in received]
        assert not repeated
    assert 400 < len(calls) <= 400 + 5 * 16, "no more than what was under way is made again"
    assert {call.asked for call in calls} == {f"{index}" for index in range(400)}, "nothing is lost"
