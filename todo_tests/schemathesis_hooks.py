"""What Schemathesis has to know of this API: whose token a path needs, and four promises more.

`schemathesis.toml` names this module. Like the server it reads BETTER_AUTH_SECRET, which signs the
tokens, and ALLOWED_ORIGINS, whose first is the page that asks.

Schemathesis's own `object_level_authorization` stays idle, because it wants a few users with fixed
credentials; it would repeat reads alone, and under the same path. `nobody_else_may` repeats every
success, writes too, for whatever user was made up, and under the other user's own path as well.
"""

import os
import time
import urllib.parse

import jwt
import schemathesis
from schemathesis.core.parameters import ParameterLocation
from schemathesis.generation.meta import TestPhase

from todo_tests.contract import AnsweredRequest, examples_of

ORIGIN = os.environ.get("ALLOWED_ORIGINS", "http://localhost:3000").partition(",")[0].strip()
SOMEBODY_ELSE = "somebody else"


def sign_in(case: schemathesis.Case, user: str) -> None:
    claims = {"sub": user, "exp": int(time.time()) + 600}
    secret = os.environ["BETTER_AUTH_SECRET"].encode()
    case.headers["Authorization"] = f"Bearer {jwt.encode(claims, secret, 'HS256')}"


@schemathesis.auth(refresh_interval=None)
class PathUser:
    """Signs a token for the very user of the path, so that user ids are fuzzed for real.

    In the stateful phase a user whom no link leads to is a new one: Hypothesis ends the phase when
    the same steps are answered differently, because of what an earlier walk left behind.
    """

    walkers = 0

    def get(self, case, context):
        user = urllib.parse.unquote(str(case.path_parameters.get("user_id", "")))
        path = case.meta.components.get(ParameterLocation.PATH)
        if (
            case.meta.phase.name == TestPhase.STATEFUL
            and user
            and path
            and path.mode.is_positive
            and not user.startswith("walker ")
        ):
            self.walkers += 1
            user = f"walker {self.walkers}"
            case.path_parameters["user_id"] = urllib.parse.quote(user)
        return user or "nobody"

    def set(self, case, user, context):
        sign_in(case, user)
        case.headers["Origin"] = ORIGIN


@schemathesis.check
def nothing_is_undeclared(context, response, case) -> None:
    """No header, status, error code or member that the contract does not name."""
    path = urllib.parse.urlsplit(response.request.url).path
    headers = {name: ", ".join(values) for name, values in response.headers.items()}
    answer = AnsweredRequest(case.method, path, response.status_code, headers, response.content)
    faults = answer.faults()
    assert not faults, "; ".join(faults)


@schemathesis.check
def a_page_can_read_the_answer(context, response, case) -> None:
    """FR-030, errors included."""
    if case.headers.get("Origin") == ORIGIN:
        assert response.headers.get("access-control-allow-origin") == [ORIGIN]
        assert response.headers.get("access-control-allow-credentials") == ["true"]


@schemathesis.check
def an_error_is_one_of_the_examples(context, response, case) -> None:
    """FR-026, FR-027: the whole body of every error but a 422 is in the contract."""
    promise = case.operation.responses.find_by_status_code(response.status_code)
    if promise is not None and response.status_code >= 400 and response.status_code != 422:
        assert response.json() in examples_of(promise.definition["content"]["application/json"])


@schemathesis.check
def nobody_else_may(context, response, case) -> None:
    """FR-005, SC-004: what the path's user did, nobody else may, nor below their own path."""
    if "user_id" not in case.path_parameters or not 200 <= response.status_code < 300:
        return

    def try_as_somebody_else(case: schemathesis.Case, status: int) -> None:
        sign_in(case, SOMEBODY_ELSE)
        got = case.call().status_code
        assert got == status, f"{SOMEBODY_ELSE}: {case.method} {case.formatted_path} is {got}"

    other = case.derive()
    try_as_somebody_else(other, 403)
    if case.method == "POST":
        other = case.operation.schema["/api/{user_id}/tasks/{id}"]["GET"].Case()
        other.path_parameters = {"id": response.json()["id"]}
    if "id" in other.path_parameters:
        other.path_parameters["user_id"] = urllib.parse.quote(SOMEBODY_ELSE)
        try_as_somebody_else(other, 404 if case.method == "DELETE" else 403)
