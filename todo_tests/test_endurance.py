"""SC-005 and SC-010 for longer: no error, no time-out, and no memory that grows."""

import asyncio
import statistics
import time

import jwt
import pytest

from todo_tests.damage import ORIGIN, Caller, Life, rss, together
from todo_tests.support import SECRET, Serve, new_user

pytestmark = pytest.mark.slow

SECONDS = 20.0
CALLERS = 100
EARLY, LATE = 5_000, 30_000  # requests
GROWTH = 1.1


async def test_100_callers_meet_no_error_and_no_timeout_and_memory_stays(serve: Serve) -> None:
    """Every answer is compared with what the caller has done so far."""
    server = await asyncio.to_thread(serve, {"LOG_LEVEL": "INFO"})
    lives = [Life(server.port, seed) for seed in range(CALLERS)]
    times: list[float] = []
    memory: dict[int, float] = {}
    start = time.monotonic()

    async def live(life: Life) -> None:
        while time.monotonic() < start + SECONDS or LATE not in memory:
            before = time.monotonic()
            await life.step()
            times.append(time.monotonic() - before)
            if len(times) in (EARLY, LATE):
                memory[len(times)] = rss(server.process.pid)

    await together(live(life) for life in lives)
    seconds = time.monotonic() - start
    assert memory[LATE] <= GROWTH * memory[EARLY]
    assert max(times) < 5.0
    assert " 500 " not in server.stderr()
    print(
        f"{len(times)} requests of {CALLERS} callers in {seconds:.0f} s, none failed,"
        f" median {statistics.median(times) * 1e3:.0f} ms, slowest {max(times) * 1e3:.0f} ms;"
        f" {memory[EARLY]:.1f} MiB after {EARLY}, {memory[LATE]:.1f} MiB after {LATE} requests"
    )


SIZES = {"small-tokens": (0, 12_000), "large-tokens": (9_000, 2_500)}


@pytest.mark.parametrize(("size", "count"), SIZES.values(), ids=SIZES)
async def test_the_token_memory_is_bounded_under_a_flood_of_tokens(
    serve: Serve, size: int, count: int
) -> None:
    """A second and a third flood, as large as the first, find room where that was."""
    server = await asyncio.to_thread(serve)
    made = 0

    def new_token() -> str:
        nonlocal made
        made += 1
        now = int(time.time())
        claims = {"sub": new_user(), "exp": now + 3600, "n": made, "more": "x" * size}
        return jwt.encode(claims, SECRET, "HS256")

    async def call(number: int) -> None:
        caller = Caller(server.port)
        for _ in range(number):
            caller.headers = {"Authorization": f"Bearer {new_token()}", "Origin": ORIGIN}
            answer = await caller.ask("GET", "/api/nothing/here")
            assert (answer.status, answer.body["error_code"]) == (404, "NOT_FOUND")
        await caller.close()

    async def flood() -> float:
        await together(call(count // 20) for _ in range(20))
        return rss(server.process.pid)

    first, _, third = [await flood() for _ in range(3)]
    assert third <= 1.05 * first
    print(f"{made} tokens: {first:.1f} MiB after a third of them, {third:.1f} MiB after all")
