"""The contract against real servers: Schemathesis as README.md runs it, each promise once.

The command sends what `openapi.yaml` allows and what it forbids, with all checks, in all phases
(`schemathesis.toml`, `schemathesis_hooks.py`). Its seed is fixed, so two runs send the same.
Whatever else the contract declares is asked for by hand, also of a server whose database is
locked, damaged or gone, until each status, header, error code, member and sentence was seen.
"""

import http.client
import json
import re
import shlex
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import jwt
import psycopg
import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519

import todo
from todo_tests.contract import DECLARED, OPERATIONS, RESPONSES, AnsweredRequest, operations
from todo_tests.support import (
    ORIGIN,
    ROOT,
    SECRET,
    OwnPostgres,
    Postgres,
    Serve,
    Server,
    bearer,
    eventually,
    free_port,
    plain_environment,
    servers,
)

pytestmark = pytest.mark.slow

OF_TASKS = [
    f"{method.upper()} {path}" for method, path, _ in operations() if path.startswith("/api/")
]
# Requests at least for each operation on tasks, by phase and kind.
LEAST = {
    ("examples", "positive"): 1,
    ("coverage", "positive"): 5,
    ("coverage", "negative"): 5,
    ("fuzzing", "positive"): 120,
    ("fuzzing", "negative"): 30,
    ("stateful", "positive"): 20,
}


class Run(NamedTuple):
    """What the command reported."""

    report: Mapping[str, Any]
    requests: Counter[tuple[str, str, str]]  # phase, mode, operation
    walked: set[tuple[str, int]]  # operation and status of the stateful phase


@pytest.fixture(scope="module", autouse=True)
def command(
    postgres: Postgres, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """The command of README.md, but for the address and two reports, against a server of its own.

    It runs while the other tests do. With it comes the folder of its reports.
    """
    page = (ROOT / "todo_tests/README.md").read_text("utf-8")
    pattern = r"^BETTER_AUTH_SECRET=\$\(cat (\S+)\) \S+/(schemathesis .*)http://127.0.0.1:8000$"
    [(secret, command)] = re.findall(pattern, page, re.MULTILINE)
    assert secret == f"{todo.DEV}/better_auth_secret"
    program, *arguments = shlex.split(command)
    folder = tmp_path_factory.mktemp("schemathesis")
    url = postgres.create_database(schema=True)
    with servers(url) as serve, (folder / "said").open("wb") as said:
        server = serve(files=("todo.py", "openapi.yaml"))
        process = subprocess.Popen(
            [
                *(Path(sys.executable).parent / program, *arguments, server.url),
                *(f"--report-{kind}-path={folder / kind}" for kind in ("json", "ndjson")),
            ],
            cwd=ROOT,
            env=plain_environment(BETTER_AUTH_SECRET=SECRET),
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
        )
        try:
            yield process, folder
        finally:
            process.kill()
            process.wait()
    postgres.drop_database(url)


@pytest.fixture(scope="module")
def run(command: tuple[subprocess.Popen[bytes], Path]) -> Run:
    """What it reported at its end."""
    process, folder = command
    code = process.wait()
    said = (folder / "said").read_text("utf-8")
    print(said)
    assert code == 0, said
    requests: Counter[tuple[str, str, str]] = Counter()
    walked = set()
    for line in (folder / "ndjson").read_text("utf-8").splitlines():
        scenario = json.loads(line).get("ScenarioFinished", {})
        for name, case in scenario.get("recorder", {}).get("cases", {}).items():
            sent = case["value"]
            operation = f"{sent['method']} {sent['path']}"
            requests[scenario["phase"], sent["meta"]["generation"]["mode"], operation] += 1
            if scenario["phase"] == "stateful":
                interaction = scenario["recorder"]["interactions"][name]
                walked.add((operation, interaction["response"]["status_code"]))
    return Run(json.loads((folder / "json").read_text("utf-8")), requests, walked)


# Every promise of the contract, seen once


class Witness:
    """Asks a server, holds each answer to the contract and remembers what it showed."""

    def __init__(self) -> None:
        self.facts: set[str] = set()
        self.client = httpx.Client(
            headers={"Origin": ORIGIN}, event_hooks={"response": [self.note_response]}, timeout=30
        )

    def note_response(self, response: httpx.Response) -> None:
        response.read()
        self.note(AnsweredRequest.of(response))

    def note(self, answer: AnsweredRequest) -> None:
        assert answer.faults() == []
        self.facts |= set(answer.facts())

    def send_raw(self, server: Server, request: bytes) -> None:
        """What no client library would send."""
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(request)
            response = http.client.HTTPResponse(connection)
            response.begin()
            headers = {name.lower(): value for name, value in response.getheaders()}
            self.note(AnsweredRequest("", "", response.status, headers, response.read()))


def of_unknown_key() -> dict[str, str]:
    key = ed25519.Ed25519PrivateKey.generate()
    claims = {"sub": "demo", "exp": 2**40}
    return {"Authorization": f"Bearer {jwt.encode(claims, key, 'EdDSA', headers={'kid': 'k'})}"}


DEMO = bearer("demo")
REFUSED = {
    "no token": {},
    "bad token": {"Authorization": "Bearer a.b.c"},
    "expired token": bearer("demo", exp=1),
    "no keys": of_unknown_key(),
}
JSON = {"Content-Type": "application/json"}
BODIES: list[tuple[dict[str, str], bytes]] = [
    ({}, b"x"),
    (JSON, b" " * 70_000),
    (JSON, b"{"),
    (JSON, b"[]"),
    (JSON, b'{"title": "caf\xe9"}'),
    (JSON, b'{"title": "", "description": 5, "completed": 1}'),
    (JSON, b'{"title": 5, "description": "\\u0000"}'),
    (JSON, b'{"title": "\\u0000."}'),
    (JSON, b'{"title": "%b", "description": "%b"}' % (b"x" * 201, b"x" * 1001)),
]
RAW = {
    "no HTTP": b"nonsense\r\n\r\n",
    "long head": b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 70_000 + b"\r\n\r\n",
}


def ask_for_successes(witness: Witness, url: str) -> None:
    """One good request to each operation."""
    for method, path, operation in operations():
        new = {"json": {"title": "Buy groceries"}}
        task = 1
        if "{id}" in path:
            created = witness.client.post(f"{url}/api/demo/tasks", headers=DEMO, **new)
            task = created.json().get("id", task)
        body = new if "requestBody" in operation else {}
        witness.client.request(
            method, url + path.format(user_id="demo", id=task), headers=DEMO, **body
        )


def lose_changes(witness: Witness, url: str, postgres: OwnPostgres, database: str) -> None:
    """One good request for each change, whose connection is lost while it waits for a lock."""
    tasks = f"{url}/api/demo/tasks"
    new = {"json": {"title": "Buy groceries"}}
    task = f"{tasks}/{witness.client.post(tasks, headers=DEMO, **new).json()['id']}"
    changes: list[tuple[str, str, dict[str, Any]]] = [
        *(("POST", tasks, new), ("PUT", task, new)),
        *(("PATCH", f"{task}/complete", {}), ("DELETE", task, {})),
    ]
    waiting = "select from pg_stat_activity where wait_event_type = 'Lock'"
    with (
        ThreadPoolExecutor(len(changes)) as pool,
        closing(psycopg.connect(postgres.url, autocommit=True)) as watch,
        closing(psycopg.connect(database)) as connection,
    ):
        connection.execute("lock table tasks")
        asked = [
            pool.submit(witness.client.request, method, path, headers=DEMO, **body)
            for method, path, body in changes
        ]
        eventually(lambda: watch.execute(waiting).rowcount == len(changes))
        postgres.stop("immediate")
        for each in asked:
            each.result()


def ask_for_refusals(witness: Witness, url: str) -> None:
    """All that is wrong with requests, at each operation on tasks and at none."""
    ask = witness.client.request
    for method, path, operation in operations():
        at = f"{url}{path}"
        if "{user_id}" in path:
            for headers in REFUSED.values():
                ask(method, at.format(user_id="demo", id=1), headers=headers)
            for user, task in (("somebody", 1), ("%00", 0), ("demo", 2**62)):
                body = {"json": {"title": "x"}} if "requestBody" in operation else {}
                ask(method, at.format(user_id=user, id=task), headers=DEMO, **body)
        if "requestBody" in operation:
            for headers, content in BODIES:
                sent = {"headers": {**DEMO, **headers}, "content": content}
                ask(method, at.format(user_id="demo", id=1), **sent)
    ask("GET", f"{url}/api/demo/tasks?completed=x", headers=DEMO)
    for headers in REFUSED.values():
        ask("GET", f"{url}/api/nothing", headers=headers)
    ask("GET", f"{url}/nowhere")
    ask("DELETE", f"{url}/healthz")
    for origin in (ORIGIN, "http://elsewhere.example"):
        for method in ("PUT", "BREW"):
            headers = {"Origin": origin, "Access-Control-Request-Method": method}
            answer = ask("OPTIONS", f"{url}/", headers=headers)
            allows = any(name.startswith("access-control-") for name in answer.headers)
            assert (answer.status_code, allows) == (204, origin == ORIGIN)


def test_each_promise_is_kept_at_least_once_and_nothing_else_is_seen(
    serve: Serve, own_postgres: Callable[..., OwnPostgres]
) -> None:
    """`pytest -s` prints what was seen of each operation."""
    postgres, witness = own_postgres(), Witness()
    database, refusing, lost = (postgres.create_database(schema=True) for _ in range(3))
    variables = {"DB_TIMEOUT": "0.3", "JWKS_URL": f"http://127.0.0.1:{free_port()}/jwks"}
    server = serve(variables, database_url=database, files=("todo.py", "openapi.yaml"))
    ask_for_successes(witness, server.url)
    ask_for_refusals(witness, server.url)
    for request in RAW.values():
        witness.send_raw(server, request)
    # In the second database PostgreSQL itself gives up, so a change is known to be undone.
    postgres.set_default(refusing, "lock_timeout", "'50ms'")
    for url, locked in ((server.url, database), (serve(database_url=refusing).url, refusing)):
        with psycopg.connect(locked) as connection:
            connection.execute("lock table tasks")
            ask_for_successes(witness, url)
    postgres.execute("drop table tasks", database_url=database)
    ask_for_successes(witness, server.url)
    lose_changes(witness, serve(database_url=lost).url, postgres, lost)
    ask_for_successes(witness, server.url)
    # The contract and its page are not there where openapi.yaml is not.
    ask_for_successes(witness, serve().url)
    for name in RESPONSES:
        shown = sorted(fact.removeprefix(name) for fact in witness.facts if fact.startswith(name))
        print(f"{name}:", *shown, sep="\n   ")
    assert sorted(DECLARED - witness.facts) == []


# How the command ended


def test_the_command_of_the_readme_finds_nothing(run: Run) -> None:
    """SC-007: examples, each limit's both sides, random valid and invalid requests, walks."""
    report = run.report
    assert report["failures"] == report["errors"] == []
    assert {name: warning for name, warning in report["warnings"].items() if warning} == {}
    assert {phase["status"] for phase in report["phases"].values()} == {"success"}
    assert report["operations"]["tested"] == len(OPERATIONS)
    assert report["test_cases"]["generated"] >= 1500


@pytest.mark.parametrize("operation", OF_TASKS)
def test_each_operation_is_sent_enough_of_each_kind(run: Run, operation: str) -> None:
    sent = {kind: run.requests[*kind, operation] for kind in LEAST}
    print(operation, sent)
    assert {kind: count for kind, count in sent.items() if count < LEAST[kind]} == {}


def test_links_lead_from_operation_to_operation(run: Run) -> None:
    """What was created can be had, what was deleted cannot."""
    succeeded = {operation for operation, status in run.walked if 200 <= status < 300}
    missed = {operation for operation, status in run.walked if status == 404}
    assert succeeded == set(OF_TASKS)
    assert missed == {operation for operation in OF_TASKS if "{id}" in operation}
