"""What every exchange has in common: tokens, the order of checks, headers, CORS, errors, logs."""

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import httpx
import jwt
import psycopg
import pytest

from todo_tests.support import (
    AUTH_URL,
    BEARER,
    COMPLETED,
    ERRORS,
    LOCKED_TABLE,
    NOT_JSON,
    ORIGIN,
    SECRET,
    TASK_ID,
    TITLE_REQUIRED,
    Account,
    OwnPostgres,
    Postgres,
    Serve,
    Server,
    assert_error,
    bearer,
    eventually,
    get,
    listens,
    new_user,
    path_of,
    servers,
    token,
)

if TYPE_CHECKING:
    import todo

JSON = {"Content-Type": "application/json"}
TOO_LARGE = b'{"title": "' + b"x" * 70_000 + b'"}'
PASSWORD = "hunter2-is-the-password"


# Tokens


def signed(header: dict[str, Any], key: str = SECRET, **claims: Any) -> str:
    """A token with members of the header that `token` does not set."""
    payload = {"sub": "u", "exp": int(time.time()) + 3600, **claims}
    return jwt.encode(payload, key, header.pop("alg", "HS256"), headers=header)


NO_TOKEN = {
    "no header": None,
    "empty header": "",
    "another scheme": "Basic dTpw",
    "scheme alone": "Bearer",
    "scheme and a space": "Bearer ",
    "no scheme": "{}",
}
BAD_TOKENS: dict[str, Callable[[], str]] = {
    "Edge case: Malformed JWT Token": lambda: "abc",
    "three empty segments": lambda: "..",
    "no Base64": lambda: "!.!.!",
    "no JSON": lambda: "YQ.YQ.YQ",
    "two segments": lambda: token("u").rpartition(".")[0],
    "five segments": lambda: f"{token('u')}.YQ.YQ",
    "cut short": lambda: token("u")[:-4],
    "FR-002 signed with another secret": lambda: token("u", key="x" * 40),
    "FR-002 unsigned": lambda: signed({"alg": "none"}, ""),
    "signed with HS512": lambda: signed({"alg": "HS512"}),
    "another typ": lambda: signed({"typ": "refresh+jwt"}),
    "crit": lambda: signed({"crit": ["exp"]}),
    "no exp": lambda: token("u", exp=None),
    "exp a date": lambda: token("u", exp="2099-01-01T00:00:00Z"),
    "not yet valid": lambda: token("u", nbf=time.time() + 60),
    "issued in the future": lambda: token("u", iat=time.time() + 60),
    "FR-003 no user": lambda: token(None),
    "empty user": lambda: token(""),
    "user a number": lambda: token(None, sub=5),
    "user_id a number": lambda: token(None, user_id=5),
    "two different users": lambda: token("u", user_id="v"),
    "an e-mail verification token": lambda: token(None, email="a@b.c", userId="u"),
    "a session cookie": lambda: token(None, user={"id": "u"}, session={"userId": "u"}),
    "of another audience": lambda: token("u", aud="https://elsewhere.example"),
    "over 16 KiB": lambda: token("u", x="x" * 17_000),
}
GOOD_TOKENS: dict[str, Callable[[], str]] = {
    "FR-031 as tutorials sign": lambda: "Bearer " + token("u", email="a@b.c"),
    "FR-003 user_id in place of sub": lambda: "Bearer " + token(None, user_id="u"),
    "both the same": lambda: "Bearer " + token("u", user_id="u"),
    "scheme in lower case": lambda: "bearer " + token("u"),
    "scheme in upper case": lambda: "BEARER " + token("u"),
    "our audience": lambda: "Bearer " + token("u", aud=AUTH_URL),
    "our audience among others": lambda: "Bearer " + token("u", aud=["x", AUTH_URL]),
    "any issuer": lambda: "Bearer " + token("u", iss="https://elsewhere.example"),
    "no iat": lambda: "Bearer " + token("u", iat=None),
    "a fractional exp": lambda: "Bearer " + token("u", exp=time.time() + 3600.5),
    "without typ": lambda: "Bearer " + signed({"typ": None}),
    "any kid": lambda: "Bearer " + signed({"kid": "../../etc/passwd"}),
    "expired within the leeway": lambda: "Bearer " + token("u", exp=time.time() - 5),
}


@pytest.mark.parametrize("header", NO_TOKEN.values(), ids=NO_TOKEN)
async def test_without_a_token_authentication_is_required(
    client: httpx.AsyncClient, header: str | None
) -> None:
    """US1-AS3, FR-001, FR-004."""
    value = None if header is None else header.format(token("u"))
    headers = {} if value is None else {"Authorization": value}
    for method, path in (("GET", path_of("u")), ("POST", path_of("u")), ("DELETE", "/api/u/x/y")):
        response = await client.request(method, path, headers=headers)
        assert_error(response, "AUTHENTICATION_REQUIRED")
        assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.filterwarnings("ignore:The HMAC key")
@pytest.mark.parametrize("make", BAD_TOKENS.values(), ids=BAD_TOKENS)
async def test_a_bad_token_is_refused_without_saying_why(
    client: httpx.AsyncClient, make: Callable[[], str]
) -> None:
    """FR-004, SC-003; one answer for all of them."""
    for _ in range(2):
        response = await client.get(path_of("u"), headers={"Authorization": f"Bearer {make()}"})
        assert_error(response, "INVALID_TOKEN")
        assert response.headers["www-authenticate"] == BEARER


async def test_an_expired_token_is_refused_with_a_code_of_its_own(
    client: httpx.AsyncClient,
) -> None:
    """Edge case: Expired JWT Token."""
    response = await client.get(path_of("u"), headers=bearer("u", exp=int(time.time()) - 60))
    assert_error(response, "TOKEN_EXPIRED")
    assert response.headers["www-authenticate"] == BEARER


async def test_two_authorization_headers_are_refused(client: httpx.AsyncClient) -> None:
    header = ("Authorization", f"Bearer {token('u')}")
    response = await client.get(path_of("u"), headers=[header, header])
    assert_error(response, "INVALID_TOKEN")
    assert response.headers["www-authenticate"] == BEARER


@pytest.mark.parametrize("make", GOOD_TOKENS.values(), ids=GOOD_TOKENS)
async def test_a_good_token_is_accepted(client: httpx.AsyncClient, make: Callable[[], str]) -> None:
    """FR-001, FR-002, FR-003, FR-031, SC-002; again and again."""
    for _ in range(2):
        response = await client.get(path_of("u"), headers={"Authorization": make()})
        assert (response.status_code, response.json()) == (200, [])


async def test_a_token_works_until_it_expires_and_no_longer(client: httpx.AsyncClient) -> None:
    """A token that was accepted once is not remembered beyond its time."""
    exp = int(time.time() + 0.1) - 9  # 0.1 to 1.1 s, as the leeway is ten
    headers = bearer("u", exp=exp)
    assert (await client.get(path_of("u"), headers=headers)).status_code == 200
    deadline = time.monotonic() + 5
    while (response := await client.get(path_of("u"), headers=headers)).status_code == 200:
        assert time.monotonic() < deadline
    assert_error(response, "TOKEN_EXPIRED")


async def test_the_secret_is_taken_as_raw_utf_8(
    make_settings: "Callable[..., todo.Settings]",
) -> None:
    """FR-002."""
    import todo

    key = "gehëim" * 6
    transport = httpx.ASGITransport(todo.create_app(make_settings(better_auth_secret=key)))
    async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as client:
        response = await client.get("/api/nothing", headers=bearer("u", key=key))
        assert_error(response, "NOT_FOUND")
        assert_error(await client.get("/api/nothing", headers=bearer("u")), "INVALID_TOKEN")


# Order of checks

ORDER: dict[str, tuple[str, str, dict[str, Any], str, dict[str, str]]] = {
    # What is wrong, first what must be answered: method, path, request, code, fields.
    "401 before 404 route": ("GET", "/api/none/such", {"headers": {}}, "AUTH", {}),
    "401 before 405": ("POST", "/api/{me}/tasks/1", {"headers": {}}, "AUTH", {}),
    "401 before 422 path": ("GET", "/api/%00/tasks", {"headers": {}}, "AUTH", {}),
    "401 before 413 and 415": (
        "POST",
        "/api/{me}/tasks",
        {"headers": {"Content-Type": "text/plain"}, "content": TOO_LARGE},
        "AUTH",
        {},
    ),
    "401 at /api itself": ("GET", "/api", {"headers": {}}, "AUTH", {}),
    "404 route": ("GET", "/api/{me}/tusks/0", {}, "NOT_FOUND", {}),
    "404 route, trailing slash": ("PATCH", "/api/{me}/tasks/1/complete/", {}, "NOT_FOUND", {}),
    "404 route, too deep": ("GET", "/api/{me}/tasks/1/complete/x", {}, "NOT_FOUND", {}),
    "404 outside /api without a token": ("GET", "/apis", {"headers": {}}, "NOT_FOUND", {}),
    "405 before 422 path": ("DELETE", "/api/%00/tasks", {}, "METHOD_NOT_ALLOWED", {}),
    "405 before 403": ("POST", "/api/{other}/tasks/1", {}, "METHOD_NOT_ALLOWED", {}),
    "405 without a token": ("POST", "/healthz", {"headers": {}}, "METHOD_NOT_ALLOWED", {}),
    "422 path before 403": ("GET", "/api/{other}/tasks/0", {}, "VALIDATION_ERROR", {"id": TASK_ID}),
    "422 path before 415": (
        "PUT",
        "/api/{me}/tasks/0",
        {"content": TOO_LARGE},
        "VALIDATION_ERROR",
        {"id": TASK_ID},
    ),
    "403 before 422 query": ("GET", "/api/{other}/tasks?completed=x", {}, "FORBIDDEN", {}),
    "403 before 415 and 413": (
        "POST",
        "/api/{other}/tasks",
        {"content": TOO_LARGE},
        "FORBIDDEN",
        {},
    ),
    "403 before 422 body": ("PUT", "/api/{other}/tasks/1", {"json": {}}, "FORBIDDEN", {}),
    "422 query": (
        "GET",
        "/api/{me}/tasks?completed=x",
        {},
        "VALIDATION_ERROR",
        {"completed": COMPLETED},
    ),
    "415 before 413": (
        "POST",
        "/api/{me}/tasks",
        {"content": TOO_LARGE},
        "UNSUPPORTED_MEDIA_TYPE",
        {},
    ),
    "413 before 422 body": (
        "POST",
        "/api/{me}/tasks",
        {"content": TOO_LARGE[:-1], "headers": JSON},
        "PAYLOAD_TOO_LARGE",
        {},
    ),
    "413 before 404 task": (
        "PUT",
        "/api/{me}/tasks/9223372036854775807",
        {"content": TOO_LARGE, "headers": JSON},
        "PAYLOAD_TOO_LARGE",
        {},
    ),
    "422 body before 404 task": (
        "PUT",
        "/api/{me}/tasks/9223372036854775807",
        {"json": {}},
        "VALIDATION_ERROR",
        {"title": TITLE_REQUIRED},
    ),
    "422 body before 403 task": (
        "PUT",
        "/api/{me}/tasks/{task}",
        {"content": b"{", "headers": JSON},
        "VALIDATION_ERROR",
        {"body": NOT_JSON},
    ),
}


@pytest.mark.parametrize("row", ORDER.values(), ids=ORDER)
async def test_the_first_check_that_fails_answers(
    account: Account,
    other: Account,
    http: httpx.Client,
    row: tuple[str, str, dict[str, Any], str, dict[str, str]],
) -> None:
    """Design 4, order of checks; by a real server, which raises the 413."""
    method, path, request, code, fields = row
    task = await other.create()
    headers = request.get("headers", {})
    if code == "AUTH":
        code = "AUTHENTICATION_REQUIRED"
    elif "headers" not in request or headers:
        headers = bearer(account.user) | headers
    path = path.format(me=account.user, other=other.user, task=task["id"])
    response = http.request(method, path, **{**request, "headers": headers})
    assert_error(response, code, **fields)


ALLOWED = {
    "/api/{user}/tasks": {"GET", "HEAD", "POST"},
    "/api/{user}/tasks/1": {"GET", "HEAD", "PUT", "DELETE"},
    "/api/{user}/tasks/1/complete": {"PATCH"},
    "/": {"GET", "HEAD"},
    "/healthz": {"GET", "HEAD"},
    "/readyz": {"GET", "HEAD"},
    "/openapi.yaml": {"GET", "HEAD"},
    "/docs": {"GET", "HEAD"},
}


@pytest.mark.parametrize("path", ALLOWED)
async def test_another_method_is_refused_with_a_full_allow(account: Account, path: str) -> None:
    """Design 4, errors: 405."""
    methods = {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "BREW"}
    for method in sorted(methods - ALLOWED[path]):
        response = await account.client.request(
            method, path.format(user=account.user), headers=bearer(account.user)
        )
        assert_error(response, "METHOD_NOT_ALLOWED")
        assert set(response.headers["allow"].split(", ")) == ALLOWED[path]


async def test_no_path_redirects(account: Account) -> None:
    """Starlette's own answer to a trailing slash is a 307 without our shape."""
    for path in (f"{path_of(account.user)}/", "/healthz/", "/docs/", "http://testserver//healthz"):
        response = await account.client.get(path, headers=bearer(account.user))
        assert response.status_code in {404, 422}, path
        assert set(response.json()) >= {"detail", "error_code"}


# A real server process, and one answer of every kind


@pytest.fixture(scope="module")
def server(database_url: str) -> Iterator[Server]:
    """A server with all files, on the test database, with a password in its URL."""
    files = ("todo.py", "schema.sql", "openapi.yaml")
    url = re.sub(r"//([^:@/]*)@", rf"//\1:{PASSWORD}@", database_url)
    with servers(url) as serve:
        yield serve(files=files)


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, verify=False) as client:
        yield client


def log_so_far(http: httpx.Client, server: Server) -> int:
    """Number of lines of the log, once all requests so far have theirs."""
    request_id = new_user()
    http.get("/healthz", headers={"X-Request-ID": request_id})
    server.log_lines(f" request={request_id} ")
    return len(server.stderr().splitlines())


def preflight(origin: str, method: str = "PUT", headers: str = "content-type") -> dict[str, str]:
    return {
        "Origin": origin,
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": headers,
    }


# (status, method, path, request); {user} has the token and no tasks with these ids.
Wanted = tuple[int, str, str, dict[str, Any]]
OVER_THERE = "/api/{user}/tasks/9223372036854775807"
ANSWERS: dict[str, Wanted] = {
    "200": (200, "GET", "/api/{user}/tasks", {}),
    "200 HEAD": (200, "HEAD", "/api/{user}/tasks", {}),
    "201": (201, "POST", "/api/{user}/tasks", {"json": {"title": "x"}}),
    "204": (204, "DELETE", "{location}", {}),
    "200 root": (200, "GET", "/", {}),
    "200 healthz": (200, "GET", "/healthz", {}),
    "200 readyz": (200, "GET", "/readyz", {}),
    "200 openapi": (200, "GET", "/openapi.yaml", {}),
    "200 docs": (200, "GET", "/docs", {}),
    "204 preflight": (204, "OPTIONS", "/api/{user}/tasks", {"headers": preflight(ORIGIN)}),
    "204 preflight, which a browser refuses": (
        204,
        "OPTIONS",
        "/api/{user}/tasks",
        {"headers": preflight(ORIGIN, "BREW")},
    ),
    "401": (401, "GET", "/api/{user}/tasks", {"headers": {"Authorization": "Bearer a.b.c"}}),
    "403": (403, "GET", "/api/nobody/tasks", {}),
    "404 route": (404, "GET", "/nowhere", {}),
    "404 task": (404, "GET", OVER_THERE, {}),
    "405": (405, "PUT", "/api/{user}/tasks", {}),
    "413": (413, "POST", "/api/{user}/tasks", {"content": TOO_LARGE, "headers": JSON}),
    "415": (415, "POST", "/api/{user}/tasks", {"content": b"x"}),
    "422": (422, "POST", "/api/{user}/tasks", {"json": {}}),
}
answers = pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)


def ask(http: httpx.Client, user: str, answer: Wanted, **headers: str) -> httpx.Response:
    """The answer of that kind, checked for its status."""
    status, method, path, request = answer
    if "{location}" in path:
        created = http.post(path_of(user), json={"title": "x"}, headers=bearer(user))
        path = created.headers["location"]
    all_headers = {**bearer(user), **request.get("headers", {}), **headers}
    response = http.request(method, path.format(user=user), **{**request, "headers": all_headers})
    assert response.status_code == status, response.text
    return response


@answers
def test_every_answer_has_the_common_headers(http: httpx.Client, user: str, answer: Wanted) -> None:
    """Design 4, headers; SC-007."""
    response = ask(http, user, answer)
    headers = response.headers
    assert headers["cache-control"] == "no-store"
    assert headers["x-content-type-options"] == "nosniff"
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,128}", headers["x-request-id"])
    assert "origin" in [name.strip().lower() for name in headers["vary"].split(",")]
    assert "server" not in headers
    names = [name for name, _ in headers.raw]
    assert len({name.lower() for name in names}) == len(names), names


@answers
def test_every_error_is_json_in_the_one_shape(
    http: httpx.Client, user: str, answer: Wanted
) -> None:
    """FR-025, FR-026, FR-029: and nothing but errors has that shape."""
    response = ask(http, user, answer)
    if response.status_code < 400:
        assert b"error_code" not in response.content or answer[2] == "/openapi.yaml"
        return
    body = response.json()
    shape = {"detail", "error_code"} | ({"field_errors"} if response.status_code == 422 else set())
    assert set(body) == shape
    assert body["detail"][0].isupper()
    assert re.fullmatch(r"[A-Z]+(_[A-Z]+)*", body["error_code"])
    assert response.headers["content-type"] == "application/json"


@answers
def test_every_answer_repeats_a_good_request_id(
    http: httpx.Client, server: Server, user: str, answer: Wanted
) -> None:
    """Design 4, headers; and the log line has it."""
    request_id = f"{user}.A_b-9"
    response = ask(http, user, answer, **{"X-Request-ID": request_id})
    assert response.headers["x-request-id"] == request_id
    [line] = server.log_lines(f"request={request_id} ")
    assert f" {answer[1]} " in line
    assert f" {answer[0]} " in line


@pytest.mark.parametrize(
    "request_id",
    ["", "x" * 129, "a b", "a/b", "é".encode(), "a\tb", "<script>", "a,b", "a;b", "{}"],
    ids=ascii,
)
def test_another_request_id_is_replaced(http: httpx.Client, request_id: str | bytes) -> None:
    response = http.get("/healthz", headers={"X-Request-ID": request_id})
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,128}", response.headers["x-request-id"])
    assert response.headers["x-request-id"] != request_id


def test_new_request_ids_differ(http: httpx.Client) -> None:
    assert len({http.get("/healthz").headers["x-request-id"] for _ in range(50)}) == 50
    longest = "x" * 128
    response = http.get("/healthz", headers={"X-Request-ID": longest})
    assert response.headers["x-request-id"] == longest


@pytest.mark.parametrize(
    "path",
    ["/", "/healthz", "/readyz", "/openapi.yaml", "/docs", "/api/{user}/tasks", "{location}"],
)
def test_head_answers_as_get_without_the_body(http: httpx.Client, user: str, path: str) -> None:
    """HEAD works wherever GET does."""
    created = http.post(path_of(user), json={"title": "x"}, headers=bearer(user))
    path = path.format(user=user, location=created.headers["location"])
    headers = {**bearer(user), "X-Request-ID": "same"}
    get, head = http.get(path, headers=headers), http.head(path, headers=headers)
    assert (get.status_code, head.status_code, head.content) == (200, 200, b"")
    get.headers.pop("date"), head.headers.pop("date")
    assert head.headers == get.headers
    assert int(get.headers["content-length"]) == len(get.content)


def test_health_and_readiness_are_public(http: httpx.Client) -> None:
    for path, status in (("/healthz", "ok"), ("/readyz", "ready")):
        response = http.get(path)
        assert (response.status_code, response.json()) == (200, {"status": status})
        assert response.headers["content-type"] == "application/json"


def test_the_contract_and_its_page_are_served_to_everybody(http: httpx.Client) -> None:
    """Technical outcome: all endpoints documented."""
    where = {"docs": "/docs", "openapi": "/openapi.yaml"}
    assert http.get("/").json() == {"name": "Todo API", **where}
    contract, docs = http.get(where["openapi"]), http.get(where["docs"])
    assert contract.headers["content-type"].partition(";")[0] == "application/yaml"
    assert contract.text.startswith("openapi: 3.1")
    assert docs.headers["content-type"].partition(";")[0] == "text/html"
    assert "content-security-policy" in docs.headers


# CORS


@answers
def test_every_answer_is_readable_by_an_allowed_origin(
    http: httpx.Client, user: str, answer: Wanted
) -> None:
    """FR-030, SC-006: errors too, or a page sees a CORS failure in their place."""
    headers = ask(http, user, answer, Origin=ORIGIN).headers
    assert headers["access-control-allow-origin"] == ORIGIN
    assert headers["access-control-allow-credentials"] == "true"
    exposed = {"Allow", "Location", "Retry-After", "WWW-Authenticate", "X-Request-ID"}
    assert set(headers["access-control-expose-headers"].split(", ")) == exposed


@pytest.mark.parametrize(
    "origin",
    [
        "http://localhost:3001",
        "https://localhost:3000",
        "http://localhost",
        "http://LOCALHOST:3000",
        "http://localhost:3000/",
        "http://localhost:3000.evil.example",
        "http://evil.example?http://localhost:3000",
        "null",
        "*",
        "",
    ],
)
def test_another_origin_may_read_nothing(http: httpx.Client, user: str, origin: str) -> None:
    """FR-030: exact origins. The answer varies by origin all the same."""
    for answer in (ANSWERS["200"], ANSWERS["401"]):
        headers = ask(http, user, answer, Origin=origin).headers
        assert not [name for name in headers if name.startswith("access-control-")]
        assert "origin" in headers["vary"].lower()
    response = http.options(path_of(user), headers=preflight(origin))
    assert (response.status_code, response.content) == (204, b"")
    assert not [name for name in response.headers if name.startswith("access-control-")]


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"])
def test_a_preflight_needs_no_token(http: httpx.Client, method: str) -> None:
    """FR-033."""
    asked = preflight(ORIGIN, method, "authorization, content-type,X-Request-ID")
    for path in (path_of("u"), path_of("u", 1), path_of("u", "1/complete"), "/api/nowhere"):
        response = http.options(path, headers=asked)
        assert (response.status_code, response.content) == (204, b"")
        headers = response.headers
        assert headers["access-control-allow-origin"] == ORIGIN
        assert headers["access-control-allow-credentials"] == "true"
        assert set(headers["access-control-allow-methods"].split(", ")) == {
            *("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
        }
        allowed = {name.lower() for name in headers["access-control-allow-headers"].split(", ")}
        assert allowed >= {"authorization", "content-type", "x-request-id"}
        assert headers["access-control-max-age"] == "600"


def test_a_preflight_may_ask_for_no_headers(http: httpx.Client) -> None:
    asked = {"Origin": ORIGIN, "Access-Control-Request-Method": "GET"}
    assert http.options(path_of("u"), headers=asked).status_code == 204


LONG = "x-" + "y" * 5000
Missed = tuple[dict[str, str | bytes], list[str]]
MISSED: dict[str, Missed] = {
    "method": (preflight(ORIGIN, "BREW"), ["the method BREW"]),
    "method in lower case": (preflight(ORIGIN, "patch"), ["the method patch", "PATCH"]),
    "header": (preflight(ORIGIN, "PUT", "authorization,x-evil"), ["the header x-evil: "]),
    "headers": (
        preflight(ORIGIN, "PUT", "X-Evil, content-type , X-More"),
        ["the header x-evil, x-more: "],
    ),
    "origin": (
        preflight("http://localhost:5173"),
        ["the origin http://localhost:5173", "ALLOWED_ORIGINS"],
    ),
    "null": (preflight("null"), ["the origin null", "ALLOWED_ORIGINS"]),
    "a long origin": (preflight(f"http://{LONG}"), ["the origin http://x-yyy"]),
    "a long method": (preflight(ORIGIN, LONG), ["the method x-yyy"]),
    "a long header": (preflight(ORIGIN, "GET", LONG), ["the header x-yyy"]),
    "a hostile origin": (
        {**preflight(ORIGIN), "Origin": b"http://a\x85\xe2\x80\xa8\tforged"},
        ["the origin http://a\\x85"],
    ),
    "hostile headers": (
        {**preflight(ORIGIN), "Access-Control-Request-Headers": b"a\x85\xe2\x80\xa8\tforged"},
        ["the header a\\x85"],
    ),
}


@pytest.mark.parametrize(("asked", "words"), MISSED.values(), ids=MISSED)
def test_the_log_names_what_a_browser_will_miss_in_a_preflight(
    http: httpx.Client, server: Server, asked: dict[str, str | bytes], words: list[str]
) -> None:
    """Design 4, CORS: one WARNING, cut to 200 characters. The answer is a 204 all the same."""
    before = log_so_far(http, server)
    response = http.options(path_of("u"), headers=asked)
    assert (response.status_code, response.content) == (204, b"")
    server.log_lines(f" request={response.headers['x-request-id']} ")
    warning, line = server.stderr().splitlines()[before:]
    assert " INFO OPTIONS /api/u/tasks 204 " in line
    what = re.fullmatch(rf"{STAMP} a browser will refuse (.*)", warning)
    assert what, warning
    assert what[1] == "WARNING"
    assert len(what[2]) <= 200
    assert warning.isprintable()
    assert [word for word in words if word not in what[2]] == []


GRANTED = {
    **{method: preflight(ORIGIN, method) for method in ("GET", "HEAD", "POST", "PUT", "PATCH")},
    "what Fetch never asks for": preflight(ORIGIN, "GET", "accept, accept-language"),
    "tracing": preflight(ORIGIN, "GET", "baggage,sentry-trace,traceparent,tracestate"),
    "an empty list": preflight(ORIGIN, "GET", ""),
    "empty items": preflight(ORIGIN, "GET", ",authorization,,"),
}


@pytest.mark.parametrize("asked", GRANTED.values(), ids=GRANTED)
def test_a_preflight_that_misses_nothing_leaves_no_warning(
    http: httpx.Client, server: Server, asked: dict[str, str]
) -> None:
    before = log_so_far(http, server)
    response = http.options(path_of("u"), headers=asked)
    server.log_lines(f" request={response.headers['x-request-id']} ")
    [line] = server.stderr().splitlines()[before:]
    assert " INFO OPTIONS /api/u/tasks 204 " in line


def test_options_without_a_preflight_is_a_method_like_any_other(http: httpx.Client) -> None:
    for headers in ({}, {"Origin": ORIGIN}, {"Access-Control-Request-Method": "GET"}):
        assert_error(http.options("/healthz", headers=headers), "METHOD_NOT_ALLOWED")
        assert_error(http.options(path_of("u"), headers=headers), "AUTHENTICATION_REQUIRED")
        response = http.options(path_of("u"), headers={**headers, **bearer("u")})
        assert_error(response, "METHOD_NOT_ALLOWED")


async def test_origins_are_those_of_the_setting(
    make_settings: "Callable[..., todo.Settings]",
) -> None:
    """FR-030: ALLOWED_ORIGINS in place of the default, white space around commas."""
    import todo

    app = todo.create_app(make_settings(allowed_origins="https://a.example , http://b.example:81"))
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as client:
        for origin, allowed in (
            ("https://a.example", "https://a.example"),
            ("http://b.example:81", "http://b.example:81"),
            ("http://b.example", None),
            ("http://localhost:3000", None),
        ):
            response = await client.get("/healthz", headers={"Origin": origin})
            assert response.headers.get("access-control-allow-origin") == allowed


async def test_both_names_of_the_local_frontend_are_allowed_by_default(
    client: httpx.AsyncClient,
) -> None:
    for origin in ("http://localhost:3000", "http://127.0.0.1:3000"):
        response = await client.get("/healthz", headers={"Origin": origin})
        assert response.headers["access-control-allow-origin"] == origin


# What is not even HTTP


HOST = b"Host: a\r\n"
NO_HTTP = {
    "no-http": (b"HELLO\r\n\r\n", "BAD_REQUEST", "Invalid method encountered"),
    "bad-header": (
        b"GET /healthz HTTP/1.1\r\nno colon\r\n\r\n",
        "BAD_REQUEST",
        "Invalid header token",
    ),
    "bad-length": (
        b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: x\r\n\r\n",
        "BAD_REQUEST",
        "Invalid character in Content-Length",
    ),
    "no-host": (b"GET / HTTP/1.1\r\n\r\n", "BAD_REQUEST", "0 Host headers"),
    "two-hosts": (b"GET / HTTP/1.1\r\n" + 2 * HOST + b"\r\n", "BAD_REQUEST", "2 Host headers"),
    "connect": (
        b"CONNECT a:1 HTTP/1.1\r\n" + HOST + b"\r\n",
        "BAD_REQUEST",
        "CONNECT, but this is no proxy",
    ),
    "head-over-64-kib": (
        b"GET / HTTP/1.1\r\n" + HOST + b"X: " + b"x" * 70_000 + b"\r\n\r\n",
        "HEADERS_TOO_LARGE",
        "its end has not come",
    ),
}


@pytest.mark.parametrize(("request_", "code", "reason"), NO_HTTP.values(), ids=NO_HTTP)
def test_what_is_no_http_is_refused_in_the_one_shape_and_logged_with_its_reason(
    server: Server, request_: bytes, code: str, reason: str
) -> None:
    """FR-026, also below the app."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(request_)
        answer = b""
        try:
            while data := connection.recv(65536):
                answer += data
        except ConnectionResetError:
            pass
    head, _, body = answer.partition(b"\r\n\r\n")
    status, detail = ERRORS[code]
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert json.loads(body) == {"detail": detail, "error_code": code}
    headers = head.lower().decode().split("\r\n")
    assert {"content-type: application/json", "cache-control: no-store"} <= set(headers)
    assert not [line for line in headers if line.startswith("server:")]
    [request_id] = [line.split(": ")[1] for line in headers if line.startswith("x-request-id:")]
    [line] = server.log_lines(f" request={request_id} ")
    assert f" WARNING - - {status} " in line
    assert line.endswith(f" error={code}: {reason}")


# Failures for real: a table that goes away, a lock, a database that stops

FAILURES = ("INTERNAL_ERROR", "DATABASE_TIMEOUT", "DATABASE_UNAVAILABLE", "NOT_READY")
failures = pytest.mark.parametrize("code", FAILURES)


@pytest.fixture(scope="module")
def failures_answered() -> Iterator[tuple[dict[str, httpx.Response], str]]:
    """One answer of each failure of the database, and what the log says by then."""
    user, answers = new_user(), {}

    def fail(code: str, path: str) -> None:
        headers = {**bearer(user), "Origin": ORIGIN, "X-Request-ID": f"id-{code}"}
        answers[code] = get(server.url + path, headers=headers)

    with OwnPostgres() as postgres:
        url = postgres.create_database(schema=True)
        with servers(url.replace("postgres@", f"postgres:{PASSWORD}@")) as serve:
            server = serve({"DB_TIMEOUT": "0.5"})
            postgres.execute("alter table tasks rename to gone", database_url=url)
            fail("INTERNAL_ERROR", path_of(user))
            postgres.execute("alter table gone rename to tasks", database_url=url)
            with psycopg.connect(url) as connection:
                connection.execute(LOCKED_TABLE)
                fail("DATABASE_TIMEOUT", path_of(user))
            postgres.stop("immediate")
            fail("DATABASE_UNAVAILABLE", path_of(user))
            fail("NOT_READY", "/readyz")
            assert get(f"{server.url}/healthz").status_code == 200
            postgres.start()
            eventually(lambda: get(f"{server.url}/readyz").status_code == 200, within=5.0)
            assert get(server.url + path_of(user), headers=bearer(user)).json() == []
            yield answers, server.stderr()


@pytest.mark.slow
@failures
def test_a_failure_is_answered_in_general_words(
    failures_answered: tuple[dict[str, httpx.Response], str], code: str
) -> None:
    """FR-027, FR-029; Edge cases: Database Connection Failure, Database Query Timeout."""
    answer = failures_answered[0][code]
    assert_error(answer, code)
    assert answer.elapsed.total_seconds() < 0.5 + 1


@pytest.mark.slow
@failures
def test_a_failure_has_all_headers(
    failures_answered: tuple[dict[str, httpx.Response], str], code: str
) -> None:
    """Design 4, CORS: 500 included."""
    headers = failures_answered[0][code].headers
    assert headers["access-control-allow-origin"] == ORIGIN
    assert headers["access-control-allow-credentials"] == "true"
    assert headers["cache-control"] == "no-store"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-request-id"] == f"id-{code}"
    assert "origin" in headers["vary"].lower()
    assert "server" not in headers


@pytest.mark.slow
@failures
def test_a_failure_is_logged_with_its_request_id(
    failures_answered: tuple[dict[str, httpx.Response], str], code: str
) -> None:
    """FR-028, design 4, logs."""
    [line] = [line for line in failures_answered[1].split("\n") if f"request=id-{code}" in line]
    status = ERRORS[code][0]
    assert re.search(rf" ERROR GET \S+ {status} ", line)
    assert code in line or code == "NOT_READY"


@pytest.mark.slow
def test_the_whole_exception_of_an_unexpected_failure_is_logged(
    failures_answered: tuple[dict[str, httpx.Response], str],
) -> None:
    """FR-028."""
    log = failures_answered[1].partition("request=id-INTERNAL_ERROR")[2]
    assert "Traceback (most recent call last)" in log
    assert 'relation "tasks" does not exist' in log
    assert PASSWORD not in failures_answered[1]
    assert SECRET not in failures_answered[1]


UNUSABLE = {
    "no table": ("alter table tasks rename to gone", 'relation "tasks" does not exist'),
    "no column": ("alter table tasks drop column title", "column tasks.title does not exist"),
    "no privilege": ("revoke all on tasks from {role}", "permission denied for table tasks"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("change", "reason"), UNUSABLE.values(), ids=UNUSABLE)
def test_readiness_tells_a_table_that_cannot_be_used_from_a_database_that_is_away(
    postgres: Postgres, fresh_database: str, serve: Serve, user: str, change: str, reason: str
) -> None:
    """The reason is in the log alone."""
    role = f"role_{user.replace('-', '_')}"
    postgres.execute(
        f"create role {role} login; grant all on tasks to {role}", database_url=fresh_database
    )
    try:
        server = serve(database_url=re.sub("//[^@]*@", f"//{role}@", fresh_database))
        postgres.execute(change.format(role=role), database_url=fresh_database)
        response = get(f"{server.url}/readyz", headers={"X-Request-ID": "unusable"})
        detail = "The database answers, but its table cannot be used. Please try again later."
        assert (response.status_code, response.json()) == (
            503,
            {"detail": detail, "error_code": "NOT_READY"},
        )
        [line] = server.log_lines(" request=unusable ")
        assert line.endswith(f" error=NOT_READY: {reason}")
        assert " ERROR GET /readyz 503 " in line
        server.stop()
    finally:
        postgres.execute(f"drop owned by {role}; drop role {role}", database_url=fresh_database)


# Logs

STAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (DEBUG|INFO|WARNING|ERROR)"
REQUEST_LINE = re.compile(
    rf"{STAMP} [A-Z]+ \S+ \d{{3}} \d+\.\dms user=\S* request=[\w.-]+ client=127\.0\.0\.1( .+)?"
)


def test_a_request_is_one_line(http: httpx.Client, server: Server, user: str) -> None:
    """Design 4, logs: time, level, method, path, status, milliseconds, user, request id."""
    response = http.get(path_of(user), headers=bearer(user))
    [line] = server.log_lines(response.headers["x-request-id"])
    assert REQUEST_LINE.fullmatch(line)
    assert f" INFO GET /api/{user}/tasks 200 " in line
    assert f" user={user} " in line


REFUSED = {
    "no header": dict,
    "no JWT": lambda: {"Authorization": "Bearer nonsense"},
    "another secret": lambda: bearer("u", key="x" * 40),
    "expired": lambda: bearer("u", exp=1),
    "no user": lambda: bearer(None),
}


def test_the_reason_of_every_refused_token_is_logged(http: httpx.Client, server: Server) -> None:
    """Design 4, logs: at WARNING, with the client's address, each with words of its own."""
    reasons = set()
    answers = {name: http.get(path_of("u"), headers=make()) for name, make in REFUSED.items()}
    for name, response in answers.items():
        [line] = server.log_lines(response.headers["x-request-id"])
        assert REQUEST_LINE.fullmatch(line), line
        assert " WARNING GET /api/u/tasks 401 " in line
        assert " client=127.0.0.1 " in line
        reason = line.partition(" client=127.0.0.1 ")[2]
        assert reason, name
        reasons.add(reason)
    assert len(reasons) == len(REFUSED)


SECRET_TITLE = "private-title"
# Method, path below the tasks, request; what the line of the log ends with.
CLIENT_ERRORS: dict[str, tuple[str, object, dict[str, Any], str]] = {
    "401": (
        "GET",
        "",
        {"headers": {"Authorization": ""}},
        "AUTHENTICATION_REQUIRED: no bearer token",
    ),
    "403": ("GET", "", {"of": "somebody-else"}, "FORBIDDEN"),
    "404 route": ("GET", "1/2/3", {}, "NOT_FOUND"),
    "404 task": ("DELETE", 2**62, {}, "TASK_NOT_FOUND"),
    "405": ("PATCH", "", {}, "METHOD_NOT_ALLOWED"),
    "415": ("POST", "", {"content": SECRET_TITLE}, "UNSUPPORTED_MEDIA_TYPE"),
    "422 title": ("POST", "", {"json": {"title": [SECRET_TITLE]}}, "VALIDATION_ERROR: title"),
    "422 all": (
        "PUT",
        1,
        {"json": {"title": " ", "description": 1, "completed": SECRET_TITLE}},
        "VALIDATION_ERROR: title, description, completed",
    ),
    "422 body": (
        "POST",
        "",
        {"content": SECRET_TITLE, "headers": {"Content-Type": "application/json"}},
        "VALIDATION_ERROR: body",
    ),
    "422 id": ("GET", "x", {}, "VALIDATION_ERROR: id"),
    "422 user": ("GET", 1, {"of": "\0"}, "VALIDATION_ERROR: user_id"),
    "422 path": ("GET", "x", {"of": "\0"}, "VALIDATION_ERROR: user_id, id"),
    "422 query": (
        "GET",
        "",
        {"params": {"completed": SECRET_TITLE}},
        "VALIDATION_ERROR: completed",
    ),
}


@pytest.mark.parametrize(
    ("method", "rest", "request_", "end"), CLIENT_ERRORS.values(), ids=CLIENT_ERRORS
)
def test_the_line_of_a_clients_error_ends_with_its_code_and_fields(
    http: httpx.Client,
    server: Server,
    user: str,
    method: str,
    rest: object,
    request_: dict[str, Any],
    end: str,
) -> None:
    """Design 4, logs: the answer's X-Request-ID leads to it. Never a value of the body or query."""
    request_ = {**request_, "headers": {**bearer(user), **request_.get("headers", {})}}
    path = path_of(request_.pop("of", user), rest)
    response = http.request(method, path, **request_)
    assert 400 <= response.status_code < 500
    [line] = server.log_lines(f" request={response.headers['x-request-id']} ")
    assert REQUEST_LINE.fullmatch(line)
    assert line.endswith(f" client=127.0.0.1 error={end}")
    level = "WARNING" if response.status_code == 401 else "INFO"
    assert f" {level} {method} " in line
    assert SECRET_TITLE not in line


def test_the_line_of_a_success_ends_with_the_client(
    http: httpx.Client, server: Server, user: str
) -> None:
    response = http.get(path_of(user), headers=bearer(user))
    [line] = server.log_lines(f" request={response.headers['x-request-id']} ")
    assert line.endswith(" client=127.0.0.1")


FORGED = "x\r\n2026-01-01T00:00:00.000Z INFO forged\x1b[31m\u2028\x85\v\f\x1c"
HOSTILE: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "path": (
        "/nowhere/%0D%0A2026-01-01T00:00:00.000Z%20INFO%20forged%1B%E2%80%A8%C2%85%00%FF",
        dict,
    ),
    "user id in the path": ("/api/%0Aforged%0D%E2%80%A9/tasks", lambda: bearer("u")),
    "user id in the token": (path_of("u"), lambda: bearer(FORGED)),
    "an over-long user id": (path_of("u"), lambda: bearer("x" * 9000)),
    "user id with spaces": (
        path_of("u request=0 client=0"),
        lambda: bearer("u request=0 client=0"),
    ),
    "claims of a bad token": (path_of("u"), lambda: bearer(FORGED, iss=FORGED, exp=FORGED)),
    "audience": (path_of("u"), lambda: bearer("u", aud=FORGED)),
    "kid": (path_of("u"), lambda: {"Authorization": f"Bearer {signed({'kid': FORGED})}x"}),
    "bytes of a bad token": (
        path_of("u"),
        lambda: {"Authorization": b"Bearer \xe2\x80\xa8.\x85.x"},
    ),
    "user agent": ("/healthz", lambda: {"User-Agent": b"a\x85\xe2\x80\xa8\tforged"}),
    "request id": ("/healthz", lambda: {"X-Request-ID": b"a\x85\xe2\x80\xa8\tforged"}),
    "origin": ("/healthz", lambda: {"Origin": b"http://a\x85\xe2\x80\xa8forged"}),
    "query": ("/healthz?a=%0Aforged", dict),
    "format characters": ("/%25s%25(x)d%7B0%7D", dict),
}


@pytest.mark.parametrize(("path", "make"), HOSTILE.values(), ids=HOSTILE)
def test_a_line_never_breaks_in_two(
    http: httpx.Client, server: Server, path: str, make: Callable[[], dict[str, Any]]
) -> None:
    """Design 4, logs; counted with every line break that Unicode knows."""
    before = log_so_far(http, server)
    response = http.get(path, headers=make())
    assert response.status_code in {200, 401, 403, 404, 422}
    server.log_lines(response.headers["x-request-id"])
    [line] = server.stderr().splitlines()[before:]
    assert REQUEST_LINE.fullmatch(line), line
    assert line.isprintable()
    assert line.count(" request=") == line.count(" client=") == 1


FORWARDED: dict[str, tuple[str | bytes, str]] = {
    "an address": ("203.0.113.9", "203.0.113.9"),
    "an address and a port": ("203.0.113.9:4711", "203.0.113.9"),
    "an address of IPv6": ("2001:db8::9", "2001:db8::9"),
    "an address of IPv6 and a port": ("[2001:db8::9]:4711", "2001:db8::9"),
    "a mapped address": ("::ffff:203.0.113.9", "203.0.113.9"),
    "a mapped address in hexadecimal, and a port": ("[::FFFF:cb00:7109]:4711", "203.0.113.9"),
    "the nearest of several": ("unknown, 198.51.100.7, 203.0.113.9", "203.0.113.9"),
    "nobody": ("", "127.0.0.1"),
    "no address": ("unknown", "-"),
    "almost an address": ("203.0.113.9.9", "-"),
    "fields": ("9.9.9.9 user=admin request=forged", "-"),
    "fields behind a tab": ("9.9.9.9\tuser=admin request=forged", "-"),
    "fields behind a line end": (b"9.9.9.9\x85user=admin request=forged", "-"),
    "fields in the zone of an address": ("fe80::9%x user=admin request=forged", "fe80::9"),
    "fields behind a bracket": ("[2001:db8::9] user=admin request=forged", "-"),
}


@pytest.mark.parametrize(("said", "logged"), FORWARDED.values(), ids=FORWARDED)
def test_the_client_in_a_line_is_an_address_or_nobody(
    http: httpx.Client, server: Server, said: str | bytes, logged: str
) -> None:
    """Design 4, logs: whatever a proxy on this machine passes on."""
    headers = {"X-Forwarded-For": said}
    for response in [http.get(path, headers=headers) for path in ("/healthz", path_of("u"))]:
        [line] = server.log_lines(f"request={response.headers['x-request-id']} ")
        assert re.search(r" client=(.*?)( error=|$)", line)[1] == logged
        assert line.count(" user=") == line.count(" request=") == line.count(" client=") == 1


@pytest.mark.slow
def test_a_callers_text_in_an_exception_forges_no_line(
    postgres: Postgres, fresh_database: str, serve: Serve, user: str
) -> None:
    """Design 4, logs: a database that quotes the title in its error; tracebacks stay indented."""
    postgres.execute(
        "create function quote_title() returns trigger language plpgsql as"
        " $$ begin raise exception '%', new.title; end $$;"
        "create trigger quote before insert on tasks for each row execute function quote_title()",
        database_url=fresh_database,
    )
    server = serve(database_url=fresh_database)
    headers = {**bearer(user), "X-Request-ID": user}
    response = httpx.post(server.url + path_of(user), json={"title": FORGED}, headers=headers)
    assert_error(response, "INTERNAL_ERROR")
    server.log_lines(f"request={user} ")
    log = server.stderr()
    assert "INFO forged" in log, "the exception is not there as a whole"
    assert [line for line in log.splitlines() if not re.match(rf"{STAMP} \S|    ", line)] == []
    assert [line for line in log.splitlines() if line.startswith("2026-01-01")] == []


def test_no_secret_is_ever_logged(http: httpx.Client, server: Server, user: str) -> None:
    """Neither whole tokens nor their signatures, good or bad, nor secret or password."""
    tokens = [token(user), token(user, exp=1), token(user, key="x" * 40), "opaque-session-token"]
    for each in tokens:
        http.get(path_of(user), headers={"Authorization": f"Bearer {each}"})
        http.get(path_of(user), headers={"Authorization": f"Basic {each}"})
        http.get(f"{path_of(user)}?access_token={each}", headers={"Cookie": f"session={each}"})
    http.get("/healthz", headers={"X-Request-ID": f"{user}-last"})
    server.log_lines(f"{user}-last")
    log = server.stderr()
    for secret in (SECRET, PASSWORD, *tokens, *(each.rpartition(".")[2] for each in tokens)):
        assert secret not in log


def test_all_lines_of_the_log_have_one_form(http: httpx.Client, server: Server) -> None:
    """Start-up included: which variables were loaded, by name, at INFO."""
    lines = server.stderr().splitlines()
    assert [line for line in lines if not re.match(rf"{STAMP} ", line)] == []
    [loaded] = [line for line in lines if "NEON_DB_URL" in line]
    assert " INFO " in loaded
    assert all(name in loaded for name in ("BETTER_AUTH_SECRET", "BETTER_AUTH_URL", "PORT"))


@pytest.mark.slow
def test_a_higher_log_level_leaves_requests_out(serve: Serve) -> None:
    """LOG_LEVEL."""
    server = serve({"LOG_LEVEL": "WARNING"}, wait=False)
    quiet = {"X-Request-ID": "quiet"}
    eventually(lambda: listens(f"{server.url}/healthz", **quiet), within=20.0)
    get(server.url + path_of("u"), headers={"X-Request-ID": "loud"})
    [line] = server.log_lines("request=loud ")
    assert " WARNING " in line
    assert "quiet" not in server.stderr()
    assert " INFO " not in server.stderr()


# Completeness


def test_the_error_table_is_the_specifications() -> None:
    """FR-026, FR-029: codes, statuses and sentences as decided, and no others."""
    import todo

    assert {code: tuple(row) for code, row in todo.ERRORS.items()} == dict(ERRORS)


@pytest.mark.parametrize("path", ["/healthz%0A", "/docs%0A", "/api/{user}/tasks%0A"])
async def test_a_line_end_is_part_of_the_path(account: Account, path: str) -> None:
    """Starlette's own patterns would let it pass."""
    response = await account.client.get(
        path.format(user=account.user), headers=bearer(account.user)
    )
    assert_error(response, "NOT_FOUND")


@pytest.mark.slow
async def test_a_time_out_of_the_servers_own_is_a_time_out(
    postgres: Postgres, fresh_database: str, serve: Serve, user: str
) -> None:
    """Edge case: Database Query Timeout; Neon's roles have a statement_timeout."""
    postgres.set_default(fresh_database, "statement_timeout", "100")
    server = serve(database_url=fresh_database)
    with psycopg.connect(fresh_database) as other:
        other.execute("lock table tasks")
        response = get(server.url + path_of(user), headers=bearer(user))
    assert_error(response, "DATABASE_TIMEOUT")
    assert get(server.url + path_of(user), headers=bearer(user)).json() == []


async def test_no_answer_takes_a_thread(account: Account) -> None:
    """Starlette runs in one of 40 what is not async, and all others wait for those."""
    for path in ("/nowhere", "/healthz", "/docs", path_of(account.user), "/api/nowhere"):
        await account.client.get(path, headers=bearer(account.user))
    assert [thread.name for thread in threading.enumerate() if "AnyIO" in thread.name] == []
