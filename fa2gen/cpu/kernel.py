"""A kernel's arguments from torch or numpy memory, and its run on the CPU: forward, or the three of a backward pass."""

from __future__ import annotations

import ctypes
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fa2gen.cpu.build import build_library
from fa2gen.cpu.run import Argument, Count, Job, KernelFault, Memory, run
from fa2gen.errors import InvalidInput
from fa2gen.features.attention import Operand
from fa2gen.launch import launch_of, page_strides, pages_apart, pages_refusal, ragged_dimensions
from fa2gen.layout import ELEMENT_BYTES, NUMBER_BYTES
from fa2gen.options import AnyShape, CacheShape, Options, Shape
from fa2gen.plan import KernelPlan, TensorMapPlan, make_plan
from fa2gen.plan.bwd import BackwardPlan
from fa2gen.render import Rendered
from fa2gen.spec import KernelSpec

__all__ = ["SHARED_BASE", "Report", "RunOptions", "run_kernel", "tensor_map", "view_of"]

# Where dynamic shared memory starts: the first KiB is the system's (measured on an H200).
SHARED_BASE = 1024
_TENSOR_MAP = struct.Struct("<Q4Q5I5HBBH54x")  # machine::TensorMap of fa2gen/cpu/machine/device.h
_ALIGNMENT = 16
_GUARD_BYTES = 64  # before and behind each scratch buffer, which no kernel may touch
_NAN_BYTE = 0xFF


@dataclass(frozen=True)
class RunOptions:
    """How a kernel is run; none of this may change its result.

    seed        0: the fixed schedule, on all cores. Any other draws one, on one core: the same for the same seed.
    num_sms     thread blocks of a persistent kernel.
    sanitize    under AddressSanitizer and UndefinedBehaviorSanitizer, in a child process; several times slower.
    stats       count what each primitive moves.
    time_limit  seconds after which a kernel that is still running is called endless.
    """

    seed: int = 0
    num_sms: int = 4
    sanitize: bool = False
    stats: bool = False
    time_limit: float = 60.0


@dataclass(frozen=True)
class Report:
    """What a run took, and what its primitives moved (with RunOptions.stats)."""

    seconds: float
    counts: Mapping[str, Count] = field(default_factory=dict)


@dataclass(frozen=True)
class View:
    """A tensor in memory: strides in elements."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    element_bytes: int

    @property
    def bytes(self) -> int:
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return (last + 1) * self.element_bytes

    def memory(self, name: str) -> Memory:
        return Memory(name, self.address, self.bytes)


def view_of(name: str, x: Any) -> View:
    """Of a torch CPU tensor or a numpy array."""
    if hasattr(x, "data_ptr"):
        if x.device.type != "cpu":
            raise InvalidInput(f"{name} is on {x.device}; a kernel on the CPU takes CPU tensors")
        return View(x.data_ptr(), tuple(x.shape), tuple(x.stride()), x.element_size())
    array = x.__array_interface__
    item = x.dtype.itemsize
    return View(array["data"][0], tuple(x.shape), tuple(stride // item for stride in x.strides), item)


def run_kernel(
    kernel: KernelSpec | KernelPlan,
    tensors: Mapping[str, Any],
    options: Options = Options(),  # noqa: B008  (a tuple)
    *,
    shape: AnyShape | None = None,
    run_options: RunOptions = RunOptions(),
    rendered: Rendered | None = None,
) -> Report:
    """Runs a kernel on the CPU; it writes those of `tensors` that are its results.

    tensors      by the names of the plan's operands: q, k, v, o, lse; backward q, k, v, o, dout, dq, dk, dv, lse, and
                 dlse if LSE has a gradient. q, o, dout, dq (batch, seqlen_q, heads, head_dim) and k, v, dk, dv (batch,
                 seqlen_k, heads_kv, head_dim): torch CPU tensors or numpy arrays of two-byte elements in the kernel's
                 dtype, any 16-byte strides. lse, dlse (batch, heads, seqlen_q) fp32, contiguous.
    shape        of a call over a cache, where keys were appended or are to be split in a fixed way; else the tensors'.
    run_options  schedule, sanitizers, counters; none changes the result.
    rendered     replaces the plan's own render (see build_library).

    Scratch memory is NaN before. Raises KernelFault when the kernel breaks a rule of the machine, CompileError or
    RenderError when there is no kernel to run, InvalidInput for tensors that no kernel takes, Fa2GenError when there is
    no C++ compiler.
    """
    plan = kernel if isinstance(kernel, KernelPlan) else make_plan(kernel)
    views = _checked_views(plan, tensors, shape)
    shape = shape or _shape(plan, views)
    launch = launch_of(plan, shape, options, run_options.num_sms)
    memories = [view.memory(name) for name, view in views.items()]
    buffers = []
    for scratch in plan.scratch:
        memory, buffer = _scratch(scratch.name, NUMBER_BYTES * launch.scratch[scratch.name], scratch.cleared)
        memories.append(memory)
        buffers.append(buffer)

    values = dict(launch.values)
    if plan.paged and isinstance(shape, CacheShape):
        for name in ("k", "v"):
            views[name] = replace(views[name], strides=(*page_strides(shape, views[name].strides[:3]), 1))
        strides = {name: views[name].strides[:3] for name in ("k", "v")}
        if why := pages_refusal(plan, shape, strides):
            raise InvalidInput(f"{plan.name} can not read these pages: {why}")
        values |= pages_apart(plan, strides)
    for name, view in views.items():
        if len(view.shape) == 4:
            steps = (f"{name}_{step}_stride" for step in ("batch", "row", "head"))
            values |= zip(steps, view.strides[:3], strict=True)
    params = _params_argument(plan, values, memories)
    where = {memory.name: i for i, memory in enumerate(memories)}

    library = build_library(plan, sanitize=run_options.sanitize, rendered=rendered)
    counts: Mapping[str, Count] = {}
    started = time.perf_counter()
    before = ""  # the kernel that was launched last
    prepares = {entry.symbol for entry in plan.prepare_entries}
    finds_early = isinstance(plan, BackwardPlan) and plan.finds_block_early

    def is_awaited(scratch: str) -> bool:
        if before in prepares:
            return scratch in plan.prepared_scratch
        # The kernel before has awaited those that write it.
        return not (finds_early and scratch in plan.prepared_scratch)

    for entry, grid in zip(plan.entry_points, launch.grids, strict=True):
        if 0 in grid:
            continue
        group = shape.num_heads // shape.num_heads_kv
        maps = (tensor_map(m, views[m.name], where[m.name], plan.varlen, group) for m in entry.tensor_maps)
        job = Job(
            grid=grid,
            num_threads=entry.num_threads,
            shared_base=SHARED_BASE,
            shared_bytes=entry.shared_memory_bytes,
            has_async_proxy=plan.arch == "sm90",
            arguments=(*maps, params),
            seed=run_options.seed,
            resident=2 if run_options.seed else 1,
            stats=run_options.stats,
            time_limit=run_options.time_limit,
            kernel="" if entry.symbol == plan.name else entry.symbol,
            awaited=tuple(
                scratch.name for scratch in plan.scratch if entry.starts_early and before and is_awaited(scratch.name)
            ),
        )
        found = run(library, job, memories)
        before = entry.symbol
        if entry.symbol == plan.name:
            counts = found
    seconds = time.perf_counter() - started
    for scratch in plan.scratch:
        memory = memories[where[scratch.name]]
        if scratch.cleared and any(ctypes.string_at(memory.address, memory.bytes)):
            raise KernelFault(f"{plan.name}: does not leave {scratch.name} at 0, which the next launch needs")
    del buffers
    return Report(seconds, counts)


def _checked_views(plan: KernelPlan, tensors: Mapping[str, Any], sizes: AnyShape | None) -> dict[str, View]:
    """The operands' memory. Raises InvalidInput for what no kernel takes: fa2gen.ops copies some of it first."""
    empty = {x.name for x in plan.operands if sizes is not None and 0 in x.shape(sizes, plan.problem)}
    left_out = {x.name for x in plan.operands if x.optional} & empty  # no rows to append: as if there were none
    given = {name: x for name, x in tensors.items() if x is not None and name not in left_out}
    needed = {operand.name for operand in plan.operands if not operand.optional} - empty
    if unknown := (given.keys() - {operand.name for operand in plan.operands}) | (needed - given.keys()):
        names = ", ".join(operand.name for operand in plan.operands)
        raise InvalidInput(f"{plan.name} takes {names}; {', '.join(sorted(unknown))} is missing or none of them")
    views = {
        operand.name: view_of(operand.name, given[operand.name]) for operand in plan.operands if operand.name in given
    }
    for operand in plan.operands:
        if operand.name in views and operand.is_tensor:
            _check_tensor(operand, views[operand.name], operand.element_bytes(plan.problem))
    shape = sizes or _shape(plan, views)
    for operand in plan.operands:
        wanted = operand.shape(shape, plan.problem)
        view = views.get(operand.name)
        if operand.is_input:
            continue
        size = operand.element_bytes(plan.problem)
        if view and (view.shape != wanted or view.element_bytes != size):
            of_four = "fp32" if operand.of in ("row", "head", "scale") else "int32"
            kind = of_four if size == NUMBER_BYTES else f"{8 * size}-bit"
            raise InvalidInput(f"{operand.name} has shape {view.shape}: {wanted}, {kind}, is needed")
    return views


def _check_tensor(operand: Operand, view: View, element_bytes: int) -> None:
    chunk = _ALIGNMENT // element_bytes
    steps = [stride for size, stride in zip(view.shape[:3], view.strides[:3], strict=True) if size > 1]
    if view.element_bytes != element_bytes or len(view.shape) != 4 or view.strides[3] != 1 or min(view.shape) < 1:
        raise InvalidInput(
            f"{operand.name} has shape {view.shape} and strides {view.strides}; it must have four dimensions of "
            f"{8 * element_bytes}-bit elements, the last contiguous"
        )
    if view.address % _ALIGNMENT or any(step % chunk for step in steps):
        raise InvalidInput(
            f"{operand.name} has strides {view.strides}, address {view.address:#x}: multiples of 16 bytes are needed"
        )


def _shape(plan: KernelPlan, views: Mapping[str, View]) -> AnyShape:
    (batch, seqlen_q, heads, _), (entries, seqlen_k, heads_kv, _) = views["q"].shape, views["k"].shape
    if plan.problem.direction == "decode" or plan.paged:
        if not plan.paged:
            return CacheShape(batch, seqlen_q, seqlen_k, heads, heads_kv, entries=entries)
        rows, pages = views["block_table"].shape
        stride = views["block_table"].strides[0]
        batch = rows if plan.varlen else batch
        return CacheShape(batch, seqlen_q, pages * seqlen_k, heads, heads_kv, 0, entries, seqlen_k, rows, stride)
    if plan.varlen:
        of = [
            views[operand.name].shape[0] - (operand.of == "bounds")
            for operand in plan.operands
            if operand.of in ("bounds", "lengths") and operand.name in views
        ]
        batch = min(of, default=1)
    return Shape(batch, seqlen_q, seqlen_k, heads, heads_kv)


def _scratch(name: str, size: int, cleared: bool) -> tuple[Memory, Any]:
    """Memory of zeros or of NaN on a multiple of 256 bytes, as a device's allocator gives it, and its owner."""
    buffer = ctypes.create_string_buffer(size + 2 * _GUARD_BYTES + 256)
    ctypes.memset(buffer, _NAN_BYTE, len(buffer))
    address = -(-(ctypes.addressof(buffer) + _GUARD_BYTES) // 256) * 256
    if cleared:
        ctypes.memset(address, 0, size)
    return Memory(name, address, size), buffer


def _params_argument(plan: KernelPlan, values: Mapping[str, Any], memories: Sequence[Memory]) -> Argument:
    """Params with these values. A field that is called like a memory points to it; any other pointer is null."""
    places = {memory.name: i for i, memory in enumerate(memories)}
    pointers = []
    offset = 0
    for param in plan.params:
        if param.name in places:
            pointers.append((offset, places[param.name], 0))
        offset += struct.calcsize(f"<{param.code}")
    null = {param.name: 0 for param in plan.params if param.is_address or param.ctype == "int64_t"}
    return Argument(struct.pack(plan.params_format, *plan.pack_params({**null, **values})), tuple(pointers))


def tensor_map(plan: TensorMapPlan, view: View, memory: int, ragged: bool = False, group: int = 1) -> Argument:
    """The map of a (batch, seqlen, heads, head_dim) tensor; dimensions innermost first, as TMA counts them.

    group   heads that share a head of K and V.
    ragged  as launch.ragged_dimensions has it: the batch is one, its rows are those of all sequences.
    """
    batch, seqlen, heads, head_dim = view.shape
    steps = (view.strides[1], view.strides[2], view.strides[0])
    # One element's stride is never used, and may be anything in torch and numpy.
    sizes: tuple[int, ...] = (seqlen, heads, batch)
    strides = [step * ELEMENT_BYTES if size > 1 else _ALIGNMENT for size, step in zip(sizes, steps, strict=True)]
    if plan.of_pages:  # the step from one page's row to the next page's: see launch.page_strides
        strides[0] = steps[0] * ELEMENT_BYTES
    if ragged:
        sizes, strides = ragged_dimensions(heads, strides[0], strides[1], plan.of_groups)
    rank = 1 + len(sizes)
    padding = [0] * (5 - rank)
    box = (plan.box_cols, *plan.box_of(group if plan.of_groups else seqlen), *[1] * (rank - 3), *padding)
    data = _TENSOR_MAP.pack(
        0, *strides, *padding, head_dim, *sizes, *padding, *box, rank, ELEMENT_BYTES, plan.swizzle_bytes
    )
    return Argument(data, ((0, memory, 0),))
