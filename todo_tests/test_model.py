"""Every answer of many callers is compared with a model while the database is damaged.

For each task there must be an order of its requests that explains all their answers
(linearizability). A request takes effect at one moment between its start and its end. A change of
unknown fate takes effect at any moment after its start, or never. Tasks are judged one by one, so
nothing is said of whether all tasks of one list belong to the same moment. PostgreSQL promises it.

A run of one seed takes about 30 s. `TODO_MODEL_RUNS=100` makes a hundred, from `TODO_MODEL_SEED`
on. The seed decides what is asked and damaged, not how the processes meet.
"""

import asyncio
import itertools
import math
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import psycopg
import pytest

from todo_tests.damage import ADMIN_SHUTDOWN, Answer, Bouncer, Caller, Wire, soon, together
from todo_tests.support import LOCKED_TABLE, ROOT, NewPostgres, OwnPostgres, Serve, error, new_user

pytestmark = pytest.mark.slow

FIRST_SEED = int(os.environ.get("TODO_MODEL_SEED", "0"))
SEEDS = range(FIRST_SEED, FIRST_SEED + int(os.environ.get("TODO_MODEL_RUNS", "1")))
DB_TIMEOUT = 1.0  # seconds
SLOWEST = DB_TIMEOUT + 0.5
USERS, CALLERS = 6, 4  # callers of each user, in turn on each service
TASKS = 8  # of a user, about
UNKNOWN_MAX = 3  # of a task; then it is only read, or its possible orders would be too many
PAUSE = 0.04  # seconds between two requests of a caller, at most
CALM = 0.4  # seconds between two faults, in which no request may fail
WELL = 4.0  # seconds until every request succeeds again, at most

FATE = "The database did not answer. The change may have been stored: read before you write again."
SAYS_FATE = FATE in (ROOT / "todo.py").read_text("utf-8")  # else any 500 leaves it unknown
FAILURES = [error("DATABASE_UNAVAILABLE"), error("DATABASE_TIMEOUT")]
UNKNOWN = [{**failure, "detail": FATE} for failure in FAILURES] if SAYS_FATE else FAILURES


# The model


class Task(NamedTuple):
    """A state of a task, or a pattern of states: a member that is None is not known."""

    id: int | None = None
    title: str | None = None
    completed: bool | None = None
    created_at: str | None = None
    updated_at: str | None = None


State = Task | None  # None: no such task
SOMETHING = Task()
ANYTHING: tuple[State, ...] = (None, SOMETHING)
EXISTS: tuple[State, ...] = (SOMETHING,)
ABSENT: tuple[State, ...] = (None,)


def fits(pattern: State, state: State) -> bool:
    """Whether the two can be the same."""
    if pattern is None or state is None:
        return pattern is state
    pairs = zip(pattern, state, strict=True)
    return all(one is None or other is None or one == other for one, other in pairs)


@dataclass(eq=False, frozen=True)
class Event:
    """A request's part in the history of one task, and which states its answer allows."""

    start: float
    end: float  # infinite when no answer tells that it was done
    method: str = "GET"
    new: Task = SOMETHING  # the members that it sets
    before: tuple[State, ...] = ANYTHING
    after: tuple[State, ...] = ANYTHING

    def explained_by(self, state: State) -> bool:
        """Whether its answer is right if it takes effect in that state."""
        new = self.leaves(state)
        return any(fits(known, state) for known in self.before) and any(
            fits(known, new) for known in self.after
        )

    def leaves(self, state: State) -> State:
        """The state after it, as exactly as its answer tells."""
        changed = self.new if self.method == "POST" else state
        if state is not None and self.method == "PUT":
            kept = state.completed if self.new.completed is None else self.new.completed
            changed = state._replace(title=self.new.title, completed=kept, updated_at=None)
        elif state is not None and self.method == "PATCH":
            changed = state._replace(completed=not state.completed, updated_at=None)
        elif self.method == "DELETE":
            changed = None
        answered = self.after[0] if len(self.after) == 1 else None
        return changed if answered is None or not fits(answered, changed) else answered


class Possible(NamedTuple):
    """A state that a task may have, and the requests that may still take effect."""

    state: State
    waiting: frozenset[Event]

    def then(self, *begun: Event) -> "Possible":
        """With what begins. A read takes effect as soon as it can: it changes nothing."""
        waiting = self.waiting.union(begun)
        served = {e for e in waiting if e.method == "GET" and e.explained_by(self.state)}
        return Possible(self.state, waiting - served)

    def behind(self, event: Event) -> "Iterator[Possible]":
        """All that can be the case once the event has taken effect, after any of the others."""
        seen, todo = {self}, [self]
        while todo:
            one = todo.pop()
            if event not in one.waiting:
                yield one
                continue
            for next_ in one.waiting:
                if next_.explained_by(one.state):
                    other = Possible(next_.leaves(one.state), one.waiting - {next_}).then()
                    if other not in seen:
                        seen.add(other)
                        todo.append(other)


def check(first: State, events: list[Event]) -> None:
    """Fails at the first answer to one task's requests that no order of them explains."""
    begins = ((event.start, 0, number, event) for number, event in enumerate(events))
    ends = ((event.end, 1, number, event) for number, event in enumerate(events))
    possible = {Possible(first, frozenset())}
    for moment, ended, _, event in sorted(itertools.chain(begins, ends)):
        if not ended:
            possible = {one.then(event) for one in possible}
        elif moment < math.inf:
            before = {one.state for one in possible}
            possible = {other for one in possible for other in one.behind(event)}
            assert possible, story(before, event, events)


def story(before: set[State], event: Event, events: list[Event]) -> str:
    """What a reader needs who looks for the fault, without paddings and unknown members."""
    near = [each for each in events if each.end > event.start - 2.0 and each.start < event.end]
    near.sort(key=lambda each: each.start)
    lines = ["nothing explains", event, "possible were", *before, "near it were", *near]
    return re.sub(r"-{9,}|\w+=None(, )?", "", "\n".join(map(str, lines)))


# What is asked, and what the answers say


@dataclass
class History:
    """What was asked since the last check, task by task, and all that is known for choosing more.

    A task is known by its description, which no other task has and no change touches.
    """

    random: random.Random
    events: dict[str, dict[str, list[Event]]]  # by user and description
    first: dict[str, State] = field(default_factory=dict)  # at the last check
    ids: dict[str, int] = field(default_factory=dict)
    alive: dict[str, dict[int, str]] = field(default_factory=dict)  # as far as one knows
    unknown: Counter[str] = field(default_factory=Counter)  # changes of unknown fate, by task
    counts: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    stood_still: float = 0.0  # seconds in which the callers' own loop got no CPU
    trouble: float = 0.0  # a request that began before may fail; infinite during damage
    fault: str = ""  # the last one
    over: bool = False

    def see(self, user: str, body: dict[str, Any]) -> tuple[str, Task]:
        """What the user was shown: a task that this user made, and that was made once."""
        id_, owner, title, key, completed, created_at, updated_at = body.values()
        assert owner == user, f"{user} is shown {body}"
        assert key in self.events[user], f"nobody made {body}"
        assert self.ids.setdefault(key, id_) == id_, f"{self.ids[key]} is doubled by {body}"
        self.alive[user][id_] = key
        return key, Task(id_, title, completed, created_at, updated_at)

    def settle(self, table: list[dict[str, Any]]) -> None:
        """Judge all tasks by the answers and, at last, the table; begin anew with what is left."""
        now = time.monotonic()
        stored = dict(self.see(body["user_id"], body) for body in table)
        for user, tasks in self.events.items():
            for key, events in tasks.items():
                check(self.first.get(key), [*events, Event(now, now, before=(stored.get(key),))])
            self.events[user] = {key: [] for key in tasks if key in stored}
            self.alive[user] = {self.ids[key]: key for key in self.events[user]}
        self.first = dict(stored)
        self.ids = {key: self.ids[key] for key in stored}
        self.unknown.clear()


class Client(Caller):
    """One of several callers of a user, who does everything at random and notes each answer."""

    def __init__(self, port: int, user: str, history: History, name: str) -> None:
        super().__init__(port, user)
        self.history = history
        self.name = name
        self.made = 0

    async def live(self) -> None:
        """One request after the other until all is over."""
        choose = self.history.random
        while not self.history.over:
            few = len(self.history.alive[self.user]) < TASKS
            weights = {"LIST": 4, "POST": 4 if few else 1, "DELETE": 1 if few else 3}
            weights |= {"GET": 4, "PUT": 3, "PATCH": 3}
            (kind,) = choose.choices(list(weights), list(weights.values()))
            if kind == "LIST":
                await self._list(choose.choice((None, True, False)))
            elif kind == "POST":
                await self._create()
            else:
                await self._one(kind, choose.choice([self.user] * 20 + list(self.history.events)))
            await asyncio.sleep(choose.random() * PAUSE)

    def _text(self, length: int) -> str:
        """A text that nobody else has; long ones make answers that do not fit one buffer."""
        self.made += 1
        return f"{self.name}.{self.made} ".ljust(self.history.random.choice((1, length)), "-")

    async def _send(
        self, method: str, path: str, body: Any, statuses: set[int]
    ) -> tuple[Answer, float, float] | None:
        """The answer, when it was asked for, and when it was there; None if nothing was done.

        The end is infinite if nobody knows whether, and when, it was or will be done.
        """
        history, start = self.history, time.monotonic()
        stood_still = history.stood_still
        answer = await self.ask(method, path, body)
        end = time.monotonic()
        what = (self.user, method, path, body, answer.status, answer.content, answer.seconds)
        history.slowest = max(history.slowest, end - start)
        assert end - start < SLOWEST + history.stood_still - stood_still, what
        kind = {"GET": "reads", "POST": "creates"}.get(method, "changes")
        if answer.status != 500:
            assert answer.status in statuses, what
            outcome = {403: "forbidden", 404: "absent"}.get(answer.status, "acknowledged")
            history.counts[f"{kind} {outcome}"] += 1
            return answer, start, end
        assert start < history.trouble, f"failed without damage: {what}"
        if method != "GET" and answer.body in UNKNOWN:
            history.counts[f"{kind} of unknown fate"] += 1
            return answer, start, math.inf
        assert answer.body in FAILURES, what
        history.counts[f"{kind} failed"] += 1
        return None

    async def _list(self, completed: bool | None) -> None:
        query = "" if completed is None else f"?completed={str(completed).lower()}"
        sent = await self._send("GET", f"/api/{self.user}/tasks{query}", None, {200})
        if not sent:
            return
        answer, start, end = sent
        ids = [body["id"] for body in answer.body]
        assert ids == sorted(set(ids), reverse=True), f"not newest first: {ids}"
        seen = dict(self.history.see(self.user, body) for body in answer.body)
        assert all(completed in (None, task.completed) for task in seen.values()), answer
        missing = ABSENT if completed is None else (None, Task(completed=not completed))
        for key, events in self.history.events[self.user].items():
            before = (seen[key],) if key in seen else missing
            events.append(Event(start, end, before=before))

    async def _create(self) -> None:
        key, new = self._text(1000), Task(title=self._text(200), completed=False)
        self.history.events[self.user][key] = []
        body = {"title": new.title, "description": key}
        if sent := await self._send("POST", "", body, {201}):
            self._note(self.user, key, "POST", new, *sent)

    async def _one(self, method: str, owner: str) -> None:
        """Read or change a task, now and then another user's, which must not succeed."""
        history, new, body = self.history, Task(), None
        if not (alive := history.alive[owner]):
            return
        id_, key = history.random.choice(list(alive.items()))
        if history.unknown[key] >= UNKNOWN_MAX:
            method = "GET"
        if method == "PUT":
            new = Task(title=self._text(200), completed=history.random.choice((None, True, False)))
            body = {"title": new.title, "completed": new.completed}
            if new.completed is None:
                del body["completed"]
        path = f"{id_}/complete" if method == "PATCH" else str(id_)
        statuses = {403, 404} if owner != self.user else {204 if method == "DELETE" else 200, 404}
        if sent := await self._send(method, path, body, statuses):
            self._note(owner, key, method, new, *sent)

    def _note(
        self, owner: str, key: str, method: str, new: Task, answer: Answer, start: float, end: float
    ) -> None:
        """What the answer says of the task goes into its history."""
        before = {204: EXISTS, 403: EXISTS, 404: ABSENT}.get(answer.status, ANYTHING)
        after = ANYTHING
        if answer.status in (200, 201):
            shown, task = self.history.see(owner, answer.body)
            assert shown == key, f"{answer} in place of {key}"
            after = (task,)
        if answer.status in (204, 404):
            self.history.alive[owner].pop(self.history.ids[key], None)
        method = method if owner == self.user else "GET"  # nothing that a stranger does has effect
        self.history.unknown[key] += end == math.inf
        self.history.events[owner][key].append(Event(start, end, method, new, before, after))


# Damage


@dataclass
class Damage:
    """What is done to the database and to the ways to it. Each public method is one fault."""

    postgres: OwnPostgres
    url: str
    wire: Wire
    pooler: Bouncer | None
    users: list[str]
    random: random.Random

    async def kill(self) -> None:
        """As after kill -9, or a machine that was switched off."""
        await asyncio.to_thread(self.postgres.kill)
        await asyncio.sleep(0.3)
        await asyncio.to_thread(self.postgres.start)

    async def restart(self) -> None:
        mode: Literal["fast", "immediate"] = self.random.choice(("fast", "immediate"))
        await asyncio.to_thread(self.postgres.stop, mode)
        await asyncio.to_thread(self.postgres.start)

    async def terminate(self) -> None:
        for _ in range(8):
            await asyncio.to_thread(self.postgres.cut_connections, self.url)
            await asyncio.sleep(0.1)

    async def end_at_commit(self) -> None:
        """Many connections are lost at the commit: the row has arrived, the change is undone."""
        await self._execute(DIES_AT_COMMIT)
        await asyncio.sleep(0.7)
        await self._execute("drop trigger dies on tasks; drop function die")

    async def lock_table(self) -> None:
        for_all, for_changes = LOCKED_TABLE, "lock table tasks in share mode"
        async with self._held(self.random.choice((for_all, for_changes))):
            await asyncio.sleep(1.5 * DB_TIMEOUT)

    async def lock_rows(self) -> None:
        user = self.random.choice(self.users)
        async with self._held(f"select from tasks where user_id = '{user}' for update"):
            await asyncio.sleep(1.5 * DB_TIMEOUT)

    async def freeze(self) -> None:
        """Half of PostgreSQL's processes that serve this database stand still."""
        others = "datname = current_database() and pid <> pg_backend_pid()"
        rows = await self._execute(f"select pid from pg_stat_activity where {others}")
        pids = [pid for (pid,) in rows if self.random.random() < 0.5]
        try:
            self._signal(pids, signal.SIGSTOP)
            await asyncio.sleep(1.5 * DB_TIMEOUT)
        finally:
            self._signal(pids, signal.SIGCONT)

    async def cut_before(self) -> None:
        """The connection is lost before PostgreSQL has the statements."""
        await self._cut(answered=False)

    async def cut_behind(self) -> None:
        """The connection is lost with the answers to statements that are done."""
        await self._cut(answered=True)

    async def cut_within(self) -> None:
        """The row arrives, and the end of the answer does not."""
        await self._cut(answered=True, last_word=ADMIN_SHUTDOWN)

    async def restart_pooler(self) -> None:
        for _ in range(3):
            await asyncio.to_thread(self._restart_pooler)
            await asyncio.sleep(0.1)

    async def orphan(self) -> None:
        """The connection of changes is lost while they wait for a lock; PostgreSQL does them."""
        for _ in range(2):
            async with self._held(LOCKED_TABLE):
                await asyncio.sleep(0.3)
                await asyncio.to_thread(self._restart_pooler)
            await asyncio.sleep(0.1)

    async def _execute(self, statement: str) -> list[Any]:
        return await asyncio.to_thread(self.postgres.execute, statement, database_url=self.url)

    @asynccontextmanager
    async def _held(self, lock: str) -> AsyncIterator[None]:
        async with await psycopg.AsyncConnection.connect(self.url) as locker:
            await locker.execute(lock.encode())
            yield

    async def _cut(self, **how: Any) -> None:
        for user in self.users * 2:
            self.wire.cut(user, times=4, **how)
            await asyncio.sleep(0.1)
        self.wire.cut("", answered=True, times=0)

    def _restart_pooler(self) -> None:
        assert self.pooler is not None
        assert self.pooler.process is not None
        if self.random.random() < 0.5:
            self.pooler.process.kill()
        self.pooler.stop()
        self.pooler.start()

    @staticmethod
    def _signal(pids: list[int], number: int) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)


DIES_AT_COMMIT = """
    create function die() returns trigger language plpgsql as $$
    begin
        if random() < 0.3 then
            perform pg_terminate_backend(pg_backend_pid());
            perform pg_sleep(1);
        end if;
        return null;
    end $$;
    create constraint trigger dies after insert or update or delete on tasks
        deferrable initially deferred for each row execute function die();
"""
DIRECT = ("kill", "restart", "terminate", "end_at_commit", "lock_table", "lock_rows", "freeze")
CUTS = ("cut_before", "cut_behind", "cut_within")
POOLER = ("restart_pooler", "orphan") if Bouncer.program else ()
FAULTS = (*DIRECT, *CUTS, *POOLER)
TABLE = """
    select row_to_json(each) from (
        select id, user_id, title, description, completed,
            to_char(created_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') as created_at,
            to_char(updated_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') as updated_at
        from tasks
    ) each
"""


# The check


async def quiet(damage: Damage) -> None:
    """Wait until PostgreSQL does nothing any more; twice, as something may be on its way."""

    async def idle() -> bool:
        return not await damage._execute(
            "select from pg_stat_activity where datname = current_database()"
            " and pid <> pg_backend_pid() and state <> 'idle'"
        )

    for _ in range(2):
        await asyncio.sleep(0.1)
        await soon(idle, within=WELL, why="statements still run")


async def well(ports: list[int]) -> None:
    """Wait until each service answers a dozen callers at once."""
    callers = [Caller(port) for port in ports for _ in range(12)]

    async def all_succeed() -> bool:
        answers = await together(caller.ask("GET", "") for caller in callers)
        return all(answer.status == 200 for answer in answers)

    await soon(all_succeed, within=WELL, why="not well again")
    for caller in callers:
        await caller.close()


async def live_through(
    faults: list[str], damage: Damage, history: History, clients: list[Client]
) -> None:
    """All clients ask while the damage is done; then every history is judged."""

    async def harm() -> None:
        for fault in faults:
            await asyncio.sleep(CALM)
            history.trouble, history.fault = math.inf, fault
            await getattr(damage, fault)()
            await well(sorted({client.port for client in clients}))
            history.trouble = time.monotonic()
        await asyncio.sleep(CALM)
        history.over = True

    async def watch() -> None:
        while not history.over:
            start = time.monotonic()
            await asyncio.sleep(0.02)
            if (late := time.monotonic() - start) > 0.1:
                history.stood_still += late

    history.over = False
    await together([harm(), watch(), *(client.live() for client in clients)])
    await quiet(damage)
    history.settle([body for (body,) in await damage._execute(TABLE)])
    damage.wire.spoken.clear()


@pytest.mark.parametrize("seed", SEEDS)
async def test_every_answer_under_damage_is_one_that_the_model_explains(
    own_postgres: NewPostgres, serve: Serve, seed: int
) -> None:
    choose = random.Random(seed)
    faults = choose.sample(FAULTS, len(FAULTS))
    postgres = await asyncio.to_thread(own_postgres)
    url = await asyncio.to_thread(postgres.create_database, schema=True)
    users = [new_user() for _ in range(USERS)]
    history = History(choose, {user: {} for user in users}, alive={user: {} for user in users})
    settings = {"DB_TIMEOUT": str(DB_TIMEOUT), "DB_POOL_SIZE": "4"}
    pooler = Bouncer(postgres.port, server_login_retry=0.2) if Bouncer.program else None
    try:
        async with Wire(postgres.port).laid() as wire:
            behind = [wire.url(url), pooler.start().url(url) if pooler else url]
            servers = [await asyncio.to_thread(serve, settings, database_url=to) for to in behind]
            clients = [
                Client(servers[number % 2].port, user, history, f"{seed}.{user[-4:]}.{number}")
                for user in users
                for number in range(CALLERS)
            ]
            damage = Damage(postgres, url, wire, pooler, users, choose)
            for n in range(0, len(faults), 3):
                await live_through(faults[n : n + 3], damage, history, clients)
            for client in clients:
                await client.close()
    finally:
        if pooler:
            pooler.remove()
        counts = ", ".join(f"{count} {what}" for what, count in sorted(history.counts.items()))
        print(f"seed {seed}, {len(faults)} faults, the last {history.fault}: {counts}")
        slowest, still = history.slowest, history.stood_still
        print(f"the slowest answer took {slowest:.2f} s; without a turn of the loop: {still:.2f} s")
