"""Helpers for tests of kernels, here and in projects that use fa2gen."""

from __future__ import annotations

import itertools
from typing import Any

from fa2gen.cpu import Report, RunOptions, run_kernel
from fa2gen.options import Options
from fa2gen.plan import KernelPlan, make_plan
from fa2gen.spec import KernelSpec, Problem, apart, declared

__all__ = ["problems", "run_on_cpu"]


def problems(**given: Any) -> list[Problem]:
    """Every problem of the given values, one or a list for each field; of a field that is not given all its values.

    head_dim must be given. What a field allows in some directions alone is left out of the others, and so is what
    does not go together. A new value of a field is in every list at once. Raises InvalidInput as Problem does.
    """
    fields = declared(Problem)
    choices = [
        value if isinstance(value := given.get(name, field.values or field.default), list | tuple | range) else [value]
        for name, field in fields.items()
    ]
    combinations = (dict(zip(fields, values, strict=True)) for values in itertools.product(*choices))
    return [
        Problem(**values)
        for values in combinations
        if all(
            field.only_for is None or values[name] == field.default or values["direction"] in field.only_for.directions
            for name, field in fields.items()
        )
        and not apart(values)
    ]


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
    dtype, or numpy arrays of two-byte elements that hold its bits. out has q's kind and shape, with v's head dim, and
    q's dtype, of a partial problem fp32; lse (batch, heads, seqlen_q) is fp32. Both are NaN before the kernel runs.
    Options and errors are those of run_kernel.
    """
    plan = kernel if isinstance(kernel, KernelPlan) else make_plan(kernel)
    batch, seqlen_q, heads, _ = q.shape
    if hasattr(q, "data_ptr"):
        import torch

        out = torch.full(
            (batch, seqlen_q, heads, v.shape[3]), float("nan"), dtype=torch.float32 if plan.partial else q.dtype
        )
        lse = torch.full((batch, heads, seqlen_q), float("nan"), dtype=torch.float32)
    else:
        import numpy

        bits, dtype = (numpy.uint32, numpy.float32) if plan.partial else (numpy.uint16, q.dtype)
        # All ones are a NaN in any type.
        out = numpy.full((batch, seqlen_q, heads, v.shape[3]), numpy.iinfo(bits).max, dtype=bits).view(dtype)
        lse = numpy.full((batch, heads, seqlen_q), numpy.nan, dtype=numpy.float32)
    tensors = {"q": q, "k": k, "v": v, "o": out, "lse": lse}
    report = run_kernel(plan, tensors, options, run_options=run_options)
    return out, lse, report
