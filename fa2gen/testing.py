"""Helpers for tests of kernels, here and in projects that use fa2gen."""

from __future__ import annotations

from typing import Any

from fa2gen.cpu import Options, Report, run_forward
from fa2gen.plan import KernelPlan, make_plan
from fa2gen.render import Rendered
from fa2gen.spec import KernelSpec

__all__ = ["run_on_cpu"]


def run_on_cpu(
    kernel: KernelSpec | KernelPlan,
    q: Any,
    k: Any,
    v: Any,
    *,
    softmax_scale: float | None = None,
    seed: int = 0,
    num_sms: int = 4,
    sanitize: bool = False,
    stats: bool = False,
    rendered: Rendered | None = None,
) -> tuple[Any, Any, Report]:
    """Runs a forward kernel on the CPU: (out, lse, report).

    q (batch, seqlen_q, heads, head_dim), k, v (batch, seqlen_k, heads_kv, head_dim): torch CPU tensors in the kernel's
    dtype, or numpy arrays of two-byte elements that hold its bits. out has q's kind, shape and dtype; lse (batch,
    heads, seqlen_q) is fp32. Both are NaN before the kernel runs. Keywords are those of fa2gen.cpu.Options; `rendered`
    replaces the kernel's own CPU render. Raises as fa2gen.cpu.forward_into.
    """
    plan = kernel if isinstance(kernel, KernelPlan) else make_plan(kernel)
    batch, seqlen_q, heads, _ = q.shape
    if hasattr(q, "data_ptr"):
        import torch

        out = torch.full(tuple(q.shape), float("nan"), dtype=q.dtype)
        lse = torch.full((batch, heads, seqlen_q), float("nan"), dtype=torch.float32)
    else:
        import numpy

        out = numpy.full(q.shape, 0xFFFF, dtype=numpy.uint16).view(q.dtype)  # a NaN in either type
        lse = numpy.full((batch, heads, seqlen_q), numpy.nan, dtype=numpy.float32)
    options = Options(seed=seed, num_sms=num_sms, sanitize=sanitize, stats=stats)
    report = run_forward(plan, out, lse, q, k, v, softmax_scale=softmax_scale, options=options, rendered=rendered)
    return out, lse, report
