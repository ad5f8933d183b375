"""What the tests of the CPU target share: inputs that hide nothing, one run, one verdict."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch

from fa2gen.cpu import Options, find_compiler, run_forward
from fa2gen.errors import Fa2GenError
from fa2gen.plan import make_plan
from fa2gen.reference import check
from fa2gen.spec import KernelSpec
from tests.cpu.guard import DTYPES, NAN, amid_nan, assert_guard_is_intact


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    try:
        find_compiler()
    except Fa2GenError as error:
        for item in items:
            if "/cpu/" in item.path.as_posix():
                item.add_marker(pytest.mark.skip(reason=str(error)))


@functools.cache
def _inputs(dtype: str, head_dim: int, sizes: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    batch, seqlen_q, seqlen_k, heads, heads_kv = sizes
    generator = torch.Generator().manual_seed(head_dim)
    shapes = ((batch, seqlen_q, heads, head_dim), *(((batch, seqlen_k, heads_kv, head_dim),) * 2))
    return tuple(amid_nan(torch.randn(shape, generator=generator).to(DTYPES[dtype])) for shape in shapes)


@pytest.fixture(scope="session")
def machine() -> SimpleNamespace:
    """`run(name, (batch, seqlen_q, seqlen_k, heads, heads_kv), ...)` gives (verdict, report, out, lse)."""

    def run(name, sizes, rendered=None, **options):
        plan = make_plan(KernelSpec.from_name(name))
        q, k, v = _inputs(plan.dtype, plan.head_dim, sizes)
        out = amid_nan(torch.full_like(q, NAN))
        lse = torch.full((sizes[0], sizes[3], sizes[1]), NAN)
        report = run_forward(plan, out, lse, q, k, v, softmax_scale=None, options=Options(**options), rendered=rendered)
        assert_guard_is_intact(out)
        return check(out, lse, q, k, v, causal=plan.causal), report, out, lse

    return SimpleNamespace(run=run)
