"""Are the kernels right on this machine? By the rules of `fa2gen.reference`, kernel by kernel, shape by shape.

Short on purpose, for a user's machine and for `make demo`; tests/gpu asks much more. Outputs lie in the middle of a
buffer that is filled with NaN: an element that is not written, or one that is and should not be, is a failure.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from fa2gen import cases
from fa2gen.arch import ArchName
from fa2gen.cases import Place
from fa2gen.errors import Fa2GenError, UnsupportedProblem
from fa2gen.features import examples_of
from fa2gen.gpus import current_device
from fa2gen.options import Options, Shape
from fa2gen.select import kernel_arch

if TYPE_CHECKING:
    from fa2gen.cpu import Count
    from fa2gen.spec import KernelSpec

__all__ = ["SHAPES", "Outcome", "checks", "nothing_to_run_on", "runnable", "verify"]

# One tile and less, ragged tiles, more queries than keys (so rows with no key, if causal), GQA and MQA, many tiles.
SHAPES: dict[Place, tuple[Shape, ...]] = {
    "gpu": (
        Shape(2, 1, 1, 2, 2),
        Shape(2, 1, 1024, 4, 1),
        Shape(2, 113, 203, 6, 1),
        Shape(1, 217, 128, 4, 2),
        Shape(1, 1023, 1024, 8, 2),
        Shape(2, 2048, 2048, 4, 4),
    ),
    "cpu": (Shape(1, 1, 1, 1, 1), Shape(1, 113, 203, 2, 1), Shape(1, 217, 128, 1, 1)),
}


@dataclass(frozen=True)
class Outcome:
    """One kernel at one shape, with options of its problem. Errors are absolute; `error` is why there are none.

    counts  what its primitives moved on the CPU, where that was asked for.
    """

    name: str
    shape: Shape
    options: Options
    max_error: float | None = None
    max_allowed: float | None = None
    mean_error: float | None = None
    mean_allowed: float | None = None
    lse_error: float | None = None
    lse_allowed: float | None = None
    ok: bool = False
    error: str | None = None
    counts: Mapping[str, Count] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """JSON values only: a NaN or an infinity, which JSON has not, is None."""
        fields = asdict(self) | {"shape": self.shape._asdict(), "options": self.options._asdict()}
        return {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in fields.items()}


def nothing_to_run_on(place: Place) -> str | None:
    """Why nothing can be verified in that place; None when something can."""
    if place == "cpu":
        from fa2gen.cpu import find_compiler

        try:
            find_compiler()
        except Fa2GenError as error:
            return str(error)
    else:
        try:
            ctypes.CDLL("libcuda.so.1")
        except OSError:
            return "there is no NVIDIA driver here, so no GPU"
    if find_spec("torch") is None:
        return "torch is not installed: pip install torch, from the index that fits your driver"
    if place == "gpu":
        torch = import_module("torch")
        if torch.version.cuda is None:
            return f"torch {torch.__version__} is a build without CUDA"
        if not torch.cuda.is_available():
            return "torch sees no GPU"
    return None


def runnable(arch: ArchName, place: Place) -> bool:
    """Whether the current device runs a family's kernels. The CPU runs all of them."""
    if place == "cpu":
        return True
    try:
        kernel_arch(current_device(), arch)
    except UnsupportedProblem:
        return False
    return True


def checks(
    specs: Sequence[KernelSpec], place: Place, shapes: Sequence[Shape] | None = None
) -> list[tuple[KernelSpec, Shape, Options]]:
    """What `verify` runs: every kernel at every shape, with each example of its problem's options."""
    return [
        (spec, shape, options)
        for spec in specs
        for shape, options in itertools.product(shapes or SHAPES[place], examples_of(spec.problem))
    ]


def verify(
    specs: Sequence[KernelSpec], place: Place, shapes: Sequence[Shape] | None = None, *, stats: bool = False
) -> Iterator[Outcome]:
    """Runs every kernel at every shape, and yields each outcome as it comes. A kernel that fails is an outcome too.

    stats  count what each primitive moves, on the CPU; of a backward pass that of its main kernel.
    """
    for spec, shape, options in checks(specs, place, shapes):
        try:
            yield _verify_one(spec, shape, options, place, stats)
        except Fa2GenError as error:
            yield Outcome(spec.name, shape, options, error=str(error))


def _verify_one(spec: KernelSpec, shape: Shape, options: Options, place: Place, stats: bool) -> Outcome:
    """Of three gradients the outcome has that which comes nearest to its bound, or is farthest beyond it."""
    case = cases.make(spec, shape, options, device="cuda" if place == "gpu" else "cpu")
    counts = cases.run(case, place, stats=stats)
    verdict = cases.verdict(case)
    if error := cases.written_outside(case):
        return Outcome(spec.name, shape, options, error=error)
    worst: dict[str, Any] = verdict.worst()
    return Outcome(spec.name, shape, options, **worst, ok=verdict.ok, counts=counts)
