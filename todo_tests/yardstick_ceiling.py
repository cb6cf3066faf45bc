"""Two yardsticks of bench.py on the same Starlette shape, one HS256 check by PyJWT a request.

`app`: the ceiling. A canned body, no database, no log: what this stack can do at the very best.
`plain`: the body comes from one statement (PLAIN_SQL) on psycopg's AsyncConnectionPool, as any
tutorial would write it: what a request costs that shares nothing with its neighbours.
"""

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import jwt
from psycopg import AsyncRawCursor
from psycopg.types.json import set_json_loads
from psycopg_pool import AsyncConnectionPool
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

SECRET = os.environ["BETTER_AUTH_SECRET"]
PLAIN_SQL = os.environ.get("PLAIN_SQL", "")
PLAIN_PARAMETERS = json.loads(os.environ.get("PLAIN_PARAMETERS", "[]"))  # "{user}" is the caller


def task(number: int) -> dict[str, Any]:
    """A task just as long as the ones bench.py puts into the database."""
    return {
        "id": 10_000 + number,
        "user_id": "bench-user-017",
        "title": f"Task {number:04} of a list that somebody means to finish",
        "description": "Milk, eggs, bread, and whatever else is missing by then",
        "completed": False,
        "created_at": "2026-02-08T10:00:00.123456Z",
        "updated_at": "2026-02-08T10:00:00.123456Z",
    }


def body(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


LIST = body([task(number) for number in range(20)])
TASK = body(task(0))


def authenticated_user(request: Request) -> str:
    token = request.headers["authorization"].removeprefix("Bearer ")
    claims = jwt.decode(token, SECRET, algorithms=["HS256"])
    if claims["sub"] != request.path_params["user_id"]:
        raise PermissionError
    return claims["sub"]


async def canned_list(request: Request) -> Response:
    authenticated_user(request)
    return Response(LIST, media_type="application/json")


async def canned_task(request: Request) -> Response:
    authenticated_user(request)
    return Response(TASK, media_type="application/json")


async def list_from_database(request: Request) -> Response:
    user = authenticated_user(request)
    parameters = [user if value == "{user}" else value for value in PLAIN_PARAMETERS]
    async with request.state.pool.connection() as connection:
        cursor = await connection.execute(PLAIN_SQL, parameters)
        row = await cursor.fetchone()
    return Response(row[0], media_type="application/json")


async def health(_: Request) -> Response:
    return Response(b'{"status":"ok"}', media_type="application/json")


@asynccontextmanager
async def pool(_: Starlette) -> AsyncIterator[dict[str, Any]]:
    set_json_loads(bytes)  # the JSON that Postgres makes goes out as it is
    keywords = {"autocommit": True, "cursor_factory": AsyncRawCursor}
    async with AsyncConnectionPool(
        os.environ["NEON_DB_URL"], min_size=10, kwargs=keywords
    ) as opened:
        yield {"pool": opened}


HEALTH = Route("/healthz", health)
app = Starlette(
    routes=[
        HEALTH,
        Route("/api/{user_id}/tasks", canned_list),
        Route("/api/{user_id}/tasks/{id}", canned_task),
    ]
)
plain = Starlette(routes=[HEALTH, Route("/api/{user_id}/tasks", list_from_database)], lifespan=pool)
