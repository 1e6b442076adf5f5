"""Any endpoint that speaks OpenAI's chat completions: hosted ones, vLLM, llama.cpp, transformers serve."""

from __future__ import annotations

import asyncio
import email.utils
import importlib
import json
import math
import os
import re
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from preceptor.data.readers import Message
from preceptor.errors import UserError
from preceptor.language.gate import Gate, Size
from preceptor.language.messages import Answer, CallFailed, Request

if TYPE_CHECKING:
    from preceptor.language.connection import Connections


PER_MESSAGE = 16  # tokens at most that a chat template puts around a message


PER_REQUEST = 64  # tokens at most that it puts before all of them (a date, its own system prompt)


BUSY = (408, 409, 425, 429)


GAVE_UP = (408, 502, 504, 524)  # something on the way gave up waiting; the model may have answered


SHORTEST_KEY = 8  # characters; a shorter one is no secret, and hiding it would tear texts apart


LONGEST_REASON = 300


HIDDEN = "[key]"


class Endpoint:
    """A model at an OpenAI-compatible endpoint.

    A prompt is bounded at one token a byte, which no byte-level tokenizer exceeds, and what a template adds. Where an
    endpoint does not tell the tokens of an answer, they are counted at the most that they can be.

    Args:
        base_url: the address before ``/chat/completions``, such as ``http://127.0.0.1:8000/v1``.
        model: the model's name there.
        key_variable: the environment variable that holds the key; empty where none is needed. The key goes into the
            header of each call and nowhere else; where the server repeats it, it is replaced by ``[key]``.
        native_schema: send the schema of a structured answer as ``response_format`` too, so that the server holds the
            model to it. Not every server knows that.

    Raises:
        UserError: an address that is none or holds a key, an unset variable, or a missing package.
    """

    group = 1

    def __init__(self, base_url: str, model: str, *, key_variable: str = "", native_schema: bool = False) -> None:
        try:  # here and not with the first call, which should not wait for it
            importlib.import_module("preceptor.language.connection")
        except ImportError as error:
            needs = 'An endpoint needs the package httptools: run `pip install "preceptor[teachers]"`.'
            raise UserError(needs) from error
        if not model:
            raise UserError(f"No model is named for the endpoint {base_url}: give the name that it has there.")
        self.base_url, self.model = _check_url(base_url), model
        self._path = urllib.parse.urlsplit(self.base_url).path
        self.identity = f"endpoint {self.base_url} {model}{' native_schema' if native_schema else ''}"
        self._native_schema = native_schema
        self._key_variable = key_variable
        self._key = _Key(_read_key(key_variable) if key_variable else "")
        self._limit = "max_tokens"
        self._connections: Connections | None = None
        self._reached = self._answered = False

    def prompt_bound(self, request: Request) -> int:
        """One token a byte, and what a chat template adds."""
        content = sum(len(message["content"].encode("utf-8", "replace")) for message in request.messages)
        schema = len(json.dumps(request.schema)) if request.schema and self._native_schema else 0
        return content + schema + PER_MESSAGE * len(request.messages) + PER_REQUEST

    async def answer(self, requests: Sequence[Request]) -> list[Answer | CallFailed]:
        """The endpoint's answer to one request.

        Raises:
            CallFailed: no answer came, or one without content.
            UserError: nothing listens there, the key is refused, or there is no such model, and nothing was ever
                answered: what happens later is a failure of that call.
        """
        [request] = requests
        body = await self._post("/chat/completions", self._body(request))
        try:
            choice = body["choices"][0]
            text, finish = choice["message"]["content"], choice.get("finish_reason")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise CallFailed("the answer has no choices[0].message.content", again=True, charged=True) from error
        if not isinstance(text, str):
            raise CallFailed(f"the answer holds no text (finish_reason {finish!r})", charged=True)
        prompt, completion = _used(body) or (self.prompt_bound(request), request.max_tokens)
        sound = self._hide(text).encode("utf-8", "replace").decode()  # JSON may bring half a character
        return [Answer(sound, prompt, completion, cut=finish == "length")]

    async def log_probabilities(
        self, messages: Sequence[Message], continuations: Sequence[str], gate: Gate
    ) -> list[tuple[float, ...]]:
        """Of each token of each continuation, in nats, by ``prompt_logprobs``, which vLLM knows.

        One call counts the prompt's tokens, then one a continuation reads it as the assistant's unfinished answer.

        Raises:
            CallFailed: no answer came.
            Stopped: the budget or the time is used up.
            UserError: the server gives no ``prompt_logprobs``.
        """
        free = asyncio.Semaphore(gate.limits.concurrency)

        async def post(read: Sequence[Message], **asked: Any) -> dict[str, Any]:
            request = Request(tuple(read), max_tokens=1)
            size = Size(1, self.prompt_bound(request), 1)
            body = {**self._body(request), **asked}
            async with free:
                return await gate.call(
                    size,
                    lambda: self._post("/chat/completions", body),
                    lambda body: _used(body) or (size.prompt, size.completion),
                )

        first = await post(messages)
        known = {"prompt_logprobs": 0, "add_generation_prompt": False, "continue_final_message": True}
        ends: list[Message] = [{"role": "assistant", "content": text} for text in continuations]
        try:
            body = await asyncio.gather(*(post((*messages, end), **known) for end in ends))
            start = int(first["usage"]["prompt_tokens"])
            rows = [[next(iter(place.values()))["logprob"] for place in one["prompt_logprobs"][1:]] for one in body]
        except (CallFailed, KeyError, IndexError, TypeError, AttributeError) as error:
            if isinstance(error, CallFailed) and error.status not in (400, 422):
                raise
            raise UserError(
                f"The endpoint {self.base_url} gives no log-probabilities of a given text: ask a local model, or a "
                "server that knows prompt_logprobs (vLLM)."
            ) from error
        # The first token of a prompt follows on nothing and has no probability.
        return [tuple(map(float, row[start - 1 :])) for row in rows]

    async def close(self) -> None:
        """Close the connections."""
        if self._connections is not None:
            self._connections.close()
            self._connections = None

    def _body(self, request: Request) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": list(request.messages),
            self._limit: request.max_tokens,
            "temperature": request.temperature,
        }
        if request.temperature > 0:  # some servers refuse a seed, and greedy decoding needs none
            body["seed"] = request.seed
        if request.stop:
            body["stop"] = list(request.stop)
        if request.schema is not None and self._native_schema:
            form = {"name": "answer", "schema": request.schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        return body

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        from preceptor.language.connection import Unreachable

        connections = self._connections = self._connections or self._connect()
        try:
            response = await connections.call("POST", self._path + path, json.dumps(body).encode())
        except Unreachable as error:
            if not self._reached:
                raise UserError(
                    f"Nothing answers at {self.base_url} ({error}): start the server, or correct the address."
                ) from None
            raise CallFailed(f"no connection ({error})", again=True) from None
        except OSError as error:
            raise CallFailed(f"the connection broke ({self._hide(str(error))})", again=True, charged=True) from None
        self._reached = True
        text = self._hide(response.body.decode("utf-8", "replace"))
        if response.status != 200:
            await self._refuse(response.status, text, response.headers)
        try:
            answered: Any = json.loads(text)
        except (ValueError, RecursionError):
            answered = None
        if not isinstance(answered, dict):
            raise CallFailed(f"the answer is not JSON ({_shorten(text)!r})", again=True, charged=True)
        self._answered = True
        return answered

    def _connect(self) -> Connections:
        from preceptor.language.connection import Connections

        headers = {"User-Agent": "preceptor", "Content-Type": "application/json", "Accept": "application/json"}
        if self._key.text:
            headers["Authorization"] = f"Bearer {self._key.text}"
        return Connections(self.base_url, headers)

    async def _refuse(self, status: int, text: str, headers: Mapping[str, str]) -> NoReturn:
        """Raise what an answer other than 200 means."""
        reason = self._hide(f"{status} {_message(text)}".strip())
        if status == 401 and not self._answered:
            mend = (
                f"put a valid key into the environment variable {self._key_variable}"
                if self._key_variable
                else "name the environment variable that holds the key (key_variable)"
            )
            raise UserError(f"The endpoint {self.base_url} refuses the key ({reason}): {mend}.")
        if status == 404 and not self._answered:
            raise UserError(
                f'The endpoint {self.base_url} has no model "{self.model}", or the address is not that of chat '
                f"completions ({reason}): {await self._models()}."
            )
        if 300 <= status < 400:
            reason = f"{status}, moved to {self._hide(headers.get('location', 'nowhere'))}: correct base_url"
        if status == 400 and "max_completion_tokens" in text and self._limit == "max_tokens":  # what newer ones call it
            self._limit = "max_completion_tokens"
            raise CallFailed(reason, again=True, wait=0.0)
        again = (status in BUSY or status >= 500) and status != 501 and "insufficient_quota" not in text
        raise CallFailed(reason, again=again, wait=_retry_after(headers), charged=status in GAVE_UP, status=status)

    async def _models(self) -> str:
        """What to do about a model that is not there: the names that are."""
        assert self._connections is not None
        try:
            asked = self._connections.call("GET", self._path + "/models")
            listed = json.loads(self._hide((await asyncio.wait_for(asked, 5)).body.decode()))
            names = [str(model["id"]) for model in listed["data"]]
        except Exception:  # whatever goes wrong, the error that is being reported is another one
            names = []
        shown = ", ".join(f'"{name}"' for name in names[:5])
        return f"it has {shown}{' and others' if len(names) > 5 else ''}" if names else "correct one of them"

    def _hide(self, text: str) -> str:
        """The text without the key, in any form that a server may have brought it in."""
        for form in self._key.forms:
            if form in text:
                text = text.replace(form, HIDDEN)
        return text


class _Key:
    """A key that is not shown when it is printed. ``forms``: how it may stand in a text; none if it is no secret."""

    __slots__ = ("forms", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        secret = len(text) >= SHORTEST_KEY
        self.forms = {text, json.dumps(text)[1:-1], urllib.parse.quote(text, safe="")} if secret else set()

    def __repr__(self) -> str:
        return HIDDEN


def check_key_variable(name: str) -> None:
    """Refuse what is no name of a variable, and may be the key itself, without repeating it.

    Raises:
        UserError: the name has other signs than capitals, digits and underscores.
    """
    if name and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
        raise UserError(
            "key_variable must be the name of an environment variable (capitals, digits, underscores), never the key "
            "itself: for instance OPENAI_API_KEY."
        )


def _read_key(variable: str) -> str:
    check_key_variable(variable)
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(
            f"The environment variable {variable}, which should hold the endpoint's key, is not set: "
            f"`export {variable}=...`, or leave key_variable empty where no key is needed."
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"The key in the environment variable {variable} has blanks or signs that no key has: mend it.")
    return key


def _check_url(url: str) -> str:
    try:
        parts = urllib.parse.urlsplit(url)
        sound = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
        sound = sound and url.isascii() and url.isprintable() and " " not in url
    except ValueError:
        sound = False
    if not sound:
        raise UserError(f'The address "{url}" is no endpoint\'s: give one such as http://127.0.0.1:8000/v1.')
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UserError(
            f"The address of the endpoint at {parts.hostname} holds a name, a key or a query: give the bare address, "
            "and the key in an environment variable (key_variable)."
        )
    return url.rstrip("/").removesuffix("/chat/completions")


def _used(body: dict[str, Any]) -> tuple[int, int] | None:
    """The tokens read and written that an answer tells, where it does."""
    used: Any = body.get("usage") if isinstance(body.get("usage"), dict) else {}
    prompt, completion = used.get("prompt_tokens"), used.get("completion_tokens")
    return (prompt, completion) if isinstance(prompt, int) and isinstance(completion, int) else None


def _message(text: str) -> str:
    """The message in the body of a refusal."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return _shorten(text)
    for name in ("error", "message", "detail"):
        while isinstance(body, dict) and name in body:
            body = body[name]
    return _shorten(body if isinstance(body, str) else json.dumps(body))


def _shorten(text: str) -> str:
    plain = " ".join(text.split())
    return plain if len(plain) <= LONGEST_REASON else f"{plain[:LONGEST_REASON]}..."


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the endpoint asks to wait, from Retry-After in seconds or as a date, or its milliseconds."""
    asked, factor = headers.get("retry-after-ms"), 1e-3
    if asked is None:
        asked, factor = headers.get("retry-after"), 1.0
    if asked is None:
        return None
    try:
        seconds = float(asked) * factor
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(asked).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
