"""Signals, workers, the log, and `python todo.py check`: what the operator does and sees."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import httpx
import psutil
import psycopg
import pytest

from todo_tests import support
from todo_tests.damage import (
    LOST,
    AllAtOnce,
    Answer,
    Bouncer,
    Caller,
    Life,
    ended,
    jwks,
    read_answer,
    soon,
    stored,
    together,
)
from todo_tests.support import (
    AUTH_URL,
    LOCKED_TABLE,
    ROOT,
    SECRET,
    WORKERS,
    NewPostgres,
    OwnPostgres,
    Postgres,
    Serve,
    Server,
    eventually,
    free_port,
    plain_environment,
    token,
)

pytestmark = pytest.mark.slow


def workers_of(server: Server) -> list[psutil.Process]:
    """The processes that accept its connections, but for the one that was started."""
    accepting = []
    for child in psutil.Process(server.process.pid).children(recursive=True):
        with suppress(psutil.Error):
            ports = [c.laddr.port for c in child.net_connections("tcp") if c.status == "LISTEN"]
            accepting += [child] if server.port in ports else []
    return accepting


async def refused(server: Server) -> bool:
    """Whether a new caller finds nobody there."""
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    except ConnectionError:
        return True
    writer.close()
    return False


def clean(server: Server) -> None:
    assert "Traceback" not in server.stderr()
    assert " ERROR " not in server.stderr()


# What waits: it runs from the start, in a thread of its own, while the other tests go on


class End(NamedTuple):
    """How a server ended that had to leave two requests unfinished."""

    code: int
    seconds: float
    answer: Answer | None
    log: str


async def hang(server: Server) -> End:
    """The signal, while one request waits for the database, and one for the rest of its body."""
    caller, stalled = Caller(server.port), Caller(server.port)
    await caller.ask("GET", "/healthz")
    _, writer = await stalled.connect()
    writer.write(stalled.head("POST", "", Content_Type="application/json", Content_Length=99))
    asked = asyncio.create_task(caller.ask("GET", ""))
    try:
        await asyncio.sleep(0.5)
        server.process.send_signal(signal.SIGTERM)
        code, seconds = await ended(server.process, within=20.0)
        answer = None
        with suppress(*LOST):
            answer = await asked
    finally:
        asked.cancel()
        await stalled.close()
    return End(code, seconds, answer, server.stderr())


async def hangs(postgres: OwnPostgres, serve: Serve) -> dict[str, End]:
    url = await asyncio.to_thread(postgres.create_database, schema=True)
    settings = [{"WORKERS": workers, "DB_TIMEOUT": "60"} for workers in WORKERS]
    servers = [await asyncio.to_thread(serve, each, database_url=url) for each in settings]
    with psycopg.connect(url) as locker:
        locker.execute(LOCKED_TABLE)
        ends = await together(hang(server) for server in servers)
    return dict(zip(WORKERS, ends, strict=True))


@pytest.fixture(scope="module")
def waits() -> Iterator[AllAtOnce]:
    with (
        OwnPostgres() as postgres,
        support.servers(postgres.url) as serve,
        AllAtOnce(hangs=hangs(postgres, serve)) as all_at_once,
    ):
        yield all_at_once


# Signals

ignored = pytest.mark.skipif(
    signal.getsignal(signal.SIGHUP) == signal.SIG_IGN, reason="these tests run under nohup"
)
SIGNALS = (signal.SIGTERM, pytest.param(signal.SIGHUP, marks=ignored))


@pytest.mark.parametrize("signal_number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("workers", WORKERS)
async def test_a_signal_finishes_what_is_in_flight(
    workers: str, signal_number: signal.Signals, serve: Serve, fresh_database: str
) -> None:
    """Ten writes wait for a lock when the signal comes; idle connections and newcomers do not."""
    url = fresh_database
    settings = {"WORKERS": workers, "DB_TIMEOUT": "20"}
    server = await asyncio.to_thread(serve, settings, database_url=url)
    callers = [Caller(server.port, "writer") for _ in range(10)]
    idle = [Caller(server.port) for _ in range(10)]
    await together(caller.ask("GET", "") for caller in callers + idle)

    with psycopg.connect(url) as locker:
        locker.execute("lock table tasks in exclusive mode")
        asked = [
            asyncio.create_task(caller.ask("POST", "", {"title": f"In flight {number}"}))
            for number, caller in enumerate(callers)
        ]
        await asyncio.sleep(0.5)
        server.process.send_signal(signal_number)
        await soon(lambda: refused(server), within=3.0, why="still accepts connections")
        await asyncio.sleep(1.0)
        assert server.process.poll() is None
        assert not any(task.done() for task in asked)
    answers = await asyncio.gather(*asked)
    assert [answer.status for answer in answers] == [201] * 10
    code, seconds = await ended(server.process, within=5.0)
    assert code == 0
    assert sorted(stored(url, "writer")) == sorted(answer.body["title"] for answer in answers)
    clean(server)
    print(f"WORKERS={workers}: exit {code}, {seconds:.2f} s after the last answer")


# What has come of a POST when the signal comes; the rest comes half a second later.
BEGUN: dict[str, Callable[[bytes], int]] = {
    "nothing": lambda _: 0,
    "one-byte": lambda _: 1,
    "half-a-head": lambda request: request.index(b"Authorization") + 20,
    "a-head": lambda request: request.index(b"\r\n\r\n") + 4,
    "half-a-body": lambda request: len(request) - 10,
}


@pytest.mark.parametrize("workers", WORKERS)
async def test_a_request_that_arrives_during_a_shutdown_is_finished(
    workers: str, serve: Serve, database_url: str
) -> None:
    """So it is if it comes on an idle connection within a second."""
    server = await asyncio.to_thread(serve, {"WORKERS": workers})
    callers = {case: Caller(server.port) for case in BEGUN}
    await together(caller.ask("GET", "/healthz") for caller in callers.values())
    asked = []
    for case, caller in callers.items():
        request = caller.request("POST", "", {"title": case})
        cut = BEGUN[case](request)
        reader, writer = await caller.connect()
        writer.write(request[:cut])
        asked.append((reader, writer, request[cut:]))
    await asyncio.sleep(0.2)
    server.process.send_signal(signal.SIGTERM)
    # A supervisor notices the signal within half a second.
    await soon(lambda: refused(server), within=3.0, why="still accepts connections")
    await asyncio.sleep(0.5)
    for _, writer, rest in asked:
        writer.write(rest)
    answers = await together(read_answer(reader) for reader, _, _ in asked)
    assert [(answer.status, answer.headers["connection"]) for answer in answers] == [
        (201, "close")
    ] * len(BEGUN)
    for _, writer, _ in asked:
        writer.close()
    code, seconds = await ended(server.process, within=5.0)
    assert code == 0
    for case, caller in callers.items():
        assert stored(database_url, caller.user) == [case]
    clean(server)
    print(f"WORKERS={workers}: exit {code}, {seconds:.2f} s after the last answer")


async def test_who_ignores_a_hangup_goes_on(serve: Serve) -> None:
    """`nohup python todo.py` outlives the terminal."""
    server = await asyncio.to_thread(serve, command=("nohup", sys.executable, "todo.py"))
    server.process.send_signal(signal.SIGHUP)
    await asyncio.sleep(1.0)
    assert (await Caller(server.port).ask("GET", "")).status == 200
    assert await asyncio.to_thread(server.stop) == 0


@pytest.mark.parametrize("workers", WORKERS)
async def test_sigterm_under_load_loses_no_answer(
    workers: str, serve: Serve, database_url: str
) -> None:
    """What is stored has been acknowledged, and what has been acknowledged is stored."""
    server = await asyncio.to_thread(serve, {"WORKERS": workers})
    acknowledged: dict[str, list[str]] = {}

    async def write(number: int) -> None:
        caller = Caller(server.port)
        titles = acknowledged[caller.user] = []
        with suppress(*LOST):
            while True:
                title = f"{number}/{len(titles)}"
                answer = await caller.ask("POST", "", {"title": title})
                assert answer.status == 201
                titles.append(title)

    async def stop() -> tuple[int, float]:
        await asyncio.sleep(1.0)
        server.process.send_signal(signal.SIGTERM)
        return await ended(server.process, within=10.0)

    (code, seconds), *_ = await together([stop(), *(write(number) for number in range(20))])
    assert code == 0
    assert sum(map(len, acknowledged.values())) > 20
    for user, titles in acknowledged.items():
        assert sorted(stored(database_url, user)) == sorted(titles)
    clean(server)
    print(f"WORKERS={workers}: exit {code} after {seconds:.2f} s under load")


# Workers


async def test_a_worker_that_dies_is_replaced(serve: Serve) -> None:
    server = await asyncio.to_thread(serve, {"WORKERS": "2"})

    async def two_serve() -> bool:
        return len(workers_of(server)) == 2 and (await ask()).status == 200

    async def ask() -> Answer:
        caller = Caller(server.port)
        try:
            return await caller.ask("GET", "")
        finally:
            await caller.close()

    await soon(two_serve, within=10.0, why="no two workers")
    for _ in range(2):
        victim = workers_of(server)[0]
        victim.kill()
        start = time.monotonic()
        await asyncio.sleep(0.05)
        assert (await ask()).status == 200, "the other goes on"
        await soon(two_serve, within=10.0, why="not replaced")
        assert victim.pid not in {worker.pid for worker in workers_of(server)}
        print(f"replaced after {time.monotonic() - start:.1f} s")
    lives = [Life(server.port, seed) for seed in range(8)]
    await together(life.steps(10) for life in lives)
    survivors = workers_of(server)
    assert await asyncio.to_thread(server.stop) == 0
    assert not any(worker.is_running() for worker in survivors)


async def test_workers_end_with_their_parent(serve: Serve) -> None:
    """One that is killed (-9) leaves nobody who serves old code and holds the port."""
    server = await asyncio.to_thread(serve, {"WORKERS": "2"})

    async def all_gone() -> bool:
        for worker in workers:
            with suppress(psutil.NoSuchProcess):
                if worker.status() != psutil.STATUS_ZOMBIE:
                    return False
        return await refused(server)

    await asyncio.to_thread(eventually, lambda: len(workers_of(server)) == 2)
    workers = workers_of(server)
    idle = Caller(server.port)
    await idle.ask("GET", "")
    server.process.kill()
    try:
        seconds = await soon(all_gone, within=5.0, why="workers without a parent")
    finally:
        for worker in workers:
            with suppress(psutil.NoSuchProcess):
                worker.kill()
    socket.create_server(("127.0.0.1", server.port)).close()
    print(f"gone {seconds:.1f} s after their parent")


# Sockets and descriptors

# Listens as the first argument says, and becomes `todo.py` with that socket.
HAND_OVER = """
import os, socket, sys
if sys.argv[1].startswith("/"):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(sys.argv[1])
    listener.listen()
else:
    address = ("::", int(sys.argv[1]))
    listener = socket.create_server(address, family=socket.AF_INET6, dualstack_ipv6=True)
os.dup2(listener.fileno(), 3)
os.set_inheritable(3, True)
os.environ["LISTEN_FDS"] = "1"
os.execv(sys.executable, [sys.executable, "todo.py"])
"""


def test_an_ipv4_client_of_an_ipv6_socket_is_known_as_ipv4(serve: Serve) -> None:
    """Whether it is the client itself or a proxy, whose word counts then."""
    port = free_port()
    server = serve({"PORT": str(port)}, command=(sys.executable, "-c", HAND_OVER, str(port)))
    for host, said, client in (
        ("127.0.0.1", {}, "127.0.0.1"),
        ("127.0.0.1", {"X-Forwarded-For": "203.0.113.9"}, "203.0.113.9"),
        ("[::1]", {}, "::1"),
    ):
        request_id = uuid.uuid4().hex
        support.get(f"http://{host}:{port}/healthz", headers={"X-Request-ID": request_id, **said})
        [line] = server.log_lines(f"request={request_id} ")
        assert line.endswith(f"client={client}")


def test_the_peer_of_a_unix_socket_is_a_proxy(serve: Serve, tmp_path: Path) -> None:
    path = str(tmp_path / "todo.sock")
    server = serve(wait=False, command=(sys.executable, "-c", HAND_OVER, path))
    headers = {"X-Forwarded-For": "203.0.113.9", "X-Request-ID": "over-a-unix-socket"}
    server.wait_for("listening on")
    with httpx.Client(transport=httpx.HTTPTransport(uds=path), timeout=30) as client:
        assert client.get("http://testserver/healthz", headers=headers).status_code == 200
    [line] = server.log_lines("request=over-a-unix-socket ")
    assert line.endswith("client=203.0.113.9")


def test_a_lack_of_descriptors_is_one_warning_with_the_limit(serve: Serve) -> None:
    server = serve(command=("sh", "-c", f"ulimit -n 64; exec {sys.executable} todo.py"))
    with ExitStack() as stack:
        for _ in range(80):
            address = ("127.0.0.1", server.port)
            connection = stack.enter_context(socket.create_connection(address, timeout=10))
            with suppress(ConnectionError):
                connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
                connection.recv(1000)
    assert support.get(f"{server.url}/healthz").status_code == 200
    [line] = server.log_lines(" WARNING ")  # which the log's thread may write a moment later
    assert "64 file descriptors" in line
    clean(server)


# Standard output and the log


@pytest.mark.parametrize("workers", WORKERS)
async def test_a_server_without_standard_output_serves(serve: Serve, workers: str) -> None:
    command = ("sh", "-c", f"exec {sys.executable} todo.py >&-")
    server = await asyncio.to_thread(serve, {"WORKERS": workers}, command=command)
    assert (await Caller(server.port).ask("GET", "")).status == 200
    assert await asyncio.to_thread(server.stop) == 0
    clean(server)


class Log:
    """A pipe for a server's standard error; it holds 64 KiB, and is read when somebody asks."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "log"
        os.mkfifo(self.path)
        self.reader = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)

    async def serve(self, serve: Serve, workers: str) -> Server:
        """A server that logs into it."""
        command = ("sh", "-c", f"exec {sys.executable} todo.py 2>{self.path}")
        server = serve({"WORKERS": workers}, command=command, wait=False)

        async def listens() -> bool:
            assert server.process.poll() is None, self.read()
            return not await refused(server)

        await soon(listens, within=30.0, why="does not listen")
        await Caller(server.port).ask("GET", "/healthz")
        return server

    def read(self) -> str:
        """All that is in it."""
        text = b""
        with suppress(BlockingIOError):
            while data := os.read(self.reader, 65536):
                text += data
        return text.decode()


@pytest.fixture
def unread(tmp_path: Path) -> Iterator[Log]:
    log = Log(tmp_path)
    yield log
    os.close(log.reader)


async def fill(server: Server) -> list[Answer]:
    """The answers, within a time, to requests of which 640 make the pipe overflow."""

    async def ask(caller: Caller) -> list[Answer]:
        return [await caller.ask("GET", "/healthz") for _ in range(400)]

    asked = [asyncio.create_task(ask(Caller(server.port))) for _ in range(5)]
    done, pending = await asyncio.wait(asked, timeout=10.0)
    for task in pending:
        task.cancel()
    return [answer for task in done for answer in task.result()]


@pytest.mark.parametrize("workers", WORKERS)
async def test_a_log_that_nobody_reads_stops_nobody(
    workers: str, serve: Serve, unread: Log
) -> None:
    """What finds no room is lost, and no line is ever half of one."""
    server = await unread.serve(serve, workers)
    answers = await fill(server)
    assert [answer.status for answer in answers] == [200] * 2000
    lines = unread.read()
    answer = await Caller(server.port).ask("GET", "/healthz")

    def logged() -> bool:
        nonlocal lines
        lines += unread.read()
        return answer.headers["x-request-id"] in lines and lines.endswith("\n")

    await asyncio.to_thread(eventually, logged, why="nothing is logged any more")
    whole = re.compile(r"\S{23}Z [A-Z]+ (GET /healthz 200 .* client=127\.0\.0\.1|[a-z].*)")
    assert [line for line in lines.splitlines() if not whole.fullmatch(line)] == []
    assert await asyncio.to_thread(server.stop) == 0


@pytest.mark.parametrize("workers", WORKERS)
async def test_sigterm_ends_a_server_whose_log_nobody_reads(
    workers: str, serve: Serve, unread: Log
) -> None:
    server = await unread.serve(serve, workers)
    await fill(server)
    server.process.send_signal(signal.SIGTERM)
    code, seconds = await ended(server.process, within=14.0)
    assert code == 0
    print(f"WORKERS={workers}: exit {code} after {seconds:.1f} s")


# python todo.py check


@pytest.fixture(scope="module")
def keys() -> Iterator[str]:
    """The URL of a Better Auth that answers with its keys."""
    with jwks() as url:
        yield url


Check = tuple[int, list[str]]


def check(tmp_path: Path, environment: Mapping[str, str | None], said: str = "") -> Check:
    """Run `python todo.py check`; its exit code and its lines, in which no secret may be."""
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    (folder / "todo.py").write_bytes((ROOT / "todo.py").read_bytes())
    done = subprocess.run(
        [sys.executable, "todo.py", "check"],
        cwd=folder,
        env=plain_environment(**environment),
        input=said,
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=20,
        check=False,
    )
    text = done.stdout + done.stderr
    assert "Traceback" not in text
    for secret in (SECRET, "a-password", said.strip()):
        assert not secret or secret not in text
    return done.returncode, text.splitlines()


def about(lines: list[str], what: str) -> str:
    """The one line that says something of it."""
    found = [line for line in lines if re.search(what, line, re.IGNORECASE)]
    assert len(found) == 1, (what, lines)
    return found[0]


@pytest.fixture(scope="module")
def environment(database_url: str, keys: str) -> Mapping[str, str]:
    """Of a service that is all well."""
    return {"NEON_DB_URL": database_url, "BETTER_AUTH_SECRET": SECRET, "BETTER_AUTH_URL": keys}


# What is set, and what of it is named.
FAULTS: dict[str, tuple[dict[str, str | None], str]] = {
    "secret-missing": ({"BETTER_AUTH_SECRET": None}, "BETTER_AUTH_SECRET"),
    "secret-short": ({"BETTER_AUTH_SECRET": "a-password"}, "BETTER_AUTH_SECRET"),
    "url-bad": ({"NEON_DB_URL": "mysql://x:a-password@y/z"}, "NEON_DB_URL"),
    "host-unknown": (
        {"NEON_DB_URL": "postgresql://x:a-password@nobody.invalid/z"},
        "nobody.invalid",
    ),
    "database-down": (
        {"NEON_DB_URL": f"postgresql://x:a-password@127.0.0.1:{free_port()}/z"},
        "refused",
    ),
    "jwks-down": (
        {"BETTER_AUTH_URL": f"http://127.0.0.1:{free_port()}"},
        "BETTER_AUTH_URL must be reachable from here; its keys are at ",
    ),
    "jwks-wrong-page": ({"JWKS_URL": "{keys}/nothing/here"}, "jwks"),
}
# What is done to the table, the exit code, and the pattern of the line that is printed.
USERS = (
    "create table users (id text primary key); insert into users values ('real');"
    "alter table tasks add foreign key (user_id) references users"
)
ROW = "insert into tasks (id, user_id, title) values"
SETVAL = r"select setval\('public\.tasks_id_seq', \(select max\(id\) from public\.tasks\)\);$"
TABLES = {
    "missing": ("drop table tasks", 1, "FAIL  table: to make the table: .* todo.py init-db"),
    "column-missing": (
        "alter table tasks drop column description",
        1,
        (
            "FAIL  table: column description is missing:"
            " alter table public.tasks add description text;"
        ),
    ),
    "column-of-another-type": (
        "alter table tasks alter completed drop default, alter completed type int using 0",
        1,
        "FAIL  table: column completed is integer: .* type boolean using completed <> 0",
    ),
    "id-not-made": (
        "alter table tasks alter column id drop identity",
        1,
        "FAIL  table: .* alter id add generated by default as identity;",
    ),
    "column-that-must-be-given": (
        "alter table tasks add column more point not null",
        1,
        (
            "FAIL  table: column more must be given:"
            " alter table public.tasks alter more drop not null;"
        ),
    ),
    "index-missing": (
        "drop index tasks_user_id_completed_idx",
        0,
        r"note  index: .*: create index concurrently \w+ on public.tasks \(user_id, completed\);",
    ),
    "key-missing": (
        "alter table tasks drop constraint tasks_pkey",
        0,
        r"note  index: .*: create index concurrently tasks_id_idx on public.tasks \(id\);",
    ),
    "users-elsewhere": (
        USERS,
        0,
        "note  trial: no write could be tried .*violates foreign key constraint.* token",
    ),
    "user-ids-of-a-form": (
        "alter table tasks add check (user_id like 'usr_%')",
        0,
        "note  trial: no write could be tried .*violates check constraint",
    ),
    "shorter-titles": (
        "alter table tasks add check (char_length(title) <= 10)",
        1,
        "FAIL  trial: a task cannot be written: .* violates check constraint",
    ),
    "an-id-that-is-taken": (
        f"{ROW} (1, 'a', 'x')",
        1,
        f"FAIL  trial: ids are ahead .*{SETVAL}",
    ),
    "ids-that-still-fit": (
        f"{ROW} (5, 'a', 'x')",
        1,
        f"FAIL  trial: ids are ahead .*{SETVAL}",
    ),
    "completed-computed": (
        (
            "alter table tasks drop completed,"
            " add completed boolean not null generated always as (title = 'done') stored;"
            " create index on tasks (user_id, completed)"
        ),
        1,
        'FAIL  table: PostgreSQL says: column "completed" can only be updated to DEFAULT',
    ),
}
ENCODINGS = ("LATIN1", "SQL_ASCII")
# The token, the exit code, and the pattern of what is said of it.
TOKENS: dict[str, tuple[Callable[[], str], int, str]] = {
    "good": (lambda: token("demo-user"), 0, "demo-user"),
    "with-its-scheme": (lambda: f"Bearer {token('demo-user')}", 0, "demo-user"),
    "expired": (lambda: token("demo-user", exp=1_000_000_000), 1, "expired"),
    "not-yet": (lambda: token("demo-user", nbf=int(time.time()) + 3600), 1, "nbf|not yet"),
    "of-another-secret": (
        lambda: token("demo-user", key="x" * 40),
        1,
        "signature.*; was it signed with another secret\\?$",
    ),
    "of-nobody": (lambda: token(None), 1, r"\bsub\b|user"),
    "without-end": (lambda: token("demo-user", exp=None), 1, r"\bexp\b"),
    "for-somebody-else": (lambda: token("demo-user", aud="https://else.test"), 1, "aud"),
    "no-token": (lambda: "not-a-token-at-all", 1, "JWT|token"),
    "no-text": (lambda: "\udcff\udcfe", 1, "JWT|token"),
}


@pytest.fixture(scope="module", autouse=True)
def checks(
    tmp_path_factory: pytest.TempPathFactory,
    environment: Mapping[str, str],
    postgres: Postgres,
    keys: str,
) -> Iterator[Mapping[str, Future[Check]]]:
    """All these, two at a time, from the start; what becomes of them."""
    folder = tmp_path_factory.mktemp("checks")

    def with_settings(overrides: Mapping[str, str | None]) -> Check:
        filled = {name: value and value.format(keys=keys) for name, value in overrides.items()}
        return check(folder, {**environment, **filled})

    def with_table(damage: str, encoding: str = "") -> Check:
        with postgres.new_database(schema=True, encoding=encoding) as url:
            postgres.execute(damage, database_url=url)
            return check(folder, {**environment, "NEON_DB_URL": url})

    pool = ThreadPoolExecutor(2)
    yield {
        **{name: pool.submit(with_settings, faulty) for name, (faulty, _) in FAULTS.items()},
        **{name: pool.submit(with_table, damage) for name, (damage, *_) in TABLES.items()},
        **{name: pool.submit(with_table, "select", name) for name in ENCODINGS},
        **{
            name: pool.submit(check, folder, environment, f"{said()}\n")
            for name, (said, _, _) in TOKENS.items()
        },
    }
    pool.shutdown(cancel_futures=True)


def test_check_finds_all_well(
    tmp_path: Path, environment: Mapping[str, str], postgres: Postgres
) -> None:
    code, lines = check(tmp_path, environment)
    assert code == 0
    version = str(postgres.execute("show server_version_num")[0][0])[:2]
    assert re.search(rf"\b{version}\b", about(lines, "PostgreSQL"))
    assert re.search(r"\d ms", about(lines, "round trip"))
    assert about(lines, "ok    table: ")
    assert about(lines, "ok    trial: ")
    assert about(lines, "jwks")
    assert re.search(r"\bno\b|without|direct", about(lines, "pooler"))


@pytest.mark.skipif(Bouncer.program is None, reason="no pgbouncer is installed")
def test_check_recognises_a_pooler(
    tmp_path: Path, own_postgres: NewPostgres, environment: Mapping[str, str]
) -> None:
    postgres = own_postgres()
    url = postgres.create_database(schema=True)
    _, direct = check(tmp_path, {**environment, "NEON_DB_URL": url})
    pooler = Bouncer(postgres.port).start()
    try:
        code, through = check(tmp_path, {**environment, "NEON_DB_URL": pooler.url(url)})
    finally:
        pooler.remove()
    assert code == 0
    assert about(through, "pooler") != about(direct, "pooler")
    assert not re.search(r"\bno\b|without|direct", about(through, "pooler"))


@pytest.mark.parametrize("case", FAULTS)
def test_check_names_what_is_wrong(checks: Mapping[str, Future[Check]], case: str) -> None:
    code, lines = checks[case].result()
    assert code == 1
    assert FAULTS[case][1].lower() in "\n".join(lines).lower()


def test_check_names_every_faulty_variable(tmp_path: Path) -> None:
    code, lines = check(tmp_path, {"PORT": "http", "BETTER_AUTH_URL": AUTH_URL})
    assert code == 1
    for name in ("NEON_DB_URL", "BETTER_AUTH_SECRET", "PORT"):
        assert name in "\n".join(lines)


@pytest.mark.parametrize("case", TABLES)
def test_check_tries_the_table(checks: Mapping[str, Future[Check]], case: str) -> None:
    code, lines = checks[case].result()
    assert code == TABLES[case][1]
    assert about(lines, f"^{TABLES[case][2]}")


def test_check_tries_the_table_as_the_user_of_the_token(
    tmp_path: Path, environment: Mapping[str, str], postgres: Postgres, fresh_database: str
) -> None:
    """Where only users who exist may have tasks."""
    postgres.execute(USERS, database_url=fresh_database)
    theirs = {**environment, "NEON_DB_URL": fresh_database}
    code, lines = check(tmp_path, theirs, token("real"))
    assert (code, bool(about(lines, "^ok    trial: "))) == (0, True)
    code, lines = check(tmp_path, theirs, token("gone"))
    assert (code, bool(about(lines, "^FAIL  trial: .*violates foreign key"))) == (1, True)
    assert postgres.execute("select from tasks", database_url=fresh_database) == []


@pytest.mark.parametrize("case", ["an-id-that-is-taken", "index-missing", "key-missing"])
def test_the_line_that_check_prints_mends_it(
    tmp_path: Path,
    environment: Mapping[str, str],
    postgres: Postgres,
    fresh_database: str,
    case: str,
) -> None:
    postgres.execute(TABLES[case][0], database_url=fresh_database)
    theirs = {**environment, "NEON_DB_URL": fresh_database}
    line = about(check(tmp_path, theirs)[1], f"^{TABLES[case][2]}").rpartition(": ")[2]
    postgres.execute(line, database_url=fresh_database)
    code, lines = check(tmp_path, theirs)
    assert (code, [line for line in lines if line[:2] != "ok"]) == (0, [])


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_check_names_an_encoding_that_cannot_hold_every_title(
    checks: Mapping[str, Future[Check]], encoding: str
) -> None:
    code, lines = checks[encoding].result()
    assert code == 1
    assert re.search("^FAIL .*UTF8", about(lines, encoding))


def test_check_accepts_more_than_is_needed(
    tmp_path: Path, environment: Mapping[str, str], postgres: Postgres, fresh_database: str
) -> None:
    """Columns with a default and wider indexes harm nobody."""
    postgres.execute(
        "alter table tasks add column more text, add column due date not null default now();"
        "drop index tasks_user_id_idx; create index on tasks (user_id, id)",
        database_url=fresh_database,
    )
    code, lines = check(tmp_path, {**environment, "NEON_DB_URL": fresh_database})
    assert (code, [line for line in lines if line[:2] != "ok"]) == (0, [])


def test_check_prints_the_grant_that_is_missing_and_it_helps(
    tmp_path: Path, environment: Mapping[str, str], own_postgres: NewPostgres, serve: Serve
) -> None:
    """With the least role: it may select, insert, update and delete, and that is enough."""
    postgres = own_postgres()
    url = postgres.create_database(schema=True)
    postgres.execute(
        'create role "to-do" login; grant select on tasks to "to-do"', database_url=url
    )
    environment = {**environment, "NEON_DB_URL": url.replace("//postgres@", "//to-do@")}
    code, lines = check(tmp_path, environment)
    grant = 'grant insert, update, delete on public.tasks to "to-do";'
    assert code == 1
    assert [line for line in lines if "table" in line] == [
        "FAIL  table: PostgreSQL says: permission denied for table tasks",
        "FAIL  table: the role may not insert, update, delete, until the table's owner runs: "
        + grant,
    ]
    postgres.execute(grant, database_url=url)
    assert check(tmp_path, environment)[0] == 0
    server = serve(database_url=environment["NEON_DB_URL"])
    asyncio.run(Life(server.port).steps(40))


GRANT = "grant select, insert, update, delete on tasks"
FOREIGN = {
    "a-sequence-without-a-grant": (
        (
            "alter table tasks alter id drop identity; create sequence numbers;"
            " alter table tasks alter id set default nextval('numbers')"
        ),
        (
            "a task cannot be written: permission denied for sequence numbers: "
            "grant usage on sequence numbers to role_"
        ),
    ),
    "policies-for-others": (
        "alter table tasks enable row level security",
        "a task cannot be written: new row violates row-level security policy",
    ),
    "no-policy-for-changes": (
        (
            "alter table tasks enable row level security;"
            " create policy a on tasks for insert with check (true);"
            " create policy b on tasks for select using (true)"
        ),
        "the role does not see its own task",
    ),
}


@pytest.mark.parametrize(("damage", "said"), FOREIGN.values(), ids=FOREIGN)
def test_check_tries_what_a_role_may_do(
    tmp_path: Path, environment: Mapping[str, str], postgres: Postgres, damage: str, said: str
) -> None:
    """And keeps nothing of it."""
    with postgres.new_database(schema=True) as url, psycopg.connect(url) as owner:
        role = f"role_{uuid.uuid4().hex}"
        owner.execute(f"create role {role} login password '{role}'; {damage}; {GRANT} to {role}")
        owner.commit()
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
        theirs = parts._replace(netloc=f"{role}:{role}@{host}").geturl()
        code, lines = check(tmp_path, {**environment, "NEON_DB_URL": theirs})
        assert code == 1
        assert said in about(lines, "^FAIL  trial: ")
        assert owner.execute("select count(*) from tasks").fetchone() == (0,)
        owner.execute(f"drop owned by {role}; drop role {role}")


def test_ctrl_c_twice_ends_it_without_a_traceback(serve: Serve) -> None:
    """While an idle connection has its moment."""
    server = serve()
    with httpx.Client() as client:
        assert client.get(f"{server.url}/healthz").status_code == 200
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.4)
        server.stop(signal.SIGINT)
    assert "Traceback" not in server.stderr()


def test_a_second_ctrl_c_waits_for_no_silent_database(
    own_postgres: NewPostgres, serve: Serve
) -> None:
    postgres = own_postgres()
    server = serve(database_url=postgres.create_database(schema=True))
    caller = Caller(server.port)
    assert postgres.process is not None
    main = psutil.Process(postgres.process.pid)
    asyncio.run(caller.ask("GET", ""))
    stopped = [main, *main.children(recursive=True)]
    try:
        for process in stopped:
            process.suspend()
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(caller.head("GET", ""))
            time.sleep(0.2)
            server.process.send_signal(signal.SIGINT)
            time.sleep(0.3)
            begun = time.monotonic()
            server.stop(signal.SIGINT)
    finally:
        for process in stopped:
            process.resume()
    assert time.monotonic() - begun < 0.8
    assert "Traceback" not in server.stderr()


@pytest.mark.parametrize("case", TOKENS)
def test_check_says_whose_a_token_is_or_why_it_is_refused(
    checks: Mapping[str, Future[Check]], case: str
) -> None:
    _, expected, named = TOKENS[case]
    code, lines = checks[case].result()
    assert code == expected
    assert re.search(named, about(lines, r"\btoken\b"), re.IGNORECASE)


def test_check_says_what_to_set_for_a_token_of_another_aud_or_iss(
    tmp_path: Path, environment: Mapping[str, str]
) -> None:
    """The value found, the one wanted, and the variable."""
    issuer = {"JWT_ISSUER": "https://issuer.example"}
    code, of_aud = check(tmp_path, environment, token("demo-user", aud="my-app"))
    assert code == 1
    code, of_iss = check(tmp_path, {**environment, **issuer}, token("demo-user", iss="my-app"))
    assert code == 1
    for fact in ("my-app", environment["BETTER_AUTH_URL"], "JWT_AUDIENCE"):
        assert fact in about(of_aud, r"\btoken\b")
    for fact in ("my-app", issuer["JWT_ISSUER"], "JWT_ISSUER"):
        assert fact in about(of_iss, r"\btoken\b")


SILENT = {
    "nothing": (subprocess.DEVNULL, ""),
    "a-pipe-that-says-nothing": (subprocess.PIPE, ""),
    "no-standard-input-at-all": (subprocess.DEVNULL, " <&-"),
}


@pytest.mark.parametrize(("stdin", "redirection"), SILENT.values(), ids=SILENT)
def test_check_needs_no_token(
    tmp_path: Path, environment: Mapping[str, str], stdin: int, redirection: str
) -> None:
    (tmp_path / "todo.py").write_bytes((ROOT / "todo.py").read_bytes())
    with subprocess.Popen(
        ["sh", "-c", f"exec {sys.executable} todo.py check{redirection}"],
        cwd=tmp_path,
        env=plain_environment(**environment),
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        code = process.wait(30)
        text = process.stdout.read() if process.stdout else ""
    assert "Traceback" not in text, text
    assert code == 0
    assert not re.search(r"\btoken\b", text)


# How the waiting ended


@pytest.mark.parametrize("workers", WORKERS)
def test_sigterm_waits_for_nobody_longer_than_10_s(waits: AllAtOnce, workers: str) -> None:
    """Neither for a database that hangs, nor for a body that does not come."""
    end: End = waits["hangs"][workers]
    assert end.code == 0
    assert 9.0 < end.seconds < 13.0
    assert end.answer is None or end.answer.status == 500
    assert "Traceback" not in end.log
    print(f"WORKERS={workers}: exit {end.code} after {end.seconds:.1f} s, answered {end.answer}")
