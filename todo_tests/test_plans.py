"""A short list is found through the index on the user, whatever PostgreSQL knows of the others."""

import asyncio
from collections.abc import Iterator

import pytest

from todo_tests.damage import Caller
from todo_tests.support import Postgres, Server, servers

FEW, REQUESTS = "somebody-with-20-old-tasks", 12  # enough for PostgreSQL to keep a generic plan
SEED = f"""
alter table tasks set (autovacuum_enabled = off);
insert into tasks (user_id, title, completed) select '{FEW}', n, n % 2 = 0
from generate_series(1, 20) n;
insert into tasks (user_id, title, completed) select 'heavy-' || n % 2, n, n % 3 = 0
from generate_series(1, 200000) n
"""
STATISTICS = {
    "of-three-users": "analyze tasks",
    "of-the-other-two": f"""
        update tasks set user_id = 'heavy-0' where id <= 20; analyze tasks;
        update tasks set user_id = '{FEW}' where id <= 20
    """,
    "none": "delete from pg_statistic where starelid = 'tasks'::regclass",
}
LISTS = {"all": ("", 20), "done": ("?completed=true", 10), "to-do": ("?completed=false", 10)}
ROWS_READ = """
select (select sum(seq_tup_read) from pg_stat_user_tables)
     + (select sum(idx_tup_read) from pg_stat_user_indexes)
"""


@pytest.fixture(scope="module")
def server_of_uneven_users(postgres: Postgres) -> Iterator[tuple[Server, str]]:
    """A server, and its database, in which two of three users have it all."""
    with postgres.new_database(schema=True) as url, servers(url) as serve:
        server = serve(wait=False)
        postgres.execute(SEED, database_url=url)
        server.wait_until_it_serves()
        yield server, url


def rows_read(postgres: Postgres, url: str) -> int:
    """How many rows and index entries were read so far, counted when a connection ends."""
    postgres.cut_connections(url)
    return int(postgres.execute(ROWS_READ, database_url=url)[0][0])


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize(
    ("query", "length"),
    [
        pytest.param(*LISTS[name], id=name, marks=[] if name == "to-do" else [pytest.mark.slow])
        for name in LISTS
    ],
)
def test_a_short_list_reads_little_more_than_its_rows(
    server_of_uneven_users: tuple[Server, str],
    postgres: Postgres,
    statistics: str,
    query: str,
    length: int,
) -> None:
    """SC-006: with 200,000 newer tasks of others, at the first request and every time."""
    server, url = server_of_uneven_users
    postgres.execute(STATISTICS[statistics], database_url=url)
    before = rows_read(postgres, url)

    async def ask() -> None:
        caller = Caller(server.port, FEW)
        for _ in range(REQUESTS):
            answer = await caller.ask("GET", f"/api/{FEW}/tasks{query}")
            assert (answer.status, len(answer.body)) == (200, length)

    asyncio.run(ask())
    assert rows_read(postgres, url) - before < 100 * REQUESTS
