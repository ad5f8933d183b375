"""Cases: a kernel, sizes, options and tensors; the run of exactly that kernel; and the verdict.

What `verify`, `tune`, tests and sanitizers share. A case is run by the spec that it was made for, never by a problem
that was put together again from options: so no check can check another kernel than the one it names.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from random import Random
from typing import TYPE_CHECKING, Any, Literal

from fa2gen.cases_cached import cached_tensors, gathered, paged_tensors, sequences
from fa2gen.errors import InvalidInput
from fa2gen.features import examples_of
from fa2gen.features.expression import shapes_of
from fa2gen.gpus import current_device
from fa2gen.layout import ELEMENT_BYTES
from fa2gen.options import AnyShape, Options, Shape
from fa2gen.plan import make_plan
from fa2gen.spec import KernelSpec, Problem, names_of

if TYPE_CHECKING:
    from fa2gen.cpu import Count
    from fa2gen.kernel import Kernel
    from fa2gen.reference import GradientVerdict, Verdict

__all__ = [
    "Case",
    "Place",
    "expression_tensors",
    "load",
    "make",
    "prepare",
    "run",
    "torch_dtype",
    "verdict",
    "written_outside",
]

Place = Literal["gpu", "cpu"]
_GUARD = 4096  # elements on either side of a result; a multiple of 16 bytes, so that the view stays aligned


@dataclass(frozen=True)
class Case:
    """One call of one kernel.

    shape    of a ragged batch the rows of all sequences together (see Shape).
    rows     of a ragged batch: (first query, past the last, first key, past the last) of each sequence.
    tensors  by the names of the plan's operands. Results are views in the middle of buffers full of NaN, NaN themselves
             before a run: an element that is not written, or one beside them that is, shows.
    buffers  those buffers, by the same names.
    """

    spec: KernelSpec
    shape: AnyShape
    options: Options
    tensors: Mapping[str, Any]
    buffers: Mapping[str, Any]
    rows: tuple[tuple[int, int, int, int], ...] = ()

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

    shape      of a ragged batch the lengths of the longest sequence, and two sequences less than there are; the others'
               lengths are drawn, and how much of them is used. Rows that no sequence uses are NaN. Over a cache the
               longest sequence's length, and over pages all of a sequence's: see `fa2gen.cases_cached`.
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
    of_cache = (problem.paged, problem.cache_dtype)
    asked = options.problem(problem.direction, problem.head_dim, problem.dtype, problem.head_dim_v, *of_cache)
    if asked != problem:
        raise InvalidInput(f"{options} are no options of {spec.name}: examples are {examples_of(problem)}")
    dtype = torch_dtype(problem.dtype)
    if seed is None:
        seed = shape.seqlen_q * 4099 + shape.seqlen_k
    tensors: dict[str, Any] = {}
    buffers: dict[str, Any] = {}
    rows: tuple[tuple[int, int, int, int], ...] = ()
    longest = shape
    if problem.varlen:
        shape, rows, lengths = _ragged(shape, seed)
        tensors |= {name: torch.tensor(x, dtype=torch.int32, device=device) for name, x in lengths.items()}
    if problem.has_expression:
        inputs = expression_tensors(problem, longest._replace(batch=shape.batch), seed, device)
        tensors |= inputs
        assert options.expression
        shapes = tuple(tuple(x.shape) for x in inputs.values())
        options = options._replace(expression=options.expression._replace(shapes=shapes))
    sizes: AnyShape = shape
    if problem.direction == "decode":
        sizes, cached = cached_tensors(problem, shape, dtype, seed, device, large)
        tensors |= cached
    elif problem.paged:
        rows = tuple((first, end, 0, end_k - first_k) for first, end, first_k, end_k in rows)
        least = 1 if spec.tiling.arch == "sm80" else 128 // spec.tiling.swizzle_bytes
        sizes, cached = paged_tensors(problem, shape, [row[3] for row in rows], least, dtype, seed, device)
        sizes = sizes._replace(key_parts=1 + 2 * spec.tiling.split_keys)
        del tensors["cu_seqlens_k"], tensors["seqused_k"]
        tensors |= cached
    place = device if large else "cpu"
    generator = torch.Generator(place).manual_seed(seed)
    for operand in (x for x in make_plan(spec).operands if x.of not in ("bounds", "lengths") and x.name not in tensors):
        size = tuple(tensors[operand.name[1:]].shape) if operand.is_input else operand.shape(sizes, problem)
        of_dtype = dtype if operand.element_bytes(problem) == ELEMENT_BYTES else torch.float32
        if operand.out and operand.name != "q":  # which a kernel turns, where a call appends
            buffers[operand.name], tensors[operand.name] = _guarded(torch, size, of_dtype, device)
        elif operand.of == "state":
            bits = torch.randint(-(2**31), 2**31, size, generator=generator, device=place)
            tensors[operand.name] = bits.to(torch.int32).to(device)
        elif operand.name not in ("o", "lse") and (with_dlse or not operand.optional):
            x = gain * torch.randn(size, generator=generator, device=place)
            tensors[operand.name] = x.to(of_dtype).to(device)
            if rows and operand.is_tensor:
                _forget_unused(tensors[operand.name], [r[:2] if operand.of == "query" else r[2:] for r in rows])
    case = Case(spec, sizes, options, tensors, buffers, rows)
    return replace(case, tensors=tensors | _forward(case, large)) if problem.direction == "bwd" else case


def expression_tensors(problem: Problem, longest: Shape, seed: int, device: str) -> dict[str, Any]:
    """What a problem's expression names, by token: normally distributed, or small whole numbers that rise along the
    last axis, as documents do. Of a ragged batch, padded to the longest sequence."""
    torch = import_module("torch")
    generator = torch.Generator().manual_seed(seed)
    found = {}
    tensors = (x for x in problem.program.inputs if x.is_tensor)
    for x, size in zip(tensors, shapes_of(problem.program, longest), strict=True):
        if x.type == "float":
            made = torch.randn(size, generator=generator)
        else:
            most = 2 if x.type == "bool" else 4
            made = torch.randint(0, most, size, generator=generator, dtype=torch.int32)
            made = made if x.type == "bool" else made.sort(dim=-1)[0]
        found[x.token] = made.to(device)
    return found


def _ragged(longest: Shape, seed: int) -> tuple[Shape, tuple[tuple[int, int, int, int], ...], dict[str, list[int]]]:
    """(shape, rows, lengths by operand) of a ragged batch, of two sequences more than the shape has."""
    random = Random(seed)
    longest = longest._replace(batch=longest.batch + 2)
    sides = []
    for seqlen in (longest.seqlen_q, longest.seqlen_k):
        lengths = [seqlen, *(random.randint(0, seqlen) for _ in range(longest.batch - 1))]
        used = [length if random.random() < 0.7 else random.randint(0, length) for length in lengths]
        sides.append((list(itertools.accumulate(lengths, initial=0)), used))
    (starts_q, used_q), (starts_k, used_k) = sides
    rows = tuple(
        (starts_q[i], starts_q[i] + used_q[i], starts_k[i], starts_k[i] + used_k[i]) for i in range(longest.batch)
    )
    shape = longest._replace(seqlen_q=starts_q[-1] + 5, seqlen_k=starts_k[-1] + 3)  # and rows behind the last
    names = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")
    return shape, rows, dict(zip(names, (starts_q, starts_k, used_q, used_k), strict=True))


def _forget_unused(x: Any, rows: Sequence[tuple[int, ...]]) -> None:
    """NaN in all rows of (1, rows, heads, head_dim) but these."""
    used = import_module("torch").zeros(x.shape[1], dtype=import_module("torch").bool)
    for first, end in rows:
        used[first:end] = True
    x[:, ~used.to(x.device)] = math.nan


def _forward(case: Case, by_kernel: bool) -> dict[str, Any]:
    """O and LSE of a backward case."""
    q = case.tensors["q"]
    problem = case.spec.problem
    results = {
        "o": q.new_zeros((*q.shape[:-1], problem.head_dims[1])),
        "lse": q.new_zeros((q.shape[0], q.shape[2], q.shape[1]), dtype=_fp32()),
    }
    both = replace(case, tensors={**case.tensors, **results})
    if not by_kernel:
        from fa2gen.reference import attention_reference

        results["lse"].fill_(-math.inf)
        for part in _parts(both):
            of_part: dict[str, Any] = {name: part.get(name) for name in ("s_aux", "place")} | case.options._asdict()
            out, lse = attention_reference(part["q"], part["k"], part["v"], **of_part)
            part["o"].copy_(out)
            part["lse"].copy_(lse)
        return results
    from fa2gen.select import select

    wanted = case.options.problem("fwd", problem.head_dim, problem.dtype, problem.head_dim_v)
    forward = select(wanted, current_device(), None, case.shape.seqlen_k).plan.spec
    prepare(load(forward), replace(both, spec=forward, buffers={}))()
    return results


def _parts(case: Case) -> Iterator[dict[str, Any]]:
    """Views of the tensors, by name: of each sequence that has queries and something to see, or of all of a dense
    batch. What is one a head is there in each, and as `place` what an expression looks up."""
    from fa2gen.reference import Place

    inputs = [case.tensors[x.token] for x in case.spec.problem.program.inputs if x.is_tensor]
    if case.spec.problem.direction == "decode":
        yield from sequences(case.tensors, inputs)
        return
    if not case.spec.problem.varlen:
        yield {**case.tensors, "place": Place(inputs, 0, case.tensors.get("rng_state"))}
        return
    operands = [x for x in make_plan(case.spec).operands if x.name in case.tensors]
    for b, (first_q, end_q, first_k, end_k) in enumerate(case.rows):
        if first_q < end_q and (first_k < end_k or case.options.sink):
            of = {"query": (1, first_q, end_q), "key": (1, first_k, end_k), "row": (2, first_q, end_q)}
            tensors = case.tensors
            if case.spec.problem.paged:
                tensors = {**tensors, **gathered(tensors, b, end_k)}
            cuts = ((x.name, *of[x.of]) for x in operands if x.of in of)
            part = {name: tensors[name].narrow(dim, first, end - first) for name, dim, first, end in cuts}
            part |= {x.name: case.tensors[x.name] for x in operands if x.of in ("head", "state")}
            yield {**part, "place": Place(inputs, b, case.tensors.get("rng_state"))}


def _fp32() -> Any:
    return import_module("torch").float32


def run(case: Case, place: Place, *, stats: bool = False) -> Mapping[str, Count]:
    """Run the case's kernel on its tensors, and wait for the end.

    stats  count what each primitive moves, on the CPU. Returns the counts, else nothing.
    """
    if place == "cpu":
        machine = import_module("fa2gen.cpu")
        run_options = machine.RunOptions(stats=stats)
        report = machine.run_kernel(case.spec, case.tensors, case.options, shape=case.shape, run_options=run_options)
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

    on = current_device()
    _, target = kernel_arch(on, spec.tiling.arch)
    plan = make_plan(spec, on.shared_memory_per_block)
    return Kernel(plan, Store().get_or_compile(plan, target).cubin, device)


def prepare(kernel: Kernel, case: Case) -> Callable[[], None]:
    """What launches the kernel on the case's tensors, on torch's current stream: nothing is left but to enqueue it."""
    torch = import_module("torch")
    plan = kernel.plan
    strides = {
        operand.name: tuple(case.tensors[operand.name].stride()[:3])
        for operand in plan.operands
        if operand.is_tensor and operand.name in case.tensors
    }
    launch = kernel.prepare(case.shape, strides, case.options)
    scratch = torch.zeros(max(1, launch.scratch_bytes), dtype=torch.uint8, device="cuda")
    cleared = torch.zeros(max(1, launch.cleared_bytes), dtype=torch.uint8, device="cuda")
    given = (case.tensors.get(operand.name) for operand in plan.operands)
    addresses = tuple(0 if x is None else x.data_ptr() for x in given)
    stream = torch.cuda.current_stream().cuda_stream

    def call(_: Any = case) -> None:  # which keeps the tensors
        launch(addresses, scratch.data_ptr(), stream, cleared.data_ptr())

    return call


def verdict(case: Case) -> Verdict | GradientVerdict:
    """The results against attention in fp32, by the rules of `fa2gen.reference`; of a ragged batch the worst part's.

    Rows that have nothing to see must be 0 (LSE -inf): NaN, as of a row that is not written, is judged as such.
    """
    from fa2gen.reference import check, check_gradients, check_input_gradients, check_sink_gradient

    options = case.options._asdict()
    found: list[Verdict | GradientVerdict] = []
    with import_module("torch").no_grad():
        for x in _parts(case):
            if case.spec.problem.direction != "bwd":
                of_part = {name: x.get(name) for name in ("s_aux", "place")}
                found.append(check(x["o"], x["lse"], x["q"], x["k"], x["v"], **of_part, **options))
            else:
                gradients = (x["dq"], x["dk"], x["dv"])
                more = options | {name: x.get(name) for name in ("dlse", "s_aux", "place")}
                found.append(check_gradients(gradients, x["dout"], x["q"], x["k"], x["v"], **more))
        if learned := names_of(case.spec.problem.learned):
            of_inputs = [case.tensors[f"d{token}"] for token in learned]
            found.append(check_input_gradients(of_inputs, _parts(case), **options))
        if "ds_aux" in case.results:
            found.append(check_sink_gradient(case.tensors["ds_aux"], case.tensors["s_aux"], _parts(case)))
    return max(found, key=lambda one: one.share)


def written_outside(case: Case) -> str | None:
    """What is wrong beside the rows that see something, or None."""
    torch = import_module("torch")
    for name, view in case.results.items():
        if outside := int((~case.buffers[name].isnan()).sum()) - int((~view.isnan()).sum()):
            return f"{outside} elements outside of {name} were written"
    if not case.spec.problem.varlen and case.spec.problem.direction != "decode":
        return None
    has_rows = {operand.name for operand in make_plan(case.spec).operands if operand.is_tensor or operand.of == "row"}
    of_rows = {name: x for name, x in case.results.items() if name in has_rows}
    blank = {name: torch.full_like(x, -math.inf if name == "lse" else 0.0) for name, x in of_rows.items()}
    rest = {name: x.clone() for name, x in of_rows.items()}
    for part in _parts(replace(case, tensors={**case.tensors, **rest})):
        for name in rest:
            part[name].fill_(-math.inf if name == "lse" else 0.0)
    for name, x in rest.items():
        if wrong := int((x != blank[name]).sum()):
            return f"{wrong} elements of {name} in rows that see nothing are not {blank[name].flatten()[0].item()}"
    return None


def _guarded(torch: Any, shape: tuple[int, ...], dtype: Any, device: str) -> tuple[Any, Any]:
    """A buffer full of NaN, and a contiguous view of `shape` in its middle."""
    size = math.prod(shape)
    buffer = torch.full((size + 2 * _GUARD,), float("nan"), dtype=dtype, device=device)
    return buffer, buffer[_GUARD : _GUARD + size].view(shape)
