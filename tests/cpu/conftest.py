"""What the tests of the CPU target share: inputs that hide nothing, one run, one verdict."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch

from fa2gen.cpu import RunOptions, find_compiler, run_kernel
from fa2gen.errors import Fa2GenError
from fa2gen.features import examples_of
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
    """`run(name, (batch, seqlen_q, seqlen_k, heads, heads_kv), ...)` gives (verdict, report, out, lse).

    options  of the call; default: the first of the problem's examples. The other keywords are those of RunOptions.
    """

    def run(name, sizes, options=None, rendered=None, **how):
        plan = make_plan(KernelSpec.from_name(name))
        q, k, v = _inputs(plan.dtype, plan.head_dim, sizes)
        out = amid_nan(torch.full_like(q, NAN))
        lse = torch.full((sizes[0], sizes[3], sizes[1]), NAN)
        options = options or examples_of(plan.problem)[0]
        tensors = {"q": q, "k": k, "v": v, "o": out, "lse": lse}
        report = run_kernel(plan, tensors, options, run_options=RunOptions(**how), rendered=rendered)
        assert_guard_is_intact(out)
        return check(out, lse, q, k, v, **options._asdict()), report, out, lse

    return SimpleNamespace(run=run)
