"""From a problem to its tuned rows: prune, build, check, time, halve, confirm.

A candidate is timed in turns with the default tiling, and what counts is its ratio to that: ratios can be compared
between candidates, runs and clocks, so each is one line of the journal and an interrupted run loses the candidate in
hand only. The best few are then confirmed together with the default, interleaved; those figures are what is recorded.

Everything that needs a device is behind `Runner`; nothing here imports torch.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fa2gen.arch import ARCHES, ArchName
from fa2gen.catalog import tuned_rows, written_tilings
from fa2gen.compile import ResourceReport
from fa2gen.errors import Fa2GenError
from fa2gen.plan import default_tiling, fits
from fa2gen.spec import KernelSpec, Problem
from fa2gen.tune.cost import prune
from fa2gen.tune.journal import Journal, key_of
from fa2gen.tune.space import tilings

__all__ = [
    "FINALISTS",
    "RUNGS",
    "Built",
    "DeviceLost",
    "Found",
    "Progress",
    "Runner",
    "Search",
    "Winner",
    "candidates",
    "ranges",
]

RUNGS = (5, 15)
"""Rounds for every candidate, then for the better half."""
FINALISTS, FINAL_ROUNDS = 4, 30
NOISE = 0.01
"""Of a median; a tiling must be faster by more to have a range of lengths of its own."""
ATTEMPTS = 2
"""A candidate that was in hand when a run died is tried once more; then it is taken to be what killed it."""


class DeviceLost(Fa2GenError):
    """A kernel broke the device's context: this process can measure nothing more."""


@dataclass(frozen=True)
class Built:
    """A compiled candidate. `digest` is over its source; `handle` is the runner's own."""

    spec: KernelSpec
    digest: str
    report: ResourceReport
    handle: Any = field(default=None, compare=False)


class Runner(Protocol):
    """The device, as the search sees it."""

    @property
    def circumstances(self) -> Sequence[str]:
        """GPU, compiler and protocol: what measurements must share to be compared."""

    @property
    def shared_memory_limit(self) -> int | None:
        """Bytes that a block may have on it; None: what its family has."""

    def build_ahead(self, specs: Sequence[KernelSpec]) -> None:
        """Start compiling these, in this order, without waiting."""

    def build(self, spec: KernelSpec) -> Built:
        """The compiled candidate. Raises Fa2GenError."""

    def check(self, built: Built) -> str | None:
        """What is wrong with its results by the project's rule; None: nothing."""

    def time(self, kernels: Sequence[Built], seqlen: int, rounds: int) -> list[float]:
        """TFLOP/s of each, interleaved, at one length. Raises Fa2GenError."""


@dataclass(frozen=True)
class Winner:
    """The kernel for lengths from seqlen_min to seqlen_max (None: no end), and what was measured there."""

    spec: KernelSpec
    digest: str
    seqlen_min: int
    seqlen_max: int | None
    runner_up: KernelSpec
    seqlens: tuple[int, ...]
    tflops: tuple[float, ...]
    tflops_default: tuple[float, ...]
    tflops_runner_up: tuple[float, ...]


@dataclass(frozen=True)
class Found:
    """A problem's result. `dropped`: kernel -> why it was not timed; not `complete`: the budget ended the search."""

    default: KernelSpec
    winners: tuple[Winner, ...]
    num_candidates: int
    dropped: dict[str, str]
    complete: bool


@dataclass(frozen=True)
class Progress:
    """One step, for whoever shows it: `best` and its geometric-mean ratio to the default so far."""

    problem: Problem
    stage: str
    done: int
    total: int
    best: str
    ratio: float


def candidates(
    problem: Problem, arch: ArchName, seqlens: Sequence[int], keep: int, shared_memory_limit: int | None = None
) -> list[KernelSpec]:
    """What will be timed: the tiling in use without tuning, what won for the other dtype, the model's best `keep`.

    shared_memory_limit  bytes that a block may have on the device; None: those of the architecture.
    """
    limit = shared_memory_limit or ARCHES[arch].shared_memory_per_block
    default = written_tilings().get((problem, arch)) or default_tiling(problem, arch, limit)
    sibling = problem.model_copy(update={"dtype": "fp16" if problem.dtype == "bf16" else "bf16"})
    known = [row.spec.tiling for row in tuned_rows().get((sibling, arch), ())]
    pruned = prune(problem, tilings(problem, arch, limit), seqlens, keep)
    specs = (KernelSpec(problem=problem, tiling=tiling) for tiling in dict.fromkeys((default, *known, *pruned)))
    return [spec for spec in specs if spec.tiling not in known or fits(spec, limit)]


class Search:
    """Tunes problems one after the other with one runner and one journal.

    seqlens  where candidates are timed, ascending.
    keep     how many candidates beside the default, a problem.
    """

    def __init__(
        self,
        runner: Runner,
        journal: Journal,
        seqlens: Sequence[int],
        keep: int,
        progress: Callable[[Progress], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.runner, self.journal, self.keep = runner, journal, keep
        self.seqlens = tuple(sorted(set(seqlens)))
        self._progress, self._clock = progress, clock

    def run(self, problem: Problem, arch: ArchName, deadline: float = math.inf) -> Found:
        """Tunes one problem. Once the clock passes `deadline` only the best so far are still confirmed.

        Raises Fa2GenError where the default itself does not build, is wrong or fails.
        """
        specs = candidates(problem, arch, self.seqlens, self.keep, self.runner.shared_memory_limit)
        dropped: dict[str, str] = {}
        try:
            default = self._accepted(specs[0])
        except Fa2GenError as error:
            raise Fa2GenError(f"nothing to compare with: the default, {specs[0].name}: {error}") from error
        ratios: dict[Built, tuple[float, ...]] = {default: (1.0,) * len(self.seqlens)}
        complete = self._first_rung(specs[1:], default, ratios, dropped, deadline)
        timed = len(ratios)
        for rounds in RUNGS[1:]:
            ratios = {built: ratios[built] for built in _better_half(ratios, FINALISTS, len(ratios) // 2)}
            for number, built in enumerate(ratios):
                if self._clock() > deadline:
                    complete = False
                    break
                if built is not default:
                    ratios[built] = self._ratios(built, default, rounds)
                self._show(problem, f"{rounds} rounds", number + 1, len(ratios), ratios)
        finalists = dict.fromkeys((default, *_better_half(ratios, FINALISTS, FINALISTS)))
        return Found(default.spec, self._confirm(list(finalists)), timed, dropped, complete)

    # Steps

    def _first_rung(
        self,
        specs: Sequence[KernelSpec],
        default: Built,
        ratios: dict[Built, tuple[float, ...]],
        dropped: dict[str, str],
        deadline: float,
    ) -> bool:
        """Builds, checks and times every candidate shortly. False where the deadline came first."""
        for number, spec in enumerate(specs):
            if self._clock() > deadline:
                return False
            try:
                built = self._accepted(spec)
                ratios[built] = self._ratios(built, default, RUNGS[0])
            except DeviceLost:
                raise
            except Fa2GenError as error:
                dropped[spec.name] = str(error).splitlines()[0]
            self._show(spec.problem, f"{RUNGS[0]} rounds", number + 1, len(specs), ratios)
        return True

    def _accepted(self, spec: KernelSpec) -> Built:
        """The candidate, compiled and checked. Raises Fa2GenError with the reason why it is not fit to be timed."""
        built = self.runner.build(spec)
        if why := _slow_for_sure(built.report):
            raise Fa2GenError(why)
        line = self._once("checked", self._key(built), spec, lambda: {"wrong": self.runner.check(built)})
        if line["wrong"]:
            raise Fa2GenError(line["wrong"])
        return built

    def _ratios(self, built: Built, default: Built, rounds: int) -> tuple[float, ...]:
        """How many times as fast as the default it is, at each length."""

        def measure() -> dict[str, Any]:
            pairs = [self.runner.time([built, default], seqlen, rounds) for seqlen in self.seqlens]
            return {"ratios": [round(mine / its, 4) for mine, its in pairs]}

        key = self._key(built, default.digest, self.seqlens, rounds)
        return tuple(self._once("timed", key, built.spec, measure)["ratios"])

    def _once(self, what: str, key: str, spec: KernelSpec, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The journal's line, or a new one with what `measure` returns.

        What is being tried is written down first: a kernel that hangs, or takes the process with it, is tried ATTEMPTS
        times and then dropped with a Fa2GenError. Any other exception (Ctrl-C too) takes the attempt back.
        """
        if line := self.journal.find(what, key):
            return line
        if self.journal.count(f"{what}?", key) - self.journal.count(f"{what}!", key) >= ATTEMPTS:
            raise Fa2GenError(f"ended the run that tried it, {ATTEMPTS} times")
        self.journal.append(f"{what}?", key, kernel=spec.name)
        try:
            facts = measure()
        except DeviceLost:
            raise
        except BaseException:
            self.journal.append(f"{what}!", key, kernel=spec.name)
            raise
        return self.journal.append(what, key, kernel=spec.name, **facts)

    def _confirm(self, finalists: Sequence[Built]) -> tuple[Winner, ...]:
        """Times the finalists together, the first of which is the default, and gives each range of lengths its best."""
        key = self._key(finalists[0], [built.digest for built in finalists], self.seqlens, FINAL_ROUNDS)

        def measure() -> dict[str, Any]:
            names = [built.spec.name for built in finalists]
            return {
                "kernels": names,
                "tflops": {str(s): self.runner.time(finalists, s, FINAL_ROUNDS) for s in self.seqlens},
            }

        line = self._once("confirmed", key, finalists[0].spec, measure)
        table = [tuple(line["tflops"][str(seqlen)]) for seqlen in self.seqlens]  # of one length, in finalists' order
        winners = []
        for low, high, chosen, places in ranges(self.seqlens, table):
            of = {index: tuple(table[place][index] for place in places) for index in range(len(finalists))}
            others = [index for index in of if index != chosen] or [chosen]
            second = max(others, key=lambda index: _mean(of[index]))
            winners.append(
                Winner(
                    spec=finalists[chosen].spec,
                    digest=finalists[chosen].digest,
                    seqlen_min=low,
                    seqlen_max=high,
                    runner_up=finalists[second].spec,
                    seqlens=tuple(self.seqlens[place] for place in places),
                    tflops=of[chosen],
                    tflops_default=of[0],
                    tflops_runner_up=of[second],
                )
            )
        return tuple(winners)

    def _key(self, built: Built, *more: Any) -> str:
        return key_of(list(self.runner.circumstances), built.spec.name, built.digest, *more)

    def _show(
        self, problem: Problem, stage: str, done: int, total: int, ratios: dict[Built, tuple[float, ...]]
    ) -> None:
        best = max(ratios, key=lambda built: _mean(ratios[built]))
        self._progress(Progress(problem, stage, done, total, best.spec.name, _mean(ratios[best])))


def ranges(
    seqlens: Sequence[int], table: Sequence[Sequence[float]]
) -> list[tuple[int, int | None, int, tuple[int, ...]]]:
    """(least length, greatest or None, column of the winner, rows it was measured in) of each range.

    table  TFLOP/s: a row for each length, a column for each kernel; column 0 is the default.

    One kernel has all lengths if it can: the best by geometric mean. A length where it is slower than the default, or
    slower than the best there by more than noise, gets that best: so nobody is slower than the default where both were
    timed. Between two measured lengths the border is their geometric mean.
    """
    columns = range(len(table[0]))
    overall = max(columns, key=lambda column: _mean([row[column] for row in table]))
    labels = []
    for row in table:
        best = max(columns, key=lambda column: row[column])
        chosen = overall if row[overall] >= max(row[0], row[best] * (1 - NOISE)) else best
        labels.append(chosen)
    groups: list[list[int]] = []
    for place, label in enumerate(labels):
        if groups and labels[groups[-1][0]] == label:
            groups[-1].append(place)
        else:
            groups.append([place])
    borders = [math.isqrt(seqlens[a[-1]] * seqlens[b[0]]) for a, b in itertools.pairwise(groups)]
    lows, highs = [0, *borders], [*(border - 1 for border in borders), None]
    return [(low, high, labels[group[0]], tuple(group)) for low, high, group in zip(lows, highs, groups, strict=True)]


def _slow_for_sure(report: ResourceReport) -> str | None:
    """What the compiler says that no timing is needed for."""
    if report.spill_bytes:
        return f"spills {report.spill_bytes} B a thread"
    notes = [note for note in report.notes if "C75" in note]
    return f"ptxas: {notes[0]}" if notes else None


def _better_half(ratios: dict[Built, tuple[float, ...]], least: int, half: int) -> list[Built]:
    """The better half by geometric mean, at least `least`, and whoever is best at one of the lengths; best first."""
    ranked = sorted(ratios, key=lambda built: -_mean(ratios[built]))
    specialists = [max(ranked, key=lambda built: ratios[built][place]) for place in range(len(ratios[ranked[0]]))]
    return list(dict.fromkeys((*ranked[: max(least, half)], *specialists)))


def _mean(values: Sequence[float]) -> float:
    return math.prod(values) ** (1 / len(values))
