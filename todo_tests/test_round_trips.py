"""One round trip a request: counted by PostgreSQL's own log, and on the wire."""

import ast
import re
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest

from todo_tests.support import (
    ROOT,
    Account,
    OwnPostgres,
    Relay,
    assert_error,
    bearer,
    client_of,
    new_user,
    path_of,
    servers,
)

JSON = {"Content-Type": "application/json"}
TOO_LARGE = b"x" * 70_000
NOWHERE = 9223372036854775807

# (statements, status, method, path, request); {mine} and {theirs} are fresh tasks.
Case = tuple[int, int, str, str, dict[str, Any]]
CASES: dict[str, Case] = {
    "list": (1, 200, "GET", "/api/{me}/tasks", {}),
    "list by status": (1, 200, "GET", "/api/{me}/tasks?completed=true", {}),
    "create": (1, 201, "POST", "/api/{me}/tasks", {"json": {"title": "x"}}),
    "read": (1, 200, "GET", "/api/{me}/tasks/{mine}", {}),
    "read, HEAD": (1, 200, "HEAD", "/api/{me}/tasks/{mine}", {}),
    "update": (1, 200, "PUT", "/api/{me}/tasks/{mine}", {"json": {"title": "y"}}),
    "update of all": (
        1,
        200,
        "PUT",
        "/api/{me}/tasks/{mine}",
        {"json": {"title": "y", "description": None, "completed": True}},
    ),
    "toggle": (1, 200, "PATCH", "/api/{me}/tasks/{mine}/complete", {}),
    "delete": (1, 204, "DELETE", "/api/{me}/tasks/{mine}", {}),
    "read of another's": (1, 403, "GET", "/api/{me}/tasks/{theirs}", {}),
    "update of another's": (1, 403, "PUT", "/api/{me}/tasks/{theirs}", {"json": {"title": "y"}}),
    "toggle of another's": (1, 403, "PATCH", "/api/{me}/tasks/{theirs}/complete", {}),
    "delete of another's": (1, 403, "DELETE", "/api/{me}/tasks/{theirs}", {}),
    "read of none": (1, 404, "GET", f"/api/{{me}}/tasks/{NOWHERE}", {}),
    "update of none": (1, 404, "PUT", f"/api/{{me}}/tasks/{NOWHERE}", {"json": {"title": "y"}}),
    "toggle of none": (1, 404, "PATCH", f"/api/{{me}}/tasks/{NOWHERE}/complete", {}),
    "delete of none": (1, 404, "DELETE", f"/api/{{me}}/tasks/{NOWHERE}", {}),
    "readiness": (1, 200, "GET", "/readyz", {}),
    "health": (0, 200, "GET", "/healthz", {}),
    "401 without a token": (0, 401, "GET", "/api/{me}/tasks", {"headers": {"Authorization": ""}}),
    "401 with a bad one": (0, 401, "GET", "/api/{me}/tasks", {"headers": bearer("u", exp=1)}),
    "403 by path": (0, 403, "DELETE", "/api/{other}/tasks/{theirs}", {}),
    "404 route": (0, 404, "GET", "/api/{me}/tusks", {}),
    "405": (0, 405, "DELETE", "/api/{me}/tasks", {}),
    "415": (0, 415, "PUT", "/api/{me}/tasks/{mine}", {"content": b"{}"}),
    "422 path": (0, 422, "DELETE", "/api/{me}/tasks/0", {}),
    "422 query": (0, 422, "GET", "/api/{me}/tasks?completed=maybe", {}),
    "422 body": (0, 422, "PUT", "/api/{me}/tasks/{mine}", {"json": {"title": ""}}),
    "preflight": (
        0,
        204,
        "OPTIONS",
        "/api/{me}/tasks",
        {"headers": {"Origin": "http://localhost:3000", "Access-Control-Request-Method": "PUT"}},
    ),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(scope="module")
def logging_database(local_postgres: OwnPostgres) -> Iterator[str]:
    """A database that logs every statement of every connection, transaction control included."""
    with local_postgres.new_database(schema=True) as url:
        local_postgres.set_default(url, "log_statement", "'all'")
        local_postgres.set_default(url, "log_parameter_max_length", "0")
        yield url


@pytest.fixture(scope="module")
def relay(local_postgres: OwnPostgres) -> Iterator[Relay]:
    with Relay(local_postgres.port) as relay:
        yield relay


@pytest.fixture(scope="module")
async def open_client(
    make_settings: Any, logging_database: str, relay: Relay
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an app with a single connection, which goes through the relay."""
    settings = make_settings(neon_db_url=relay.url(logging_database), db_pool_size=1)
    async with client_of(settings) as client:
        yield client


async def requests_of(client: httpx.AsyncClient, case: Case) -> Callable[[], Any]:
    """What makes the request once, with its tasks there before it starts."""
    _, status, method, path, request = case
    account, other = Account(client, new_user()), Account(client, new_user())
    names = {"me": account.user, "other": other.user}
    names |= {"mine": (await account.create())["id"], "theirs": (await other.create())["id"]}
    headers = {**bearer(account.user), **request.get("headers", {})}
    if not headers.get("Authorization"):
        headers.pop("Authorization")

    async def once() -> None:
        response = await client.request(
            method, path.format(**names), **{**request, "headers": headers}
        )
        assert response.status_code == status, response.text

    return once


def statements(log: str) -> list[str]:
    """The statements in a log, of whichever protocol."""
    return re.findall(r"LOG:  (?:statement|execute [^:]*|fastpath [^:]*): (.*)", log)


@cases
async def test_one_statement_a_request_reaches_the_database(
    open_client: httpx.AsyncClient, local_postgres: OwnPostgres, case: Case
) -> None:
    """Design 5: none before it, none around it, on no connection; at the first and every time."""
    for _ in range(8):
        once = await requests_of(open_client, case)
        before = len(local_postgres.log)
        await once()
        sent = statements(local_postgres.log[before:])
        assert len(sent) == case[0], sent


@cases
async def test_one_round_trip_a_request_goes_over_the_wire(
    open_client: httpx.AsyncClient, relay: Relay, case: Case
) -> None:
    """Design 5: none more for checking, preparing or returning a connection, either."""
    for _ in range(8):
        once = await requests_of(open_client, case)
        before = relay.round_trips
        await once()
        assert relay.round_trips - before == case[0]


@cases
async def test_every_statement_has_the_owner_in_its_where(
    open_client: httpx.AsyncClient, local_postgres: OwnPostgres, case: Case
) -> None:
    """FR-021; and FR-019, Edge case: SQL Injection Attempts: values travel apart, never in SQL."""
    once = await requests_of(open_client, case)
    before = len(local_postgres.log)
    await once()
    log = local_postgres.log[before:]
    assert "user-" not in log
    reads_no_row = case is CASES["readiness"] and "LIMIT 0" in log
    if re.search(r"\b(FROM|UPDATE) tasks\b", log) and not reads_no_row:
        assert re.search(r"\bWHERE\b[^)]*\btasks\.user_id = (\(SELECT )?\$\d", log), log


async def test_a_body_that_is_too_large_reaches_no_database(
    local_postgres: OwnPostgres, logging_database: str, relay: Relay
) -> None:
    """Design 5; by a real server, which raises the 413."""
    with servers(relay.url(logging_database)) as serve:
        server = serve()
        before, round_trips = len(local_postgres.log), relay.round_trips
        for _ in range(8):
            user = new_user()
            url, headers = server.url + path_of(user), {**bearer(user), **JSON}
            response = httpx.post(url, content=TOO_LARGE, headers=headers, verify=False)
            assert_error(response, "PAYLOAD_TOO_LARGE")
        assert statements(local_postgres.log[before:]) == []
        assert relay.round_trips - round_trips < 8  # a connection of the start may still close


async def test_a_new_connection_costs_its_request_no_second_statement(
    open_client: httpx.AsyncClient, local_postgres: OwnPostgres, logging_database: str
) -> None:
    """Design 5: after all connections were cut, the next request still has one statement."""
    account = Account(open_client, new_user())
    await account.tasks()
    assert local_postgres.cut_connections(logging_database) == 1
    before = len(local_postgres.log)
    assert await account.tasks() == []
    assert len(statements(local_postgres.log[before:])) == 1


def test_no_statement_on_tasks_is_written_by_hand() -> None:
    """FR-019, as the design has it: they are SQLAlchemy Core; by hand is what asks the catalogue.

    What runs is written as bytes. A text with SQL is advice, which somebody else types.
    """
    tree = ast.parse((ROOT / "todo.py").read_text("utf-8"))
    constants = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    run = [value.decode("latin-1") for value in constants if isinstance(value, bytes)]
    on_tasks = re.compile(r"\b(from|join|into|update|table|only)\s+(\w+\.)?tasks\b", re.IGNORECASE)
    assert [text for text in run if on_tasks.search(text)] == []
    assert [text for text in run if "to_regclass('tasks')" in text] != []
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "sa"
    }
    assert "text" not in used
    assert "select" in used
