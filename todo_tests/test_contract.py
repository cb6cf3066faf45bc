"""Schemathesis: what `openapi.yaml` allows and forbids is sent, what it promises is checked.

Requests go to the app in process, on the event loop that Schemathesis runs for it, and to a real
PostgreSQL. Each carries a token for the very user of its path, so that user ids are fuzzed for
real, and the Origin of an allowed page, so that CORS headers are there to be checked. The seed is
fixed: two runs send the same.

None of the built-in checks is disabled. `max_response_time` has no limit here, because a shared
machine's clock proves nothing; `object_level_authorization` needs a login operation, which Better
Auth has and this API has not, so `another_user_is_refused` below does its work.
"""

import http.client
import json
import logging
import re
import socket
import urllib.parse
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import httpx
import hypothesis
import jsonschema_rs
import jwt
import psycopg
import pytest
import schemathesis
import yaml
from cryptography.hazmat.primitives.asymmetric import ed25519
from schemathesis import engine
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import events
from schemathesis.python import asgi

import todo
from todo_tests.support import ORIGIN, ROOT, bearer, free_port, token

REQUESTS = 120  # of each fuzzing run, for each operation
WALKS, STEPS = 100, 12
OF_HTTP_ITSELF = {"content-type", "content-length", "date", "connection"}
METHODS = {"get", "post", "put", "patch", "delete"}
CONTRACT = yaml.safe_load((ROOT / "openapi.yaml").read_text("utf-8"))
OPERATIONS = [
    f"{method.upper()} {path}"
    for path, item in CONTRACT["paths"].items()
    for method in item
    if method in METHODS
]


def fuzzing(mode: str) -> dict[str, Any]:
    return {
        "fuzzing": {
            "enabled": True,
            "generation": {"mode": mode, "max-examples": REQUESTS},
            # Both change what is generated while Hypothesis generates, which ends a run early.
            "extra-data-sources": {"responses": False},
            "error-feedback": {"enabled": False},
        }
    }


# What is sent, and how many requests at least for each operation. What needs no token takes no
# input that could be wrong, so nothing can be invalid there but the method.
RUNS = {
    "examples": ({"examples": {"enabled": True, "fill-missing": True}}, 1, 1),
    "boundaries": ({"coverage": {"enabled": True}}, 15, 8),
    "valid": (fuzzing("positive"), REQUESTS, REQUESTS),
    "invalid": (fuzzing("negative"), REQUESTS, 0),
}


class PathUser:
    """Signs a token for the user whose path the request goes to."""

    def get(self, case, context):
        user = urllib.parse.unquote(str(case.path_parameters.get("user_id", "")))
        return token(user or "nobody")

    def set(self, case, data, context):
        case.headers["Authorization"] = f"Bearer {data}"


def promised(case, response):
    """What the contract says of an answer with this status to this operation, if anything."""
    return case.operation.responses.find_by_status_code(response.status_code)


@schemathesis.check
def every_header_is_documented(context, response, case) -> None:
    if (promise := promised(case, response)) is not None:
        documented = {name.lower() for name, _ in promise.headers.items()}
        assert set(response.headers) - OF_HTTP_ITSELF <= documented


@schemathesis.check
def a_usable_request_id_comes_back(context, response, case) -> None:
    sent = case.headers.get("X-Request-ID")
    if isinstance(sent, str) and re.fullmatch("[A-Za-z0-9._-]{1,128}", sent):
        assert response.headers["x-request-id"] == [sent]


@schemathesis.check
def a_page_can_read_the_answer(context, response, case) -> None:
    """FR-030, errors included."""
    assert response.headers.get("access-control-allow-origin") == [ORIGIN]
    assert response.headers.get("access-control-allow-credentials") == ["true"]


@schemathesis.check
def an_error_is_one_of_the_examples(context, response, case) -> None:
    """FR-026, FR-027: the whole body of every error but a 422 is in the contract."""
    promise = promised(case, response)
    if promise is not None and response.status_code >= 400 and response.status_code != 422:
        examples = promise.definition["content"]["application/json"]["examples"].values()
        assert response.json() in [example["value"] for example in examples]


@schemathesis.check
def another_user_is_refused(context, response, case) -> None:
    """FR-005, SC-004: what the path's user may do, nobody else may."""
    if case.path.startswith("/api/") and 200 <= response.status_code < 300:
        other = case.derive()
        other.headers["Authorization"] = f"Bearer {token('somebody else')}"
        assert other.call().status_code == 403


class Outcome(NamedTuple):
    requests: Counter[str]
    failures: dict[str, list[str]]


@pytest.fixture(scope="module")
def database(postgres) -> Iterator[str]:
    """A database of its own: ids that depend on no other test."""
    url = postgres.create_database(schema=True)
    yield url
    postgres.drop_database(url)


@pytest.fixture(scope="module")
def contract(make_settings, database) -> Iterator[Callable[..., schemathesis.BaseSchema]]:
    """A factory of the contract, bound to an app of its own and to the phases to be run."""

    def bind(phases: dict[str, Any]) -> schemathesis.BaseSchema:
        config = SchemathesisConfig.from_dict(
            {**settings(), "phases": {"enabled": False, **phases}}
        )
        schema = schemathesis.openapi.from_path(ROOT / "openapi.yaml", config=config)
        schema.app = todo.create_app(make_settings(neon_db_url=database))
        schema.auth(refresh_interval=None)(PathUser)
        return schema

    logging.disable(logging.WARNING)  # thousands of requests, a line for each
    yield bind
    logging.disable(logging.NOTSET)
    asgi.shutdown_lifespans()


def settings() -> dict[str, Any]:
    return {
        "seed": 1,
        # Schemathesis's own probes go over the network, where they must find nobody.
        "base-url": f"http://127.0.0.1:{free_port()}",
        "headers": {"Origin": ORIGIN},
        "continue-on-failure": True,
        "generation": {"deterministic": True, "database": "none"},
        # Stricter than Schemathesis by itself: with a token for the right user, valid requests meet
        # no 401 and no fault, and invalid ones no 403 or 404.
        "checks": {
            "positive_data_acceptance": {"expected-statuses": ["2xx", "403", "404"]},
            "negative_data_rejection": {"expected-statuses": ["401", "415", "422"]},
        },
    }


@pytest.fixture(scope="module", params=RUNS)
def run(request, contract) -> tuple[str, Outcome]:
    """One run over all operations."""
    outcome = Outcome(Counter(), defaultdict(list))
    for event in engine.from_schema(contract(RUNS[request.param][0])).execute():
        if isinstance(event, events.FatalError):
            raise event.exception
        if isinstance(event, events.NonFatalError):
            if event.label not in OPERATIONS:
                raise event.value
            outcome.failures[event.label].append(f"{event.info.title}: {event.info.message}")
        if isinstance(event, events.ScenarioFinished):
            recorder = event.recorder
            sent = [case for case in recorder.cases.values() if case.parent_id is None]
            outcome.requests[recorder.label] += len(sent)
            for check in (check for checks in recorder.checks.values() for check in checks):
                if info := check.failure_info:
                    text = f"{check.name}: {info.failure.message}\n{info.code_sample}"
                    outcome.failures[recorder.label].append(text)
    return request.param, outcome


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_answer_keeps_the_contract(run, operation) -> None:
    """SC-007: to examples, to each limit's both sides, to random valid and invalid requests."""
    name, outcome = run
    _, least, least_if_public = RUNS[name]
    if failures := outcome.failures[operation]:
        pytest.fail("\n\n".join(failures), pytrace=False)
    assert outcome.requests[operation] >= (least if "/api/" in operation else least_if_public)


def test_links_lead_from_operation_to_operation(contract, database) -> None:
    """Random walks along the links: what was created can be had, what was deleted cannot."""
    answers = set()
    with psycopg.connect(database, autocommit=True) as connection:

        class Walk(contract({"stateful": {"enabled": True}}).as_state_machine()):
            def setup(self):
                connection.execute("truncate tasks restart identity")

            def get_call_kwargs(self, case):
                return {"headers": {"Origin": ORIGIN}}

            def after_call(self, response, case):
                super().after_call(response, case)
                answers.add((case.operation.label, response.status_code))

        Walk.run(
            settings=hypothesis.settings(
                max_examples=WALKS,
                stateful_step_count=STEPS,
                derandomize=True,
                database=None,
                deadline=None,
                suppress_health_check=list(hypothesis.HealthCheck),
            )
        )

    of_tasks = [operation for operation in OPERATIONS if "/api/" in operation]
    succeeded = {operation for operation, status in answers if 200 <= status < 300}
    missed = {operation for operation, status in answers if status == 404}
    assert succeeded == set(of_tasks)
    assert missed == {operation for operation in of_tasks if "{id}" in operation}


# Answers of no operation, and those that random requests do not meet.


def keeps(name: str, status: int, headers: Mapping[str, str], body: bytes) -> None:
    """The answer is the contract's component of that name: headers, their values, the body."""
    component = CONTRACT["components"]["responses"][name]
    promised = {
        header.lower(): CONTRACT["components"]["headers"][reference["$ref"].split("/")[-1]]
        for header, reference in component["headers"].items()
    }
    assert set(headers) - OF_HTTP_ITSELF <= set(promised)
    assert {header for header in promised if "required" in promised[header]} <= set(headers)
    for header in set(promised) & set(headers):
        schema, value = promised[header]["schema"], headers[header]
        sent = int(value) if schema["type"] == "integer" else value
        assert jsonschema_rs.is_valid(schema, sent), f"{header}: {value}"
    if "content" not in component:
        assert (status, body) == (204, b"")
        return
    assert headers["content-type"] == "application/json"
    examples = component["content"]["application/json"]["examples"].values()
    [error] = [each["value"] for each in examples if each["value"] == json.loads(body)]
    assert todo.ERRORS[error["error_code"]][0] == status


def of_unknown_key() -> dict[str, str]:
    key = ed25519.Ed25519PrivateKey.generate()
    claims = {"sub": "demo", "exp": 2**40}
    return {"Authorization": f"Bearer {jwt.encode(claims, key, 'EdDSA', headers={'kid': 'k'})}"}


TASKS = "/api/demo/tasks"
JSON = {"Content-Type": "application/json"}


def preflight(origin: str, method: str, headers: str) -> tuple[str, str, dict[str, str], bytes]:
    asked = {"Method": method, "Headers": headers}
    asked = {f"Access-Control-Request-{what}": value for what, value in asked.items()}
    return "OPTIONS", TASKS, {"Origin": origin, **asked}, b""


ANSWERS = {
    "Preflight": preflight(ORIGIN, "PUT", "authorization,content-type,x-request-id"),
    "PreflightRefused origin": preflight("http://localhost:3001", "GET", "authorization"),
    "PreflightRefused method": preflight(ORIGIN, "TRACE", "authorization"),
    "PreflightRefused headers": preflight(ORIGIN, "GET", "authorization,x-secret"),
    "NotFound": ("GET", "/nowhere", {"Origin": ORIGIN}, b""),
    "MethodNotAllowed": ("DELETE", "/healthz", {}, b""),
    "Unauthorized": ("GET", TASKS, bearer("demo", exp=1), b""),
    "PayloadTooLarge": ("POST", TASKS, {**bearer("demo"), **JSON}, b" " * (64 * 1024 + 1)),
    "AuthKeysUnavailable": ("GET", TASKS, of_unknown_key(), b""),
}


@pytest.mark.parametrize("name", ANSWERS)
async def test_an_answer_of_no_operation_keeps_the_contract(make_settings, name) -> None:
    """FR-026, FR-033."""
    app = todo.create_app(make_settings(jwks_url=f"http://127.0.0.1:{free_port()}/jwks"))
    method, path, headers, body = ANSWERS[name]
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://testserver"
        ) as client,
    ):
        response = await client.request(method, path, headers=headers, content=body)
    keeps(name.split()[0], response.status_code, response.headers, response.content)


NO_REQUESTS = {
    "BadRequest": b"nonsense\r\n\r\n",
    "HeadersTooLarge": b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 70_000 + b"\r\n\r\n",
}


def test_an_answer_of_the_http_layer_keeps_the_contract(serve) -> None:
    server = serve()
    for name, request in NO_REQUESTS.items():
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(request)
            response = http.client.HTTPResponse(connection)
            response.begin()
            headers = {header.lower(): value for header, value in response.getheaders()}
            keeps(name, response.status, headers, response.read())
