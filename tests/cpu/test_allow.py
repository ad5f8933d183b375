"""Masks of expressions on the CPU: what is hidden, which tiles are passed by, dense and ragged, in both families."""

from __future__ import annotations

import pytest
import torch

from fa2gen import cases
from fa2gen.cpu import RunOptions, run_kernel
from fa2gen.options import Expression, Options, Shape
from fa2gen.plan import make_plan
from fa2gen.spec import KernelSpec, Problem, Tiling
from tests.cpu.faults import Fault, symptom
from tests.cpu.test_expression import ARCHES, SHAPE, SOFTCAP, kernel, run

WINDOW = "i - j < width"  # of 3 keys, the number that examples have: most tiles are hidden
STRIPES = "j % 7 != 2 or i // 16 == j // 16"
SQUARES = "(i // 40 + j // 40) % 3 != 1"
AHEAD = "j - i > 100"
CHECKERS = "(i // 64 + j // 80) % 2 == 0"  # each warpgroup sees every other block, where another sees the others
HEADS = "h % 2 == 0 and j <= i or j < 9"


@pytest.mark.parametrize(
    ("arch", "direction", "head_dim", "mask", "varlen", "score", "allow"),
    [
        ("sm80", "fwd", 64, "full", True, "", HEADS),
        ("sm80", "fwd", 72, "window", False, SOFTCAP, STRIPES),
        ("sm80", "bwd", 64, "causal", True, SOFTCAP, WINDOW),
        ("sm80", "bwd", 128, "full", False, "", SQUARES),
        ("sm90", "fwd", 64, "causal", True, SOFTCAP, STRIPES),
        ("sm90", "fwd", 128, "window", False, "", SQUARES),
        ("sm90", "fwd", 256, "causal", False, "", WINDOW),
        ("sm90", "bwd", 64, "full", False, "", HEADS),
        ("sm90", "bwd", 128, "causal", True, SOFTCAP, SQUARES),
        ("sm90", "bwd", 256, "full", False, "", STRIPES),
    ],
)
def test_what_an_expression_hides(arch, direction, head_dim, mask, varlen, score, allow):
    spec = kernel(arch, direction, head_dim, mask, score, allow=allow, varlen=varlen)
    verdict, _ = run(spec.name, SHAPE)
    assert verdict.ok, verdict


@pytest.mark.parametrize(("arch", "direction"), [("sm80", "fwd"), ("sm90", "bwd")])
def test_a_window_without_an_end(arch, direction):
    """The greatest number of 32 bits, which positions are compared with and nothing is taken from."""
    spec = kernel(arch, direction, 64, "full", "", allow="j <= i and (i - j < window or j < sinks)")
    expression = Expression("", spec.problem.allow, spec.problem.inputs, (2.0**31 - 1, 4.0))
    verdict, _ = run(spec.name, Shape(1, 150, 150, 1, 1), Options(expression=expression))
    assert verdict.ok, verdict


def test_warpgroups_skip_blocks_that_they_do_not_see():
    """In runs: half of a tile's products are left, as each block is half of the warpgroups', and the sums go on."""
    spec = kernel("sm90", "fwd", 128, "full", "", allow=CHECKERS)
    plain = KernelSpec(problem=Problem(head_dim=128), tiling=spec.tiling)
    made = {}
    for one in (spec, plain):
        case = cases.make(one, Shape(1, 384, 480, 1, 1), gain=4.0)
        counts = run_kernel(make_plan(one), case.tensors, case.options, run_options=RunOptions(stats=True)).counts
        assert cases.verdict(case).ok, one
        made[one] = counts["wgmma"].instructions
    assert 2 * made[spec] == made[plain]


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
@pytest.mark.parametrize("arch", ARCHES)
def test_tiles_of_other_documents_are_passed_by(arch, direction):
    """Of two documents as long as a tile half of the products of one document are made; of images between text, whose
    number is 0, those of the text before and of their own."""
    spec = kernel(arch, direction, 64, "full", "", allow="image[b, i] == image[b, j] and image[b, i] > 0 or j <= i")
    if arch == "sm90":
        queries = 128 if direction == "fwd" else 64  # more with a mask of three tensors need `lag`
        tiling = Tiling(arch=arch, tile_m=queries, tile_n=128, num_stages=2, num_mma_warps=8)
        spec = KernelSpec(problem=spec.problem, tiling=tiling)
    case = cases.make(spec, Shape(1, 512, 512, 1, 1))
    products = []
    for numbers in ([1, 1, 1, 1], [1, 1, 2, 2], [0, 1, 1, 0]):
        case.tensors["input_0"].copy_(torch.tensor(numbers).repeat_interleave(128))
        counts = run_kernel(make_plan(spec), case.tensors, case.options, run_options=RunOptions(stats=True)).counts
        products.append(counts["wgmma" if arch == "sm90" else "mma.sync"].instructions)
    assert [16 * count for count in products] == [count * products[0] for count in (16, 12, 11)]


@pytest.mark.parametrize("arch", ARCHES)
def test_rows_that_see_nothing(arch):
    """Whole tiles and single rows: no output, no gradient, no NaN."""
    for direction, results in (("fwd", ("o",)), ("bwd", ("dq", "dk", "dv"))):
        spec = kernel(arch, direction, 64, "full", "", allow="j // 64 == 1 and i % 3 == 0 and i > 40")
        verdict, tensors = run(spec.name, Shape(1, 150, 203, 2, 1))
        assert verdict.ok, verdict
        assert all(torch.isfinite(tensors[name]).all() for name in results)


@pytest.mark.parametrize("arch", ARCHES)
def test_the_order_is_kept_where_tiles_are_hidden(arch):
    """Deterministic gradients, whatever the schedule; no block of keys waits for one that nobody sees."""
    name = kernel(arch, "bwd", 64, "full", "", allow=SQUARES, deterministic=True).name
    verdict, first = run(name, SHAPE)
    _, again = run(name, SHAPE, seed=3, num_sms=3)
    assert verdict.ok, verdict
    assert all(torch.equal(first[x], again[x]) for x in ("dq", "dk", "dv"))


def test_shares_of_dq_come_in_any_order():
    """Two blocks of keys at once, of which the later one may come first to a block of queries."""
    spec = kernel("sm90", "bwd", 64, "full", "", allow=HEADS)
    assert spec.tiling.lag
    verdict, _ = run(spec.name, Shape(1, 300, 520, 2, 1), seed=1, num_sms=3)
    assert verdict.ok, verdict


NAMES = {
    (arch, direction): kernel(arch, direction, 128, "full", "", allow=AHEAD).name
    for arch in ARCHES
    for direction in ("fwd", "bwd")
}
DOCUMENTS = {
    arch: kernel(arch, "fwd", 64, "full", "", allow="document[b, i] == document[b, j]").name for arch in ARCHES
}
CAUSAL = kernel("sm90", "fwd", 64, "causal", "", allow=SQUARES).name
# Blocks of keys of one document, of which a warpgroup's rows see all or none.
TWO_DOCUMENTS = kernel("sm90", "fwd", 128, "causal", "", allow="document[b, i] == document[b, j]").name
LONG = SHAPE._replace(seqlen_q=200, seqlen_k=520)
SKIPPING = kernel("sm90", "fwd", 128, "full", "", allow=CHECKERS).name
FAULTS = [
    *(
        Fault("nothing-hidden", NAMES["sm80", direction], "allowed ? acc_s[n] : -kInfinity", "acc_s[n]")
        for direction in ("fwd", "bwd")
    ),
    Fault(
        "nothing-hidden", NAMES["sm90", "fwd"], "n % 32 & 1 ? acc_s[i] : -kInfinity", "n % 32 & 1 ? acc_s[i] : acc_s[i]"
    ),
    Fault("nothing-hidden", NAMES["sm90", "bwd"], ">> n & 1 ? acc_s[i] : -kInfinity", "& 1 ? acc_s[i] : acc_s[i]"),
    Fault("not-masked", CAUSAL, "seen[row][word] &= ~shift_left(0xffffffffu, max(end - 32 * word, 0));", ""),
    Fault("another-row-looked-up", NAMES["sm90", "fwd"], "row + 8 * half, column", "row, column"),
    Fault("what-another-warpgroup-sees", SKIPPING, "following >> 3 * warpgroup", "following >> 3"),
    Fault(
        "runs-begin-anew",
        SKIPPING,
        "correction, p.softmax_scale_log2) && is_begun) {",
        "correction, p.softmax_scale_log2) && false) {",
    ),
    *(
        Fault("keys-cut-short", name, "first_key + kTileN, at.seqlen_k) - 1", "first_key + 8, at.seqlen_k) - 1")
        for name in NAMES.values()
    ),
    *(Fault("another-block", NAMES[arch, "fwd"], "ahead + 32 - lane", "ahead + 31 - lane") for arch in ARCHES),
    Fault(
        "told-of-another-block",
        NAMES["sm90", "bwd"],
        "state.stage, query_block, m_block",
        "state.stage, query_block / 2 * 2, m_block",
    ),
    Fault("told-too-early", NAMES["sm90", "bwd"], "mbarrier_wait(barriers.visit_full(state.stage), state.phase);", ""),
    *(Fault("walk-too-far", NAMES[arch, "bwd"], "lowest_bit(any) : known", "known : known") for arch in ARCHES),
    Fault("alike-for-another-row", TWO_DOCUMENTS, "of_both >> 8 * half & 1", "of_both & 1"),
    Fault(
        "alike-where-all-see", TWO_DOCUMENTS, "& 1) != 0 ? 0xffffffffu : 0;", "& 1) != 0 ? 0xffffffffu : 0xffffffffu;"
    ),
    Fault("alike-for-other-columns", TWO_DOCUMENTS, "[n % 3 + 1]) >> 2 * (lane_id() % 4);", "[n % 3 + 1]);"),
    Fault("answers-of-another-warpgroup", TWO_DOCUMENTS, "answers + 4 * kAnswerWords * warpgroup", "answers"),
    Fault(
        "queries-released-before-the-last-block",
        TWO_DOCUMENTS,
        "release_q_after(following == 0);\n                ahead",
        "release_q_after(true);\n                ahead",
    ),
    Fault("greatest-unknown", DOCUMENTS["sm90"], "highest = max(highest, x);", "", count=2),
    Fault("least-unknown", DOCUMENTS["sm80"], "lowest = min(lowest, x);", "", count=2),
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_fault_is_seen(fault):
    gain = 4.0 if fault.id == "runs-begin-anew" else 1.0  # maxima that rise by less are left as they are
    if not symptom(run, fault, [LONG if fault.kernel == TWO_DOCUMENTS else SHAPE], 0, gain=gain):
        pytest.fail("no run shows it")
