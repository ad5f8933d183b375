"""How time is taken: in one place, for peers and tuning alike.

Each call is timed by itself between two CUDA events, after a write of 256 MiB that empties L2 (50 to 60 MB). The
contestants of a point take turns, call by call, so that clocks and temperature drift for all alike, and the median over
the rounds is reported. Everything is enqueued before anything is awaited: the host runs ahead of the GPU, whose flush
alone (0.1 ms) lasts longer than any contestant's launch takes, so no host time is in any number.

Host time is another matter: batches of calls that nobody awaits, by the host's clock. The least of many batches is
reported, as `timeit` does: whatever else a machine is about (a clock that has yet to rise, neighbours) only adds to it.
On an H200's host, cold, the medians of a first point were 26 to 35% above those of the second.

Why not CUDA graphs of n calls, which measure short kernels without the 2 to 3 us that two events enclose: their inputs
are warm unless buffers rotate through more than L2 holds, some peers cannot be captured, and at the shortest point of a
preset (0.1 ms) those microseconds are 2 to 3%, the same for everyone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

__all__ = [
    "FLUSH_BYTES",
    "HOST_PROTOCOL",
    "MAX_ROUNDS",
    "MIN_ROUNDS",
    "PROTOCOL",
    "WARMUP_ROUNDS",
    "CudaTimer",
    "Timer",
    "host_microseconds",
    "interleaved",
    "kernel_microseconds",
    "rounds_for",
    "significant",
]

FLUSH_BYTES = 256 << 20
WARMUP_ROUNDS = 3
MIN_ROUNDS, MAX_ROUNDS = 7, 40

PROTOCOL = (
    f"CUDA events around each call, {FLUSH_BYTES >> 20} MiB written before it to flush L2, contestants interleaved "
    f"call by call, {WARMUP_ROUNDS} warm-up rounds, median of the rest"
)

HOST_CALLS, HOST_ROUNDS, HOST_WARMUP_SECONDS = 200, 51, 2.0
HOST_PROTOCOL = (
    f"host clock around batches of {HOST_CALLS} calls that are not awaited, contestants interleaved batch by batch, "
    f"{HOST_WARMUP_SECONDS:g} s of such rounds to warm up, the least of the {HOST_ROUNDS} that follow"
)

Call = Callable[[], object]


class Timer(Protocol):
    """What timing needs of a device; tests have one without a device."""

    def flush(self) -> None:
        """Enqueue what empties the cache."""

    def mark(self) -> Any:
        """Enqueue an event."""

    def milliseconds(self, start: Any, stop: Any) -> float:
        """Between two events that have happened."""

    def synchronize(self) -> None:
        """Wait for everything enqueued."""


class CudaTimer:
    """A `Timer` for torch's current device and stream. Holds FLUSH_BYTES of device memory."""

    def __init__(self) -> None:
        import torch

        self._torch = torch
        self._buffer = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def flush(self) -> None:
        self._buffer.zero_()

    def mark(self) -> Any:
        event = self._torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start: Any, stop: Any) -> float:
        return float(start.elapsed_time(stop))

    def synchronize(self) -> None:
        self._torch.cuda.synchronize()


def interleaved(calls: Mapping[str, Call], timer: Timer, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every call in every round, after the warm-up rounds.

    What a call raises is the caller's: try each once before timing it among others.
    """
    marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in calls}
    for number in range(WARMUP_ROUNDS + rounds):
        for name, call in calls.items():
            timer.flush()
            start = timer.mark()
            call()
            stop = timer.mark()
            if number >= WARMUP_ROUNDS:
                marks[name].append((start, stop))
    timer.synchronize()
    return {name: [timer.milliseconds(*pair) for pair in pairs] for name, pairs in marks.items()}


def rounds_for(calls: Mapping[str, Call], timer: Timer, seconds: float) -> int:
    """How many rounds of these calls fit into `seconds`, from MIN_ROUNDS to MAX_ROUNDS; runs each call once."""
    start = timer.mark()
    for call in calls.values():
        timer.flush()
        call()
    stop = timer.mark()
    timer.synchronize()
    one_round = max(timer.milliseconds(start, stop), 1e-3)
    return max(MIN_ROUNDS, min(MAX_ROUNDS, int(1e3 * seconds / one_round) - WARMUP_ROUNDS))


_PROFILED_CALLS = 7


def kernel_microseconds(call: Call, timer: Timer) -> dict[str, float]:
    """Time of each kernel that a call launches, by name, as torch's profiler has it: the mean over a few calls.

    Only kernels of ours. L2 is flushed before each call, not between its kernels.
    """
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(_PROFILED_CALLS):
            timer.flush()
            call()
        timer.synchronize()
    return {
        event.key: significant(event.device_time_total / event.count)
        for event in profile.key_averages()
        if event.key.startswith("fa2_")
    }


def significant(figure: float) -> float:
    """To four digits: more than a median is good for."""
    return float(f"{figure:.4g}")


def host_microseconds(
    calls: Mapping[str, Call],
    synchronize: Callable[[], None],
    contexts: Mapping[str, Callable[[], AbstractContextManager[Any]]],
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Host time of one call of each, in microseconds, by HOST_PROTOCOL.

    200 calls stay below the 1024 launches that the driver queues, and a tiny kernel is done sooner than the next
    launch: the host never waits. A context (which backend torch may use) is entered once a batch, as a program would.
    """
    batches: dict[str, list[float]] = {name: [] for name in calls}
    warm_at = clock() + HOST_WARMUP_SECONDS
    measured = 0
    while calls and measured < HOST_ROUNDS:
        warm = clock() >= warm_at
        for name, call in calls.items():
            with contexts.get(name, nullcontext)():
                call()
                synchronize()
                start = clock()
                for _ in range(HOST_CALLS):
                    call()
                elapsed = clock() - start
                synchronize()
            if warm:
                batches[name].append(elapsed)
        measured += warm
    return {name: 1e6 * min(values) / HOST_CALLS for name, values in batches.items()}
