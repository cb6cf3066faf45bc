"""Two users never see or change each other's tasks, by any method, path, body or id."""

import asyncio
import unicodedata

import httpx
import pytest

from todo_tests.support import Account, Postgres, assert_error, assert_task, bearer, path_of

BODY = {"title": "Taken over", "description": "x", "completed": True}
# Scenario: (method, below one task or all of them)
COLLECTION = {"US1-AS2 list": ("GET", ""), "US2-AS3 create": ("POST", "")}
ONE_TASK = {
    "read": ("GET", "{id}"),
    "US3-AS2 update": ("PUT", "{id}"),
    "US4-AS2 delete": ("DELETE", "{id}"),
    "US5-AS3 toggle": ("PATCH", "{id}/complete"),
}
EVERY = COLLECTION | ONE_TASK


def requests(table: dict[str, tuple[str, str]]) -> pytest.MarkDecorator:
    """Parametrize by the rows of a table, with their names as ids."""
    return pytest.mark.parametrize(("method", "rest"), table.values(), ids=table)


@requests(EVERY)
async def test_the_path_of_another_user_is_forbidden(
    account: Account, other: Account, method: str, rest: str
) -> None:
    """FR-005, SC-004: and nothing happens to either."""
    theirs = await other.create("Theirs")
    mine = await account.create("Mine")
    for task in (theirs, mine):
        path = rest.format(id=task["id"])
        response = await account.send(method, path, of=other.user, json=BODY)
        assert_error(response, "FORBIDDEN")
    assert await other.tasks() == [theirs]
    assert await account.tasks() == [mine]


@requests(ONE_TASK)
async def test_the_id_of_another_users_task_is_forbidden_under_ones_own_path(
    account: Account, other: Account, method: str, rest: str
) -> None:
    """FR-021: 403 while it exists, 404 once it exists nowhere."""
    theirs = await other.create("Theirs")
    path = rest.format(id=theirs["id"])
    assert_error(await account.send(method, path, json=BODY), "FORBIDDEN")
    assert await other.tasks() == [theirs]
    assert (await other.send("DELETE", theirs["id"])).status_code == 204
    assert_error(await account.send(method, path, json=BODY), "TASK_NOT_FOUND")


async def test_a_head_request_tells_no_more_than_a_get(account: Account, other: Account) -> None:
    theirs = await other.create("Theirs")
    for path in (path_of(other.user), path_of(account.user, theirs["id"])):
        response = await account.client.head(path, headers=bearer(account.user))
        assert (response.status_code, response.content) == (403, b"")


@pytest.mark.parametrize("name", ["user_id", "owner", "user", "sub"])
async def test_a_user_in_the_body_is_never_trusted(
    account: Account, other: Account, name: str
) -> None:
    """FR-006, FR-020."""
    body = {"title": "Mine", name: other.user}
    task = (await account.send("POST", json=body)).json()
    assert_task(task, user_id=account.user, title="Mine")
    updated = (await account.send("PUT", task["id"], json=body)).json()
    assert updated == {**task, "updated_at": updated["updated_at"]}
    assert await other.tasks() == []


async def test_the_task_in_the_body_is_never_trusted(account: Account, other: Account) -> None:
    """FR-006: `id` in a body leads nowhere."""
    theirs, mine = await other.create("Theirs"), await account.create("Mine")
    for method, rest in (("POST", ""), ("PUT", mine["id"])):
        response = await account.send(method, rest, json={**BODY, "id": theirs["id"]})
        assert response.json()["id"] != theirs["id"]
    assert await other.tasks() == [theirs]


@pytest.mark.parametrize(
    "headers",
    [
        {"X-User-Id": "{other}"},
        {"X-Forwarded-User": "{other}", "Remote-User": "{other}"},
        {"Cookie": "better-auth.session_token={other}; user_id={other}"},
        {"X-Original-URL": "/api/{other}/tasks", "X-Rewrite-URL": "/api/{other}/tasks"},
        {"X-HTTP-Method-Override": "DELETE"},
    ],
    ids=lambda headers: next(iter(headers)),
)
async def test_no_header_and_no_parameter_but_the_token_names_the_user(
    account: Account, other: Account, headers: dict[str, str]
) -> None:
    theirs, mine = await other.create("Theirs"), await account.create("Mine")
    headers = {name: value.format(other=other.user) for name, value in headers.items()}
    query = {"user_id": other.user, "_method": "DELETE"}
    response = await account.send("GET", headers=headers, params=query)
    assert (response.status_code, response.json()) == (200, [mine])
    response = await account.send("GET", theirs["id"], headers=headers, params=query)
    assert_error(response, "FORBIDDEN")


ANGSTROM = "Ångström"


@pytest.mark.parametrize(
    ("one", "another"),
    [
        pytest.param("alice", "Alice", id="case"),
        pytest.param("alice", "alice ", id="trailing space"),
        pytest.param("alice", " alice", id="leading space"),
        pytest.param("alice", "alic", id="prefix"),
        pytest.param("alice", "%", id="LIKE wildcard"),
        pytest.param("alice", "_____", id="LIKE wildcards"),
        pytest.param("1", "01", id="numbers"),
        pytest.param("a b", "a+b", id="plus"),
        pytest.param("a/b", "a%2Fb", id="encoded twice"),
        pytest.param("a@b", "a%40b", id="encoded"),
        pytest.param("a", "\u0430", id="homograph"),
        pytest.param(
            unicodedata.normalize("NFC", ANGSTROM),
            unicodedata.normalize("NFD", ANGSTROM),
            id="normal forms",
        ),
        pytest.param("ß", "ss", id="case folding"),
        pytest.param("a", "a\u200b", id="zero-width space"),
        pytest.param("a", "a' or 'a'='a", id="SQL injection"),
    ],
)
async def test_users_who_look_alike_are_strangers(
    client: httpx.AsyncClient, user: str, one: str, another: str
) -> None:
    """SC-004. The ids are made unique by a common beginning."""
    theirs = Account(client, f"{user}-{another}")
    task = await theirs.create("Theirs")
    mine = Account(client, f"{user}-{one}")
    for method, rest in EVERY.values():
        response = await mine.send(method, rest.format(id=task["id"]), of=theirs.user, json=BODY)
        assert_error(response, "FORBIDDEN")
    if "/" not in one:
        assert await mine.tasks() == []
        assert_error(await mine.send("GET", task["id"]), "FORBIDDEN")
    assert await theirs.tasks() == [task]


async def test_what_is_forbidden_leaks_nothing(account: Account, other: Account) -> None:
    """FR-027: nothing of the task, and the same answer for users that do not exist."""
    theirs = await other.create("Very private", description="Very private")
    answers = [
        await account.send("GET", theirs["id"]),
        await account.send("GET", theirs["id"], of=other.user),
        await account.send("GET", of=other.user),
        await account.send("GET", of="nobody at all"),
    ]
    for answer in answers:
        assert_error(answer, "FORBIDDEN")
        text = answer.text + str(answer.headers)
        assert not any(secret in text for secret in ("private", other.user))


async def test_many_users_at_once_see_only_their_own(client: httpx.AsyncClient, user: str) -> None:
    """SC-004: requests of all users share the connections, never the answers."""
    accounts = [Account(client, f"{user}-{number}") for number in range(12)]

    async def work(account: Account) -> None:
        for number in range(8):
            task = await account.create(f"{account.user} {number}")
            assert_task(task, user_id=account.user, title=f"{account.user} {number}")
            tasks = await account.tasks()
            assert [each["title"] for each in tasks] == [
                f"{account.user} {each}" for each in range(number, -1, -1)
            ]
            assert {each["user_id"] for each in tasks} == {account.user}
            assert (await account.send("GET", task["id"])).json() == task

    await asyncio.gather(*(work(account) for account in accounts))


async def test_parallel_attempts_on_one_task_change_only_the_owners(
    account: Account, other: Account, postgres: Postgres, database_url: str
) -> None:
    """Toggles by the owner and by a stranger, mixed: the owner's count, the others are 403."""
    task = await other.create("Theirs")
    path = f"{task['id']}/complete"
    both = [each.send("PATCH", path) for _ in range(25) for each in (other, account)]
    responses = await asyncio.gather(*both)
    assert [response.status_code for response in responses] == [200, 403] * 25
    rows = postgres.execute(
        f"select user_id, completed from tasks where id = {task['id']}", database_url=database_url
    )
    assert rows == [(other.user, True)]
