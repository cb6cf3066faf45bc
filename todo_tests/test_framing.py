"""One request is one request (RFC 9112), whatever a head says and wherever the bytes are cut.

An exchange ends with a request that ends the connection, so that an answer too many shows.
"""

import asyncio
import json
import re
import select
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress
from http.client import HTTPConnection
from typing import Any

import psycopg
import pytest

from todo_tests.damage import (
    BAD_REQUEST,
    HEADERS_TOO_LARGE,
    LOST,
    Answer,
    Caller,
    Life,
    answers_in,
    is_last,
    peak_rss,
    read_answer,
    read_to_end,
    together,
)
from todo_tests.support import Serve, Server, free_port, path_of, token

GET = b"GET /healthz HTTP/1.1\r\nHost: testserver\r\n"
POST = b"POST /healthz HTTP/1.1\r\nHost: testserver\r\n"  # 405
LAST = GET + b"Connection: close\r\n\r\n"
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: testserver\r\n\r\n"  # 404
TITLE = json.dumps({"title": "Whole"}).encode()
APART = 0.02  # seconds between two packets, so that they are read apart


async def answers(port: int, *packets: bytes) -> list[Answer]:
    """All answers until the server hangs up; the packets arrive one by one."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    reading = asyncio.create_task(read_to_end(reader))
    for number, packet in enumerate(packets):
        await asyncio.sleep(APART if number else 0)
        writer.write(packet)
    done, _ = await asyncio.wait([reading], timeout=5)
    writer.transport.abort()
    told = await answers_in(await reading)
    assert done, f"still open after {statuses(told)}"
    return told


def statuses(told: list[Answer]) -> list[int]:
    return [answer.status for answer in told]


async def titles(caller: Caller) -> list[str]:
    return [task["title"] for task in (await caller.ask("GET", "")).body]


def chunked(body: bytes) -> bytes:
    """The body in two chunks, and a trailer."""
    halves = (b"%x\r\n%b\r\n" % (len(half), half) for half in (body[:5], body[5:]))
    return b"".join(halves) + b"0\r\nX-Trailer: a\r\n\r\n"


def with_body(caller: Caller, path: str, body: bytes, coding: str, **headers: str) -> bytes:
    """A POST of JSON, its body in that coding."""
    length: dict[str, Any] = {"Content_Length": len(body)}
    framing = {"Transfer_Encoding": "chunked"} if coding == "chunked" else length
    head = caller.head("POST", path, Content_Type="application/json", **framing, **headers)
    return head + (chunked(body) if coding == "chunked" else body)


# Upgrade

UPGRADES = {
    "http-2": {
        "Connection": "Upgrade, HTTP2-Settings",
        "Upgrade": "h2c",
        "HTTP2-Settings": "AAMAAABkAAQAoAAAAAIAAAAA",
    },
    "websocket": {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    },
    "anything": {"Connection": "keep-alive, upgrade", "Upgrade": "TLS/1.0, what/ever"},
}
CODINGS = ("declared", "chunked")


def upgrading(port: int, kind: str = "http-2", *, known: bool = True) -> Caller:
    """A caller whose every request asks for an upgrade, with a token or without."""
    caller = Caller(port)
    caller.headers = {**(caller.headers if known else {}), **UPGRADES[kind]}
    return caller


@pytest.mark.parametrize("kind", UPGRADES)
async def test_an_upgrade_is_ignored(server: Server, kind: str) -> None:
    """RFC 9110 section 7.8: every request gets the answer that it gets without."""
    life = Life(server.port)
    life.headers |= UPGRADES[kind]
    await life.steps(100)
    assert not [line for line in server.stderr().splitlines() if "pip install" in line]


BODIES = {
    "honest": (True, 201),
    "forged-by-a-user": (True, 422),
    "forged-by-a-stranger": (False, 401),
}


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize(("known", "status"), BODIES.values(), ids=BODIES)
async def test_a_body_behind_an_upgrade_is_no_request_wherever_it_is_cut(
    server: Server, coding: str, known: bool, status: int
) -> None:
    victim, caller = Caller(server.port), upgrading(server.port, known=known)
    task = await victim.create("Kept")
    forged = f"DELETE {path_of(victim.user, task['id'])} HTTP/1.1\r\nHost: testserver\r\n"
    forged += f"Authorization: Bearer {token(victim.user)}\r\n\r\n"
    request = with_body(caller, "", TITLE if status == 201 else forged.encode(), coding)
    body = request.index(b"\r\n\r\n")
    told = await together(
        answers(server.port, request[:cut], request[cut:] + LAST)
        for cut in range(body, len(request) + 1)
    )
    assert {tuple(statuses(each)) for each in told} == {(status, 200)}
    assert await titles(victim) == ["Kept"]
    if known:
        assert await titles(caller) == ["Whole"] * (len(told) if status == 201 else 0)


@pytest.mark.parametrize("upgrade", [True, False], ids=["upgrading", "plain"])
async def test_3000_requests_in_one_packet_are_answered_in_order(
    server: Server, upgrade: bool
) -> None:
    caller = upgrading(server.port, known=False) if upgrade else Caller(server.port)
    forged = SMUGGLED + SMUGGLED
    many = [
        request
        for number in range(0, 3000, 3)
        for request in (
            caller.head("GET", "/healthz", X_Request_ID=f"id-{number}"),
            with_body(caller, "/healthz", forged, "declared", X_Request_ID=f"id-{number + 1}"),
            with_body(caller, "/healthz", forged, "chunked", X_Request_ID=f"id-{number + 2}"),
        )
    ]
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"".join(many) + LAST)
    async with asyncio.timeout(20):
        told = await answers_in(await read_to_end(reader))
    writer.close()
    assert statuses(told) == [200, 405, 405] * 1000 + [200]
    ids = [answer.headers["x-request-id"] for answer in told[:-1]]
    assert ids == [f"id-{number}" for number in range(3000)]


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
async def test_curl_may_ask_for_http_2(server: Server) -> None:
    caller = Caller(server.port)
    command = f"""curl -sS --http2 -w %{{http_code}} -H 'Content-Type: application/json'
        -H 'Authorization: {caller.headers["Authorization"]}' -d '{TITLE.decode()}'
        {server.url}{path_of(caller.user)}"""
    said = await asyncio.to_thread(subprocess.check_output, shlex.split(command), text=True)
    assert said.endswith("201")
    assert await titles(caller) == ["Whole"]


# A proxy that forwards what it should not


class Proxy:
    """A reverse proxy that sends everybody's requests over one connection, Upgrade and all."""

    def __init__(self, port: int) -> None:
        self.target = port
        self.turn = asyncio.Lock()
        self.upstream: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    @asynccontextmanager
    async def laid(self) -> AsyncIterator[int]:
        """Serve until the block ends; the port."""
        listener = await asyncio.start_server(self._client, "127.0.0.1", 0)
        try:
            yield listener.sockets[0].getsockname()[1]
        finally:
            listener.close()
            if self.upstream:
                self.upstream[1].close()

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(*LOST):
            while True:
                head, body = await self._message(reader)
                async with self.turn:
                    writer.write(await self._forward(head, body))
        writer.close()

    async def _forward(self, head: bytes, body: bytes) -> bytes:
        """Send head and body apart, as they come; the next answer is taken for theirs."""
        if self.upstream is None or self.upstream[0].at_eof():
            self.upstream = await asyncio.open_connection("127.0.0.1", self.target)
        reader, writer = self.upstream
        writer.write(head)
        if body:
            await asyncio.sleep(APART)
            writer.write(body)
        return b"".join(await self._message(reader))

    @staticmethod
    async def _message(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
        """Head and body of a request or a response."""
        head = await reader.readuntil(b"\r\n\r\n")
        if length := re.search(rb"\r\ncontent-length: (\d+)\r\n", head, re.IGNORECASE):
            return head, await reader.readexactly(int(length[1]))
        if b"chunked" in head:
            return head, await reader.readuntil(b"\r\n0\r\nX-Trailer: a\r\n\r\n")
        return head, b""


# What a stranger appends to a head that the server has taken for the end of the request.
ATTACKS = {
    "a-request": lambda _: SMUGGLED,
    "a-head-without-end": lambda c: f"DELETE {c} HTTP/1.1\r\nX-Swallowed: ".encode(),
    "no-request": lambda _: b"what is this?",
}


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("kind", ATTACKS)
async def test_behind_a_proxy_everybody_gets_their_own_answers(
    server: Server, kind: str, coding: str
) -> None:
    async with Proxy(server.port).laid() as port:
        stranger = upgrading(port, known=False)
        victims = [Caller(port) for _ in range(3)]
        tasks = [await victim.create(f"Of {victim.user}") for victim in victims]
        for victim, task in zip(victims, tasks, strict=True):
            body = ATTACKS[kind](path_of(victim.user, task["id"]))
            reader, writer = await stranger.connect()
            writer.write(with_body(stranger, "", body, coding))
            async with asyncio.timeout(5):
                assert (await read_answer(reader)).status == 401
            answer = await victim.ask("GET", "")
            assert (answer.status, answer.body) == (200, [task])
        for victim, task in zip(victims, tasks, strict=True):
            assert (await victim.ask("GET", "")).body == [task]
        await together(caller.close() for caller in (stranger, *victims))


# CONNECT

CONNECT_TARGETS = ("testserver:443", "/healthz", "/api/{user}/tasks", "http://testserver/", "*")


@pytest.mark.parametrize("known", [True, False], ids=["with-a-token", "without-a-token"])
@pytest.mark.parametrize("target", CONNECT_TARGETS)
async def test_connect_is_refused_and_ends_the_connection(
    server: Server, target: str, known: bool
) -> None:
    """What is behind it is no request, whether it comes with it or later."""
    caller = Caller(server.port)
    task = await caller.create("Kept")
    behind = caller.request("DELETE", str(task["id"]))
    stranger = caller if known else upgrading(server.port, known=False)

    def head(**headers: Any) -> bytes:
        path = target.format(user=caller.user).encode()
        return stranger.head("CONNECT", "/target", **headers).replace(b"/target", path, 1)

    exchanges = (
        (head(),),
        (head() + behind,),
        (head(), behind),
        (head(Content_Length=len(behind)) + behind + behind,),
        (head(Content_Length=len(behind)), behind + behind),
        (head(Transfer_Encoding="chunked") + chunked(behind) + behind,),
        (LAST.replace(b"close", b"keep-alive") + head() + behind,),
    )
    told = await together(answers(server.port, *packets) for packets in exchanges)
    for packets, (*before, answer) in zip(exchanges, told, strict=True):
        is_last(answer, 400, BAD_REQUEST)
        assert statuses(before) == [200] * packets[0].startswith(b"GET")
    assert await titles(caller) == ["Kept"]


# Pipelines


async def test_pipelined_requests_are_answered_in_order(server: Server) -> None:
    caller = Caller(server.port)
    many = [caller.request("POST", "", {"title": f"{number}"}) for number in range(20)]
    many += [caller.request("GET", ""), caller.request("GET", "0"), caller.request("DELETE", "")]
    many += [caller.request("GET", "/healthz")] * 200
    told = await answers(server.port, b"".join(many) + LAST)
    assert [answer.body["title"] for answer in told[:20]] == [f"{n}" for n in range(20)]
    assert told[20].body == [answer.body for answer in told[19::-1]]
    assert statuses(told[:23]) == [201] * 20 + [200, 422, 405]
    assert {(answer.status, answer.content) for answer in told[23:]} == {(200, b'{"status":"ok"}')}
    assert len(told) == len(many) + 1


# Bytes a read, seconds between two reads.
READERS = {
    "who-reads-all": (65536, 0.001),
    "who-reads-slowly": (1024, 0.005),
    "who-reads-nothing": (0, 0.005),
}


def pipeline(port: int, seconds: float, size: int, pause: float) -> None:
    """Send requests without a token as fast as they are taken, each batch of whole ones."""
    head = b"GET /api/u/tasks HTTP/1.1\r\nHost: testserver\r\nX-Filler: "
    batch = (head.ljust(76, b"x") + b"\r\n\r\n") * 400
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with suppress(ConnectionError), socket.create_connection(("127.0.0.1", port)) as client:
            client.setblocking(False)
            unsent = memoryview(batch)
            while time.monotonic() < deadline:
                readers = [client] if size else []
                readable, writable, _ = select.select(readers, [client], [], 0.1)
                if readable and not client.recv(size):
                    break
                if writable:
                    unsent = unsent[client.send(unsent) :] or memoryview(batch)
                time.sleep(pause)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "pause"), READERS.values(), ids=READERS)
async def test_a_pipeline_without_end_fills_no_memory_and_delays_nobody(
    serve: Serve, size: int, pause: float
) -> None:
    server = serve()
    caller = Caller(server.port)
    await caller.create()
    waits = []
    with peak_rss(server.process.pid) as growth:
        flood = asyncio.create_task(asyncio.to_thread(pipeline, server.port, 5.0, size, pause))
        while not flood.done():
            answer = await caller.ask("GET", "")
            assert answer.status == 200
            waits.append(answer.seconds)
            await asyncio.sleep(0.01)
    await flood
    print(f"grew by {growth[0]:.1f} MiB, the longest of {len(waits)} waits {max(waits):.2f} s")
    assert growth[0] < 60.0
    assert max(waits) < 0.6


@pytest.mark.slow
async def test_a_flood_behind_junk_fills_no_memory(serve: Serve, database_url: str) -> None:
    """While the good request before it waits for the database."""
    server = await asyncio.to_thread(serve, {"DB_TIMEOUT": "3"})
    caller = Caller(server.port)
    task = await caller.create()
    toggle = caller.request("PATCH", f"{task['id']}/complete")
    with psycopg.connect(database_url) as locker, peak_rss(server.process.pid) as growth:
        locker.execute("select from tasks where id = %s for update", (task["id"],))
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(toggle + b"\0")
        with suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(2.0):
                while True:
                    writer.write(b"a" * 2**16)
                    await writer.drain()
    writer.transport.abort()
    assert growth[0] < 15.0


# Expect

REFUSED: dict[str, tuple[int, str, str, dict[str, Any]]] = {
    "no-token": (401, "POST", "", {"Authorization": "none"}),
    "somebody-elses": (403, "POST", "/api/nobody/tasks", {}),
    "no-route": (404, "POST", "/nowhere", {}),
    "no-task": (404, "PATCH", f"{2**62}/complete", {}),
    "no-method": (405, "POST", "/healthz", {}),
    "no-json": (415, "POST", "", {"Content_Type": "text/plain"}),
    "bad-path": (422, "PUT", "0", {}),
    "body-not-wanted": (200, "GET", "", {}),
}


@pytest.mark.parametrize(("status", "method", "path", "headers"), REFUSED.values(), ids=REFUSED)
async def test_who_expects_100_continue_is_judged_when_the_body_has_come(
    server: Server, status: int, method: str, path: str, headers: dict[str, Any]
) -> None:
    caller = Caller(server.port)
    usual = {"Content_Type": "application/json", "Content_Length": len(SMUGGLED)}
    head = caller.head(method, path, **{**usual, **headers}, Expect="100-continue")
    told = await answers(server.port, head, SMUGGLED, LAST)
    assert statuses(told) == [100, status, 200]
    assert "connection" not in told[1].headers


async def test_a_413_in_place_of_100_continue_ends_the_connection(server: Server) -> None:
    """The client may leave the body out, so nobody can tell what comes next (RFC 9110 10.1.1)."""
    head = Caller(server.port).head(
        "POST", "", Content_Type="application/json", Content_Length=70_000, Expect="100-continue"
    )
    [answer] = await answers(server.port, head, SMUGGLED)
    assert (answer.status, answer.headers["connection"]) == (413, "close")


async def test_100_continue_comes_behind_the_answers_before_it(
    server: Server, database_url: str
) -> None:
    caller = Caller(server.port)
    request = with_body(caller, "", TITLE, "declared", Expect="100-continue")
    body = request.index(b"\r\n\r\n") + 4
    first = caller.head("GET", "") + caller.head("GET", "/healthz")
    told = await answers(server.port, first + request[:body], request[body:] + LAST)
    assert statuses(told) == [200, 200, 100, 201, 200]


@pytest.mark.parametrize("coding", CODINGS)
async def test_who_waits_for_100_continue_gets_it_and_the_connection_lives_on(
    server: Server, coding: str
) -> None:
    for caller in (Caller(server.port), upgrading(server.port)):
        request = with_body(caller, "", TITLE, coding, Expect="100-continue")
        body = request.index(b"\r\n\r\n") + 4
        reader, writer = await caller.connect()
        async with asyncio.timeout(5):
            for _ in range(2):
                writer.write(request[:body])
                assert (await read_answer(reader)).status == 100
                writer.write(request[body:])
                answer = await read_answer(reader)
                assert (answer.status, answer.body["title"]) == (201, "Whole")
                assert "connection" not in answer.headers
        assert await titles(caller) == ["Whole"] * 2
        await caller.close()


async def test_http_1_0_knows_no_100_continue(server: Server) -> None:
    """RFC 9110 section 10.1.1: there the expectation is ignored."""
    request = with_body(Caller(server.port), "", TITLE, "declared", Expect="100-continue")
    head, body = request.replace(b"HTTP/1.1", b"HTTP/1.0").split(b"\r\n\r\n")
    assert statuses(await answers(server.port, head + b"\r\n\r\n", body)) == [201]


# Lengths and codings


@pytest.mark.parametrize("chunked", [False, True], ids=["declared", "chunked"])
@pytest.mark.parametrize("status", [401, 405, 413])
def test_who_sends_far_too_much_reads_the_answer_and_the_next_request_has_its_own(
    server: Server, status: int, chunked: bool
) -> None:
    """An ordinary client reads only when all is sent; a reset would come between.

    It may use the connection again unless the answer says that it ends.
    """
    headers = {"Content-Type": "application/json"}
    if status != 401:
        headers["Authorization"] = f"Bearer {token('user')}"
    body = iter([b"x" * 100_000] * 30) if chunked else b"x" * 3_000_000
    path = path_of("user", "1" if status == 405 else "")
    with closing(HTTPConnection("127.0.0.1", server.port, timeout=10)) as connection:
        connection.request("POST", path, body, headers, encode_chunked=chunked)
        answer = connection.getresponse()
        answer.read()
        assert (answer.status, answer.headers["Connection"]) == (status, "close")
        connection.request("GET", "/healthz")
        assert connection.getresponse().status == 200


async def test_long_addresses_of_a_proxy_fill_no_memory(server: Server) -> None:
    caller = Caller(server.port)
    await caller.ask("GET", "/healthz")
    with peak_rss(server.process.pid) as growth:
        for number in range(600):
            caller.headers = {"X-Forwarded-For": str(number).ljust(60_000, "x")}
            assert (await caller.ask("GET", "/healthz")).status == 200
    assert growth[0] < 15.0


ZEROS = "0" * 5000
LENGTHS = {
    "of-leading-zeros": (f"{ZEROS}{len(TITLE)}", [201, 200]),
    "of-leading-zeros-and-too-much": (f"{ZEROS}70000", [413]),
    "of-5000-nines": ("9" * 5000, [400]),
}


@pytest.mark.parametrize(("length", "expected"), LENGTHS.values(), ids=LENGTHS)
async def test_a_length_has_any_number_of_digits(
    server: Server, length: str, expected: list[int]
) -> None:
    """RFC 9110 section 8.6: digits, and leading zeros are digits."""
    caller = Caller(server.port)
    body = TITLE if expected[0] == 201 else TITLE.ljust(70_000)
    head = caller.head("POST", "", Content_Type="application/json", Content_Length=length)
    told = await answers(server.port, head + body + LAST)
    assert statuses(told) == expected
    assert await titles(caller) == ["Whole"] * expected.count(201)


CHUNKED = POST + b"Transfer-Encoding: chunked\r\n"
ONE = b"2\r\n{}\r\n0\r\n\r\n"
WHOLE = {
    "length-with-zeros": POST + b"Content-Length: 0002\r\n\r\n{}",
    "length-with-white-space": POST + b"Content-Length: \t2 \t\r\n\r\n{}",
    "coding-in-capitals": POST + b"tRANSFER-eNCODING: CHUNKED\r\n\r\n" + ONE,
    "coding-after-others": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + ONE,
    "coding-after-others-in-two-fields": POST
    + b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n\r\n"
    + ONE,
    "coding-in-a-list-with-a-hole": POST + b"Transfer-Encoding: ,chunked\r\n\r\n" + ONE,
    "chunk-with-zeros": CHUNKED + b"\r\n" + ZEROS.encode() + ONE,
    "chunk-with-an-extension": CHUNKED + b'\r\n2;a=b;c="d"\r\n{}\r\n0;e\r\n\r\n',
    "chunks-of-a-request": CHUNKED + b"\r\n" + chunked(SMUGGLED),
    "length-of-a-request": POST + b"Content-Length: %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED,
    "name-that-only-looks-like-a-length": POST + b"Content_Length: 99\r\n\r\n",
    "upgrade-without-a-body": POST + b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
    "upgrade-with-an-empty-body": POST
    + b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 0\r\n\r\n",
    "empty-lines-before": b"\r\n\r\n" + POST + b"\r\n",
    "absolute-form": POST.replace(b"/healthz", b"http://elsewhere.test/healthz") + b"\r\n",
    "an-upgrade-with-a-head-of-64-kib": POST
    + b"Connection: Upgrade\r\nUpgrade: a\r\n"
    + b"a:b\r\n" * 13_000
    + b"Content-Length: 2\r\n\r\n{}",
}


@pytest.mark.parametrize("request_", WHOLE.values(), ids=WHOLE)
async def test_an_odd_request_is_one_request(server: Server, request_: bytes) -> None:
    assert statuses(await answers(server.port, request_ + LAST)) == [405, 200]


ENDLESS = {
    "length-of-2^63": POST + b"Content-Length: 9223372036854775808\r\n\r\n",
    "length-of-2^64-1": POST + b"Content-Length: 18446744073709551615\r\n\r\n",
    "chunk-of-2^64-1": CHUNKED + b"\r\nffffffffffffffff\r\n",
}


@pytest.mark.slow
async def test_a_body_without_end_is_cut_off(server: Server) -> None:
    flood = SMUGGLED * (2**21 // len(SMUGGLED))
    told = await together(answers(server.port, head, flood) for head in ENDLESS.values())
    assert dict(zip(ENDLESS, map(statuses, told), strict=True)) == {name: [405] for name in ENDLESS}


OLD = {
    "http-0.9": b"GET /healthz\r\n\r\n",
    "http-1.0": b"GET /healthz HTTP/1.0\r\n\r\n",
    "http-1.0-that-would-stay": b"GET /healthz HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    "http-1.0-with-a-length": POST.replace(b"1.1", b"1.0") + b"Content-Length: 2\r\n\r\n{}",
    "http-1.0-with-a-coding": CHUNKED.replace(b"1.1", b"1.0") + b"\r\n" + ONE,
    "http-1.0-with-a-trailer-that-expects": CHUNKED.replace(b"1.1", b"1.0")
    + b"Connection: keep-alive\r\n\r\n0\r\nExpect: 100-continue\r\n\r\n",
    "http-1.0-that-upgrades": b"GET / HTTP/1.0\r\nConnection: Upgrade\r\nUpgrade: a\r\n\r\n",
    "http-2-in-words": b"GET /healthz HTTP/2.0\r\nHost: testserver\r\n\r\n",
    "http-1.1-that-closes": LAST,
    "http-1.1-that-closes-and-expects": POST + b"Connection: close\r\nExpect: 100-continue\r\n"
    b"Content-Length: 2\r\n\r\n{}",
}


@pytest.mark.parametrize("request_", OLD.values(), ids=OLD)
async def test_what_does_not_stay_gets_one_answer_and_the_end(
    server: Server, request_: bytes
) -> None:
    caller = Caller(server.port)
    task = await caller.create("Kept")
    behind = caller.request("DELETE", str(task["id"]))
    [answer] = await answers(server.port, request_ + behind)
    assert answer.status in {200, 400, 404, 405}
    assert answer.headers["connection"] == "close"
    assert await titles(caller) == ["Kept"]


async def test_nothing_behind_a_trailer_that_closes_is_lost_without_a_word(server: Server) -> None:
    request = CHUNKED + b"\r\n0\r\nConnection: close\r\n\r\n"
    _, last = await answers(server.port, request + LAST)
    is_last(last, 400, BAD_REQUEST)


async def test_a_trailer_is_no_header(server: Server) -> None:
    """RFC 9110 section 6.5.1: what a proxy has looked at is all that counts."""
    caller = Caller(server.port)
    head = f"GET {path_of(caller.user)} HTTP/1.1\r\nHost: testserver\r\n"
    trailer = f"0\r\nAuthorization: {caller.headers['Authorization']}\r\nX-Request-ID: late\r\n\r\n"
    request = f"{head}Transfer-Encoding: chunked\r\n\r\n{trailer}".encode()
    for cut in (len(request), len(head), request.index(b"0\r\nA"), request.index(b"late")):
        answer, _ = await answers(server.port, request[:cut], request[cut:] + LAST)
        assert answer.status == 401
        assert answer.headers["x-request-id"] != "late"


# What is no HTTP

LENGTH = POST + b"Content-Length: "
CODING = POST + b"Transfer-Encoding: "
NO_HTTP = {
    "babble": b"what is this?\r\n\r\n",
    "binary": bytes(range(256)),
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
    "http-2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "unknown-method": b"BREW /healthz HTTP/1.1\r\n\r\n",
    "lower-case-method": b"get /healthz HTTP/1.1\r\n\r\n",
    "unknown-version": b"GET /healthz HTTP/3.7\r\n\r\n",
    "other-protocol": b"GET /healthz ICE/1.0\r\n\r\n",
    "authority-form": GET.replace(b"/healthz", b"testserver:80") + b"\r\n",
    "path-that-is-no-ascii": GET.replace(b"/healthz", "/\u00e4".encode()) + b"\r\n",
    "control-in-the-path": b"GET /heal\x01thz HTTP/1.1\r\n\r\n",
    "white-space-after-the-version": GET.replace(b"1.1", b"1.1 ") + b"\r\n",
    "tabs-in-the-request-line": GET.replace(b" /healthz ", b"\t/healthz\t") + b"\r\n",
    "no-host": b"GET /healthz HTTP/1.1\r\n\r\n",
    "two-hosts": GET + b"Host: elsewhere.test\r\n\r\n",
    "header-without-colon": GET + b"no colon\r\n\r\n",
    "header-without-name": GET + b": z\r\n\r\n",
    "space-in-a-name": GET + b"X Y: z\r\n\r\n",
    "space-before-the-colon": GET + b"X-Y : z\r\n\r\n",
    "nul-in-a-name": GET + b"X-\x00Y: z\r\n\r\n",
    "nul-in-a-value": GET + b"X-Y: \x00\r\n\r\n",
    "control-in-a-value": GET + b"X-Y: \x01\r\n\r\n",
    "folded-value": GET + b"X-Y: a\r\n b\r\n\r\n",
    "folded-length": LENGTH + b"\r\n 2\r\n\r\n{}",
    "folded-coding": CODING + b"\r\n chunked\r\n\r\n" + ONE,
    "bare-lf-everywhere": GET.replace(b"\r", b"") + b"\n",
    "bare-lf-in-the-head": POST + b"X-Y: a\nContent-Length: 2\r\n\r\n{}",
    "bare-lf-after-the-head": LENGTH + b"2\r\n\n{}",
    "bare-cr-in-the-head": POST + b"X-Y: a\rTransfer-Encoding: chunked\r\n\r\n" + ONE,
    "two-crs": GET + b"X-Y: a\r\r\n\r\n",
    "length-empty": LENGTH + b"\r\n\r\n",
    "length-no-number": LENGTH + b"ten\r\n\r\n",
    "length-negative": LENGTH + b"-1\r\n\r\n",
    "length-with-a-plus": LENGTH + b"+2\r\n\r\n{}",
    "length-in-hex": LENGTH + b"0x2\r\n\r\n{}",
    "length-with-an-underscore": LENGTH + b"0_2\r\n\r\n{}",
    "length-in-other-digits": LENGTH + "\u0662\r\n\r\n{}".encode(),
    "length-with-a-fraction": LENGTH + b"2.0\r\n\r\n{}",
    "length-over-all-bounds": LENGTH + b"99999999999999999999999\r\n\r\n",
    "length-of-2^64+2": LENGTH + b"18446744073709551618\r\n\r\n{}",
    "lengths-in-a-list": LENGTH + b"2,2\r\n\r\n{}",
    "lengths-with-a-space": LENGTH + b"2 2\r\n\r\n{}",
    "two-lengths": LENGTH + b"1\r\nContent-Length: 2\r\n\r\n{}",
    "two-equal-lengths": LENGTH + b"2\r\nContent-Length: 2\r\n\r\n{}",
    "length-and-chunks": LENGTH + b"2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
    "chunks-and-length": CHUNKED + b"Content-Length: 5\r\n\r\n0\r\n\r\n",
    "length-and-another-coding": LENGTH + b"2\r\nTransfer-Encoding: identity\r\n\r\n{}",
    "length-before-a-bad-colon": POST + b"Content-Length : 2\r\n\r\n{}",
    "coding-before-a-bad-colon": POST + b"Transfer-Encoding : chunked\r\n\r\n" + ONE,
    "coding-empty": CODING + b"\r\n\r\n" + ONE,
    "coding-unknown": CODING + b"xchunked\r\n\r\n" + ONE,
    "coding-in-quotes": CODING + b'"chunked"\r\n\r\n' + ONE,
    "coding-with-a-parameter": CODING + b"chunked;q=1\r\n\r\n" + ONE,
    "coding-after-a-control": CODING + b"\x0bchunked\r\n\r\n" + ONE,
    "coding-that-does-not-end-in-chunks": CODING + b"chunked, identity\r\n\r\n" + ONE,
    "coding-in-two-fields": CHUNKED + b"Transfer-Encoding: identity\r\n\r\n" + ONE,
    "coding-twice": CODING + b"chunked, chunked\r\n\r\n" + ONE,
    "coding-without-chunks": CODING + b"gzip\r\n\r\n" + ONE,
    "upgrade-length-and-chunks": CHUNKED
    + b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 2\r\n\r\n{}",
    "upgrade-and-two-lengths": LENGTH
    + b"1\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 2\r\n\r\n{}",
}


@pytest.mark.parametrize("request_", NO_HTTP.values(), ids=NO_HTTP)
async def test_what_is_no_http_gets_the_one_error_shape(server: Server, request_: bytes) -> None:
    [answer] = await answers(server.port, request_ + SMUGGLED)
    is_last(answer, 400, BAD_REQUEST)


TITLE_CHUNK = b"%x\r\n%b\r\n" % (len(TITLE), TITLE)
BROKEN = {
    "what-is-no-chunk": TITLE_CHUNK + b"what\r\n",
    "size-in-hex-of-c": b"0x" + TITLE_CHUNK,
    "size-with-a-plus": b"+" + TITLE_CHUNK,
    "size-negative": b"-" + TITLE_CHUNK,
    "size-after-a-space": b" " + TITLE_CHUNK,
    "size-before-a-space": TITLE_CHUNK.replace(b"\r", b" \r", 1),
    "size-empty": b"\r\n",
    "size-over-all-bounds": b"1" + b"0" * 16 + TITLE_CHUNK,
    "size-too-small": b"1\r\n" + TITLE + b"\r\n",
    "bare-lf-after-the-size": TITLE_CHUNK.replace(b"\r\n", b"\n", 1),
    "bare-lf-after-the-data": TITLE_CHUNK[:-2] + b"\n",
    "bare-lf-after-the-last": TITLE_CHUNK + b"0\n\n",
    "bare-lf-in-an-extension": TITLE_CHUNK.replace(b"\r", b";a\nb\r", 1),
    "bare-cr-after-the-size": TITLE_CHUNK.replace(b"\r\n", b"\r", 1),
    "length-in-the-trailer": TITLE_CHUNK + b"0\r\nContent-Length: 99\r\n\r\n",
}


@pytest.mark.parametrize("body", BROKEN.values(), ids=BROKEN)
async def test_a_broken_chunk_is_400_and_stores_nothing(server: Server, body: bytes) -> None:
    caller = Caller(server.port)
    head = caller.head("POST", "", Content_Type="application/json", Transfer_Encoding="chunked")
    end = b"" if body.endswith(b"\n\n") or b"0\r\n" in body else b"0\r\n\r\n"
    for first in (b"", GET + b"\r\n"):
        for packets in (
            (first + head + body + end + SMUGGLED,),
            (first + head, body + end + SMUGGLED),
        ):
            *before, answer = await answers(server.port, *packets)
            assert statuses(before) == [200] * bool(first)
            is_last(answer, 400, BAD_REQUEST)
    assert await titles(caller) == []


async def test_a_broken_chunk_is_400_before_the_token_is_looked_at(server: Server) -> None:
    head = Caller(server.port).head("POST", "", Authorization="none", Transfer_Encoding="chunked")
    [answer] = await answers(server.port, head, b"what is this?" + SMUGGLED)
    is_last(answer, 400, BAD_REQUEST)


JUNK = {
    "a-letter": (b"x", 400, BAD_REQUEST),
    "a-nul": (b"\0", 400, BAD_REQUEST),
    "a-space": (b" ", 400, BAD_REQUEST),
    "a-line-and-a-letter": (b"\r\nx", 400, BAD_REQUEST),
    "a-header": (b"X-Y: z\r\n\r\n", 400, BAD_REQUEST),
    "babble": (b"what is this?\r\n\r\n", 400, BAD_REQUEST),
    "a-huge-head": (GET + b"X-Huge: " + b"a" * 70 * 2**10, 431, HEADERS_TOO_LARGE),
}


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize(("rest", "status", "body"), JUNK.values(), ids=JUNK)
async def test_a_good_request_before_junk_gets_its_own_answer(
    server: Server, coding: str, rest: bytes, status: int, body: Any
) -> None:
    caller = Caller(server.port)
    request = with_body(caller, "", TITLE, coding)
    for count, packets in (
        (1, (request + rest,)),
        (1, (request, rest)),
        (3, (request * 3 + rest,)),
    ):
        before = len(await titles(caller))
        *own, last = await answers(server.port, *packets)
        assert [(answer.status, answer.body["title"]) for answer in own] == [(201, "Whole")] * count
        is_last(last, status, body)
        assert await titles(caller) == ["Whole"] * (before + count)


@pytest.mark.parametrize("before", [b"", LAST.replace(b"close", b"keep-alive")])
@pytest.mark.parametrize(
    ("junk", "status"),
    [
        (GET + b"{page}X-Huge: " + b"a" * 70 * 2**10, 431),
        (GET + b"{page}what is this?\r\n\r\n", 400),
        (POST + b"{page}Content-Length: x\r\n\r\n", 400),
        (POST + b"{page}Transfer-Encoding: chunked\r\n\r\nwhat is this?", 400),
    ],
    ids=["a-huge-head", "a-header", "a-length", "a-chunk"],
)
async def test_a_page_may_read_why_its_request_is_refused(
    server: Server, before: bytes, junk: bytes, status: int
) -> None:
    """FR-030, and its own request id is repeated, as far as its headers could be read."""
    page = b"Origin: http://localhost:3000\r\nX-Request-ID: mine\r\nAccept: */*\r\n"
    *_, last = await answers(server.port, before + junk.replace(b"{page}", page))
    told = [last.headers.get(name) for name in ("access-control-allow-origin", "x-request-id")]
    assert (last.status, *told) == (status, "http://localhost:3000", "mine")


@pytest.mark.parametrize("before", [b"", LAST.replace(b"close", b"keep-alive")])
async def test_lines_without_end_are_no_head(server: Server, before: bytes) -> None:
    is_last((await answers(server.port, before + b"\r\n" * 2**16))[-1], 431, HEADERS_TOO_LARGE)


@pytest.mark.parametrize("first", [GET.replace(b"healthz", b"api/x/tasks"), SMUGGLED[:-2]])
@pytest.mark.parametrize("junk", [b"JUNK\r\n\r\n", b"CONNECT a:1 HTTP/1.1\r\n\r\n"])
async def test_junk_behind_an_error_has_its_own_answer(
    server: Server, first: bytes, junk: bytes
) -> None:
    """So far behind that it is parsed when the error has been answered."""
    request = first + b"\r\n" + LAST.replace(b"close", b"keep-alive")
    *_, last = await answers(server.port, request + b"\r\n" * 2100 + junk)
    is_last(last, 400, BAD_REQUEST)


LONG = """
insert into tasks (user_id, title, description)
select %s, 'Task ' || n, repeat('x', 1000) from generate_series(1, 3000) n
"""


async def test_a_long_answer_before_junk_arrives_whole(server: Server, database_url: str) -> None:
    """Also if the reader is slow, and more junk follows than anybody reads."""
    caller = Caller(server.port)
    with psycopg.connect(database_url) as connection:
        connection.execute(LONG, [caller.user])
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=2**16)
    writer.write(caller.head("GET", "") + b"JUNK\r\n\r\n" + b"z" * 300_000)
    await asyncio.sleep(0.3)
    own, last = await answers_in(await read_to_end(reader))
    writer.close()
    assert (own.status, len(own.body)) == (200, 3000)
    is_last(last, 400, BAD_REQUEST)


async def test_what_waits_behind_an_answer_that_nobody_reads_is_not_begun(
    server: Server, database_url: str
) -> None:
    caller = Caller(server.port)
    with psycopg.connect(database_url) as connection:
        connection.execute(LONG, [caller.user])
    _, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=2**10)
    lists = b"".join(caller.head("GET", "", X_Request_ID=f"id-{n}") for n in range(20))
    writer.write(lists + caller.request("POST", "", {"title": "Behind"}))
    await asyncio.sleep(0.5)
    writer.transport.abort()
    await asyncio.sleep(0.3)
    lines = [line for line in server.stderr().splitlines() if f"user={caller.user}" in line]
    assert 0 < len(lines) < 20
    assert not [line for line in lines if " POST " in line]
    assert len(await titles(caller)) == 3000


# An app that answers in pieces, as no endpoint does, by the same server.
IN_PIECES = """
import sys, uvicorn, todo

async def app(scope, receive, send):
    body = (await receive())["body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for part in (b"one ", body):
        await send({"type": "http.response.body", "body": part, "more_body": True})
    if scope["path"] != "/stops":
        await send({"type": "http.response.body", "body": b" three"})

uvicorn.run(app, port=int(sys.argv[1]), http=todo.HTTPProtocol, lifespan="off")
"""


async def test_an_answer_in_pieces_is_one_and_without_its_end_is_none(serve: Serve) -> None:
    port = free_port()
    command = (sys.executable, "-c", IN_PIECES, str(port))
    server = await asyncio.to_thread(serve, wait=False, command=command)
    await asyncio.to_thread(server.wait_for, "Uvicorn running on")
    whole = POST + b"Content-Length: 3\r\n\r\ntwo"
    told = await answers(port, whole + GET + b"\r\n" + LAST)
    assert [answer.content for answer in told] == [b"one two three", *[b"one  three"] * 2]
    assert await answers(port, GET.replace(b"/healthz", b"/stops") + b"\r\n" + LAST) == []
    assert "AttributeError" not in server.stderr()


def test_the_log_of_all_this_holds_no_traceback(server: Server) -> None:
    assert "Traceback" not in server.stderr()
