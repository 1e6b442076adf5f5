"""HTTP/1.1 to one host over connections that stay open, each for one call at a time.

Small, because throughput at many calls a second is what the general clients lack: their work for one call takes longer
than the rest of the way together. The parsing of what comes back is httptools', the transport asyncio's.
"""

from __future__ import annotations

import asyncio
import base64
import ssl
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from typing import cast

from httptools import HttpParserError, HttpResponseParser

LARGEST_BODY = 64 << 20  # bytes


CONNECT_SECONDS = 30.0


class Unreachable(Exception):
    """No connection could be made; nothing was sent."""


@dataclass
class Response:
    """What came back. ``headers``: by name in small letters."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)


class Connection(asyncio.Protocol):
    """One connection. ``open`` as long as another call can be made on it."""

    def __init__(self) -> None:
        self.open = True
        self._parser = HttpResponseParser(self)
        self._response = Response()
        self._done: asyncio.Future[Response] | None = None
        self._head_only = False

    async def exchange(self, call: bytes, *, head_only: bool = False) -> Response:
        """Send a call and wait for what comes back; ``head_only``: for its head, after which no HTTP follows.

        Raises:
            ConnectionError: the connection broke before the answer was whole, or the answer is not HTTP.
        """
        self._response, self._head_only = Response(), head_only
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(call)
        try:
            return await self._done
        except asyncio.CancelledError:
            self.close()  # an answer on its way belongs to no later call
            raise
        finally:
            self._done = None

    def close(self) -> None:
        """Break it off."""
        self.open = False
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio's: the transport to write to. That of another event loop (uvloop) has the same methods, no base."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """asyncio's: bytes of an answer."""
        try:
            self._parser.feed_data(data)
        except HttpParserError as error:
            self._fail(f"the answer is not HTTP: {error}")

    def connection_lost(self, error: Exception | None) -> None:
        """asyncio's: the end. It also ends an answer whose length was not given."""
        self.open = False
        headers = self._response.headers
        if headers and not {"content-length", "transfer-encoding"} & headers.keys() and error is None:
            self.on_message_complete()
        self._fail(str(error) if error else "the server closed it before the answer was whole")

    def on_message_begin(self) -> None:
        """httptools': an answer begins; one that nobody waits for spoils the connection."""
        self._response = Response()
        if self._done is None or self._done.done():
            self._retire()

    def on_header(self, name: bytes, value: bytes) -> None:
        """httptools': a header of the answer."""
        self._response.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """httptools': the head is whole."""
        if self._head_only and self._done is not None and not self._done.done():
            self._response.status = self._parser.get_status_code()
            self._done.set_result(self._response)

    def on_body(self, body: bytes) -> None:
        """httptools': a part of the body."""
        self._response.body += body
        if len(self._response.body) > LARGEST_BODY:
            self._fail(f"the answer is longer than {LARGEST_BODY >> 20} MiB")

    def on_message_complete(self) -> None:
        """httptools': the answer is whole; one with a status below 200 only announces another."""
        status = self._parser.get_status_code()
        if 100 <= status < 200:
            return
        if not self._parser.should_keep_alive():
            self._retire()
        if self._done is not None and not self._done.done():
            self._response.status = status
            self._done.set_result(self._response)

    def _retire(self) -> None:
        """No further call on it."""
        self.open = False
        self._transport.close()

    def _fail(self, reason: str) -> None:
        self.open = False
        if self._done is not None and not self._done.done():
            self._done.set_exception(ConnectionError(reason))
            self._transport.abort()


class Connections:
    """The connections to one host, through a proxy where the environment names one (``https_proxy``, ``no_proxy``).

    ``url``: scheme, host and port. ``headers``: sent with every call.
    """

    def __init__(self, url: str, headers: dict[str, str]) -> None:
        parts = urllib.parse.urlsplit(url)
        secure = parts.scheme == "https"
        assert parts.hostname is not None
        self._host, self._port = parts.hostname, parts.port or (443 if secure else 80)
        self._tls = ssl.create_default_context() if secure else None
        bypassed = urllib.request.proxy_bypass(parts.netloc)
        named = None if bypassed else urllib.request.getproxies().get(parts.scheme)
        self._proxy = None if named is None else urllib.parse.urlsplit(named if "//" in named else f"//{named}")
        self._to_proxy = "" if self._proxy is None else _credentials(self._proxy)
        # A proxy forwards plain HTTP by the whole address, and TLS through a tunnel.
        forwarded = self._proxy is not None and not secure
        self._before = f"{parts.scheme}://{parts.netloc}" if forwarded else ""
        lines = {"Host": parts.netloc, **headers}
        self._head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self._head += self._to_proxy if forwarded else ""
        self._free: list[Connection] = []
        self._all: list[Connection] = []

    async def call(self, method: str, path: str, body: bytes = b"") -> Response:
        """One call on a connection that is free, or on a new one.

        Raises:
            Unreachable: there is none.
            ConnectionError: it broke.
        """
        head = f"{method} {self._before}{path} HTTP/1.1\r\n{self._head}Content-Length: {len(body)}\r\n\r\n"
        connection = await self._take()
        response = await connection.exchange(head.encode("latin-1") + body)
        if connection.open:
            self._free.append(connection)
        return response

    def close(self) -> None:
        """Close all of them."""
        for connection in self._all:
            connection.close()
        self._all.clear()
        self._free.clear()

    async def _take(self) -> Connection:
        while self._free:
            connection = self._free.pop()
            if connection.open:
                return connection
        try:
            connection = await asyncio.wait_for(self._connect(), CONNECT_SECONDS)
        except asyncio.TimeoutError:
            raise Unreachable(f"no connection within {CONNECT_SECONDS:.0f} s") from None
        except (OSError, ConnectionError) as error:
            raise Unreachable(str(error) or type(error).__name__) from None
        self._all = [known for known in self._all if known.open] + [connection]
        return connection

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        if self._proxy is None:
            _, made = await loop.create_connection(Connection, self._host, self._port, ssl=self._tls)
            return made
        place = self._proxy.hostname or "", self._proxy.port or 80
        transport, connection = await loop.create_connection(Connection, *place)
        if self._tls is None:
            return connection
        target = f"{self._host}:{self._port}"
        head = f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n{self._to_proxy}\r\n"
        response = await connection.exchange(head.encode("latin-1"), head_only=True)
        if response.status != 200:
            connection.close()
            raise ConnectionError(f"the proxy answered {response.status}")
        tunnel = Connection()
        secured = await loop.start_tls(transport, tunnel, self._tls, server_hostname=self._host)
        assert secured is not None
        tunnel.connection_made(secured)
        return tunnel


def _credentials(proxy: urllib.parse.SplitResult) -> str:
    if proxy.username is None:
        return ""
    pair = f"{urllib.parse.unquote(proxy.username)}:{urllib.parse.unquote(proxy.password or '')}"
    return f"Proxy-Authorization: Basic {base64.b64encode(pair.encode()).decode()}\r\n"
