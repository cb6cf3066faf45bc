"""The README's way onto a VM, walked as written: files, units, proxies, upgrade, backup.

There is no systemd in a container: `Systemd` does with the two units what it would do.
"""

import asyncio
import configparser
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
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psycopg
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from todo_tests.damage import AllAtOnce, Life, jwks
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
    path_of,
    plain_environment,
    token,
)

pytestmark = pytest.mark.slow

DEPLOY = ROOT / ".deploy"
README = (ROOT / "README.md").read_text("utf-8")


def commands(text: str) -> str:
    """The README's block of shell commands that holds the text."""
    [block] = [each for each in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) if text in each]
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


def first_command(folder: Path) -> None:
    """In a fresh copy; it is seen to be alive long before it serves."""
    for name in ("todo.py", "schema.sql", "openapi.yaml", ".requirements-run.txt"):
        shutil.copy(ROOT / name, folder)
    port, start = free_port(), time.monotonic()
    with (folder / "said").open("wb") as said:
        process = subprocess.Popen(
            ["bash", "-c", commands("todo.py dev").rstrip()],
            cwd=folder,
            env=plain_environment(PORT=str(port), HOME=str(folder)),
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )

    def text() -> str:
        return (folder / "said").read_text("utf-8", "replace")

    try:
        eventually(text, within=30)
        alive = time.monotonic() - start
        eventually(lambda: "curl" in text() or process.poll(), within=300, why=text())
        serving = time.monotonic() - start
        again = commands("todo.py token")
        header = {"Authorization": f"Bearer {run_as_written(again, folder).strip()}"}
        answer = get(f"http://127.0.0.1:{port}{path_of('alice')}", headers=header)
        assert (answer.status_code, answer.json()) == (200, [])
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(20)
    size = sum(each.stat().st_size for each in (folder / ".venv").rglob("*") if each.is_file())
    assert size < 200 * 2**20
    print(f"alive after {alive:.1f} s, serves after {serving:.1f} s, {size / 2**20:.0f} MiB")


def commands_for_a_vm(copy: Path, database_url: str) -> None:
    """From a fresh copy to a service that systemd would start."""
    place = copy.parent
    folder, values = place / "srv/todo", {"NEON_DB_URL": database_url}
    copy.mkdir()
    for name in ("todo.py", "schema.sql", "openapi.yaml", ".requirements-run.txt", ".env.example"):
        shutil.copy(ROOT / name, copy)
    values["BETTER_AUTH_SECRET"] = SECRET
    editor = place / "editor"
    with jwks() as auth:
        values["BETTER_AUTH_URL"] = auth
        edits = "".join(f"s|^{name}=.*|{name}={value}|;" for name, value in values.items())
        editor.write_text(f"#!/bin/sh\nsed -i '{edits}' \"$1\"\n")
        editor.chmod(0o755)
        block = commands("init-db").replace("/srv/todo", str(folder))
        said = run_as_written(block, copy, EDITOR=str(editor), HOME=str(place))
    findings = said.partition("the table is as schema.sql describes it\n")[2].splitlines()
    assert len(findings) == 6
    assert all(line.startswith("ok ") for line in findings), findings
    systemd = Systemd(folder, free_port(), str(folder / ".venv/bin/python"))
    try:
        systemd.start()
        answer = get(f"{systemd.url}/readyz", timeout=30)
        assert answer.json() == {"status": "ready"}
        assert get(f"{systemd.url}/docs").status_code == 200
        assert systemd.stop() == 0
    finally:
        systemd.close()
    assert oct((folder / ".env").stat().st_mode & 0o777) == "0o600"


@pytest.fixture(scope="module", autouse=True)
def installations(
    postgres: Postgres, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[AllAtOnce]:
    new = tmp_path_factory.mktemp
    with (
        postgres.new_database() as url,
        AllAtOnce(
            first_command=asyncio.to_thread(first_command, new("first")),
            commands_for_a_vm=asyncio.to_thread(commands_for_a_vm, new("vm") / "copy", url),
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


def certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate and its key."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now = datetime.now(UTC)
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("api.example.com")]), True)
        .sign(key, hashes.SHA256())
    )
    (folder / "chain.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return folder / "chain.pem", folder / "key.pem"


@contextmanager
def nginx(folder: Path, *ports: int, tls: bool = True) -> Iterator[str]:
    """nginx with our configuration in its `http` block; the URL that it serves."""
    port = free_port()
    chain, key = certificate(folder)
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


def test_the_log_names_the_client_that_a_trusted_proxy_names(
    vm: Callable[..., Systemd], user: str
) -> None:
    systemd = vm()
    systemd.start()
    headers = {"X-Forwarded-For": "203.0.113.9", "X-Request-ID": user}
    get(f"{systemd.url}/healthz", headers=headers, timeout=30)
    eventually(lambda: f"request={user} client=203.0.113.9" in systemd.journal, within=5)


# Upgrade

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
    tmp_path: Path,
    user: str,
) -> None:
    """The README's commands, while wrk reads and writes through the proxy."""
    systemd = vm()
    upgrade = commands("mkdir -p old").replace("/srv/todo", str(systemd.folder))
    [back] = re.findall(r"To go back, in `/srv/todo`: `(.*?)`", README)
    restart = "systemctl restart todo"
    new = tmp_path / "new"
    new.mkdir()
    for name in ("openapi.yaml", ".requirements-run.txt"):
        shutil.copy(ROOT / name, new)
    (new / "todo.py").write_text(f"{(ROOT / 'todo.py').read_text()}\n# new\n")
    pip = ".venv/bin/pip install -r .requirements-run.txt && "

    def run(commands: str, folder: Path) -> None:
        assert restart in commands
        without = commands.replace(pip, "").replace(f"&& {restart}", "").replace(restart, "")
        subprocess.run(["bash", "-euc", without], cwd=folder, check=True)
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
        with load(tmp_path, url, user, 9) as result:
            for commands_, folder in ((upgrade, new), (back, systemd.folder), (upgrade, new)):
                time.sleep(2)
                run(commands_, folder)
                assert "# new" in (systemd.folder / "todo.py").read_text() or folder != new
    requests, failed = result
    assert failed == 0
    assert requests > 500
    with psycopg.connect(database_url) as connection:
        sql = "select count(*) from tasks where user_id = %s"
        [[stored]] = connection.execute(sql, (user,)).fetchall()
    assert abs(stored - requests / 2) <= 33, "wrk ends with 32 requests on their way"
    assert "Traceback" not in systemd.journal
    print(f"{requests} requests, {failed} failed in three restarts")


# Backup


def test_a_backup_is_restored(
    own_postgres: Callable[..., OwnPostgres], tmp_path: Path, serve: Serve
) -> None:
    """With its rows, its rights, and new ids beyond the old ones."""
    postgres = own_postgres()
    url = postgres.create_database(schema=True)
    postgres.execute("create role todo login", database_url=url)
    grants = re.findall(r"^grant .*;$", README, re.MULTILINE)
    postgres.execute(grants[0], database_url=url)
    server = serve(database_url=url.replace("//postgres@", "//todo@"))
    asyncio.run(Life(server.port).steps(40))
    backup, restore = commands("pg_dump").splitlines()

    def rows() -> Any:
        return postgres.execute("select * from tasks order by id", database_url=url)

    def run(command: str) -> None:
        path = f"{OwnPostgres._bin()}:{os.environ['PATH']}"
        environment = {"PATH": path, "NEON_DB_URL": url}
        subprocess.run(["bash", "-euc", command], cwd=tmp_path, env=environment, check=True)

    run(backup)
    saved = rows()
    assert saved
    asyncio.run(Life(server.port).steps(40))
    assert rows() != saved
    run(restore)
    assert rows() == saved
    asyncio.run(Life(server.port).steps(40))


# How the installations ended


@pytest.mark.parametrize("name", ["first_command", "commands_for_a_vm"])
def test_the_commands_run_as_written(installations: AllAtOnce, name: str) -> None:
    installations[name]
