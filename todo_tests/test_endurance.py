"""SC-005 and SC-010 for longer: no error, no time-out, and no memory that grows."""

import asyncio
import statistics
import time

import pytest

from todo_tests.damage import Life, rss, together
from todo_tests.support import Serve

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
