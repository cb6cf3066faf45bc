"""Schemathesis: every request that `openapi.yaml` allows or forbids, and every answer it promises.

Requests go to the app in process (Schemathesis runs it on an event loop of its own) and to a real
PostgreSQL. Each carries a token for the very user of its path, so that user ids are fuzzed too, and
the Origin of an allowed page, so that CORS headers are there to be checked.

Of the built-in checks none is disabled. Two have nothing to do here: `max_response_time` has no
limit set, since a shared machine's clock proves nothing (SC-001 is measured elsewhere), and
`object_level_authorization` needs a login endpoint, which Better Auth has and this service has not;
`test_nobody_else` below does its work.
"""

import urllib.parse
from collections.abc import Iterator

import hypothesis
import pytest
import schemathesis
from schemathesis.config import SchemathesisConfig
from schemathesis.python import asgi

import todo
from todo_tests.support import ORIGIN, ROOT, token

EXAMPLES = 150  # requests an operation, besides the contract's own examples and the boundary cases
SCENARIOS, STEPS = 60, 10
CONFIG = {
    "seed": 1,
    "generation": {"deterministic": True, "database": "none", "max-examples": EXAMPLES},
    # A token for the right user leaves less room than Schemathesis gives by default: never a 401.
    # 403 and 404 remain, for tasks that others made or that nobody did.
    "checks": {"positive_data_acceptance": {"expected-statuses": ["2xx", "403", "404"]}},
}
HTTP_ITSELF = {"content-type", "content-length"}


class PathUser:
    """Signs a token for the user whose path the request goes to."""

    def get(self, case, context):
        user = urllib.parse.unquote(str(case.path_parameters.get("user_id", "nobody")))
        return token(user or "nobody")

    def set(self, case, data, context):
        case.headers["Authorization"] = f"Bearer {data}"


@pytest.fixture(scope="module")
def contract(make_settings) -> Iterator[schemathesis.BaseSchema]:
    """The contract as the app itself serves it, wired to the app."""
    app = todo.create_app(make_settings())
    schema = schemathesis.openapi.from_asgi(
        "/openapi.yaml", app, config=SchemathesisConfig.from_dict(CONFIG)
    )
    schema.auth(refresh_interval=None)(PathUser)
    yield schema
    asgi.shutdown_lifespans()


def documented(case, response):
    """What the contract says of this answer, or None."""
    return case.operation.responses.find_by_status_code(response.status_code)


def every_header_is_documented(context, response, case) -> None:
    if (promised := documented(case, response)) is not None:
        undocumented = set(response.headers) - {name.lower() for name in promised.headers}
        assert undocumented <= HTTP_ITSELF, f"not in the contract: {undocumented - HTTP_ITSELF}"


def a_page_can_read_the_answer(context, response, case) -> None:
    """FR-030: errors too."""
    assert response.headers.get("access-control-allow-origin") == [ORIGIN]
    assert response.headers.get("access-control-allow-credentials") == ["true"]


def an_error_is_one_of_the_examples(context, response, case) -> None:
    """FR-026, FR-027: the whole body of every error but a 422 is known beforehand."""
    promised = documented(case, response)
    if promised is not None and response.status_code >= 400 and response.status_code != 422:
        examples = promised.definition["content"]["application/json"]["examples"].values()
        assert response.json() in [example["value"] for example in examples]


def nobody_else_gets_in(context, response, case) -> None:
    """FR-005, SC-004: what a user may do, another user may not."""
    if "/api/" in case.path and 200 <= response.status_code < 300:
        headers = {**case.headers, "Authorization": f"Bearer {token('somebody-else')}"}
        other = case.derive(headers=headers)
        assert other.call(headers={"Origin": ORIGIN}).status_code == 403


CHECKS = [
    every_header_is_documented,
    a_page_can_read_the_answer,
    an_error_is_one_of_the_examples,
    nobody_else_gets_in,
]


@schemathesis.pytest.from_fixture("contract").parametrize()
def test_every_answer_keeps_the_contract(case) -> None:
    """SC-007: the contract's examples, every boundary of every limit, and random requests."""
    case.call_and_validate(headers={"Origin": ORIGIN}, additional_checks=CHECKS)


def test_links_lead_from_one_operation_to_the_next(contract) -> None:
    """Random walks along the links: what was created can be had, and what was deleted cannot."""

    class Walk(contract.as_state_machine()):
        def get_call_kwargs(self, case):
            return {"headers": {"Origin": ORIGIN}}

        def validate_response(self, response, case, additional_checks=None, **kwargs):
            super().validate_response(response, case, CHECKS, **kwargs)

    Walk.run(
        settings=hypothesis.settings(
            max_examples=SCENARIOS,
            stateful_step_count=STEPS,
            derandomize=True,
            database=None,
            deadline=None,
        )
    )
