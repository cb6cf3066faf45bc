"""Better Auth's keys: when they are fetched, how often, and what a faulty answer costs."""

import asyncio
import contextlib
import json
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler
from threading import Event
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, get_default_algorithms

import todo
from todo_tests.better_auth import GENERATE, Issuer, Key, respond
from todo_tests.support import assert_error, bearer, client_of, new_user, path_of

pytestmark = pytest.mark.anyio

OCT = "bWluZW1pbmVtaW5lbWluZW1pbmVtaW5lbWluZW1pbmU"
TIMEOUT = 2.0  # seconds that Better Auth has for an answer
BURST = 3  # fetches at once; then one a second


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    issuer = Issuer(Key("EdDSA"))
    yield issuer
    issuer.away()


@pytest.fixture
async def client(make_settings: Any, issuer: Issuer) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an app that knows no key yet."""
    async with client_of(make_settings(better_auth_url=issuer.url)) as client:
        yield client


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fetch waits 0.05 s for the one before, in place of 1 s, where that is not the question."""
    monkeypatch.setattr(todo, "JWKS_PAUSE", 0.05)


async def get(client: httpx.AsyncClient, headers: Mapping[str, str], user: str) -> httpx.Response:
    return await client.get(path_of(user), headers=headers)


async def accepts(client: httpx.AsyncClient, issuer: Issuer, key: Key | None = None) -> bool:
    """Whether a new token of the issuer's is accepted; else it is 401."""
    user = new_user()
    response = await get(client, issuer.bearer(user, key), user)
    if response.status_code != 200:
        assert_error(response, "INVALID_TOKEN")
    return response.status_code == 200


async def invented(client: httpx.AsyncClient, issuer: Issuer) -> httpx.Response:
    """The answer to a token with a key of nobody."""
    user = new_user()
    return await get(client, issuer.bearer(user, Key("EdDSA")), user)


def assert_unavailable(response: httpx.Response) -> None:
    assert_error(response, "AUTH_KEYS_UNAVAILABLE")
    assert response.headers["retry-after"] == "1"
    assert "www-authenticate" not in response.headers


# When.


async def test_nothing_is_fetched_before_a_token_needs_it(
    client: httpx.AsyncClient, issuer: Issuer, user: str
) -> None:
    issuer.away()
    assert (await client.get("/healthz")).status_code == 200
    assert (await client.get("/readyz")).status_code == 200
    assert (await get(client, bearer(user), user)).status_code == 200
    issuer.back()
    assert (await get(client, bearer(user), user)).status_code == 200
    assert issuer.fetches == []
    assert await accepts(client, issuer)
    assert issuer.fetches == ["/api/auth/jwks"]


async def test_known_keys_are_not_fetched_again(client: httpx.AsyncClient, issuer: Issuer) -> None:
    for _ in range(5):
        assert await accepts(client, issuer)
    assert len(issuer.fetches) == 1


async def test_many_first_tokens_share_one_fetch(client: httpx.AsyncClient, issuer: Issuer) -> None:
    answers = await asyncio.gather(*[accepts(client, issuer) for _ in range(50)])
    assert (all(answers), len(issuer.fetches)) == (True, 1)


async def test_a_fetch_holds_up_nobody_else(
    client: httpx.AsyncClient, issuer: Issuer, user: str
) -> None:
    """HS256 never waits, and the event loop goes on."""
    release = Event()
    issuer.answer = lambda request: (release.wait(5), respond(request, issuer.jwks))[1]
    waiting = asyncio.create_task(accepts(client, issuer))
    while not issuer.fetches:
        await asyncio.sleep(0.01)
    async with asyncio.timeout(1):
        for headers, status in ((bearer(user), 200), (bearer(user, sub=""), 401), ({}, 401)):
            assert (await get(client, headers, user)).status_code == status
        assert (await client.get("/healthz")).status_code == 200
    assert not waiting.done()
    release.set()
    assert await waiting


async def test_a_request_that_gives_up_does_not_spoil_it_for_the_others(
    client: httpx.AsyncClient, issuer: Issuer
) -> None:
    release = Event()
    issuer.answer = lambda request: (release.wait(5), respond(request, issuer.jwks))[1]
    first = asyncio.create_task(get(client, issuer.bearer("ann"), "ann"))
    second = asyncio.create_task(accepts(client, issuer))
    while not issuer.fetches:
        await asyncio.sleep(0.01)
    first.cancel()
    await asyncio.wait([first])
    release.set()
    assert await second
    assert len(issuer.fetches) == 1


def headers_of(issuer: Issuer) -> list[dict[str, str]]:
    """The headers of each fetch from now on."""
    seen: list[dict[str, str]] = []

    def see(request: BaseHTTPRequestHandler) -> None:
        seen.append({name.lower(): value for name, value in request.headers.items()})
        respond(request, issuer.jwks)

    issuer.answer = see
    return seen


async def test_a_fetch_says_who_asks_and_for_what(
    client: httpx.AsyncClient, issuer: Issuer
) -> None:
    """Firewalls refuse requests without (AWS, NoUserAgent_HEADER), and scripts' own names."""
    seen = headers_of(issuer)
    assert await accepts(client, issuer)
    [headers] = seen
    assert headers["accept"] == "application/json"
    assert re.fullmatch(r"[A-Za-z-]+", headers["user-agent"])
    assert "python" not in headers["user-agent"].lower()
    assert {"authorization", "cookie"}.isdisjoint(headers)


# Rotation.


async def test_the_first_token_after_a_rotation_is_accepted_at_once(
    client: httpx.AsyncClient, issuer: Issuer
) -> None:
    for _ in range(BURST):
        began = time.monotonic()
        assert await accepts(client, issuer)
        assert time.monotonic() - began < 0.9
        issuer.keys.append(Key("EdDSA"))


@pytest.mark.slow
async def test_it_is_accepted_even_when_rotations_use_up_the_allowance(
    client: httpx.AsyncClient, issuer: Issuer
) -> None:
    for _ in range(BURST + 2):
        issuer.keys.append(Key("EdDSA"))
        began = time.monotonic()
        assert await accepts(client, issuer)
        assert time.monotonic() - began < 2
    assert len(issuer.fetches) == BURST + 2
    assert await accepts(client, issuer, issuer.keys[0])  # old keys stay listed


async def test_a_key_published_while_a_fetch_is_under_way_is_found(
    client: httpx.AsyncClient, issuer: Issuer
) -> None:
    """The fetch had read the old keys before the new one was made: another must follow."""
    assert await accepts(client, issuer)
    release, before = Event(), issuer.jwks

    def slow(request: BaseHTTPRequestHandler) -> None:
        issuer.answer = None
        release.wait(5)
        respond(request, before)

    issuer.answer = slow
    stranger = asyncio.create_task(invented(client, issuer))
    while len(issuer.fetches) < 2:
        await asyncio.sleep(0.01)
    issuer.keys.append(Key("EdDSA"))
    rotated = asyncio.create_task(accepts(client, issuer))
    await asyncio.sleep(0.05)
    release.set()
    assert await rotated
    assert_error(await stranger, "INVALID_TOKEN")


@pytest.mark.slow
async def test_a_flood_of_invented_kids_costs_few_fetches(
    client: httpx.AsyncClient, issuer: Issuer
) -> None:
    """And a rotation in its midst is not refused."""
    assert await accepts(client, issuer)
    began = time.monotonic()
    stranger = Key("EdDSA")

    async def attack(number: int) -> None:
        await asyncio.sleep(number / 200)
        stranger.kid = f"invented-{number}"
        headers = issuer.bearer("mallory", stranger)
        assert_error(await get(client, headers, "mallory"), "INVALID_TOKEN")

    flood = asyncio.gather(*[attack(number) for number in range(300)])
    await asyncio.sleep(1.2)
    assert await accepts(client, issuer, issuer.keys[0])  # known: no waiting
    issuer.keys.append(Key("EdDSA"))
    assert await accepts(client, issuer)
    await flood
    elapsed = time.monotonic() - began
    assert len(issuer.fetches) <= BURST + elapsed + 1
    assert elapsed < 6


# Faults of the answer. None is 401, on which a frontend logs its user out.


def answer(
    body: bytes, status: int = 200, **headers: str
) -> Callable[[BaseHTTPRequestHandler], None]:
    return lambda request: respond(request, body, status, **headers)


def raw(*parts: bytes) -> Callable[[BaseHTTPRequestHandler], None]:
    """An answer byte by byte as given, or not HTTP at all, and then the end."""

    def send(request: BaseHTTPRequestHandler) -> None:
        for part in parts:
            request.wfile.write(part)
        request.close_connection = True

    return send


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
PADDING = json.dumps({"keys": [], "padding": "x" * 2**20}).encode()
FAULTS: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {
    "500": answer(b"{}", 500),
    "404": answer(b"Not Found", 404),
    "429": answer(b'{"message":"Too many requests"}', 429),
    "429 until a date": answer(b"{}", 429, Retry_After="Wed, 21 Oct 2099 07:28:00 GMT"),
    "429 for less than no time": answer(b"{}", 429, Retry_After="-1", X_Retry_After="-1"),
    "204": answer(b"", 204),
    "401": answer(b"{}", 401),
    "HTML": answer(b"<!doctype html><title>Sign in</title>", Content_Type="text/html"),
    "nothing": answer(b""),
    "no JSON": answer(b"{'keys': []}"),
    "not UTF-8": answer(b'{"keys":["\xff"]}'),
    "a nesting bomb": answer(b'{"keys":' + b"[" * 100_000),
    "null": answer(b"null"),
    "number": answer(b"1"),
    "text": answer(b'"keys"'),
    "list": answer(b"[]"),
    "no member keys": answer(b"{}"),
    "keys null": answer(b'{"keys":null}'),
    "keys number": answer(b'{"keys":1}'),
    "keys text": answer(b'{"keys":"keys"}'),
    "keys object": answer(b'{"keys":{"a":"b"}}'),
    "empty set": answer(b'{"keys":[]}'),
    "only keys that cannot be parsed": answer(b'{"keys":[null,1,"x",[],{},{"kid":"a"}]}'),
    "huge": answer(PADDING),
    "huge, of undeclared length": raw(HEAD, b"\r\n", *[PADDING] * 8),
    "endless head": raw(b"HTTP/1.1 200 OK\r\n", *[b"X: y\r\n"] * 5000),
    "endless line": raw(b"HTTP/1.1 200 OK\r\nX: ", b"y" * 2**20),
    "cut short": raw(HEAD, b"Content-Length: 5000\r\n\r\n", b'{"keys":[]'),
    "bad chunks": raw(HEAD, b"Transfer-Encoding: chunked\r\n\r\n", b"zz\r\n{}"),
    "not HTTP": raw(b"220 mail.example.com ESMTP\r\n"),
    "closed": raw(),
    "slow": lambda _: time.sleep(TIMEOUT + 1),
}


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(fault, id=name, marks=[pytest.mark.slow] if name == "slow" else [])
        for name, fault in FAULTS.items()
    ],
)
async def test_while_no_key_is_known_a_fault_is_503(
    client: httpx.AsyncClient, issuer: Issuer, fault: Any, user: str
) -> None:
    issuer.answer = fault
    began = time.monotonic()
    assert_unavailable(await get(client, issuer.bearer(user), user))
    assert time.monotonic() - began < TIMEOUT + 1
    assert (await get(client, bearer(user), user)).status_code == 200
    issuer.answer = None
    assert await accepts(client, issuer)
    assert len(issuer.fetches) == 2


@pytest.mark.parametrize(("status", "padding"), [(500, 0), (404, 0), (206, 0), (200, 2**20)])
async def test_good_keys_do_not_count_in_an_answer_of_another_status_or_size(
    client: httpx.AsyncClient, issuer: Issuer, user: str, status: int, padding: int
) -> None:
    issuer.answer = answer(issuer.jwks + b" " * padding, status)
    assert_unavailable(await get(client, issuer.bearer(user), user))


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize("fault", ["500", "HTML", "list", "closed"])
async def test_known_keys_are_served_while_better_auth_is_away(
    client: httpx.AsyncClient, issuer: Issuer, fault: str
) -> None:
    """A key that is not known cannot be judged: 503."""
    assert await accepts(client, issuer)
    issuer.answer = FAULTS[fault]
    assert_unavailable(await invented(client, issuer))
    assert await accepts(client, issuer)
    issuer.answer = None
    assert_error(await invented(client, issuer), "INVALID_TOKEN")


@pytest.mark.slow
@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\nX: ", HEAD + b"Content-Length: 99\r\n\r\n"])
async def test_an_answer_that_drips_is_hung_up_on(
    client: httpx.AsyncClient, issuer: Issuer, user: str, head: bytes
) -> None:
    """Else each such fetch keeps a thread until the thread pool is empty."""
    hung_up = Event()

    def drip(request: BaseHTTPRequestHandler) -> None:
        request.close_connection = True
        with contextlib.suppress(OSError):
            for part in (head, *[b"x"] * 20):
                request.wfile.write(part)
                time.sleep(0.25)
            return
        hung_up.set()

    issuer.answer = drip
    assert_unavailable(await get(client, issuer.bearer(user), user))
    assert await asyncio.to_thread(hung_up.wait, 1.5)


@pytest.mark.slow
@pytest.mark.usefixtures("short_pauses")
async def test_nobody_listening_is_503_until_somebody_does(
    client: httpx.AsyncClient, issuer: Issuer, user: str
) -> None:
    issuer.away()
    for _ in range(5):
        began = time.monotonic()
        assert_unavailable(await get(client, issuer.bearer(user), user))
        assert time.monotonic() - began < 2
    issuer.back()
    assert await accepts(client, issuer)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_not_followed(
    client: httpx.AsyncClient, issuer: Issuer, user: str, status: int
) -> None:
    elsewhere = Issuer(*issuer.keys)
    issuer.answer = answer(b"", status, Location=f"{elsewhere.url}/api/auth/jwks")
    assert_unavailable(await get(client, issuer.bearer(user), user))
    assert (len(issuer.fetches), elsewhere.fetches) == (1, [])
    elsewhere.away()


async def test_a_jwks_url_may_be_a_query_alone(
    make_settings: Any, issuer: Issuer, user: str
) -> None:
    """RFC 9112 section 3.2.1: the path that is sent is then `/`."""
    settings = make_settings(better_auth_url=issuer.url, jwks_url=f"{issuer.url}?all=1")
    async with client_of(settings) as client:
        assert (await get(client, issuer.bearer(user), user)).status_code == 200
    assert issuer.fetches == ["/?all=1"]


async def test_the_query_of_a_jwks_url_is_not_logged(
    make_settings: Any, issuer: Issuer, user: str, capfd: pytest.CaptureFixture[str]
) -> None:
    issuer.answer = answer(b"", 500)
    async with client_of(make_settings(jwks_url=f"{issuer.url}/jwks?key=hunter2")) as client:
        assert_unavailable(await get(client, issuer.bearer(user), user))
    log = capfd.readouterr().err
    assert f"no keys from {issuer.url}/jwks: status 500\n" in log
    assert "hunter2" not in log


# What the log says of keys and answers that are no use


@pytest.fixture
def warnings_of(capfd: pytest.CaptureFixture[str]) -> Callable[[str], list[str]]:
    """The WARNINGs of the app's log that begin so."""
    seen = []

    def warnings_of(beginning: str) -> list[str]:
        for handler in logging.getLogger("todo").handlers:
            handler.flush()
        seen.extend(capfd.readouterr().err.splitlines())
        texts = [line.partition(" WARNING ")[2] for line in seen if " WARNING " in line]
        return [text for text in texts if text.startswith(beginning)]

    return warnings_of


WarningsOf = Callable[[str], list[str]]


@pytest.mark.slow
async def test_an_answer_that_comes_too_late_is_called_so(
    client: httpx.AsyncClient, issuer: Issuer, user: str, warnings_of: WarningsOf
) -> None:
    """It was us who hung up, whatever the library says of the connection."""
    drip = [HEAD + b"Content-Length: 99\r\n\r\n", *[b"x"] * 30]

    def late(request: BaseHTTPRequestHandler) -> None:
        with contextlib.suppress(OSError):
            for part in drip:
                request.wfile.write(part)
                time.sleep(0.1)

    for fault in (FAULTS["slow"], late):
        issuer.answer = fault
        assert_unavailable(await get(client, issuer.bearer(user), user))
    late_ones = [f"no keys from {issuer.url}/api/auth/jwks: no whole answer within 2 s"] * 2
    assert warnings_of("no keys") == late_ones


SENTENCES = {
    "500": "status 500",
    "closed": "Server disconnected without sending a response",
    "huge": "the answer has more than 262144 bytes",
    "HTML": "JSONDecodeError Expecting value",
    "no member keys": "KeyError 'keys'",
    "not HTTP": "RemoteProtocolError",
}


@pytest.mark.parametrize("fault", SENTENCES)
async def test_the_log_says_what_is_wrong_with_an_answer(
    client: httpx.AsyncClient, issuer: Issuer, user: str, warnings_of: WarningsOf, fault: str
) -> None:
    issuer.answer = FAULTS[fault]
    assert_unavailable(await get(client, issuer.bearer(user), user))
    [warning] = warnings_of(f"no keys from {issuer.url}/api/auth/jwks: ")
    assert SENTENCES[fault] in warning


async def test_an_endless_head_is_no_longer_read_than_a_body(
    client: httpx.AsyncClient, issuer: Issuer, user: str
) -> None:
    """Within the two seconds it would be some hundred MiB."""
    hung_up = Event()

    def flood(request: BaseHTTPRequestHandler) -> None:
        request.wfile.write(b"HTTP/1.1 200 OK\r\n")
        with contextlib.suppress(OSError):
            for number in range(100_000):
                request.wfile.write(b"X-%d: %s\r\n" % (number, b"y" * 4000))
            return
        hung_up.set()

    issuer.answer = flood
    began = time.monotonic()
    assert_unavailable(await get(client, issuer.bearer(user), user))
    assert time.monotonic() - began < TIMEOUT / 2
    assert await asyncio.to_thread(hung_up.wait, 1.0)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("place", ["{}/moved", "/moved", "//elsewhere.example/moved"])
async def test_a_redirect_is_logged_with_its_place_and_without_its_query(
    client: httpx.AsyncClient,
    issuer: Issuer,
    user: str,
    warnings_of: WarningsOf,
    status: int,
    place: str,
) -> None:
    place = place.format(issuer.url)
    issuer.answer = answer(b"", status, Location=f"{place}?key=hunter2")
    assert_unavailable(await get(client, issuer.bearer(user), user))
    [warning] = warnings_of("no keys")
    assert f": status {status}, a redirect to '{place}': set JWKS_URL" in warning
    assert "hunter2" not in warning


@pytest.mark.usefixtures("short_pauses")
async def test_a_hostile_answer_breaks_no_line_of_the_log(
    client: httpx.AsyncClient, issuer: Issuer, user: str, warnings_of: WarningsOf
) -> None:
    place = "\x85\xe2\x80\xa8forged" + "x" * 9000
    issuer.answer = raw(f"HTTP/1.1 302 Found\r\nLocation: {place}\r\n\r\n".encode("latin-1"))
    assert_unavailable(await get(client, issuer.bearer(user), user))
    issuer.answer = raw(b"HTTP/1.1 200 OK\r\n\r\n" + '{"\u2028\x85": "forged"'.encode())
    assert_unavailable(await get(client, issuer.bearer(user), user))
    issuer.answer = raw("HTTP/1.\u2028\x85forged\x1b[31m\r\n\r\n".encode())
    assert_unavailable(await get(client, issuer.bearer(user), user))
    issuer.answer = raw(b"x" * 60_000 + b"\r\n\r\n")
    assert_unavailable(await get(client, issuer.bearer(user), user))
    warnings = warnings_of("no keys")
    assert len(warnings) == 4
    assert [text for text in warnings if not text.isprintable() or len(text) > 600] == []


P384 = ECAlgorithm.to_jwk(ec.generate_private_key(ec.SECP384R1()).public_key(), as_dict=True)
NAMED: dict[str, tuple[dict[str, Any], str]] = {
    "no kid": ({"kid": None}, "a key without kid"),
    "kid number": ({"kid": 4711}, "a key without kid"),
    "ES384": ({"alg": "ES384", "kid": "a-kid"}, "'a-kid' is of algorithm 'ES384'"),
    "RSA-OAEP": ({"alg": "RSA-OAEP", "kid": "a-kid"}, "'a-kid' is of algorithm 'RSA-OAEP'"),
    "none": ({"alg": "none", "kid": "a-kid"}, "'a-kid' is of algorithm 'none'"),
    "P-384 without alg": (
        {**P384, "alg": ..., "kid": "a-kid"},
        "'a-kid' is of algorithm 'ES384'",
    ),
    "oct without alg": (
        {"kty": "oct", "k": OCT, "alg": ..., "kid": "a-kid"},
        "'a-kid' is of algorithm 'HS256'",
    ),
    "a long type": ({"kty": "x" * 5000, "kid": "a-kid"}, "'a-kid' cannot be read: "),
    "no x": ({"x": 5, "kid": "a-kid"}, "'a-kid' cannot be read: "),
    "private": ({"d": "AAAA", "kid": "a-kid"}, "'a-kid' is a private key"),
    "encryption": ({"use": "enc", "kid": "a-kid"}, "'a-kid' is not to verify with"),
    "deriving": ({"key_ops": ["deriveBits"], "kid": "a-kid"}, "'a-kid' is not to verify with"),
    "hostile": ({"kid": "\n\u2028\x1b[31m", "alg": "\n\u2028" * 90}, "is of algorithm"),
}


@pytest.mark.parametrize(("members", "words"), NAMED.values(), ids=NAMED)
async def test_a_key_that_is_not_used_is_named_in_the_log(
    client: httpx.AsyncClient,
    issuer: Issuer,
    warnings_of: WarningsOf,
    members: dict[str, Any],
    words: str,
) -> None:
    """Once a fetch, without the key itself."""
    odd = {**Key("EdDSA").jwk, **members}
    odd = {name: value for name, value in odd.items() if value is not ...}
    issuer.answer = answer(json.dumps({"keys": [odd, issuer.keys[0].jwk]}).encode())
    assert await accepts(client, issuer)
    assert await accepts(client, issuer)
    [warning] = warnings_of("a key of the JWKS is not used: ")
    assert words in warning
    assert warning.isprintable()
    assert len(warning) < 300
    assert str(odd["x"]) not in warning


async def test_keys_that_are_not_used_flood_no_log(
    client: httpx.AsyncClient, issuer: Issuer, warnings_of: WarningsOf
) -> None:
    """However many there are, and however often invented tokens have them fetched."""
    odd = [{"kid": f"kid-{number}", "alg": "ES384"} for number in range(3000)]
    issuer.answer = answer(json.dumps({"keys": [*odd, issuer.keys[0].jwk]}).encode())
    assert await accepts(client, issuer)
    assert 1 <= len(warnings_of("a key of the JWKS")) <= 20
    named = len(warnings_of("a key of the JWKS"))
    assert_error(await invented(client, issuer), "INVALID_TOKEN")
    assert len(issuer.fetches) == 2
    assert len(warnings_of("a key of the JWKS")) == named
    issuer.answer = answer(json.dumps({"keys": [{"kid": "new", "alg": "ES384"}]}).encode())
    await invented(client, issuer)
    assert len(warnings_of("a key of the JWKS")) == named + 1


async def test_keys_that_are_used_are_not_named(
    client: httpx.AsyncClient, issuer: Issuer, warnings_of: WarningsOf
) -> None:
    issuer.keys.extend(Key(algorithm) for algorithm in GENERATE)
    assert await accepts(client, issuer)
    assert warnings_of("") == []


async def test_proxies_and_netrc_of_the_environment_do_not_matter(
    client: httpx.AsyncClient, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setitem(os.environ, name, "http://127.0.0.1:9")
    assert await accepts(client, issuer)


async def test_one_bad_key_does_not_spoil_the_set(
    client: httpx.AsyncClient, issuer: Issuer, user: str
) -> None:
    good = issuer.keys[0].jwk
    bad: list[object] = [
        *(None, 1, "x", [], {}, {"kid": "a"}, {"kty": "OKP", "kid": "b"}),
        {**good, "kid": None},
        {**good, "kid": 1},
        {**good, "kid": ["c"]},
        {**good, "kid": "d", "x": "!"},
        {**good, "kid": "e", "x": 5},
        {**good, "kid": "f", "crv": "Ed448"},
        {**good, "kid": "g", "alg": "ES384"},
        {**good, "kid": "h", "kty": "XYZ"},
        {"kty": "EC", "crv": "P-384", "alg": "ES384", "kid": "i", "x": "AA", "y": "AA"},
        {"kty": "RSA", "alg": "RS256", "kid": "j", "n": "", "e": "AQAB"},
        {"kty": "RSA", "alg": "RS256", "kid": "k", "n": "AQAB", "e": None},
        {"kty": "oct", "alg": "HS256", "kid": "l", "k": OCT},
        {name: value for name, value in good.items() if name != "kid"},
    ]
    body = json.dumps({"keys": [*bad, good, *bad]}).encode()
    issuer.answer = answer(body)
    assert await accepts(client, issuer)
    for kid in "afghijk":
        key = Key("EdDSA", kid)
        assert_error(await get(client, issuer.bearer(user, key), user), "INVALID_TOKEN")
        if len(issuer.fetches) >= BURST:  # those that are unknown wait for the allowance
            break


OKP, RSA, EC = (Key(algorithm).jwk for algorithm in ("EdDSA", "RS256", "ES256"))
UNUSABLE: dict[str, object] = {
    "alg none": {**OKP, "alg": "none"},
    "alg none of another kty": {**RSA, "alg": "none"},
    "alg HS256 of another kty": {**OKP, "alg": "HS256"},
    "alg of another kty": {**OKP, "alg": "RS256"},
    "alg unknown": {**OKP, "alg": "XX256"},
    "alg list": {**OKP, "alg": ["EdDSA"]},
    "alg object": {**OKP, "alg": {"EdDSA": 1}},
    "kty missing": {name: value for name, value in OKP.items() if name != "kty"},
    "kty list": {**OKP, "kty": ["OKP"]},
    "kty none": {**OKP, "kty": "none", "alg": "none"},
    "kty to come": {"kty": "AKP", "alg": "ML-DSA-44", "kid": "a", "pub": "AA"},
    "crv unknown": {**OKP, "crv": "Ed25518"},
    "crv object": {**EC, "crv": {}},
    "crv for encryption": {**OKP, "crv": "X25519"},
    "x of another length": {**OKP, "x": "AA"},
    "point not on the curve": {**EC, "x": EC["y"]},
    "n zero": {**RSA, "n": "AA"},
    "n one": {**RSA, "n": "AQ"},
    "n number": {**RSA, "n": 5},
    "e zero": {**RSA, "e": "AA"},
    "e even": {**RSA, "e": "Ag"},
    "e list": {**RSA, "e": ["AQAB"]},
    "d that is none": {**RSA, "d": "AA"},
    "d of another type": {**RSA, "d": None},
    "oct": {"kty": "oct", "alg": "HS256", "kid": "a", "k": OCT},
    "number": 5,
    "a set in the set": {"keys": [OKP]},
}


@pytest.mark.parametrize("jwk", UNUSABLE.values(), ids=UNUSABLE)
async def test_a_key_that_cannot_be_used_spoils_no_other(
    client: httpx.AsyncClient, issuer: Issuer, jwk: Any
) -> None:
    """Wherever it stands, and under whatever `kid`."""
    good = issuer.keys[0].jwk
    same = {**jwk, "kid": good["kid"]} if isinstance(jwk, dict) else jwk
    issuer.answer = answer(json.dumps({"keys": [jwk, same, good, same, jwk]}).encode())
    assert await accepts(client, issuer)


@pytest.mark.parametrize("algorithm", GENERATE)
async def test_a_published_private_key_signs_nothing_and_spoils_no_other(
    client: httpx.AsyncClient, issuer: Issuer, algorithm: str
) -> None:
    leaked = Key(algorithm)
    jwk = get_default_algorithms()[algorithm].to_jwk(leaked.private, as_dict=True)
    jwk |= {"alg": algorithm, "kid": leaked.kid}
    jwk.pop("key_ops", None)
    issuer.answer = answer(json.dumps({"keys": [jwk, issuer.keys[0].jwk]}).encode())
    assert await accepts(client, issuer)
    assert not await accepts(client, issuer, leaked)
    assert await accepts(client, issuer)


PURPOSES: dict[str, dict[str, Any]] = {
    "signatures": {"use": "sig"},
    "verifying": {"key_ops": ["verify"]},
    "both, and more members": {"use": "sig", "key_ops": ["verify"], "ext": True, "x5t": "AA"},
}


@pytest.mark.parametrize("purpose", PURPOSES.values(), ids=PURPOSES)
async def test_a_key_may_say_what_it_is_for(
    client: httpx.AsyncClient, issuer: Issuer, purpose: dict[str, Any]
) -> None:
    issuer.answer = answer(json.dumps({"keys": [{**issuer.keys[0].jwk, **purpose}]}).encode())
    assert await accepts(client, issuer)


OTHER_PURPOSES: dict[str, dict[str, Any]] = {
    "encryption": {"use": "enc"},
    "deriving": {"key_ops": ["deriveBits"]},
    "nothing": {"key_ops": []},
}


@pytest.mark.parametrize("purpose", OTHER_PURPOSES.values(), ids=OTHER_PURPOSES)
async def test_a_key_for_another_purpose_signs_nothing_and_replaces_none_of_its_kid(
    client: httpx.AsyncClient, issuer: Issuer, purpose: dict[str, Any]
) -> None:
    """RFC 7517 sections 4.2 and 4.3."""
    other = Key("EdDSA", issuer.keys[0].kid)
    jwk = {**other.jwk, **purpose}
    issuer.answer = answer(json.dumps({"keys": [jwk, issuer.keys[0].jwk, jwk]}).encode())
    assert await accepts(client, issuer)
    assert not await accepts(client, issuer, other)


@pytest.mark.parametrize("algorithm", ["RS256", "PS256"])
@pytest.mark.filterwarnings("ignore::jwt.warnings.InsecureKeyLengthWarning")
async def test_an_rsa_key_of_less_than_2048_bits_signs_nothing(
    client: httpx.AsyncClient, issuer: Issuer, monkeypatch: pytest.MonkeyPatch, algorithm: str
) -> None:
    """RFC 7518 sections 3.3 and 3.5."""
    monkeypatch.setitem(GENERATE, algorithm, lambda: rsa.generate_private_key(65537, 1024))
    issuer.keys.append(Key(algorithm))
    assert [await accepts(client, issuer, key) for key in issuer.keys] == [True, False]


async def test_two_keys_of_different_algorithms_may_share_a_kid(
    client: httpx.AsyncClient, issuer: Issuer
) -> None:
    """RFC 7517 section 4.5."""
    issuer.keys.append(Key("ES256", issuer.keys[0].kid))
    assert [await accepts(client, issuer, key) for key in issuer.keys] == [True, True]


@pytest.mark.parametrize("algorithm", ["HS256", "HS384", "HS512"])
@pytest.mark.filterwarnings("ignore::jwt.warnings.InsecureKeyLengthWarning")
async def test_a_symmetric_key_in_the_set_signs_nothing(
    client: httpx.AsyncClient, issuer: Issuer, user: str, algorithm: str
) -> None:
    secret = b"mine" * 8
    oct_key = {"kty": "oct", "alg": algorithm, "kid": "oct", "k": OCT}
    issuer.answer = answer(json.dumps({"keys": [oct_key, issuer.keys[0].jwk]}).encode())
    assert await accepts(client, issuer)
    claims = {"sub": user, "exp": time.time() + 60, "iss": issuer.url, "aud": issuer.url}
    forged = jwt.encode(claims, secret, algorithm, {"kid": "oct"})
    headers = {"Authorization": f"Bearer {forged}"}
    assert_error(await get(client, headers, user), "INVALID_TOKEN")


# Age. The clocks that the app reads are moved on, in an event loop of their own.


class Clock:
    """Moves time.time and time.monotonic, and with that every event loop, into the future."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead = 0.0
        self.set_back = 0.0  # seconds, as by hand or by NTP: of the wall clock alone
        wall, monotonic = time.time, time.monotonic
        monkeypatch.setattr(time, "time", lambda: wall() + self.ahead - self.set_back)
        monkeypatch.setattr(time, "monotonic", lambda: monotonic() + self.ahead)


class Scene:
    """An app, its issuer, a user with a token, and the clock."""

    def __init__(self, client: httpx.AsyncClient, issuer: Issuer, clock: Clock) -> None:
        self.client, self.issuer, self.clock = client, issuer, clock
        self.tasks = asyncio.all_tasks()
        self.user = new_user()
        self.token = self.new_token()

    def new_token(self) -> dict[str, str]:
        """One that nobody remembers, with times that are good whatever the clock says."""
        return self.issuer.bearer(self.user, iat=None, exp=2**40, jti=new_user())

    async def after(self, seconds: float, token: Mapping[str, str] | None = None) -> int:
        """The status that the first token, or another, gets so many seconds later."""
        self.clock.ahead += seconds
        status = (await get(self.client, token or self.token, self.user)).status_code
        if begun := asyncio.all_tasks() - self.tasks:
            await asyncio.wait(begun, timeout=0.05)  # a fetch in the background may end
            self.tasks = asyncio.all_tasks()
        return status


RunScenario = Callable[[Callable[[Scene], Awaitable[None]]], None]


@pytest.fixture
def run_scenario(
    make_settings: Any, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> RunScenario:
    def run(scenario: Callable[[Scene], Awaitable[None]]) -> None:
        async def main() -> None:
            async with client_of(make_settings(better_auth_url=issuer.url)) as client:
                scene = Scene(client, issuer, Clock(monkeypatch))
                assert await scene.after(0) == 200
                await scenario(scene)

        with asyncio.Runner() as runner:
            runner.run(main())

    return run


FIVE_MINUTES = 300


@pytest.mark.parametrize(
    "pauses",
    [
        [FIVE_MINUTES],
        [239, 61],
        [59, 240, 1],
        [1, 59, 61, 118, 61],
        pytest.param([10] * 30, marks=pytest.mark.slow),
    ],
    ids=lambda pauses: "+".join(map(str, pauses[:5])),
)
def test_a_withdrawn_key_stops_working_within_five_minutes(
    run_scenario: RunScenario, pauses: list[int]
) -> None:
    """Whenever its token is used meanwhile, or remembered."""

    async def scenario(scene: Scene) -> None:
        scene.issuer.keys[:] = [Key("EdDSA")]
        statuses = [await scene.after(pause) for pause in pauses]
        assert statuses[-1] == 401
        assert statuses == sorted(statuses)
        assert await scene.after(0, scene.new_token()) == 200

    run_scenario(scenario)


def test_a_clock_that_is_set_back_prolongs_nothing(run_scenario: RunScenario) -> None:
    """As on a VM that starts with a wrong one."""

    async def scenario(scene: Scene) -> None:
        scene.clock.set_back = 3600.0
        scene.issuer.keys[:] = [Key("EdDSA")]
        assert await scene.after(FIVE_MINUTES) == 401

    run_scenario(scenario)


def test_a_kid_that_is_used_again_means_the_new_key_within_five_minutes(
    run_scenario: RunScenario,
) -> None:
    """Serial ids begin at 1 again when Better Auth's database is reset."""

    async def scenario(scene: Scene) -> None:
        scene.issuer.keys[:] = [Key("EdDSA", scene.issuer.keys[0].kid)]
        new = scene.new_token()
        assert await scene.after(FIVE_MINUTES, new) == 200
        assert await scene.after(0) == 401

    run_scenario(scenario)


@pytest.mark.slow
def test_known_keys_outlive_any_outage(run_scenario: RunScenario) -> None:
    """And hours of it cost few attempts, and nobody much waiting."""

    async def scenario(scene: Scene) -> None:
        scene.issuer.answer = FAULTS["500"]
        assert [await scene.after(3600) for _ in range(3)] == [200] * 3
        tried = len(scene.issuer.fetches)
        assert [await scene.after(2, scene.new_token()) for _ in range(30)] == [200] * 30
        assert len(scene.issuer.fetches) - tried <= 10
        scene.issuer.answer = None
        scene.issuer.keys[:] = [Key("EdDSA")]
        assert await scene.after(FIVE_MINUTES) == 401

    run_scenario(scenario)


@pytest.mark.slow
def test_an_outage_makes_nobody_wait_for_better_auth_each_time(run_scenario: RunScenario) -> None:
    async def scenario(scene: Scene) -> None:
        scene.issuer.answer = FAULTS["slow"]
        scene.clock.ahead += 3600
        began = time.monotonic()
        for _ in range(20):
            assert await scene.after(0, scene.new_token()) == 200
        assert time.monotonic() - began < TIMEOUT + 2

    run_scenario(scenario)


# A pause that Better Auth asks for: its own limit is 100 requests in 10 s for all processes.

PAUSES: dict[str, tuple[dict[str, str], float]] = {
    "Retry-After": ({"Retry_After": "30"}, 30.0),
    "X-Retry-After, as Better Auth writes it": ({"X_Retry_After": "10"}, 10.0),
    "both": ({"Retry_After": "20", "X_Retry_After": "40"}, 20.0),
    "more than a minute": ({"Retry_After": "86400"}, 60.0),
    "of 400 digits": ({"X_Retry_After": "9" * 400}, 60.0),
}


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize(("headers", "pause"), PAUSES.values(), ids=PAUSES)
def test_after_a_429_nothing_is_fetched_before_its_time(
    run_scenario: RunScenario, headers: dict[str, str], pause: float
) -> None:
    """Known keys serve on; what nobody knows is 503, at once."""

    async def scenario(scene: Scene) -> None:
        def unknown() -> dict[str, str]:
            return scene.issuer.bearer(scene.user, Key("EdDSA"), iat=None, exp=2**40)

        scene.clock.ahead += 10.0  # a new allowance of fetches
        scene.issuer.answer = answer(b"{}", 429, **headers)
        assert await scene.after(0, unknown()) == 503
        asked = len(scene.issuer.fetches)
        began = time.perf_counter()
        for after in (0, pause / 2, pause / 2 - 2.0):
            assert await scene.after(after, unknown()) == 503
            assert await scene.after(0, scene.new_token()) == 200
        assert time.perf_counter() - began < 1.0
        assert len(scene.issuer.fetches) == asked
        scene.issuer.answer = None
        assert await scene.after(2.0, unknown()) == 401
        assert len(scene.issuer.fetches) == asked + 1

    run_scenario(scenario)


def test_a_429_without_keys_is_waited_for_too(make_settings: Any, issuer: Issuer) -> None:
    """The answer is a 503 that says so to nobody but the log."""

    async def main() -> None:
        with pytest.MonkeyPatch.context() as patch:
            async with client_of(make_settings(better_auth_url=issuer.url)) as client:
                clock = Clock(patch)
                issuer.answer = answer(b"{}", 429, X_Retry_After="10")
                token = issuer.bearer("ann", iat=None, exp=2**40)
                assert_unavailable(await get(client, token, "ann"))
                issuer.answer = None
                clock.ahead += 8.0
                assert_unavailable(await get(client, token, "ann"))
                assert len(issuer.fetches) == 1
                clock.ahead += 2.0
                assert (await get(client, token, "ann")).status_code == 200

    with asyncio.Runner() as runner:
        runner.run(main())


@pytest.mark.slow
def test_good_keys_are_asked_for_about_once_a_minute(run_scenario: RunScenario) -> None:
    async def scenario(scene: Scene) -> None:
        assert [await scene.after(10, scene.new_token()) for _ in range(48)] == [200] * 48
        assert len(scene.issuer.fetches) <= 10

    run_scenario(scenario)
