"""The command line: start-up, deployment of the one file, init-db, token, dev, uvicorn."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import jwt
import psycopg
import pytest

from todo_tests.support import (
    ROOT,
    SECRET,
    Database,
    Serve,
    Server,
    assert_error,
    assert_task,
    bearer,
    eventually,
    free_port,
    path_of,
    plain_environment,
    servers,
)

ALL_FILES = ("todo.py", "schema.sql", "openapi.yaml", "requirements.txt", ".env.example")
PASSWORD = "hunter2-is-the-password"
NO_SETTINGS = {"NEON_DB_URL": None, "BETTER_AUTH_SECRET": None, "BETTER_AUTH_URL": None}


@pytest.fixture
def empty_database(postgres: Database) -> Iterator[str]:
    """A database without the table."""
    url = postgres.create_database()
    yield url
    postgres.drop_database(url)


def assert_refused(server: Server, *words: str, within: float = 30.0) -> None:
    """It ended with exit code 1 and one message that has the words, no secret and no traceback."""
    assert server.wait(within) == 1
    message = server.stderr()
    assert not [word for word in words if word not in message], message
    assert not [bad for bad in ("Traceback", SECRET, PASSWORD) if bad in message], message


# Start-up


@pytest.fixture(scope="module", autouse=True)
def unreachable(postgres: Database) -> Iterator[dict[str, Server]]:
    """Starts without a database; begun early, because each waits for it for a while."""
    urls = {
        "nobody listens": f"postgresql://user:{PASSWORD}@127.0.0.1:{free_port()}/todo",
        "no such host": f"postgresql://user:{PASSWORD}@database.invalid/todo",
        "no such database": re.sub(r"/[^/?]+(\?|$)", r"/no_such_database\1", postgres.url),
    }
    with servers("") as serve:
        yield {name: serve(database_url=url, wait=False) for name, url in urls.items()}


def test_a_start_without_the_table_is_refused(serve: Serve, empty_database: str) -> None:
    """Design 2: and the message says how to apply `schema.sql`."""
    assert_refused(serve(database_url=empty_database, wait=False), "schema.sql", "init-db")


@pytest.mark.parametrize("column", ["completed", "description", "updated_at"])
def test_a_start_with_a_column_missing_is_refused(
    serve: Serve, postgres: Database, empty_database: str, column: str
) -> None:
    """Design 2."""
    schema = (ROOT / "schema.sql").read_text("utf-8")
    drop = f"alter table tasks drop column {column} cascade"
    postgres.execute(f"{schema}; {drop}", database_url=empty_database)
    server = serve(database_url=empty_database, wait=False)
    assert_refused(server, column, "schema.sql", "init-db")


@pytest.mark.parametrize("command", ["serve", "init-db"])
@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_a_database_that_cannot_hold_every_title_is_refused(
    serve: Serve, postgres: Database, encoding: str, command: str
) -> None:
    """Design 2: though the table is there; and `init-db` makes none."""
    url = postgres.create_database(schema=command == "serve", encoding=encoding)
    server = serve(database_url=url, args=(command,), files=ALL_FILES, wait=False)
    assert_refused(server, encoding, "UTF8", within=10.0)
    assert len(server.stderr().splitlines()) <= 3
    tables = "select count(*) from pg_tables where tablename = 'tasks'"
    assert postgres.execute(tables, database_url=url) == [(command == "serve",)]
    postgres.drop_database(url)


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
    assert httpx.get(server.url + path_of(user), headers=headers).json() == [task]


def test_init_db_may_run_several_times_at_once(
    serve: Serve, postgres: Database, empty_database: str
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


def test_init_db_is_one_transaction(serve: Serve, postgres: Database, empty_database: str) -> None:
    """Design 2: what fails half-way leaves nothing behind."""
    postgres.execute("create table tasks (id int, user_id text)", database_url=empty_database)
    assert_refused(init_db(serve, empty_database), "schema.sql", "completed")
    indexes = "select indexname from pg_indexes where tablename = 'tasks'"
    assert postgres.execute(indexes, database_url=empty_database) == []


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
        response = httpx.get(server.url + path_of(name), headers=headers)
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


# dev


def printed(server: Server) -> str:
    """What `dev` has printed, once it serves."""
    server.wait_until_it_serves()
    text: str = eventually(lambda: "curl" in server.stdout() and server.stdout(), within=10)
    return text


def token_in(text: str) -> dict[str, str]:
    """The Authorization header with the token that was printed."""
    [token] = set(re.findall(r"eyJ[\w-]+\.[\w-]+\.[\w-]+", text))
    return {"Authorization": f"Bearer {token}"}


def postgres_folder(server: Server) -> list[str]:
    """The pid files of PostgreSQL servers below its data folder."""
    return [str(path) for path in (server.folder / ".todo-dev").rglob("postmaster.pid")]


def interrupt(server: Server) -> int:
    """Ctrl-C: the terminal signals the whole foreground group. The exit code."""
    os.killpg(server.process.pid, signal.SIGINT)
    return server.wait()


@pytest.mark.skipif(not shutil.which("curl"), reason="the lines to paste need curl")
def test_dev_serves_with_nothing_configured_and_loses_nothing(serve: Serve) -> None:
    """Design 2: a real PostgreSQL, lines that work as pasted, Ctrl-C, and a second start."""
    port = str(free_port())
    first = serve({**NO_SETTINGS, "PORT": port}, args=("dev",), files=ALL_FILES, wait=False)
    text = printed(first)
    assert first.url in text
    assert f"{first.url}/docs" in text
    headers = token_in(text)
    tasks = first.url + path_of("demo")
    kept = httpx.post(tasks, json={"title": "Kept"}, headers=headers).json()
    assert_task(kept, user_id="demo", title="Kept")

    lines = [line for line in text.split("\n") if re.match(r"\s*([A-Z]+=|curl )", line)]
    bash = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(lines)],
        cwd=first.folder,
        env=plain_environment(),
        capture_output=True,
        check=False,
        text=True,
        timeout=30,
    )
    assert (bash.returncode, bash.stderr) == (0, "")
    log = first.stderr().partition(" POST /api/demo/tasks 201 ")[2]
    requests = re.findall(r" (GET|POST|PUT|PATCH|DELETE) /api/demo/tasks\S* (\d+) ", log)
    assert {("POST", "201"), ("GET", "200"), ("PUT", "200"), ("PATCH", "200")} < set(requests)
    assert ("DELETE", "204") in requests
    assert not [request for request in requests if request[1] >= "400"]
    assert re.search(r" GET /api/demo/tasks/\d+ 200 ", log), "no line reads one task"
    assert bash.stdout.count('"user_id":"demo"') >= 4
    assert httpx.get(tasks, headers=headers).json() == [kept]

    assert len(postgres_folder(first)) == 1
    assert interrupt(first) in {0, 130}
    assert postgres_folder(first) == [], "PostgreSQL was not stopped cleanly"
    assert "Traceback" not in first.stderr()

    second = serve(
        {**NO_SETTINGS, "PORT": port}, args=("dev",), files=(), folder=first.folder, wait=False
    )
    again = printed(second)
    assert httpx.get(tasks, headers=headers).json() == [kept]
    assert httpx.get(tasks, headers=token_in(again)).json() == [kept]
    second.stop(signal.SIGTERM)
    assert postgres_folder(second) == []
    secret_files = [
        path
        for path in (second.folder / ".todo-dev").iterdir()
        if path.is_file() and "secret" in path.name
    ]
    assert [oct(path.stat().st_mode & 0o077) for path in secret_files] == ["0o0"]


def test_what_is_set_in_the_environment_wins_over_dev(
    serve: Serve, empty_database: str, user: str
) -> None:
    """Design 2: a real frontend's secret, or a database of one's own."""
    origin = "https://frontend.example"
    server = serve(
        {"ALLOWED_ORIGINS": origin, "BETTER_AUTH_URL": None},
        database_url=empty_database,
        args=("dev",),
        files=ALL_FILES,
        wait=False,
    )
    text = printed(server)
    assert server.url in text
    assert "runs on NEON_DB_URL" in text
    response = httpx.get(server.url + path_of(user), headers={**bearer(user), "Origin": origin})
    assert (response.status_code, response.json()) == (200, [])
    assert response.headers["access-control-allow-origin"] == origin
    claims = jwt.decode(token_in(text)["Authorization"][7:], SECRET, algorithms=["HS256"])
    assert claims["sub"] == "demo"
    assert postgres_folder(server) == []
    assert SECRET not in text + server.stderr()
    assert interrupt(server) in {0, 130}


def test_dev_refuses_faulty_variables_like_any_start(serve: Serve) -> None:
    server = serve(
        {"NEON_DB_URL": None, "BETTER_AUTH_SECRET": "short", "PORT": "http"},
        args=("dev",),
        files=ALL_FILES,
        wait=False,
    )
    assert_refused(server, "BETTER_AUTH_SECRET", "PORT")
    assert postgres_folder(server) == []


# uvicorn


@pytest.mark.parametrize(
    "args",
    [
        pytest.param(("todo:app",), id="todo:app"),
        pytest.param(("--factory", "todo:create_app"), id="--factory todo:create_app"),
    ],
)
def test_uvicorn_serves_the_app_from_the_environment(
    serve: Serve, user: str, args: tuple[str, ...]
) -> None:
    """Design 2."""
    port = free_port()
    command = (sys.executable, "-m", "uvicorn", *args, "--port", str(port))
    server = serve({"PORT": None}, command=command, wait=False)
    server.wait_for(f"http://127.0.0.1:{port}")
    headers = {**bearer(user), "X-Request-ID": user}
    response = httpx.get(f"http://127.0.0.1:{port}{path_of(user)}", headers=headers)
    assert (response.status_code, response.json()) == (200, [])
    server.log_lines(f"request={user} ")
    server.stop()
    assert "Traceback" not in server.stderr()


@pytest.mark.parametrize("args", [("todo:app",), ("--factory", "todo:create_app")], ids=len)
def test_uvicorn_without_an_environment_is_refused_by_name(
    serve: Serve, args: tuple[str, ...]
) -> None:
    command = (sys.executable, "-m", "uvicorn", *args)
    server = serve({"BETTER_AUTH_URL": None, "PORT": None}, command=command, wait=False)
    assert server.wait() != 0
    assert "BETTER_AUTH_URL" in server.stderr()
    assert SECRET not in server.stderr()


def test_a_plain_import_needs_no_environment(serve: Serve) -> None:
    """Design 2: `app` is built when it is first asked for."""

    def run(code: str) -> Server:
        return serve(NO_SETTINGS, command=(sys.executable, "-c", code), wait=False)

    plain = run("import todo; print(todo.create_app.__name__, hasattr(todo, 'nothing'))")
    asked = run("from todo import app")
    assert (plain.wait(), plain.stdout(), plain.stderr()) == (0, "create_app False\n", "")
    assert_refused(asked, "NEON_DB_URL", "BETTER_AUTH_SECRET", "BETTER_AUTH_URL")


# Last, because it takes its time


@pytest.mark.parametrize("case", ["nobody listens", "no such host", "no such database"])
def test_a_start_without_a_database_is_refused(unreachable: dict[str, Server], case: str) -> None:
    """Edge case: Database Connection Failure, at start. It waits up to 10 s, and says so."""
    server = unreachable[case]
    assert_refused(server, "NEON_DB_URL", "cannot be reached")
    assert " WARNING " in server.stderr()
    assert "waiting" in server.stderr()
