"""The loop: every contestant at every point, a row of JSON for each point, and the provenance of them all."""

from __future__ import annotations

import gc
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib import import_module
from typing import Any

from fa2gen.arch import ARCHES
from fa2gen.bench import peers, protocol, provenance
from fa2gen.bench.peers import DETERMINISTIC, Contestant, is_ours
from fa2gen.bench.points import Point
from fa2gen.bench.protocol import significant
from fa2gen.gpus import current_device
from fa2gen.select import select

__all__ = ["SECONDS_PER_POINT", "Bench"]

SECONDS_PER_POINT = 0.5
AGREEMENT = 0.02
"""Largest ||a - b|| / ||b|| between two contestants' results; bf16 and fp16 kernels differ by 2e-3 to 5e-3."""

_MATMUL = 8192
_MATMUL_ROUNDS = 10


class Bench:
    """One run. `rows` yields a row as each point is done; `result` is the document of all rows so far.

    contestants  who is measured; of those whose results differ from the first one's, no figure is given.
    missing      name -> reason, for the provenance; grows when a contestant fails at a point.
    parts        also measure each kernel of ours by itself.
    """

    def __init__(
        self, contestants: Sequence[Contestant], missing: dict[str, str], command: str, *, parts: bool = False
    ) -> None:
        self.contestants = list(contestants)
        self.missing = dict(missing)
        self.command = command
        self.parts = parts
        self._torch = import_module("torch")
        self._timer = protocol.CudaTimer()
        self._rows: list[dict[str, Any]] = []
        self._kernels: set[str] = set()
        self._provenance: dict[str, Any] = {}

    def rows(self, points: Sequence[Point], seconds: float = SECONDS_PER_POINT) -> Iterator[dict[str, Any]]:
        """Measures a preset's points; the matrix product before and after, for the practical ceiling and its drift."""
        self._provenance = {
            **provenance.gpu_facts(),
            **provenance.versions(),
            "measured": datetime.now(UTC).strftime("%Y-%m-%d"),
            "command": self.command,
            "protocol": protocol.HOST_PROTOCOL if _is_host_time(points[0]) else protocol.PROTOCOL,
            "matmul_8192_bf16_tflops": [self._matmul()],
            "clocks_under_load": [provenance.clocks()],
        }
        for one in self.contestants:
            if not any(map(one.stands_for, points)):
                self.missing[one.name] = "it stands for none of these points"
        for point in points:
            row = self._measure(point, seconds)
            self._rows.append(row)
            yield row
        self._provenance["matmul_8192_bf16_tflops"].append(self._matmul())
        self._provenance["clocks_under_load"].append(provenance.clocks())

    def result(self) -> dict[str, Any]:
        """`{"provenance": ..., "rows": [...]}`: what is committed under tests/bench/results/."""
        notes = {"kernels": sorted(self._kernels), "missing": dict(sorted(self.missing.items()))}
        return {"provenance": {**self._provenance, **notes}, "rows": list(self._rows)}

    # One point

    def _measure(self, point: Point, seconds: float) -> dict[str, Any]:
        torch = self._torch
        generator = torch.Generator(device="cuda").manual_seed(point.seqlen * 4099 + point.head_dim)
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[point.dtype]

        def random(heads: int, head_dim: int, of_query: bool = False) -> Any:
            return torch.randn(point.size(heads, head_dim, of_query), generator=generator, device="cuda", dtype=dtype)

        d, dv = point.problem.head_dims
        keys = random(point.heads_kv, d), random(point.heads_kv, dv)
        inputs = random(point.heads, d, True), *keys, random(point.heads, dv, True)
        with torch.no_grad():
            calls = self._tried(point, inputs)
            row: dict[str, Any] = {**point.to_json(), "tflops": {}}
            if _is_host_time(point):
                contexts = {one.name: one.context for one in self.contestants}
                bare = {name: call for name, (call, _) in calls.items()}
                times = protocol.host_microseconds(bare, torch.cuda.synchronize, contexts)
                row["microseconds"] = {name: significant(value) for name, value in times.items()}
            elif calls:
                timed = {name: wrapped for name, (_, wrapped) in calls.items()}
                rounds = protocol.rounds_for(timed, self._timer, seconds)
                times_ms = protocol.interleaved(timed, self._timer, rounds)
                row["tflops"] = {
                    name: significant(point.flops / statistics.median(times) / 1e9) for name, times in times_ms.items()
                }
                if self.parts:
                    row["parts"] = {
                        name: protocol.kernel_microseconds(call, self._timer)
                        for name, call in timed.items()
                        if is_ours(name)
                    }
        self._note_kernels(point)
        calls = {}
        gc.collect()  # contestants may hold buffers of this point
        return row

    def _tried(
        self, point: Point, inputs: tuple[Any, Any, Any, Any]
    ) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
        """name -> (bare call, call in its context) of the contestants that run here and agree with the first one."""
        torch = self._torch
        calls: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {}
        truth = None
        for one in sorted(self.contestants, key=lambda one: is_ours(one.name)):  # it is ours that has to prove itself
            if not one.stands_for(point):
                continue
            try:
                peers.refuse_caches(one.name, bool(point.tokens or point.page_size))
                with one.context():
                    call = _in_turn(one, point, inputs) if point.calls == "new lengths" else one.prepare(point, *inputs)
                    results = call()
                torch.cuda.synchronize()
            except Exception as error:  # peers raise whatever they like; one that fails must not stop the others
                self._miss(one.name, point, str(error).strip().split("\n")[0] or type(error).__name__)
                continue
            if not one.agrees:
                pass
            elif truth is None:
                truth = [x.float() for x in results]
            elif wrong := _disagreement(results, truth):
                self._miss(one.name, point, wrong)
                continue
            calls[one.name] = call, _in_context(one, call)
        return {one.name: calls[one.name] for one in self.contestants if one.name in calls}

    def _miss(self, name: str, point: Point, reason: str) -> None:
        self.missing[f"{name} at {point}"] = reason[:300]

    def _note_kernels(self, point: Point) -> None:
        """Which of our kernels ran: those that a contestant names, else what the selector gives for this point."""
        for one in self.contestants:
            self._kernels |= {spec.name for spec in one.specs if spec.problem == point.problem}
            for arch in ARCHES:
                mode = one.name.removeprefix(f"fa2gen-{arch}")
                if mode in ("", DETERMINISTIC) and f"{one.name} at {point}" not in self.missing:
                    problem = replace(point, deterministic=mode == DETERMINISTIC).problem
                    self._kernels.add(select(problem, current_device(), arch, point.seqlen).plan.name)

    def _matmul(self) -> float:
        """TFLOP/s of an 8192^3 bf16 matrix product of random data."""
        torch = self._torch
        a, b = (torch.randn(_MATMUL, _MATMUL, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        times = protocol.interleaved({"matmul": lambda: a @ b}, self._timer, _MATMUL_ROUNDS)["matmul"]
        return significant(2.0 * _MATMUL**3 / statistics.median(times) / 1e9)


def _is_host_time(point: Point) -> bool:
    return point.preset == "host"


def _in_turn(one: Contestant, point: Point, inputs: Sequence[Any]) -> Callable[[], Any]:
    """A call of each length from the point's down, over and over; of a ragged batch, in two sequences."""
    calls = []
    for n in range(point.seqlen, 0, -1):
        shorter, cut = replace(point, seqlen=n), [x[:, :n] for x in inputs]
        if point.lengths:
            longer = n - n // 2
            shorter, cut = replace(point, batch=2, seqlen=longer, lengths=(longer, n // 2)), [x[:n] for x in inputs]
        calls.append(one.prepare(shorter, *cut))
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


def _disagreement(results: Sequence[Any], truth: Sequence[Any]) -> str | None:
    """Which tensor of a contestant's results is another than the others', or None."""
    names = ("output",) if len(truth) == 1 else ("dq", "dk", "dv")
    for name, x, expected in zip(names, results, truth, strict=True):
        difference = ((x.float() - expected).norm() / expected.norm()).item()
        if not difference <= AGREEMENT:
            return f"its {name} is {difference:.3g} away from the others'"
    return None


def _in_context(one: Contestant, call: Callable[[], Any]) -> Callable[[], Any]:
    def wrapped() -> Any:
        with one.context():
            return call()

    return wrapped
