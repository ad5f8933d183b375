"""Every kernel that users get, compiled: no spill, no stack frame, nothing that ptxas gave up on, and SASS as meant.

In one dtype or the other. The catalogue, what was tuned, and the default of every head dim, for both architectures.
NVRTC needs no GPU; two compile at once. What SASS is asked for are the few facts that a template's comments rest on,
which ptxas grants or takes back silently.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest

from fa2gen.arch import ARCHES, ArchName
from fa2gen.catalog import catalogue, tuned_rows
from fa2gen.compile import Compiled, compile_kernel
from fa2gen.expression.examples import EXAMPLES
from fa2gen.groups import with_groups
from fa2gen.launch import TILES_OF_FEW
from fa2gen.plan import KernelPlan, make_plan, tiling_for_rows
from fa2gen.report.sass import disassembler
from fa2gen.select import default_tiling, served_by
from fa2gen.spec import Direction, KernelSpec, Mask, Problem, declared

HEAD_DIMS = range(8, 257, 8)
WIDEST_WITHOUT_R2UR = 160
"""Up to this head dim the loop's descriptors fit the uniform registers; above, a few are moved there each time."""


def default(arch: ArchName, head_dim: int, mask: Mask, direction: Direction = "fwd", **fields: Any) -> KernelSpec:
    """The default kernel of a problem, in bf16 where no dtype is given."""
    problem = Problem(direction=direction, head_dim=head_dim, mask=mask, **fields)
    return KernelSpec(problem=problem, tiling=default_tiling(problem, arch))


WAYS = [(arch, direction) for arch in ARCHES for direction in get_args(Direction)]
BOTH_PASSES = [way for way in WAYS if way[1] != "decode"]
CONVERTED_ON_SM90 = ("sm80", "e4m3")
"""Of this type sm80 has no instruction: its kernels are refused."""
ENDS = (64, 256)
"""A feature is compiled at or below the first head dim, and at the last."""


def turns(values: Iterable[Any], *others: Any) -> Iterator[tuple[Any, ...]]:
    """Each of the values with one of each of the others, which take turns."""
    return zip(values, *map(itertools.cycle, others), strict=False)


@functools.cache
def kernels() -> dict[str, bool]:
    """Kernel names, and whether each is of the few that are compiled where slow tests are left out.

    Pairs rather than products: each tiling that is written or was tuned once, for one of the problems that share it;
    each head dim of each family in one of the passes, and each fourth one in both, with the order of sums, too, with
    another mask each time; each feature at the ends of head dim, where models are and where the work is split in
    another way.
    """
    written = set(catalogue())
    tuned = [spec for rows in tuned_rows().values() for row in rows for spec in served_by(row)]
    # Of ragged ones and of sinks the catalogue's and the defaults below must do.
    written |= {spec for spec in tuned if not (spec.problem.varlen or spec.problem.sink)}
    plain = [
        default(arch, head_dim, mask, direction, dtype=dtype, deterministic=deterministic)
        for turn, (arch, direction) in enumerate(BOTH_PASSES)
        for deterministic, head_dims, masks in (
            (False, sorted({*HEAD_DIMS[turn % 2 :: 2], *HEAD_DIMS[3::4]}), ("causal", "window")),
            (True, HEAD_DIMS[3::4], ("window", "causal")),  # 32, 64 and so on, which models have
        )
        for head_dim, dtype, mask in turns(head_dims, ("bf16", "bf16", "fp16", "fp16"), masks)
        if direction == "bwd" or not deterministic
    ]
    features = [
        default(arch, head_dim, mask, direction, **{feature: True})
        for arch, direction in BOTH_PASSES
        for feature, head_dims in (
            ("varlen", (64, 80, 192, 128, 112, 256)),  # of 256 the full mask, which spilled
            ("sink", (64, 128, 256)),  # a row's end and two small kernels have more to do, and loops no more
            ("dropout", (8, 40, 72, 128, 144, 168, 200, 256)),  # random bits are drawn beside all accumulators
        )
        for head_dim, mask in turns(head_dims, ("causal", "window", "full"))
    ]
    features += [
        default(arch, head_dim, mask, direction, partial=True, varlen=mask == "window")
        for arch, direction in BOTH_PASSES
        for head_dim, mask in ((64, "window"), (256, "full"))
    ]
    features += [with_groups(make_plan(default("sm90", d, "full", "bwd", partial=True)), 4).spec for d in (128, 192)]
    features += [  # as ragged batches of grouped heads run
        with_groups(make_plan(default("sm90", head_dim, mask, "bwd", varlen=True)), 1, abreast=True).spec
        for head_dim, mask in ((128, "causal"), (256, "full"))
    ]
    features += [  # as few blocks of keys run, or the last of many
        with_groups(make_plan(default("sm90", head_dim, mask, "bwd", **more)), tail=3).spec
        for head_dim, mask, more in (
            (64, "full", {}),
            (128, "causal", {}),
            (128, "full", {"dropout": True}),
            (160, "window", {}),
            (192, "full", {"partial": True}),
            (256, "full", {}),
            (256, "causal", {"deterministic": True}),
        )
    ]
    features += [  # as many blocks of keys run
        with_groups(make_plan(default("sm90", head_dim, mask, "bwd", dtype=dtype)), 1, in_turn=True).spec
        for head_dim in (64, 96)
        for mask, dtype in (("full", "bf16"), ("causal", "fp16"), ("window", "bf16"))
    ]
    features += [
        with_groups(make_plan(default("sm90", head_dim, "causal", "bwd", score=score)), 1, in_turn=True).spec
        for head_dim, score in ((96, "cap * tanh(s / cap)"), (64, "s - slope[b, h] * abs(i + seqlen_k - seqlen_q - j)"))
    ]
    features += [
        default(arch, head_dim, mask, "bwd", dropout=True, **more)
        for arch in ARCHES
        for head_dim, mask, more in (
            (64, "window", {"sink": True, "deterministic": True}),
            (128, "causal", {"score": "cap * tanh(s / cap)", "deterministic": True}),
            (256, "window", {"deterministic": True}),
        )
    ]
    features += [
        default(arch, head_dim, mask, **expression)
        for arch in ARCHES
        for mask, head_dims, expression in (
            ("causal", (64, 256), {"score": "cap * tanh(s / cap)"}),
            ("causal", (64, 128, 256), {"score": "s - slope[b, h] * abs(i + seqlen_k - seqlen_q - j)"}),
            ("causal", (64, 72), {"score": "cap * tanh((s + bias[b, h, i, j]) / cap)"}),
            ("causal", (64, 128), {"score": "s + bias[h, bucket[j - i + seqlen_q - 1]]"}),
            ("full", (64, 256), {"allow": "j <= i and (i - j < window or j < sinks)"}),
            ("causal", (64, 128), {"allow": "document[b, i] == document[b, j]"}),  # numbers of a block's keys
        )
        for head_dim in head_dims
    ]
    features += [
        default(arch, head_dim, mask if one.score else "full", "bwd", score=one.score, allow=one.allow, varlen=varlen)
        for (one, arch), varlen, head_dim, mask in turns(
            itertools.product(EXAMPLES.values(), ARCHES),
            (False, True, True, False),
            (64, 128, 64, 256, 72),
            ("causal", "full"),
        )
    ]
    features += [  # each element of dS goes to memory too
        default(arch, head_dim, "causal", "bwd", score=score, learned="bias", varlen=head_dim == 64)
        for arch in ARCHES
        for head_dim, score in turns((64, 128, 256), ("s + bias[b, h, i, j]", "s + bias[h, i - j]"))
    ]
    of_v = [  # the largest that fit each way of splitting the work, beside what models have
        default(arch, d, mask, direction, head_dim_v=v, varlen=arch == "sm90" and mask == "window")
        for arch, direction in BOTH_PASSES
        for (d, v), mask in turns(
            ((192, 128), (96, 64), (64, 128), (64, 256), (128, 168), (192, 136), (72, 184)), ("causal", "window")
        )
    ]
    features += [
        default(arch, head_dim, "causal", "decode", **fields)
        for arch in ARCHES
        for head_dim in ENDS
        for fields in (
            {"sink": True, "score": "cap * tanh(s / cap)", "dtype": "fp16"},
            {"allow": "j <= i and (i - j < window or j < sinks)", "paged": True},
            {"cache_dtype": "int8"},
            {"cache_dtype": "e4m3", "dtype": "fp16", "paged": True},
        )
        if (arch, fields.get("cache_dtype")) != CONVERTED_ON_SM90
    ]
    paged = [
        default(arch, head_dim, "window", "decode", paged=True)
        for number, arch in enumerate(ARCHES)
        for head_dim in {*HEAD_DIMS[2 * number :: 8], 64, 256}
    ]
    paged += [
        default(arch, head_dim, mask, varlen=True, paged=True)
        for arch, mask, head_dims in (("sm80", "window", (64, 72, 112, 160, 256)), ("sm90", "causal", (64, 128, 256)))
        for head_dim in head_dims
    ]
    paged += [
        tile.spec(make_plan(default("sm90", head_dim, "causal", varlen=True, paged=True)), bool(number))
        for head_dim, (_, tiles) in TILES_OF_FEW.items()
        for number, tile in enumerate(tiles)
    ]
    paged += [
        KernelSpec(problem=spec.problem, tiling=spec.tiling.model_copy(update={"split_keys": 1, "pack_heads": heads}))
        for head_dim, mask, heads in turns((64, 96, 128, 192, 256), ("window", "full", "causal"), (0, 1))
        for spec in (default("sm90", head_dim, mask, varlen=True, paged=True),)
    ]
    paged.append(default("sm90", 64, "full", varlen=True, paged=True, allow="document[b, i] == document[b, j]"))
    row_by_row = [
        KernelSpec(problem=spec.problem, tiling=spec.tiling.model_copy(update={"page_rows": 1, "pack_heads": heads}))
        for head_dim, mask, heads in turns((16, 64, 72, 96, 128, 192, 256), ("window", "full", "causal"), (0, 1))
        for spec in (default("sm90", head_dim, mask, varlen=True, paged=True),)
    ]
    wide = [
        KernelSpec(problem=spec.problem, tiling=tiling_for_rows(spec.problem, spec.tiling, 32, limit))
        for arch, limit in ((arch, of_arch.shared_memory_per_block) for arch, of_arch in ARCHES.items())
        for spec in (
            default(arch, head_dim, "window", "decode", paged=True)
            for head_dim in ((8, 64, 96) if arch == "sm80" else (64, 72, 128))
        )
    ]
    quick = in_turns(written)
    slow = [spec.name for spec in (*plain, *features, *of_v, *paged, *row_by_row, *wide) if spec not in written]
    quick |= {name for name in slow if {"d128", "d192"} & {*name.split("_")} and "drop" not in name}
    return {name: name in quick for name in sorted({*quick, *slow})}


def in_turns(specs: Iterable[KernelSpec]) -> set[str]:
    """Their names, but one only of those that a tiling serves in both dtypes, full and causal, ordered or not.

    These take turns: a full mask's kernel has nothing that the causal one has not, and in dtypes the instructions are
    the same but for the type, and so were the registers of the main kernels of 16 of 16 pairs.
    """
    shared: dict[KernelSpec, set[str]] = {}
    for spec in specs:
        plain = spec.problem.model_copy(update={"dtype": "bf16", "deterministic": False})
        if plain.mask == "full":
            plain = plain.model_copy(update={"mask": "causal"})
        shared.setdefault(KernelSpec(problem=plain, tiling=spec.tiling), set()).add(spec.name)
    groups = sorted(sorted(names) for names in shared.values())
    return {names[number % len(names)] for number, names in enumerate(groups)}


@functools.cache
def plan_of(name: str) -> KernelPlan:
    return make_plan(KernelSpec.from_name(name))


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> Iterator[Callable[[str], Compiled]]:
    """name -> Compiled. Two threads work ahead of the tests, in their order; under xdist the workers are the two."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        yield lambda name: compile_kernel(plan_of(name))
        return
    items = [item for item in request.session.items if getattr(item, "originalname", "") == "test_kernel"]
    names = [item.callspec.params["name"] for item in items]  # type: ignore[attr-defined]
    pool = ThreadPoolExecutor(2)
    pending: dict[str, Future[Compiled]] = {name: pool.submit(compile_kernel, plan_of(name)) for name in names}
    yield lambda name: pending.pop(name).result()
    pool.shutdown(cancel_futures=True)


# SASS ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sass:
    """A source's instructions, `OPCODE operands`, and the index that each label stands for, and each kernel's name."""

    code: tuple[str, ...]
    labels: dict[str, int]

    def kernel(self, symbol: str) -> tuple[str, ...]:
        """The instructions of one of several kernels."""
        first = self.labels[symbol]
        behind = [at for label, at in self.labels.items() if at > first and not label.startswith(".L_x_")]
        return self.code[first : min(behind, default=len(self.code))]

    @functools.cached_property
    def opcodes(self) -> Counter[str]:
        return Counter(re.split(r"[. ]", line)[0] for line in self.code)

    def loops(self) -> Iterator[tuple[str, ...]]:
        """The instructions between each backward branch and its target."""
        for end, line in enumerate(self.code):
            target = re.search(r"`\((\.L_x_\d+)\)", line) if line.startswith("BRA") else None
            if target and self.labels.get(target[1], end + 1) <= end:
                yield self.code[self.labels[target[1]] : end + 1]


def sass_of(cubin: bytes, folder: Path) -> Sass:
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    # Without analysis of data flow, which says nothing of kernels without a branch stack, in 3/4 of the time.
    command = [str(disassembler()), "-c", "-ndf", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"(?:\.text\.(?=\w+:))?(\.L_x_\d+|\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z].*?)\s*;", line):
            code.append(instruction[1])
    return Sass(tuple(code), labels)


WAIT_S, WAIT_O = "WARPGROUP.DEPBAR.LE gsb0, 0x1", "WARPGROUP.DEPBAR.LE gsb0, 0x0"


def main_loops(plan: Any, sass: Sass) -> list[tuple[str, ...]]:
    """The loops over blocks of keys: both products, each waited for once. Those of a mask of an expression are one, of
    which each half has them."""
    products = plan.qk.num_k_steps + plan.num_k_steps_pv
    halves = 2 if plan.has_allow else 1
    found = [
        loop
        for loop in sass.loops()
        if sum(line.startswith("HGMMA") for line in loop) == halves * products
        and [line for line in loop if line.startswith("WARPGROUP")]
        == halves * (["WARPGROUP.ARRIVE"] * 2 + [WAIT_S, WAIT_O])
    ]
    if plan.has_allow:
        ((loop, middle),) = ((loop, loop.index(WAIT_O) + 1) for loop in found)
        return [loop[:middle], loop[middle:]]
    return found


def check_sm90(plan: Any, sass: Sass) -> None:
    for opcode in ("HGMMA", "UTMALDG", "STG" if plan.stores_sums else "UTMASTG", "SYNCS", "USETMAXREG"):
        assert sass.opcodes[opcode], f"no {opcode}: {sass.opcodes.most_common(12)}"
    loops = main_loops(plan, sass)
    edges = 1 if plan.has_allow else plan.right_edge + plan.left_edge
    ways = 2 if plan.is_capped else 1  # near 0, where no maximum is asked, and far
    assert len(loops) == ways * (1 + edges), "masked at the right, unmasked, masked at the left"
    for loop in loops:
        exponentials = [i for i, line in enumerate(loop) if line.startswith("MUFU.EX2")]
        # What the release of K that depends on the row sums is for (templates/sm90/fwd.cu.j2): 5% at d = 64.
        assert loop.index(WAIT_S) < exponentials[0], "the softmax starts when S is there"
        assert loop.index(WAIT_O) > exponentials[-1], (
            "ptxas waits for P V before the exponentials: nothing runs under them"
        )
        moves = sum(line.startswith("R2UR") for line in loop)
        widest = max(plan.head_dim, plan.head_dim_v)
        most = int(plan.has_allow or plan.has_row_terms or plan.is_capped)
        if plan.draws_in_softmax:  # the threshold's digits take 12 uniform registers
            most = 2
        if widest > WIDEST_WITHOUT_R2UR:
            most = 12 + 2 * (plan.has_allow or plan.paged)
        assert moves <= most, f"{moves} R2UR in the loop"
    if (plan.head_dim, plan.head_dim_v, plan.tile_n) == (128, 128, 128):
        # 585 with descriptor arithmetic in bytes instead of 16-byte units. Behind branches the loop holds what a block
        # does whose maximum has risen (24), and the 64 subtractions of one whose scores are large. Random bits: 185.
        assert min(map(len, loops)) <= 550 + 25 * plan.tiling.lazy_rescale + 190 * plan.dropout


ARRIVES = r"ATOM\S*\.STRONG\.GPU"

# A turn (templates/common/turns.cuh.j2): its acquire and its release, which no mma warp waits for.
ORDER_BETWEEN_BLOCKS = (r"LD\S*\.STRONG\.GPU", r"MEMBAR\S*\.GPU", r"ST\S*\.STRONG\.GPU")


# griddepcontrol.wait and griddepcontrol.launch_dependents
WAIT_FOR_GRID, LAUNCH_DEPENDENTS = "ACQBULK", "PREEXIT"


def check_early_starts(plan: Any, sass: Sass) -> None:
    """Each kernel lets the next one start, and waits for the one before ahead of its first access to what it wrote."""

    def first(code: tuple[str, ...], *opcodes: str) -> int:
        return next(i for i, line in enumerate(code) if line.startswith(opcodes))

    kernels = [sass.kernel(entry.symbol) for entry in plan.entry_points]
    of_parts = [kernels.pop()] if plan.has_parts else []
    *prepare, before, main, behind = kernels
    early = plan.finds_block_early
    for code in (*prepare, before, main):
        assert code.count(LAUNCH_DEPENDENTS) == (2 if early and code is before else 1)
    for code in (behind, *of_parts):
        assert LAUNCH_DEPENDENTS not in code
        # A ragged batch's bounds are the caller's: the sums of dQ come in whole vectors.
        assert first(code, WAIT_FOR_GRID) < first(code, "LDG.E.128" if code is behind and plan.varlen else "LDG")
    assert all(WAIT_FOR_GRID not in code for code in (*prepare, *(() if plan.varlen else (before,))))
    # Row statistics wait for the lists that the main kernel needs: before they let one start that asks at once, and
    # otherwise behind all that they do.
    if early:
        grids = [line for line in before if line in (WAIT_FOR_GRID, LAUNCH_DEPENDENTS)]
        # Blocks without queries wait and end, which lets the main kernel start, too.
        assert grids == [*[WAIT_FOR_GRID, LAUNCH_DEPENDENTS] * 2, WAIT_FOR_GRID]
    else:
        assert not plan.varlen or before[::-1].index(WAIT_FOR_GRID) < first(before[::-1], "STG", "LDG")
        assert first(before, LAUNCH_DEPENDENTS) < first(before, "LDG")
    # The mma warps, the producer behind its load of K, and the thread that adds dQ; a peeled loop may have another.
    assert main.count(WAIT_FOR_GRID) >= 2 + plan.writes_dq
    assert WAIT_FOR_GRID in main[first(main, "UTMALDG") : first(main, "UBLKCP")]


def check_sm90_bwd(plan: Any, sass: Sass) -> None:
    check_early_starts(plan, sass)
    adds = "UBLKRED" if plan.stages_dq else "REDG"
    stores = "STG" if plan.partial else "UTMASTG"
    for opcode in ("HGMMA", "UTMALDG", "UBLKCP", stores, "SYNCS", "USETMAXREG", "STSM", adds):
        assert sass.opcodes[opcode], f"no {opcode}: {sass.opcodes.most_common(12)}"
    if plan.deterministic:
        for pattern in ORDER_BETWEEN_BLOCKS:
            assert any(re.match(pattern, line) for line in sass.code), f"no {pattern}"
    s, dp, dkv, dq = plan.qk.num_k_steps, plan.vo.num_k_steps, plan.num_k_steps_m, plan.num_k_steps_n
    # The innermost loops: S, dP, dV, dQ and dK of one block of queries, each product there (ptxas drops one whose
    # result is not used) and waited for as the template does.
    if plan.passes_p:
        first, second = map(len, plan.dq_slices)
        dk, dv = plan.qk.num_panels * dkv, plan.vo.num_panels * dkv
        wanted = [(s + dv + first * dq, [0, 1] + [0] * first), (dp + dk + second * dq, [0, 1] + [0] * second)]
    elif plan.splits_products:
        slices = 2 if plan.has_dq_rest else 1
        wanted = [(s + dkv + slices * dq, [0, 1] + [0] * slices), (s + dp + dkv, [1, 0, 0])]
    elif plan.lags_dq:
        wanted = [(s + dp + 2 * dkv + dq, [*([] if plan.weighs_behind_dp else [1]), 0, 2, 1, 0])]
    elif plan.has_dq_rest:
        wanted = [(s + dp + 2 * dkv + 2 * dq, [1, 0, 0, 1, 0])]
    else:
        wanted = [(s + dp + 2 * dkv + dq, [1, 0, 1, 1, 0])]
    # Addresses and descriptors stay uniform; but for the parity of a step where turns need uniform registers too, and
    # for the numbers of an expression that says what is hidden, or of tensors that learn, and where counters begin, and
    # for where a head's number is, of a block of keys that shared memory names.
    one = (plan.passes_p and plan.deterministic) or bool(plan.learned) or (plan.is_persistent and plan.starts_at_terms)
    moved = 3 if plan.keeps_draws_of_keys else 2 if plan.has_allow or plan.shares_draws else int(one)
    loops = [loop for loop in sass.loops() if any(line.startswith("HGMMA") for line in loop)]
    for loop in loops:
        # Of the loop over blocks of keys, which has the last step's dQ beside, or with other warps' code in between.
        products = sum(line.startswith("HGMMA") for line in loop)
        is_other = products != wanted[0][0] or any(line.startswith(adds) for line in loop)
        if (plan.is_persistent or plan.tells_writers) and is_other:
            continue
        # No stage is released by an arrival that may overtake loads of row statistics from it: their use comes first,
        # by a product or by a store of what was made of them.
        uses = ("HGMMA", "STSM", "LDS", "SYNCS.ARRIVE")
        kinds = [kind for line in loop for kind in uses if line.startswith(kind)]
        # But one arrival where dQ lags: it lets the second warpgroup go on, and releases nothing.
        early = [*itertools.pairwise(kinds)].count(("LDS", "SYNCS.ARRIVE"))
        assert early <= plan.lags_dq, "a stage is released while it is being read"
    for count, waits in wanted:
        pattern = [f"WARPGROUP.DEPBAR.LE gsb0, 0x{n}" for n in waits]
        assert any(
            sum(line.startswith("HGMMA") for line in loop) == count
            and [line for line in loop if line.startswith("WARPGROUP.DEPBAR")] == pattern
            and sum(line.startswith("R2UR") for line in loop) <= moved
            and not any(re.match(pattern, line) for pattern in ORDER_BETWEEN_BLOCKS for line in loop)
            for loop in loops
        ), f"no loop with {count} HGMMA and the waits {waits}"


def check_sm80(plan: Any, sass: Sass) -> None:
    for opcode in ("HMMA", "LDSM", "LDGSTS", "LDGDEPBAR", "DEPBAR"):
        assert sass.opcodes[opcode], f"no {opcode}: {sass.opcodes.most_common(12)}"
    products = plan.num_row_tiles * plan.num_k_steps_pv * (16 * plan.qk.num_k_steps + plan.head_dim_v) // 8
    loops = [loop for loop in sass.loops() if sum(line.startswith("HMMA") for line in loop) >= products]
    assert loops, f"no loop with the {products} HMMA of one block"


def check_sm80_bwd(plan: Any, sass: Sass) -> None:
    for opcode in ("HMMA", "LDSM", "LDGSTS", "RED"):
        assert sass.opcodes[opcode], f"no {opcode}: {sass.opcodes.most_common(12)}"
    # Of one block of queries, each product there, and every fragment in shared memory read once by each warp.
    steps_s_dp = plan.qk.num_k_steps + plan.vo.num_k_steps
    s_dp = steps_s_dp * plan.queries_per_warp // 8
    dkv = plan.tile_m // 16 * 2 * sum(plan.num_column_steps_dkv(width) for width in (plan.qk, plan.vo))
    dq = plan.num_k_steps_n * 2 * plan.num_column_steps_dq
    products = plan.num_row_tiles * (s_dp + dkv) + plan.num_dq_row_tiles * dq
    of_peers = plan.num_row_tiles * (plan.tile_m - plan.queries_per_warp) // 16
    loads = plan.num_row_tiles * steps_s_dp + s_dp // 2 + 2 * of_peers + dkv // 2
    loads += plan.num_k_steps_n * plan.num_dq_row_tiles + dq // 2
    counts = [Counter(line.split(".")[0].split()[0] for line in loop) for loop in sass.loops()]
    assert any((c["HMMA"], c["LDSM"]) == (products, loads) for c in counts), (
        f"no loop with {products} HMMA and {loads} LDSM: {[(c['HMMA'], c['LDSM']) for c in counts]}"
    )


def check_decode(plan: Any, sass: Sass) -> None:
    """On both architectures; and a short call waits for its instructions as for its keys."""
    check_sm80(plan, sass)
    main = sass.kernel(plan.name)
    assert any(re.match(ARRIVES, line) for line in main), "no block tells the others that its part is done"
    loads = 2 * plan.qk.num_panels * plan.tile_n // plan.copy_rows + plan.paged  # and where keys are
    assert sum(line.startswith("LDGSTS") for line in main) == loads, "K and V in one place"
    if plan.head_dim <= 128 and plan.tile_m == 16:
        # A window's edges, in two places; and some 700 that put few parts of many rows together, past which a short
        # call goes.
        assert len(main) < 3400 + 300 * plan.has_allow + 800 * plan.left_edge


# Kernels -------------------------------------------------------------------------------------------------------------


def test_each_feature_is_compiled_at_the_ends_of_head_dim():
    """In each family and pass: what no test compiles may spill for its users."""
    found: dict[tuple[str, ...], set[int]] = {}
    for spec in map(KernelSpec.from_name, kernels()):
        for name, field in declared(Problem).items():
            value = getattr(spec.problem, name)
            if field.values or value != field.default:
                way = spec.tiling.arch, spec.problem.direction
                found.setdefault((*way, name, str(value if field.values else "")), set()).add(spec.problem.head_dim)
    for arch, direction in WAYS:
        for name, field in declared(Problem).items():
            if name in ("direction", "head_dim", "head_dim_v"):
                continue
            open_ = field.only_for is None or direction in field.only_for.directions
            for value in (field.values or ("",)) if open_ else ():
                if (arch, value) == CONVERTED_ON_SM90:
                    continue
                head_dims = found.get((arch, direction, name, str(value)), {0})
                assert min(head_dims) <= ENDS[0] and max(head_dims) == ENDS[1], (arch, direction, name, value)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if quick else pytest.mark.slow) for name, quick in kernels().items()]
)
def test_kernel(name, compiled, tmp_path):
    plan, kernel = plan_of(name), compiled(name)
    report = kernel.report
    assert (report.spill_store_bytes, report.spill_load_bytes, report.stack_bytes) == (0, 0, 0)
    assert report.notes == (), "C75xx: wgmma was serialised or setmaxnreg ignored; or a warning"
    assert report.shared_memory_bytes == plan.shared_memory_bytes
    assert set(report.registers_of) == {entry.symbol for entry in plan.entry_points}
    assert max(report.registers_of.values()) == report.registers <= 255
    # All of a block's registers at its launch, and of as many blocks as are to share an SM.
    per_thread = ARCHES[plan.arch].registers_per_sm // (plan.num_threads * plan.min_ctas_per_sm)
    assert report.registers_of[name] <= per_thread // 8 * 8
    assert report.compile_seconds < 30
    if disassembler() is None:
        pytest.skip("compiled as it should; needs nvdisasm to read its SASS (pip install nvidia-cuda-nvdisasm)")
    sass = sass_of(kernel.cubin, tmp_path)
    assert not sass.opcodes["LDL"] and not sass.opcodes["STL"], "local memory"
    for entry in plan.entry_points:
        calls = [line for line in sass.kernel(entry.symbol) if line.startswith("CALL") and ".L_x_" not in line]
        # ptxas shuffles by a call in loops of which it does not see that warps do them together: a few times a launch.
        if entry in plan.prepare_entries or plan.problem.direction == "decode":
            calls = [line for line in calls if "shflsync" not in line and "warpsync" not in line]
        if plan.problem.direction == "decode" and plan.sink and plan.has_score:  # what a sink is as a score, once a row
            calls = [line for line in calls if "div_rn" not in line]
        assert not calls, "a function that was not inlined"  # .L_x_: ptxas's own jumps
    checks = {
        "fwd": {"sm80": check_sm80, "sm90": check_sm90},
        "bwd": {"sm80": check_sm80_bwd, "sm90": check_sm90_bwd},
        "decode": {"sm80": check_decode, "sm90": check_decode},
    }
    checks[plan.problem.direction][plan.arch](plan, sass)


@pytest.mark.skipif(disassembler() is None, reason="needs nvdisasm to read SASS (pip install nvidia-cuda-nvdisasm)")
def test_a_ragged_batch_has_the_loops_of_a_dense_one(tmp_path):
    ragged = default("sm90", 128, "causal", varlen=True)
    dense = KernelSpec(problem=ragged.problem.model_copy(update={"varlen": False}), tiling=ragged.tiling)
    lengths = []
    for spec in (ragged, dense):
        plan = make_plan(spec)
        lengths.append([len(loop) for loop in main_loops(plan, sass_of(compile_kernel(plan).cubin, tmp_path))])
    assert len(lengths[0]) == len(lengths[1]) and sum(lengths[0]) <= 1.01 * sum(lengths[1])  # one or two moves


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *(
            default("sm80", head_dim, mask, direction).name
            for direction, head_dims in (("fwd", (8, 80, 160, 256)), ("bwd", (64, 112, 128, 192, 224)))
            for head_dim, mask in turns(head_dims, ("causal", "window"))
        ),
        *(default("sm80", head_dim, "full", "bwd").name for head_dim in (64, 120, 128, 192, 256)),
        # What is found late there (fa2gen/plan/sm80_bwd.py).
        default("sm80", 112, "window", "bwd", deterministic=True).name,
        *(
            default("sm80", head_dim, mask, "bwd", varlen=True).name
            for head_dim, mask in ((64, "window"), (80, "window"), (112, "causal"), (128, "full"))
        ),
        # What Hopper's shared memory has room for.
        *(
            KernelSpec(
                problem=problem, tiling=default_tiling(problem, "sm80", ARCHES["sm90"].shared_memory_per_block)
            ).name
            for problem in (
                *(Problem(head_dim=head_dim) for head_dim in (64, 128, 256)),
                *(Problem(head_dim=head_dim, mask="causal") for head_dim in (104, 128, 256)),
                Problem(head_dim=128, mask="causal", varlen=True),
                *(Problem(direction="bwd", head_dim=d, mask=mask) for d in (64, 256) for mask in ("full", "causal")),
                *(Problem(direction="bwd", head_dim=d, mask=mask) for d, mask in ((32, "full"), (48, "causal"))),
                Problem(direction="bwd", head_dim=256, mask="causal", deterministic=True),
            )
        ),
    ],
)
def test_sm80_kernels_for_hopper(name):
    """On request they serve 9.0 too, where ptxas allocates registers anew."""
    report = compile_kernel(plan_of(name), "sm_90").report
    assert (report.spill_bytes, report.stack_bytes, report.notes) == (0, 0, ())
