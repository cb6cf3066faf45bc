"""The database cut off, stopped, killed, locked, silent: nothing lost, and well again by itself.

Edge cases "Database Connection Failure" and "Database Query Timeout"; FR-025 to FR-029, SC-010.
"""

import asyncio
import itertools
import os
import random
import re
import socket
import statistics
import sys
import time
import urllib.parse
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, NamedTuple

import psutil
import psycopg
import pytest

import todo
from todo_tests import support
from todo_tests.damage import (
    ADMIN_SHUTDOWN,
    DATABASE_FAILURES,
    DATABASE_TIMEOUT,
    DATABASE_UNAVAILABLE,
    LATE_CHANGE,
    LOST_CHANGE,
    NOT_READY,
    ON_EVERY_ANSWER,
    AllAtOnce,
    Answer,
    Caller,
    Life,
    Wire,
    ended,
    rss,
    served,
    soon,
    together,
)
from todo_tests.support import (
    LOCKED_TABLE,
    ORIGIN,
    WORKERS,
    NewPostgres,
    OwnPostgres,
    Postgres,
    Relay,
    Serve,
    Server,
    client_of,
    eventually,
    free_port,
    get,
    new_user,
)

ONE_SHAPE = {**ON_EVERY_ANSWER, "access-control-allow-origin": ORIGIN}


def is_error(answer: Answer, body: Any, *, within: float) -> None:
    """A 500 that a page of the frontend can read, in time."""
    assert (answer.status, answer.body) == (500, body)
    assert {**answer.headers, **ONE_SHAPE} == answer.headers
    assert answer.seconds < within


def lines(server: Server) -> list[str]:
    return server.stderr().splitlines()


def titles(postgres: OwnPostgres, url: str) -> Counter[str]:
    return Counter(
        title for (title,) in postgres.execute("select title from tasks", database_url=url)
    )


# What waits: it runs from the start, in a thread of its own, while the other tests go on


class Outage(NamedTuple):
    """What was seen of a database that stopped, and came back."""

    refused: list[Answer]
    grown: float  # MiB, from half a second of it to its end
    health: Answer
    ready: Answer
    said: list[str]  # by the server that was called all along
    said_idle: list[str]  # by a server that nobody called
    back: float  # seconds until both had a success
    ready_again: Answer


async def outage(postgres: OwnPostgres, busy: Server, idle: Server, seconds: float) -> Outage:
    caller, late = Caller(busy.port), Caller(idle.port)
    assert await served(caller)()
    assert await served(late)()
    before = len(lines(busy)), len(lines(idle))
    await asyncio.to_thread(postgres.stop)

    refused: list[Answer] = []
    memory = []
    requests = (("GET", ""), ("GET", "1"), ("POST", "", {"title": "Too late"}))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        refused += await together(Caller(busy.port).ask(*each) for each in requests * 10)
        await asyncio.sleep(0.2)
        memory.append(rss(busy.process.pid))
    health = await caller.ask("GET", "/healthz")
    ready = await caller.ask("GET", "/readyz")
    said, said_idle = lines(busy)[before[0] :], lines(idle)[before[1] :]

    await asyncio.to_thread(postgres.start)
    back = await together(
        soon(served(each), within=2.0, why="no success within 2 s") for each in (caller, late)
    )
    ready_again = await caller.ask("GET", "/readyz")
    assert busy.process.poll() is idle.process.poll() is None, "ended"
    grown = memory[-1] - memory[0]
    return Outage(refused, grown, health, ready, said, said_idle, max(back), ready_again)


async def outages(postgres: OwnPostgres, serve: Serve) -> dict[float, Outage]:
    url = await asyncio.to_thread(postgres.create_database, schema=True)
    settings = {"DB_TIMEOUT": "2"}
    busy, idle = [await asyncio.to_thread(serve, settings, database_url=url) for _ in range(2)]
    return {seconds: await outage(postgres, busy, idle, seconds) for seconds in (1.0, 20.0)}


async def given_up(serve: Serve, workers: str) -> tuple[int, float, Server]:
    server = serve({"WORKERS": workers}, database_url=NOBODY, wait=False)
    return *await ended(server.process, within=20.0), server


async def released(postgres: Postgres, serve: Serve, hold: str) -> Server:
    """A start while the lock is held, which goes after 3 s; what the server has said."""
    url = postgres.create_database(schema=True)
    await asyncio.sleep(5.0)  # the others have started
    with psycopg.connect(url) as locker:
        locker.execute(hold.encode())
        server = serve(database_url=url, wait=False)
        await asyncio.to_thread(server.wait_for, "lock", within=5.0)
        await asyncio.sleep(3.0)
        assert server.process.poll() is None
        assert "listening" not in server.stderr()
    await asyncio.to_thread(server.wait_for, "listening on http://", within=3.0)
    assert (await Caller(server.port).ask("GET", "")).status == 200
    return server


async def locked_out(
    postgres: Postgres, serve: Serve, hold: str, *args: str
) -> tuple[int, float, Server]:
    """The command's end, while the lock stays."""
    url = postgres.create_database(schema=True)
    with psycopg.connect(url) as locker:
        locker.execute(hold.encode())
        server = serve(database_url=url, args=args, files=("todo.py", "schema.sql"), wait=False)
        return *await ended(server.process, within=25.0), server


class Silence(NamedTuple):
    """How a server ended that had been signalled while its network was silent."""

    code: int
    seconds: float
    ready: Answer
    lists: list[Answer]


@asynccontextmanager
async def silenced(
    postgres: OwnPostgres, serve: Serve, settings: dict[str, str], number: int
) -> AsyncIterator[tuple[Wire, Server, list[Caller]]]:
    """A server whose network to the database fell silent when it had answered each caller once."""
    url = await asyncio.to_thread(postgres.create_database, schema=True)
    async with Wire(postgres.port).laid() as wire:
        server = await asyncio.to_thread(serve, settings, database_url=wire.url(url))
        callers = [Caller(server.port) for _ in range(number)]
        await together(caller.ask("GET", "") for caller in callers)
        wire.flowing.clear()
        yield wire, server, callers


async def silence(postgres: OwnPostgres, serve: Serve) -> Silence:
    settings = {"DB_TIMEOUT": "60", "DB_POOL_SIZE": "2"}
    async with silenced(postgres, serve, settings, 4) as (_, server, callers):
        ready = asyncio.create_task(Caller(server.port).ask("GET", "/readyz"))
        lists = [asyncio.create_task(caller.ask("GET", "")) for caller in callers]
        await asyncio.sleep(0.5)
        server.process.terminate()
        code, seconds = await ended(server.process, within=12.0)
        return Silence(code, seconds, await ready, [await each for each in lists])


INDEX_IS_MISSING = "drop index tasks_user_id_completed_idx; commit; begin; "
SCHEMA_IS_APPLIED = "select pg_advisory_xact_lock(hashtext('todo-api schema.sql'))"
LOCKED_OUT: dict[str, tuple[str, ...]] = {
    "serve": (LOCKED_TABLE,),
    "init-db": (LOCKED_TABLE, "init-db"),
    "init-db-beside-one-that-hangs": (INDEX_IS_MISSING + SCHEMA_IS_APPLIED, "init-db"),
    "check": (LOCKED_TABLE, "check"),
}
NOBODY = f"postgresql://someone:a-password@127.0.0.1:{free_port()}/todo"


@pytest.fixture(scope="module")
def waits(postgres: Postgres, local_postgres: OwnPostgres) -> Iterator[AllAtOnce]:
    with (
        OwnPostgres() as own,
        support.servers(NOBODY) as serve,
        AllAtOnce(
            outages=outages(own, serve),
            silence=silence(local_postgres, serve),
            released=released(postgres, serve, LOCKED_TABLE),
            **{workers: given_up(serve, workers) for workers in WORKERS},
            **{name: locked_out(postgres, serve, *how) for name, how in LOCKED_OUT.items()},
        ) as all_at_once,
    ):
        yield all_at_once


# Idle connections


@pytest.mark.slow
def test_no_request_sees_that_idle_connections_were_cut_again_and_again(
    own_postgres: NewPostgres, serve: Serve
) -> None:
    postgres = own_postgres()
    url = postgres.create_database(schema=True)
    server = serve({"DB_POOL_SIZE": "8"}, database_url=url)
    lives = [Life(server.port, seed) for seed in range(24)]

    async def rounds() -> None:
        for _ in range(15):
            await together(life.steps(3) for life in lives)
            assert postgres.cut_connections(url) >= 1

    asyncio.run(rounds())
    assert max(life.slowest for life in lives) < 1.0
    assert " 500 " not in server.stderr()


@pytest.mark.slow
async def test_a_request_is_one_round_trip_and_one_statement_after_a_cut_too(
    own_postgres: NewPostgres, serve: Serve
) -> None:
    postgres = own_postgres()
    url = postgres.create_database(schema=True)
    async with Wire(postgres.port).laid() as wire:
        server = await asyncio.to_thread(serve, {"DB_POOL_SIZE": "2"}, database_url=wire.url(url))
        caller = Caller(server.port)
        await together(Life(server.port).steps(60) for _ in range(2))

        task = await caller.create()
        wire.spoken.clear()
        for _ in range(10):
            assert (await caller.ask("GET", str(task["id"]))).body == task
        assert wire.said(b"EQ") == 10, "one statement a request"
        assert wire.said(b"SQ") == 10, "one round trip a request"
        assert wire.said(b"P") == 0, "prepared by now"

        for _ in range(5):
            assert postgres.cut_connections(url) >= 1
            await asyncio.sleep(0.2)  # the relay passes it on
            wire.spoken.clear()
            assert (await caller.ask("GET", str(task["id"]))).body == task
            assert wire.said(b"EQ") == 1, "no extra statement after the cut"


KEEPALIVES = {
    "by-default": ("", [1, 30, 10, 3]),
    "as-the-url-says": ("&keepalives_idle=7&keepalives_count=9", [1, 7, 10, 9]),
    "off-as-the-url-says": ("&keepalives=0", [0]),
}


@pytest.mark.skipif(sys.platform != "linux", reason="the options have other names elsewhere")
@pytest.mark.parametrize(("parameters", "expected"), KEEPALIVES.values(), ids=KEEPALIVES)
@pytest.mark.slow
async def test_an_idle_connection_is_probed_so_that_no_firewall_forgets_it(
    make_settings: Callable[..., todo.Settings],
    database_url: str,
    parameters: str,
    expected: list[int],
) -> None:
    """In process, so that its sockets can be asked."""
    port = urllib.parse.urlsplit(database_url).port
    assert port is not None
    with Relay(port) as relay:
        settings = make_settings(neon_db_url=relay.url(database_url) + parameters)
        async with client_of(settings) as client:
            assert (await client.get("/readyz")).status_code == 200
            sockets = [
                each.fd
                for each in psutil.Process().net_connections("tcp")
                if each.raddr and each.raddr.port == relay.port
            ]
            assert sockets
            for descriptor in sockets:
                with socket.socket(fileno=os.dup(descriptor)) as connected:
                    options = [
                        connected.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
                        connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
                        connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL),
                        connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT),
                    ]
                assert options[: len(expected)] == expected


# Attempts to connect


async def test_failed_attempts_to_connect_cost_no_connection_and_no_time(
    monkeypatch: pytest.MonkeyPatch, make_settings: Callable[..., todo.Settings]
) -> None:
    """After the first one that failed, nobody waits for the next. In process, for short pauses."""
    monkeypatch.setattr(todo, "RECONNECT_PAUSE", 0.15)
    database = todo.Database(make_settings(neon_db_url=NOBODY, db_timeout=2.0))
    await database.open()
    codes: Counter[str] = Counter()

    async def ask(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(50):
            with pytest.raises(todo.Problem) as raised:
                await database.run(todo.PROBE)
            codes[raised.value.code] += 1
            await asyncio.sleep(chance.random() / 60)

    try:
        async with asyncio.timeout(4):
            await together(ask(seed) for seed in range(20))
        remembered = [*database.queue.waiting, *database.queue.connections]
    finally:
        await database.close()
    assert codes == {"DATABASE_UNAVAILABLE": 1000}
    assert remembered == []


async def test_what_waits_for_a_connection_waits_no_longer_than_what_has_one(
    database_url: str, make_settings: Callable[..., todo.Settings]
) -> None:
    settings = make_settings(db_pool_size=1, db_timeout=0.3)
    database = todo.Database(settings)
    await database.open()
    await database.run(todo.PROBE)
    with psycopg.connect(database_url) as lock:
        lock.execute(LOCKED_TABLE)
        start = time.monotonic()
        every = todo.list_statement()
        asked = (database.run(every, owner=new_user(), owner_json="") for _ in range(12))
        problems = await asyncio.gather(*asked, return_exceptions=True)
        took = time.monotonic() - start
    assert [getattr(problem, "code", problem) for problem in problems] == ["DATABASE_TIMEOUT"] * 12
    assert 0.3 <= took < 0.6
    await database.close()


async def test_what_nobody_uses_is_given_back(
    monkeypatch: pytest.MonkeyPatch, make_settings: Callable[..., todo.Settings]
) -> None:
    """Connections to the pool, and the memory of whose lists are short."""
    monkeypatch.setattr(todo, "IDLE_TIME", 0.1)
    monkeypatch.setattr(todo, "SHORT_LISTS_MAX", 3)
    database = todo.Database(make_settings(db_pool_size=2))
    await database.open()
    for _ in range(20):
        await database.run(todo.list_statement(), owner=new_user(), owner_json="")
    assert len(database.queue.short_lists) <= 3
    assert not database.queue.connections

    async def idle() -> bool:
        stats = database.pool.get_stats()
        return stats["pool_available"] == stats["pool_size"] >= 1

    await soon(idle, within=1.0, why="a connection stays out of the pool")
    assert await database.run(todo.PROBE) == []
    await database.close()


async def test_it_closes_at_whatever_moment(make_settings: Callable[..., todo.Settings]) -> None:
    """Also while connections come in: in Python 3.11 a cancelled `wait_for` may still return."""
    chance = random.Random(11)
    for _ in range(20):
        database = todo.Database(make_settings(db_pool_size=4))
        await database.open()
        values = {"owner": new_user(), "owner_json": '""'}
        every = todo.list_statement()
        asked = [asyncio.ensure_future(database.run(every, **values)) for _ in range(4)]
        await asyncio.wait(asked[:1])
        await asyncio.sleep(chance.random() / 100)
        async with asyncio.timeout(5):
            await database.close()
        for each in asked:
            each.cancel()
        await asyncio.gather(*asked, return_exceptions=True)


@pytest.mark.slow
async def test_logins_that_are_refused_are_few_while_other_connections_work(
    own_postgres: NewPostgres, serve: Serve
) -> None:
    postgres = own_postgres()
    url = postgres.create_database(schema=True)
    postgres.execute(
        "create role few login connection limit 2; grant all on tasks to few", database_url=url
    )
    url = url.replace("//postgres@", "//few@")
    server = await asyncio.to_thread(serve, database_url=url)
    callers = [Caller(server.port) for _ in range(30)]
    answers = await together(caller.ask("POST", "", {"title": "x"}) for caller in callers)
    assert {answer.status for answer in answers} == {201}
    await asyncio.sleep(1.5)
    assert 1 <= postgres.log.count("too many connections for role") <= 2
    assert "no further connection" in server.stderr()
    assert await asyncio.to_thread(server.stop) == 0
    assert "couldn't stop" not in server.stderr()


# Kills


class Writers:
    """Sixteen callers who create tasks under titles of their own until they are told to end."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.answers: list[tuple[str, Answer]] = []
        self.ended = False

    async def write(self, writer: int) -> None:
        caller = Caller(self.server.port)
        for count in itertools.count():
            if self.ended:
                return
            title = f"{writer}/{count}"
            answer = await caller.ask("POST", "", {"title": title})
            self.answers.append((title, answer))
            if answer.status != 201:
                await asyncio.sleep(0.02)

    def acknowledged(self) -> list[str]:
        return [title for title, answer in self.answers if answer.status == 201]

    async def acknowledge(self, more: int, *, within: float) -> float:
        goal = len(self.acknowledged()) + more

        async def reached() -> bool:
            return len(self.acknowledged()) >= goal

        return await soon(reached, within=within, why=f"no {more} writes within {within:.0f} s")


@pytest.mark.slow
def test_three_kills_under_writes_lose_nothing_and_double_nothing(
    own_postgres: NewPostgres, serve: Serve
) -> None:
    postgres = own_postgres()
    url = postgres.create_database(schema=True)
    writers = Writers(serve({"DB_TIMEOUT": "2"}, database_url=url))

    async def kill_thrice() -> list[float]:
        back = []
        try:
            for _ in range(3):
                await writers.acknowledge(200, within=30.0)
                await asyncio.to_thread(postgres.kill)
                await asyncio.to_thread(postgres.start)
                back.append(await writers.acknowledge(1, within=2.0))
            await writers.acknowledge(200, within=30.0)
        finally:
            writers.ended = True
        return back

    async def run() -> list[float]:
        back, *_ = await together([kill_thrice(), *(writers.write(n) for n in range(16))])
        return list(back)

    back = asyncio.run(run())
    refused = [answer for _, answer in writers.answers if answer.status != 201]
    assert refused
    for answer in refused:
        is_error(answer, answer.body, within=3.0)
        assert answer.body in DATABASE_FAILURES
    acknowledged, stored = writers.acknowledged(), titles(postgres, url)
    assert [title for title in acknowledged if not stored[title]] == [], "lost"
    assert [title for title, count in stored.items() if count > 1] == [], "stored twice"
    print(f"{len(acknowledged)} kept, {len(refused)} refused, back after {max(back):.2f} s")


# Statements that hang


@pytest.mark.slow
def test_a_locked_table_is_a_timeout_for_all_and_costs_no_connection(
    own_postgres: NewPostgres, serve: Serve
) -> None:
    postgres = own_postgres()
    url = postgres.create_database(schema=True)
    server = serve({"DB_TIMEOUT": "1", "DB_POOL_SIZE": "10"}, database_url=url)

    async def lock_thrice() -> list[float]:
        callers = [Caller(server.port) for _ in range(40)]
        ids = [(await caller.create())["id"] for caller in callers]
        requests: list[tuple[Any, ...]] = []
        for number, task in enumerate(ids):
            kinds = [("GET", ""), ("GET", f"{task}"), ("PATCH", f"{task}/complete")]
            kinds += [("POST", "", {"title": "Hung"}), ("PUT", f"{task}", {"title": "Hung"})]  # type: ignore[list-item]
            requests.append(([*kinds, ("DELETE", f"{task}")])[number % 6])
        waits = []
        for _ in range(3):
            with psycopg.connect(url) as locker, psycopg.connect(url, autocommit=True) as watcher:
                locker.execute(LOCKED_TABLE)
                answers = await together(
                    caller.ask(*request) for caller, request in zip(callers, requests, strict=True)
                )
                for (method, *_), answer in zip(requests, answers, strict=True):
                    is_error(answer, answer.body, within=2.0)
                    sent = () if method == "GET" else (LATE_CHANGE,)
                    assert answer.body in (DATABASE_TIMEOUT, *sent)
                waits.append(max(answer.seconds for answer in answers))

                async def cancelled(watcher: psycopg.Connection[Any] = watcher) -> bool:
                    row = watcher.execute(
                        "select count(*) from pg_locks join pg_stat_activity using (pid)"
                        " where not granted and datname = current_database()"
                    ).fetchone()
                    return row == (0,)

                await soon(cancelled, within=1.0, why="statements still wait on the server")
            # The lock is gone: all are served at once, as if nothing had been.
            lists = await together(caller.ask("GET", "") for caller in callers)
            for task, answer in zip(ids, lists, strict=True):
                assert (answer.status, len(answer.body)) == (200, 1), "a timed-out write happened"
                told = answer.body[0]
                assert (told["id"], told["title"]) == (task, "Buy groceries")
                assert told["completed"] is False
            assert max(answer.seconds for answer in lists) < 1.5
        return waits

    waits = asyncio.run(lock_thrice())
    print(f"40 callers, pool of 10, DB_TIMEOUT 1 s: all answered within {max(waits):.2f} s")


@pytest.mark.slow
async def test_only_a_change_that_was_sent_may_have_been_stored(
    fresh_database: str, serve: Serve
) -> None:
    """Another one waits for the only connection until its time is over."""
    settings = {"DB_TIMEOUT": "0.5", "DB_POOL_SIZE": "1"}
    # A further connection takes longer to make than either of them waits.
    slowly = f"{fresh_database}?options=-c%20post_auth_delay%3D1"
    server = await asyncio.to_thread(serve, settings, database_url=slowly)

    def connected() -> bool:
        return get(f"{server.url}/readyz").is_success

    await asyncio.to_thread(eventually, connected)
    callers = [Caller(server.port) for _ in range(2)]
    paths = [f"{(await caller.create())['id']}/complete" for caller in callers]
    with psycopg.connect(fresh_database) as locker:
        locker.execute(LOCKED_TABLE)
        toggles = zip(callers, paths, strict=True)
        answers = await together(caller.ask("PATCH", path) for caller, path in toggles)
    bodies = [answer.body for answer in answers]
    assert bodies in ([LATE_CHANGE, DATABASE_TIMEOUT], [DATABASE_TIMEOUT, LATE_CHANGE])
    queued = callers[bodies.index(DATABASE_TIMEOUT)]
    await asyncio.to_thread(eventually, connected)
    assert (await queued.ask("GET", "")).body[0]["completed"] is False


@pytest.mark.slow
async def test_a_change_that_times_out_says_that_its_fate_is_unknown_and_a_read_never_does(
    fresh_database: str, serve: Serve
) -> None:
    """Each waits for the table on a connection of its own; then nothing has been done."""
    settings = {"DB_TIMEOUT": "0.5", "DB_POOL_SIZE": "10"}
    server = await asyncio.to_thread(serve, settings, database_url=fresh_database)
    requests = {**READS, **WRITES}
    callers = {kind: Caller(server.port) for kind in requests}
    tasks = {kind: await caller.create() for kind, caller in callers.items()}

    def ask(kind: str) -> Coroutine[Any, Any, Answer]:
        method, path, *body = requests[kind]
        return callers[kind].ask(method, path.format(id=tasks[kind]["id"]), *body)

    with psycopg.connect(fresh_database) as locker:
        locker.execute(LOCKED_TABLE)
        answers = dict(zip(requests, await together(map(ask, requests)), strict=True))
        with psycopg.connect(fresh_database, autocommit=True) as watcher:

            async def cancelled() -> bool:
                waiting = "select from pg_stat_activity where wait_event_type = 'Lock'"
                return not watcher.execute(f"{waiting} and datname = current_database()").rowcount

            await soon(cancelled, within=1.0, why="statements still wait on the server")
    for kind, answer in answers.items():
        is_error(answer, LATE_CHANGE if kind in WRITES else DATABASE_TIMEOUT, within=2.0)
        assert (await callers[kind].ask("GET", "")).body == [tasks[kind]]


@pytest.mark.slow
async def test_a_change_behind_a_database_that_is_away_was_never_sent(
    own_postgres: NewPostgres, serve: Serve
) -> None:
    """So its sentence is that of a read."""
    postgres = await asyncio.to_thread(own_postgres)
    url = postgres.create_database(schema=True)
    server = await asyncio.to_thread(serve, {"DB_TIMEOUT": "0.5"}, database_url=url)
    caller = Caller(server.port)
    task = await caller.create()
    await asyncio.to_thread(postgres.stop, "immediate")
    for method, path, *body in [*READS.values(), *WRITES.values()]:
        answer = await caller.ask(method, path.format(id=task["id"]), *body)
        is_error(answer, answer.body, within=2.0)
        assert answer.body in (DATABASE_UNAVAILABLE, DATABASE_TIMEOUT)


@pytest.mark.slow
def test_a_locked_row_holds_up_only_its_own_callers(
    own_postgres: NewPostgres, serve: Serve
) -> None:
    postgres = own_postgres()
    url = postgres.create_database(schema=True)
    server = serve({"DB_TIMEOUT": "2"}, database_url=url)

    async def lock() -> None:
        owner, others = Caller(server.port), [Life(server.port, seed) for seed in range(8)]
        task = await owner.create()
        with psycopg.connect(url) as locker:
            locker.execute("select from tasks where id = %s for update", (task["id"],))
            hung, read, *_ = await together(
                [
                    owner.ask("PATCH", f"{task['id']}/complete"),
                    Caller(server.port, owner.user).ask("GET", f"{task['id']}"),
                    *(life.steps(20) for life in others),
                ]
            )
        is_error(hung, LATE_CHANGE, within=3.0)
        assert read.body == task
        assert max(life.slowest for life in others) < 1.0
        assert (await owner.ask("PATCH", f"{task['id']}/complete")).status == 200

    asyncio.run(lock())


@pytest.mark.slow
async def test_a_network_that_falls_silent_is_a_timeout_and_nothing_more(
    own_postgres: NewPostgres, serve: Serve
) -> None:
    """No packet comes through, not even that of the cancellation."""
    settings = {"DB_TIMEOUT": "1", "DB_POOL_SIZE": "4"}
    async with silenced(own_postgres(), serve, settings, 12) as (wire, _, callers):
        for _ in range(2):
            answers = await together(caller.ask("GET", "") for caller in callers)
            for answer in answers:
                assert answer.body in (DATABASE_TIMEOUT, DATABASE_UNAVAILABLE)
                is_error(answer, answer.body, within=2.0)
        assert (await callers[0].ask("GET", "/healthz")).status == 200
        wire.flowing.set()

        async def all_served() -> bool:
            answers = await together(caller.ask("GET", "") for caller in callers)
            return all(answer.status == 200 for answer in answers)

        await soon(all_served, within=2.0, why="not back within 2 s")


# Connections lost in flight


READS = {"list": ("GET", ""), "get": ("GET", "{id}")}
WRITES: dict[str, tuple[Any, ...]] = {
    "create": ("POST", "", {"title": "Once"}),
    "update": ("PUT", "{id}", {"title": "Once"}),
    "toggle": ("PATCH", "{id}/complete"),
    "delete": ("DELETE", "{id}"),
}
MOMENTS = {"before-the-database-hears-of-it": False, "after-the-database-has-done-it": True}


Lose = Callable[..., Awaitable[tuple[Answer, int, Any, list[Any]]]]


@pytest.fixture(scope="module")
async def server_on_a_wire(local_postgres: OwnPostgres) -> AsyncIterator[tuple[Server, Wire, str]]:
    """A server, the wire to its PostgreSQL, and its database."""
    with local_postgres.new_database(schema=True) as url:
        async with Wire(local_postgres.port).laid() as wire:
            with support.servers(wire.url(url)) as serve:
                yield await asyncio.to_thread(serve), wire, url


@pytest.fixture
def lose_connections(server_on_a_wire: tuple[Server, Wire, str]) -> Lose:
    """Lose the connections of one request, as `Wire.cut` does.

    Returns its answer, how often its statement was sent, the task before, the tasks afterwards.
    """
    server, wire, _ = server_on_a_wire

    async def lose_connections(
        request: tuple[Any, ...], *, answered: bool, reset: bool = False, **cut: Any
    ) -> tuple[Answer, int, Any, list[Any]]:
        caller = Caller(server.port)
        before = await caller.create()
        method, path, *body = request
        wire.spoken.clear()
        cut["reset"] = server.process.pid if reset else 0
        wire.cut(caller.user, answered=answered, **cut)
        answer = await caller.ask(method, path.format(id=before["id"]), *body)
        sent = wire.said(b"BQ", caller.user)
        wire.cut(caller.user, answered=answered, times=0)
        after = await caller.ask("GET", "")
        assert after.status == 200
        return answer, sent, before, after.body

    return lose_connections


@pytest.mark.parametrize("answered", MOMENTS.values(), ids=MOMENTS)
@pytest.mark.parametrize("kind", READS)
async def test_a_read_that_lost_its_connection_is_sent_once_more(
    kind: str, answered: bool, lose_connections: Lose
) -> None:
    answer, sent, before, _ = await lose_connections(READS[kind], answered=answered)
    assert (answer.status, answer.body) == (200, [before] if kind == "list" else before)
    assert sent == 2


async def test_a_read_is_sent_no_third_time(lose_connections: Lose) -> None:
    answer, sent, _, _ = await lose_connections(READS["get"], answered=True, times=9)
    is_error(answer, DATABASE_UNAVAILABLE, within=6.0)
    assert sent == 2


@pytest.mark.parametrize("answered", MOMENTS.values(), ids=MOMENTS)
@pytest.mark.parametrize("kind", WRITES)
async def test_a_write_that_lost_its_connection_is_never_repeated(
    kind: str, answered: bool, lose_connections: Lose
) -> None:
    answer, sent, before, after = await lose_connections(WRITES[kind], answered=answered)
    is_error(answer, LOST_CHANGE, within=6.0)
    assert sent == 1
    done = {
        "create": [{"title": "Once"}, {"title": before["title"]}],
        "update": [{"title": "Once"}],
        "toggle": [{"completed": True}],
        "delete": [],
    }
    expected = done[kind] if answered else [before]
    assert [{**task, **told} for task, told in zip(after, expected, strict=True)] == after


@pytest.mark.parametrize("kind", ["get", "create"])
async def test_a_reset_is_seen_at_once(kind: str, lose_connections: Lose) -> None:
    """Though it comes together with PostgreSQL's last word, after which the loop calls no more."""
    request = {**READS, **WRITES}[kind]
    answer, sent, _, _ = await lose_connections(
        request, answered=False, last_word=ADMIN_SHUTDOWN, reset=True
    )
    assert (answer.status < 300, sent, answer.seconds < 1.0) == (True, 2, True)


@pytest.mark.parametrize("kind", WRITES)
async def test_a_write_that_postgresql_refuses_because_it_shuts_down_is_sent_once_more(
    kind: str, lose_connections: Lose
) -> None:
    """In place of the row, so it was rolled back."""
    answer, sent, _, after = await lose_connections(
        WRITES[kind], answered=False, last_word=ADMIN_SHUTDOWN
    )
    tasks = {"create": 2, "delete": 0}.get(kind, 1)
    assert (answer.status < 300, sent, len(after)) == (True, 2, tasks)


async def test_a_write_whose_row_came_before_the_shutdown_is_never_repeated(
    lose_connections: Lose,
) -> None:
    """It may have been committed."""
    answer, sent, _, after = await lose_connections(
        WRITES["create"], answered=True, last_word=ADMIN_SHUTDOWN
    )
    is_error(answer, LOST_CHANGE, within=6.0)
    assert (sent, len(after)) == (1, 2)


# Transactions that PostgreSQL asks to repeat


@pytest.mark.parametrize("isolation", ["repeatable read", "serializable"])
@pytest.mark.slow
async def test_in_any_isolation_the_last_write_wins(
    postgres: Postgres, fresh_database: str, serve: Serve, isolation: str
) -> None:
    """Edge case: Concurrent Task Updates. The isolation is the database's own default."""
    postgres.set_default(fresh_database, "default_transaction_isolation", f"'{isolation}'")
    server = await asyncio.to_thread(serve, database_url=fresh_database)
    owners = [Caller(server.port) for _ in range(3)]
    shared = [await owner.create("Shared") for owner in owners]
    neighbours = [await owner.create("Neighbour") for owner in owners]
    answers: list[Answer] = []
    toggles: list[Answer] = []

    async def work(number: int) -> None:
        whose = number % 3
        caller = Caller(server.port, owners[whose].user)
        for turn in range(15):
            toggle = await caller.ask("PATCH", f"{shared[whose]['id']}/complete")
            put = ("PUT", f"{neighbours[whose]['id']}", {"title": f"{number}/{turn}"})
            post = ("POST", "", {"title": "Short-lived"})
            toggles.append(toggle)
            answers.extend(
                [toggle, *[await caller.ask(*each) for each in (put, ("GET", ""), post)]]
            )
            if answers[-1].status == 201:
                answers.append(await caller.ask("DELETE", str(answers[-1].body["id"])))

    await together(work(number) for number in range(16))
    assert Counter(answer.status for answer in answers) == {200: 720, 201: 240, 204: 240}
    for owner, task, count in zip(owners, shared, (6 * 15, 5 * 15, 5 * 15), strict=True):
        states = Counter(
            answer.body["completed"] for answer in toggles if answer.body["id"] == task["id"]
        )
        assert states == {True: (count + 1) // 2, False: count // 2}
        left = (await owner.ask("GET", "")).body
        assert [each["completed"] for each in left] == [False, count % 2 == 1]


DEFAULTS = {
    "datestyle": "'SQL, DMY'",
    "timezone": "'Asia/Kathmandu'",
    "search_path": "nowhere, public",
    "plan_cache_mode": "force_generic_plan",
    "default_transaction_deferrable": "on",
    "statement_timeout": "'10s'",
    "standard_conforming_strings": "off",
    "idle_session_timeout": "'1s'",
}


@pytest.mark.slow
async def test_whatever_a_database_sets_by_default_the_answers_are_the_same(
    postgres: Postgres, fresh_database: str, serve: Serve
) -> None:
    for setting, value in DEFAULTS.items():
        postgres.set_default(fresh_database, setting, value)
    server = await asyncio.to_thread(serve, {"DB_POOL_SIZE": "4"}, database_url=fresh_database)
    lives = [Life(server.port, seed) for seed in range(8)]
    await together(life.steps(25) for life in lives)
    await asyncio.sleep(1.5)
    await together(life.steps(25) for life in lives)
    owner = Caller(server.port)
    task = await owner.create()
    support.assert_task(task, user_id=owner.user, title="Buy groceries")
    created = datetime.fromisoformat(task["created_at"])
    assert abs(time.time() - created.timestamp()) < 10


@pytest.mark.slow
async def test_a_database_that_only_reads_is_one_that_is_away_for_writes(
    postgres: Postgres, fresh_database: str, serve: Serve
) -> None:
    """A hot standby, or one whose owner has set it so."""
    server = await asyncio.to_thread(serve, {"DB_POOL_SIZE": "1"}, database_url=fresh_database)
    postgres.set_default(fresh_database, "default_transaction_read_only", "on")
    postgres.cut_connections(fresh_database)
    caller = Caller(server.port)
    assert (await caller.ask("GET", "")).body == []
    is_error(await caller.ask("POST", "", {"title": "x"}), DATABASE_UNAVAILABLE, within=2.0)
    assert "Traceback" not in server.stderr()


@pytest.mark.slow
async def test_writes_go_to_the_promoted_server_though_the_old_one_keeps_its_connections(
    own_postgres: NewPostgres, serve: Serve
) -> None:
    """A pool that stays on the old one refuses every write (cloudnative-pg 1254)."""
    first, second = [await asyncio.to_thread(own_postgres) for _ in range(2)]

    def only_reads(server: OwnPostgres, setting: str) -> None:
        with psycopg.connect(server.url, autocommit=True) as connection:
            connection.execute("set default_transaction_read_only = off")
            statement = f"alter system set default_transaction_read_only = {setting}"
            connection.execute(statement.encode())
            connection.execute("select pg_reload_conf()")

    for each in (first, second):
        each.execute(support.SCHEMA)
    only_reads(second, "on")
    hosts = f"127.0.0.1:{first.port},127.0.0.1:{second.port}"
    url = f"postgresql://postgres@{hosts}/postgres?target_session_attrs=read-write"
    server = await asyncio.to_thread(serve, {"DB_POOL_SIZE": "1"}, database_url=url)
    caller = Caller(server.port)
    await caller.create()
    only_reads(first, "on")
    only_reads(second, "off")

    async def written() -> bool:
        return (await caller.ask("POST", "", {"title": "Promoted"})).status == 201

    await soon(written, within=5.0, why="it stays on the standby")
    assert second.execute("select title from tasks") == [("Promoted",)]


REFUSE = """
create sequence tries;
create function refuse() returns trigger language plpgsql as $$ begin
    if nextval('tries') % {times} <> 0 then
        raise exception 'not now' using errcode = '{sqlstate}';
    end if;
    return coalesce(new, old);
end $$;
create trigger refuse before insert or update or delete on tasks
    for each row execute function refuse();
"""

ACCEPT = "drop function refuse cascade; drop sequence tries"

# After the row has been sent.
REFUSE_COMMIT = REFUSE.replace(
    "create trigger refuse before", "create constraint trigger refuse after"
)
REFUSE_COMMIT = REFUSE_COMMIT.replace("on tasks", "on tasks deferrable initially deferred")
REPEATABLE = {
    "serialization-failure-of-the-commit": (REFUSE_COMMIT, "40001"),
    "serialization-failure": (REFUSE, "40001"),
    "deadlock": (REFUSE, "40P01"),
}


@pytest.mark.parametrize(
    ("refuse", "sqlstate"),
    [
        pytest.param(*case, id=name, marks=[] if "commit" in name else [pytest.mark.slow])
        for name, case in REPEATABLE.items()
    ],
)
async def test_a_write_that_postgresql_asks_to_repeat_is_repeated_until_it_is_done(
    local_postgres: OwnPostgres,
    server_on_a_wire: tuple[Server, Wire, str],
    refuse: str,
    sqlstate: str,
) -> None:
    """Every write is refused three times."""
    server, _, url = server_on_a_wire
    caller = Caller(server.port)
    task = await caller.create()
    with local_postgres.changed(url, refuse.format(times=4, sqlstate=sqlstate), ACCEPT):
        answers = [
            await caller.ask(method, path.format(id=task["id"]), *body)
            for method, path, *body in WRITES.values()
        ]
        tries = local_postgres.execute("select last_value from tries", database_url=url)
    assert [answer.status for answer in answers] == [201, 200, 200, 204]
    assert (await caller.ask("GET", "")).body == [answers[0].body]
    assert tries == [(16,)]


REFUSED = {"disk-full": ("53100", DATABASE_UNAVAILABLE), "lock": ("55P03", DATABASE_TIMEOUT)}


@pytest.mark.parametrize(("sqlstate", "error"), REFUSED.values(), ids=REFUSED)
async def test_what_is_no_fault_of_the_service_is_answered_as_one_of_the_database(
    local_postgres: OwnPostgres,
    server_on_a_wire: tuple[Server, Wire, str],
    sqlstate: str,
    error: Any,
) -> None:
    server, _, url = server_on_a_wire
    with local_postgres.changed(url, REFUSE.format(times=10**9, sqlstate=sqlstate), ACCEPT):
        is_error(await Caller(server.port).ask("POST", "", {"title": "x"}), error, within=2.0)


@pytest.mark.slow
async def test_a_write_that_is_never_done_is_a_timeout_and_no_storm(
    postgres: Postgres, fresh_database: str, serve: Serve
) -> None:
    server = await asyncio.to_thread(serve, {"DB_TIMEOUT": "1"}, database_url=fresh_database)
    refuse = REFUSE.format(times=10**9, sqlstate="40001")
    postgres.execute(refuse, database_url=fresh_database)
    is_error(
        await Caller(server.port).ask("POST", "", {"title": "x"}), DATABASE_TIMEOUT, within=2.0
    )
    [(tries,)] = postgres.execute("select last_value from tries", database_url=fresh_database)
    print(f"tried {tries} times within 1 s")
    assert 2 <= tries < 500


@pytest.mark.slow
async def test_a_write_that_loses_a_deadlock_is_repeated(
    postgres: Postgres, fresh_database: str, serve: Serve
) -> None:
    """With somebody's migration, which holds the row and then wants the table."""
    server = await asyncio.to_thread(serve, database_url=fresh_database)
    caller = Caller(server.port)
    task = await caller.create()
    with (
        psycopg.connect(fresh_database) as migration,
        psycopg.connect(fresh_database, autocommit=True) as watcher,
    ):
        migration.execute("select from tasks for update")
        toggle = asyncio.create_task(caller.ask("PATCH", f"{task['id']}/complete"))

        async def waits() -> bool:
            query = "select from pg_stat_activity where wait_event_type = 'Lock'"
            return watcher.execute(f"{query} and datname = current_database()").rowcount == 1

        await soon(waits, within=1.0, why="the toggle does not wait for the row")
        await asyncio.to_thread(migration.execute, LOCKED_TABLE)  # PostgreSQL ends the toggle
    answer = await toggle
    assert answer.status == 200, answer
    assert answer.body["completed"] is True


# A table that changes


CHANGES: dict[str, tuple[str, str]] = {
    "id-becomes-an-integer": (
        "alter table tasks alter id type integer",
        "alter table tasks alter id type bigint",
    ),
    "user-id-becomes-a-text": (
        "alter table tasks alter user_id type text",
        "alter table tasks alter user_id type varchar(255)",
    ),
    "description-becomes-a-varchar": (
        "alter table tasks alter description type varchar(1000)",
        "alter table tasks alter description type text",
    ),
    "times-lose-their-microseconds": (
        "alter table tasks alter created_at type timestamptz(3)",
        "alter table tasks alter created_at type timestamptz",
    ),
    "a-column-is-added": (
        "alter table tasks add column priority text",
        "alter table tasks drop column priority",
    ),
    "a-column-with-a-default-is-added": (
        "alter table tasks add column colour text not null default 'red'",
        "alter table tasks drop column colour",
    ),
    "an-index-is-dropped": (
        "drop index tasks_user_id_idx",
        "create index tasks_user_id_idx on tasks (user_id)",
    ),
    "it-is-renamed-away-and-back": (
        "alter table tasks rename to elsewhere",
        "alter table elsewhere rename to tasks",
    ),
    "it-is-dropped-and-made-anew": (
        "drop table tasks",
        support.SCHEMA,
    ),
}
AWAY = {"it-is-renamed-away-and-back", "it-is-dropped-and-made-anew"}


@pytest.fixture(scope="module")
def server_of_a_changing_table(postgres: Postgres) -> Iterator[tuple[Server, str]]:
    """A server, and the database whose table is changed."""
    with postgres.new_database(schema=True) as url, support.servers(url) as serve:
        yield serve({"DB_POOL_SIZE": "4"}), url


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.slow
async def test_after_any_change_of_the_table_that_leaves_it_usable_the_service_goes_on(
    server_of_a_changing_table: tuple[Server, str], postgres: Postgres, change: str
) -> None:
    """From the first request after it, on every connection."""
    server, url = server_of_a_changing_table

    async def live() -> None:
        await together(Life(server.port, seed).steps(25) for seed in range(8))

    alter, undo = CHANGES[change]
    await live()
    with postgres.changed(url, alter, undo):
        if change in AWAY:
            requests = [Caller(server.port).ask("GET", path) for path in ("", "1") * 8]
            assert {answer.status for answer in await together(requests)} == {500}
        else:
            await live()
    await live()


# Start-up


@pytest.mark.slow
def test_start_up_waits_for_a_database_that_is_down_for_a_moment(
    own_postgres: NewPostgres, serve: Serve
) -> None:
    postgres = own_postgres()
    url = postgres.create_database(schema=True)
    postgres.stop()
    server = serve(database_url=url, wait=False)
    server.wait_for("waiting", within=5.0)
    time.sleep(2.0)
    assert server.process.poll() is None
    assert "listening" not in server.stderr()
    postgres.start()
    server.wait_for("listening on http://", within=3.0)
    assert asyncio.run(Caller(server.port).create())["title"] == "Buy groceries"
    assert len([line for line in lines(server) if "waiting" in line]) == 1


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.slow
def test_start_up_gives_up_on_a_database_that_stays_away(waits: AllAtOnce, workers: str) -> None:
    code, seconds, server = waits[workers]
    assert code == 1
    assert 10.0 <= seconds < 18.0
    waiting, *message = lines(server)
    assert "waiting up to 10 s for the database" in waiting
    assert "cannot be reached" in message[0]
    assert len(message) <= 3
    assert "Traceback" not in server.stderr()
    assert "a-password" not in server.stdout() + server.stderr()


@pytest.mark.slow
def test_start_up_says_that_the_table_is_locked_and_waits_for_it(waits: AllAtOnce) -> None:
    server: Server = waits["released"]
    [waiting] = [line for line in lines(server) if "lock" in line]
    assert " WARNING " in waiting
    assert "waiting" in waiting
    assert "tasks" in waiting


@pytest.mark.parametrize("command", LOCKED_OUT)
@pytest.mark.slow
def test_no_command_waits_for_a_lock_for_ever(waits: AllAtOnce, command: str) -> None:
    code, seconds, server = waits[command]
    said = server.stdout() + server.stderr()
    assert code == 1
    assert seconds < 18.0
    assert "Traceback" not in said
    match command:
        case "serve":
            waiting, *message = lines(server)
            assert seconds >= 10.0
            assert "waiting" in waiting
            assert "locked" in "".join(message)
            assert len(message) <= 3
        case "check":
            assert re.search(r"^FAIL .*\block", server.stdout(), re.MULTILINE)
        case _:
            assert re.search(r"\block", server.stderr())
            assert len(lines(server)) <= 3


# How the outages ended


@pytest.mark.slow
def test_sigterm_ends_it_though_the_network_is_silent(waits: AllAtOnce) -> None:
    """After SHUTDOWN_GRACE, whatever waits then: readiness is a 503 as ever."""
    seen: Silence = waits["silence"]
    assert (seen.code, seen.ready.body) == (0, NOT_READY)
    assert [answer.status for answer in seen.lists] == [500] * 4
    print(f"ended after {seen.seconds:.1f} s")


@pytest.mark.parametrize("seconds", [1.0, 20.0], ids=["of-a-second", "of-20-seconds"])
@pytest.mark.slow
def test_an_outage_is_answered_at_once_and_over_at_once(waits: AllAtOnce, seconds: float) -> None:
    """After 20 s a pool that doubles its pauses would sleep on for 10 s or more."""
    seen: Outage = waits["outages"][seconds]
    for answer in seen.refused:
        is_error(answer, answer.body, within=3.0)
        assert answer.body in DATABASE_FAILURES
    times = sorted(answer.seconds for answer in seen.refused)
    assert times[len(times) * 9 // 10] < 0.5, "not most at once"
    assert (seen.health.status, seen.health.body) == (200, {"status": "ok"})
    assert (seen.ready.status, seen.ready.body) == (503, NOT_READY)
    assert (seen.ready_again.status, seen.ready_again.body) == (200, {"status": "ready"})
    median = statistics.median(times)
    print(
        f"{len(times)} answered after {median * 1e3:.0f} ms, the last {times[-1]:.2f} s;"
        f" {seen.grown:+.1f} MiB; back after {seen.back:.2f} s"
    )
    assert seen.grown < 5.0

    faults = [line for line in seen.said if re.search(r" (WARNING|ERROR) ", line)]
    assert any(re.search("(?i)refused|terminat|shutting down", line) for line in faults)
    assert len(seen.said) <= 2 * len(seen.refused) + seconds + 5, "a flood in the log"
    assert len(seen.said_idle) <= seconds + 5, "a flood in the log of one that nobody calls"
    assert not any("Traceback" in line for line in seen.said + seen.said_idle)
