"""`python todo.py dev`: the first minute of somebody new, on any folder and as any user."""

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import jwt
import psutil
import psycopg
import pytest

from todo_tests.support import (
    ALL_FILES,
    NO_SETTINGS,
    ROOT,
    SECRET,
    Serve,
    Server,
    assert_refused,
    assert_task,
    bearer,
    eventually,
    free_port,
    get,
    interrupt,
    path_of,
    plain_environment,
    servers,
)

pytestmark = pytest.mark.slow

Dev = Callable[..., Server]
CREATING = "Creating a database, once"


@pytest.fixture(scope="module")
def used() -> Iterator[Path]:
    """A folder in which `dev` has made its database, and ended."""
    with servers("") as serve:
        server = serve(NO_SETTINGS, args=("dev",), files=ALL_FILES, wait=False)
        printed(server)
        assert interrupt(server) == 0
        yield server.folder


@pytest.fixture
def dev(serve: Serve, used: Path, tmp_path: Path) -> Iterator[Dev]:
    """A factory of `python todo.py dev` with nothing configured.

    It starts in a copy of a folder that it has used, in a `new` one, or in that which is given.
    """
    started = []

    def start(
        folder: Path | None = None, *, new: bool = False, wait: bool = True, **given: str | None
    ) -> Server:
        files = ALL_FILES if new else ()
        if folder is None and not new:
            folder = Path(tempfile.mkdtemp(dir=tmp_path))
            subprocess.run(["cp", "-a", f"{used}/.", folder], check=True)
        variables = {**NO_SETTINGS, **given}
        server = serve(variables, args=("dev",), files=files, folder=folder, wait=False)
        started.append(server)
        if wait:
            printed(server)
        return server

    yield start
    for server in started:
        server.stop(signal.SIGINT)  # and its PostgreSQL, which a kill would leave behind


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
    log = first.wait_for(" DELETE /api/demo/tasks/").partition(" POST /api/demo/tasks 201 ")[2]
    requests = re.findall(r" (GET|POST|PUT|PATCH|DELETE) /api/demo/tasks\S* (\d+) ", log)
    assert {("POST", "201"), ("GET", "200"), ("PUT", "200"), ("PATCH", "200")} < set(requests)
    assert ("DELETE", "204") in requests
    assert not [request for request in requests if request[1] >= "400"]
    assert re.search(r" GET /api/demo/tasks/\d+ 200 ", log), "no line reads one task"
    assert bash.stdout.count('"user_id":"demo"') >= 4
    assert get(tasks, headers=headers).json() == [kept]

    assert len(postgres_folder(first)) == 1
    assert interrupt(first) in {0, 130}
    assert postgres_folder(first) == [], "PostgreSQL was not stopped cleanly"
    assert "Traceback" not in first.stderr()

    second = serve(
        {**NO_SETTINGS, "PORT": port}, args=("dev",), files=(), folder=first.folder, wait=False
    )
    again = printed(second)
    assert get(tasks, headers=headers).json() == [kept]
    assert get(tasks, headers=token_in(again)).json() == [kept]
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
    response = get(server.url + path_of(user), headers={**bearer(user), "Origin": origin})
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


# The folder


def postmaster(server: Server) -> psutil.Process:
    """The PostgreSQL server of its folder."""
    [file] = postgres_folder(server)
    return psutil.Process(int(Path(file).read_text().split("\n")[0]))


def checkpoint(server: Server) -> None:
    """All is on the disk, so that a copy of the folder has it too."""
    [file] = postgres_folder(server)
    sockets = Path(file).read_text().split("\n")[4]
    with psycopg.connect(host=sockets, user="postgres", autocommit=True) as connection:
        connection.execute("checkpoint")


def serves(server: Server) -> bool:
    """Whether its own token is good for its list."""
    answer = get(server.url + path_of("demo"), headers=token_in(server.stdout()))
    return answer.status_code == 200


def create(server: Server, title: str) -> None:
    headers = token_in(server.stdout())
    answer = httpx.post(server.url + path_of("demo"), json={"title": title}, headers=headers)
    assert answer.status_code == 201


def titles(server: Server) -> list[str]:
    answer = get(server.url + path_of("demo"), headers=token_in(server.stdout()))
    return [task["title"] for task in answer.json()]


def at_work_in(folder: Path) -> list[psutil.Process]:
    """The processes that run there: PostgreSQL's have their data as working directory."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            found += [process] if Path(process.cwd()).is_relative_to(folder) else []
    return found


def interrupt_after(seconds: float, server: Server) -> int:
    """Ctrl-C so long after Python has begun with the file. The exit code."""
    process = psutil.Process(server.process.pid)
    eventually(lambda: any("_socket" in each.path for each in process.memory_maps()))
    time.sleep(seconds)
    return interrupt(server)


def test_ctrl_c_at_any_moment_of_the_first_start_breaks_nothing(dev: Dev) -> None:
    """Neither a half-made database nor a server is left, and no traceback is shown."""
    server, moment, reached = dev(new=True, wait=False), 0.01, set()
    while "API" not in reached:
        assert interrupt_after(moment, server) in {0, -signal.SIGINT}
        assert "Traceback" not in server.stderr()
        assert at_work_in(server.folder) == []
        reached |= {word for word in (CREATING, "API") if word in server.stdout()}
        moment = moment * 1.4 + 0.05
        assert moment < 20, "it never serves"
        server = dev(server.folder, wait=False)
    assert CREATING in reached, "no interrupt met the creation"
    printed(server)
    assert serves(server)


def test_the_first_start_says_at_once_what_takes_its_time(dev: Dev) -> None:
    first = dev(new=True, wait=False)
    eventually(lambda: CREATING in first.stdout(), within=10)
    assert not (first.folder / ".todo-dev/postgres").exists()
    printed(first)
    interrupt(first)
    assert CREATING not in printed(dev(first.folder))


ENDS = {"Ctrl-C": signal.SIGINT, "closed-terminal": signal.SIGHUP}


@pytest.mark.parametrize("number", ENDS.values(), ids=ENDS)
def test_the_end_of_dev_is_the_end_of_its_postgres(dev: Dev, number: signal.Signals) -> None:
    server = dev()
    postgres = postmaster(server)
    os.killpg(server.process.pid, number)
    assert server.wait() == 0
    assert not postgres.is_running() or postgres.status() == psutil.STATUS_ZOMBIE
    assert postgres_folder(server) == []
    assert "Traceback" not in server.stderr()


def test_nohup_keeps_dev_when_the_terminal_is_closed(serve: Serve) -> None:
    command = ("nohup", sys.executable, "todo.py", "dev")
    server = serve(NO_SETTINGS, command=command, files=ALL_FILES, wait=False)
    printed(server)
    os.killpg(server.process.pid, signal.SIGHUP)
    time.sleep(1.0)
    assert serves(server)
    interrupt(server)


@pytest.mark.parametrize("also", [False, True], ids=["dev", "dev-and-its-postgres"])
def test_a_start_after_kill_9_has_all_tasks(dev: Dev, also: bool) -> None:
    first = dev()
    create(first, "Kept")
    postgres = postmaster(first)
    first.process.kill()
    first.wait()
    if also:
        kill(postgres)
    second = dev(first.folder)
    assert titles(second) == ["Kept"]
    assert interrupt(second) == 0
    assert postgres_folder(second) == []


def test_a_second_one_in_a_folder_is_refused_at_once(dev: Dev) -> None:
    """Before it takes a port or touches the database; also when that was killed."""

    def refused() -> str:
        second = subprocess.run(
            [sys.executable, "todo.py", "dev"],
            cwd=first.folder,
            env=plain_environment(PORT=str(first.port)),
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
        assert (second.returncode, second.stdout) == (1, "")
        return second.stderr

    first = dev()
    create(first, "Kept")
    where = f"process {first.process.pid}, http://127.0.0.1:{first.port}"
    sentence = (
        f"another `todo.py dev` runs in {first.folder} ({where}): use that one, or stop it first\n"
    )
    assert refused() == sentence
    assert titles(first) == ["Kept"]
    kill(postmaster(first))
    assert refused() == sentence
    assert interrupt(first) == 0
    assert titles(dev(first.folder)) == ["Kept"]


def kill(postgres: psutil.Process) -> None:
    """As a crash of it: with all its children."""
    children = postgres.children(recursive=True)
    postgres.kill()
    psutil.wait_procs([postgres, *children], timeout=10)


def test_a_copy_of_a_folder_in_use_has_a_database_of_its_own(dev: Dev, tmp_path: Path) -> None:
    """Its postmaster.pid names the original's process, which its end must not stop."""
    first = dev()
    create(first, "Of both")
    checkpoint(first)
    folder = tmp_path / "copy"
    subprocess.run(["cp", "-a", first.folder, folder], check=True)
    copy = dev(folder)
    assert f"is a copy of {first.folder / '.todo-dev/postgres'}" in copy.stdout()
    assert postmaster(copy).pid != postmaster(first).pid
    create(copy, "Of the copy")
    assert titles(first) == ["Of both"]
    assert titles(copy) == ["Of the copy", "Of both"]
    assert interrupt(copy) == 0
    create(first, "Of the original")
    assert titles(first) == ["Of the original", "Of both"]


def test_data_that_may_be_in_use_elsewhere_are_not_touched(dev: Dev) -> None:
    """A folder of that name is not here: another container's, or a folder that was moved."""
    first = dev()
    interrupt(first)
    file = first.folder / ".todo-dev/postgres/postmaster.pid"
    file.write_text("4711\n/elsewhere/postgres\n1700000000\n5432\n/tmp/todo-x\n\n1 2\nready\n")
    refused = dev(first.folder, wait=False)
    assert_refused(refused, "process 4711", "/elsewhere/postgres", f"rm {file}")
    assert file.exists()
    file.unlink()
    assert serves(dev(first.folder))


def test_a_pid_that_belongs_to_somebody_else_by_now_is_left_alone(dev: Dev) -> None:
    """As after a restart of the machine: the file is there, its process is not."""
    first = dev()
    kill(postmaster(first))
    first.process.kill()
    file = first.folder / ".todo-dev/postgres/postmaster.pid"
    other = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        lines = file.read_text().split("\n")
        file.write_text("\n".join([str(other.pid), *lines[1:]]))
        assert serves(dev(first.folder))
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_dev_is_one_process_and_says_so(dev: Dev) -> None:
    server = dev(WORKERS="3")
    assert "WORKERS is not used" in server.stdout()
    assert len(server.log_lines("settings from")) == 1
    assert psutil.Process(server.process.pid).children() == []


def test_who_reads_no_further_than_the_first_line_ends_it(serve: Serve, used: Path) -> None:
    """`todo.py dev | head -1`: no traceback, and PostgreSQL is stopped."""
    command = ("bash", "-c", f"{sys.executable} todo.py dev | head -0")
    server = serve(NO_SETTINGS, command=command, folder=used, files=(), wait=False)
    server.wait()
    assert "Traceback" not in server.stderr()
    assert "BrokenPipe" not in server.stderr()
    assert postgres_folder(server) == []


PLACES = {
    "long": "a-folder-of-a-name-of-sixty-characters-and-a-few-more-of-them/" * 3,
    "odd": 'it\'s a "folder" of $HOME, 50 % ünïcödé #1',
}


@pytest.mark.parametrize("name", PLACES.values(), ids=PLACES)
def test_dev_works_in_a_folder_of_any_name(dev: Dev, tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir(parents=True)
    for file in ALL_FILES:
        shutil.copy(ROOT / file, folder)
    server = dev(folder)
    create(server, "Buy groceries")
    assert interrupt(server) == 0


# Other users


@pytest.fixture
def as_daemon(serve: Serve) -> Iterator[Callable[..., Server]]:
    """A factory of `dev` as another user of the machine, in a folder that belongs to `owner`."""
    if os.geteuid() != 0:
        pytest.skip("only root can be somebody else")
    with tempfile.TemporaryDirectory(prefix="todo-of-daemon-") as place:
        Path(place).chmod(0o755)

        def start(*, owner: str = "daemon") -> Server:
            folder = Path(place) / owner
            folder.mkdir(exist_ok=True)
            for file in ALL_FILES:
                shutil.copy(ROOT / file, folder)
            shutil.chown(folder, owner)
            switch = ("setpriv", "--reuid=daemon", "--regid=daemon", "--clear-groups")
            command = (*switch, sys.executable, "todo.py", "dev")
            return serve(NO_SETTINGS, command=command, files=(), folder=folder, wait=False)

        yield start


def test_dev_works_for_another_user_beside_a_root_who_used_it(
    dev: Dev, as_daemon: Callable[..., Server]
) -> None:
    """The wheel's own way leaves locks of the first user in /tmp: none of them is ours."""
    of_root, of_daemon = dev(), as_daemon()
    printed(of_daemon)
    create(of_daemon, "Of a daemon")
    assert titles(of_root) == []
    assert interrupt(of_daemon) == 0
    assert (of_daemon.folder / ".todo-dev/postgres").owner() == "daemon"
    assert (of_root.folder / ".todo-dev/postgres").owner() == "nobody"


def test_root_may_use_the_folder_of_somebody_else_and_leaves_it_usable(
    dev: Dev, as_daemon: Callable[..., Server]
) -> None:
    first = as_daemon()
    printed(first)
    create(first, "Kept")
    interrupt(first)
    (first.folder / ".todo-dev/running").unlink()  # as a `dev` of before leaves it
    of_root = dev(first.folder)
    assert titles(of_root) == ["Kept"]
    interrupt(of_root)
    again = as_daemon()
    printed(again)
    assert titles(again) == ["Kept"]
    assert interrupt(again) == 0


def test_a_folder_that_refuses_is_said_in_one_sentence(as_daemon: Callable[..., Server]) -> None:
    """Not writable, or with a `.todo-dev` that is root's."""
    unwritable = as_daemon(owner="root")
    assert_refused(unwritable, ".todo-dev", "Permission denied")
    (unwritable.folder / ".todo-dev").mkdir()
    (unwritable.folder / ".todo-dev/better_auth_secret").touch(0o600)
    foreign = as_daemon(owner="root")
    assert_refused(foreign, ".todo-dev", "Permission denied")
    assert len(foreign.stderr().split("\n")) == 2


# Beside it


def test_a_port_in_use_is_said_before_anything_is_started_with_the_line_that_helps(
    dev: Dev, serve: Serve
) -> None:
    port = 0
    while not (port and is_free(port) and is_free(port + 1)):
        port = random.randrange(20_000, 32_000)  # below those that connections take
    first = dev(PORT=str(port))
    second = dev(PORT=str(first.port), wait=False)
    assert_refused(second, f"PORT {first.port}", "Address already in use")
    assert CREATING not in second.stdout()
    line = second.stderr().rstrip().split(": ")[-1]
    assert line == f"PORT={first.port + 1}"
    command = ("bash", "-c", f"exec env {line} {sys.executable} todo.py dev")
    other = serve({**NO_SETTINGS, "PORT": None}, command=command, folder=second.folder, wait=False)
    printed(other)
    assert f"http://127.0.0.1:{first.port + 1}\n" in other.stdout()
    assert interrupt(other) == 0


def is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def test_token_beside_dev_needs_no_secret(dev: Dev, serve: Serve) -> None:
    server = dev()

    def sign(**given: str | None) -> Server:
        return serve(
            {**NO_SETTINGS, **given},
            args=("token", "alice"),
            files=(),
            folder=server.folder,
            wait=False,
        )

    beside = sign()
    assert beside.wait() == 0, beside.stderr()
    headers = {"Authorization": f"Bearer {beside.stdout().strip()}"}
    assert get(server.url + path_of("alice"), headers=headers).json() == []
    given = sign(BETTER_AUTH_SECRET=SECRET)
    assert given.wait() == 0
    jwt.decode(given.stdout().strip(), SECRET, algorithms=["HS256"])


def test_the_log_of_dev_names_only_variables_that_somebody_set(dev: Dev) -> None:
    server = dev(LOG_LEVEL="INFO")
    [line] = server.log_lines("settings from the environment")
    assert re.findall(r"\b[A-Z_]{4,}\b", line.partition("environment: ")[2]) == [
        "LOG_LEVEL",
        "PORT",
    ]
