"""Queries over a cache on the CPU: kernels by their cases, and `flash_attn_with_kvcache` as CUDA tensors run it."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from fa2gen import cases
from fa2gen.cpu import RunOptions, run_kernel
from fa2gen.features import examples_of
from fa2gen.ops import call as calls
from fa2gen.ops.kvcache import cached_cuda
from fa2gen.ops.kvcache_reference import cached_reference, narrowed
from fa2gen.ops.paged_append import _places
from fa2gen.ops.validate_cache import Cached
from fa2gen.ops.widen import Narrow, _widen_reference
from fa2gen.options import CacheShape, Options, Shape, split_shift
from fa2gen.plan import tiling_for_rows
from fa2gen.select import Device, best_spec
from fa2gen.spec import KernelSpec, Problem
from fa2gen.testing import problems
from tests.cpu.faults import Fault, seeded, symptom

ARCHES = ("sm80", "sm90")
SHAPES = (Shape(2, 1, 300, 4, 1), Shape(3, 5, 203, 6, 2), Shape(4, 3, 70, 14, 2))
"""Of cases.make: one query and several, sequences without keys, groups that do not divide a tile."""


def kernel(arch: str = "sm90", head_dim: int = 64, wide: bool = False, **fields) -> KernelSpec:
    spec = best_spec(Problem(direction="decode", head_dim=head_dim, **fields), arch)
    tiling = tiling_for_rows(spec.problem, spec.tiling, 32 if wide else 16, 232_448 if arch == "sm90" else 166_912)
    return KernelSpec(problem=spec.problem, tiling=tiling)


def run(name: str, shape: Shape, options: Options | None = None, rendered=None, splits: int = 0, **how):
    """(verdict, tensors) of a case; what is beside the rows that see something is looked at too."""
    case = cases.make(KernelSpec.from_name(name), shape, options)
    sizes = case.shape._replace(split_shift=split_shift(splits, case.shape.seqlen_k))
    how = {"time_limit": 20.0, **how}
    run_kernel(case.spec, case.tensors, case.options, shape=sizes, run_options=RunOptions(**how), rendered=rendered)
    assert cases.written_outside(case) is None
    return cases.verdict(case), case.tensors


EXPRESSIONS = (
    {"score": "cap * tanh(s / cap)", "paged": True},
    {"score": "s - slope[b, h] * abs(i + seqlen_k - seqlen_q - j)", "mask": "causal"},
    {"score": "cap[h] * tanh(s / cap[h])", "allow": "(i + seqlen_k - seqlen_q - j) % 3 != 1", "sink": True},
)
KINDS = [
    *problems(head_dim=64, dtype="bf16", direction="decode", sink=False, cache_dtype="same"),
    Problem(direction="decode", head_dim=64, mask="window", sink=True, paged=True),
    *(Problem(direction="decode", head_dim=64, **fields) for fields in EXPRESSIONS),
]
EIGHT_BITS = (
    ("sm90", 128, {"cache_dtype": "e4m3", "mask": "causal"}),
    ("sm90", 80, {"cache_dtype": "e4m3", "dtype": "fp16", "paged": True, "sink": True, "score": "cap * tanh(s / cap)"}),
    ("sm80", 64, {"cache_dtype": "int8", "paged": True, "mask": "window"}),
    ("sm80", 16, {"cache_dtype": "int8", "dtype": "fp16"}),
)


@pytest.mark.parametrize("problem", KINDS, ids=lambda p: p.text)
def test_every_kind(problem):
    for number, options in enumerate(examples_of(problem)):
        verdict, _ = run(best_spec(problem, ARCHES[number % 2]).name, SHAPES[number % 3], options, num_sms=5)
        assert verdict.ok, verdict


@pytest.mark.parametrize(("arch", "head_dim", "fields"), EIGHT_BITS, ids=lambda value: str(value))
def test_caches_of_8_bits(arch, head_dim, fields):
    """Unused slots hold NaN, or -128; scales are one a sequence and head, and one for all."""
    for shape in SHAPES[:2]:
        verdict, _ = run(kernel(arch, head_dim, **fields).name, shape, num_sms=5)
        assert verdict.ok, verdict


@pytest.mark.parametrize("cache_dtype", ["e4m3", "int8"])
def test_every_8_bit_number_is_multiplied_as_itself(cache_dtype):
    """A query of one 1 finds column c of the only key; its value alone is the output. NaN comes out as NaN."""
    dtype = {"e4m3": torch.float8_e4m3fn, "int8": torch.int8}[cache_dtype]
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype)
    batch, head_dim = 256 // 64, 64
    v = codes.view(batch, 1, 1, head_dim)
    k = v.expand(batch, 1, 1, head_dim).contiguous()
    q = torch.eye(head_dim).bfloat16()[None, None].expand(batch, 1, head_dim, head_dim).contiguous()
    out, lse = torch.full_like(q, math.nan), torch.full((batch, head_dim, 1), math.nan)
    tensors = {"q": q, "k": k, "v": v, "o": out, "lse": lse}
    run_kernel(
        kernel(cache_dtype=cache_dtype, dtype="bf16"), tensors, Options(softmax_scale=1.0),
        shape=CacheShape(batch, 1, 1, head_dim, 1, entries=batch), run_options=RunOptions(num_sms=3),
    )  # fmt: skip
    wanted = codes.float().view(batch, head_dim)
    clean = ~wanted.isnan().any(1)
    assert torch.equal(lse[clean, :, 0], wanted[clean])
    assert torch.equal(out[clean, 0, 0].float(), wanted[clean].bfloat16().float())
    assert clean.all() or out[~clean].isnan().any()


def widened(spec: KernelSpec, rows: int = 40, rendered=None):
    """(found, wanted) of a kernel that gives 16-bit keys and values of four sequences in pages of 16, of which one has
    none and one has more than there is room for; what is written nowhere is 7."""
    generator, heads_kv, head_dim = torch.Generator().manual_seed(2), 3, spec.problem.head_dim
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[spec.problem.dtype]
    of_cache = {"e4m3": torch.float8_e4m3fn, "int8": torch.int8}[spec.problem.cache_dtype]
    k, v = (narrowed(16 * torch.randn(13, 16, heads_kv, head_dim, generator=generator), of_cache) for _ in range(2))
    table = torch.randperm(13, generator=generator)[:12].view(4, 3).int()
    table[0, 1:] = torch.tensor([-3, 1 << 30])  # behind the only page of one, on no page
    given = Narrow(k, v, torch.tensor([16, 41, 0, 23]).int(), table)
    scales = {
        "k_descale": torch.rand(4, heads_kv, generator=generator),
        "v_descale": torch.tensor(0.5).expand(4, heads_kv),
    }
    given = given._replace(**scales)
    found = [torch.full((4, rows, heads_kv, head_dim), 7.0).to(dtype) for _ in range(2)]
    wanted = [x.clone() for x in found]
    for x, of in zip(wanted, _widen_reference(given, rows, dtype), strict=True):
        for b, n in enumerate(given.seqlens.tolist()):
            x[b, :n] = of[b, :n]
    tensors = {
        "k": k,
        "v": v,
        "cache_seqlens": given.seqlens,
        "block_table": table,
        "k_wide": found[0],
        "v_wide": found[1],
    }
    steps = {"k_scale_batch": heads_kv, "k_scale_head": 1}
    shape = CacheShape(4, 0, 48, heads_kv, heads_kv, 0, 13, 16, 4, 3, **steps, seqlen_wide=rows)
    run_kernel(spec, {**tensors, **scales}, shape=shape, rendered=rendered)
    return found, wanted


@pytest.mark.parametrize(
    ("arch", "head_dim", "fields"),
    [("sm90", 128, {"cache_dtype": "e4m3"}), ("sm80", 80, {"cache_dtype": "int8", "dtype": "fp16"})],
    ids=["e4m3", "int8"],
)
def test_keys_of_8_bits_are_widened(arch, head_dim, fields):
    for found, wanted in zip(*widened(kernel(arch, head_dim, paged=True, **fields)), strict=True):
        torch.testing.assert_close(found, wanted, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("wide", [False, True], ids=["16 rows", "32 rows"])
@pytest.mark.parametrize(
    ("arch", "head_dim", "fields"),
    [
        ("sm90", 8, {"dtype": "fp16"}),
        ("sm80", 72, {"paged": True, "mask": "causal"}),
        ("sm90", 128, {"paged": True, "mask": "window"}),
        ("sm80", 128, {"dtype": "fp16", "mask": "causal"}),
        ("sm90", 192, {"paged": True}),
        ("sm80", 256, {"mask": "causal"}),
    ],
    ids=lambda value: str(value),
)
def test_every_shape_of_kernel(arch, head_dim, fields, wide):
    verdict, _ = run(kernel(arch, head_dim, wide, **fields).name, SHAPES[1], num_sms=7)
    assert verdict.ok, verdict


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("num_sms", [4, 7])
def test_items_of_two_heads(batch, num_sms):
    """By as many blocks each, or three and a half: lengths around those that blocks share evenly."""
    for keys, options in ((1, {}), (255, {}), (257, {}), (1300, {"window_left": 700, "window_right": 3})):
        problem = Problem(direction="decode", head_dim=64, mask="window" if options else "full")
        name, shape = best_spec(problem, "sm90").name, Shape(batch, 2, keys, 4, 2)
        verdict, _ = run(name, shape, Options(**options), num_sms=num_sms)
        assert verdict.ok, (keys, verdict)


@pytest.mark.parametrize("splits", [0, 1, 3])
def test_the_same_bits_on_every_schedule(splits):
    """Parts are put together in the order of their keys, whichever of their blocks comes last."""
    found = [run(kernel().name, SHAPES[0], splits=splits, seed=seed, num_sms=7)[1] for seed in (0, 1, 2, 3)]
    for other in found[1:]:
        assert torch.equal(found[0]["o"], other["o"]) and torch.equal(found[0]["lse"], other["lse"])


@pytest.mark.parametrize("splits", [1, 4])
def test_fixed_parts_do_not_depend_on_the_batch(splits):
    """A sequence alone, and among others on another device: the same bits."""
    case = cases.make(kernel(paged=True), Shape(5, 2, 300, 4, 2))
    together = case.shape._replace(split_shift=split_shift(splits, case.shape.seqlen_k))
    run_kernel(case.spec, case.tensors, shape=together, run_options=RunOptions(num_sms=3))
    for b in (0, 2, 4):
        alone = {name: x if name in ("k", "v") else x[b : b + 1].clone() for name, x in case.tensors.items()}
        shape = together._replace(batch=1, table_rows=1, table_stride=alone["block_table"].stride(0))
        alone["o"].fill_(math.nan)
        run_kernel(case.spec, alone, shape=shape, run_options=RunOptions(num_sms=9))
        assert torch.equal(alone["o"], case.tensors["o"][b : b + 1])
        assert torch.equal(alone["lse"], case.tensors["lse"][b : b + 1])


def test_more_sequences_than_the_layout_has_entries():
    """Some share an entry then, and are told apart by their lengths."""
    batch, generator = 2100, torch.Generator().manual_seed(0)
    q = torch.randn(batch, 1, 1, 8, generator=generator).bfloat16()
    k, v = (torch.randn(4, 80, 1, 8, generator=generator).bfloat16() for _ in range(2))
    lengths = torch.randint(0, 81, (batch,), generator=generator, dtype=torch.int32)
    entry = torch.randint(0, 4, (batch,), generator=generator, dtype=torch.int32)
    out, lse = torch.full_like(q, math.nan), torch.full((batch, 1, 1), math.nan)
    tensors = {"q": q, "k": k, "v": v, "o": out, "lse": lse, "cache_seqlens": lengths, "cache_batch_idx": entry}
    shape = CacheShape(batch, 1, 80, 1, 1, entries=4)
    run_kernel(kernel(head_dim=8), tensors, shape=shape, run_options=RunOptions(num_sms=3))
    given = Cached(q, k, v, cache_seqlens=lengths, cache_batch_idx=entry)
    expected, expected_lse = cached_reference(given, Options())
    assert torch.equal(lse.isinf(), expected_lse.isinf())
    torch.testing.assert_close(out, expected, atol=0.02, rtol=0.02)


# The door, with kernels of this machine ------------------------------------------------------------------------------


class _Memory:
    """An address as `run_kernel` takes an array."""

    def __init__(self, address: int, shape: tuple[int, ...], steps: tuple[int, ...], size: int) -> None:
        self.__array_interface__ = {"data": (address, False)}
        self.shape, self.strides = shape, tuple(step * size for step in steps)
        self.dtype = SimpleNamespace(itemsize=size)


class OnMachine:
    """A kernel that a call launches: it runs here, on the addresses that the launch is given."""

    def __init__(self, plan):
        self.plan = plan
        self.launches = 0

    def prepare(self, shape, strides, options):
        def launch(operands, scratch, stream, cleared=0):
            tensors = {}
            for operand, address in zip(self.plan.operands, operands, strict=True):
                sizes = operand.shape(shape, self.plan.problem)
                dense = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
                steps = (*strides[operand.name], 1) if operand.name in strides else tuple(dense)
                if operand.of == "table":
                    steps = (shape.table_stride, 1)
                if operand.of == "scale":
                    steps = (
                        getattr(shape, f"{operand.name[0]}_scale_batch"),
                        getattr(shape, f"{operand.name[0]}_scale_head"),
                    )
                if address:
                    element = operand.element_bytes(self.plan.problem)
                    tensors[operand.name] = _Memory(address, sizes, steps, element)
            run_kernel(self.plan, tensors, options, shape=shape, run_options=RunOptions(num_sms=5))
            self.launches += 1

        launch.scratch_bytes, launch.cleared_bytes = 16, 16
        return launch


@pytest.fixture
def door(monkeypatch):
    """CPU tensors run as CUDA tensors do, on an H100 whose kernels are run by this machine."""
    h100 = Device("H100", (9, 0), 232_448, 132)
    monkeypatch.setattr(calls, "device_at", lambda index: h100)
    monkeypatch.setattr(calls, "_kernel", lambda plan, target, device: OnMachine(plan))
    monkeypatch.setattr(calls, "_calls", {})
    monkeypatch.setattr(calls, "_rooms", {(-1, 5): 16})
    monkeypatch.setattr(calls, "_current_device", lambda: -1)
    monkeypatch.setattr(calls, "_is_capturing", lambda: False)
    monkeypatch.setattr(calls, "_empty_strided", torch._C._dynamo.guards._empty_strided_cpu)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 5, raising=False)


def tensors(batch=3, seqlen_q=1, heads=4, heads_kv=2, rows=96, new=0, page=0, rotary=0, head_dim=64, seed=0):
    """A call's tensors: lengths of 0, of all but few, and more than fits; in pages, those not needed are no pages."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator).bfloat16()

    lengths = [rows - 2, 0, rows + 1000, 17, -5][:batch]
    found = {"q": random(batch, seqlen_q, heads, head_dim), "cache_seqlens": torch.tensor(lengths, dtype=torch.int32)}
    pages = rows // page if page else 1
    entries = batch * pages + 2
    for name in ("k_cache", "v_cache"):
        found[name] = random(entries, page or rows, heads_kv, head_dim)
    order = torch.randperm(entries, generator=generator)[: batch * pages].to(torch.int32)
    if page:
        table = order.view(batch, pages)
        for b, length in enumerate(lengths):
            table[b, -(-(max(length, 0) + new) // page) :] = (1 << 30) - 3
        found["block_table"] = table
    else:
        found["cache_batch_idx"] = order
    if new:
        found |= {"k": random(batch, new, heads_kv, head_dim), "v": random(batch, new, heads_kv, head_dim)}
    if rotary:
        angle = torch.rand(rows, rotary // 2, generator=generator) * 6
        found |= {"rotary_cos": angle.cos().bfloat16(), "rotary_sin": angle.sin().bfloat16()}
    return Cached(**found)


def both(given: Cached, options: Options, *how):
    """(results, caches) of the kernel, and of the reference."""
    found = []
    for function in (cached_cuda, cached_reference):
        own = given._replace(k_cache=given.k_cache.clone(), v_cache=given.v_cache.clone())
        found.append((function(own, options, *how), (own.k_cache, own.v_cache)))
    return found


CAUSAL, WINDOW = Options(causal=True), Options(causal=True, window_left=20)


@pytest.mark.parametrize(
    ("sizes", "options", "interleaved"),
    [
        ({"batch": 5}, Options(), True),
        ({"new": 3, "seqlen_q": 3}, CAUSAL, True),
        ({"new": 1, "page": 16}, Options(), True),
        ({"new": 5, "page": 3, "seqlen_q": 2, "rotary": 64}, CAUSAL, True),
        ({"new": 2, "page": 1, "seqlen_q": 4, "rotary": 32}, Options(), False),
        ({"new": 4, "rotary": 16, "seqlen_q": 4, "head_dim": 72}, WINDOW, False),
        ({"new": 4, "rotary": 128, "seqlen_q": 12, "head_dim": 128, "page": 48}, WINDOW, False),
    ],
    ids=str,
)
def test_calls_as_cuda_tensors_run_them(door, sizes, options, interleaved):
    given = tensors(**sizes)
    (result, caches), (expected, expected_caches) = both(given, options, interleaved)
    torch.testing.assert_close(result[0], expected[0], atol=0.02, rtol=0.02)
    torch.testing.assert_close(result[1], expected[1], atol=0.02, rtol=0.002)
    turned = 0.0 if given.rotary_cos is None else 0.02
    torch.testing.assert_close(caches[0], expected_caches[0], atol=turned, rtol=turned)
    assert torch.equal(caches[1], expected_caches[1]), "values are copied, and nothing else changes"


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float8_e4m3fn, 16.0), (torch.int8, 24.0)], ids=["e4m3", "int8"])
def test_8_bit_caches_as_cuda_tensors_fill_and_read_them(door, dtype, unit):
    """What is beyond the greatest number becomes that; scales of any steps, also of 0."""
    given = tensors(new=3, page=16, seqlen_q=2, head_dim=64, rotary=32)
    caches = [narrowed(x.float() * unit, dtype) for x in (given.k_cache, given.v_cache)]
    scales = torch.full((3, 4), 1 / unit)[:, ::2], torch.tensor(0.5 / unit).expand(3, 2)
    given.v[0, 0, 0, 0] = 1000.0
    more = {"k_descale": scales[0], "v_descale": scales[1], "s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0])}
    given = given._replace(k_cache=caches[0], v_cache=caches[1], **more)
    (result, ours), (expected, theirs) = both(given, CAUSAL, False)
    torch.testing.assert_close(result[0], expected[0], atol=0.02, rtol=0.02)
    torch.testing.assert_close(result[1], expected[1], atol=0.02, rtol=0.002)
    for mine, other in zip(ours, theirs, strict=True):
        a, b = (x.view(torch.uint8).int() for x in (mine, other))
        assert (a != b).float().mean() < 0.01, "a rounding here and there"


def test_what_lies_as_no_kernel_reads_it_is_copied_but_never_a_cache(door):
    given = tensors(new=2, seqlen_q=2, head_dim=64)
    odd = {
        name: torch.zeros(*x.shape[:3], 67, dtype=x.dtype)[..., 1:65].copy_(x)
        for name, x in given._asdict().items()
        if name in ("q", "k", "v")
    }
    (result, caches), _ = both(given._replace(**odd), CAUSAL)
    (expected, expected_caches), _ = both(given, CAUSAL)
    assert torch.equal(result[0], expected[0]) and torch.equal(caches[0], expected_caches[0])


def test_caches_are_read_where_they_lie(door):
    """Slices of one tensor of keys and values, heads before rows: any strides but the last."""
    given = tensors(new=1)
    entries, rows, heads, head_dim = given.k_cache.shape
    storage = torch.full((entries, 2, heads, rows, head_dim + 8), math.nan, dtype=torch.bfloat16)
    k, v = (storage[:, i, :, :, :head_dim].transpose(1, 2) for i in range(2))
    k.copy_(given.k_cache)
    v.copy_(given.v_cache)
    out, lse = cached_cuda(given._replace(k_cache=k, v_cache=v), Options())
    expected, expected_lse = cached_reference(given, Options())
    torch.testing.assert_close(out, expected, atol=0.02, rtol=0.02)
    torch.testing.assert_close(lse, expected_lse, atol=0.02, rtol=0.002)
    assert torch.equal(v, given.v_cache) and storage[..., head_dim:].isnan().all()


def test_slots_as_cuda_tensors_fill_them(door):
    """A call without queries, of one page a token."""
    given = tensors(page=16, new=1)
    slots = torch.tensor([3, -1, 35], dtype=torch.int32)
    rows, pages = _places(slots, given.k_cache)
    none = given.q[:, :0, :2].contiguous()
    given = given._replace(q=none, cache_seqlens=rows, block_table=pages)
    (_, caches), (_, expected) = both(given, Options(softmax_scale=1.0))
    assert all(torch.equal(a, b) for a, b in zip(caches, expected, strict=True))
    assert torch.equal(caches[0][2, 3], given.k[2, 0]) and torch.equal(caches[1][0, 3], given.v[0, 0])


# Seeded faults -------------------------------------------------------------------------------------------------------

DENSE, PAGED, SINKS = kernel().name, kernel(paged=True, mask="causal").name, kernel(sink=True).name
EIGHT = kernel(cache_dtype="e4m3").name
FAULTS = [
    Fault(
        "a block's second cut shares the first one's place",
        DENSE,
        "slots + behind, slots};",
        "slots, slots};",
        schedules=12,
    ),
    Fault(
        "all heads have the first one's units",
        DENSE,
        "{bidb, head_kv, m_block, begin + first, units};",
        "{bidb, head_kv, m_block, first, units};",
        time_limit=2.0,
    ),
    Fault(
        "heads that share a block",
        DENSE,
        "end = (end + per_block - 1) / per_block * per_block;",
        "end = (end + per_block - 1) / per_block * per_block + 1;",
    ),
    Fault(
        "all blocks have the first rows",
        DENSE,
        "p.rows_at_once + run_of_block(p).row_tile;",
        "p.rows_at_once;",
    ),
    Fault(
        "a quotient that is one less",
        DENSE,
        "return near + (a - near * b >= b);",
        "return near;",
    ),
    Fault(
        "parts that are not waited for",
        DENSE,
        "load_shared_int(smem + kSmemArrived) == share.count - 1) {",
        "load_shared_int(smem + kSmemArrived) == 0) {",
    ),
    Fault(
        "a counter that is left",
        DENSE,
        "p.counters + share.slots, share.count - 1)",
        "p.counters + share.slots, share.count)",
    ),
    Fault(
        "keys behind the end are read",
        DENSE,
        "key >= begin_key && key < s.k ? 16 : 0",
        "key >= begin_key ? 16 : 0",
    ),
    Fault(
        "keys behind the end are seen",
        DENSE,
        "tile >= tiles.end_full",
        "tile >= tiles.end",
    ),
    Fault(
        "a page's number that is none",
        PAGED,
        "entries[i] = key < s.k ?",
        "entries[i] = key < s.k + 64 ?",
    ),
    Fault(
        "rows of a page",
        PAGED,
        "key - page_number(p, key) * p.page_size",
        "key",
    ),
    Fault(
        "Q is not waited for",
        DENSE,
        "// the keys are on their way\n            sync_block();\n",
        "\n",
    ),
    Fault(
        "a tile is not waited for",
        DENSE,
        "cp_async_wait_5();",
        "",
    ),
    Fault(
        "warps are not waited for",
        DENSE,
        "        sync_block();\n        finish_rows",
        "        finish_rows",
        schedules=12,
    ),
    Fault(
        "warps weigh the same",
        DENSE,
        "float const weight = weight_of(of[warp].max, all.max, factor);",
        "float const weight = of[warp].max == -kInfinity ? 0.0f : 1.0f;",
    ),
    Fault(
        "parts weigh the same",
        DENSE,
        "float const weight = weight_of(i <= last ? sums[q][i][0] : -kInfinity, max, factor);",
        "float const weight = i <= last ? 1.0f : 0.0f;",
        count=2,
    ),
    Fault(
        "columns of few parts",
        DENSE,
        "begin + q * kNumThreads;",
        "begin + kNumThreads;",
        count=2,
    ),
    Fault(
        "entries of the next part's place",
        PAGED,
        "if (tile < end) {",
        "if (true) {",
        schedules=12,
    ),
    Fault(
        "entries that are not asked for ahead",
        PAGED,
        "next + kNumStages * kNumWarps, end,",
        "next + kNumWarps, end,",
    ),
    Fault(
        "heads of a group",
        DENSE,
        "r - query * p.num_heads_per_kv, query",
        "0, query",
    ),
    Fault(
        "the share of a warp without keys",
        DENSE,
        "        if (share != kNoShare) {\n            load",
        "        if (true) {\n            load",
    ),
    Fault(
        "a sink in each part",
        SINKS,
        "if (share.count == 1) {",
        "if (share.count > 0) {",
    ),
    Fault(
        "a sink's head",
        SINKS,
        "sink_of_head(p, row.head,",
        "sink_of_head(p, item.head_kv,",
    ),
    Fault(
        "pairs of Q as those of 16-bit keys",
        EIGHT,
        "as_fp16(words[i][0]), as_fp16(words[i][2])",
        "as_fp16(words[i][0]), as_fp16(words[i][1])",
    ),
    Fault(
        "even columns of V in the place of odd ones",
        EIGHT,
        "0x7531u",
        "0x6420u",
    ),
    Fault(
        "the scale of another sequence's keys",
        EIGHT,
        "p.k_descale + bidb * p.k_scale_batch",
        "p.k_descale",
    ),
    Fault(
        "left padding",
        DENSE,
        "return {p.seqlen_q, max(end - first, 0), min(first, end)};",
        "return {p.seqlen_q, max(end - first, 0), 0};",
    ),
]


WIDENS = kernel(cache_dtype="e4m3", paged=True).name


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("keys > p.seqlen_wide ?", "keys < 0 ?"),
        ("k_scale(p, bidb, heads[i])", "k_scale(p, bidb, 0)"),
        ("min(keys, p.seqlen_wide) * token_chunks", "p.seqlen_wide * token_chunks"),
    ],
    ids=["more keys than there is room for", "the scale of another head", "keys behind the end"],
)
def test_seeded_faults_of_widened_keys_are_seen(old, new):
    fault = Fault("", WIDENS, old, new)
    found, wanted = widened(KernelSpec.from_name(WIDENS), rendered=seeded(fault))
    assert not all(torch.equal(a.nan_to_num(9), b.nan_to_num(9)) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.id)
def test_seeded_faults_are_seen(fault):
    # Five blocks over four times five units: the second ends one item, cuts the next, and may be done before the first.
    shapes = (Shape(1, 4, 320, 4, 4), Shape(1, 1, 900, 2, 2), Shape(3, 6, 202, 6, 2), Shape(2, 1, 300, 4, 1))
    assert any(symptom(run, fault, shapes, seed, num_sms=5) for seed in range(fault.schedules)), "not seen"
