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
from typing import Any

import pytest

from fa2gen.arch import ARCHES
from fa2gen.catalog import catalogue, tuned_rows
from fa2gen.compile import Compiled, compile_kernel
from fa2gen.plan import KernelPlan, make_plan, tiling_for_rows
from fa2gen.report.sass import disassembler
from fa2gen.select import default_tiling, served_by
from fa2gen.spec import KernelSpec, Problem

HEAD_DIMS = range(8, 257, 8)
WIDEST_WITHOUT_R2UR = 160
"""Up to this head dim the loop's descriptors fit the uniform registers; above, a few are moved there each time."""


def default(
    arch: str, head_dim: int, dtype: str, mask: str, direction: str = "fwd", deterministic: bool = False, **fields: Any
) -> KernelSpec:
    problem = Problem(
        direction=direction, head_dim=head_dim, dtype=dtype, mask=mask, deterministic=deterministic, **fields
    )
    return KernelSpec(problem=problem, tiling=default_tiling(problem, arch))


def kernels() -> list[Any]:
    """Kernel names; those of the defaults beyond the catalogue are marked slow: together they take a minute."""
    written = [*catalogue()]
    tuned = [spec for rows in tuned_rows().values() for row in rows for spec in served_by(row)]
    # Of ragged ones and of sinks the catalogue's and the defaults below must do.
    written += [spec for spec in tuned if not spec.problem.varlen and not spec.problem.sink]
    every_other = HEAD_DIMS[::2]  # of full masks: the causal kernel of a head dim has all that the full one has
    beyond = [
        default(arch, head_dim, dtype, mask, direction)
        for direction in ("fwd", "bwd")
        for arch in ("sm90", "sm80")
        for dtype, mask, head_dims in (("bf16", "causal", HEAD_DIMS), ("fp16", "full", every_other))
        for head_dim in head_dims
    ]
    beyond += [default("sm90", head_dim, "bf16", "causal", "bwd", deterministic=True) for head_dim in HEAD_DIMS]
    beyond += [default("sm90", head_dim, "bf16", "full", "bwd", deterministic=True) for head_dim in every_other]
    beyond += [default("sm80", head_dim, "bf16", "causal", "bwd", deterministic=True) for head_dim in HEAD_DIMS]
    beyond += [
        default(arch, head_dim, dtype, "window")
        for arch in ("sm90", "sm80")
        for head_dim, dtype in zip(HEAD_DIMS, itertools.cycle(["bf16", "fp16"]), strict=False)
    ]
    beyond += [
        default(arch, head_dim, "bf16", "window", "bwd", deterministic)
        for arch in ("sm90", "sm80")
        for deterministic, head_dims in ((False, every_other), (True, (64, 80, 128, 192, 256)))
        for head_dim in head_dims
    ]
    beyond += [
        default(arch, head_dim, "bf16", mask, direction, varlen=True)
        for arch in ("sm90", "sm80")
        for direction, mask in (("fwd", "causal"), ("fwd", "window"), ("bwd", "causal"), ("bwd", "window"))
        for head_dim in (16, 80, 112, 128, 192, 256)
    ]
    beyond += [  # random bits are drawn beside all accumulators
        default(arch, head_dim, "bf16", mask, direction, dropout=True, sink=head_dim == 64, deterministic=deterministic)
        for arch in ("sm90", "sm80")
        for direction, deterministic in (("fwd", False), ("bwd", False), ("bwd", True))
        for mask, head_dims in (("causal", every_other), ("full", (32, 64, 128)), ("window", (64, 128, 256)))
        for head_dim in (head_dims if not deterministic else head_dims[:3])
    ]
    beyond += [  # a row's end and two small kernels have more to do, and loops what they have without
        default(arch, head_dim, dtype, mask, direction, sink=True)
        for arch in ("sm90", "sm80")
        for direction in ("fwd", "bwd")
        for head_dim, dtype, mask in ((64, "bf16", "window"), (112, "fp16", "causal"), (128, "bf16", "full"))
    ]
    beyond += [  # a cap, and slopes of heads
        default(arch, head_dim, "bf16", "causal", direction, score=score)
        for arch in ("sm90", "sm80")
        for direction in ("fwd", "bwd")
        for head_dim in (64, 128, 256)
        for score in ("cap * tanh(s / cap)", "s - slope[b, h] * abs(i + seqlen_k - seqlen_q - j)")
    ]
    beyond += [  # each element of dS goes to memory too
        default(arch, head_dim, "bf16", "causal", "bwd", score=score, learned="bias")
        for arch in ("sm90", "sm80")
        for head_dim in (64, 128, 256)
        for score in ("s + bias[b, h, i, j]", "s + bias[h, i - j]")
    ]
    of_v = [  # the largest that fit each way of splitting the work, beside what models have
        default(
            arch, head_dim, "bf16", mask, direction, head_dim_v=head_dim_v, varlen=arch == "sm90" and mask == "window"
        )
        for arch in ("sm90", "sm80")
        for direction in ("fwd", "bwd")
        for head_dim, head_dim_v in ((192, 128), (96, 64), (64, 128), (64, 256), (128, 168), (192, 136), (72, 184))
        for mask in ("causal", "window")
    ]
    beyond += of_v
    paged = [default(arch, d, "bf16", "window", "decode", paged=True) for arch in ARCHES for d in (8, 64, 72, 96, 128)]
    limits = {arch: of_arch.shared_memory_per_block for arch, of_arch in ARCHES.items()}
    wide = [
        KernelSpec(problem=x.problem, tiling=tiling_for_rows(x.problem, x.tiling, 32, limits[x.tiling.arch]))
        for x in paged
    ]
    beyond += [default(arch, d, "bf16", "window", "decode", paged=True) for arch in ARCHES for d in HEAD_DIMS] + wide
    quick = {default(arch, 128, "bf16", "causal").name for arch in ("sm90", "sm80")}
    quick |= {spec.name for spec in wide if spec.problem.head_dim in (72, 128)}
    quick |= {spec.name for spec in of_v if spec.problem.head_dim == 192 and spec.problem.mask == "causal"}
    quick |= {
        default(arch, head_dim, "bf16", "window").name for arch in ("sm90", "sm80") for head_dim in (80, 192, 256)
    }
    quick |= {
        default(arch, head_dim, "bf16", "window", "bwd", deterministic=True).name
        for arch in ("sm90", "sm80")
        for head_dim in (80, 192)
    }
    quick |= {default("sm80", head_dim, "bf16", "causal", "bwd").name for head_dim in (64, 128, 256)}
    quick |= {default("sm90", head_dim, "bf16", "full", "bwd", deterministic=True).name for head_dim in (128, 256)}
    quick.add(default("sm80", 128, "bf16", "causal", "bwd", deterministic=True).name)
    found = in_turns(written)
    names = {spec.name for spec in written}
    slow = [name for name in in_turns(beyond) if name not in names]
    return [*found, *(pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in slow)]


def in_turns(specs: Iterable[KernelSpec]) -> list[str]:
    """Their names, but of two that differ in dtype alone one: bf16's and fp16's take turns. Their instructions are the
    same but for the type, and so were the registers of the main kernels of 16 of 16 pairs."""
    pairs: dict[KernelSpec, set[str]] = {}
    for spec in specs:
        plain = KernelSpec(problem=spec.problem.model_copy(update={"dtype": "bf16"}), tiling=spec.tiling)
        pairs.setdefault(plain, set()).add(spec.name)
    return [sorted(names)[number % len(names)] for number, names in enumerate(pairs.values())]


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
    text = subprocess.run([str(disassembler()), "-c", str(path)], capture_output=True, text=True, check=True).stdout
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
    """The loops over blocks of keys: both products, each waited for once."""
    products = plan.qk.num_k_steps + plan.num_k_steps_pv
    return [
        loop
        for loop in sass.loops()
        if sum(line.startswith("HGMMA") for line in loop) == products
        and [line for line in loop if line.startswith("WARPGROUP")] == ["WARPGROUP.ARRIVE"] * 2 + [WAIT_S, WAIT_O]
    ]


def check_sm90(plan: Any, sass: Sass) -> None:
    for opcode in ("HGMMA", "UTMALDG", "UTMASTG", "SYNCS", "USETMAXREG"):
        assert sass.opcodes[opcode], f"no {opcode}: {sass.opcodes.most_common(12)}"
    loops = main_loops(plan, sass)
    assert len(loops) == 1 + plan.right_edge + plan.left_edge, "masked at the right, unmasked, masked at the left"
    for loop in loops:
        exponentials = [i for i, line in enumerate(loop) if line.startswith("MUFU.EX2")]
        # What the release of K that depends on the row sums is for (templates/sm90/fwd.cu.j2): 5% at d = 64.
        assert loop.index(WAIT_S) < exponentials[0], "the softmax starts when S is there"
        assert loop.index(WAIT_O) > exponentials[-1], (
            "ptxas waits for P V before the exponentials: nothing runs under them"
        )
        moves = sum(line.startswith("R2UR") for line in loop)
        widest = max(plan.head_dim, plan.head_dim_v)
        assert moves <= (0 if widest <= WIDEST_WITHOUT_R2UR else 12), f"{moves} R2UR in the loop"
    if (plan.head_dim, plan.head_dim_v, plan.tile_n) == (128, 128, 128):
        # 585 with descriptor arithmetic in bytes instead of 16-byte units. Behind branches the loop holds what a block
        # does whose maximum has risen (24), and the 64 subtractions of one whose scores are large.
        assert min(map(len, loops)) <= 550 + 25 * plan.tiling.lazy_rescale


ARRIVES = r"ATOM\S*\.STRONG\.GPU"

# A turn (templates/common/turns.cuh.j2): its acquire and its release, which no mma warp waits for.
ORDER_BETWEEN_BLOCKS = (r"LD\S*\.STRONG\.GPU", r"MEMBAR\S*\.GPU", r"ST\S*\.STRONG\.GPU")


# griddepcontrol.wait and griddepcontrol.launch_dependents
WAIT_FOR_GRID, LAUNCH_DEPENDENTS = "ACQBULK", "PREEXIT"


def check_early_starts(plan: Any, sass: Sass) -> None:
    """Each kernel lets the next one start, and waits for the one before ahead of its first access to what it wrote."""

    def first(code: tuple[str, ...], *opcodes: str) -> int:
        return next(i for i, line in enumerate(code) if line.startswith(opcodes))

    *prepare, before, main, behind = (sass.kernel(entry.symbol) for entry in plan.entry_points)
    for code in (*prepare, before, main):
        assert code.count(LAUNCH_DEPENDENTS) == 1
    assert LAUNCH_DEPENDENTS not in behind
    assert WAIT_FOR_GRID not in (prepare[0] if prepare else before)
    assert not prepare or first(before, WAIT_FOR_GRID) < first(before, "LDG")
    assert first(before, LAUNCH_DEPENDENTS) < first(before, "LDG")
    assert first(behind, WAIT_FOR_GRID) < first(behind, "LDG")
    # The mma warps, the producer behind its load of K, and the thread that adds dQ; a peeled loop may have another.
    assert main.count(WAIT_FOR_GRID) >= 2 + plan.writes_dq
    assert WAIT_FOR_GRID in main[first(main, "UTMALDG") : first(main, "UBLKCP")]


def check_sm90_bwd(plan: Any, sass: Sass) -> None:
    check_early_starts(plan, sass)
    adds = "UBLKRED" if plan.stages_dq else "REDG"
    for opcode in ("HGMMA", "UTMALDG", "UBLKCP", "UTMASTG", "SYNCS", "USETMAXREG", "STSM", adds):
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
    elif plan.has_dq_rest:
        wanted = [(s + dp + 2 * dkv + 2 * dq, [1, 0, 0, 1, 0])]
    else:
        wanted = [(s + dp + 2 * dkv + dq, [1, 0, 1, 1, 0])]
    # Addresses and descriptors stay uniform; but for the parity of a step where turns need uniform registers too.
    moved = int(plan.passes_p and plan.deterministic)
    loops = [loop for loop in sass.loops() if any(line.startswith("HGMMA") for line in loop)]
    for loop in loops:
        # No stage is released by an arrival that may overtake loads of row statistics from it: their use comes first,
        # by a product or by a store of what was made of them.
        uses = ("HGMMA", "STSM", "LDS", "SYNCS.ARRIVE")
        kinds = [kind for line in loop for kind in uses if line.startswith(kind)]
        assert ("LDS", "SYNCS.ARRIVE") not in itertools.pairwise(kinds), "a stage is released while it is being read"
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
    products = plan.num_row_tiles * (plan.qk.num_k_steps * plan.tile_n + plan.num_k_steps_pv * plan.head_dim_v) // 8
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
    loads = 2 * plan.qk.num_panels * plan.tile_n // plan.copy_rows
    assert sum(line.startswith("LDGSTS") for line in main) <= 2 * loads + 4, "K and V in two places, Q in one"
    if plan.head_dim <= 128 and plan.tile_m == 16:
        assert len(main) < 3300


# Kernels -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", kernels())
def test_kernel(name, compiled, tmp_path):
    plan, kernel = plan_of(name), compiled(name)
    report = kernel.report
    assert (report.spill_store_bytes, report.spill_load_bytes, report.stack_bytes) == (0, 0, 0)
    assert report.notes == (), "C75xx: wgmma was serialised or setmaxnreg ignored; or a warning"
    assert report.shared_memory_bytes == plan.shared_memory_bytes
    assert set(report.registers_of) == {entry.symbol for entry in plan.entry_points}
    assert max(report.registers_of.values()) == report.registers == report.registers_of[name]
    # All of a block's registers at its launch, and of as many blocks as are to share an SM.
    per_thread = ARCHES[plan.arch].registers_per_sm // (plan.num_threads * plan.min_ctas_per_sm)
    assert report.registers <= min(per_thread // 8 * 8, 255)
    assert report.compile_seconds < 30
    if disassembler() is None:
        pytest.skip("compiled as it should; needs nvdisasm to read its SASS (pip install nvidia-cuda-nvdisasm)")
    sass = sass_of(kernel.cubin, tmp_path)
    assert not sass.opcodes["LDL"] and not sass.opcodes["STL"], "local memory"
    for entry in plan.entry_points:
        calls = [line for line in sass.kernel(entry.symbol) if line.startswith("CALL") and ".L_x_" not in line]
        # ptxas shuffles by a call in loops of which it does not see that warps do them together: a few times a launch.
        if entry in plan.prepare_entries or plan.problem.direction == "decode":
            calls = [line for line in calls if "shflsync" not in line]
        assert not calls, "a function that was not inlined"  # .L_x_: ptxas's own jumps
    checks = {
        "fwd": {"sm80": check_sm80, "sm90": check_sm90},
        "bwd": {"sm80": check_sm80_bwd, "sm90": check_sm90_bwd},
        "decode": {"sm80": check_decode, "sm90": check_decode},
    }
    checks[plan.problem.direction][plan.arch](plan, sass)


@pytest.mark.skipif(disassembler() is None, reason="needs nvdisasm to read SASS (pip install nvidia-cuda-nvdisasm)")
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_a_ragged_batch_has_the_loops_of_a_dense_one(mask, tmp_path):
    ragged = default("sm90", 128, "bf16", mask, varlen=True)
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
        default("sm80", head_dim, "bf16", mask, way).name
        for way, mask in itertools.product(("fwd", "bwd"), ("causal", "window"))
        for head_dim in HEAD_DIMS[::2]
    ],
)
def test_sm80_kernels_for_hopper(name):
    """On request they serve 9.0 too, where ptxas allocates registers anew."""
    report = compile_kernel(plan_of(name), "sm_90").report
    assert (report.spill_bytes, report.stack_bytes, report.notes) == (0, 0, ())
