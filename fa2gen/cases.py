"""Cases: a kernel, sizes, options and tensors; the run of exactly that kernel; and the verdict.

What `verify`, `tune`, tests and sanitizers share. A case is run by the spec that it was made for, never by a problem
that was put together again from options: so no check can check another kernel than the one it names.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from fa2gen.errors import InvalidInput
from fa2gen.features import examples_of
from fa2gen.features.attention import OPERANDS
from fa2gen.gpus import current_device
from fa2gen.options import Options, Shape
from fa2gen.plan import make_plan
from fa2gen.spec import KernelSpec

if TYPE_CHECKING:
    from fa2gen.cpu import Count
    from fa2gen.kernel import Kernel
    from fa2gen.reference import GradientVerdict, Verdict

__all__ = ["Case", "Place", "load", "make", "prepare", "run", "torch_dtype", "verdict", "written_outside"]

Place = Literal["gpu", "cpu"]
_GUARD = 4096  # elements on either side of a result; a multiple of 16 bytes, so that the view stays aligned


@dataclass(frozen=True)
class Case:
    """One call of one kernel.

    tensors  by the names of the plan's operands. Results are views in the middle of buffers full of NaN, NaN themselves
             before a run: an element that is not written, or one beside them that is, shows.
    buffers  those buffers, by the same names.
    """

    spec: KernelSpec
    shape: Shape
    options: Options
    tensors: Mapping[str, Any]
    buffers: Mapping[str, Any]

    @property
    def results(self) -> dict[str, Any]:
        """The tensors that the kernel writes."""
        return {name: self.tensors[name] for name in self.buffers}

    def forget_results(self) -> None:
        """Fill the results with NaN again."""
        for x in self.results.values():
            x.fill_(math.nan)


def torch_dtype(dtype: str) -> Any:
    """torch's type for "fp16" or "bf16"."""
    torch = import_module("torch")
    return {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]


def make(
    spec: KernelSpec,
    shape: Shape,
    options: Options | None = None,
    *,
    device: str = "cpu",
    seed: int | None = None,
    gain: float = 1.0,
    with_dlse: bool = False,
    large: bool = False,
) -> Case:
    """Random tensors, normally distributed, the same on every device; results NaN.

    options    default: the first of the problem's examples. Their problem must be the spec's.
    seed       default: one that depends on the lengths.
    gain       what random numbers are multiplied with.
    with_dlse  whether LSE has a gradient (backward).
    large      for timing: numbers are drawn on the device, and O and LSE come from a forward kernel rather than from
               the reference, whose score matrix would not fit.

    Raises InvalidInput where the options ask for another kernel than the spec.
    """
    torch = import_module("torch")
    problem = spec.problem
    options = examples_of(problem)[0] if options is None else options
    if options.problem(problem.direction, problem.head_dim, problem.dtype) != problem:
        raise InvalidInput(f"{options} are no options of {spec.name}: examples are {examples_of(problem)}")
    dtype = torch_dtype(problem.dtype)
    if seed is None:
        seed = shape.seqlen_q * 4099 + shape.seqlen_k
    place = device if large else "cpu"
    generator = torch.Generator(place).manual_seed(seed)
    tensors: dict[str, Any] = {}
    buffers: dict[str, Any] = {}
    for operand in OPERANDS[problem.direction]:
        size = operand.shape(shape, problem.head_dim)
        of_dtype = torch.float32 if operand.of == "row" else dtype
        if operand.out:
            buffers[operand.name], tensors[operand.name] = _guarded(torch, size, of_dtype, device)
        elif operand.name not in ("o", "lse") and (with_dlse or not operand.optional):
            x = gain * torch.randn(size, generator=generator, device=place)
            tensors[operand.name] = x.to(of_dtype).to(device)
    if problem.direction == "bwd":
        tensors |= _forward(spec, shape, options, tensors, large)
    return Case(spec, shape, options, tensors, buffers)


def _forward(
    spec: KernelSpec, shape: Shape, options: Options, tensors: Mapping[str, Any], by_kernel: bool
) -> dict[str, Any]:
    """O and LSE of a backward case."""
    q, k, v = (tensors[name] for name in "qkv")
    if not by_kernel:
        from fa2gen.reference import attention_reference

        out, lse = attention_reference(q, k, v, **options._asdict())
        return {"o": out.contiguous(), "lse": lse.contiguous()}
    from fa2gen.select import select

    problem = options.problem("fwd", spec.problem.head_dim, spec.problem.dtype)
    forward = select(problem, current_device(), None, shape.seqlen_k).plan.spec
    results = {"o": q.new_empty(q.shape), "lse": q.new_empty(OPERANDS["fwd"][-1].shape(shape, 0), dtype=_fp32())}
    prepare(load(forward), Case(forward, shape, options, {"q": q, "k": k, "v": v, **results}, {}))()
    return results


def _fp32() -> Any:
    return import_module("torch").float32


def run(case: Case, place: Place, *, stats: bool = False) -> Mapping[str, Count]:
    """Run the case's kernel on its tensors, and wait for the end.

    stats  count what each primitive moves, on the CPU. Returns the counts, else nothing.
    """
    if place == "cpu":
        machine = import_module("fa2gen.cpu")
        run_options = machine.RunOptions(stats=stats)
        report = machine.run_kernel(case.spec, case.tensors, case.options, run_options=run_options)
        counts: Mapping[str, Count] = report.counts
        return counts
    prepare(load(case.spec), case)()
    import_module("torch").cuda.synchronize()
    return {}


def load(spec: KernelSpec) -> Kernel:
    """The spec's kernel on torch's current device: found in the store, or built now. The last 64 stay loaded."""
    return _load(spec, import_module("torch").cuda.current_device())


@functools.lru_cache(maxsize=64)
def _load(spec: KernelSpec, device: int) -> Kernel:
    from fa2gen.kernel import Kernel
    from fa2gen.select import kernel_arch
    from fa2gen.store import Store

    plan = make_plan(spec)
    _, target = kernel_arch(current_device(), spec.tiling.arch)
    return Kernel(plan, Store().get_or_compile(plan, target).cubin, device)


def prepare(kernel: Kernel, case: Case) -> Callable[[], None]:
    """What launches the kernel on the case's tensors, on torch's current stream: nothing is left but to enqueue it."""
    torch = import_module("torch")
    plan = kernel.plan
    strides = {
        operand.name: tuple(case.tensors[operand.name].stride()[:3]) for operand in plan.operands if operand.of != "row"
    }
    launch = kernel.prepare(case.shape, strides, case.options)
    scratch = torch.zeros(max(1, launch.scratch_bytes), dtype=torch.uint8, device="cuda")
    given = (case.tensors.get(operand.name) for operand in plan.operands)
    addresses = tuple(0 if x is None else x.data_ptr() for x in given)
    stream = torch.cuda.current_stream().cuda_stream

    def call() -> None:
        launch(addresses, scratch.data_ptr(), stream)

    return call


def verdict(case: Case) -> Verdict | GradientVerdict:
    """The results against attention in fp32, by the rules of `fa2gen.reference`."""
    from fa2gen.reference import check, check_gradients

    x, options = case.tensors, case.options._asdict()
    with import_module("torch").no_grad():
        if case.spec.problem.direction == "fwd":
            return check(x["o"], x["lse"], x["q"], x["k"], x["v"], **options)
        gradients = (x["dq"], x["dk"], x["dv"])
        return check_gradients(gradients, x["dout"], x["q"], x["k"], x["v"], dlse=x.get("dlse"), **options)


def written_outside(case: Case) -> str | None:
    """What is wrong beside the results, or None."""
    for name, view in case.results.items():
        if outside := int((~case.buffers[name].isnan()).sum()) - int((~view.isnan()).sum()):
            return f"{outside} elements outside of {name} were written"
    return None


def _guarded(torch: Any, shape: tuple[int, ...], dtype: Any, device: str) -> tuple[Any, Any]:
    """A buffer full of NaN, and a contiguous view of `shape` in its middle."""
    size = math.prod(shape)
    buffer = torch.full((size + 2 * _GUARD,), float("nan"), dtype=dtype, device=device)
    return buffer, buffer[_GUARD : _GUARD + size].view(shape)
