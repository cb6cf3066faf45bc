"""The six endpoints, on a real database."""

import asyncio
import logging
import re
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import psycopg
import pytest

from todo_tests.support import (
    Account,
    Postgres,
    assert_error,
    assert_task,
    bearer,
    client_of,
    new_user,
    path_of,
)

ONE_TASK = {"GET": "", "PUT": "", "DELETE": "", "PATCH": "/complete"}
one_task = pytest.mark.parametrize(("method", "action"), ONE_TASK.items(), ids=ONE_TASK)


# List


async def test_the_list_holds_the_callers_tasks_newest_first(account: Account) -> None:
    """US1-AS1, FR-007, FR-032."""
    created = [await account.create(f"Task {number}") for number in range(3)]
    response = await account.send("GET")
    assert (response.status_code, response.json()) == (200, created[::-1])
    assert response.headers["content-type"] == "application/json"


async def test_the_list_of_a_user_without_tasks_is_an_empty_array(account: Account) -> None:
    """US1-AS4."""
    response = await account.send("GET")
    assert (response.status_code, response.json()) == (200, [])


async def test_the_list_filters_by_status_and_ignores_other_parameters(account: Account) -> None:
    """Design 4, list."""
    done, still_open = await account.create("Done"), await account.create("Open")
    done = (await account.send("PATCH", f"{done['id']}/complete")).json()
    assert await account.tasks(completed="true") == [done]
    assert await account.tasks(completed="false") == [still_open]
    assert await account.tasks(page="2", limit="1", user_id="x") == [still_open, done]


async def test_the_list_is_returned_in_full(
    account: Account, postgres: Postgres, database_url: str
) -> None:
    """Assumption 12: no pagination. Newest means the highest id."""
    postgres.execute(
        "insert into tasks (user_id, title, created_at) select "
        f"'{account.user}', 'Task ' || n, now() - n * interval '1 day' "
        "from generate_series(1, 2000) n",
        database_url=database_url,
    )
    tasks = await account.tasks()
    assert [task["title"] for task in tasks] == [f"Task {n}" for n in range(2000, 0, -1)]


# Create


async def test_a_new_task_is_returned_with_its_place(account: Account) -> None:
    """US2-AS1, FR-008, FR-020, FR-024: 201 carries `Location`, which leads to the task."""
    response = await account.send("POST", json={"title": "Buy milk", "description": "Two litres"})
    task = response.json()
    assert response.status_code == 201
    assert_task(task, user_id=account.user, title="Buy milk", description="Two litres")
    assert response.headers["location"] == path_of(account.user, task["id"])
    read = await account.client.get(response.headers["location"], headers=bearer(account.user))
    assert (read.status_code, read.json()) == (200, task)


async def test_a_new_task_is_stamped_with_the_present_time(account: Account) -> None:
    """FR-022."""
    task = await account.create()
    assert task["created_at"] == task["updated_at"]
    age = datetime.now(UTC) - datetime.fromisoformat(task["created_at"])
    assert timedelta(seconds=-5) < age < timedelta(seconds=5)


@pytest.mark.parametrize(
    ("members", "stored"),
    [
        pytest.param({}, None, id="absent"),
        pytest.param({"description": None}, None, id="null"),
        pytest.param({"description": ""}, "", id="empty"),
    ],
)
async def test_a_description_is_optional(
    account: Account, members: dict[str, object], stored: str | None
) -> None:
    """FR-016."""
    task = await account.create("Task", **members)
    assert_task(task, user_id=account.user, title="Task", description=stored)


@pytest.mark.parametrize("completed", [True, None, "true", 1, []], ids=str)
async def test_a_new_task_is_open_whatever_the_body_says(
    account: Account, completed: object
) -> None:
    """FR-024; design 4, POST."""
    assert (await account.create(completed=completed))["completed"] is False


async def test_an_acknowledged_task_is_in_the_database(
    account: Account, postgres: Postgres, database_url: str
) -> None:
    """FR-018, FR-020."""
    task = await account.create("Buy milk", description="Two litres")
    rows = postgres.execute(
        f"select user_id, title, description, completed from tasks where id = {task['id']}",
        database_url=database_url,
    )
    assert rows == [(account.user, "Buy milk", "Two litres", False)]


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("  kept \t as sent \n", id="white space"),
        pytest.param('"quotes" \\ back\\slashes / and \x08\x0c\x01\x1f\x7f', id="JSON escapes"),
        pytest.param("İstanbul, naïve, e\u0301 é, 日本語, עברית", id="Unicode, not normalised"),
        pytest.param("👩‍👩‍👧‍👦🇨🇭\U0010ffff\ufffe\ufeff\u200b", id="beyond the BMP"),
        pytest.param("\u2028\u2029\x85", id="line separators"),
        pytest.param("<script>alert(1)</script> &amp; %00 %s $1 {0} :title", id="templates"),
        pytest.param("'; drop table tasks; --", id="Edge case: SQL Injection Attempts"),
        pytest.param("\\'; select pg_sleep(9); /* $$ E'\\x27' */", id="SQL injection, escapes"),
        pytest.param('{"a": [1, null]}', id="JSON in a string"),
    ],
)
async def test_strings_come_back_exactly_as_sent(account: Account, text: str) -> None:
    """Design 4, strings; also through PUT, the single task and the list."""
    created = await account.create(f"!{text}", description=text)
    assert_task(created, user_id=account.user, title=f"!{text}", description=text)
    assert (await account.send("GET", created["id"])).json() == created
    assert await account.tasks() == [created]
    changed = await account.send("PUT", created["id"], json={"title": f"?{text}"})
    assert (changed.json()["title"], changed.json()["description"]) == (f"?{text}", text)


@pytest.mark.parametrize(
    "user",
    [
        "auth0|1",
        "a@b.c",
        "Zoë Ångström",
        "日本語 👩‍👩‍👧‍👦",
        "100%",
        "a+b c",
        "a?b#c&d=e;f",
        "%2F",
        "' or ''='",
        "*",
        "1",
        "2b7e1516-28ae-4d2a-abf7-158809cf4f3c",
        "x" * 255,
        "👩" * 255,
        ":@!$&'()*+,;=-._~",
    ],
    ids=lambda user: ascii(user[:24]),
)
async def test_user_ids_of_every_kind_work(client: httpx.AsyncClient, user: str) -> None:
    """Design 4, user id: percent-encoded in the path, and in `Location`."""
    account = Account(client, user)
    response = await account.send("POST", json={"title": "Mine"})
    task = response.json()
    assert response.status_code == 201
    assert_task(task, user_id=user, title="Mine")
    location = response.headers["location"]
    assert urllib.parse.unquote(location) == f"/api/{user}/tasks/{task['id']}"
    assert (await client.get(location, headers=bearer(user))).json() == task
    assert (await client.delete(location, headers=bearer(user))).status_code == 204


# Read, update, delete


async def test_a_task_is_read_by_its_id(account: Account) -> None:
    """FR-009."""
    task = await account.create()
    response = await account.send("GET", task["id"])
    assert (response.status_code, response.json()) == (200, task)


async def test_an_update_changes_the_task_and_its_time(account: Account) -> None:
    """US3-AS1, FR-010, FR-023."""
    task = await account.create("Old", description="Old")
    changes = {"title": "New", "description": "New", "completed": True}
    response = await account.send("PUT", task["id"], json=changes)
    updated = response.json()
    assert response.status_code == 200
    assert updated == {**task, **changes, "updated_at": updated["updated_at"]}
    assert updated["updated_at"] > task["updated_at"]
    assert (await account.send("GET", task["id"])).json() == updated


@pytest.mark.parametrize(
    ("members", "change"),
    [
        pytest.param({}, {}, id="absent members keep their values"),
        pytest.param({"description": None}, {"description": None}, id="null clears"),
        pytest.param({"description": ""}, {"description": ""}, id="empty is kept empty"),
        pytest.param({"completed": False}, {"completed": False}, id="completed alone"),
    ],
)
async def test_an_update_keeps_what_it_does_not_name(
    account: Account, members: dict[str, object], change: dict[str, object]
) -> None:
    """Design 4, PUT."""
    task = await account.create("Old", description="Kept")
    task = (await account.send("PATCH", f"{task['id']}/complete")).json()
    updated = (await account.send("PUT", task["id"], json={"title": "New", **members})).json()
    assert updated == {**task, "title": "New", **change, "updated_at": updated["updated_at"]}


async def test_a_whole_task_may_be_sent_back(account: Account) -> None:
    """Design 4, types, and FR-006: `id`, `user_id` and times in a body never matter."""
    task = await account.create("Mine", description="Still mine")
    sent = {**task, "id": 1, "user_id": "mallory", "created_at": "1970-01-01T00:00:00Z", "x": [{}]}
    updated = (await account.send("PUT", task["id"], json=sent)).json()
    assert updated == {**task, "updated_at": updated["updated_at"]}
    copy = (await account.send("POST", json=sent)).json()
    assert_task(copy, user_id=account.user, title="Mine", description="Still mine")
    assert copy["id"] > task["id"]
    assert copy["created_at"] > task["created_at"]


async def test_a_deleted_task_is_gone(account: Account) -> None:
    """US4-AS1, FR-011."""
    kept, deleted = await account.create("Kept"), await account.create("Deleted")
    response = await account.send("DELETE", deleted["id"])
    assert (response.status_code, response.content) == (204, b"")
    assert "content-type" not in response.headers
    assert await account.tasks() == [kept]
    assert_error(await account.send("GET", deleted["id"]), "TASK_NOT_FOUND")
    assert_error(await account.send("DELETE", deleted["id"]), "TASK_NOT_FOUND")


@one_task
async def test_a_task_that_exists_nowhere_is_not_found(
    account: Account, method: str, action: str
) -> None:
    """US3-AS3 (PUT), US4-AS3 (DELETE); so do GET and PATCH, at both ends of the range."""
    for task_id in (9223372036854775807, 9007199254740993):
        body = {"title": "New"} if method == "PUT" else None
        response = await account.send(method, f"{task_id}{action}", json=body)
        assert_error(response, "TASK_NOT_FOUND")


async def test_the_highest_id_is_an_id_like_any_other(
    account: Account, postgres: Postgres, database_url: str
) -> None:
    """Design 4, task id: up to 2^63-1, and never rounded."""
    highest = 2**63 - 1
    postgres.execute(
        f"insert into tasks (id, user_id, title) values ({highest}, '{account.user}', 'Last')",
        database_url=database_url,
    )
    task = (await account.send("GET", highest)).json()
    assert_task(task, id=highest, user_id=account.user, title="Last")
    assert (await account.send("PUT", highest, json={"title": "New"})).status_code == 200
    assert (await account.send("PATCH", f"{highest}/complete")).status_code == 200
    assert (await account.send("DELETE", highest)).status_code == 204


# Toggle


async def test_toggling_completes_and_reopens_a_task(account: Account) -> None:
    """US5-AS1, US5-AS2, FR-012, FR-023."""
    task = await account.create()
    for completed in (True, False, True):
        response = await account.send("PATCH", f"{task['id']}/complete")
        toggled = response.json()
        assert response.status_code == 200
        assert toggled == {
            **task,
            "completed": completed,
            "updated_at": toggled["updated_at"],
        }
        assert toggled["updated_at"] > task["updated_at"]
        task = toggled


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param({}, id="absent"),
        pytest.param({"json": {"completed": False}}, id="contradicting"),
        pytest.param({"json": None, "content": b"{"}, id="no JSON"),
        pytest.param({"content": b"\xff", "headers": {"Content-Type": "text/plain"}}, id="text"),
    ],
)
async def test_the_body_of_a_toggle_is_ignored(
    account: Account, request_: dict[str, object]
) -> None:
    """Design 4, PATCH complete."""
    task = await account.create()
    response = await account.send("PATCH", f"{task['id']}/complete", **request_)
    assert (response.status_code, response.json()["completed"]) == (200, True)


async def test_101_parallel_toggles_leave_the_task_completed(account: Account) -> None:
    """One atomic statement: none is lost (SC-005: 100 concurrent requests without errors)."""
    task = await account.create()
    toggles = [account.send("PATCH", f"{task['id']}/complete") for _ in range(101)]
    responses = await asyncio.gather(*toggles)
    assert {response.status_code for response in responses} == {200}
    assert sum(response.json()["completed"] for response in responses) == 51
    assert (await account.send("GET", task["id"])).json()["completed"] is True


async def test_of_concurrent_updates_the_last_write_wins_whole(account: Account) -> None:
    """Edge case: Concurrent Task Updates. What stays is one of the updates, never a mixture."""
    task = await account.create()
    updates = [{"title": f"T{n}", "description": f"D{n}", "completed": True} for n in range(30)]
    responses = await asyncio.gather(
        *(account.send("PUT", task["id"], json=update) for update in updates)
    )
    assert {response.status_code for response in responses} == {200}
    final = (await account.send("GET", task["id"])).json()
    assert final in [response.json() for response in responses]
    assert {name: final[name] for name in updates[0]} in updates


async def test_of_parallel_deletes_one_succeeds(account: Account, database_url: str) -> None:
    """To those that wait for its lock, the row is still there when it has gone."""
    task = await account.create()
    with psycopg.connect(database_url) as locker:
        locker.execute("select from tasks where id = %s for update", (task["id"],))
        deletes = [asyncio.create_task(account.send("DELETE", task["id"])) for _ in range(20)]
        await asyncio.sleep(0.1)
    responses = await asyncio.gather(*deletes)
    assert sorted(response.status_code for response in responses) == [204] + [404] * 19


async def test_100_users_at_once_are_served_without_an_error(client: httpx.AsyncClient) -> None:
    """SC-005."""

    async def life_of_a_task() -> None:
        account = Account(client, new_user())
        task = await account.create()
        assert (await account.send("PATCH", f"{task['id']}/complete")).status_code == 200
        assert [each["id"] for each in await account.tasks()] == [task["id"]]
        assert (await account.send("DELETE", task["id"])).status_code == 204

    await asyncio.gather(*(life_of_a_task() for _ in range(100)))


# Times


async def test_times_are_utc_whatever_the_database_is_set_to(
    postgres: Postgres, fresh_database: str, make_settings: Any
) -> None:
    """Design 4, times: RFC 3339 with `Z` and always six digits."""
    postgres.set_default(fresh_database, "timezone", "'Asia/Kolkata'")
    postgres.set_default(fresh_database, "datestyle", "'SQL, DMY'")
    postgres.execute(
        "insert into tasks (user_id, title, created_at, updated_at)"
        " values ('a', 'A', '2026-02-08T10:00:00+00', '2026-02-08T10:00:00.12+00')",
        database_url=fresh_database,
    )
    async with client_of(make_settings(neon_db_url=fresh_database)) as client:
        account = Account(client, "a")
        [task] = await account.tasks()
        assert task["created_at"] == "2026-02-08T10:00:00.000000Z"
        assert task["updated_at"] == "2026-02-08T10:00:00.120000Z"
        updated = (await account.send("PUT", task["id"], json={"title": "B"})).json()
        age = datetime.now(UTC) - datetime.fromisoformat(updated["updated_at"])
        assert abs(age) < timedelta(seconds=5)


# What has no form in RFC 3339, what it is answered as, and whether schema.sql lets it in.
FIRST, LAST = "0001-01-01T00:00:00.000000Z", "9999-12-31T23:59:59.999999Z"
FAR = {
    "infinity": LAST,
    "-infinity": FIRST,
    "294276-12-31 23:59:59.999999+00": LAST,
    "10000-01-01 00:00:00+00": LAST,
    "9999-12-31 23:59:59.999999-12": LAST,  # which is year 10000 in UTC
    "0001-12-31 23:59:59.999999+00 BC": FIRST,
    "4713-11-24 00:00:00+00 BC": FIRST,
}
NEAR = {
    "9999-12-31 23:59:59.999999+00": LAST,
    "0001-01-01 00:00:00+00": FIRST,
    "0999-02-03 04:05:06.7+00": "0999-02-03T04:05:06.700000Z",
}
RANGES = ("tasks_created_at_range", "tasks_updated_at_range")


@pytest.fixture(scope="module")
async def old_table(
    postgres: Postgres, make_settings: Any
) -> AsyncIterator[tuple[httpx.AsyncClient, str]]:
    """A client of an app whose table has no checks of its times, as those made before; its URL."""
    with postgres.new_database(schema=True) as url:
        for name in RANGES:
            drop = f"alter table tasks drop constraint if exists {name}"
            postgres.execute(drop, database_url=url)
        async with client_of(make_settings(neon_db_url=url)) as client:
            yield client, url


@pytest.mark.parametrize("zone", ["UTC", "America/New_York"])
@pytest.mark.parametrize("column", ["created_at", "updated_at"])
@pytest.mark.parametrize("time", FAR | NEAR)
async def test_every_time_of_the_table_has_a_form_in_every_answer(
    old_table: tuple[httpx.AsyncClient, str],
    postgres: Postgres,
    time: str,
    column: str,
    zone: str,
) -> None:
    """Design 4, times: kept within the years 1 to 9999. Else the owner's list is invalid JSON."""
    client, url = old_table
    account, said = Account(client, new_user()), (FAR | NEAR)[time]
    other = await account.create("Before")
    insert = (
        f"set timezone = '{zone}'; insert into tasks (user_id, title, {column}) "
        f"values ('{account.user}', 'Far', '{time}') returning id"
    )
    [(task_id,)] = postgres.execute(insert, database_url=url)
    far, before = await account.tasks()
    assert (far["id"], far[column], before) == (task_id, said, other)
    assert datetime.fromisoformat(far[column]).year in range(1, 10_000)
    assert await account.tasks(completed="false") == [far, before]
    assert (await account.send("GET", task_id)).json() == far
    changed = await account.send("PUT", task_id, json={"title": "Near"})
    toggled = await account.send("PATCH", f"{task_id}/complete")
    for response in (changed, toggled):
        assert response.status_code == 200
        assert response.json()["created_at"] == far["created_at"]
        age = datetime.now(UTC) - datetime.fromisoformat(response.json()["updated_at"])
        assert abs(age) < timedelta(seconds=5)
    assert (await account.send("DELETE", task_id)).status_code == 204


@pytest.mark.parametrize("column", ["created_at", "updated_at"])
def test_a_new_table_holds_no_time_without_a_form(
    postgres: Postgres, database_url: str, user: str, column: str
) -> None:
    """schema.sql; its limits themselves are inside."""
    insert = f"insert into tasks (user_id, title, {column}) values ('{user}', 'x', '{{}}')"
    for time in FAR:
        with pytest.raises(psycopg.errors.CheckViolation, match=f"tasks_{column}_range"):
            postgres.execute(insert.format(time), database_url=database_url)
    for time in list(NEAR)[:2]:
        postgres.execute(insert.format(time), database_url=database_url)


# Keys to and from other tables

USERS = """
    create table "user" (id varchar(255) primary key);
    alter table tasks add constraint tasks_of_a_user
        foreign key (user_id) references "user" (id) on delete cascade {};
"""
GONE = r"error=FORBIDDEN: .*tasks_of_a_user"


@pytest.fixture
async def make_users(
    postgres: Postgres, fresh_database: str, make_settings: Any, caplog: pytest.LogCaptureFixture
) -> AsyncIterator[Callable[..., Awaitable[list[Account]]]]:
    """Makes users, a table that refers to them, and an app of DB_TIMEOUT 2 s; captures its log."""
    async with AsyncExitStack() as stack:

        async def make(*users: str, key: str = "") -> list[Account]:
            postgres.execute(USERS.format(key), database_url=fresh_database)
            for user in users:
                insert = f"insert into \"user\" values ('{user}')"
                postgres.execute(insert, database_url=fresh_database)
            settings = make_settings(neon_db_url=fresh_database, db_timeout=2.0)
            client = await stack.enter_async_context(client_of(settings))
            log = logging.getLogger("todo")  # from which nothing goes to the root logger
            log.addHandler(caplog.handler)
            stack.callback(log.removeHandler, caplog.handler)
            return [Account(client, user) for user in users]

        yield make


KEYS = ["", "deferrable initially deferred"]


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key or "checked at once")
async def test_a_user_who_is_gone_may_not_create_tasks(
    make_users: Any, postgres: Postgres, fresh_database: str, caplog: Any, key: str
) -> None:
    """Design 4: 403, and a WARNING that names the constraint. Whoever is there is served."""
    ann, ben = await make_users("ann", "ben", key=key)
    task = await ben.create()
    delete = "delete from \"user\" where id = 'ann'"
    postgres.execute(delete, database_url=fresh_database)
    headers = {"X-Request-ID": "gone"}
    response = await ann.send("POST", json={"title": "Mine"}, headers=headers)
    assert_error(response, "FORBIDDEN")
    [record] = [record for record in caplog.records if "request=gone" in record.getMessage()]
    assert (record.levelname, record.exc_info) == ("WARNING", None)
    assert re.search(GONE, record.getMessage())
    assert await ann.tasks() == []
    assert await ben.tasks() == [task]


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key or "checked at once")
async def test_users_who_are_gone_do_not_spoil_the_creates_of_others(
    make_users: Any, postgres: Postgres, fresh_database: str, key: str
) -> None:
    """Though they share a transaction."""
    users = [f"{kind}-{number}" for number in range(20) for kind in ("gone", "here")]
    accounts = await make_users(*users, key=key)
    delete = "delete from \"user\" where id like 'gone%'"
    postgres.execute(delete, database_url=fresh_database)
    creates = [account.send("POST", json={"title": "Mine"}) for account in accounts]
    responses = await asyncio.gather(*creates)
    assert [response.status_code for response in responses] == [403, 201] * 20
    rows = postgres.execute("select user_id from tasks", database_url=fresh_database)
    assert sorted(user for (user,) in rows) == sorted(user for user in users if "here" in user)


BROKEN = {
    "a check of the title": "alter table tasks add constraint broken check (title <> 'Bad')",
    "a unique title": "create unique index broken on tasks (title)",
}


@pytest.mark.parametrize("kind", BROKEN)
async def test_another_violation_of_a_create_is_a_fault_to_be_seen(
    make_users: Any, postgres: Postgres, fresh_database: str, caplog: Any, kind: str
) -> None:
    """500, with its traceback in the log; for nobody else."""
    ann, ben = await make_users("ann", "ben")
    if kind == "a unique title":
        await ben.create("Bad")
    postgres.execute(BROKEN[kind], database_url=fresh_database)
    requests = [ann.send("POST", json={"title": "Bad"})]
    requests += [ben.send("POST", json={"title": f"Good {number}"}) for number in range(8)]
    refused, *served = await asyncio.gather(*requests)
    assert_error(refused, "INTERNAL_ERROR")
    assert [response.status_code for response in served] == [201] * 8
    [record] = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "broken" in str(record.exc_info[1])


async def test_a_delete_that_another_table_forbids_is_a_fault_to_be_seen(
    make_users: Any, postgres: Postgres, fresh_database: str, caplog: Any
) -> None:
    """The same error of PostgreSQL as that of a user who is gone, but nobody is forbidden."""
    [ann] = await make_users("ann")
    task = await ann.create()
    postgres.execute(
        "create table notes (task bigint constraint notes_of_a_task references tasks (id));"
        f"insert into notes values ({task['id']})",
        database_url=fresh_database,
    )
    assert_error(await ann.send("DELETE", task["id"]), "INTERNAL_ERROR")
    [record] = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "notes_of_a_task" in str(record.exc_info[1])
    assert await ann.tasks() == [task]


@pytest.mark.parametrize("creates", [1, 30])
async def test_a_user_whose_row_is_locked_holds_up_no_creates_of_others(
    make_users: Any, fresh_database: str, creates: int
) -> None:
    """Theirs wait, alone, for the session of somebody else; then each is done, once."""
    ann, *others = await make_users("ann", *(f"user-{number}" for number in range(24)))
    with psycopg.connect(fresh_database) as locker:
        locker.execute("select from \"user\" where id = 'ann' for update")
        waiting = asyncio.gather(*(ann.create() for _ in range(creates)))
        for _ in range(2):
            began = asyncio.get_running_loop().time()
            tasks = await asyncio.gather(*(other.create() for other in others))
            assert len({task["id"] for task in tasks}) == len(others)
            assert asyncio.get_running_loop().time() - began < 0.8
        assert not waiting.done()
    made = sorted(await waiting, key=lambda task: -task["id"])
    assert await ann.tasks() == made
    assert [len(await other.tasks()) for other in others] == [2] * len(others)
