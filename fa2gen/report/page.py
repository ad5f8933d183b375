"""The page of one kernel: HTML that is complete in itself, without scripts, and well-formed XML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from fa2gen._paths import in_checkout
from fa2gen._version import __version__
from fa2gen.arch import ARCHES
from fa2gen.bench.peers import in_order, is_ours
from fa2gen.bench.points import Point
from fa2gen.bench.report import best_peer, load, ratio
from fa2gen.explain import Explanation
from fa2gen.report.lines import Listing
from fa2gen.spec import KernelSpec

__all__ = ["page", "results_here"]

_MAP_WIDTH, _MAP_HEIGHT = 960, 46
_GRAPH_WIDTH, _GRAPH_HEIGHT = 960, 120
_COLOURS = ("#3d6fb6", "#6aa84f", "#e59866", "#8e6bbf", "#c0392b", "#7f8fa6", "#d4ac0d", "#45b39d")
_MAX_REGISTERS = 255
"""Of a thread: what a bar of live registers is drawn against."""


@dataclass(frozen=True)
class _Measured:
    """A point of saved results: what it is, on which GPU, who had which TFLOP/s, ours over the best peer, and whether
    this very kernel is among those that ran."""

    point: str
    gpu: str
    day: str
    figures: Mapping[str, float]
    ours: str
    over_best: float | None
    is_this: bool


def page(listing: Listing, explanation: Explanation, results: Iterable[Path]) -> str:
    """The HTML. `results` are files of `fa2gen bench --save`; points of other problems are left out.

    Raises InvalidInput for a file that is none.
    """
    spec = KernelSpec.from_name(explanation.kernel)
    measured = list(_measured(spec, results))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["thousands"] = lambda number: f"{number:,}"
    template = environment.from_string((resources.files("fa2gen.report") / "page.html.j2").read_text(encoding="utf-8"))
    limit = explanation.shared_memory_limit
    return template.render(
        version=__version__,
        name=explanation.kernel,
        problem=spec.problem.text,
        found=explanation,
        meta=listing.entry.meta,
        report=listing.entry.report,
        kernels=[_kernel(listing, kernel) for kernel in explanation.kernels],
        family_limit=ARCHES[spec.tiling.arch].shared_memory_per_block,
        spans=[
            {
                "what": span.what,
                "offset": span.offset,
                "bytes": span.bytes,
                "x": round(_MAP_WIDTH * span.offset / limit, 2),
                "width": round(_MAP_WIDTH * span.bytes / limit, 2),
                "colour": _COLOURS[number % len(_COLOURS)],
            }
            for number, span in enumerate(explanation.shared_memory)
        ],
        map_width=_MAP_WIDTH,
        map_height=_MAP_HEIGHT,
        graph_width=_GRAPH_WIDTH,
        graph_height=_GRAPH_HEIGHT,
        max_registers=_MAX_REGISTERS,
        names=in_order(name for point in measured for name in point.figures),
        measured=measured,
        fastest=max((value for point in measured for value in point.figures.values()), default=1.0),
        lines=listing.lines,
        has_sass=bool(listing.live),
        hottest=listing.hottest(8),
    )


def results_here() -> list[Path]:
    """The results that a checkout carries; none in an installed package."""
    folder = Path(__file__).resolve().parents[2] / "tests" / "bench" / "results"
    return sorted(folder.glob("*.json")) if in_checkout() else []


def _kernel(listing: Listing, launched: Mapping[str, Any]) -> dict[str, Any]:
    """An entry point: its numbers, and the curve of its live registers as points of an SVG polyline."""
    symbol = launched["symbol"]
    live = listing.live.get(symbol, ())
    peak = max(live, default=0)
    return {
        **launched,
        "registers": listing.entry.report.registers_of.get(symbol, listing.entry.report.registers),
        "instructions": len(live),
        "peak": peak,
        "curve": " ".join(f"{x},{y}" for x, y in _curve(live)),
    }


def _curve(live: Sequence[int]) -> list[tuple[int, float]]:
    """One point for each column of the graph: the greatest of the instructions that fall into it."""
    if not live:
        return []
    columns = min(_GRAPH_WIDTH, len(live))
    found = []
    for column in range(columns):
        first, end = column * len(live) // columns, (column + 1) * len(live) // columns
        height = max(live[first:end]) / _MAX_REGISTERS * _GRAPH_HEIGHT
        found.append((column * _GRAPH_WIDTH // columns, round(_GRAPH_HEIGHT - height, 1)))
    return found


def _measured(spec: KernelSpec, results: Iterable[Path]) -> Iterable[_Measured]:
    for path in results:
        document = load(path)
        provenance = document["provenance"]
        for row in document["rows"]:
            if not row["tflops"] or Point.of_row(row).problem != spec.problem:
                continue
            names = [name for name in row["tflops"] if is_ours(name)]
            ours = next((name for name in names if spec.tiling.arch in name), "")
            best = best_peer(row)
            yield _Measured(
                point=str(Point.of_row(row)),
                gpu=str(provenance.get("gpu", "unknown GPU")),
                day=str(provenance.get("measured", "")),
                figures=row["tflops"],
                ours=ours,
                over_best=ratio(row, ours) if ours and best else None,
                is_this=spec.name in provenance.get("kernels", ()),
            )
