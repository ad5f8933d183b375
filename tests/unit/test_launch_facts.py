"""What a launch rests on: the order of tiles, which keys are visible, barriers, Params: from the rendered text itself.

These functions are plain integers. Each kernel's own text is compiled for the CPU and compared with a definition.
"""

from __future__ import annotations

import ctypes
import functools
import random
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fa2gen.features import MASKS, examples_of, key_range
from fa2gen.launch import launch_of
from fa2gen.options import Options, Shape
from fa2gen.plan import KernelPlan, make_plan
from fa2gen.plan.base import SECTION_BYTES
from fa2gen.render import render
from fa2gen.select import default_tiling
from fa2gen.spec import KernelSpec, Problem

COMPILER = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
H200_SMS = 132


def scaled(plan, softmax_scale):
    """The options of a typical call of a plan, with another scale."""
    return examples_of(plan.problem)[0]._replace(softmax_scale=softmax_scale)


@functools.cache
def plan_of(arch: str, mask: str, head_dim: int = 128) -> KernelPlan:
    problem = Problem(head_dim=head_dim, mask=mask)
    return make_plan(KernelSpec(problem=problem, tiling=default_tiling(problem, arch)))


KERNELS = [(arch, mask) for arch in ("sm80", "sm90") for mask in MASKS]


def random_shapes(count: int, most: int) -> list[Shape]:
    rng = random.Random(count + most)
    shapes = []
    for _ in range(count):
        num_heads_kv = rng.choice([1, 2, 3, 8])
        shapes.append(
            Shape(
                batch=rng.randint(1, 5),
                seqlen_q=rng.randint(1, most),
                seqlen_k=rng.randint(1, rng.choice([most, 40 * most])),
                num_heads=num_heads_kv * rng.choice([1, 2, 4, 7]),
                num_heads_kv=num_heads_kv,
            )
        )
    return shapes


# The kernel's own text, on the CPU -----------------------------------------------------------------------------------

_PRELUDE = """
#include <algorithm>
#include <cstdint>
#include <cstddef>
using std::max;
using std::min;
void mbarrier_init(uint32_t barrier, uint32_t arrivals);
#define __device__
#define __forceinline__ inline
"""

_DOORS = """
extern "C" {
int param_offsets(size_t* out) { int n = 0; OFFSETS return n; }
size_t params_size() { return sizeof(Params); }
void blocks(void const* params, int row, int rows, int* out) {
    Params const& p = *static_cast<Params const*>(params);
    BlockRange const found = key_blocks(p, seqlen_of(p, 0), row, rows);
    out[0] = found.begin;
    out[1] = found.begin_full;
    out[2] = found.end_full;
    out[3] = found.end;
}
int end(void const* params, int row) {
    Params const& p = *static_cast<Params const*>(params);
    return key_end(p, seqlen_of(p, 0), row);
}
MORE
}
"""
_BEGIN = """
int begin(void const* params, int row) {
    Params const& p = *static_cast<Params const*>(params);
    return key_begin(p, seqlen_of(p, 0), row);
}
"""
_TILE_SM90 = """
void tile(void const* p, int index, int* out) {
    Tile const found = tile_at(*static_cast<Params const*>(p), index);
    out[0] = found.m_block;
    out[1] = found.bidh;
    out[2] = found.bidb;
}
void positions(int num_stages, int steps, int* out) {
    PipelineState state = {0, 0};
    for (int i = 0; i < steps; ++i, state.advance(num_stages)) {
        out[2 * i] = state.stage;
        out[2 * i + 1] = static_cast<int>(state.phase);
    }
}
"""
_TILE_SM80 = (
    "int m_block(void const* p, int x) { return tile_of_block(*static_cast<Params const*>(p), x, 0, 0).m_block; }"
)


@functools.cache
def library(arch: str, mask: str) -> ctypes.CDLL:
    """Params, the mask's and the tile order's functions of a rendered kernel, compiled for this machine."""
    plan = plan_of(arch, mask)
    rendered = render(plan)
    rooms = ("rooms/seqlen/", "rooms/mask/", "rooms/schedule/")
    wanted = ("common/params.", *rooms, "sm90/pipeline")
    text = [
        line
        for line, origin in zip(rendered.source.splitlines(), rendered.origins, strict=True)
        if origin.startswith(wanted) or line.startswith(("constexpr int kTile", "constexpr int kNum"))
    ]
    offsets = "".join(f"out[n++] = offsetof(Params, {param.name});" for param in plan.params)
    more = (_BEGIN if plan.left_edge else "") + (_TILE_SM90 if arch == "sm90" else _TILE_SM80)
    doors = _DOORS.replace("OFFSETS", offsets).replace("MORE", more)
    return compiled("\n".join(text) + doors)


def compiled(text: str) -> ctypes.CDLL:
    """Device functions as a library for this machine, which traps where a signed number overflows."""
    folder = Path(tempfile.mkdtemp(prefix="fa2gen-facts-"))
    try:
        (folder / "facts.cc").write_text(_PRELUDE + text)
        command = [str(COMPILER), "-std=c++17", "-O1", "-shared", "-fPIC", "-fsanitize=signed-integer-overflow"]
        command += ["-fsanitize-undefined-trap-on-error", "-o", str(folder / "facts.so"), str(folder / "facts.cc")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return ctypes.CDLL(str(folder / "facts.so"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def params_of(plan: KernelPlan, shape: Shape, options: Options | None = None) -> bytes:
    values = dict.fromkeys((param.name for param in plan.params), 0)
    known = launch_of(plan, shape, options or scaled(plan, 0.1), H200_SMS).values
    values |= {name: value for name, value in known.items() if name in values}
    return struct.pack(plan.params_format, *plan.pack_params(values))


@needs_compiler
@pytest.mark.parametrize(("arch", "mask"), KERNELS)
def test_params_are_where_the_kernel_reads_them(arch, mask):
    plan, facts = plan_of(arch, mask), library(arch, mask)
    offsets = (ctypes.c_size_t * len(plan.params))()
    assert facts.param_offsets(offsets) == len(plan.params)
    assert facts.params_size() == struct.calcsize(plan.params_format)
    for i, param in enumerate(plan.params):
        values = {other.name: 0 for other in plan.params} | {param.name: 1}
        packed = struct.pack(plan.params_format, *plan.pack_params(values))
        assert struct.unpack_from("<" + param.code, packed, offsets[i]) == (1,), param.name


@needs_compiler
@pytest.mark.parametrize("mask", MASKS)
def test_every_tile_is_visited_exactly_once(mask):
    """Each (m block, head, batch): one left out is a stripe of NaN, one taken twice a race."""
    plan, facts = plan_of("sm90", mask), library("sm90", mask)
    for shape in random_shapes(60, 3000):
        launch = launch_of(plan, shape, scaled(plan, 0.1), H200_SMS)
        packed, out = params_of(plan, shape), (ctypes.c_int * 3)()
        seen = []
        for index in range(launch.values["num_tiles"]):
            facts.tile(packed, index, out)
            seen.append(tuple(out))
        m_blocks = range(-(-shape.seqlen_q // plan.tile_m))
        assert sorted(seen) == [
            (m, h, b) for m in m_blocks for h in range(shape.num_heads) for b in range(shape.batch)
        ], shape


def tile_at(plan: KernelPlan, launch: dict[str, int], index: int) -> tuple[int, int, int]:
    """templates/rooms/schedule in integers without a limit."""
    if plan.uneven:
        section = launch["heads_per_section"] * launch["num_m_blocks"]
        first = index // section * launch["heads_per_section"]
        width = min(launch["heads_per_section"], launch["num_batch_heads"] - first)
        batch_head = first + index % section % width
        m_block = launch["num_m_blocks"] - 1 - index % section // width
    else:
        batch_head, m_block = divmod(index, launch["num_m_blocks"])
    return m_block, batch_head % launch["num_heads"], batch_head // launch["num_heads"]


HUGE = [
    Shape(1, 2**30, 2**30, 1, 1),
    Shape(1, 128, 2**30, 2**20, 2**10),
    Shape(2**20, 100, 100, 16, 1),
    Shape(2**12, 2**16, 1, 2**9, 1),
    Shape(3, 2**24 + 1, 17, 24, 8),
    Shape(1, 1, 1, 2**30, 2**30),
]


@needs_compiler
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", HUGE, ids=str)
def test_the_order_of_tiles_does_not_overflow(mask, shape):
    """32 bits must agree with Python's integers up to the last tile that is accepted; the library traps on overflow."""
    plan, facts = plan_of("sm90", mask), library("sm90", mask)
    launch = launch_of(plan, shape, scaled(plan, 0.1), H200_SMS).values
    packed, out = params_of(plan, shape), (ctypes.c_int * 3)()
    rng = random.Random(8)
    last = launch["num_tiles"] - 1
    for index in [0, last, last - 1, *(rng.randrange(last + 1) for _ in range(500))]:
        facts.tile(packed, max(index, 0), out)
        assert tuple(out) == tile_at(plan, launch, max(index, 0))


@pytest.mark.parametrize("shape", random_shapes(60, 9000), ids=str)
def test_a_section_of_heads_fits_l2_and_shares_its_keys(shape):
    plan = plan_of("sm90", "causal")
    heads = launch_of(plan, shape, scaled(plan, 0.1), H200_SMS).values["heads_per_section"]
    group = shape.num_heads // shape.num_heads_kv
    assert 1 <= heads <= shape.batch * shape.num_heads
    assert heads % group == 0, "heads that share K and V are walked together"
    assert heads == group or heads // group * 2 * shape.seqlen_k * plan.head_dim * 2 <= SECTION_BYTES


@needs_compiler
@pytest.mark.parametrize("mask", MASKS)
def test_sm80_blocks_cover_the_m_blocks(mask):
    plan, facts = plan_of("sm80", mask), library("sm80", mask)
    for shape in random_shapes(40, 5000):
        grid = launch_of(plan, shape, scaled(plan, 0.1), H200_SMS).grids[0]
        assert grid == (-(-shape.seqlen_q // plan.tile_m), shape.num_heads, shape.batch)
        packed = params_of(plan, shape)
        order = [facts.m_block(packed, x) for x in range(grid[0])]
        assert sorted(order) == list(range(grid[0]))
        if plan.uneven:
            assert order == sorted(order, reverse=True), "the longest rows start first"


def random_calls(count: int, mask: str, step: int) -> Iterator[tuple[Shape, Options]]:
    """Sizes about the edges of blocks of `step` keys, and options of a mask."""
    rng = random.Random(9)
    examples = examples_of(Problem(head_dim=64, mask=mask))
    edges = (-1, -1, 0, 1, 17, step - 1, step, step + 1, 3 * step, 1000)
    for _ in range(count):
        seqlen_k = rng.choice([rng.randint(1, 500), step, 2 * step, step + 1, 1])
        options = rng.choice(examples)
        if MASKS[mask].general:
            left, right, chunk = rng.choice(edges), rng.choice(edges), rng.choice((0, 0, 1, 48, step, 200, 1000))
            options = Options(causal=rng.random() < 0.4, window_left=left, window_right=right, chunk=chunk)
        yield Shape(1, rng.randint(1, 400), seqlen_k, 1, 1), options


def first_rows(plan: KernelPlan, seqlen_q: int) -> Iterator[tuple[int, int]]:
    """(first row, number of rows) of some warps, warpgroups and tiles."""
    for num_rows in (16, 64, plan.tile_m):
        yield from ((first, num_rows) for first in range(0, seqlen_q + plan.tile_m, num_rows * 3))


@needs_compiler
@pytest.mark.parametrize(("arch", "mask"), KERNELS)
def test_key_blocks_against_the_definition(arch, mask):
    """No visible key is left out, no block without one is read, and no block that needs a mask goes without."""
    plan, facts = plan_of(arch, mask), library(arch, mask)
    step, out = plan.tile_n, (ctypes.c_int * 4)()
    for shape, options in random_calls(600 if MASKS[mask].general else 150, mask, step):
        packed = params_of(plan, shape, options)
        seen = {row: key_range(options, shape.seqlen_q, shape.seqlen_k, row) for row in range(shape.seqlen_q)}
        for row, (first, end) in seen.items():
            found = range(facts.begin(packed, row) if plan.left_edge else 0, facts.end(packed, row))
            assert found == range(first, end), f"{shape}, {options}, row {row}"
        for first_row, num_rows in first_rows(plan, shape.seqlen_q):
            ranges = [seen[row] for row in range(first_row, min(first_row + num_rows, shape.seqlen_q))]
            facts.blocks(packed, first_row, num_rows, out)
            begin, begin_full, end_full, end = out
            where = f"{shape}, {options}, rows {first_row} and {num_rows - 1} more: {tuple(out)}"
            visited = {key // step for first, end_key in ranges for key in range(first, end_key)}
            assert set(range(begin, end)) == visited, where
            full = [n for n in visited if all(first <= n * step and n * step + step <= end for first, end in ranges)]
            assert [n for n in range(begin_full, end_full) if begin <= n < end] == sorted(full), where
            # The loops run down to end_full, then to begin_full, then to begin.
            assert begin <= end_full and begin <= begin_full, where


@needs_compiler
@pytest.mark.parametrize(("arch", "mask"), KERNELS)
def test_key_blocks_of_a_part_lie_within_those_of_the_whole(arch, mask):
    """The producer loads what the tile sees; a warpgroup skips what it does not: it must see no block more."""
    plan, facts = plan_of(arch, mask), library(arch, mask)
    part, whole = (ctypes.c_int * 4)(), (ctypes.c_int * 4)()
    for shape, options in random_calls(300, mask, plan.tile_n):
        packed = params_of(plan, shape, options)
        for first_row in range(0, shape.seqlen_q, plan.tile_m):
            facts.blocks(packed, first_row, plan.tile_m, whole)
            for row in range(first_row, first_row + plan.tile_m, 64):
                facts.blocks(packed, row, 64, part)
                assert whole[0] <= part[0] <= part[3] <= whole[3], f"{shape}, {options}, row {row}"


# One for each way in which a kernel of SM90 splits its work.
BARRIERS = (
    "fa2_fwd_sm90_bf16_d128_causal_m128_n128_s2_w8",
    "fa2_bwd_sm90_bf16_d128_m64_n128_s2_w8",
    "fa2_bwd_sm90_bf16_d128_causal_m64_n128_s2_w8_l1",
    "fa2_bwd_sm90_bf16_d256_det_m64_n64_s2_w8",
    "fa2_bwd_sm90_bf16_d256_m64_n80_s2_w8",
)
_INIT = """
static uint32_t* found;
void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
    *found++ = barrier;
    *found++ = arrivals;
}
extern "C" int init(uint32_t base, uint32_t* out) {
    found = out;
    Barriers{base}.init();
    return found - out;
}
"""


@needs_compiler
@pytest.mark.parametrize("name", BARRIERS)
def test_every_barrier_has_a_place_of_its_own_and_is_initialised_once(name):
    plan = make_plan(KernelSpec.from_name(name))
    rendered = render(plan)
    lines = zip(rendered.source.splitlines(), rendered.origins, strict=True)
    text = [
        line for line, origin in lines if origin.startswith("sm90/pipeline") or line.startswith("constexpr int kNum")
    ]
    region, out = plan.barriers.region, (ctypes.c_uint32 * 100)()
    base = plan.memory.offsets["barriers"]
    count = compiled("\n".join(text) + _INIT).init(base, out)
    assert sorted(out[:count:2]) == list(range(base, base + region.bytes, 8))
    assert all(1 <= arrivals <= plan.num_mma_warps for arrivals in out[1:count:2])


@needs_compiler
@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 5])
def test_a_ring_comes_round_with_the_other_parity(num_stages):
    steps = 4 * num_stages + 1
    out = (ctypes.c_int * (2 * steps))()
    library("sm90", "full").positions(num_stages, steps, out)
    assert list(zip(out[::2], out[1::2], strict=True)) == [(i % num_stages, i // num_stages % 2) for i in range(steps)]


# The launch itself ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "mask"), KERNELS)
def test_a_launch_knows_every_argument_but_addresses(arch, mask):
    plan = plan_of(arch, mask)
    values = launch_of(plan, Shape(2, 300, 400, 6, 2), scaled(plan, 0.125), H200_SMS).values
    for param in plan.params:
        given_later = "*" in param.ctype or param.name.endswith("_stride")
        assert given_later != (param.name in values), param.name
        assert given_later or isinstance(values[param.name], float if param.ctype == "float" else int)
    assert values["softmax_scale_log2"] == pytest.approx(0.125 * 1.4426950408889634, rel=1e-15)
    assert values["num_heads_per_kv"] == 3


def test_a_persistent_grid_has_a_block_for_each_sm_at_most():
    plan = plan_of("sm90", "full")
    assert launch_of(plan, Shape(1, 1, 1, 1, 1), scaled(plan, 1.0), H200_SMS).grids == ((1, 1, 1),)
    assert launch_of(plan, Shape(4, 8192, 8192, 16, 16), scaled(plan, 1.0), H200_SMS).grids == ((H200_SMS, 1, 1),)
    assert launch_of(plan, Shape(4, 8192, 8192, 16, 16), scaled(plan, 1.0), 78).grids == ((78, 1, 1),)


@pytest.mark.parametrize("arch", ["sm80", "sm90"])
def test_counts_that_32_bits_do_not_hold_are_refused(arch):
    plan = plan_of(arch, "causal")
    with pytest.raises(OverflowError, match=r"exceed 2\^31"):
        launch_of(plan, Shape(2**16, 2**20, 1, 2**10, 1), scaled(plan, 1.0), H200_SMS)
