"""The winner, written down: rows of specs/tuned/, one TOML file for each GPU, architecture, direction and head dim."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fa2gen.catalog import SCHEMA, TunedRow, read_tuned, tuned_rows
from fa2gen.errors import InvalidInput
from fa2gen.files import write_file
from fa2gen.select import forget
from fa2gen.spec import NO_EXPRESSION, KernelSpec
from fa2gen.tune.search import Found

__all__ = ["file_name", "rows_of", "write"]

_HEAD = """\
# Written by `fa2gen tune`; README.md beside this file says how it is read. Measure again rather than edit.
schema = {schema}
"""


def rows_of(found: Found, provenance: Mapping[str, Any]) -> list[TunedRow]:
    """A problem's result as rows. `provenance` must name `gpu` and `nvrtc`."""
    return [
        TunedRow(
            kernel=winner.spec.name,
            seqlen_min=winner.seqlen_min,
            seqlen_max=winner.seqlen_max,
            default=found.default.name,
            runner_up=winner.runner_up.name,
            seqlens=winner.seqlens,
            tflops=winner.tflops,
            tflops_default=winner.tflops_default,
            tflops_runner_up=winner.tflops_runner_up,
            num_candidates=found.num_candidates,
            provenance={**provenance, "source": winner.digest, "complete": found.complete},
            **found.default.problem.model_dump(include=set(NO_EXPRESSION)),
        )
        for winner in found.winners
    ]


def file_name(gpu: str, spec: KernelSpec) -> str:
    """`nvidia-h200-sm90-fwd-d80.toml`, `nvidia-h200-sm90-fwd-d192-v128.toml`."""
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    of_v = f"-v{spec.problem.head_dim_v}" if spec.problem.head_dim_v else ""
    return f"{slug}-{spec.tiling.arch}-{spec.problem.direction}-d{spec.problem.head_dim}{of_v}.toml"


def write(rows: Sequence[TunedRow], folder: Path) -> Path:
    """Puts one problem's rows into their file, in place of the rows it had; other problems' rows stay. Atomic.

    The selector of this process sees them at once. Raises InvalidInput where the file there is not one of ours, OSError
    where the folder cannot be written.
    """
    problem, arch, gpu = rows[0].spec.problem, rows[0].spec.tiling.arch, rows[0].gpu
    path = folder / file_name(gpu, rows[0].spec)
    kept = [row for row in (read_tuned(path) if path.exists() else []) if row.spec.problem != problem]
    if any(row.gpu != gpu or row.spec.tiling.arch != arch for row in kept):
        raise InvalidInput(f"{path} holds rows of another GPU or architecture")
    ordered = sorted(
        (*kept, *rows), key=lambda row: (row.spec.problem.dtype, row.spec.problem.mask != "full", row.seqlen_min)
    )
    write_file(path, "\n".join([_HEAD.format(schema=SCHEMA), *map(_toml, ordered)]).encode())
    tuned_rows.cache_clear()
    forget()
    return path


def _toml(row: TunedRow) -> str:
    """One row; TOML has no null, so an open end is left out, and so are texts that say nothing."""
    fields = {
        name: getattr(row, name)
        for name in TunedRow.__dataclass_fields__
        if name != "provenance" and getattr(row, name) not in (None, "")
    }
    lines = ["[[row]]", *_assignments(fields), "", "[row.provenance]", *_assignments(row.provenance), ""]
    return "\n".join(lines)


def _assignments(fields: Mapping[str, Any]) -> list[str]:
    return [f"{name} = {_value(value)}" for name, value in fields.items() if value is not None]


def _value(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_value, value))}]"
    # JSON's strings, numbers and booleans are TOML's too.
    return json.dumps(value)
