"""The command line: start-up, deployment of the one file, init-db, token."""

import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import jwt
import psycopg
import pytest

import todo
from todo_tests.support import (
    ALL_FILES,
    LOCKED_TABLE,
    NO_SETTINGS,
    PASSWORD,
    SCHEMA,
    SECRET,
    NewPostgres,
    OwnPostgres,
    Postgres,
    Relay,
    Serve,
    Server,
    assert_error,
    assert_refused,
    assert_task,
    bearer,
    eventually,
    free_port,
    get,
    path_of,
    servers,
)

pytestmark = pytest.mark.slow


# Start-up


@pytest.fixture(scope="module", autouse=True)
def unreachable() -> Iterator[dict[str, Server]]:
    """Starts without a database; begun early, because each waits for it for a while."""
    urls = {
        "nobody listens": f"postgresql://user:{PASSWORD}@127.0.0.1:{free_port()}/todo",
        "no such host": f"postgresql://user:{PASSWORD}@database.invalid/todo",
    }
    with servers("") as serve:
        yield {name: serve(database_url=url, wait=False) for name, url in urls.items()}


def test_a_start_without_the_table_is_refused(serve: Serve, empty_database: str) -> None:
    """Design 2: and the message says what makes it, and nothing else."""
    refused = serve(database_url=empty_database, wait=False)
    assert_refused(refused)
    assert refused.stderr().splitlines() == [
        "todo.py cannot work with the table tasks:",
        '  PostgreSQL says: relation "tasks" does not exist',
        "  to make the table: .venv/bin/python todo.py init-db",
    ]


@pytest.mark.parametrize("column", ["completed", "description", "updated_at"])
def test_a_start_with_a_column_missing_is_refused(
    serve: Serve, postgres: Postgres, fresh_database: str, column: str
) -> None:
    """Design 2."""
    drop = f"alter table tasks drop column {column} cascade"
    postgres.execute(drop, database_url=fresh_database)
    server = serve(database_url=fresh_database, wait=False)
    assert_refused(server, f"alter table public.tasks add {column} ")
    assert "init-db" not in server.stderr()


@pytest.mark.parametrize("command", ["serve", "init-db"])
@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_a_database_that_cannot_hold_every_title_is_refused(
    serve: Serve, postgres: Postgres, encoding: str, command: str
) -> None:
    """Design 2: though the table is there; and `init-db` makes none."""
    with postgres.new_database(schema=command == "serve", encoding=encoding) as url:
        server = serve(database_url=url, args=(command,), files=ALL_FILES, wait=False)
        assert_refused(server, encoding, "UTF8", within=10.0)
        assert len(server.stderr().splitlines()) <= 3
        tables = "select 1 from pg_tables where tablename = 'tasks'"
        assert len(postgres.execute(tables, database_url=url)) == (command == "serve")


def test_the_one_file_alone_in_an_empty_folder_serves(serve: Serve, user: str) -> None:
    """Design 1: no other file of the project is needed at run time."""
    server = serve(files=("todo.py",))
    with httpx.Client(base_url=server.url, headers=bearer(user)) as client:
        created = client.post(path_of(user), json={"title": "x", "description": "y"})
        task = created.json()
        assert_task(task, user_id=user, title="x", description="y")
        assert client.get(path_of(user)).json() == [task]
        location = created.headers["location"]
        assert client.put(location, json={"title": "z"}).json()["title"] == "z"
        assert client.patch(f"{location}/complete").json()["completed"] is True
        assert client.delete(location).status_code == 204
        assert_error(client.get(location), "TASK_NOT_FOUND")
        assert client.get("/readyz").json() == {"status": "ready"}
    assert server.stop() == 0
    assert {path.name for path in server.folder.iterdir()} == {"todo.py", "stdout", "stderr"}


# init-db


def init_db(serve: Serve, url: str) -> Server:
    files = ("todo.py", "schema.sql")
    return serve(database_url=url, args=("init-db",), files=files, wait=False)


def test_init_db_makes_the_table_and_is_harmless_when_repeated(
    serve: Serve, empty_database: str, user: str
) -> None:
    first = init_db(serve, empty_database)
    assert first.wait() == 0, first.stderr()
    server = serve(database_url=empty_database)
    headers = bearer(user)
    task = httpx.post(server.url + path_of(user), json={"title": "Kept"}, headers=headers).json()
    again = init_db(serve, empty_database)
    assert again.wait() == 0, again.stderr()
    assert get(server.url + path_of(user), headers=headers).json() == [task]


def test_init_db_may_run_several_times_at_once(
    serve: Serve, postgres: Postgres, empty_database: str
) -> None:
    """Design 2: harmless also by two at once; all begin while a lock holds them up."""
    waiting = "select count(*) from pg_stat_activity where wait_event_type = 'Lock'"
    started: list[Server] = []
    with psycopg.connect(empty_database) as connection:
        connection.execute("create table tasks (id int)")  # not committed: its name is taken
        started += [init_db(serve, empty_database) for _ in range(4)]
        eventually(lambda: postgres.execute(waiting)[0][0] >= 4, why="they do not wait")
        connection.rollback()
    assert [each.wait() for each in started] == [0] * 4, [each.stderr() for each in started]
    [[tables]] = postgres.execute(
        "select count(*) from pg_class where relname = 'tasks'", database_url=empty_database
    )
    assert tables == 1


def test_init_db_is_one_transaction(serve: Serve, postgres: Postgres, empty_database: str) -> None:
    """Design 2: what fails half-way leaves nothing behind."""
    postgres.execute("create table tasks (id int, user_id text)", database_url=empty_database)
    refused = init_db(serve, empty_database)
    assert_refused(refused, "completed")
    indexes = "select indexname from pg_indexes where tablename = 'tasks'"
    assert postgres.execute(indexes, database_url=empty_database) == []


def test_init_db_fails_beside_an_old_table_and_says_what_differs(
    serve: Serve, postgres: Postgres, fresh_database: str
) -> None:
    """As the start says it; nothing of the table is touched."""
    damage = "alter table tasks drop column description; drop index tasks_user_id_idx"
    postgres.execute(damage, database_url=fresh_database)
    refused = init_db(serve, fresh_database)
    assert_refused(refused)
    assert refused.stderr().splitlines()[1:] == [
        "  PostgreSQL says: column tasks.description does not exist",
        "  column description is missing: alter table public.tasks add description text;",
    ]
    assert refused.stdout() == ""
    indexes = "select from pg_indexes where indexname = 'tasks_user_id_idx'"
    assert postgres.execute(indexes, database_url=fresh_database) == []


def test_init_db_of_a_role_that_owns_nothing_names_the_owners_command(
    serve: Serve, own_postgres: NewPostgres
) -> None:
    """Design 2: beside a right table it has nothing to do."""
    postgres = own_postgres()
    postgres.execute("create role todo login; create role boss")
    url = postgres.create_database()
    postgres.execute(f"alter database {url.rpartition('/')[2]} owner to boss")
    theirs = url.replace("//postgres@", "//todo@")
    refused = init_db(serve, theirs)
    assert_refused(refused, "permission denied for schema public")
    command = (
        r"As its owner: NEON_DB_URL='postgresql://boss:PASSWORD@127.0.0.1:\d+/\w+'"
        r" \.venv/bin/python todo\.py init-db"
    )
    assert re.search(command, refused.stderr())
    assert init_db(serve, url).wait() == 0
    grant = "grant select, insert, update, delete on tasks to todo"
    postgres.execute(grant, database_url=url)
    again = init_db(serve, theirs)
    assert again.wait() == 0, again.stderr()
    postgres.execute("drop index tasks_user_id_idx, tasks_user_id_completed_idx", database_url=url)
    assert_refused(init_db(serve, theirs), "As its owner", "postgresql://postgres:PASSWORD@")


def test_init_db_without_its_file_or_settings_says_so(serve: Serve, empty_database: str) -> None:
    alone = serve(database_url=empty_database, args=("init-db",), wait=False)
    unset = serve({"NEON_DB_URL": None}, args=("init-db",), files=ALL_FILES, wait=False)
    assert_refused(alone, "schema.sql")
    assert_refused(unset, "NEON_DB_URL")


# token


def test_token_prints_a_token_that_works(serve: Serve, user: str) -> None:
    """Design 2: one line for curl and tools; BETTER_AUTH_SECRET is enough."""
    secret_alone = {**NO_SETTINGS, "BETTER_AUTH_SECRET": SECRET}
    names = (user, "auth0|1", "Zoë @ 日本")
    printed = [serve(secret_alone, args=("token", name), wait=False) for name in names]
    server = serve()
    for name, command in zip(names, printed, strict=True):
        assert command.wait() == 0, command.stderr()
        token = command.stdout().removesuffix("\n")
        assert re.fullmatch(r"[\w-]+\.[\w-]+\.[\w-]+", token)
        headers = {"Authorization": f"Bearer {token}"}
        response = get(server.url + path_of(name), headers=headers)
        assert (response.status_code, response.json()) == (200, [])
        assert jwt.get_unverified_header(token)["alg"] == "HS256"


def test_the_life_of_a_token_is_chosen_by_ttl(serve: Serve) -> None:
    command = serve(args=("token", "u", "--ttl", "90"), wait=False)
    assert command.wait() == 0, command.stderr()
    claims = jwt.decode(command.stdout().strip(), SECRET, algorithms=["HS256"])
    assert claims["sub"] == "u"
    assert abs(claims["exp"] - time.time() - 90) < 30
    assert claims["exp"] - claims["iat"] == 90


def test_wrong_use_of_the_command_line_is_explained(serve: Serve) -> None:
    """Usage errors end with exit code 2, faulty settings with 1; neither shows a secret."""
    user = serve(args=("token", "a/b"), wait=False)
    wrong = [("token",), ("token", "u", "--ttl", "soon"), ("nonsense",), ("--nonsense",)]
    commands = [serve(args=args, wait=False) for args in wrong]
    weak = serve({"BETTER_AUTH_SECRET": "weak-but-secret"}, args=("token", "u"), wait=False)
    helped = serve(NO_SETTINGS, args=("--help",), wait=False)
    for command in commands:
        assert command.wait() == 2
        assert command.stderr().startswith("usage:")
    assert user.wait() == 1
    assert user.stderr().startswith("User id must be")
    assert_refused(weak, "BETTER_AUTH_SECRET")
    assert "weak-but-secret" not in weak.stderr()
    assert helped.wait() == 0
    assert all(name in helped.stdout() for name in ("dev", "init-db", "token"))


# Import


def test_a_plain_import_needs_no_environment(serve: Serve) -> None:
    """Design 2: tests and tools import `todo`; nothing is made but by `create_app(settings)`."""
    code = "import todo; print(todo.create_app.__name__, hasattr(todo, 'app'))"
    plain = serve(NO_SETTINGS, command=(sys.executable, "-c", code), wait=False)
    assert (plain.wait(), plain.stdout(), plain.stderr()) == (0, "create_app False\n", "")


# Last, because it takes its time


@pytest.mark.parametrize("case", ["nobody listens", "no such host"])
def test_a_start_without_a_database_is_refused(unreachable: dict[str, Server], case: str) -> None:
    """Edge case: Database Connection Failure, at start. It waits up to 10 s, and says so."""
    server = unreachable[case]
    assert_refused(server, "NEON_DB_URL", "cannot be reached")
    assert " WARNING " in server.stderr()
    assert "waiting" in server.stderr()


def test_a_database_that_falls_silent_ends_a_command(
    monkeypatch: pytest.MonkeyPatch,
    make_settings: Callable[..., todo.Settings],
    local_postgres: OwnPostgres,
) -> None:
    """As behind a pooler whose database is away; nothing cancels what nobody hears."""
    monkeypatch.setattr(todo, "CONNECT_GRACE", 0.5)
    monkeypatch.setattr(todo, "ANSWER_GRACE", 0.5)
    begun = time.monotonic()
    with (
        local_postgres.new_database(schema=True) as url,
        Relay(local_postgres.port, until=1) as relay,
    ):
        settings = make_settings(neon_db_url=relay.url(url))
        with pytest.raises(todo.StartupError, match="cannot be reached"):
            todo.with_database(settings, todo.require_table, 0.5, 0.5)
        findings = {subject: level for level, subject, _ in todo.check(settings, b"")}
    assert (findings["settings"], findings["database"]) == (todo.OK, todo.FAIL)
    assert time.monotonic() - begun < 10.0


def test_init_db_has_time_for_the_index_of_a_large_table(
    monkeypatch: pytest.MonkeyPatch,
    make_settings: Callable[..., todo.Settings],
    empty_database: str,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(todo, "ANSWER_GRACE", 2.0)
    monkeypatch.setattr(todo, "LOCK_LIMIT", b"select set_config('lock_timeout', '100ms', true);")
    monkeypatch.setattr(todo, "HERE", tmp_path)
    (tmp_path / "schema.sql").write_text(f"select pg_sleep(3); {SCHEMA}")
    settings = make_settings(neon_db_url=empty_database)
    todo.init_db(settings)
    with psycopg.connect(empty_database) as other:
        other.execute(LOCKED_TABLE)
        with pytest.raises(
            todo.StartupError, match=r"lock timeout\nHas another session locked the table"
        ):
            todo.with_database(settings, todo.require_table, 2.0, 0.5)
