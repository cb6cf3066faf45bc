"""The way onto a VM, walked as README.md and .deploy/README.md have it: each command as written.

There is no systemd in a container: `Systemd` does with the two units what it would do.
"""

import asyncio
import configparser
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psycopg
import pytest

import todo
from todo_tests.better_auth import HERE as AUTH_FOLDER
from todo_tests.damage import AllAtOnce, Life, certificate, jwks
from todo_tests.support import (
    AUTH_URL,
    ROOT,
    SECRET,
    OwnPostgres,
    Postgres,
    Serve,
    assert_refused,
    bearer,
    eventually,
    free_port,
    get,
    listens,
    missing,
    node_packages,
    path_of,
    plain_environment,
    token,
)
from todo_tests.test_start import OLDER

pytestmark = pytest.mark.slow

DEPLOY = ROOT / ".deploy"
README = (ROOT / "README.md").read_text("utf-8")
PAGE = (DEPLOY / "README.md").read_text("utf-8")


def commands(text: str, language: str = "sh", pages: str = README + PAGE) -> str:
    """The block of commands that holds the text; if both pages have one, it is the same."""
    blocks = re.findall(rf"```{language}\n(.*?)```", pages, re.DOTALL)
    [block] = {each for each in blocks if text in each}
    return str(block)


def tool(name: str) -> str:
    """The path of an optional program."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
    return found or missing(f"no {name} is installed")


# systemd


class Systemd:
    """Holds the socket of `todo.socket`, and runs what `todo.service` says on it."""

    def __init__(self, folder: Path, port: int, python: str = sys.executable) -> None:
        self.folder = folder
        unit = configparser.ConfigParser(delimiters="=", interpolation=None, strict=False)
        text = (DEPLOY / "todo.service").read_text().replace("/srv/todo", str(folder))
        unit.read_string(text.replace(f"{folder}/.venv/bin/python ", f"{python} "))
        self.command = shlex.split(unit["Service"]["ExecStart"])
        self.environment_file = Path(unit["Service"]["EnvironmentFile"])
        host = re.findall(r"ListenStream=(.*):8000", (DEPLOY / "todo.socket").read_text())[0]
        self.listener = socket.create_server((host, port), backlog=4096)
        self.url = f"http://127.0.0.1:{port}"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def journal(self) -> str:
        """All that the service has logged so far."""
        if not (self.folder / "journal").exists():
            return ""
        return (self.folder / "journal").read_text("utf-8", "replace")

    def start(self) -> None:
        """Start the service, as `systemctl start` does: it does not wait until it listens."""
        lines = self.environment_file.read_text().splitlines()
        settings = dict(line.split("=", 1) for line in lines if re.match(r"[A-Z]", line))
        inherited = self.listener.fileno()
        with (self.folder / "journal").open("ab") as journal:
            self.process = subprocess.Popen(
                ["bash", "-c", f'exec "$0" "$@" 3<&{inherited} {inherited}<&-', *self.command],
                cwd="/",
                env={**settings, "PATH": "/usr/bin", "LISTEN_FDS": "1", "LISTEN_PID": "1"},
                stdin=subprocess.DEVNULL,
                stdout=journal,
                stderr=journal,
                start_new_session=True,
                pass_fds=(inherited,),
            )

    def stop(self) -> int:
        """SIGTERM to all of the service; its exit code."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGTERM)
        code, self.process = self.process.wait(20), None
        return code

    def close(self) -> None:
        """End all, whatever its state."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.listener.close()


@pytest.fixture
def vm(tmp_path: Path, database_url: str) -> Iterator[Callable[..., Systemd]]:
    """A factory of VMs with the files of `/srv/todo` in place and an `.env` that is filled in."""
    with ExitStack() as stack:

        def make(**settings: str) -> Systemd:
            folder = tmp_path / f"srv-{free_port()}"
            folder.mkdir()
            for name in ("todo.py", "schema.sql", "openapi.yaml", ".requirements-run.txt"):
                shutil.copy(ROOT / name, folder)
            lines = {
                "NEON_DB_URL": database_url,
                "BETTER_AUTH_SECRET": SECRET,
                "BETTER_AUTH_URL": AUTH_URL,
                **settings,
            }
            text = "".join(f"{name}={value}\n" for name, value in lines.items())
            (folder / ".env").write_text(text)
            systemd = Systemd(folder, free_port())
            stack.callback(systemd.close)
            return systemd

        yield make


def test_the_units_are_valid_and_the_service_is_hardened(tmp_path: Path) -> None:
    analyze = tool("systemd-analyze")
    for name in ("todo.service", "todo.socket"):
        text = (DEPLOY / name).read_text()
        (tmp_path / name).write_text(text.replace("/srv/todo/.venv/bin/python", sys.executable))
    units = [f"./{name}" for name in ("todo.service", "todo.socket")]

    def run(*arguments: str) -> str:
        return subprocess.run(
            [analyze, "--no-pager", *arguments],
            cwd=tmp_path,
            check=True,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ).stdout

    assert run("verify", *units) == ""
    report = run("security", "--offline=true", units[0])
    [exposure] = re.findall(r"exposure level for todo.service: ([\d.]+)", report)
    assert float(exposure) <= 2.0
    print(f"exposure {exposure}")


def test_the_unit_gives_up_what_fails_at_once_and_waits_for_the_database() -> None:
    """With systemd 252: callers of a service that cannot start get a 502 after half a minute."""
    unit = dict(re.findall(r"^(\w+)=(.*)$", (DEPLOY / "todo.service").read_text(), re.MULTILINE))
    tries, seconds = int(unit["StartLimitBurst"]), float(unit["StartLimitIntervalSec"])
    at_once = int(unit["RestartSec"]) + 5.0  # a slow machine imports for some seconds
    assert tries * at_once < seconds < tries * todo.CONNECT_GRACE


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_service_serves_on_the_socket_that_systemd_holds(
    vm: Callable[..., Systemd], workers: str
) -> None:
    """Whatever HOST and PORT say; those who come while it is down are served when it is up."""
    systemd = vm(WORKERS=workers, PORT="1")
    systemd.start()
    assert get(f"{systemd.url}/readyz", timeout=30).json() == {"status": "ready"}
    assert f"listening on {systemd.url}" in systemd.journal
    eventually(lambda: systemd.journal.count("settings from") == int(workers))
    assert systemd.stop() == 0
    with socket.create_connection(systemd.listener.getsockname(), timeout=30) as waiting:
        waiting.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        systemd.start()
        assert waiting.recv(4096).startswith(b"HTTP/1.1 200 OK")
    eventually(lambda: systemd.journal.count("settings from") == 2 * int(workers))
    assert systemd.stop() == 0
    assert "Traceback" not in systemd.journal


def test_a_descriptor_that_is_no_socket_is_refused(serve: Serve) -> None:
    server = serve({"LISTEN_FDS": "1"}, wait=False)
    assert_refused(server, "cannot listen")


# The commands as written: installations, which go on while the other tests run


def run_as_written(block: str, folder: Path, **environment: str) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=folder,
        env=plain_environment(**environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@contextmanager
def started(command: str, folder: Path, sign: str, **environment: str) -> Iterator[str]:
    """A command as written that serves until the block ends: the URL, once it has said so."""
    port, start = free_port(), time.monotonic()
    with (folder / "said").open("wb") as said:
        process = subprocess.Popen(
            ["bash", "-c", command],
            cwd=folder,
            env=plain_environment(PORT=str(port), HOME=str(folder), **environment),
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )

    def text() -> str:
        return (folder / "said").read_text("utf-8", "replace")

    try:
        eventually(text, within=60)
        alive = time.monotonic() - start
        eventually(lambda: sign in text() or process.poll() is not None, within=300, why=text())
        assert process.poll() is None, text()
        print(f"{command}: alive after {alive:.1f} s, serves after {time.monotonic() - start:.1f}")
        yield f"http://127.0.0.1:{port}"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        process.wait(20)


DEV_FILES = (".requirements-run.txt", ".requirements-dev-run.txt")


def first_command(folder: Path) -> None:
    """In a fresh copy; then the other commands of the README beside it."""
    for name in ("todo.py", "schema.sql", "openapi.yaml", *DEV_FILES):
        shutil.copy(ROOT / name, folder)
    with started(commands("todo.py dev").rstrip(), folder, "curl") as url:
        said = run_as_written(commands("token alice"), folder)
        header = {"Authorization": f"Bearer {said.strip()}"}
        answer = get(f"{url}{path_of('alice')}", headers=header)
        assert (answer.status_code, answer.json()) == (200, [])
        secret = run_as_written("cat .todo-dev/better_auth_secret", folder)
        assert get(f"{url}{path_of('bob')}", headers=bearer("bob", key=secret)).json() == []
        said = run_as_written(commands("token demo |", pages=README), folder)
        assert "ok    token: of user 'demo'" in said.splitlines()
        assert said.splitlines()[-1].startswith("ok    check: all is well")
        if shutil.which("npm"):
            typed = commands("openapi-typescript").replace("http://127.0.0.1:8000", url)
            run_as_written(typed, folder, HOME=str(folder))
            assert "listTasks" in (folder / "todo-api.d.ts").read_text()
    with_origin = r"`(BETTER_AUTH_URL=\S+ ALLOWED_ORIGINS=\S+ .venv/bin/python todo.py dev)`"
    [of_vite] = re.findall(with_origin, README)
    with started(of_vite, folder, "curl") as url:
        origin = {"Origin": "http://localhost:5173"}
        answer = get(f"{url}/healthz", headers=origin)
        assert answer.headers["Access-Control-Allow-Origin"] == origin["Origin"]
    size = sum(each.stat().st_size for each in (folder / ".venv").rglob("*") if each.is_file())
    assert size < 200 * 2**20
    print(f"{size / 2**20:.0f} MiB")


def without_installation(folder: Path, database_url: str) -> None:
    """The lines of uv and pipx, each with what it downloads."""
    for name in ("uv", "pipx"):
        if not shutil.which(name, path=plain_environment()["PATH"]):
            missing(f"no {name} is installed")
    passed_on = re.compile(r"(UV|PIP|SSL)_\w+|\w+_PROXY", re.IGNORECASE)
    given = {name: value for name, value in os.environ.items() if passed_on.fullmatch(name)}
    given |= {"USE_EMOJI": "0"}
    [dev] = re.findall(r"`(uv run --with [^`]+)`", README)
    [[uv, pipx]] = re.findall(r"`(uv run todo.py)` or `(pipx run ./todo.py)`", PAGE)
    for name in ("todo.py", "schema.sql"):
        shutil.copy(ROOT / name, folder)
    with started(dev, folder, "curl", **given) as url:
        assert get(f"{url}/readyz").json() == {"status": "ready"}
    settings = {"NEON_DB_URL": database_url, "BETTER_AUTH_URL": AUTH_URL}
    settings["BETTER_AUTH_SECRET"] = SECRET
    lines = "".join(f"{name}={value}\n" for name, value in settings.items())
    (folder / ".env").write_text(lines)
    for command in (uv, pipx):
        with started(command, folder, "listening on", **given) as url:
            assert get(f"{url}/readyz", timeout=30).json() == {"status": "ready"}


VM_FILES = ("todo.py", "schema.sql", "openapi.yaml", ".requirements-run.txt")
OWNER = "postgresql://todo_owner:OWNER_PASSWORD@localhost/todo"


@dataclass
class VM:
    """The places of the page, below a folder, and a server in place of its PostgreSQL."""

    place: Path
    postgres: OwnPostgres

    def here(self, text: str) -> str:
        """What the page says, with the places of this VM in it."""
        for name in ("/srv/todo", "/etc/systemd/system", "/etc/caddy", "/etc/nginx/conf.d"):
            (self.place / name[1:]).parent.mkdir(parents=True, exist_ok=True)
            text = text.replace(name, f"{self.place}{name}")
        return text.replace("@localhost/todo", f"@127.0.0.1:{self.postgres.port}/todo")

    def run(self, text: str, folder: Path, **environment: str) -> str:
        """What commands of the page say. What `systemctl` would do, the test does by itself."""
        programs = self.place / "bin"
        programs.mkdir(exist_ok=True)
        for name in ("systemctl", "nginx"):
            (programs / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {self.place}/asked\n')
            (programs / name).chmod(0o755)
        path = f"{programs}:{OwnPostgres._bin()}:{os.environ['PATH']}"
        given = {"PATH": path, "HOME": str(self.place), **environment}
        return run_as_written(self.here(text), folder, **given)

    def database(self, *, schema: bool = True) -> None:
        """The roles and the database of the page, made as it says."""
        for statement in commands("create role todo_owner", "sql").split(";"):
            self.postgres.execute(statement)
        if schema:
            self.run(commands("--file schema.sql"), ROOT)

    def edit(self, **values: str) -> str:
        """An EDITOR that fills in `.env`."""
        edits = "".join(f"s|^#*{name}=.*|{name}={value}|;" for name, value in values.items())
        editor = self.place / "editor"
        editor.write_text(f"#!/bin/sh\nsed -i '{edits}' \"$1\"\n")
        editor.chmod(0o755)
        return str(editor)

    @property
    def service_url(self) -> str:
        [url] = re.findall(r"`(postgresql://todo:SERVICE_PASSWORD@localhost/todo)`", PAGE)
        return self.here(url)


def commands_for_a_vm(place: Path) -> None:
    """From a PostgreSQL of one's own and a fresh copy to a service that systemd would start."""
    copy = place / "copy"
    (copy / ".deploy").mkdir(parents=True)
    for name in (*VM_FILES, ".env.example", ".deploy/todo.service", ".deploy/todo.socket"):
        shutil.copy(ROOT / name, copy / name)
    with OwnPostgres() as postgres, jwks() as auth:
        vm = VM(place, postgres)
        (place / "etc/systemd/system").mkdir(parents=True)
        vm.database()
        editor = vm.edit(
            NEON_DB_URL=vm.service_url,
            BETTER_AUTH_SECRET=SECRET,
            BETTER_AUTH_URL=auth,
            ALLOWED_ORIGINS="https://app.example.com",
        )
        vm.run(commands("mkdir -p /srv/todo"), copy, EDITOR=editor)
        said = vm.run(commands("todo.py init-db"), place / "srv/todo")
        done = said.partition("the service can work with the table tasks\n")[2].splitlines()
        assert len(done) > 6, said
        assert all(line.startswith("ok ") for line in done), done
        assert done[-1] == "ok    check: all is well"
        folder = place / "srv/todo"
        assert oct((folder / ".env").stat().st_mode & 0o777) == "0o600"
        units = sorted(path.name for path in (place / "etc/systemd/system").iterdir())
        assert units == ["todo.service", "todo.socket"]
        assert (folder / ".venv/bin/python").resolve().is_relative_to("/usr"), "not below /root"
        systemd = Systemd(folder, free_port(), str(folder / ".venv/bin/python"))
        try:
            systemd.start()
            answer = get(f"{systemd.url}/readyz", timeout=30)
            assert answer.json() == {"status": "ready"}
            assert get(f"{systemd.url}/docs").status_code == 200
            checks = commands("curl -sS https").replace("https://api.example.com", systemd.url)
            said = vm.run(checks, folder)
            assert said.startswith('{"status":"ready"}')
            assert "ok    token: of user 'demo'" in said.splitlines()
            assert said.splitlines()[-1] == "ok    check: all is well"
            assert systemd.stop() == 0
        finally:
            systemd.close()


@pytest.fixture(scope="module", autouse=True)
def installations(
    postgres: Postgres, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[AllAtOnce]:
    new = tmp_path_factory.mktemp
    with (
        postgres.new_database(schema=True) as url,
        AllAtOnce(
            first_command=asyncio.to_thread(first_command, new("first")),
            commands_for_a_vm=asyncio.to_thread(commands_for_a_vm, new("vm")),
            without_installation=asyncio.to_thread(without_installation, new("none"), url),
        ) as all_at_once,
    ):
        yield all_at_once


# Proxies


@contextmanager
def running(folder: Path, *command: str) -> Iterator[None]:
    """A proxy, until the block ends."""
    with (folder / "proxy.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, "HOME": str(folder)}, stdout=log, stderr=log
        )
    try:
        yield
        assert process.poll() is None, (folder / "proxy.log").read_text()
    finally:
        process.terminate()
        process.wait(20)


@contextmanager
def nginx(folder: Path, *ports: int, tls: bool = True) -> Iterator[str]:
    """nginx with our configuration in its `http` block; the URL that it serves."""
    port = free_port()
    chain, key = certificate(folder, "api.example.com")
    text = (DEPLOY / "nginx.conf").read_text()
    servers = "".join(f"server 127.0.0.1:{each};\n" for each in ports)
    for old, new in {
        "server 127.0.0.1:8000;": servers,
        "listen 443 ssl;": f"listen 127.0.0.1:{port}{' ssl' if tls else ''};",
        "/etc/letsencrypt/live/api.example.com/fullchain.pem": str(chain),
        "/etc/letsencrypt/live/api.example.com/privkey.pem": str(key),
    }.items():
        assert old in text
        text = text.replace(old, new)
    (folder / "todo.conf").write_text(text)
    (folder / "nginx.conf").write_text(
        f"daemon off; pid {folder}/pid; error_log {folder}/errors;"
        f"events {{}} http {{ access_log off; include {folder}/todo.conf; }}"
    )
    with running(folder, tool("nginx"), "-e", f"{folder}/errors", "-c", f"{folder}/nginx.conf"):
        yield f"http{'s' if tls else ''}://127.0.0.1:{port}"


@contextmanager
def caddy(folder: Path, port: int, *, tls: bool = True) -> Iterator[str]:
    """Caddy with our configuration; the URL that it serves."""
    front = free_port()
    text = (DEPLOY / "Caddyfile").read_text()
    site = f"https://localhost:{front}" if tls else f"http://127.0.0.1:{front}"
    text = text.replace("127.0.0.1:8000", f"127.0.0.1:{port}").replace("api.example.com", site)
    options = "admin off\nauto_https disable_redirects\nskip_install_trust\nlocal_certs\n"
    (folder / "Caddyfile").write_text(f"{{\n{options}}}\n{text}")
    with running(folder, tool("caddy"), "run", "--config", "Caddyfile"):
        yield site


PROXIES = {"nginx": nginx, "caddy": caddy}


@pytest.mark.parametrize("proxy", PROXIES.values(), ids=PROXIES)
def test_a_proxy_of_the_readme_serves_over_tls_and_tells_whose_request_it_is(
    proxy: Callable[..., Any], vm: Callable[..., Systemd], tmp_path: Path, user: str
) -> None:
    """A caller's own X-Forwarded-For is not believed."""
    systemd = vm()
    systemd.start()
    with proxy(tmp_path, systemd.listener.getsockname()[1]) as url:
        headers = {**bearer(user), "X-Forwarded-For": "203.0.113.9", "X-Request-ID": user}
        with httpx.Client(base_url=url, verify=False, headers=headers) as client:

            def created() -> httpx.Response | None:
                try:
                    answer = client.post(path_of(user), json={"title": "Buy groceries"})
                except httpx.TransportError:
                    return None
                return answer if answer.status_code == 201 else None

            task = eventually(created, within=20).json()
            assert client.get(path_of(user)).json() == [task]
            assert client.get(path_of(user, task["id"])).json() == task
            assert client.get("/docs").status_code == 200
    logged = re.compile(rf"request={user} client=(\S+)")
    eventually(lambda: len(logged.findall(systemd.journal)) >= 4, within=5)
    assert set(logged.findall(systemd.journal)) == {"127.0.0.1"}


def test_the_files_of_the_proxies_go_where_the_page_says(
    own_vm: VM,
) -> None:
    """What is in them is tried above, with another host."""
    for name, place in (
        ("Caddyfile", "etc/caddy/Caddyfile"),
        ("nginx.conf", "etc/nginx/conf.d/todo.conf"),
    ):
        file = own_vm.place / place
        file.parent.mkdir(parents=True)
        own_vm.run(commands(f".deploy/{name}"), ROOT)
        text = (DEPLOY / name).read_text()
        assert file.read_text() == text.replace("api.example.com", "YOUR_HOST") != text
    asked = (own_vm.place / "asked").read_text().splitlines()
    assert asked == ["systemctl reload caddy", "nginx -t", "systemctl reload nginx"]


def test_the_log_names_the_client_that_a_trusted_proxy_names(
    vm: Callable[..., Systemd], user: str
) -> None:
    systemd = vm()
    systemd.start()
    headers = {"X-Forwarded-For": "203.0.113.9", "X-Request-ID": user}
    get(f"{systemd.url}/healthz", headers=headers, timeout=30)
    eventually(lambda: f"request={user} client=203.0.113.9" in systemd.journal, within=5)


# Upgrade


@pytest.fixture
def auth_with_keys() -> Iterator[str]:
    with jwks() as url:
        yield url


WRK = """
local headers = {["Authorization"] = "Bearer %s", ["Content-Type"] = "application/json"}
local count, get, post = 0
init = function()
  headers["Host"] = "%s"
  get = wrk.format("GET", "%s", headers)
  post = wrk.format("POST", "%s", headers, '{"title": "Buy groceries"}')
end
request = function()
  count = count + 1
  return count %% 2 == 0 and get or post
end
done = function(summary)
  local e = summary.errors
  io.write(string.format("RESULT %%d %%d\\n", summary.requests,
    e.connect + e.read + e.write + e.status + e.timeout))
end
"""


@contextmanager
def load(folder: Path, url: str, user: str, seconds: int) -> Iterator[list[int]]:
    """Reads and writes by turns on 32 connections; how many there were and how many failed."""
    host = urlsplit(url).netloc
    (folder / "load.lua").write_text(WRK % (token(user), host, "/readyz", path_of(user)))
    options = ["-t1", "-c32", f"-d{seconds}s", "--timeout", "30s", "-s", "load.lua", url]
    result: list[int] = []
    with subprocess.Popen([tool("wrk"), *options], cwd=folder, stdout=subprocess.PIPE) as wrk:
        yield result
        assert wrk.stdout is not None
        output = wrk.stdout.read().decode()
    result += [int(number) for number in re.findall(r"RESULT (\d+) (\d+)", output)[0]]


@pytest.mark.parametrize("proxy", PROXIES.values(), ids=PROXIES)
def test_an_upgrade_and_the_way_back_fail_no_request(
    proxy: Callable[..., Any],
    vm: Callable[..., Systemd],
    database_url: str,
    auth_with_keys: str,
    tmp_path: Path,
    user: str,
) -> None:
    """The page's commands, while wrk reads and writes through the proxy."""
    auth = auth_with_keys
    systemd = vm(BETTER_AUTH_URL=auth)
    units = tmp_path / "units"
    units.mkdir()
    upgrade, back = commands("mkdir -p old"), commands("cp -a old/. .")
    new = tmp_path / "new"
    (new / ".deploy").mkdir(parents=True)
    for name in (*VM_FILES[1:], ".deploy/todo.service", ".deploy/todo.socket"):
        shutil.copy(ROOT / name, new / name)
    (new / "todo.py").write_text(f"{(ROOT / 'todo.py').read_text()}\n# new\n")
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "systemctl").write_text("#!/bin/sh\n")  # what it would do stands below
    (programs / "systemctl").chmod(0o755)

    def run(commands: str, folder: Path) -> None:
        assert "systemctl restart todo" in commands
        commands = commands.replace("/srv/todo", str(systemd.folder))
        commands = commands.replace("/etc/systemd/system", str(units))
        commands = commands.replace(".venv/bin/pip install -r .requirements-run.txt && ", "")
        commands = commands.replace(".venv/bin/python", sys.executable)
        path = f"{programs}:{os.environ['PATH']}"
        done = run_as_written(commands, folder, PATH=path)
        assert "all is well" in done or folder != new, done
        assert systemd.stop() == 0
        start()

    def start() -> None:
        before = systemd.journal.count("listening on")
        systemd.start()
        eventually(lambda: systemd.journal.count("listening on") > before, within=20)

    start()
    with proxy(tmp_path, systemd.listener.getsockname()[1], tls=False) as url:
        eventually(lambda: listens(url), within=20)
        get(f"{url}/readyz", timeout=30).raise_for_status()
        twice = [(upgrade, new)] * 2  # which keeps the one before too
        with load(tmp_path, url, user, 9) as result:
            for commands_, folder in (*twice, (back, systemd.folder)):
                time.sleep(2)
                run(commands_, folder)
                assert ("# new" in (systemd.folder / "todo.py").read_text()) is (folder == new)
    requests, failed = result
    assert failed == 0
    assert requests > 500
    with psycopg.connect(database_url) as connection:
        sql = "select count(*) from tasks where user_id = %s"
        [[stored]] = connection.execute(sql, (user,)).fetchall()
    assert abs(stored - requests / 2) <= 33, "wrk ends with 32 requests on their way"
    assert "Traceback" not in systemd.journal
    print(f"{requests} requests, {failed} failed in three restarts")


# The database


@pytest.fixture
def own_vm(own_postgres: Callable[..., OwnPostgres], tmp_path: Path) -> VM:
    """A VM with the page's roles and database, and the table in it."""
    own = VM(tmp_path, own_postgres())
    own.database()
    return own


def test_a_backup_is_restored(
    own_vm: VM, own_postgres: Callable[..., OwnPostgres], serve: Serve
) -> None:
    """In a new shell: into the same database, and into that of another owner on another server."""
    url = own_vm.service_url
    server = serve(database_url=url)
    backup, restore = commands("pg_dump"), commands("pg_restore")

    def rows(vm: VM) -> Any:
        return vm.postgres.execute("select * from tasks order by id", database_url=vm.service_url)

    asyncio.run(Life(server.port).steps(40))
    own_vm.run(backup, own_vm.place)
    saved = rows(own_vm)
    assert saved
    asyncio.run(Life(server.port).steps(40))
    assert rows(own_vm) != saved
    own_vm.run(restore, own_vm.place)
    assert rows(own_vm) == saved
    asyncio.run(Life(server.port).steps(40))
    other = VM(own_vm.place, own_postgres())
    other.database(schema=False)
    other.postgres.execute("alter role todo_owner rename to somebody")
    other.postgres.execute("alter role somebody password 'OWNER_PASSWORD'")
    other.run(restore.replace("todo_owner:", "somebody:"), own_vm.place)
    assert rows(other) == saved
    moved = serve(database_url=other.service_url)
    asyncio.run(Life(moved.port).steps(40))  # with ids beyond the old ones


def test_the_roles_of_the_service_cannot_do_more_than_serve(own_vm: VM) -> None:
    for statement in ("drop table tasks", "create table more (id int)", "truncate tasks"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            own_vm.postgres.execute(statement, database_url=own_vm.service_url)


def test_an_older_table_gets_the_checks_of_times(own_vm: VM) -> None:
    """Those of `schema.sql`; rows that they would refuse stay."""
    owner, service = own_vm.here(OWNER), own_vm.service_url
    there = "select conname, pg_get_expr(conbin, conrelid) from pg_constraint where contype = 'c'"
    before = sorted(own_vm.postgres.execute(there, database_url=owner))
    for name in ("created_at", "updated_at"):
        drop = f"alter table tasks drop constraint tasks_{name}_range"
        own_vm.postgres.execute(drop, database_url=owner)
    insert = "insert into tasks (user_id, title, created_at) values ('demo', 'x', 'infinity')"
    own_vm.postgres.execute(insert, database_url=service)
    own_vm.postgres.execute(commands("not valid", "sql"), database_url=owner)
    assert sorted(own_vm.postgres.execute(there, database_url=owner)) == before
    with pytest.raises(psycopg.errors.CheckViolation):
        own_vm.postgres.execute(insert, database_url=service)


SCHEMA_TS = """
import { pgTable, text } from "drizzle-orm/pg-core";
export const user = pgTable("user", { id: text("id").primaryKey() });
"""


@pytest.mark.parametrize("moved", [False, True], ids=["made there", "moved there"])
def test_drizzle_leaves_a_schema_of_its_own_alone(
    own_postgres: Callable[..., OwnPostgres], serve: Serve, tmp_path: Path, moved: bool
) -> None:
    """Without one, `drizzle-kit push` drops the table, or fails if it is to leave it."""
    postgres = own_postgres()
    url = postgres.create_database(schema=moved)
    make, move = commands("create schema todo", "sql"), commands("set schema todo", "sql")
    for statement in f"{make};{move if moved else ''}".split(";"):
        if statement.strip():
            postgres.execute(statement, database_url=url)
    service = url.replace("//postgres@", "//todo:SERVICE_PASSWORD@")
    made = serve(
        database_url=service, args=("init-db",), files=("todo.py", "schema.sql"), wait=False
    )
    assert made.wait() == 0, made.stderr()
    server = serve(database_url=service)
    asyncio.run(Life(server.port).steps(20))

    def push(url: str, **more: Any) -> str:
        config = {"dialect": "postgresql", "schema": "./schema.ts", "dbCredentials": {"url": url}}
        (tmp_path / "schema.ts").write_text(SCHEMA_TS)
        text = f"export default {json.dumps(config | more)};"
        (tmp_path / "drizzle.config.ts").write_text(text)
        if not (tmp_path / "node_modules").exists():
            (tmp_path / "node_modules").symlink_to(node_packages(AUTH_FOLDER))
        command = ["node_modules/.bin/drizzle-kit", "push", "--force"]
        environment = plain_environment(HOME=str(tmp_path))
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        return done.stdout + done.stderr

    for _ in range(2):
        said = push(url)
        assert "Changes applied" in said or "No changes" in said, said
    asyncio.run(Life(server.port).steps(20))
    if not moved:  # what the page warns of
        shared = postgres.create_database(schema=True)
        assert "cannot drop sequence tasks_id_seq" in push(shared, tablesFilter=["!tasks"])
        push(shared)
        gone = "select to_regclass('tasks')"
        assert postgres.execute(gone, database_url=shared) == [(None,)]


@pytest.mark.parametrize("case", OLDER)
def test_a_table_of_another_backend_is_taken_over(own_vm: VM, serve: Serve, case: str) -> None:
    """By the page's commands alone, repeated until all is well."""
    owner = own_vm.here(OWNER)
    own_vm.postgres.execute("drop table tasks", database_url=owner)
    own_vm.postgres.execute(OLDER[case], database_url=owner)
    grant = "grant select, insert, update, delete on tasks to todo"
    own_vm.postgres.execute(grant, database_url=owner)
    folder = own_vm.place / "srv/todo"
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (folder / ".venv/bin/python").chmod(0o755)
    shutil.copy(ROOT / "todo.py", folder)
    with jwks() as auth:
        settings = {"NEON_DB_URL": own_vm.service_url, "BETTER_AUTH_SECRET": SECRET}
        settings["BETTER_AUTH_URL"] = auth
        lines = "".join(f"{name}={value}\n" for name, value in settings.items())
        (folder / ".env").write_text(lines)
        # A shell at a prompt has no pipefail, and `check` fails while there is a fault.
        take_over = f"set +o pipefail\n{commands('mend.sql')}"
        for _ in range(4):
            own_vm.run(take_over, folder)
            if not (folder / "mend.sql").read_text():
                break
        said = own_vm.run(".venv/bin/python todo.py check || true", folder)
    assert said.splitlines()[-1] == "ok    check: all is well", said
    server = serve(database_url=own_vm.service_url)
    [old] = get(f"{server.url}{path_of('demo')}", headers=bearer("demo")).json()
    assert (old["title"], old["created_at"]) == ("Old", "2024-01-02T03:04:05.000000Z")
    asyncio.run(Life(server.port).steps(40))


# The log


def test_the_sample_of_the_log_is_what_the_service_writes(
    vm: Callable[..., Systemd], user: str
) -> None:
    """But for what differs each time."""
    [sample] = re.findall(r"```\n(20.*?)```", PAGE, re.DOTALL)
    systemd = vm()
    systemd.start()
    url = f"{systemd.url}{path_of('demo')}"
    there = {"X-Forwarded-For": "203.0.113.9"}
    for headers, body in (
        (bearer("demo"), {"title": "Buy groceries"}),
        (bearer("demo"), {"title": ""}),
        (bearer("demo", exp=int(time.time()) - 61), None),
    ):
        method = "POST" if body else "GET"
        httpx.request(method, url, headers=headers | there, json=body, timeout=30)

    def shape(text: str) -> list[str]:
        text = re.sub(r"^\S+Z", "TIME", text, flags=re.MULTILINE)
        text = re.sub(r"[\d.]+ms", "MS", text)
        text = re.sub(r"expired \d+ s", "expired SECONDS", text)
        return re.sub(r"request=[0-9a-f]{16}", "ID", text).splitlines()

    written = [line for line in shape(systemd.journal) if "/tasks" in line]
    eventually(lambda: systemd.journal.count("/tasks") >= 3, within=5)
    written = [line for line in shape(systemd.journal) if "/tasks" in line]
    assert written == shape(sample)


# The container


def test_the_container_serves(own_vm: VM, tmp_path: Path) -> None:
    """Where docker or podman can build and run one: the one test that may skip in the gate."""
    build, run = commands("docker build").splitlines()
    lines = {"NEON_DB_URL": own_vm.service_url, "BETTER_AUTH_SECRET": SECRET, "HOST": "127.0.0.1"}
    port = free_port()
    lines |= {"BETTER_AUTH_URL": AUTH_URL, "PORT": str(port)}
    (tmp_path / "env").write_text("".join(f"{name}={value}\n" for name, value in lines.items()))
    name = f"todo-test-{port}"
    run = run.replace("/srv/todo/.env", f"{tmp_path}/env").replace("--name todo", f"--name {name}")
    run = run.replace("--publish 127.0.0.1:8000:8000", "--network host")  # to reach the database
    reasons = []
    for engine in ("docker", "podman"):
        if not shutil.which(engine):
            continue
        for command in (build, run):
            whole = command.replace("docker", engine, 1)
            done = subprocess.run(
                shlex.split(whole),
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=False,
                timeout=300,
            )
            if done.returncode:
                reasons.append(f"{whole}: {done.stderr[-300:]}")
                break
        else:
            try:
                url = f"http://127.0.0.1:{port}/readyz"
                eventually(lambda: listens(url), within=30)  # noqa: B023
                assert get(url).json() == {"status": "ready"}
            finally:
                subprocess.run([engine, "rm", "--force", name], capture_output=True, check=False)
            return
    pytest.skip("; ".join(reasons) or "neither docker nor podman is installed")


# How the installations ended


@pytest.mark.parametrize("name", ["first_command", "commands_for_a_vm", "without_installation"])
def test_the_commands_run_as_written(installations: AllAtOnce, name: str) -> None:
    installations[name]
