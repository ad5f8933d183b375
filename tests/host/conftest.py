"""What the tests of the CPU target share: inputs that hide nothing, one run, one verdict."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch

from fa2gen.errors import Fa2GenError
from fa2gen.host import Options, find_compiler, run_forward
from fa2gen.plan import make_plan
from fa2gen.reference import check
from fa2gen.spec import KernelSpec

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
GUARD_ROWS = 3  # of NaN, between the batches of every tensor


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    try:
        find_compiler()
    except Fa2GenError as error:
        for item in items:
            if "/host/" in item.path.as_posix():
                item.add_marker(pytest.mark.skip(reason=str(error)))


def _guarded(values: torch.Tensor) -> torch.Tensor:
    """The same tensor with NaN behind the rows of each batch: a kernel that reads too far shows it."""
    batch, seqlen, heads, head_dim = values.shape
    buffer = values.new_full((batch, seqlen + GUARD_ROWS, heads, head_dim), float("nan"))
    buffer[:, :seqlen] = values
    return buffer[:, :seqlen]


@functools.cache
def _inputs(dtype: str, head_dim: int, sizes: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    batch, seqlen_q, seqlen_k, heads, heads_kv = sizes
    generator = torch.Generator().manual_seed(head_dim)
    shapes = ((batch, seqlen_q, heads, head_dim), *(((batch, seqlen_k, heads_kv, head_dim),) * 2))
    return tuple(_guarded(torch.randn(shape, generator=generator).to(DTYPES[dtype])) for shape in shapes)


@pytest.fixture(scope="session")
def host() -> SimpleNamespace:
    """`run(name, (batch, seqlen_q, seqlen_k, heads, heads_kv), ...)` gives (verdict, report, out, lse)."""

    def run(name, sizes, rendered=None, **options):
        plan = make_plan(KernelSpec.from_name(name))
        q, k, v = _inputs(plan.dtype, plan.head_dim, sizes)
        out = _guarded(torch.full_like(q, float("nan")))
        lse = torch.full((sizes[0], sizes[3], sizes[1]), float("nan"))
        report = run_forward(plan, out, lse, q, k, v, softmax_scale=None, options=Options(**options), rendered=rendered)
        whole = out.as_strided((out.stride(0) * sizes[0],), (1,))  # with the guard rows, which must still be NaN
        assert int((~whole.isnan()).sum()) == int((~out.isnan()).sum()), "rows behind a batch were written"
        return check(out, lse, q, k, v, causal=plan.causal), report, out, lse

    return SimpleNamespace(run=run)
