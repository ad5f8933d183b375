"""The loop: every contestant at every point, a row of JSON for each point, and the provenance of them all."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from importlib import import_module
from typing import Any

from fa2gen.arch import ARCHES
from fa2gen.bench import protocol, provenance
from fa2gen.bench.peers import Contestant, is_ours
from fa2gen.bench.points import Point
from fa2gen.bench.protocol import significant
from fa2gen.select import select
from fa2gen.spec import Problem

__all__ = ["SECONDS_PER_POINT", "Bench"]

SECONDS_PER_POINT = 0.5
AGREEMENT = 0.02
"""Largest ||a - b|| / ||b|| between two contestants' outputs; bf16 and fp16 kernels differ by 2e-3 to 5e-3."""

_MATMUL = 8192
_MATMUL_ROUNDS = 10


class Bench:
    """One run. `rows` yields a row as each point is done; `result` is the document of all rows so far.

    contestants  who is measured; of those whose output differs from the first one's, no figure is given.
    missing      name -> reason, for the provenance; grows when a contestant fails at a point.
    """

    def __init__(self, contestants: Sequence[Contestant], missing: dict[str, str], command: str) -> None:
        self.contestants = list(contestants)
        self.missing = dict(missing)
        self.command = command
        self._torch = import_module("torch")
        self._timer = protocol.CudaTimer()
        self._rows: list[dict[str, Any]] = []
        self._kernels: set[str] = set()
        self._provenance: dict[str, Any] = {}

    def rows(self, points: Sequence[Point], seconds: float = SECONDS_PER_POINT) -> Iterator[dict[str, Any]]:
        """Measures point by point; the matrix product before and after, for the practical ceiling and its drift."""
        self._provenance = {
            **provenance.gpu_facts(),
            **provenance.versions(),
            "measured": datetime.now(UTC).strftime("%Y-%m-%d"),
            "command": self.command,
            "protocol": protocol.PROTOCOL,
            "matmul_8192_bf16_tflops": [self._matmul()],
            "clocks_under_load": [provenance.clocks()],
        }
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

        def random(heads: int) -> Any:
            shape = (point.batch, point.seqlen, heads, point.head_dim)
            return torch.randn(shape, generator=generator, device="cuda", dtype=dtype)

        inputs = random(point.heads), random(point.heads_kv), random(point.heads_kv)
        with torch.no_grad():
            calls = self._tried(point, inputs)
            row: dict[str, Any] = {**point.to_json(), "tflops": {}}
            if point.preset == "host":
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
        self._note_kernels(point)
        calls = {}
        gc.collect()  # contestants may hold buffers of this point
        return row

    def _tried(
        self, point: Point, inputs: tuple[Any, Any, Any]
    ) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
        """name -> (bare call, call in its context) of the contestants that run here and agree with the first one."""
        torch = self._torch
        calls: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {}
        truth = None
        for one in sorted(self.contestants, key=lambda one: is_ours(one.name)):  # it is ours that has to prove itself
            try:
                with one.context():
                    call = one.prepare(point, *inputs)
                    out = call()
                torch.cuda.synchronize()
            except Exception as error:  # peers raise whatever they like; one that fails must not stop the others
                self._miss(one.name, point, str(error).strip().split("\n")[0] or type(error).__name__)
                continue
            if truth is None:
                truth = out.float()
            else:
                difference = ((out.float() - truth).norm() / truth.norm()).item()
                if not difference <= AGREEMENT:
                    self._miss(one.name, point, f"its output is {difference:.3g} away from the others'")
                    continue
            calls[one.name] = call, _in_context(one, call)
        return {one.name: calls[one.name] for one in self.contestants if one.name in calls}

    def _miss(self, name: str, point: Point, reason: str) -> None:
        self.missing[f"{name} at {point}"] = reason[:300]

    def _note_kernels(self, point: Point) -> None:
        """Which of our kernels ran: what the selector gives for this point."""
        problem = Problem(
            head_dim=point.head_dim,
            dtype="fp16" if point.dtype == "fp16" else "bf16",
            mask="causal" if point.causal else "full",
        )
        for one in self.contestants:
            for arch in ARCHES:
                if one.name == f"fa2gen-{arch}" and f"{one.name} at {point}" not in self.missing:
                    self._kernels.add(select(problem, provenance.current_device(), arch, point.seqlen).plan.name)

    def _matmul(self) -> float:
        """TFLOP/s of an 8192^3 bf16 matrix product of random data."""
        torch = self._torch
        a, b = (torch.randn(_MATMUL, _MATMUL, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        times = protocol.interleaved({"matmul": lambda: a @ b}, self._timer, _MATMUL_ROUNDS)["matmul"]
        return significant(2.0 * _MATMUL**3 / statistics.median(times) / 1e9)


def _in_context(one: Contestant, call: Callable[[], Any]) -> Callable[[], Any]:
    def wrapped() -> Any:
        with one.context():
            return call()

    return wrapped
