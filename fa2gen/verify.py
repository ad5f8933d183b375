"""Are the kernels right on this machine? By the rules of `fa2gen.reference`, kernel by kernel, shape by shape.

Short on purpose, for a user's machine and for `make demo`; tests/gpu asks much more. Outputs lie in the middle of a
buffer that is filled with NaN: an element that is not written, or one that is and should not be, is a failure.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from fa2gen.arch import ArchName
from fa2gen.errors import Fa2GenError, UnsupportedProblem
from fa2gen.plan import make_plan

if TYPE_CHECKING:
    from fa2gen.cpu import Count
    from fa2gen.spec import KernelSpec

__all__ = ["SHAPES", "Outcome", "Place", "Shape", "nothing_to_run_on", "runnable", "verify"]

Place = Literal["gpu", "cpu"]


@dataclass(frozen=True)
class Shape:
    """One problem's sizes; the head dim is the kernel's."""

    batch: int
    seqlen_q: int
    seqlen_k: int
    heads: int
    heads_kv: int


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
    """One kernel at one shape. Errors are absolute; `error` is why there are none.

    counts  what its primitives moved on the CPU, where that was asked for.
    """

    name: str
    shape: Shape
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
        fields = asdict(self)
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
    from fa2gen.select import Device, kernel_arch

    properties = import_module("torch").cuda.get_device_properties()
    capability = (properties.major, properties.minor)
    limit, num_sms = properties.shared_memory_per_block_optin, properties.multi_processor_count
    try:
        kernel_arch(Device(properties.name, capability, limit, num_sms), arch)
    except UnsupportedProblem:
        return False
    return True


def verify(
    specs: Sequence[KernelSpec], place: Place, shapes: Sequence[Shape] | None = None, *, stats: bool = False
) -> Iterator[Outcome]:
    """Runs every kernel at every shape, and yields each outcome as it comes. A kernel that fails is an outcome too.

    stats  count what each primitive moves, on the CPU; of a backward pass that of its main kernel.
    """
    for spec in specs:
        for shape in shapes or SHAPES[place]:
            try:
                yield _verify_one(spec, shape, place, stats)
            except Fa2GenError as error:
                yield Outcome(spec.name, shape, error=str(error))


def _verify_one(spec: KernelSpec, shape: Shape, place: Place, stats: bool) -> Outcome:
    torch = import_module("torch")
    device = "cuda" if place == "gpu" else "cpu"
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[spec.problem.dtype]
    # The same numbers everywhere: CPU generator, seeded by the shape alone.
    generator = torch.Generator().manual_seed(shape.seqlen_q * 4099 + shape.seqlen_k)

    def random(seqlen: int, heads: int) -> Any:
        return torch.randn(shape.batch, seqlen, heads, spec.problem.head_dim, generator=generator).to(dtype).to(device)

    q = random(shape.seqlen_q, shape.heads)
    k, v = random(shape.seqlen_k, shape.heads_kv), random(shape.seqlen_k, shape.heads_kv)
    if spec.problem.direction == "bwd":
        return _verify_gradients(spec, shape, place, stats, q, k, v, random(shape.seqlen_q, shape.heads))
    return _verify_output(spec, shape, place, stats, q, k, v)


def _verify_output(spec: KernelSpec, shape: Shape, place: Place, stats: bool, q: Any, k: Any, v: Any) -> Outcome:
    from fa2gen.reference import check

    torch = import_module("torch")
    device, causal = q.device.type, spec.problem.mask == "causal"
    out_buffer, out = _guarded(torch, tuple(q.shape), q.dtype, device)
    lse_buffer, lse = _guarded(torch, (shape.batch, shape.heads, shape.seqlen_q), torch.float32, device)
    counts: Mapping[str, Count] = {}
    if place == "gpu":
        from fa2gen.ops import forward_into

        forward_into(out, lse, q, k, v, causal=causal, arch=spec.tiling.arch, tiling=spec.tiling)
        torch.cuda.synchronize()
    else:
        machine = import_module("fa2gen.cpu")
        counts = machine.forward_into(spec, out, lse, q, k, v, options=machine.Options(stats=stats)).counts

    verdict = check(out, lse, q, k, v, causal=causal)
    if error := _written_outside({"out": (out_buffer, out), "lse": (lse_buffer, lse)}):
        return Outcome(spec.name, shape, error=error)
    return Outcome(spec.name, shape, **verdict.as_dict(), counts=counts)


def _verify_gradients(
    spec: KernelSpec, shape: Shape, place: Place, stats: bool, q: Any, k: Any, v: Any, dout: Any
) -> Outcome:
    """Of the three gradients the outcome has that which comes nearest to its bound, or is farthest beyond it."""
    from fa2gen.reference import attention_reference, check_gradients

    torch = import_module("torch")
    causal = spec.problem.mask == "causal"
    out, lse = attention_reference(q, k, v, causal=causal)
    lse = lse.contiguous()
    buffers, gradients = zip(*(_guarded(torch, tuple(x.shape), x.dtype, q.device.type) for x in (q, k, v)), strict=True)
    counts: Mapping[str, Count] = {}
    if place == "gpu":
        scale = q.shape[-1] ** -0.5
        run = import_module("fa2gen.ops.backward").backward_cuda
        run(dout, q, k, v, out, lse, None, scale, causal, spec.problem.deterministic, spec.tiling, gradients)
        torch.cuda.synchronize()
    else:
        machine = import_module("fa2gen.cpu")
        options = machine.Options(stats=stats)
        counts = machine.run_backward(make_plan(spec), *gradients, dout, q, k, v, out, lse, options=options).counts

    verdict = check_gradients(gradients, dout, q, k, v, causal=causal)
    pairs = zip(buffers, gradients, strict=True)
    if error := _written_outside(dict(zip(("dq", "dk", "dv"), pairs, strict=True))):
        return Outcome(spec.name, shape, error=error)

    def excess(i: int) -> float:  # NaN errors are the worst
        pairs = ((verdict.max_error[i], verdict.max_allowed[i]), (verdict.mean_error[i], verdict.mean_allowed[i]))
        return max(math.inf if math.isnan(error) else error / bound if bound else error for error, bound in pairs)

    worst = max(range(3), key=excess)
    return Outcome(
        spec.name,
        shape,
        max_error=verdict.max_error[worst],
        max_allowed=verdict.max_allowed[worst],
        mean_error=verdict.mean_error[worst],
        mean_allowed=verdict.mean_allowed[worst],
        ok=verdict.ok,
        counts=counts,
    )


def _written_outside(outputs: Mapping[str, tuple[Any, Any]]) -> str | None:
    """What is wrong beside the views (name -> buffer full of NaN, view in it)."""
    for name, (buffer, view) in outputs.items():
        if outside := int((~buffer.isnan()).sum()) - int((~view.isnan()).sum()):
            return f"{outside} elements outside of {name} were written"
    return None


_GUARD = 4096  # elements on either side; a multiple of 16 bytes, so that the view stays aligned


def _guarded(torch: Any, shape: tuple[int, ...], dtype: Any, device: str) -> tuple[Any, Any]:
    """A buffer full of NaN, and a contiguous view of `shape` in its middle."""
    size = math.prod(shape)
    buffer = torch.full((size + 2 * _GUARD,), float("nan"), dtype=dtype, device=device)
    return buffer, buffer[_GUARD : _GUARD + size].view(shape)
