"""A user with a huge list, in a hurry or not: others are served, and memory comes back.

SC-006; design 5: one user never holds more than half of the connections.
"""

import asyncio
import itertools
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

import todo
from todo_tests.damage import Answer, Caller, Life, peak_rss, rss, soon, together
from todo_tests.support import (
    LOCKED_TABLE,
    OwnPostgres,
    Postgres,
    Relay,
    Serve,
    Server,
    new_user,
    servers,
)

DB_TIMEOUT = "2"
SECONDS = 3.5  # longer than that, so that whoever gets no connection gets 500
HEAVY = "100000-short-tasks"
LONG = {"25-mb": 25_000, "25-mb-too": 25_000}
READY = b"Z\0\0\0\5"  # ReadyForQuery, but for its last byte
SEED = """
insert into tasks (user_id, title)
select '{HEAVY}', 'Task ' || n from generate_series(1, 100000) n;
insert into tasks (user_id, title, description)
select person, 'Task ' || n, repeat('x', 1000)
from (values {LONG}) as people (person, count), generate_series(1, count) n
"""


@pytest.fixture(scope="module")
def crowded_database(postgres: Postgres) -> Iterator[str]:
    """A database with these users' tasks."""
    people = ", ".join(f"('{person}', {count})" for person, count in LONG.items())
    with postgres.new_database(schema=True) as url:
        postgres.execute(SEED.format(HEAVY=HEAVY, LONG=people), database_url=url)
        yield url


def watcher(url: str) -> psycopg.Connection[Any]:
    """A connection of the test's own, which `backends` leaves out."""
    return psycopg.connect(url, autocommit=True, application_name="watcher")


def backends(url: str, *, which: str = "true") -> set[int]:
    """The process ids of those that serve connections to the database."""
    with watcher(url) as connection:
        rows = connection.execute(
            "select pid from pg_stat_activity where datname = current_database()"
            f" and application_name <> 'watcher' and {which}".encode()
        )
        return {pid for (pid,) in rows}


def waiting(url: str) -> set[int]:
    """Those whose statement waits for a lock."""
    return backends(url, which="wait_event_type = 'Lock'")


@contextmanager
def locked(url: str, lock: str) -> Iterator[None]:
    """Hold a lock until the block ends."""
    with watcher(url) as connection, connection.transaction():
        connection.execute(lock.encode())
        yield


# Attacks


async def hang_up(caller: Caller) -> None:
    """40 times a second, at once or a moment later."""
    moments = itertools.cycle((0.0, 0.0, 0.05, 0.3))
    async with asyncio.TaskGroup() as group:
        for _ in range(round(40 * SECONDS)):
            group.create_task(caller.leave(caller.head("GET", ""), after=next(moments)))
            await asyncio.sleep(1 / 40)


async def read_it_all(caller: Caller) -> None:
    """Six at a time, one after the other, to the last byte."""
    end = asyncio.get_running_loop().time() + SECONDS

    async def again_and_again() -> None:
        reader = Caller(caller.port, caller.user)
        while asyncio.get_running_loop().time() < end:
            await reader.ask("GET", "")

    await together(again_and_again() for _ in range(6))


ATTACKS: dict[str, tuple[Callable[[Caller], Awaitable[None]], int]] = {
    "hangs-up-at-once, 4 connections": (hang_up, 4),
    "hangs-up-at-once, 10 connections": (hang_up, 10),
    "reads-it-all, 10 connections": (read_it_all, 10),
}


@pytest.mark.parametrize(("attack", "size"), ATTACKS.values(), ids=ATTACKS)
@pytest.mark.slow
def test_beside_a_user_with_a_huge_list_every_request_of_others_succeeds(
    serve: Serve, crowded_database: str, attack: Callable[[Caller], Awaitable[None]], size: int
) -> None:
    settings = {"DB_POOL_SIZE": str(size), "DB_TIMEOUT": DB_TIMEOUT}
    server = serve(settings, database_url=crowded_database)
    lives = [Life(server.port, seed) for seed in range(6)]
    probe = Caller(server.port)
    ready = []

    async def beside() -> None:
        attacking = asyncio.ensure_future(attack(Caller(server.port, HEAVY)))

        async def live(life: Life) -> None:
            while not attacking.done():
                await life.step()
                await asyncio.sleep(0.02)

        async def be_ready() -> None:
            while not attacking.done():
                ready.append(await probe.ask("GET", "/readyz"))
                await asyncio.sleep(0.1)

        await together([be_ready(), *(live(life) for life in lives)])
        await attacking

    asyncio.run(beside())
    slowest = max(life.slowest for life in lives)
    print(f"{sum(life.requests for life in lives)} requests, the slowest {slowest:.2f} s")
    assert slowest < 2.0
    assert {answer.status for answer in ready} == {200}
    assert max(answer.seconds for answer in ready) < 2.0


# Connections


async def most_waiting(url: str) -> int:
    """How many wait for a lock, at the most of a quarter of a second from the first on."""

    async def begun() -> bool:
        return bool(waiting(url))

    await soon(begun, within=2.0, why="nobody waits for a lock")
    seen = []
    for _ in range(10):
        await asyncio.sleep(0.025)
        seen.append(len(waiting(url)))
    return max(seen)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4, 10])
async def test_one_user_never_holds_more_than_half_of_the_connections(
    serve: Serve, database_url: str, size: int
) -> None:
    """Lists wait for a locked table; then toggles for a locked row, and others go on."""
    server = await asyncio.to_thread(serve, {"DB_POOL_SIZE": str(size)})
    owner = Caller(server.port)
    task = await owner.create()
    callers = [Caller(server.port, owner.user) for _ in range(20)]
    lives = [Life(server.port, seed) for seed in range(8)]

    async with asyncio.TaskGroup() as group:
        with locked(database_url, LOCKED_TABLE):
            asked = [group.create_task(caller.ask("GET", "")) for caller in callers]
            assert 1 <= await most_waiting(database_url) <= size // 2
    assert [(each.result().status, each.result().body) for each in asked] == [(200, [task])] * 20

    async with asyncio.TaskGroup() as group:
        row = f"select from tasks where id = {task['id']} for update"
        with locked(database_url, row):
            toggle = ("PATCH", f"{task['id']}/complete")
            asked = [group.create_task(caller.ask(*toggle)) for caller in callers]
            assert 1 <= await most_waiting(database_url) <= size // 2
            await together(life.steps(10) for life in lives)
            assert max(life.slowest for life in lives) < 1.0
    states = Counter(each.result().body["completed"] for each in asked)
    assert states == {True: 10, False: 10}


MOMENT = 0.3  # seconds


@pytest.mark.parametrize("known", [False, True], ids=["a-users-first", "known-to-be-long"])
@pytest.mark.slow
async def test_nobody_waits_behind_long_lists(
    serve: Serve, crowded_database: str, *, known: bool
) -> None:
    """The long ones are the first to wait, and have a connection to themselves all the same."""
    settings = {"DB_POOL_SIZE": "2", "DB_TIMEOUT": "30"}
    server = await asyncio.to_thread(serve, settings, database_url=crowded_database)
    before = [Caller(server.port) for _ in range(2)]
    heavy = [Caller(server.port, HEAVY) for _ in range(6)]
    others = [Caller(server.port) for _ in range(10)]
    if known:
        await together(caller.ask("GET", "") for caller in (heavy[0], *others))

    asked = []
    async with asyncio.TaskGroup() as group:
        with locked(crowded_database, LOCKED_TABLE):
            for callers in (before[:1], before[1:], heavy, others):
                asked += [group.create_task(caller.ask("GET", "")) for caller in callers]
                await asyncio.sleep(MOMENT)
            assert len(waiting(crowded_database)) == len(before)
    answers = [each.result() for each in asked]
    slowest = max(answer.seconds for answer in answers[-len(others) :])
    longest = max(answer.seconds for answer in answers)
    one = (longest - 2 * MOMENT) / len(heavy)
    print(f"others within {slowest:.2f} s, the long ones within {longest:.2f} s")
    assert {answer.status for answer in answers} == {200}
    assert slowest < longest / 2
    assert slowest - MOMENT < 0.75 * one


SLOW_INSERTS = """
create function slow() returns trigger language plpgsql as
    $$ begin perform pg_sleep(0.02); return new; end $$;
create trigger slow before insert on tasks for each row execute function slow()
"""


@pytest.mark.slow
async def test_a_backlog_of_one_user_is_behind_whatever_comes_from_others(
    server_of_one_connection: tuple[Server, str], postgres: Postgres
) -> None:
    """Three seconds of it; reads and writes alike take turns."""
    server, url = server_of_one_connection
    heavy = [Caller(server.port, "heavy") for _ in range(150)]
    other = Caller(server.port)
    with postgres.changed(url, SLOW_INSERTS, "drop function slow cascade"):
        backlog = [asyncio.create_task(each.ask("POST", "", {"title": "x"})) for each in heavy]
        await asyncio.sleep(0.3)
        for request in (("GET", ""), ("POST", "", {"title": "x"}), ("GET", "")):
            answer = await other.ask(*request)
            assert answer.status < 300
            assert answer.seconds < 0.5
        assert not all(each.done() for each in backlog)
        assert {answer.status for answer in await asyncio.gather(*backlog)} == {201}


# Batches: with one connection, what waited for a lock goes out together afterwards.

BROKEN_VIEW = """
alter table tasks rename to stored_tasks;
create view tasks as select id, user_id, title,
    case user_id when 'broken' then (1 / (length(title) - length(title)))::text else description end
    as description, completed, created_at, updated_at from stored_tasks
"""
WHOLE_TABLE = "drop view tasks; alter table stored_tasks rename to tasks"


@pytest.fixture(scope="module")
def server_of_one_connection(postgres: Postgres) -> Iterator[tuple[Server, str]]:
    """A server with a single connection, and its database."""
    with postgres.new_database(schema=True) as url, servers(url) as serve:
        yield serve({"DB_POOL_SIZE": "1"}), url


def queries_of(statement: todo.Statement, *owners: str) -> list[todo.Query]:
    """A query each, as `Database.run` makes them."""
    values = {"owner_json": "", "task": 1, "new_title": "", "new_description": ""}
    return [todo.Query(statement, values | {"owner": owner}, 0.0) for owner in owners]


def kinds(batch: list[todo.Query]) -> str:
    """What a batch holds, such as `3 READ`."""
    return f"{len(batch)} {batch[0].statement.kind.name}" if batch else "nothing"


async def test_reads_and_creates_go_by_eights_and_what_may_be_long_goes_alone() -> None:
    queue = todo.QueryQueue(connections_max=1)
    statements = {todo.GET: 20, todo.CREATE: 10, todo.DELETE: 2, todo.list_statement(): 1}
    for statement, count in statements.items():
        for query in queries_of(statement, *(new_user() for _ in range(count))):
            queue.put(query)
    batches = [kinds(queue.take()) for _ in range(9)]
    reads, creates = ["8 READ", "8 READ", "4 READ"], ["8 CREATE", "2 CREATE"]
    assert batches == [*reads, *creates, "1 CHANGE", "1 CHANGE", "1 LIST", "nothing"]


async def test_owners_take_turns_whatever_each_of_them_waits_for() -> None:
    """Whoever is passed over because the batch is of another kind keeps the turn."""
    queue = todo.QueryQueue(connections_max=5)
    for owner, statement in (("a", todo.GET), ("b", todo.DELETE), ("c", todo.GET)):
        for query in queries_of(statement, *[owner] * 12):
            queue.put(query)
    told = ["".join(query.owner for query in queue.take()) for _ in range(4)]
    assert told == ["acacacac", "b", "acacacac", "b"]


async def test_one_owner_has_queries_on_no_more_than_so_many_connections() -> None:
    queue = todo.QueryQueue(connections_max=2)
    for query in queries_of(todo.GET, *["many"] * 20, "other"):
        queue.put(query)
    batches = [queue.take() for _ in range(3)]
    assert [[query.owner for query in batch] for batch in batches] == [
        ["many", "other", *["many"] * 6],
        ["many"] * 8,
        [],
    ]
    queue.finish(batches[0])
    assert kinds(queue.take()) == "5 READ"
    assert not queue.waiting


async def test_nobody_waits_behind_queries_whose_clients_have_left() -> None:
    queue = todo.QueryQueue(connections_max=2)
    queries = queries_of(todo.DELETE, *["u"] * 10)
    for query in queries:
        queue.put(query)
    for query in queries[:8]:
        query.rows.cancel()
    assert [queue.take() for _ in range(3)] == [[queries[8]], [queries[9]], []]
    assert not queue.waiting


async def test_a_list_goes_with_other_reads_while_that_same_list_was_short(
    monkeypatch: pytest.MonkeyPatch, make_settings: Callable[..., todo.Settings]
) -> None:
    """A filtered list says nothing about the whole."""
    monkeypatch.setattr(todo, "SHORT_LIST", 2)
    database = todo.Database(make_settings())
    await database.open()
    user = {"owner": new_user(), "owner_json": '""'}
    every, done = todo.list_statement(), todo.list_statement(("completed",))

    async def known_to_be_short() -> list[bool]:
        await database.run(done, **user, completed=True)
        short = database.queue.short_lists
        return [(user["owner"], statement.name) in short for statement in (every, done)]

    told = [await known_to_be_short()]
    for _ in range(4):
        await database.run(every, **user)
        told.append(await known_to_be_short())
        await database.run(todo.CREATE, **user, new_title="x", new_description=None)
    await database.close()
    assert told == [[False, True], *[[True, True]] * 3, [False, True]]


async def behind(
    url: str, lock: str, callers: list[Caller], requests: Sequence[tuple[Any, ...]]
) -> list[Answer]:
    """Answers to requests that meet at a lock: the first alone, the others in a batch after it."""
    asked = []
    async with asyncio.TaskGroup() as group:
        with locked(url, lock):
            for caller, request in zip(callers, requests, strict=True):
                asked.append(group.create_task(caller.ask(*request)))
                await asyncio.sleep(0.01)
    return [each.result() for each in asked]


def creates(titles: list[str]) -> list[tuple[Any, ...]]:
    return [("POST", "", {"title": title}) for title in titles]


async def test_a_read_that_fails_spoils_no_other_of_its_batch(
    server_of_one_connection: tuple[Server, str], postgres: Postgres
) -> None:
    server, url = server_of_one_connection
    callers = [Caller(server.port, user) for user in ("first", *"abc", "broken", *"defg")]
    paths = [str((await caller.create())["id"]) for caller in callers]
    with postgres.changed(url, BROKEN_VIEW, WHOLE_TABLE):
        lock = "lock table stored_tasks in access exclusive mode"
        answers = await behind(url, lock, callers, [("GET", path) for path in paths])
    statuses = {caller.user: each.status for caller, each in zip(callers, answers, strict=True)}
    assert statuses == {**dict.fromkeys(statuses, 200), "broken": 500}


WRITTEN: dict[str, tuple[tuple[Any, ...], int]] = {
    "creates-share": (("POST", "", {"title": "x"}), 2),  # the first goes straight through
    "changes-do-not": (("PATCH", "{id}/complete"), 9),
}


@pytest.mark.parametrize(("request_", "transactions"), WRITTEN.values(), ids=WRITTEN)
async def test_a_change_is_a_transaction_of_its_own_and_creates_share_one(
    server_of_one_connection: tuple[Server, str],
    postgres: Postgres,
    request_: tuple[Any, ...],
    transactions: int,
) -> None:
    server, url = server_of_one_connection
    callers = [Caller(server.port) for _ in range(9)]
    kept = [(await caller.create())["id"] for caller in callers]
    method, path, *body = request_
    requests = [(method, path.format(id=task), *body) for task in kept]
    answers = await behind(url, LOCKED_TABLE, callers, requests)
    written = ", ".join(str(answer.body["id"]) for answer in answers)
    query = f"select count(distinct xmin::text) from tasks where id in ({written})"
    assert postgres.execute(query, database_url=url) == [(transactions,)]


REFUSE_BROKEN = """
create function refuse() returns trigger language plpgsql as
    $$ begin if new.title = 'broken' then raise 'no'; end if; return new; end $$;
create {trigger} insert on tasks {when} for each row execute function refuse()
"""
AT_ONCE = REFUSE_BROKEN.format(trigger="trigger refuse before", when="")
AT_THE_COMMIT = REFUSE_BROKEN.format(
    trigger="constraint trigger refuse after", when="deferrable initially deferred"
)
SPOILED = {
    "first": (AT_ONCE, 1),
    "in-the-middle": (AT_ONCE, 4),
    "last": (AT_ONCE, 8),
    "at-the-commit": (AT_THE_COMMIT, 4),
}


@pytest.mark.parametrize(("refuse", "place"), SPOILED.values(), ids=SPOILED)
async def test_a_create_that_fails_spoils_no_other_of_its_batch(
    server_of_one_connection: tuple[Server, str], postgres: Postgres, refuse: str, place: int
) -> None:
    """All are one transaction, so the others are sent again: each is stored, and once."""
    server, url = server_of_one_connection
    titles = ["first", *"abcdefgh"]
    titles[place] = "broken"
    callers = [Caller(server.port) for _ in titles]
    with postgres.changed(url, refuse, "drop function refuse cascade"):
        answers = await behind(url, LOCKED_TABLE, callers, creates(titles))
    for caller, title, answer in zip(callers, titles, answers, strict=True):
        assert answer.status == (500 if title == "broken" else 201)
        stored = (await caller.ask("GET", "")).body
        assert [task["title"] for task in stored] == [title] * (title != "broken")


@pytest.mark.slow
async def test_creates_that_a_shutdown_undoes_are_sent_again(
    server_of_one_connection: tuple[Server, str], postgres: Postgres
) -> None:
    """In the midst of a batch of 0.8 s, whose first rows have arrived."""
    server, url = server_of_one_connection
    titles = ["first", *"abcdefgh"]
    callers = [Caller(server.port) for _ in titles]
    with postgres.changed(url, SLOW_INSERTS.replace("0.02", "0.1"), "drop function slow cascade"):
        asked = asyncio.create_task(behind(url, LOCKED_TABLE, callers, creates(titles)))
        await asyncio.sleep(0.7)
        assert postgres.cut_connections(url) == 1
        assert [answer.status for answer in await asked] == [201] * 9
    for caller, title in zip(callers, titles, strict=True):
        assert [task["title"] for task in (await caller.ask("GET", "")).body] == [title]


@pytest.fixture
async def pool_of_one(
    postgres: Postgres, make_settings: Callable[..., todo.Settings]
) -> AsyncIterator[tuple[todo.Database, str]]:
    """A pool of one connection, and its database."""
    with postgres.new_database(schema=True) as url:
        database = todo.Database(make_settings(neon_db_url=url, db_pool_size=1))
        await database.open()
        yield database, url
        await database.close()


async def outcomes(
    database: todo.Database, queries: list[tuple[float, todo.Statement, dict[str, Any]]]
) -> list[str]:
    """What becomes of queries begun 0.1 s apart, each with so many seconds, by users of its own."""
    asked = []
    for seconds, statement, values in queries:
        database.timeout = seconds
        usual = {"owner": new_user(), "owner_json": '""', "new_description": None}
        asked.append(asyncio.create_task(database.run(statement, **{**usual, **values})))
        await asyncio.sleep(0.1)
    done = await asyncio.gather(*asked, return_exceptions=True)
    return [str(each) if isinstance(each, Exception) else "done" for each in done]


async def test_a_create_waits_no_longer_than_its_own_time(
    pool_of_one: tuple[todo.Database, str], postgres: Postgres
) -> None:
    """One of a batch times out; its neighbour, which came later, has its answer."""
    database, url = pool_of_one
    postgres.execute(SLOW_INSERTS.replace("0.02", "0.3"), database_url=url)
    # The first sleeps until 0.3 s; the others, in one batch, would until 0.9.
    queries = [(seconds, todo.CREATE, {"new_title": "x"}) for seconds in (5.0, 0.35, 5.0)]
    late = "DATABASE_TIMEOUT: no answer in time"
    assert await outcomes(database, queries) == ["done", late, "done"]


SLOW_VIEW = """
insert into tasks (id, user_id, title) values (1, 'slow-0.3', 'x'), (2, 'slow-3', 'x');
alter table tasks rename to stored_tasks;
create view tasks as select id, user_id, title,
    case when user_id like 'slow-%' then pg_sleep(substr(user_id, 6)::float)::text
    else description end as description, completed, created_at, updated_at from stored_tasks
"""


async def test_a_read_waits_for_no_other_beyond_the_time_of_that(
    pool_of_one: tuple[todo.Database, str], postgres: Postgres
) -> None:
    """One of a batch takes 3 s, of which it has 0.5; its neighbour is sent again."""
    database, url = pool_of_one
    postgres.execute(SLOW_VIEW, database_url=url)
    reads = ((5.0, "slow-0.3"), (0.5, "slow-3"), (5.0, "quick"))
    queries = [
        (seconds, todo.GET, {"owner": user, "task": task})
        for task, (seconds, user) in enumerate(reads, start=1)
    ]
    async with asyncio.timeout(2.0):
        told = await outcomes(database, queries)
    assert told == ["done", "DATABASE_TIMEOUT: no answer in time", "done"]


async def test_what_is_undone_with_its_batch_too_late_to_repeat_says_so(
    monkeypatch: pytest.MonkeyPatch, pool_of_one: tuple[todo.Database, str], postgres: Postgres
) -> None:
    """A 500 in the log has a reason, also where PostgreSQL gave none to this one of a batch."""
    database, url = pool_of_one
    monkeypatch.setattr(todo, "TICK", 60.0)
    postgres.execute(SLOW_INSERTS.replace("0.02", "0.3") + ";" + AT_ONCE, database_url=url)
    titles = ((5.0, "x"), (0.4, "x"), (5.0, "broken"))
    queries = [(seconds, todo.CREATE, {"new_title": title}) for seconds, title in titles]
    told = await outcomes(database, queries)
    assert told == ["done", "DATABASE_TIMEOUT: undone with its batch", "no"]


class LateEnds(Relay):
    """Behind an error, the end of its answer is 0.2 s late."""

    def pass_on(self, data: bytes, listener: socket.socket) -> None:
        if b"Mno\0" in data:
            end = data.rfind(READY)
            listener.sendall(data[:end])
            time.sleep(0.2)
            data = data[end:]
        listener.sendall(data)


@pytest.mark.slow
async def test_a_late_create_that_fails_undoes_its_batch_all_the_same(
    local_postgres: OwnPostgres, make_settings: Callable[..., todo.Settings]
) -> None:
    """Its client has an answer by then, but its neighbour's row is gone, and is made once more."""
    with (
        local_postgres.new_database(schema=True) as url,
        LateEnds(local_postgres.port) as relay,
    ):
        slow = SLOW_INSERTS.replace("0.02", "0.3")
        local_postgres.execute(slow + ";" + AT_ONCE, database_url=url)
        database = todo.Database(make_settings(neon_db_url=relay.url(url), db_pool_size=1))
        await database.open()
        titles = ((5.0, "first"), (5.0, "kept"), (0.2, "broken"))
        queries = [(seconds, todo.CREATE, {"new_title": title}) for seconds, title in titles]
        told = await outcomes(database, queries)
        await database.close()
        assert told == ["done", "done", "DATABASE_TIMEOUT: no answer in time"]
        stored = local_postgres.execute("select title from tasks order by id", database_url=url)
        assert stored == [("first",), ("kept",)]


async def test_a_statement_that_cannot_be_done_is_no_timeout(
    pool_of_one: tuple[todo.Database, str], postgres: Postgres
) -> None:
    """It has the SQLSTATE of an outdated plan, for which it is repeated, but once."""
    database, url = pool_of_one
    refuse = AT_ONCE.replace("raise 'no'", "raise 'no' using errcode = '0A000'")
    postgres.execute(refuse, database_url=url)
    assert await outcomes(database, [(5.0, todo.CREATE, {"new_title": "broken"})]) == ["no"]


TAKE_NAME = """
create function take_name() returns int language plpgsql as
    $$ begin execute 'prepare "{name}" as select 1'; return 1; end $$
"""


async def test_a_name_that_a_pooler_has_given_away_is_a_timeout_if_too_late_to_repeat(
    monkeypatch: pytest.MonkeyPatch, pool_of_one: tuple[todo.Database, str], postgres: Postgres
) -> None:
    """In the moment before the next look at deadlines, behind a query that took too long."""
    database, url = pool_of_one
    monkeypatch.setattr(todo, "TICK", 60.0)
    name = todo.GET.name.decode()
    postgres.execute(TAKE_NAME.format(name=name), database_url=url)
    take = todo.compile_statement(sa.text("select take_name(), pg_sleep(0.3)"), todo.Kind.READ)
    queries = [(5.0, take, {}), (0.1, todo.GET, {"task": 1})]
    taken = f'DATABASE_TIMEOUT: prepared statement "{name}" already exists'
    assert await outcomes(database, queries) == ["done", taken]


QUEUED: dict[str, tuple[Any, ...]] = {
    "list": ("GET", ""),
    "get": ("GET", "{id}"),
    "create": ("POST", "", {"title": "Too late"}),
    "toggle": ("PATCH", "{id}/complete"),
}


@pytest.fixture(scope="module")
def server_of_a_logging_postgres() -> Iterator[tuple[Server, OwnPostgres, str]]:
    """A server of four connections, its PostgreSQL, which logs what it runs, and the database."""
    with OwnPostgres(log_statement="all") as postgres:
        url = postgres.create_database(schema=True)
        with servers(url) as serve:
            yield serve({"DB_POOL_SIZE": "4"}), postgres, url


@pytest.mark.parametrize("request_", QUEUED.values(), ids=QUEUED)
@pytest.mark.slow
async def test_what_is_queued_for_a_client_that_has_gone_is_not_run(
    server_of_a_logging_postgres: tuple[Server, OwnPostgres, str], request_: tuple[Any, ...]
) -> None:
    """What PostgreSQL has been told may be done; that is as much as the user's connections hold."""
    server, postgres, url = server_of_a_logging_postgres
    gone, other = Caller(server.port), Caller(server.port)
    method, path, *body = request_
    request = gone.request(method, path.format(id=(await gone.create())["id"]), *body)
    await other.ask("GET", "")
    before = len(postgres.log)

    with locked(url, LOCKED_TABLE):
        leaving = []
        for _ in range(30):
            leaving.append(asyncio.create_task(gone.leave(request, after=0.3)))
            await asyncio.sleep(0.01)
        await asyncio.gather(*leaving)
        await asyncio.sleep(0.3)
    assert (await other.ask("GET", "")).status == 200
    await asyncio.sleep(0.5)
    ran = [line for line in postgres.log[before:].splitlines() if f"'{gone.user}'" in line]
    assert len(ran) <= 2


@pytest.mark.parametrize("path", ["", "/readyz"])
async def test_a_client_that_leaves_is_no_fault_of_the_server(
    server_of_one_connection: tuple[Server, str], path: str
) -> None:
    server, url = server_of_one_connection
    caller, name = Caller(server.port), f"leaves{path.replace('/', '-')}"
    with locked(url, LOCKED_TABLE):
        await caller.leave(caller.head("GET", path, X_Request_ID=name), after=0.05)
        [line] = await asyncio.to_thread(server.log_lines, f" request={name} ")
    assert " INFO GET " in line
    assert line.endswith(" the client disconnected")


# Memory


HUGE: dict[str, tuple[str, int, set[int]]] = {
    "8-in-time": ("20", 8, {200}),
    "40-mostly-too-late": ("2", 40, {200, 500}),
}


@pytest.mark.parametrize(("timeout", "count", "statuses"), HUGE.values(), ids=HUGE)
@pytest.mark.slow
async def test_huge_lists_at_once_leave_the_process_as_small_as_before(
    serve: Serve, crowded_database: str, timeout: str, count: int, statuses: set[int]
) -> None:
    """Of 25 MB each, twice. libpq's buffer grows with a row, not with all of them."""
    settings = {"DB_POOL_SIZE": "10", "DB_TIMEOUT": timeout}
    server = await asyncio.to_thread(serve, settings, database_url=crowded_database)
    await together(Life(server.port, seed).steps(20) for seed in range(8))
    before = rss(server.process.pid)
    grown = 0.0

    async def small_again() -> bool:
        nonlocal grown
        grown = rss(server.process.pid) - before
        return grown < 80.0

    for _ in range(2):
        callers = [Caller(server.port, user) for user in ("25-mb", "25-mb-too") * (count // 2)]
        answers = await together(caller.ask("GET", "") for caller in callers)
        assert {answer.status for answer in answers} <= statuses
        assert all(len(answer.content) > 25e6 for answer in answers if answer.status == 200)
        del answers
        await soon(small_again, within=10.0, why="it stays larger")
        print(f"larger by {grown:.0f} MiB")
    await together(Life(server.port, seed).steps(20) for seed in range(8))


@pytest.mark.slow
async def test_answers_that_nobody_reads_fill_no_memory(
    serve: Serve, crowded_database: str
) -> None:
    """80 connections of one user, 25 MB each; those who read are served all the while."""
    server = await asyncio.to_thread(serve, {"DB_TIMEOUT": "30"}, database_url=crowded_database)
    await together(Life(server.port, seed).steps(20) for seed in range(8))
    hungry, life = Caller(server.port, "25-mb"), Life(server.port)
    with peak_rss(server.process.pid) as growth:
        writers = []
        for _ in range(80):
            _, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=2**16)
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            writer.write(hungry.head("GET", ""))
            writers.append(writer)
        end = asyncio.get_running_loop().time() + 12.0
        while asyncio.get_running_loop().time() < end:
            await life.step()
            await asyncio.sleep(0.02)
    for writer in writers:
        writer.transport.abort()
    print(f"larger by {growth[0]:.0f} MiB, others within {life.slowest:.2f} s")
    assert growth[0] < 1000.0  # the answers themselves are 2,000
