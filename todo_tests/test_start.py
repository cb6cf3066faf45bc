"""What the start says of the database and of its table; the lines that it prints mend them."""

import math
import os
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import psycopg
import pytest

import todo
from todo_tests.support import (
    ALL_FILES,
    SCHEMA,
    OwnPostgres,
    Postgres,
    Relay,
    Serve,
    Server,
    assert_refused,
    eventually,
    free_port,
    servers,
)

pytestmark = pytest.mark.slow

MakeSettings = Callable[..., todo.Settings]


# A connection that is lost


class Cutter(Relay):
    """Cuts one connection at the round trip `until`, and lets all others pass."""

    def pass_on(self, data: bytes, listener: socket.socket) -> None:
        if self.round_trips == self.until:
            self.until = math.inf
            listener.shutdown(socket.SHUT_RDWR)
        else:
            with suppress(BrokenPipeError):  # the rest of an answer whose connection was cut
                listener.sendall(data)


COMMANDS = ("serve", "init-db", "check")
MOMENTS = range(1, 8)


@pytest.fixture(scope="module")
def database() -> Iterator[OwnPostgres]:
    with OwnPostgres() as server:
        yield server


@pytest.mark.parametrize("command", COMMANDS)
def test_a_connection_lost_at_any_moment_of_a_command_leaves_no_traceback(
    serve: Serve, database: OwnPostgres, command: str
) -> None:
    """`serve` and `init-db` take another one; `check` says it."""
    with database.new_database(schema=True) as url, ExitStack() as stack:
        relays = [stack.enter_context(Cutter(database.port, until=moment)) for moment in MOMENTS]
        started = [
            serve(database_url=relay.url(url), args=(command,), files=ALL_FILES, wait=False)
            for relay in relays
        ]
        for server, relay in zip(started, relays, strict=True):
            if command == "serve":
                server.wait_until_it_serves()
                server.stop()
            code = server.wait()
            assert "Traceback" not in server.stdout() + server.stderr()
            if command == "check":
                cut = math.isinf(relay.until)
                assert ("FAIL  database: " in server.stdout()) == cut
            else:
                assert code == 0, server.stderr()


def test_a_start_takes_three_round_trips(
    make_settings: MakeSettings, database: OwnPostgres
) -> None:
    """Two make the connection, one asks for everything."""
    with database.new_database(schema=True) as url, Relay(database.port) as relay:
        settings = make_settings(neon_db_url=relay.url(url))
        todo.with_database(settings, todo.require_table, 5.0, 5.0)
        assert relay.round_trips <= 3


def test_a_statement_timeout_that_is_too_short_is_named(
    serve: Serve, database: OwnPostgres
) -> None:
    with database.new_database(schema=True) as url:
        database.set_default(url, "statement_timeout", "'1ms'")
        servers = [
            serve(database_url=url, args=(name,), files=ALL_FILES, wait=False) for name in COMMANDS
        ]
        for server in servers[:2]:
            assert_refused(server, "statement timeout", "statement_timeout")
        assert servers[2].wait() == 1
        assert "statement_timeout" in servers[2].stdout()
        assert "Traceback" not in servers[2].stderr()


def test_init_db_on_a_standby_leaves_no_traceback(serve: Serve, database: OwnPostgres) -> None:
    with database.new_database() as url:
        database.set_default(url, "default_transaction_read_only", "on")
        refused = serve(database_url=url, args=("init-db",), files=ALL_FILES, wait=False)
        assert_refused(refused, "cannot go on", "in a read-only transaction")


@pytest.fixture(scope="module", autouse=True)
def waiting(database: OwnPostgres) -> Iterator[dict[str, Server]]:
    """Starts that wait for a while; begun early."""
    database.execute("create role without_room login connection limit 0")
    with servers("") as serve, OwnPostgres() as ending, psycopg.connect(ending.url) as last:
        assert ending.process is not None
        ending.process.terminate()  # a smart shutdown: it waits for the last connection

        def shuts_down() -> bool:
            try:
                psycopg.connect(ending.url).close()
            except psycopg.OperationalError as exc:
                return "shutting down" in str(exc)
            return False

        eventually(shuts_down)
        crowded = database.url.replace("postgres@", "without_room@")
        yield {
            "too many connections for role": serve(database_url=crowded, wait=False),
            "the database system is shutting down": serve(database_url=ending.url, wait=False),
        }
        last.close()


def test_the_roots_of_the_system_are_those_that_python_uses(
    monkeypatch: pytest.MonkeyPatch, make_settings: MakeSettings
) -> None:
    """psycopg's wheel looks in a folder that no system has (docker-library/postgres 1331)."""
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
    nobody = f"postgresql://u@127.0.0.1:{free_port()}/u?sslmode=verify-full&sslrootcert=system"
    with pytest.raises(todo.StartupError):
        todo.with_database(make_settings(neon_db_url=nobody), print, grace=1.0, patience=0.0)
    roots = ssl.get_default_verify_paths()
    assert os.environ.pop("SSL_CERT_FILE") == roots.openssl_cafile
    assert os.environ.pop("SSL_CERT_DIR") == roots.openssl_capath


@pytest.fixture(scope="module")
def guarded(database: OwnPostgres) -> str:
    """URL of a server that asks one role for its password."""
    database.execute("create role guarded login password 'right'")
    [(place,)] = database.execute("show hba_file")
    rules = Path(place)
    rules.write_text(f"host all guarded all scram-sha-256\n{rules.read_text()}")
    database.execute("select pg_reload_conf()")
    eventually(lambda: database.execute("select count(*) from pg_hba_file_rules")[0][0] > 1)
    return database.url


# The table

OLDER = {
    "SQLModel's": """
        create table tasks (id serial primary key, user_id varchar not null, title varchar not null,
            description varchar(1000), completed boolean not null,
            created_at timestamp not null, updated_at timestamp not null);
        insert into tasks (user_id, title, completed, created_at, updated_at)
            values ('demo', 'Old', true, '2024-01-02 03:04:05', '2024-01-02 03:04:05')""",
    "nullable": """
        create table tasks (id bigserial primary key, user_id text not null, title text,
            description text, completed boolean, created_at timestamp default now(),
            updated_at timestamp default timezone('utc', now()), more text not null);
        insert into tasks (user_id, title, created_at, more)
            values ('demo', 'Old', '2024-01-02 03:04:05', '')""",
    "without keys": """
        create table tasks (id bigint, user_id text, title text, description text,
            completed boolean, created_at timestamptz, updated_at timestamptz);
        insert into tasks values (-1, 'demo', 'Old', null, null, '2024-01-02 03:04:05 Z', null)""",
    "half": """
        create table tasks (id int generated always as identity primary key, user_id text not null,
            title text not null, "order" int not null, completed smallint not null default 0,
            created_at timestamp not null default now());
        insert into tasks (user_id, title, "order", completed, created_at)
            values ('demo', 'Old', 1, 1, '2024-01-02 03:04:05')""",
}


def lines_of(faults: list[str]) -> list[str]:
    """The SQL that they propose."""
    return [fault.partition(": ")[2] for fault in faults if fault.endswith(";")]


LOGINS = {
    "a wrong password": ("//guarded:wrong@", None, "password authentication failed"),
    "no password": ("//guarded@", None, "no password supplied"),
    "no such role": ("//nobody-here@", None, 'role "nobody-here" does not exist'),
    "no such database": ("//postgres@", "nothing-here", 'database "nothing-here" does not exist'),
    "no TLS": ("//postgres@", "postgres?sslmode=require", "server does not support SSL"),
}


@pytest.mark.parametrize(("login", "other", "said"), LOGINS.values(), ids=LOGINS)
def test_what_waiting_does_not_mend_is_said_at_once(
    guarded: str, make_settings: MakeSettings, login: str, other: str | None, said: str
) -> None:
    """With what mends it."""
    mend = "Are the user, the password and the name of the database in NEON_DB_URL right?"
    if "SSL" in said:
        mend = "Take sslmode off NEON_DB_URL, or switch TLS on in the server."
    url = guarded.replace("//postgres@", login)
    if other:
        url = f"{url.rpartition('/')[0]}/{other}"
    begun = time.monotonic()
    with pytest.raises(todo.StartupError, match=said) as refused:
        todo.with_database(make_settings(neon_db_url=url), print, grace=1.0, patience=10.0)
    assert time.monotonic() - begun < 2
    what, hint = str(refused.value).splitlines()
    assert what.startswith("todo.py cannot go on: the database of NEON_DB_URL cannot be used (")
    assert hint == mend
    assert "wrong" not in what


@pytest.mark.parametrize("case", OLDER)
def test_an_older_table_is_mended_by_the_lines_that_the_start_prints(
    serve: Serve, postgres: Postgres, empty_database: str, case: str
) -> None:
    """All at once; and init-db leaves the table as it is."""
    postgres.execute(f"set timezone = 'Asia/Tokyo'; {OLDER[case]}", database_url=empty_database)
    started = serve(database_url=empty_database, wait=False)
    made = serve(database_url=empty_database, args=("init-db",), files=ALL_FILES, wait=False)
    assert_refused(started, "alter table public.tasks")
    assert_refused(made, "alter table public.tasks")
    assert made.stderr() == started.stderr()
    for line in lines_of(started.stderr().splitlines()):
        postgres.execute(f"set timezone = 'Asia/Tokyo'; {line}", database_url=empty_database)
    again = serve(database_url=empty_database, args=("init-db",), files=ALL_FILES, wait=False)
    assert again.wait() == 0, again.stderr()
    with psycopg.connect(empty_database, autocommit=True) as connection:
        todo.try_table(connection, "demo")
        [row] = connection.execute("select title, created_at at time zone 'UTC' from tasks")
    assert [str(value) for value in row] == ["Old", "2024-01-02 03:04:05"]


SERVING = {
    "integer ids, text columns, a foreign key, no index": """
        create table users (id text primary key); insert into users values ('demo');
        create table tasks (id serial primary key, user_id text not null references users,
            title text not null, description varchar(1000),
            completed boolean not null default false,
            created_at timestamptz not null default now(),
            updated_at timestamptz(3) not null default now())""",
    "partitions": """
        create table tasks (id bigint generated always as identity, user_id text not null,
            title text not null, description text, completed boolean not null default false,
            created_at timestamptz not null default now(),
            updated_at timestamptz not null default now(), primary key (user_id, id))
            partition by hash (user_id);
        create table tasks_0 partition of tasks for values with (modulus 2, remainder 0);
        create table tasks_1 partition of tasks for values with (modulus 2, remainder 1)""",
    "more columns": """
        create table tasks (id bigserial primary key, user_id varchar(255) not null, title text not
            null, description text, completed boolean not null default false, "more" text, due date
            not null default now(), created_at timestamptz not null default now(),
            updated_at timestamptz not null default now())""",
}


@pytest.mark.parametrize("table", SERVING.values(), ids=SERVING)
def test_a_table_that_serves_is_taken_as_it_is(
    postgres: Postgres, empty_database: str, table: str
) -> None:
    """And the indexes that `check` proposes can be made."""
    postgres.execute(table, database_url=empty_database)
    with psycopg.connect(empty_database, autocommit=True) as connection:
        found, faults = todo.examine_table(connection)
        assert faults == []
        todo.try_table(connection, "demo")
        for line in todo.missing_indexes(found):
            connection.execute(line.encode())
        assert todo.missing_indexes(todo.examine_table(connection)[0]) == []
        assert connection.execute("select count(*) from tasks").fetchone() == (0,)


def test_all_faults_of_a_table_are_said_at_once(postgres: Postgres, fresh_database: str) -> None:
    postgres.execute(
        "alter table tasks alter created_at type timestamp, drop description, drop completed,"
        " alter title drop not null, alter id drop identity",
        database_url=fresh_database,
    )
    with psycopg.connect(fresh_database, autocommit=True) as connection:
        _, faults = todo.examine_table(connection)
    assert faults[0] == "PostgreSQL says: column tasks.description does not exist"
    table = "alter table public.tasks"
    assert dict(fault.split(": ", 1) for fault in faults[1:]) == {
        "column id is not filled in by the database": (
            f"{table} alter id add generated by default as identity;"
        ),
        "column title may be null": (
            "update public.tasks set title = 'n/a' where title is null;"
            f" {table} alter title set not null;"
        ),
        "column description is missing": f"{table} add description text;",
        "column completed is missing": f"{table} add completed boolean default false not null;",
        "column created_at is timestamp without time zone": (
            f"{table} alter created_at drop default, alter created_at"
            " type timestamptz using created_at at time zone 'UTC',"
            " alter created_at set default current_timestamp;"
        ),
    }


def test_the_lines_name_the_schema_so_its_owner_needs_no_search_path(
    postgres: Postgres, fresh_database: str
) -> None:
    postgres.execute(
        'create schema "My"; alter table tasks set schema "My";'
        ' drop index "My".tasks_user_id_idx;'
        ' alter table "My".tasks drop title, alter user_id drop not null;'
        ' insert into "My".tasks (user_id) values (null)',
        database_url=fresh_database,
    )
    searched = f"{fresh_database}?options=-c%20search_path%3D%22My%22"
    with (
        psycopg.connect(searched, autocommit=True) as service,
        psycopg.connect(fresh_database, autocommit=True) as owner,
    ):
        found, faults = todo.examine_table(service)
        for line in [*lines_of(faults), *todo.missing_indexes(found)]:
            owner.execute(line.encode())
        found, faults = todo.examine_table(service)
        assert (faults, todo.missing_indexes(found)) == ([], [])
        assert service.execute("select user_id, title from tasks").fetchone() == ("n/a", "n/a")
    assert not todo.USER_ID.fullmatch("n/a")


HIDDEN = {
    "in a schema that is not searched": (
        'grant usage on schema hidden to "To"',
        'alter role "To" set search_path = hidden, public;',
    ),
    "in a schema that the role may not use": (
        'alter role "To" set search_path = hidden',
        'grant usage on schema hidden to "To";',
    ),
}


@pytest.mark.parametrize(("made", "line"), HIDDEN.values(), ids=HIDDEN)
def test_a_table_that_the_role_does_not_see_is_named_with_the_way_to_it(
    database: OwnPostgres, made: str, line: str
) -> None:
    """`init-db` would make a second one, or not be allowed to."""
    url = database.create_database(schema=True)
    database.execute(
        'create role "To" login;'
        " create schema hidden; alter table tasks set schema hidden;"
        f' grant select, insert, update, delete on hidden.tasks to "To"; {made}',
        database_url=url,
    )
    with psycopg.connect(url.replace("//postgres@", "//To@"), autocommit=True) as connection:
        faults = todo.examine_table(connection)[1]
    assert faults[1:] == [
        f"the role does not see a table tasks; if it is this: {line}",
        "to make the table: .venv/bin/python todo.py init-db",
    ]
    database.execute(line, database_url=url)
    with psycopg.connect(url.replace("//postgres@", "//To@"), autocommit=True) as connection:
        assert todo.examine_table(connection)[1] == []
    database.execute('drop owned by "To"; drop role "To"', database_url=url)


def test_what_a_start_knows_of_the_table_is_what_the_code_has(
    postgres: Postgres, empty_database: str
) -> None:
    """The lines for a table without columns make that of schema.sql, but for its constraints."""
    with psycopg.connect(empty_database, autocommit=True) as connection:
        connection.execute("create table tasks ()")
        _, faults = todo.examine_table(connection)
        for line in lines_of(faults):
            connection.execute(line.encode())
        found, faults = todo.examine_table(connection)
        assert faults == []
        todo.try_table(connection, "demo")
        columns = connection.execute(COLUMNS).fetchall()
        indexes = {" ".join(line.split()[3:]) for line in todo.missing_indexes(found)}
        connection.execute(f"drop table tasks; {SCHEMA}".encode())
        assert sorted(connection.execute(COLUMNS)) == sorted(columns)
    ours = {str(each.name): ", ".join(each.columns.keys()) for each in todo.tasks.indexes}
    assert indexes == {f"{name} on public.tasks ({columns});" for name, columns in ours.items()}


COLUMNS = """
    select column_name, data_type, character_maximum_length, is_nullable, column_default,
        is_identity, identity_generation
    from information_schema.columns where table_name = 'tasks'"""


# Last, because it takes its time


@pytest.mark.parametrize(
    "said", ["too many connections for role", "the database system is shutting down"]
)
def test_a_database_that_takes_no_connection_is_waited_for(
    waiting: dict[str, Server], said: str
) -> None:
    begun = time.monotonic()
    assert_refused(waiting[said], "NEON_DB_URL cannot be reached", said)
    assert time.monotonic() - begun < 20
