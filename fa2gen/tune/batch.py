"""Many problems in one process, within one budget: what `fa2gen tune` runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fa2gen import env
from fa2gen.arch import ArchName
from fa2gen.catalog import TunedRow, tuned_folders, tuned_refusal
from fa2gen.errors import Fa2GenError, StoreError
from fa2gen.files import distrust, own
from fa2gen.spec import Problem
from fa2gen.tune.record import rows_of, write
from fa2gen.tune.search import DeviceLost, Found, Search, candidates

__all__ = [
    "BUDGET_SECONDS",
    "SEQLENS",
    "Outcome",
    "default_folder",
    "default_journal",
    "provenance",
    "tune",
]

SEQLENS = (512, 2048, 8192)
BUDGET_SECONDS = 110.0
"""Of one problem: under two minutes on one GPU, its confirmation included. It usually takes a few seconds."""


@dataclass(frozen=True)
class Outcome:
    """What became of one problem: rows and the file that holds them, or why there are none."""

    problem: Problem
    rows: tuple[TunedRow, ...] = ()
    found: Found | None = None
    path: Path | None = None
    error: str | None = None
    seconds: float = 0.0


def default_folder() -> Path:
    """Where rows are written: specs/tuned/ in a checkout, else the user's own folder, which is read first.

    Raises StoreError for one that would not be read.
    """
    folder = tuned_folders()[0]
    if why := tuned_refusal(folder):
        raise StoreError(f"nothing was measured: {why}")
    return folder


def default_journal() -> Path:
    """Where measurements are kept: in the cache. Raises StoreError for one that others can write."""
    cache = env.cache_dir()
    if why := distrust(cache, own()):
        raise StoreError(f"nothing was measured: the cache {cache} is not used: {why}")
    return cache / "tune" / "journal.jsonl"


def provenance(facts: Mapping[str, Any], versions: Mapping[str, Any], protocol: str, command: str) -> dict[str, Any]:
    """Of a row: what `fa2gen bench` says of its results, as far as it is one value each."""
    keep = ("gpu", "num_sms", "driver", "nvrtc", "torch", "cuda", "fa2gen")
    known = {**facts, **versions}
    return {
        **{name: known[name] for name in keep if known.get(name) is not None},
        "protocol": protocol,
        "measured": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": command,
    }


def tune(
    search: Search,
    todo: Sequence[Problem],
    arch: ArchName,
    budget: float,
    origin: Mapping[str, Any],
    folder: Path,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Outcome]:
    """Tunes problem after problem and writes each one's rows as soon as it is done.

    budget  seconds for all; what one problem leaves over is shared by the rest. A problem that the budget does not
            reach is an outcome with an error, and a second run, which finds in the journal what was measured, comes to
            it.
    origin  the provenance of the rows.

    Raises DeviceLost when a kernel broke the CUDA context; whatever else befalls one problem is in its outcome.
    """
    end = clock() + budget
    for problem in todo:  # all of them now: compilers then work ahead of the timing
        limit = search.runner.shared_memory_limit
        search.runner.build_ahead(candidates(problem, arch, search.seqlens, search.keep, limit))
    for number, problem in enumerate(todo):
        started = clock()
        if started >= end:
            yield Outcome(problem, error="the budget was spent before its turn: run again to go on")
            continue
        try:
            found = search.run(problem, arch, deadline=started + (end - started) / (len(todo) - number))
            rows = rows_of(found, origin)
            path = write(rows, folder)
        except DeviceLost:
            raise
        except (Fa2GenError, OSError) as error:
            yield Outcome(problem, error=str(error), seconds=clock() - started)
            continue
        yield Outcome(problem, tuple(rows), found, path, seconds=clock() - started)
