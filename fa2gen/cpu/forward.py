"""The arguments of a forward kernel from torch or numpy memory, and its run."""

from __future__ import annotations

import ctypes
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fa2gen.cpu.build import build_library
from fa2gen.cpu.run import Argument, Count, Job, KernelFault, Memory, run
from fa2gen.errors import InvalidInput
from fa2gen.launch import ForwardShape, forward_launch
from fa2gen.layout import ELEMENT_BYTES
from fa2gen.plan import KernelPlan, TensorMapPlan, make_plan
from fa2gen.render import Rendered
from fa2gen.spec import KernelSpec

__all__ = [
    "SHARED_BASE",
    "Options",
    "Report",
    "View",
    "checked",
    "forward_into",
    "params_argument",
    "run_forward",
    "tensor_map",
    "view_of",
]

# Where dynamic shared memory starts: the first KiB is the system's (measured on an H200).
SHARED_BASE = 1024
_TENSOR_MAP = struct.Struct("<Q4Q5I5HBBH54x")  # machine::TensorMap of fa2gen/cpu/machine/device.h
_ALIGNMENT = 16


@dataclass(frozen=True)
class Options:
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
    """What a run took, and what its primitives moved (with Options.stats)."""

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


def checked(name: str, x: Any) -> View:
    """A (batch, seqlen, heads, head_dim) tensor that a kernel can take: what fa2gen.ops would copy is refused here."""
    view = view_of(name, x)
    chunk = _ALIGNMENT // ELEMENT_BYTES
    steps = [stride for size, stride in zip(view.shape[:3], view.strides[:3], strict=True) if size > 1]
    if view.element_bytes != ELEMENT_BYTES or len(view.shape) != 4 or view.strides[3] != 1 or min(view.shape) < 1:
        raise InvalidInput(
            f"{name} has shape {view.shape} and strides {view.strides}; it must have four dimensions of 16-bit "
            "elements, the last contiguous"
        )
    if view.address % _ALIGNMENT or any(step % chunk for step in steps):
        raise InvalidInput(
            f"{name} has strides {view.strides}, address {view.address:#x}: multiples of 16 bytes are needed"
        )
    return view


def forward_into(
    spec: KernelSpec | KernelPlan,
    out: Any,
    lse: Any,
    q: Any,
    k: Any,
    v: Any,
    *,
    softmax_scale: float | None = None,
    options: Options | None = None,
) -> Report:
    """Runs a forward kernel on the CPU.

    q, out (batch, seqlen_q, heads, head_dim), k, v (batch, seqlen_k, heads_kv, head_dim): torch CPU tensors or numpy
    arrays of two-byte elements in the spec's dtype, any 16-byte strides. lse (batch, heads, seqlen_q) fp32, contiguous.
    softmax_scale None means head_dim ** -0.5.

    Raises KernelFault when the kernel breaks a rule of the machine, CompileError or RenderError when there is no kernel
    to run, InvalidInput for tensors that no kernel takes, Fa2GenError when there is no C++ compiler.
    """
    plan = spec if isinstance(spec, KernelPlan) else make_plan(spec)
    return run_forward(plan, out, lse, q, k, v, softmax_scale=softmax_scale, options=options or Options())


def run_forward(
    plan: KernelPlan,
    out: Any,
    lse: Any,
    q: Any,
    k: Any,
    v: Any,
    *,
    softmax_scale: float | None,
    options: Options,
    rendered: Rendered | None = None,
) -> Report:
    """As forward_into; `rendered` replaces the plan's own render (see build_library)."""
    if plan.problem.direction != "fwd":
        raise InvalidInput(f"{plan.name} is a backward kernel: fa2gen.cpu.backward.run_backward runs it")
    views = {name: checked(name, x) for name, x in (("q", q), ("k", k), ("v", v), ("o", out))}
    lse_view = view_of("lse", lse)
    (batch, seqlen_q, heads, _), (_, seqlen_k, heads_kv, _) = views["q"].shape, views["k"].shape
    shape = ForwardShape(batch, seqlen_q, seqlen_k, heads, heads_kv)
    if lse_view.shape != (batch, heads, seqlen_q) or lse_view.element_bytes != 4:
        raise InvalidInput(f"lse has shape {lse_view.shape}: {(batch, heads, seqlen_q)} in fp32 is needed")

    scale = plan.head_dim**-0.5 if softmax_scale is None else softmax_scale
    launch = forward_launch(plan, shape, scale, options.num_sms)
    tile_counter = ctypes.c_int32(0)
    memories = [view.memory(name) for name, view in views.items()]
    memories.append(lse_view.memory("lse"))
    memories.append(Memory("tile_counter", ctypes.addressof(tile_counter), 4))

    values = dict(launch.values)
    for name, view in views.items():
        values |= zip(
            (f"{name}_batch_stride", f"{name}_row_stride", f"{name}_head_stride"), view.strides[:3], strict=True
        )
    params = params_argument(plan, values, memories)
    names = [memory.name for memory in memories]
    maps = (tensor_map(box, views[box.name], names.index(box.name)) for box in plan.tensor_maps)

    library = build_library(plan, sanitize=options.sanitize, rendered=rendered)
    job = Job(
        grid=launch.grid,
        num_threads=launch.num_threads,
        shared_base=SHARED_BASE,
        shared_bytes=launch.shared_memory_bytes,
        has_async_proxy=plan.arch == "sm90",
        arguments=(*maps, params),
        seed=options.seed,
        resident=2 if options.seed else 1,
        stats=options.stats,
        time_limit=options.time_limit,
    )
    started = time.perf_counter()
    counts = run(library, job, memories)
    seconds = time.perf_counter() - started
    if tile_counter.value:
        raise KernelFault(f"{plan.name}: leaves tile_counter at {tile_counter.value}; the next launch needs it to be 0")
    return Report(seconds, counts)


def params_argument(plan: KernelPlan, values: Mapping[str, Any], memories: Sequence[Memory]) -> Argument:
    """Params with these values. A field that is called like a memory points to it; any other pointer is null."""
    places = {memory.name: i for i, memory in enumerate(memories)}
    pointers = []
    offset = 0
    for param in plan.params:
        if param.name in places:
            pointers.append((offset, places[param.name], 0))
        offset += struct.calcsize(f"<{param.code}")
    null = {param.name: 0 for param in plan.params if param.ctype.endswith("*")}
    return Argument(struct.pack(plan.params_format, *plan.pack_params({**null, **values})), tuple(pointers))


def tensor_map(plan: TensorMapPlan, view: View, memory: int) -> Argument:
    """The map of a (batch, seqlen, heads, head_dim) tensor; dimensions innermost first, as TMA counts them."""
    batch, seqlen, heads, head_dim = view.shape
    steps = (view.strides[1], view.strides[2], view.strides[0])
    # One element's stride is never used, and may be anything in torch and numpy.
    sizes = (seqlen, heads, batch)
    strides = [step * ELEMENT_BYTES if size > 1 else _ALIGNMENT for size, step in zip(sizes, steps, strict=True)]
    box = (plan.box_cols, plan.box_rows, 1, 1, 0)
    data = _TENSOR_MAP.pack(0, *strides, 0, head_dim, *sizes, 0, *box, 4, ELEMENT_BYTES, plan.swizzle_bytes)
    return Argument(data, ((0, memory, 0),))
