"""Plans against brute force: what templates take for granted is counted again, byte by byte and thread by thread."""

from __future__ import annotations

import itertools
import random
import re
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from fa2gen.arch import ARCHES
from fa2gen.errors import InfeasibleSpec
from fa2gen.layout import Panels, ceil_div, swizzle
from fa2gen.plan import KernelPlan, feasible_tilings, fits, make_plan
from fa2gen.plan.base import Param
from fa2gen.select import default_tiling
from fa2gen.spec import KernelSpec, Problem, Tiling

ELEMENT = 2
HEAD_DIMS = range(8, 257, 8)
PROBLEMS = [
    Problem(head_dim=head_dim, dtype=dtype, mask=mask)
    for head_dim in HEAD_DIMS
    for dtype in ("fp16", "bf16")
    for mask in ("full", "causal")
]
# With values of another head dim; with 256 of them O takes Q's place on sm90, and more than Q has.
OF_V = [Problem(head_dim=d, head_dim_v=v) for d, v in ((192, 128), (192, 256), (72, 8), (8, 72), (64, 256), (256, 40))]
# What a kernel may ask for on each GPU that runs it: 8.0, 8.6 and 8.9, 9.0.
LIMITS = {"sm80": (166_912, 101_376), "sm90": (232_448,)}


def defaults(arch: str) -> list[KernelPlan]:
    return [make_plan(KernelSpec(problem=p, tiling=default_tiling(p, arch))) for p in PROBLEMS]


def samples(arch: str) -> list[KernelPlan]:
    """Plans of every default tiling, and of tilings that a tuner could try."""
    rng = random.Random(arch)
    tried = []
    for problem in rng.sample(PROBLEMS, 6):  # each takes a search
        found = list(feasible_tilings(problem, arch))
        tried += [KernelSpec(problem=problem, tiling=tiling) for tiling in rng.sample(found, min(40, len(found)))]
    of_v = [KernelSpec(problem=problem, tiling=default_tiling(problem, arch)) for problem in OF_V]
    return defaults(arch) + [make_plan(spec) for spec in tried + of_v]


SM90, SM80 = samples("sm90"), samples("sm80")


def shape_of(tiling: Tiling) -> tuple[int, ...]:
    """A tiling without its schedule switches."""
    return tiling.tile_m, tiling.tile_n, tiling.num_stages, tiling.num_mma_warps, tiling.swizzle_bytes


def by_name(plan: KernelPlan) -> str:
    return plan.name


# Every architecture --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHES)
def test_every_head_dim_has_a_feasible_default(arch):
    """The promise: any head dim that is a multiple of 8 up to 256 works with no spec written by hand."""
    plans = defaults(arch)
    assert len({plan.name for plan in plans}) == len(PROBLEMS) == 128
    for plan in plans:
        assert plan.arch == arch
    for plan in plans[::16]:
        shapes = {shape_of(tiling) for tiling in feasible_tilings(plan.problem, arch)}
        assert shape_of(plan.tiling) in shapes, f"{plan.name}: no tuner would try the default"


@pytest.mark.parametrize(("arch", "limit"), [(arch, limit) for arch, limits in LIMITS.items() for limit in limits])
def test_every_head_dim_has_a_default_on_every_gpu(arch, limit):
    """An RTX 4090 has 99 KiB of the 163 of an A100."""
    for problem in PROBLEMS:
        plan = make_plan(KernelSpec(problem=problem, tiling=default_tiling(problem, arch, limit)))
        assert plan.shared_memory_bytes <= limit, plan.name


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
@pytest.mark.parametrize(("arch", "limit"), [(arch, limit) for arch, limits in LIMITS.items() for limit in limits])
def test_every_pair_of_head_dims_has_a_default_on_every_gpu(arch, limit, direction):
    for d, v in itertools.product(HEAD_DIMS, HEAD_DIMS):
        problem = Problem(direction=direction, head_dim=d, head_dim_v=v)
        default_tiling(problem, arch, limit)  # within the limit and the plan's rules, or it raises


def test_a_launch_stays_within_the_architecture():
    for plan in (*SM90, *SM80):
        arch = ARCHES[plan.arch]
        assert plan.target == {"sm80": "sm_80", "sm90": "sm_90a"}[plan.arch]
        assert plan.num_threads <= 1024 and plan.num_threads % 32 == 0
        assert 0 < plan.shared_memory_bytes <= arch.shared_memory_per_block
        assert plan.min_ctas_per_sm >= 1
        # 1 KiB of each block is the driver's.
        assert plan.min_ctas_per_sm * (plan.shared_memory_bytes + 1024) <= arch.shared_memory_per_block + 1024


@pytest.mark.parametrize("plan", [SM90[0], SM90[1], SM80[0], SM80[1]], ids=by_name)
def test_params_are_laid_out_as_c_lays_them_out(plan):
    """Natural alignment of each field, and of the struct: counted here as a C compiler does."""
    sizes = {"void const*": 8, "void*": 8, "float*": 8, "int*": 8, "int64_t": 8, "int": 4, "float": 4}
    offset, offsets = 0, []
    for param in plan.params:
        size = sizes[param.ctype]
        offset = ceil_div(offset, size) * size
        offsets.append(offset)
        offset += size
    packer = struct.Struct(plan.params_format)
    assert packer.size == ceil_div(offset, 8) * 8
    values = {param.name: (i + 1.0 if param.ctype == "float" else i + 1) for i, param in enumerate(plan.params)}
    packed = packer.pack(*plan.pack_params(values))
    for param, place in zip(plan.params, offsets, strict=True):
        assert struct.unpack_from("<" + param.code, packed, place) == (values[param.name],), param.name


def test_params_are_the_ones_that_a_launch_fills():
    """A field that no launch knows would be an argument nobody gives."""
    known = {
        "lse",
        "tile_counter",
        "q",
        "k",
        "v",
        "o",
        "seqlen_q",
        "seqlen_k",
        "num_heads",
        "num_heads_per_kv",
        "num_m_blocks",
    }
    known |= {"num_tiles", "num_batch_heads", "heads_per_section", "softmax_scale", "softmax_scale_log2"}
    known |= {f"{tensor}_{dimension}_stride" for tensor in "qkvo" for dimension in ("batch", "row", "head")}
    for plan in (*SM90, *SM80):
        names = [param.name for param in plan.params]
        assert set(names) <= known and len(names) == len(set(names))


@pytest.mark.parametrize("ctype", ["void const*", "void*", "float*", "int*", "int64_t", "int", "float"])
def test_every_c_type_has_a_struct_code_of_its_size(ctype):
    assert struct.calcsize("<" + Param("x", ctype).code) == (4 if ctype in ("int", "float") else 8)


# Shared memory -------------------------------------------------------------------------------------------------------


def regions(plan: Any) -> Iterator[tuple[str, int, int, int]]:
    """(what, first byte, bytes, alignment) of all that a block keeps in shared memory at one time."""
    q, k, v, o = (x.rows * x.count * x.span for x in (plan.q_tile, plan.k_tile, plan.v_tile, plan.o_tile))
    if plan.arch == "sm80":
        yield "q or o", plan.memory.offsets["q"], max(q, o), 1024
        for stage in range(plan.num_stages):
            yield f"k {stage}", plan.memory.offsets["k"] + stage * plan.stage_bytes, k, 8 * plan.k_tile.span
            yield f"v {stage}", plan.memory.offsets["v"] + stage * plan.stage_bytes, v, 8 * plan.v_tile.span
        if plan.shares_rows:  # of each lane's P, two elements a register; and 4 numbers of each lane
            yield "p", plan.memory.offsets["p"], 4 * plan.num_threads * plan.num_row_tiles * plan.num_p, 16
            yield "row statistics", plan.memory.offsets["row_statistics"], 16 * plan.num_threads, 16
        return
    for stage in range(plan.num_q_stages):
        alone = not plan.o_aliases_q
        yield f"q {stage}", plan.memory.offsets["q"] + stage * plan.q_stage_bytes, q if alone else max(q, o), 1024
        yield (
            f"tile slot {stage}",
            plan.memory.offsets["tile_slots"] + plan.tile_slot_bytes * stage,
            plan.tile_slot_bytes,
            16,
        )
    for stage in range(plan.num_stages):
        yield f"k {stage}", plan.memory.offsets["k"] + stage * plan.stage_bytes(plan.qk), k, 1024
        yield f"v {stage}", plan.memory.offsets["v"] + stage * plan.stage_bytes(plan.vo), v, 1024
    if not plan.o_aliases_q:
        yield "o", plan.memory.offsets["o"], o, 1024
    for i in range(2 * (plan.num_q_stages + 2 * plan.num_stages)):  # full and empty, of Q, K and V
        yield f"barrier {i}", plan.memory.offsets["barriers"] + 8 * i, 8, 8


def test_the_shared_memory_map():
    """Nothing overlaps, all is aligned, and the bytes that are asked for are the bytes that are used."""
    for plan in (*SM90, *SM80):
        placed = sorted((first, first + size, what) for what, first, size, _ in regions(plan))
        for what, first, _, alignment in regions(plan):
            assert first % alignment == 0, what
        for (_, end, what), (first, _, following) in itertools.pairwise(placed):
            assert end <= first, f"{what} runs into {following}"
        assert placed[0][0] == 0
        used = placed[-1][1]
        assert used <= plan.shared_memory_bytes <= used + 15
        gaps = sum(first - end for (_, end, _), (first, _, _) in itertools.pairwise(placed))
        assert gaps <= 1024 * 2 * plan.num_stages  # only what the 1024-byte grid of tiles costs


def test_o_takes_the_place_of_q_only_where_it_must():
    """The next tile's Q then waits for O: half of what persistence gains."""
    for plan in (plan for plan in SM90 if plan.o_aliases_q):
        assert plan.memory.offsets["o"] == plan.memory.offsets["q"] and plan.num_q_stages == 1
        assert plan.shared_memory_bytes + plan.q_stage_bytes > ARCHES["sm90"].shared_memory_per_block


def test_q_has_one_stage_only_where_it_must():
    for plan in (plan for plan in SM90 if plan.num_q_stages == 1):
        assert plan.shared_memory_bytes + plan.q_stage_bytes + 16 > ARCHES["sm90"].shared_memory_per_block


def test_the_samples_have_both_kinds():
    assert {plan.o_aliases_q for plan in SM90} == {True, False}
    assert {plan.num_q_stages for plan in SM90} == {1, 2}
    assert {plan.tiling.swizzle_bytes for plan in SM90} == {128, 64, 32}


def swizzled_tile(tile: Panels, base: int) -> dict[int, tuple[int, int]]:
    """Byte address -> (row, column) of a tile at `base`, as TMA writes it: from the swizzle of absolute addresses."""
    return {
        swizzle(
            base + column // tile.columns * tile.panel_bytes + row * tile.span + column % tile.columns * ELEMENT,
            tile.span,
        ): (
            row,
            column,
        )
        for row in range(tile.rows)
        for column in range(tile.count * tile.columns)
    }


def few(plans: list[KernelPlan]) -> list[KernelPlan]:
    """One small plan for each panel width, with a ragged head dim and without, of one panel and of several."""
    by_size = sorted(plans, key=lambda p: p.shared_memory_bytes, reverse=True)  # the last of a kind stays
    return list({(p.tiling.swizzle_bytes, p.head_dim % 16, p.k_tile.count > 1): p for p in by_size}.values())


@pytest.mark.parametrize("plan", few([*SM90, *SM80]), ids=by_name)
def test_chunk_arithmetic_finds_what_the_swizzle_of_addresses_stored(plan):
    """Kernels swizzle the chunk by the row, relative to their tile; the hardware swizzles absolute addresses."""
    for tile, base in (
        (plan.q_tile, plan.memory.offsets["q"]),
        (plan.k_tile, plan.memory.offsets["k"]),
        (plan.v_tile, plan.memory.offsets["v"]),
    ):
        held = swizzled_tile(tile, base)
        assert len(held) == tile.rows * tile.count * tile.columns
        for row in range(tile.rows):
            for column in range(0, tile.count * tile.columns, 8):
                chunk = column % tile.columns // 8 ^ ((row >> plan.swizzle_shift) & plan.swizzle_mask)
                address = base + column // tile.columns * tile.panel_bytes + row * tile.span + 16 * chunk
                assert held[address] == (row, column)


# sm90 ----------------------------------------------------------------------------------------------------------------


def test_boxes_are_what_the_barriers_expect():
    """A barrier that expects one byte more than its copies bring is a kernel that hangs."""
    for plan in SM90:
        tiles = {"q": plan.q_tile, "k": plan.k_tile, "v": plan.v_tile, "o": plan.o_tile}
        boxes_a_panel = {"q": 1, "k": 1, "v": 1, "o": plan.num_mma_warps}
        expected = {"q": plan.q_tile.bytes, "k": plan.k_tile.read_bytes, "v": plan.v_tile.read_bytes}
        for name, tile in tiles.items():
            maps = [box for box in plan.tensor_maps if box.name == name]
            of_panels = [maps[0]] * (tile.count - 1) + [maps[-1]]
            assert [box.last_panel for box in maps] == [False, True][: len(maps)]
            boxes = [box.box_cols * box.box_rows * ELEMENT * boxes_a_panel[name] for box in of_panels]
            assert sum(boxes) == expected.get(name, tile.bytes)
            assert all(part == tile.panel_bytes for part in boxes[:-1])
            assert sum(box.box_cols for box in of_panels) >= -(-tile.head_dim // 16) * 16
            for box in maps:  # cuTensorMapEncodeTiled's own rules
                assert box.box_cols * ELEMENT <= box.swizzle_bytes == plan.tiling.swizzle_bytes
                assert box.box_rows <= 256 and box.box_cols <= 256
        assert list(dict.fromkeys(box.name for box in plan.tensor_maps)) == list(tiles)
        # expect-tx counts 20 bits: PTX ISA, "mbarrier".
        assert max(plan.q_tile.bytes, plan.k_tile.bytes, plan.v_tile.bytes) < 1 << 20


def test_registers_are_never_over_committed():
    """setmaxnreg.inc waits for registers: one too many and the block hangs."""
    for plan in SM90:
        at_launch = min(ARCHES["sm90"].registers_per_sm // plan.num_threads // 8 * 8, 256) * plan.num_threads
        after = 128 * plan.producer_registers + 32 * plan.num_mma_warps * plan.consumer_registers
        assert after <= at_launch
        for count in (plan.producer_registers, plan.consumer_registers):
            assert count % 8 == 0 and 24 <= count <= 256
        assert plan.producer_registers <= at_launch // plan.num_threads <= plan.consumer_registers
        assert plan.num_acc_s + plan.num_acc_o + plan.num_p < plan.consumer_registers


def test_accumulators_are_what_the_threads_hold():
    for plan in SM90:
        threads = 32 * plan.num_mma_warps
        assert plan.num_acc_s * threads == plan.tile_m * plan.tile_n
        assert plan.num_acc_o * threads == plan.tile_m * plan.head_dim_v
        assert plan.num_p * 2 == plan.num_acc_s == 8 * plan.num_k_steps_pv
        assert (
            0 <= 16 * plan.qk.num_k_steps - plan.head_dim < 16
            and plan.qk.num_k_steps * 16 <= plan.k_tile.count * plan.k_tile.columns
        )
        assert (plan.wgmma_qk.n, plan.wgmma_pv.n) == (plan.tile_n, plan.head_dim_v)


def decode(hi: int, lo: int) -> dict[str, int]:
    """A matrix descriptor's fields, bytes where the hardware counts 16 (PTX ISA, "Matrix descriptor format")."""
    bits = hi << 32 | lo
    return {
        "start": (bits & 0x3FFF) << 4,
        "leading": (bits >> 16 & 0x3FFF) << 4,
        "stride": (bits >> 32 & 0x3FFF) << 4,
        "base offset": bits >> 49 & 7,
        "mode": bits >> 62,
        "rest": bits & ~(0x3FFF | 0x3FFF << 16 | 0x3FFF << 32 | 7 << 49 | 3 << 62),
    }


WIDEST_WINDOW = 1024  # the first dynamic byte may lie here in the shared window: the driver's KiB comes before it


@pytest.mark.parametrize("plan", few(SM90), ids=by_name)
def test_descriptors_lead_to_the_elements(plan):
    """Each step of both products, element by element: the address that the hardware forms holds what is meant."""
    span, window = plan.tiling.swizzle_bytes, WIDEST_WINDOW

    def address(fields: dict[str, int], row: int, byte: int) -> int:
        """8 rows of an atom lie `span` apart, the next 8 `stride` on; then the absolute address is swizzled."""
        return swizzle(fields["start"] + row // 8 * fields["stride"] + row % 8 * span + byte, span)

    # S = Q K^T: K-major, 16 columns a step. As gemm_qk forms the addresses, in units of 16 bytes.
    for tile, base in (
        (plan.k_tile, window + plan.memory.offsets["k"]),
        (plan.q_tile, window + plan.memory.offsets["q"]),
    ):
        held = swizzled_tile(tile, base)
        for step in range(plan.qk.num_k_steps):
            panel, within = divmod(step, plan.k_steps_per_panel)
            fields = decode(plan.desc_hi, base // 16 + (panel * tile.panel_bytes + within * 32) // 16)
            assert fields["mode"] == {128: 1, 64: 2, 32: 3}[span] and fields["base offset"] == fields["rest"] == 0
            for row in range(tile.rows):
                for column in range(16):
                    assert held[address(fields, row, 2 * column)] == (row, 16 * step + column)

    # O += P V: MN-major, 16 keys a step; `leading` is the way to the next panel of columns.
    base = window + plan.memory.offsets["v"]
    held = swizzled_tile(plan.v_tile, base)
    for step in range(plan.num_k_steps_pv):
        fields = decode(plan.desc_hi, base // 16 + plan.desc_lo_v + step * 16 * span // 16)
        assert fields["base offset"] == fields["rest"] == 0
        for key in range(16):
            for column in range(plan.head_dim_v):
                panel, within = divmod(column, plan.v_tile.columns)
                found = held[address({**fields, "start": fields["start"] + panel * fields["leading"]}, key, 2 * within)]
                assert found == (16 * step + key, column)


def test_addresses_fit_a_descriptor():
    """14 bits of 16 bytes each: an address that carried over would change the leading offset."""
    for plan in SM90:
        last = WIDEST_WINDOW + plan.shared_memory_bytes
        assert last >> 4 < 1 << 14
        assert decode(plan.desc_hi, plan.desc_lo_v)["leading"] == plan.v_tile.panel_bytes < 1 << 18
        assert decode(plan.desc_hi, 0)["stride"] == 8 * plan.tiling.swizzle_bytes


# sm80 ----------------------------------------------------------------------------------------------------------------


def test_every_warp_owns_whole_row_tiles():
    for plan in SM80:
        assert (
            plan.num_mma_warps * plan.rows_per_warp == plan.tile_m * plan.num_column_warps
            and plan.rows_per_warp == 16 * plan.num_row_tiles > 0
        )
        threads = plan.num_threads
        assert plan.num_row_tiles * plan.num_acc_s * threads == plan.tile_m * plan.tile_n
        assert plan.num_row_tiles * plan.num_acc_o * threads == plan.tile_m * plan.head_dim_v
        assert plan.num_p * 2 == plan.num_acc_s == 8 * plan.num_k_steps_pv
        assert 0 <= 16 * plan.qk.num_k_steps - plan.head_dim < 16


@pytest.mark.parametrize("plan", few(SM80), ids=by_name)
def test_copies_write_every_chunk_once(plan):
    """A chunk that no thread copies is what the block before left there."""
    chunks = plan.chunks_per_panel_row
    assert plan.num_threads % chunks == 0
    for tile in (plan.q_tile, plan.k_tile, plan.v_tile):
        written = [
            (panel, first + thread // chunks, thread % chunks)
            for thread in range(plan.num_threads)
            for first in range(0, tile.rows, plan.copy_rows)
            if first + thread // chunks < tile.rows
            for panel in range(tile.count)
        ]
        assert sorted(written) == list(itertools.product(range(tile.count), range(tile.rows), range(chunks)))


@pytest.mark.parametrize("plan", few(SM80), ids=by_name)
def test_copies_of_one_thread_share_their_swizzle(plan):
    """A thread keeps one shared offset for all its rows: the swizzle must repeat after copy_rows of them."""
    for row in range(plan.copy_rows):
        swizzles = {
            ((row + first) >> plan.swizzle_shift) & plan.swizzle_mask for first in range(0, plan.tile_m, plan.copy_rows)
        }
        assert len(swizzles) == 1


@pytest.mark.parametrize("plan", few(SM80), ids=by_name)
def test_stores_read_every_row_of_the_warp_once(plan):
    chunks = plan.chunks_per_panel_row
    rows = [
        (first + lane // chunks, lane % chunks)
        for first in range(0, plan.stored_rows, plan.store_rows)
        for lane in range(32)
    ]
    assert sorted(rows) == list(itertools.product(range(plan.stored_rows), range(chunks)))


@pytest.mark.parametrize("plan", few(SM80), ids=by_name)
def test_ldmatrix_addresses_of_a_step_are_one_register_and_constants(plan):
    """16 columns on, a lane's address flips bits of its chunk or lies a panel on; 16 rows on, whole rows on."""
    tile = plan.k_tile
    held = swizzled_tile(tile, 0)
    for lane in range(32):
        row = lane % 16
        start = row * tile.span + ((lane // 16 ^ (row >> plan.swizzle_shift & plan.swizzle_mask)) << 4)
        for step in range(plan.qk.num_k_steps):
            panel, within = divmod(step, plan.k_steps_per_panel)
            for rows in range(0, tile.rows, 16):
                address = (start ^ 32 * within) + panel * tile.panel_bytes + rows * tile.span
                assert held[address] == (rows + row, 16 * step + 8 * (lane // 16))


# Feasibility ---------------------------------------------------------------------------------------------------------


def shared_memory_needed(spec: KernelSpec) -> int:
    """The least that a kernel can do with: one Q, all stages of K and V, on sm90 their barriers and tile slot."""
    span = spec.tiling.swizzle_bytes
    row = ceil_div(spec.problem.head_dim * ELEMENT, span) * span
    kv = row * spec.tiling.tile_n
    if spec.tiling.arch == "sm90":
        kv = ceil_div(kv, 1024) * 1024
        barriers = 8 * 2 * (1 + 2 * spec.tiling.num_stages) + 16
        return ceil_div(row * spec.tiling.tile_m, 1024) * 1024 + 2 * spec.tiling.num_stages * kv + barriers
    return row * spec.tiling.tile_m + 2 * spec.tiling.num_stages * kv


def random_spec(rng: random.Random, arch: str) -> KernelSpec:
    warps = rng.choice([4, 4, 8, 8, 12, 16, 3])
    tile_m = rng.choice([16 * warps, rng.randrange(16, 257, 16)])
    tiling = Tiling(
        arch=arch,
        tile_m=min(tile_m, 256),
        tile_n=rng.randrange(16, 257, 16),
        num_stages=rng.randint(1, 4),
        num_mma_warps=warps,
        swizzle_bytes=rng.choice([128, 64, 32]),
    )
    return KernelSpec(problem=Problem(head_dim=rng.randrange(8, 257, 8)), tiling=tiling)


def refusal(spec: KernelSpec) -> str | None:
    try:
        make_plan(spec)
    except InfeasibleSpec as error:
        return str(error)
    return None


def rules(message: str) -> dict[str, str]:
    """rule -> detail of a refusal: `  shared memory  327,680 B needed (...)`."""
    return {line[2:16].strip(): line[17:] for line in message.splitlines()[1:]}


@pytest.mark.parametrize("arch", ARCHES)
def test_shared_memory_is_refused_exactly_where_it_does_not_fit(arch, monkeypatch):
    monkeypatch.setattr("fa2gen.plan.feasible._nearest", lambda _: None)  # a search, of which others tell
    rng = random.Random(5)
    limit = ARCHES[arch].shared_memory_per_block
    seen = {True: 0, False: 0}
    for _ in range(80):
        spec = random_spec(rng, arch)
        message = refusal(spec)
        needed = shared_memory_needed(spec)
        broken = {} if message is None else rules(message)
        if {"mma warps", "query rows"} & broken.keys() and needed > limit and "shared memory" not in broken:
            continue  # nothing more can be said before a warp's rows are known
        assert ("shared memory" in broken) == (needed > limit), spec.name
        seen[needed > limit] += 1
        if needed > limit:
            assert f"{needed:,} B needed" in broken["shared memory"] and f"{limit:,} B" in broken["shared memory"]
    assert min(seen.values()) > 10


def test_sm90_rules():
    """Each rule alone, and with its numbers; all that are broken are said at once."""

    def broken(head_dim: int, tile_m: int, tile_n: int, stages: int, warps: int) -> dict[str, str]:
        tiling = Tiling(arch="sm90", tile_m=tile_m, tile_n=tile_n, num_stages=stages, num_mma_warps=warps)
        return rules(refusal(KernelSpec(problem=Problem(head_dim=head_dim), tiling=tiling)) or "")

    def without_nearest(found: dict[str, str]) -> set[str]:
        return set(found) - {"nearest"}

    assert without_nearest(broken(64, 128, 128, 2, 8)) == set()
    found = broken(64, 96, 64, 2, 6)
    assert (
        without_nearest(found) == {"mma warps"} and "6" in found["mma warps"] and "4, 8, 12 or 16" in found["mma warps"]
    )
    found = broken(64, 64, 64, 2, 8)
    assert without_nearest(found) == {"query rows"} and "64" in found["query rows"] and "128" in found["query rows"]
    found = broken(128, 128, 128, 4, 8)
    assert (
        without_nearest(found) == {"shared memory"}
        and "Q 32,768 + 4 x K 32,768 + 4 x V 32,768" in found["shared memory"]
    )
    found = broken(64, 128, 256, 1, 8)
    assert (
        without_nearest(found) == {"registers"}
        and "S 128 + O 32 + P 64" in found["registers"]
        and "240" in found["registers"]
    )
    found = broken(256, 64, 256, 3, 12)
    assert without_nearest(found) == {"query rows", "shared memory", "registers"}


@pytest.mark.parametrize("arch", ARCHES)
def test_the_nearest_tiling_is_feasible(arch):
    """The message is followed: what it proposes must work, and change as little as it says."""
    rng = random.Random(6)
    followed = 0
    for _ in range(40):
        spec = random_spec(rng, arch)
        message = refusal(spec)
        if message is None:
            continue
        broken = rules(message)
        assert message.startswith(f"{spec.name} does not fit {arch}\n") and len(broken) >= 2
        assert all(re.search(r"\d", detail) for detail in broken.values()), message
        changes = dict(re.findall(r"([a-z_0-9]+) (\d+)[,)]? ?", broken["nearest"].partition("(")[0]))
        nearest = spec.tiling.model_dump() | {field: int(value) for field, value in changes.items()}
        plan = make_plan(KernelSpec(problem=spec.problem, tiling=Tiling(**nearest)))
        assert f"({plan.shared_memory_bytes:,} B)" in broken["nearest"]
        assert f"fa2gen plan --head-dim {spec.problem.head_dim} --arch {arch}" in broken["nearest"]
        followed += 1
    assert followed > 10


def test_a_target_refuses_what_only_another_has_room_for():
    """SM80 gradients at head dim 256 with two stages: on 9.0, not on an A100, where only the driver would say so."""
    spec = KernelSpec.from_name("fa2_bwd_sm80_bf16_d256_m64_n64_s2_w8")
    assert make_plan(spec) == make_plan(spec, ARCHES["sm80"].targets["sm_90"])
    for target, of_block, smallest in (("sm_80", 166_912, 147_968), ("sm_86", 101_376, 73_984)):
        limit = ARCHES["sm80"].targets[target]
        assert limit == of_block and not fits(spec, limit)
        with pytest.raises(InfeasibleSpec) as refused:
            make_plan(spec, limit)
        broken = rules(str(refused.value))
        assert broken.keys() == {"shared memory", "nearest"}
        assert "214,016 B needed" in broken["shared memory"]
        assert broken["shared memory"].endswith(f"{limit:,} B available (232,448 B on other devices)")
        assert f"({smallest:,} B)" in broken["nearest"]
        needed = [
            make_plan(KernelSpec(problem=spec.problem, tiling=tiling)).shared_memory_bytes
            for tiling in feasible_tilings(spec.problem, "sm80", limit)
        ]
        assert smallest in needed and max(needed) <= limit


@pytest.mark.parametrize("arch", ARCHES)
def test_feasible_tilings_are_feasible_and_different(arch):
    for head_dim in (8, 72, 128, 256):
        problem = Problem(head_dim=head_dim)
        found = list(feasible_tilings(problem, arch))
        assert len(found) == len(set(found)) > 0
        for tiling in found:
            make_plan(KernelSpec(problem=problem, tiling=tiling))


def test_a_plan_is_a_value():
    """Made twice it is equal, hashable, and cannot be changed: caches keep plans by value."""
    first, second = make_plan(SM90[0].spec), make_plan(SM90[0].spec)
    assert first == second and hash(first) == hash(second) and first is not second
    with pytest.raises(AttributeError):
        first.template = "other"  # type: ignore[misc]
