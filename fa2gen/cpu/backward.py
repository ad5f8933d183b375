"""The three backward kernels on the CPU, one after the other."""

from __future__ import annotations

import ctypes
import time
from typing import Any

from fa2gen.cpu.build import build_library
from fa2gen.cpu.forward import SHARED_BASE, Options, Report, checked, params_argument, tensor_map, view_of
from fa2gen.cpu.run import Job, Memory, run
from fa2gen.errors import InvalidInput
from fa2gen.launch import ForwardShape, backward_launch
from fa2gen.plan.bwd import BackwardPlan
from fa2gen.render import Rendered

__all__ = ["run_backward"]

_GUARD_BYTES = 64  # before and behind each scratch buffer, which no kernel may touch
_NAN_BYTE = 0xFF


def run_backward(
    plan: BackwardPlan,
    dq: Any,
    dk: Any,
    dv: Any,
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    dlse: Any = None,
    *,
    softmax_scale: float | None = None,
    options: Options | None = None,
    rendered: Rendered | None = None,
) -> Report:
    """Writes the gradients of q, k and v to dq, dk and dv.

    dout, out and dq are shaped as q (batch, seqlen_q, heads, head_dim), dk and dv as k and v (batch, seqlen_k,
    heads_kv, head_dim): torch CPU tensors or numpy arrays of two-byte elements, any 16-byte strides. lse and dlse, the
    gradient of LSE if it has one, are (batch, heads, seqlen_q), fp32, contiguous. All scratch memory is NaN before.
    Raises as forward_into.
    """
    options = options or Options()
    names = ("q", "k", "v", "o", "dout", "dq", "dk", "dv")
    views = {name: checked(name, x) for name, x in zip(names, (q, k, v, out, dout, dq, dk, dv), strict=True)}
    (batch, seqlen_q, heads, _), (_, seqlen_k, heads_kv, _) = views["q"].shape, views["k"].shape
    memories = [view.memory(name) for name, view in views.items()]
    for name, x in (("lse", lse), ("dlse", dlse)):
        if x is not None:
            view = view_of(name, x)
            if view.shape != (batch, heads, seqlen_q) or view.element_bytes != 4:
                raise InvalidInput(f"{name} has shape {view.shape}: {(batch, heads, seqlen_q)} in fp32 is needed")
            memories.append(view.memory(name))

    scale = plan.head_dim**-0.5 if softmax_scale is None else softmax_scale
    launch = backward_launch(plan, ForwardShape(batch, seqlen_q, seqlen_k, heads, heads_kv), scale)
    scratch = []
    scratch_numbers = {
        "lse_log2": launch.statistics_floats,
        "dpsum": launch.statistics_floats,
        "dq_acc": launch.dq_acc_floats,
    }
    if plan.deterministic:
        scratch_numbers["dq_turns"] = launch.num_dq_turns
    for name, numbers in scratch_numbers.items():
        memory, buffer = _scratch(name, 4 * numbers)
        memories.append(memory)
        scratch.append(buffer)

    values = dict(launch.values)
    for name, view in views.items():
        steps = (f"{name}_{step}_stride" for step in ("batch", "row", "head"))
        values |= zip(steps, view.strides[:3], strict=True)
    params = params_argument(plan, values, memories)
    where = {memory.name: i for i, memory in enumerate(memories)}

    library = build_library(plan, sanitize=options.sanitize, rendered=rendered)
    started = time.perf_counter()
    counts = {}
    for entry, grid in zip(plan.entry_points, launch.grids, strict=True):
        maps = (tensor_map(m, views[m.name], where[m.name]) for m in entry.tensor_maps)
        job = Job(
            grid=(grid, 1, 1),
            num_threads=entry.num_threads,
            shared_base=SHARED_BASE,
            shared_bytes=entry.shared_memory_bytes,
            has_async_proxy=plan.arch == "sm90",
            arguments=(*maps, params),
            seed=options.seed,
            resident=2 if options.seed else 1,
            stats=options.stats,
            time_limit=options.time_limit,
            kernel="" if entry.symbol == plan.name else entry.symbol,
            awaited=tuple(scratch_numbers) if entry.starts_early else (),
        )
        found = run(library, job, memories)
        if entry.symbol == plan.name:
            counts = found
    del scratch
    return Report(time.perf_counter() - started, counts)


def _scratch(name: str, size: int) -> tuple[Memory, Any]:
    """Memory full of NaN on a multiple of 256 bytes, as a device's allocator gives it, and what keeps it alive."""
    buffer = ctypes.create_string_buffer(size + 2 * _GUARD_BYTES + 256)
    ctypes.memset(buffer, _NAN_BYTE, len(buffer))
    address = -(-(ctypes.addressof(buffer) + _GUARD_BYTES) // 256) * 256
    return Memory(name, address, size), buffer
