"""Tools of the tests that do damage: callers, a relay that breaks, a pooler, parallel waits."""

import asyncio
import base64
import json
import os
import random
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple, Self

import psutil
import psycopg
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from todo_tests.support import (
    FATE_UNKNOWN,
    ORIGIN,
    OwnPostgres,
    bearer,
    error,
    eventually,
    free_port,
    new_user,
)

PATIENCE = 60.0  # a caller that waits longer has met a time-out
LOST = (ConnectionError, asyncio.IncompleteReadError)


DATABASE_UNAVAILABLE = error("DATABASE_UNAVAILABLE")
DATABASE_TIMEOUT = error("DATABASE_TIMEOUT")
# Of a change that was sent: it may have been stored.
LOST_CHANGE = DATABASE_UNAVAILABLE | {"detail": FATE_UNKNOWN}
LATE_CHANGE = DATABASE_TIMEOUT | {"detail": FATE_UNKNOWN}
DATABASE_FAILURES = (DATABASE_UNAVAILABLE, DATABASE_TIMEOUT, LOST_CHANGE, LATE_CHANGE)
NOT_READY = error("NOT_READY")
BAD_REQUEST = error("BAD_REQUEST")
HEADERS_TOO_LARGE = error("HEADERS_TOO_LARGE")
ON_EVERY_ANSWER = {
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    "vary": "Origin",
}


# HTTP


class Answer(NamedTuple):
    """What came back, and after how many seconds."""

    status: int
    headers: dict[str, str]
    content: bytes
    seconds: float = 0.0

    @property
    def body(self) -> Any:
        """The JSON, or None where there is none."""
        return json.loads(self.content) if self.content else None


async def read_answer(reader: asyncio.StreamReader) -> Answer:
    """One HTTP response."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    fields = (line.split(": ", 1) for line in head[1:-2])
    headers = {name.lower(): value for name, value in fields}
    content = await reader.readexactly(int(headers.get("content-length", "0")))
    return Answer(int(head[0].split(" ")[1]), headers, content)


async def answers_in(content: bytes) -> list[Answer]:
    """The HTTP responses that these bytes are."""
    reader = asyncio.StreamReader()
    reader.feed_data(content)
    reader.feed_eof()
    answers = []
    while not reader.at_eof():
        answers.append(await read_answer(reader))
    return answers


async def read_to_end(reader: asyncio.StreamReader) -> bytes:
    """All that comes until the server hangs up, in whatever way."""
    content = b""
    with suppress(ConnectionError):
        while data := await reader.read(65536):
            content += data
    return content


def is_last(answer: Answer, status: int, body: Any) -> None:
    """The one shape of an error, and the end of the connection."""
    assert (answer.status, answer.body) == (status, body)
    told = {**ON_EVERY_ANSWER, "content-type": "application/json", "connection": "close"}
    assert {**answer.headers, **told} == answer.headers
    assert answer.headers["x-request-id"]
    assert "server" not in answer.headers


class Caller:
    """A user with one kept-alive connection; nothing is ever repeated for it."""

    def __init__(self, port: int, user: str | None = None) -> None:
        self.port = port
        self.user = user or new_user()
        self.headers: dict[str, str] = {**bearer(self.user), "Origin": ORIGIN}
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    def head(self, method: str, path: str, **headers: str | int) -> bytes:
        """A request's head; a path that is no absolute one is below the user's own tasks."""
        target = path if path.startswith("/") else f"/api/{self.user}/tasks{path and '/' + path}"
        fields = {"Host": "testserver", **self.headers, **headers}
        lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items())
        return f"{method} {target} HTTP/1.1\r\n{lines}\r\n".encode()

    def request(self, method: str, path: str, body: Any = None) -> bytes:
        """The request as it goes over the wire."""
        if body is None:
            return self.head(method, path)
        content = json.dumps(body).encode()
        return (
            self.head(method, path, Content_Type="application/json", Content_Length=len(content))
            + content
        )

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """The connection, a new one when the server has closed the last."""
        if self.reader is None or self.writer is None or self.reader.at_eof():
            await self.close()
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        return self.reader, self.writer

    async def close(self) -> None:
        """Hang up."""
        if self.writer is not None:
            self.writer.close()
            with suppress(OSError):
                await self.writer.wait_closed()
        self.reader = self.writer = None

    async def ask(self, method: str, path: str, body: Any = None) -> Answer:
        """The answer to one request."""
        request = self.request(method, path, body)
        start = time.monotonic()
        try:
            async with asyncio.timeout(PATIENCE):
                reader, writer = await self.connect()
                writer.write(request)
                answer = await read_answer(reader)
        except BaseException:
            if self.writer is not None:
                self.writer.transport.abort()
            self.reader = self.writer = None
            raise
        if answer.headers.get("connection") == "close":
            await self.close()
        return answer._replace(seconds=time.monotonic() - start)

    async def leave(self, request: bytes, *, after: float) -> None:
        """Send it on a connection of its own and hang up without reading."""
        _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(request)
        await writer.drain()
        await asyncio.sleep(after)
        writer.transport.abort()

    async def create(self, title: str = "Buy groceries") -> Any:
        """A new task of this user."""
        answer = await self.ask("POST", "", {"title": title})
        assert answer.status == 201, answer
        return answer.body


class Life(Caller):
    """A user who does everything, in a random order, and checks each answer to the letter."""

    def __init__(self, port: int, seed: int = 0) -> None:
        super().__init__(port)
        self.random = random.Random(seed)
        self.tasks: dict[int, Any] = {}
        self.slowest = 0.0
        self.requests = 0

    async def step(self) -> None:
        """One request of a random kind."""
        kinds = [self._list, self._list, self._filter, self._absent]
        if len(self.tasks) < 12:
            kinds += [self._create] * 2
        if self.tasks:
            kinds += [self._get, self._get, self._put, self._toggle, self._delete]
        await self.random.choice(kinds)()

    async def steps(self, count: int) -> None:
        """So many requests, one after the other."""
        for _ in range(count):
            await self.step()

    async def _expect(
        self, status: int, method: str, path: str, body: Any = None, *, told: Any = ...
    ) -> Any:
        answer = await self.ask(method, path, body)
        self.requests += 1
        self.slowest = max(self.slowest, answer.seconds)
        assert answer.status == status, (method, path, answer)
        if told is not ...:
            assert answer.body == told, (method, path)
        return answer.body

    def _any(self) -> Any:
        return self.random.choice(list(self.tasks.values()))

    async def _create(self) -> None:
        new = {"title": f"Title {self.random.random()}", "description": "Milk, eggs, bread"}
        task = await self._expect(201, "POST", "", new)
        assert {**task, **new, "user_id": self.user, "completed": False} == task
        assert task["id"] not in self.tasks
        self.tasks[task["id"]] = task

    async def _list(self) -> None:
        await self._expect(200, "GET", "", told=[self.tasks[i] for i in sorted(self.tasks)[::-1]])

    async def _filter(self) -> None:
        done = [task for _, task in sorted(self.tasks.items())[::-1] if task["completed"]]
        await self._expect(200, "GET", f"/api/{self.user}/tasks?completed=true", told=done)

    async def _absent(self) -> None:
        await self._expect(404, "PATCH", f"{2**62}/complete", told=error("TASK_NOT_FOUND"))

    async def _get(self) -> None:
        task = self._any()
        await self._expect(200, "GET", str(task["id"]), told=task)

    async def _put(self) -> None:
        old = self._any()
        new = {"title": f"Title {self.random.random()}", "completed": self.random.random() < 0.5}
        task = await self._expect(200, "PUT", str(old["id"]), new)
        assert task["updated_at"] >= old["updated_at"]
        assert task == {**old, **new, "updated_at": task["updated_at"]}
        self.tasks[task["id"]] = task

    async def _toggle(self) -> None:
        old = self._any()
        task = await self._expect(200, "PATCH", f"{old['id']}/complete")
        told = {"completed": not old["completed"], "updated_at": task["updated_at"]}
        assert task == {**old, **told}
        self.tasks[task["id"]] = task

    async def _delete(self) -> None:
        task = self._any()
        await self._expect(204, "DELETE", str(task["id"]), told=None)
        del self.tasks[task["id"]]


async def together(awaitables: Any) -> list[Any]:
    """The results of all of them, run at once; the first failure ends the others."""
    async with asyncio.TaskGroup() as group:
        started = [group.create_task(each) for each in awaitables]
    return [each.result() for each in started]


async def soon(fact: Callable[[], Awaitable[Any]], *, within: float, why: str) -> float:
    """Ask again and again until the fact is true; the seconds that it took."""
    start = time.monotonic()
    while not await fact():
        assert time.monotonic() < start + within, why
        await asyncio.sleep(0.02)
    return time.monotonic() - start


def stored(database_url: str, user: str) -> list[str]:
    """The titles of the user's tasks, as the database has them."""
    with psycopg.connect(database_url) as connection:
        rows = connection.execute("select title from tasks where user_id = %s", (user,))
        return [title for (title,) in rows]


def served(caller: Caller) -> Callable[[], Awaitable[bool]]:
    """Whether its list is answered now, with 200 or else with the one 500."""

    async def fact() -> bool:
        answer = await caller.ask("GET", "")
        assert answer.status == 200 or answer.body == DATABASE_UNAVAILABLE, answer
        return answer.status == 200

    return fact


# The network before PostgreSQL


FATAL = b"SFATAL\0VFATAL\0C57P01\0Mterminating connection due to administrator command\0\0"
ADMIN_SHUTDOWN = b"E" + (4 + len(FATAL)).to_bytes(4, "big") + FATAL
READY = b"Z\0\0\0\5I"  # for the next: done and committed


class Wire:
    """A TCP relay in front of PostgreSQL that reads along, and breaks when it is told to."""

    def __init__(self, port: int) -> None:
        self.target = port
        self.port = 0
        self.spoken: list[bytes] = []  # the clients' messages: a letter, then the content
        self.flowing = asyncio.Event()
        self.flowing.set()
        self._fault: tuple[bytes, bool, int] = (b"", False, 0)
        self._last_word = b""
        self._reset = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def url(self, url: str) -> str:
        """The same database through the relay, in clear so that it can be read."""
        return url.replace(f":{self.target}/", f":{self.port}/") + "?sslmode=disable"

    def cut(
        self,
        marker: str,
        *,
        answered: bool,
        times: int = 1,
        last_word: bytes = b"",
        reset: int = 0,
    ) -> None:
        """Break the connections of the next statements with the marker among their parameters.

        `answered`: only once PostgreSQL has done the work and said so; else before it hears of it.
        The client hears the last word; with it, also the rows of an answer, but not its end.
        `reset`: by a TCP reset that the process of this id meets together with the last word.
        """
        self._fault = (marker.encode(), answered, times)
        self._last_word = last_word
        self._reset = reset

    def said(self, kinds: bytes, marker: str = "") -> int:
        """How many messages of these kinds the clients sent (Q, P, B, E, S, ...)."""
        return sum(m[:1] in kinds and marker.encode() in m for m in list(self.spoken))

    @asynccontextmanager
    async def laid(self) -> AsyncIterator[Self]:
        """Relay until the block ends."""
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            self.flowing.set()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connection(
        self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await self.flowing.wait()
        try:
            from_server, to_server = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            to_client.close()
            return
        doomed = asyncio.Event()
        upward = asyncio.create_task(self._up(from_client, to_server, to_client, doomed))
        downward = asyncio.create_task(self._down(from_server, to_client, doomed))
        try:
            with suppress(asyncio.CancelledError):
                await asyncio.wait([upward, downward], return_when=asyncio.FIRST_COMPLETED)
        finally:
            upward.cancel()
            downward.cancel()
            to_client.close()
            to_server.close()

    async def _up(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        to_client: asyncio.StreamWriter,
        doomed: asyncio.Event,
    ) -> None:
        unread, typed = b"", False
        while data := await self._next(reader):
            unread += data
            while len(unread) >= 4 + typed:
                length = typed + int.from_bytes(unread[typed : typed + 4], "big")
                if len(unread) < length:
                    break
                message, unread = unread[:length], unread[length:]
                if not typed:  # what asks for encryption, or cancels, comes before or alone
                    typed = message[4:6] == b"\0\3"
                    continue
                kind, content = message[:1], message[5:]
                self.spoken.append(kind + content)
                marker, answered, times = self._fault
                if times and kind in b"BQ" and marker in content:
                    self._fault = (marker, answered, times - 1)
                    if not answered:
                        await self._end(to_client)
                        return
                    doomed.set()
            writer.write(data)

    async def _end(self, to_client: asyncio.StreamWriter) -> None:
        if not self._reset:
            to_client.write(self._last_word)
            return
        os.kill(self._reset, signal.SIGSTOP)
        to_client.write(self._last_word)
        linger = struct.pack("ii", 1, 0)
        to_client.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        to_client.transport.abort()
        await asyncio.sleep(0.05)
        os.kill(self._reset, signal.SIGCONT)

    async def _down(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, doomed: asyncio.Event
    ) -> None:
        held = b""
        while data := await self._next(reader):
            if not doomed.is_set():
                writer.write(data)
                continue
            held += data
            if held.endswith(READY):
                if self._last_word:
                    writer.write(held.removesuffix(READY) + self._last_word)
                return

    async def _next(self, reader: asyncio.StreamReader) -> bytes:
        try:
            data = await reader.read(65536)
        except ConnectionError:
            data = b""
        await self.flowing.wait()
        return data


class Bouncer:
    """A PgBouncer in transaction mode in front of a PostgreSQL."""

    program = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")

    def __init__(self, port: int, **settings: object) -> None:
        self.target = port
        self.port = free_port()
        self.folder = Path(tempfile.mkdtemp(prefix="todo-bouncer-"))
        self.process: subprocess.Popen[bytes] | None = None
        lines = {
            "listen_addr": "127.0.0.1",
            "listen_port": self.port,
            "unix_socket_dir": "",
            "auth_type": "trust",
            "auth_file": self.folder / "users",
            "pool_mode": "transaction",
            "default_pool_size": 3,
            "max_client_conn": 500,
            **settings,
        }
        (self.folder / "users").write_text('"postgres" ""\n')
        (self.folder / "ini").write_text(
            f"[databases]\n* = host=127.0.0.1 port={self.target}\n[pgbouncer]\n"
            + "".join(f"{name} = {value}\n" for name, value in lines.items())
        )
        OwnPostgres._give_to_server_user(self.folder)

    def url(self, url: str) -> str:
        """The same database through the pooler."""
        return url.replace(f":{self.target}/", f":{self.port}/")

    @property
    def log(self) -> str:
        """All that it has logged so far."""
        return (self.folder / "log").read_text("utf-8", "replace")

    def start(self) -> Self:
        """Start, and wait until it listens."""
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [str(self.program), str(self.folder / "ini")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **OwnPostgres._user(),
            )
        eventually(lambda: "process up" in self.log, why="PgBouncer did not start")
        return self

    def stop(self) -> None:
        """End it, and with it every connection through it."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait(10)
            self.process = None
            (self.folder / "log").unlink()

    def remove(self) -> None:
        """Stop it and delete its folder."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


# What is measured from outside


def rss(pid: int) -> float:
    """The resident memory of a process in MiB."""
    return float(psutil.Process(pid).memory_info().rss / 2**20)


@contextmanager
def peak_rss(pid: int) -> Iterator[list[float]]:
    """The growth of a process at its highest in MiB, in a list of one that is kept up to date."""
    before, growth, ended = rss(pid), [0.0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.005):
            growth[0] = max(growth[0], rss(pid) - before)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield growth
    finally:
        ended.set()
        watcher.join()


class AllAtOnce:
    """Scenarios that mostly wait, run at once in a thread of their own while the block lasts."""

    def __init__(self, **scenarios: Coroutine[Any, Any, Any]) -> None:
        self._results: dict[str, Any] = {}
        self._scenarios = scenarios
        self._loop = asyncio.new_event_loop()
        self._all = self._loop.create_task(self._run())
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End those that nobody asked for, so that what they use can be removed."""
        with suppress(RuntimeError):  # closed, for all are over
            self._loop.call_soon_threadsafe(self._all.cancel)
        self._thread.join()

    def _work(self) -> None:
        with suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._all)
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    async def _run(self) -> None:
        results = await asyncio.gather(*self._scenarios.values(), return_exceptions=True)
        self._results = dict(zip(self._scenarios, results, strict=True))

    def __getitem__(self, name: str) -> Any:
        self._thread.join()
        if isinstance(result := self._results[name], BaseException):
            raise result
        return result


async def ended(process: subprocess.Popen[bytes], *, within: float) -> tuple[int, float]:
    """The exit code, and after how many seconds it came."""
    start = time.monotonic()
    while (code := process.poll()) is None:
        assert time.monotonic() < start + within, f"still there after {within:.0f} s"
        await asyncio.sleep(0.02)
    return code, time.monotonic() - start


# A Better Auth that is only its keys


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A self-signed certificate for a name, and its key."""
    key, subject = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now = datetime.now(UTC)
    signed = (
        x509.CertificateBuilder(subject, subject, key.public_key(), 1, now, now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), True)
        .sign(key, hashes.SHA256())
    )
    (folder / "chain.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return folder / "chain.pem", folder / "key.pem"


@contextmanager
def answering(
    status: int = 200,
    body: object = "",
    *,
    path: str = "",
    seconds: float = 0.0,
    tls: tuple[Path, Path] | None = None,
    **headers: str,
) -> Iterator[str]:
    """The URL of a server that gives this answer, at one path or all, after so many seconds."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(seconds)
            content = json.dumps(body).encode()
            self.send_response_only(status if path in ("", self.path) else 404)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        place = f"http://127.0.0.1:{server.server_address[1]}"
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*tls)
            server.socket = context.wrap_socket(server.socket, server_side=True)
            place = f"https://localhost:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield place
        finally:
            server.shutdown()


@contextmanager
def jwks(status: int = 200) -> Iterator[str]:
    """The base URL of a server whose JWKS holds one EdDSA key."""
    key = {
        "kty": "OKP",
        "crv": "Ed25519",
        "alg": "EdDSA",
        "kid": "a-key",
        "x": base64.urlsafe_b64encode(bytes(range(32))).decode().rstrip("="),
    }

    with answering(status, {"keys": [key]}, path="/api/auth/jwks") as url:
        yield url
