"""Context parallel: every pair of a query and a key is computed once, and processes together say what one says."""

from __future__ import annotations

import itertools
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fa2gen import InvalidInput, UnsupportedProblem
from fa2gen.distributed import context_parallel_attention, shard
from fa2gen.distributed.plan import Split, pieces_of
from fa2gen.features import key_range
from fa2gen.options import Options
from fa2gen.reference import (
    attention_backward_tiled,
    attention_reference,
    attention_tiled,
    check,
    check_gradients,
)

WORKER = Path(__file__).with_name("distributed_worker.py")
sys.path.insert(0, str(WORKER.parent))
from distributed_worker import inputs  # noqa: E402

WORLD = 4


# Which pairs a split computes ------------------------------------------------------------------------------------


def pairs_of(call, queries, keys):
    """(query, key) rows of the whole sequence that a call computes; queries and keys are those of its tensors."""
    left, right = call.window
    options = Options(window_left=left, window_right=right)
    found, q0, k0 = [], call.queries[0], call.keys[0]
    for num_queries, num_keys in call.lengths:
        for i in range(num_queries):
            first, end = key_range(options, num_queries, num_keys, i)
            found += [(queries[q0 + i], keys[k0 + j]) for j in range(first, end)]
        q0, k0 = q0 + num_queries, k0 + num_keys
    assert q0 <= call.queries[1] and k0 <= call.keys[1]
    return found


def rows_of(pieces):
    return [row for piece in pieces for row in range(piece.start, piece.end)]


@given(
    world=st.sampled_from([1, 2, 3, 4]),
    chunk=st.integers(1, 5),
    layout=st.sampled_from(["zigzag", "contiguous"]),
    ends=st.lists(st.integers(0, 40), max_size=5),
    packed=st.booleans(),
    window=st.tuples(st.integers(-1, 12), st.integers(-1, 12)),
)
def test_each_visible_pair_is_in_one_call(world, chunk, layout, ends, packed, window):
    rows = chunk * world * 2
    bounds = [0, *sorted(end for end in ends if end <= rows)] if packed else [0, rows]
    documents = tuple((a, b) for a, b in itertools.pairwise(bounds) if a < b)
    options = Options(window_left=window[0], window_right=window[1])
    expected = sorted(
        (start + i, start + j)
        for start, end in documents
        for i in range(end - start)
        for j in range(*key_range(options, end - start, end - start, i))
    )
    gathered, ring, in_calls = [], [], []
    for rank in range(world):
        split = Split(rank, world, rows, layout, documents, window)
        mine = rows_of(split.pieces(rank))
        for call in split.of_all_keys:
            gathered += pairs_of(call, mine, range(rows))
            in_calls += mine[slice(*call.queries)]
        for step in split.steps:
            other = (rank - step) % world
            for call in split.of_keys_from(other):
                ring += pairs_of(call, mine, rows_of(split.pieces(other)))
    assert sorted(gathered) == expected
    assert sorted(ring) == expected
    assert len(in_calls) == len(set(in_calls))  # all-gather stores results, and does not merge them
    assert sorted(pairs_of(split.whole, range(rows), range(rows))) == expected


def test_a_causal_step_is_one_kernel():
    """Zigzag: own rows are one causal call, others' one call without a mask, of half of the queries or of the keys."""
    split = Split(1, 4, 64, "zigzag", ((0, 64),), (-1, 0))
    calls = [split.of_keys_from(rank) for rank in range(4)]
    assert [len(found) for found in calls] == [1, 1, 1, 1]
    assert [found[0].is_full for found in calls] == [True, False, True, True]
    work = {rank: sum(map(work_of, Split(rank, 4, 64, "zigzag", ((0, 64),), (-1, 0)).of_all_keys)) for rank in range(4)}
    assert len(set(work.values())) == 1


def work_of(call):
    return len(pairs_of(call, range(64), range(64)))


def test_a_window_shortens_the_ring():
    window = Split(0, 8, 8 * 64, "contiguous", ((0, 8 * 64),), (100, 0))
    assert window.steps == (0, 1, 2)
    both = Split(0, 8, 8 * 64, "contiguous", ((0, 8 * 64),), (10, 10))
    assert both.steps == (0, 1, 7)
    documents = tuple((i * 32, i * 32 + 32) for i in range(16))
    assert Split(0, 8, 8 * 64, "contiguous", documents, (-1, -1)).steps == (0,)


# Processes --------------------------------------------------------------------------------------------------------


class Processes:
    """WORLD processes over gloo; a case runs in some of them, its members."""

    def __init__(self, meeting):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.started = [
            subprocess.Popen([sys.executable, str(WORKER), str(rank), str(WORLD), str(meeting)], **pipes)
            for rank in range(WORLD)
        ]

    def say(self, case):
        for process in self.started:
            pickle.dump(case, process.stdin)
            process.stdin.flush()

    def run(self, members, **case):
        """What each member answers."""
        self.say({"members": members, **case})
        answers = [pickle.load(self.started[rank].stdout) for rank in members]
        for answer in answers:
            assert not isinstance(answer, str), answer
        return answers

    def close(self):
        self.say(None)
        for process in self.started:
            assert process.wait(30) == 0


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    running = Processes(tmp_path_factory.mktemp("processes") / "meeting")
    try:
        yield running
        running.close()
    finally:
        for process in running.started:
            process.kill()


def whole(parts, layout, dim):
    """The tensor of which each process has a part."""
    world, rows = len(parts), parts[0].shape[dim] * len(parts)
    every = [(p, part) for rank, part in enumerate(parts) for p in pieces_of(rank, world, rows, layout)]
    every.sort(key=lambda found: found[0].start)
    return torch.cat([part.narrow(dim, p.at, p.end - p.start) for p, part in every], dim)


ALL, PAIR = [0, 1, 2, 3], [1, 3]
PACKED = [0, 50, 50, 111, 190, 193, 260]  # of 272 rows: padding at the end, a document without rows, cut ones
CASES = {
    "ring": (ALL, {"sizes": (2, 272, 4, 2), "head_dim_v": 48}, {"causal": True, "scheme": "ring"}),
    "allgather": (ALL, {"sizes": (2, 272, 4, 2)}, {"causal": True, "scheme": "allgather", "head_stride": 1}),
    "ulysses": (
        PAIR,
        {"sizes": (2, 272, 8, 4), "head_dim_v": 16},
        {"causal": True, "scheme": "ulysses", "head_stride": 1},
    ),
    "ring full": (PAIR, {"sizes": (1, 134, 2, 1)}, {"scheme": "ring", "layout": "contiguous", "softmax_scale": 0.3}),
    "allgather full": ([0, 2, 3], {"sizes": (1, 129, 2, 2)}, {"scheme": "allgather", "layout": "contiguous"}),
    "ring window": (ALL, {"sizes": (1, 272, 2, 1)}, {"window_size": (40, 20), "scheme": "ring"}),
    "allgather window": (PAIR, {"sizes": (1, 272, 2, 1)}, {"window_size": (40, 20), "scheme": "allgather"}),
    "auto window": (ALL, {"sizes": (1, 272, 2, 2)}, {"causal": True, "window_size": (40, -1), "layout": "contiguous"}),
    "ring packed": (ALL, {"sizes": (1, 272, 4, 2), "cu_seqlens": PACKED}, {"causal": True, "scheme": "ring"}),
    "allgather packed": (
        *(PAIR, {"sizes": (1, 272, 4, 2), "cu_seqlens": PACKED, "head_dim_v": 16}),
        {"window_size": (30, 9), "scheme": "allgather"},
    ),
    "ulysses packed": (PAIR, {"sizes": (1, 272, 4, 2), "cu_seqlens": PACKED}, {"causal": True, "layout": "contiguous"}),
}


def results(processes, members, case, options):
    """(out, lse, dq, dk, dv) of all rows, and what is summed over processes."""
    answers = processes.run(members, options=options, **case)
    layout = options.get("layout", "zigzag")
    at = 0 if "cu_seqlens" in case else 1
    of_rows = [at, answers[0][1].dim() - 1, at, at, at]
    parts = list(zip(*answers, strict=True))
    found = [whole(part, layout, dim) for part, dim in zip(parts, of_rows, strict=False)]
    return found, [sum(part) for part in parts[5:]]


def documents(case, tensors):
    """Dense tensors of each document: a batch that is not packed is one."""
    if "cu_seqlens" not in case:
        return [tensors]
    spans = [(a, b) for a, b in itertools.pairwise(case["cu_seqlens"]) if a < b]
    return [[x[None, a:b] if x.dim() == 3 else x[None, :, a:b] for x in tensors] for a, b in spans]


@pytest.mark.parametrize("name", CASES)
def test_processes_say_what_one_says(processes, name):
    members, case, options = CASES[name]
    (out, lse, *gradients), _ = results(processes, members, case, options)
    said = options_of(options)
    for q, k, v, dout, dlse, one_out, one_lse, *of_one in documents(case, [*inputs(case), out, lse, *gradients]):
        verdict = check(one_out, one_lse, q, k, v, **said)
        assert verdict.ok, verdict
        verdict = check_gradients(tuple(of_one), dout, q, k, v, dlse=dlse, **said)
        assert verdict.ok, verdict
    if "cu_seqlens" in case:
        end = case["cu_seqlens"][-1]
        assert torch.isneginf(lse[:, end:]).all()
        assert not any(x[end:].any() for x in (out, *gradients))


def options_of(options):
    left, right = options.get("window_size", (-1, -1))
    kept = {name: options[name] for name in ("causal", "softmax_scale") if name in options}
    return {"window_left": left, "window_right": right, **kept}


def test_results_are_the_same_bits_in_every_run(processes):
    members, case, options = CASES["ring"]
    for scheme in ("ring", "allgather"):
        said = {**options, "scheme": scheme, "deterministic": True}
        runs = [results(processes, members, case, said)[0] for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("members", "case", "options"),
    [
        (PAIR, {}, {"scheme": "ring"}),
        (ALL, {}, {"scheme": "ring"}),
        (ALL, {}, {"scheme": "ring", "window_size": (150, 0)}),
        (PAIR, {"cu_seqlens": [0, 300, 512]}, {"scheme": "ring"}),
        (ALL, {"sinks": True}, {"scheme": "ring"}),
        (ALL, {"sinks": True}, {"scheme": "allgather"}),
        (PAIR, {"sinks": True}, {"scheme": "ulysses"}),
    ],
    ids=["2", "4", "4 window", "2 packed", "4 sinks", "allgather sinks", "ulysses sinks"],
)
def test_merged_results_are_as_exact_as_one_call(processes, members, case, options):
    """Parts are in fp32. Rounded to bf16 before they were merged, the mean error was 1.2 to 1.5 times that of one."""
    case, options = {"sizes": (1, 512, 4, 2), **case}, {"causal": True, **options}
    (out, _, *gradients), _ = results(processes, members, case, options)
    said = options_of(options)
    if "sinks" in case:
        said["s_aux"] = torch.linspace(-1, 2, 4)
    for q, k, v, dout, dlse, *merged in documents(case, [*inputs(case), out, *gradients]):
        leaves = [x.double().requires_grad_() for x in (q, k, v)]
        exact, exact_lse = attention_reference(*leaves, **said)
        exact_gradients = torch.autograd.grad([exact, exact_lse], leaves, [dout.double(), dlse.double()])
        one, lse = attention_tiled(q, k, v, **said)
        without_sink = {name: value for name, value in said.items() if name != "s_aux"}
        of_one = attention_backward_tiled(dout, q, k, v, one, lse, dlse, **without_sink)
        for of_all, by_one, right in zip(merged, (one, *of_one), (exact, *exact_gradients), strict=True):
            errors = [(x.double() - right).abs().mean() for x in (of_all, by_one)]
            assert errors[0] <= 1.02 * errors[1]


@pytest.mark.parametrize("scheme", ["ring", "allgather", "ulysses"])
@pytest.mark.parametrize("packed", [False, True])
def test_sinks(processes, scheme, packed):
    """Attention with a key more, of score s_aux and value 0: what its definition says, in fp64. Padding has no sink."""
    rows = 132
    case = {"sizes": (1, 136 if packed else rows, 4, 2), "sinks": True} | ({"cu_seqlens": [0, rows]} if packed else {})
    found, (dsinks,) = results(processes, PAIR, case, {"causal": True, "scheme": scheme})
    if packed:
        assert torch.isneginf(found[1][:, rows:]).all() and not any(x[rows:].any() for x in (found[0], *found[2:]))
    given = [*inputs(case), *found]
    q, k, v, dout, dlse, *found = documents(case, given)[0] if packed else given
    q, k, v, dout, dlse = (x.double() for x in (q, k, v, dout, dlse))
    leaves = [x.requires_grad_() for x in (q, k, v, torch.linspace(-1, 2, 4).double())]
    scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2)) * 32**-0.5
    scores = scores.masked_fill(torch.ones(rows, rows).triu(1).bool(), float("-inf"))
    sinks = leaves[3].view(1, 4, 1, 1).expand(1, 4, rows, 1)
    all_scores = torch.cat([scores, sinks], -1)
    expected = torch.einsum("bhij,bjhd->bihd", all_scores.softmax(-1)[..., :-1], v.repeat_interleave(2, 2))
    expected_lse = all_scores.logsumexp(-1)
    of_all = torch.autograd.grad([expected, expected_lse], leaves, [dout, dlse])
    for x, truth in zip((*found, dsinks), (expected, expected_lse, *of_all), strict=True):
        torch.testing.assert_close(x.double(), truth.detach(), rtol=2e-2, atol=2e-2)


def test_a_process_that_does_not_use_lse_holds_up_nobody(processes):
    case = {"sizes": (1, 136, 2, 2), "lse_on": "some"}
    results(processes, PAIR, case, {"causal": True, "scheme": "ulysses"})


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_layouts_of_rows(processes, layout):
    for here, all_, at, packed in processes.run(PAIR, do="rows", layout=layout):
        assert torch.equal(all_, torch.arange(48).view(2, 24).float())
        assert torch.equal(here[0], at.float())
        starts = torch.tensor([0] * 5 + [5] * 13 + [18] * 4 + [22] * 2)
        assert torch.equal(packed, at - starts[at])


def test_what_is_refused_says_what_works(processes):
    """In every process, before anything is sent."""
    for sizes, options, error, hint in [
        ((1, 272, 4, 2), {"scheme": "ulysses"}, UnsupportedProblem, "allgather"),
        ((1, 268, 4, 2), {}, InvalidInput, "272"),
        ((1, 272, 4, 2), {"scheme": "rings"}, InvalidInput, "'ring'"),
        ((1, 272, 4, 2), {"head_stride": 0}, InvalidInput, "head_stride"),
    ]:
        with pytest.raises(AssertionError) as raised:
            processes.run(ALL, sizes=sizes, options=options)
        assert error.__name__ in str(raised.value) and hint in str(raised.value)


def test_without_processes():
    x = torch.zeros(1, 8, 2, 16, dtype=torch.bfloat16)
    with pytest.raises(InvalidInput, match="init_process_group"):
        context_parallel_attention(x, x, x)
    with pytest.raises(InvalidInput, match="init_process_group"):
        shard(x)
