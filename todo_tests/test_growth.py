"""Past one machine: several services on one database, and a table partitioned by user."""

import asyncio
import re
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from todo_tests.damage import Caller, Life, stored, together
from todo_tests.support import (
    ROOT,
    SCHEMA,
    Account,
    OwnPostgres,
    Serve,
    bearer,
    eventually,
    listens,
    path_of,
)
from todo_tests.test_vm import nginx

pytestmark = pytest.mark.slow

PARTITIONS = 16


def partitioned() -> str:
    """`schema.sql` with the table hash-partitioned by its owner, as the page of .deploy says."""
    schema = SCHEMA
    for old, new in {
        "primary key (id)": "primary key (user_id, id)",
        "\n);": "\n) partition by hash (user_id);\n"
        + "".join(
            f"create table tasks_{n} partition of tasks"
            f" for values with (modulus {PARTITIONS}, remainder {n});\n"
            for n in range(PARTITIONS)
        ),
    }.items():
        assert schema.count(old) == 1
        schema = schema.replace(old, new)
    return f"{schema}create index tasks_id_idx on public.tasks (id);\n"


KINDS = {"plain": SCHEMA, "partitioned": partitioned()}


def new_database(postgres: OwnPostgres, kind: str) -> str:
    url = postgres.create_database()
    postgres.execute(KINDS[kind], database_url=url)
    return url


# What takes its time: it begins with the first test, in threads of its own

SIZES = {"small": 20_000, "large": 1_000_000}  # tasks, of users with a hundred each
SEED = """
insert into tasks (user_id, title, description, completed)
select 'user-' || n % {users}, 'Task ' || n, 'Milk, eggs, bread', n % 3 = 0
from generate_series(1, {tasks}) n;
"""


def seeded(postgres: OwnPostgres, kind: str, tasks: int) -> str:
    """The URL of a database of that kind with so many tasks; its indexes are made at the end."""
    table, create_index, indexes = KINDS[kind].partition("create index")
    url = postgres.create_database()
    seed = SEED.format(users=tasks // 100, tasks=tasks)
    postgres.execute(f"{table}{seed}{create_index}{indexes}", database_url=url)
    postgres.execute("vacuum analyze tasks", database_url=url)
    return url


@pytest.fixture(scope="module")
def postgres_of_growth() -> Iterator[OwnPostgres]:
    settings = {"shared_buffers": "256MB", "max_wal_size": "4GB", "maintenance_work_mem": "128MB"}
    with OwnPostgres(**settings) as server:
        yield server


@pytest.fixture(scope="module", autouse=True)
def databases(postgres_of_growth: OwnPostgres) -> Iterator[dict[tuple[str, str], Future[str]]]:
    """The URLs of what is seeded."""
    pool = ThreadPoolExecutor(2)
    yield {
        (kind, size): pool.submit(seeded, postgres_of_growth, kind, tasks)
        for kind in KINDS
        for size, tasks in SIZES.items()
    }
    pool.shutdown(cancel_futures=True)


# Several services


async def test_one_of_two_services_is_killed_and_no_answered_write_is_lost(
    serve: Serve, database_url: str, tmp_path: Path
) -> None:
    """Behind one nginx, which asks the other: no read fails, and a write fails but once."""
    services = [await asyncio.to_thread(serve) for _ in range(2)]
    answered: dict[str, list[str]] = {}
    reads = refused = 0

    async def write(caller: Caller) -> None:
        nonlocal refused
        titles = answered[caller.user] = []
        for number in range(10_000):
            if over.is_set():
                return
            answer = await caller.ask("POST", "", {"title": f"Task {number}"})
            assert answer.status in {201, 502}, answer
            refused += answer.status == 502
            titles += [f"Task {number}"] if answer.status == 201 else []

    async def read(caller: Caller) -> None:
        nonlocal reads
        while not over.is_set():
            answer = await caller.ask("GET", "")
            assert (answer.status, answer.body) == (200, [])
            reads += 1

    async def kill() -> None:
        await asyncio.sleep(2.0)
        services[0].process.kill()
        await asyncio.sleep(2.0)
        over.set()

    with nginx(tmp_path, *(each.port for each in services), tls=False) as url:
        await asyncio.to_thread(eventually, partial(listens, f"{url}/healthz"))
        port, over = int(url.rpartition(":")[2]), asyncio.Event()
        callers = [Caller(port) for _ in range(32)]
        await together([*map(write, callers[:16]), *map(read, callers[16:]), kill()])
    served = [each.stderr().count(" POST ") for each in services]
    assert min(served) > 50, "both had their share"
    assert refused <= 16, "none but those on their way to the one that was killed"
    for user, titles in answered.items():
        found = stored(database_url, user)
        assert len(found) == len(set(found))
        assert set(titles) <= set(found)
    writes = sum(map(len, answered.values()))
    print(f"{writes} writes kept, {refused} refused, {reads} reads, none failed")


async def test_a_url_with_two_hosts_follows_the_one_that_takes_writes(
    own_postgres: Callable[..., OwnPostgres], serve: Serve
) -> None:
    """The URL of the page. They share no data here; a real standby would have it."""
    page = (ROOT / ".deploy/README.md").read_text("utf-8")
    [url] = re.findall(r"`(postgresql://\S+@db1,db2/\S+)`", page)
    first, second = own_postgres(), own_postgres()
    for server in (first, second):
        server.execute("create role todo login")
        server.execute("create database todo")
        todo_url = server.url.removesuffix("postgres") + "todo"
        server.execute(SCHEMA, database_url=todo_url)
        server.execute("grant all on tasks to todo", database_url=todo_url)

    def restart(server: OwnPostgres, read_only: str) -> None:
        server.stop()
        server.settings = {**server.settings, "default_transaction_read_only": read_only}
        server.start()

    def written() -> list[int]:
        ask = "select count(*)::int from tasks"
        urls = [f"{server.url.removesuffix('postgres')}todo" for server in (first, second)]
        return [first.execute(ask, database_url=url)[0][0] for url in urls]

    restart(first, "on")
    hosts = f"127.0.0.1:{first.port},127.0.0.1:{second.port}"
    service = await asyncio.to_thread(serve, database_url=url.replace("db1,db2", hosts))
    caller = Caller(service.port)
    await caller.create()
    assert written() == [0, 1]
    await asyncio.to_thread(second.stop)
    await asyncio.to_thread(restart, first, "off")  # it takes over
    deadline = time.monotonic() + 20
    while (await caller.ask("POST", "", {"title": "Call the dentist"})).status != 201:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)
    await asyncio.to_thread(restart, second, "on")
    assert written() == [1, 1]


# A partitioned table


async def exchange(client: httpx.AsyncClient) -> list[Any]:
    """What two users are told who do everything, once; ids and times by their order."""
    alice, bob = (Account(client, name) for name in ("alice", "bob"))
    theirs = await bob.create("Of Bob")
    first = await alice.create("Buy groceries", description="Milk")
    second = await alice.create("Call the dentist")
    answers = [
        await alice.send("GET"),
        await alice.send("GET", params={"completed": "true"}),
        *[
            await alice.send(method, f"{task}{rest}", **body)
            for task in (first["id"], theirs["id"], 2**62)
            for method, rest, body in (
                ("GET", "", {}),
                ("PUT", "", {"json": {"title": "Buy groceries and coffee", "completed": True}}),
                ("PATCH", "/complete", {}),
                ("DELETE", "", {}),
            )
        ],
        await alice.send("GET"),
        await bob.send("GET"),
    ]
    texts = [f"{answer.status_code} {answer.text}" for answer in answers]
    for number, task in enumerate((theirs, first, second)):
        texts = [re.sub(rf'"id":{task["id"]}\b', f'"id":"{number}"', text) for text in texts]
    return [re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+Z", "a time", text) for text in texts]


async def test_a_partitioned_table_is_accepted_and_answers_the_same(
    postgres_of_growth: OwnPostgres, serve: Serve
) -> None:
    """All six operations, and 403 or 404, to the letter."""
    told = {}
    for kind in KINDS:
        url = new_database(postgres_of_growth, kind)
        checked = serve(database_url=url, args=("check",), wait=False)
        await asyncio.to_thread(checked.wait)
        assert "ok    table: the service's statements run on it" in checked.stdout()
        server = await asyncio.to_thread(serve, database_url=url)
        async with httpx.AsyncClient(base_url=server.url) as client:
            told[kind] = await exchange(client)
        await together(Life(server.port, seed).steps(60) for seed in range(4))
    assert told["plain"] == told["partitioned"]
    statuses = [text[:3] for text in told["plain"]]
    assert statuses[2:14] == ["200", "200", "200", "204", *["403"] * 4, *["404"] * 4]


@pytest.mark.parametrize("kind", KINDS)
def test_a_million_tasks_are_as_quick_as_twenty_thousand(
    databases: dict[tuple[str, str], Future[str]], serve: Serve, kind: str
) -> None:
    """A list of a hundred tasks and one of them, of 200 users and of 10,000: within 1.3 times."""
    wait(databases.values())
    asks: dict[str, list[Callable[[], None]]] = {}
    for size, tasks in SIZES.items():
        users, url = tasks // 100, databases[kind, size].result()
        client = httpx.Client(base_url=serve(database_url=url).url)
        for number in range(0, users, users // 100):
            user = f"user-{number}"
            headers = bearer(user)
            listed = client.get(path_of(user), headers=headers).json()
            assert len(listed) == 100
            for what, path in (
                ("list", path_of(user)),
                ("get", path_of(user, listed[50]["id"])),
            ):
                request = client.build_request("GET", path, headers=headers)

                def ask(client: httpx.Client = client, request: httpx.Request = request) -> None:
                    assert client.send(request).status_code == 200

                asks.setdefault(f"{what} {size}", []).append(ask)
    times: dict[str, list[float]] = {name: [] for name in asks}
    for _ in range(8):  # by turns, so that what else the machine does meets all alike
        for number in range(100):
            for name, each in asks.items():
                start = time.perf_counter()
                each[number]()
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(each[200:]) * 1e6 for name, each in times.items()}
    print(kind, {name: f"{median:.0f} µs" for name, median in medians.items()})
    for what in ("list", "get"):
        assert medians[f"{what} large"] < 1.3 * medians[f"{what} small"]
