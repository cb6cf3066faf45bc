"""Behind PgBouncer in transaction mode: Debian's 1.18, which knows no prepared statements.

Neon's `-pooler` hosts are such. Nothing is configured for it, and no request may fail.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import psycopg
import pytest

from todo_tests.damage import (
    DATABASE_TIMEOUT,
    LOST_CHANGE,
    Bouncer,
    Caller,
    Life,
    Wire,
    soon,
    together,
)
from todo_tests.support import LOCKED_TABLE, OwnPostgres, Serve, Server

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(Bouncer.program is None, reason="no pgbouncer is installed"),
]

NewBouncer = Callable[..., Bouncer]


@pytest.fixture(scope="module")
def postgres_behind_a_pooler() -> Iterator[OwnPostgres]:
    with OwnPostgres() as server:
        yield server


@pytest.fixture
def start_bouncer() -> Iterator[NewBouncer]:
    """A factory of poolers in front of the port of a PostgreSQL."""
    with ExitStack() as stack:

        def start(port: int, **settings: object) -> Bouncer:
            pooler = Bouncer(port, **settings)
            stack.callback(pooler.remove)
            return pooler.start()

        yield start


def connections(postgres: OwnPostgres, url: str) -> int:
    """How many connections the pooler shares among all."""
    rows = postgres.execute(
        "select count(*) from pg_stat_activity"
        " where datname = current_database() and pid <> pg_backend_pid()",
        database_url=url,
    )
    return int(rows[0][0])


def no_failure(*servers: Server) -> None:
    for server in servers:
        assert " 500 " not in server.stderr()
        assert "Traceback" not in server.stderr()


def test_every_answer_is_right_for_many_callers_of_several_processes(
    postgres_behind_a_pooler: OwnPostgres, start_bouncer: NewBouncer, serve: Serve
) -> None:
    """Three server connections for all, each replaced every second.

    A statement that one process has prepared there must never answer for another's.
    """
    url = postgres_behind_a_pooler.create_database(schema=True)
    pooler = start_bouncer(postgres_behind_a_pooler.port, default_pool_size=3, server_lifetime=1)
    workers = [{"WORKERS": "1"}, {"WORKERS": "1"}, {"WORKERS": "2"}]
    servers = [serve(each, database_url=pooler.url(url)) for each in workers]

    async def live() -> float:
        first = [Life(server.port, seed) for server in servers for seed in range(10)]
        await together(life.steps(30) for life in first)
        assert 1 <= connections(postgres_behind_a_pooler, url) <= 3
        # A process of a later day finds on these connections what the others have left there.
        servers.append(await asyncio.to_thread(serve, database_url=pooler.url(url)))
        late = [Life(servers[-1].port, seed) for seed in range(10)]
        await together(life.steps(30) for life in first[10:] + late)
        assert 1 <= connections(postgres_behind_a_pooler, url) <= 3
        return max(life.slowest for life in first + late)

    slowest = asyncio.run(live())
    no_failure(*servers)
    assert slowest < 5.0


def test_no_request_sees_that_the_pooler_was_restarted_in_between(
    postgres_behind_a_pooler: OwnPostgres, start_bouncer: NewBouncer, serve: Serve
) -> None:
    url = postgres_behind_a_pooler.create_database(schema=True)
    pooler = start_bouncer(postgres_behind_a_pooler.port)
    server = serve(database_url=pooler.url(url))
    lives = [Life(server.port, seed) for seed in range(12)]

    async def live() -> None:
        for _ in range(5):
            await together(life.steps(4) for life in lives)
            pooler.stop()
            pooler.start()
        await together(life.steps(4) for life in lives)

    asyncio.run(live())
    no_failure(server)
    assert max(life.slowest for life in lives) < 1.0


def test_a_locked_table_is_a_timeout_through_the_pooler_too(
    postgres_behind_a_pooler: OwnPostgres, start_bouncer: NewBouncer, serve: Serve
) -> None:
    url = postgres_behind_a_pooler.create_database(schema=True)
    pooler = start_bouncer(postgres_behind_a_pooler.port, default_pool_size=3)
    server = serve({"DB_TIMEOUT": "1"}, database_url=pooler.url(url))
    callers = [Caller(server.port) for _ in range(20)]

    async def lock(number: int) -> None:
        with psycopg.connect(url) as locker:
            locker.execute(LOCKED_TABLE)
            for answer in await together(caller.ask("GET", "") for caller in callers[:number]):
                assert (answer.status, answer.body) == (500, DATABASE_TIMEOUT)
                assert answer.seconds < 2.0
            if number <= 3:  # else PgBouncer still starts what it kept in its queue meanwhile
                await soon(nothing_waits, within=1.0, why="statements still wait on the server")
        for answer in await together(caller.ask("GET", "") for caller in callers):
            assert (answer.status, answer.body) == (200, [])

    async def nothing_waits() -> bool:
        return not postgres_behind_a_pooler.execute("select from pg_locks where not granted")

    async def lock_often() -> None:
        for number in (3, 20, 3):
            await lock(number)

    asyncio.run(lock_often())


async def test_a_write_is_not_repeated_when_the_pooler_lost_the_database(
    postgres_behind_a_pooler: OwnPostgres, start_bouncer: NewBouncer, serve: Serve
) -> None:
    """PgBouncer then says FATAL in the server's place, and cannot know whether it is done."""
    url = postgres_behind_a_pooler.create_database(schema=True)
    async with Wire(postgres_behind_a_pooler.port).laid() as wire:
        pooler = await asyncio.to_thread(start_bouncer, wire.port)
        through = url.replace(f":{postgres_behind_a_pooler.port}/", f":{pooler.port}/")
        server = await asyncio.to_thread(serve, database_url=through)
        caller = Caller(server.port)
        await caller.create("Before")
        wire.cut(caller.user, answered=True)
        answer = await caller.ask("POST", "", {"title": "Once"})
        tasks = (await caller.ask("GET", "")).body
        assert [task["title"] for task in tasks] == ["Once", "Before"]
        assert (answer.status, answer.body) == (500, LOST_CHANGE)
