"""Fixtures: one PostgreSQL and one app for the session, and factories for tests that do damage."""

import asyncio
import faulthandler
import gc
import inspect
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, TextIO

import httpx
import pytest

from todo_tests import support
from todo_tests.contract import AnsweredRequest
from todo_tests.support import (
    AUTH_URL,
    SECRET,
    Account,
    NewPostgres,
    OwnPostgres,
    Postgres,
    Serve,
    Server,
)

if TYPE_CHECKING:
    from starlette.applications import Starlette

    import todo

STUCK = 360  # seconds for a test with its fixtures; an installation may take 300
terminal = pytest.StashKey[TextIO]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[terminal] = os.fdopen(os.dup(2), "w")  # what stderr is while nothing captures it


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Ends the run as Ctrl-C does, with all stacks, once a test or one of its fixtures is stuck."""

    def end(*_: object) -> None:
        message = f"{item.nodeid} is stuck: it has not ended in {STUCK} s"
        out = item.config.stash[terminal]
        print(f"\n{message}", *_awaits(), sep="\n", file=out, flush=True)
        faulthandler.dump_traceback(out)
        # What hangs here can hang the teardown of the session as well.
        faulthandler.dump_traceback_later(60, exit=True, file=out)
        raise KeyboardInterrupt(message)

    signal.signal(signal.SIGALRM, end)
    signal.alarm(STUCK)
    try:
        return (yield)
    finally:
        signal.alarm(0)


@pytest.hookimpl(wrapper=True, trylast=True)
def _log_is_written() -> Generator[None, object, object]:
    """The thread that writes the log is done before pytest stops to capture the phase's output."""
    try:
        return (yield)
    finally:
        for handler in logging.getLogger("todo").handlers:
            handler.flush()


pytest_runtest_setup = pytest_runtest_call = pytest_runtest_teardown = _log_is_written


def _awaits() -> Iterator[str]:
    """Where each task of the running loop waits: the outermost call first."""
    try:
        tasks = asyncio.all_tasks()
    except RuntimeError:  # no loop runs
        return
    for task in tasks:
        yield f"{task.get_name()}:"
        step: Any = task.get_coro()
        while step is not None:
            if inspect.iscoroutine(step):
                frame, step = step.cr_frame, step.cr_await
            elif inspect.isasyncgen(step):
                frame, step = step.ag_frame, step.ag_await
            else:  # an asend(), as of a fixture, tells its generator to nobody else
                step = next(filter(inspect.isasyncgen, gc.get_referents(step)), None)
                continue
            yield f'  File "{frame.f_code.co_filename}", line {frame.f_lineno}'


@pytest.fixture(scope="session")
def no_settings_from_outside() -> Iterator[None]:
    """Whatever the caller's environment sets, the tests run with their own settings."""
    import todo

    with pytest.MonkeyPatch.context() as patch:
        for name in todo.Settings.model_fields:
            patch.delenv(name.upper(), raising=False)
        yield


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """One asyncio loop for the whole session, shared by fixtures and tests."""
    return "asyncio", {}


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A real PostgreSQL: that of TEST_DATABASE_URL, else one from the embedded wheel."""
    if url := os.environ.get("TEST_DATABASE_URL"):
        yield Postgres(url)
        return
    with OwnPostgres() as server:
        yield server


@pytest.fixture(scope="session", autouse=True)
def _forget_template() -> Iterator[None]:
    yield
    OwnPostgres.forget_template()


@pytest.fixture(scope="session")
def local_postgres(postgres: Postgres) -> Iterator[OwnPostgres]:
    """One from the embedded wheel, whose port and log are at hand; not to be damaged."""
    if isinstance(postgres, OwnPostgres):
        yield postgres
        return
    with OwnPostgres() as server:
        yield server


@pytest.fixture(scope="session", autouse=True)
def _log_is_written_at_once() -> Iterator[None]:
    """So that a flush after each phase of each test takes no time."""
    import todo

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(todo, "LOG_DELAY", 0.0)
        yield


@pytest.fixture(scope="session")
def database_url(postgres: Postgres) -> Iterator[str]:
    """A fresh database with `schema.sql` applied."""
    with postgres.new_database(schema=True) as url:
        yield url


@pytest.fixture
def empty_database(postgres: Postgres) -> Iterator[str]:
    """A database without the table."""
    with postgres.new_database() as url:
        yield url


@pytest.fixture
def fresh_database(postgres: Postgres) -> Iterator[str]:
    """A database with the table, of this test's own."""
    with postgres.new_database(schema=True) as url:
        yield url


@pytest.fixture(scope="session")
def make_settings(
    no_settings_from_outside: None, database_url: str
) -> Callable[..., "todo.Settings"]:
    """Settings for the test database, without any `.env`."""
    import todo

    def make(**overrides: Any) -> todo.Settings:
        settings = {
            "neon_db_url": database_url,
            "better_auth_secret": SECRET,
            "better_auth_url": AUTH_URL,
            **overrides,
        }
        return todo.Settings(_env_file=None, **settings)

    return make


@pytest.fixture(scope="session")
async def app(make_settings: Callable[..., "todo.Settings"]) -> "AsyncIterator[Starlette]":
    """The app, open for business."""
    import todo

    application = todo.create_app(make_settings())
    async with application.router.lifespan_context(application):
        yield application


@pytest.fixture(scope="session")
async def client(app: "Starlette") -> AsyncIterator[httpx.AsyncClient]:
    """A client of the app, in process; it holds every answer to the contract."""

    async def hold_to_the_contract(response: httpx.Response) -> None:
        await response.aread()
        assert AnsweredRequest.of(response).faults() == []

    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app),
        base_url="http://testserver",
        event_hooks={"response": [hold_to_the_contract]},
    ) as client:
        yield client


@pytest.fixture(scope="module", autouse=True)
def _what_waits_has_begun(request: pytest.FixtureRequest) -> None:
    """A file's `waits` run from its first test on, if a selected one asks for them."""
    of_the_file = (item for item in request.session.items if item.path == request.path)
    if any("waits" in getattr(item, "fixturenames", ()) for item in of_the_file):
        request.getfixturevalue("waits")


@pytest.fixture
def user() -> str:
    """A user id of this test's own."""
    return support.new_user()


@pytest.fixture
def account(client: httpx.AsyncClient, user: str) -> Account:
    """That user, with a token."""
    return Account(client, user)


@pytest.fixture
def other(client: httpx.AsyncClient) -> Account:
    """Another user, with a token."""
    return Account(client, support.new_user())


@pytest.fixture
def serve(database_url: str) -> Iterator[Serve]:
    """A factory of real `python todo.py` processes."""
    with support.servers(database_url) as factory:
        yield factory


@pytest.fixture(scope="module")
def server(database_url: str) -> Iterator[Server]:
    """A real `python todo.py` process that the tests of a file share."""
    with support.servers(database_url) as serve:
        yield serve()


@pytest.fixture
def own_postgres() -> Iterator[NewPostgres]:
    """A factory of PostgreSQL servers that a test may stop, kill and fill."""
    with ExitStack() as stack:

        def start(**settings: object) -> OwnPostgres:
            return stack.enter_context(OwnPostgres(**settings))

        yield start
