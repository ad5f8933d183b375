"""Bar charts from a committed result, in the style of the paper's figures 4 to 7: one panel for each head dim and mask.

Needs matplotlib (the extra `report`), and no GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from fa2gen.bench.peers import is_ours
from fa2gen.bench.report import contestants
from fa2gen.errors import InvalidInput

__all__ = ["plot"]

# A peer keeps its colour in every figure; ours are the strong ones.
_COLOURS = {
    "fa2gen-sm90": "#c0392b",
    "fa2gen-sm90-det": "#922b21",
    "fa2gen-sm80": "#e59866",
    "fa2gen-sm80-det": "#ca6f1e",
    "fa2gen-dense": "#d98880",
    "cudnn": "#6aa84f",
    "fa2": "#7f8fa6",
    "fa3": "#3d6fb6",
    "fa4": "#1f3864",
    "math": "#bdbdbd",
    "flex": "#8e6bbf",
    "flex-flash": "#c39bd3",
}
_LABELS = {
    "cudnn": "cuDNN",
    "fa2": "FlashAttention-2",
    "fa3": "FlashAttention-3",
    "fa4": "FlashAttention-4",
    "math": "PyTorch",
    "flex": "FlexAttention",
    "flex-flash": "FlexAttention (FLASH)",
}
_DIRECTIONS = {"fwd": "forward", "bwd": "backward", "decode": "over caches"}


def plot(document: Mapping[str, Any], out: Path, stem: str) -> list[Path]:
    """Writes out/<stem>[-<preset>]-<direction>-<dtype>.png for each preset, direction and dtype in a result.

    The preset is named where `stem` does not say it. Raises InvalidInput where there is nothing to draw or matplotlib
    is missing, OSError where `out` cannot be written.
    """
    try:
        matplotlib = import_module("matplotlib")
    except ImportError as error:
        raise InvalidInput(f"figures need matplotlib: pip install matplotlib ({error})") from error
    matplotlib.use("Agg")
    groups: dict[tuple[str, str, str], list[Any]] = {}
    for row in document["rows"]:
        if row["tflops"]:
            groups.setdefault((row["preset"], row["direction"], row["dtype"]), []).append(row)
    if not groups:
        raise InvalidInput("the result holds no figure in TFLOP/s: there is nothing to draw")
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for (preset, direction, dtype), rows in groups.items():
        parts = [stem, *(part for part in (preset, direction, dtype) if part not in stem.split("-"))]
        path = out / f"{'-'.join(parts)}.png"
        _figure(rows, str(document["provenance"].get("gpu", "unknown GPU")), direction, dtype, path)
        written.append(path)
    return written


def _figure(rows: Sequence[Mapping[str, Any]], gpu: str, direction: str, dtype: str, path: Path) -> None:
    pyplot = import_module("matplotlib.pyplot")
    by_head_dim = len({row["seqlen"] for row in rows}) == 1  # one length, many head dims: those make the axis
    names = contestants(rows)
    masks = sorted({bool(row["causal"]) for row in rows})
    keys = list(dict.fromkeys(0 if by_head_dim else row["head_dim"] for row in rows))
    panels = [
        [row for row in rows if row["causal"] == causal and (by_head_dim or row["head_dim"] == key)]
        for key in keys
        for causal in masks
    ]
    across = 1 if by_head_dim else len(masks)  # long panels lie below each other
    width = max(5.0, 0.2 * max(map(len, panels)) * (len(names) + 1) + 1)
    figure, grid = pyplot.subplots(
        len(panels) // across,
        across,
        figsize=(width * across, 2.9 * len(panels) // across + 1),
        squeeze=False,
        layout="constrained",
    )
    for axes, shown in zip(grid.flat, panels, strict=True):
        _panel(axes, shown, names, by_head_dim)
        if shown:
            where = f"seqlen {shown[0]['seqlen']}" if by_head_dim else f"head dim {shown[0]['head_dim']}"
            axes.set_title(f"{where}, {'causal' if shown[0]['causal'] else 'no'} mask", fontsize=10)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(names), frameon=False, fontsize=9)
    figure.suptitle(f"Attention {_DIRECTIONS.get(direction, direction)} speed, {dtype} ({gpu})", fontsize=12)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _panel(axes: Any, rows: Sequence[Mapping[str, Any]], names: Sequence[str], by_head_dim: bool) -> None:
    """Groups of bars, each with its number on top, as the paper has them."""
    ticks = [_tick(row, by_head_dim) for row in rows]
    step = 0.86 / max(len(names), 1)
    for index, name in enumerate(names):
        places = [number - 0.43 + step * (index + 0.5) for number in range(len(rows))]
        heights = [row["tflops"].get(name) or 0.0 for row in rows]
        bars = axes.bar(
            places, heights, step * 0.94, color=_COLOURS.get(name, "#444444"), label=_LABELS.get(name, name)
        )
        numbers = [f"{height:.0f}" if height else "" for height in heights]
        weight = "bold" if is_ours(name) else "normal"
        axes.bar_label(bars, numbers, fontsize=6.5, rotation=90, padding=2, fontweight=weight)
    axes.set_xticks(range(len(rows)), ticks)
    axes.set_xlabel("head dim" if by_head_dim else "sequence length")
    axes.set_ylabel("TFLOP/s")
    axes.margins(y=0.16)
    axes.spines[["top", "right"]].set_visible(False)


def _tick(row: Mapping[str, Any], by_head_dim: bool) -> str:
    if by_head_dim:
        return str(row["head_dim"])
    seqlen = row["seqlen"]
    text = f"{seqlen // 1024}k" if seqlen % 1024 == 0 else str(seqlen)
    return text if row["heads"] == row["heads_kv"] else f"{text}\n{row['heads']}:{row['heads_kv']}"
