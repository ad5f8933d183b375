"""What every GPU test uses: kernels built beforehand, inputs amid NaN, poisoned outputs, one rule to judge."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
import torch

from fa2gen import env
from fa2gen.errors import Fa2GenError
from fa2gen.gpus import current_device
from fa2gen.ops import forward_into
from fa2gen.reference import Verdict, check
from fa2gen.select import select
from fa2gen.spec import Problem
from fa2gen.store import Store

NAN = float("nan")
HOARD = 2 << 30  # bytes that a process may keep for its next test


class Family(NamedTuple):
    """Which kernel a test is about; the tiling is the selected one."""

    arch: str
    dtype: str
    head_dim: int
    mask: str

    def __str__(self) -> str:
        return f"{self.arch}_{self.dtype}_d{self.head_dim}_{self.mask}"


class Sizes(NamedTuple):
    batch: int
    seqlen_q: int
    seqlen_k: int
    heads: int
    heads_kv: int


def family_of(item: pytest.Item) -> Family | None:
    """The kernel that a collected test is about, if it says."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return Family(*parameters["family"]) if "family" in parameters else None


@pytest.fixture
def family(request: pytest.FixtureRequest) -> Family:
    """Tests are parametrized with plain tuples, indirectly: they cannot import from here."""
    family = Family(*request.param)
    if family.arch == "sm90" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip(f"sm90 kernels do not run on {torch.cuda.get_device_name()}")
    return family


@pytest.fixture(scope="session", autouse=True)
def kernels_are_built(request: pytest.FixtureRequest) -> None:
    """Compile the kernels of all selected tests at once, in threads, into the session's cache.

    A kernel that does not compile fails in its own test, not here.
    """
    if not torch.cuda.is_available():
        return
    store, device = Store(), current_device()

    def build(family: Family) -> None:
        problem = Problem(head_dim=family.head_dim, dtype=family.dtype, mask=family.mask)
        for seqlen_k in Harness.SEQLENS_OF_ALL_ROWS:
            with contextlib.suppress(Fa2GenError):
                selection = select(problem, device, family.arch, seqlen_k)
                store.get_or_compile(selection.plan, selection.target)

    with ThreadPoolExecutor(env.jobs()) as pool:
        list(pool.map(build, {family for item in request.session.items if (family := family_of(item))}))


@pytest.fixture(autouse=True)
def quiet_gpu() -> Iterator[None]:
    """An error that a kernel left behind belongs to its own test, and so does its memory: other processes want it."""
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        if torch.cuda.memory_reserved() > HOARD:
            torch.cuda.empty_cache()


class Harness:
    """Builds inputs, runs one kernel into poisoned buffers, and judges."""

    Family = Family
    Sizes = Sizes
    DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}  # noqa: RUF012
    SEQLENS_OF_ALL_ROWS = (1, 2048, 8192)  # a tuned row covers a range of lengths; these meet every range
    GUARD = 1024  # elements before and after an output; a multiple of 16 bytes

    def __init__(self) -> None:
        self.generator = torch.Generator("cuda")

    def amid_nan(self, values: Any, layout: str = "gaps") -> Any:
        """The same values in a buffer that is NaN everywhere else.

        "dense"  contiguous, NaN before and after.
        "gaps"   NaN also between batches, rows and heads, as in a slice of something larger.
        "bhsd"   laid out (batch, heads, seqlen, head_dim), NaN between rows and heads.
        """
        batch, seqlen, heads, head_dim = values.shape
        if layout == "dense":
            buffer = torch.full((values.numel() + 2 * self.GUARD,), NAN, dtype=values.dtype, device="cuda")
            view = buffer[self.GUARD : self.GUARD + values.numel()].view(values.shape)
        elif layout == "gaps":
            buffer = torch.full((batch, seqlen + 3, heads + 2, head_dim + 8), NAN, dtype=values.dtype, device="cuda")
            view = buffer[:, 1 : 1 + seqlen, 1 : 1 + heads, :head_dim]
        else:
            buffer = torch.full((batch, heads, seqlen + 5, head_dim + 16), NAN, dtype=values.dtype, device="cuda")
            view = buffer[:, :, 2 : 2 + seqlen, 8 : 8 + head_dim].transpose(1, 2)
        return view.copy_(values)

    def inputs(
        self, family: Family, sizes: Sizes, layout: str = "gaps", seed: int = 0, gain: float = 1.0
    ) -> tuple[Any, ...]:
        """q, k, v: normal, times `gain`; the same for the same arguments."""
        self.generator.manual_seed(seed)
        return tuple(
            self.amid_nan(
                (
                    torch.randn(sizes.batch, seqlen, heads, family.head_dim, generator=self.generator, device="cuda")
                    * gain
                ).to(self.DTYPES[family.dtype]),
                layout,
            )
            for seqlen, heads in (
                (sizes.seqlen_q, sizes.heads),
                (sizes.seqlen_k, sizes.heads_kv),
                (sizes.seqlen_k, sizes.heads_kv),
            )
        )

    def poisoned(self, shape: tuple[int, ...], dtype: Any) -> tuple[Any, Any]:
        """A buffer full of NaN and a contiguous view in its middle."""
        size = math.prod(shape)
        buffer = torch.full((size + 2 * self.GUARD,), NAN, dtype=dtype, device="cuda")
        return buffer, buffer[self.GUARD : self.GUARD + size].view(shape)

    def run(self, family: Family, q: Any, k: Any, v: Any, softmax_scale: float | None = None) -> tuple[Any, Any]:
        """(out, lse) by the family's kernel; asserts that nothing beside them was written."""
        batch, seqlen_q, heads, _ = q.shape
        buffers, views = zip(
            self.poisoned(tuple(q.shape), q.dtype), self.poisoned((batch, heads, seqlen_q), torch.float32), strict=True
        )
        causal = family.mask == "causal"
        forward_into(*views, q, k, v, causal=causal, softmax_scale=softmax_scale, arch=family.arch)
        for name, buffer in zip(("out", "lse"), buffers, strict=True):
            outside = torch.cat([buffer[: self.GUARD], buffer[-self.GUARD :]])
            assert outside.isnan().all(), f"{family}: something beside {name} was written"
        return views

    def judge(
        self, family: Family, out: Any, lse: Any, q: Any, k: Any, v: Any, softmax_scale: float | None = None
    ) -> Verdict:
        return check(out, lse, q, k, v, causal=family.mask == "causal", softmax_scale=softmax_scale)

    def assert_right(self, family: Family, q: Any, k: Any, v: Any, softmax_scale: float | None = None) -> None:
        """Run and judge."""
        verdict = self.judge(family, *self.run(family, q, k, v, softmax_scale), q, k, v, softmax_scale)
        assert verdict.ok, f"{family} {tuple(q.shape)} x {tuple(k.shape)}, scale {softmax_scale}: {verdict}"


@pytest.fixture(scope="session")
def harness() -> Harness:
    return Harness()
