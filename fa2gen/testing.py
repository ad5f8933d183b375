"""Helpers for tests of kernels, here and in projects that use fa2gen."""

from __future__ import annotations

from typing import Any

from fa2gen.cpu import Report, RunOptions, run_kernel
from fa2gen.options import Options
from fa2gen.plan import KernelPlan, make_plan
from fa2gen.spec import KernelSpec

__all__ = ["run_on_cpu"]


def run_on_cpu(
    kernel: KernelSpec | KernelPlan,
    q: Any,
    k: Any,
    v: Any,
    options: Options = Options(),  # noqa: B008  (a tuple)
    *,
    run_options: RunOptions = RunOptions(),  # noqa: B008  (frozen)
) -> tuple[Any, Any, Report]:
    """Runs a forward kernel on the CPU: (out, lse, report).

    q (batch, seqlen_q, heads, head_dim), k, v (batch, seqlen_k, heads_kv, head_dim): torch CPU tensors in the kernel's
    dtype, or numpy arrays of two-byte elements that hold its bits. out has q's kind, shape and dtype; lse (batch,
    heads, seqlen_q) is fp32. Both are NaN before the kernel runs. Options and errors are those of run_kernel.
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
    tensors = {"q": q, "k": k, "v": v, "o": out, "lse": lse}
    report = run_kernel(plan, tensors, options, run_options=run_options)
    return out, lse, report
