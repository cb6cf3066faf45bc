"""Behind PgBouncer in transaction mode: Debian's 1.18, which knows no prepared statements.

Neon's `-pooler` hosts are such. Nothing is configured for it, and no request may fail.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import psycopg
import pytest

from todo_tests.damage import (
    DATABASE_TIMEOUT,
    DATABASE_UNAVAILABLE,
    Bouncer,
    Caller,
    Life,
    Wire,
    soon,
    together,
)
from todo_tests.support import OwnPostgres, Serve, Server

pytestmark = pytest.mark.skipif(Bouncer.program is None, reason="no pgbouncer is installed")

NewBouncer = Callable[..., Bouncer]


@pytest.fixture(scope="module")
def pooled() -> Iterator[OwnPostgres]:
    server = OwnPostgres()
    try:
        yield server.start()
    finally:
        server.remove()


@pytest.fixture
def bouncer() -> Iterator[NewBouncer]:
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
    pooled: OwnPostgres, bouncer: NewBouncer, serve: Serve
) -> None:
    """Three server connections for all, each replaced every second.

    A statement that one process has prepared there must never answer for another's.
    """
    url = pooled.create_database(schema=True)
    pooler = bouncer(pooled.port, default_pool_size=3, server_lifetime=1)
    workers = [{"WORKERS": "1"}, {"WORKERS": "1"}, {"WORKERS": "2"}]
    servers = [serve(each, database_url=pooler.url(url)) for each in workers]
    lives = [Life(server.port, seed) for server in servers for seed in range(10)]

    async def live() -> int:
        await together(life.steps(30) for life in lives)
        return connections(pooled, url)

    assert 1 <= asyncio.run(live()) <= 3
    # A process of a later day finds on these connections what the others have left there.
    servers[0].stop()
    late = serve(database_url=pooler.url(url))
    lives = lives[10:] + [Life(late.port, seed) for seed in range(10)]
    asyncio.run(live())
    no_failure(*servers, late)
    assert max(life.slowest for life in lives) < 5.0
    print(f"{sum(life.requests for life in lives)} requests, none failed")


def test_no_request_sees_that_the_pooler_was_restarted_in_between(
    pooled: OwnPostgres, bouncer: NewBouncer, serve: Serve
) -> None:
    url = pooled.create_database(schema=True)
    pooler = bouncer(pooled.port)
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


def test_a_locked_table_is_a_timeout_and_is_cancelled_through_the_pooler(
    pooled: OwnPostgres, bouncer: NewBouncer, serve: Serve
) -> None:
    url = pooled.create_database(schema=True)
    pooler = bouncer(pooled.port)
    server = serve({"DB_TIMEOUT": "2"}, database_url=pooler.url(url))
    callers = [Caller(server.port) for _ in range(20)]

    async def lock_twice() -> None:
        for _ in range(2):
            with psycopg.connect(url) as locker, psycopg.connect(url, autocommit=True) as watcher:
                locker.execute("lock table tasks in access exclusive mode")
                for answer in await together(caller.ask("GET", "") for caller in callers):
                    assert (answer.status, answer.body) == (500, DATABASE_TIMEOUT)
                    assert answer.seconds < 3.0

                async def cancelled(watcher: psycopg.Connection[Any] = watcher) -> bool:
                    waiting = "select from pg_locks where not granted"
                    return not watcher.execute(waiting).fetchall()

                await soon(cancelled, within=1.0, why="statements still wait on the server")
            for answer in await together(caller.ask("GET", "") for caller in callers):
                assert (answer.status, answer.body) == (200, [])

    asyncio.run(lock_twice())


async def test_a_write_is_not_repeated_when_the_pooler_lost_the_database(
    pooled: OwnPostgres, bouncer: NewBouncer, serve: Serve
) -> None:
    """Then PgBouncer says FATAL in the server's name, but does not know whether it is done."""
    url = pooled.create_database(schema=True)
    async with Wire(pooled.port).laid() as wire:
        pooler = await asyncio.to_thread(bouncer, wire.port)
        through = url.replace(f":{pooled.port}/", f":{pooler.port}/")
        server = await asyncio.to_thread(serve, database_url=through)
        caller = Caller(server.port)
        await caller.create("Before")
        wire.cut(caller.user, answered=True)
        answer = await caller.ask("POST", "", {"title": "Once"})
        assert (answer.status, answer.body) == (500, DATABASE_UNAVAILABLE)
        tasks = (await caller.ask("GET", "")).body
        assert [task["title"] for task in tasks] == ["Once", "Before"]
