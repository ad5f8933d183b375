"""Ragged batches on a GPU by the project's rule: each sequence for itself, both passes and families, NaN in padding."""

from __future__ import annotations

import contextlib
import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fa2gen import InvalidInput, env, flash_attn_func, flash_attn_varlen_func
from fa2gen.errors import Fa2GenError
from fa2gen.features import MASKS
from fa2gen.gpus import current_device
from fa2gen.groups import abreast_of, parts_of, with_groups
from fa2gen.ops import attention
from fa2gen.ops.call import backward_cuda, forget, forward_cuda
from fa2gen.ops.ragged import backward_ragged, forward_ragged
from fa2gen.ops.validate import LENGTHS
from fa2gen.options import Options, Shape
from fa2gen.reference import check, check_gradients
from fa2gen.select import select
from fa2gen.spec import Problem
from fa2gen.store import Store

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

ARCHES, DTYPES = ("sm90", "sm80"), {"bf16": torch.bfloat16, "fp16": torch.float16}
OPTIONS = {"full": {}, "causal": {"causal": True}, "window": {"window_left": 70, "window_right": 9}}
HEADS, HEADS_KV = 6, 2


def kernels(head_dims, dtypes=("bf16",), masks=("causal",)):
    """Tests of (arch, dtype, head_dim, mask)."""
    values = list(itertools.product(ARCHES, dtypes, head_dims, [mask for mask in masks if mask in MASKS]))
    return pytest.mark.parametrize("which", values, indirect=True, ids=lambda w: f"{w[0]}_{w[1]}_d{w[2]}_{w[3]}")


@pytest.fixture
def which(request, monkeypatch):
    """The family is the one that FA2GEN_ARCH names."""
    if request.param[0] == "sm90" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    monkeypatch.setenv("FA2GEN_ARCH", request.param[0])
    forget()
    yield request.param
    forget()


@pytest.fixture(scope="module", autouse=True)
def ragged_kernels_are_built(request):
    """Of all selected tests at once, in threads. One that does not compile fails in its own test."""
    wanted = {
        item.callspec.params["which"]
        for item in request.session.items
        if item.path == request.path and "which" in getattr(getattr(item, "callspec", None), "params", {})
    }
    store, device = Store(), current_device()

    def build(arch, dtype, head_dim, mask, direction):
        problem = Problem(direction=direction, head_dim=head_dim, dtype=dtype, mask=mask, varlen=True)
        with contextlib.suppress(Fa2GenError):
            selection = select(problem, device, arch, 512)
            store.get_or_compile(selection.plan, selection.target)

    with ThreadPoolExecutor(env.jobs()) as pool:
        list(pool.map(lambda job: build(*job[0], job[1]), itertools.product(wanted, ("fwd", "bwd"))))


def ints(numbers):
    return torch.tensor(list(numbers), dtype=torch.int32, device="cuda")


class Batch:
    """Sequences of so many rows, of which `used` count; NaN in all others, and in `more` rows behind the last one.

    lengths  what forward_ragged and backward_ragged take.
    rows     (slice of queries, slice of keys) of each sequence.
    """

    def __init__(self, which, lengths_q, lengths_k, used_q=None, used_k=None, more=(0, 0), seed=0):
        _, dtype, head_dim, mask = which
        self.options = Options(None, varlen=True, **OPTIONS[mask])
        generator = torch.Generator("cuda").manual_seed(seed)
        sides = []
        for lengths, used, rest in ((lengths_q, used_q, more[0]), (lengths_k, used_k, more[1])):
            bounds = [0, *itertools.accumulate(lengths)]
            counted = lengths if used is None else [min(pair) for pair in zip(lengths, used, strict=True)]
            sides.append(
                (bounds, [slice(at, at + n) for at, n in zip(bounds, counted, strict=False)], bounds[-1] + rest)
            )
        (bounds_q, of_query, total_q), (bounds_k, of_key, total_k) = sides
        self.rows = list(zip(of_query, of_key, strict=True))
        self.lengths = (ints(bounds_q), ints(bounds_k), *(None if x is None else ints(x) for x in (used_q, used_k)))
        self.padding = {"q": self._padding(total_q, of_query), "k": self._padding(total_k, of_key)}

        def make(side, total, heads):
            x = torch.randn(total, heads, head_dim, generator=generator, device="cuda").to(DTYPES[dtype])
            return x.masked_fill_(self.padding[side][:, None, None], math.nan)

        self.q, self.dout = make("q", total_q, HEADS), make("q", total_q, HEADS)
        self.k, self.v = make("k", total_k, HEADS_KV), make("k", total_k, HEADS_KV)
        self.dlse = torch.randn(HEADS, total_q, generator=generator, device="cuda")
        self.dlse.masked_fill_(self.padding["q"], math.nan)

    @staticmethod
    def _padding(total, slices):
        padding = torch.ones(total, dtype=torch.bool)
        for rows in slices:
            padding[rows] = False
        return padding.to("cuda")

    def forward(self):
        return forward_ragged(self.q, self.k, self.v, *self.lengths, self.options)

    def backward(self, out, lse, deterministic=False):
        """With NaN where nobody may look."""
        out = out.masked_fill(self.padding["q"][:, None, None], math.nan)
        options = self.options._replace(deterministic=deterministic)
        return backward_ragged(self.dout, self.q, self.k, self.v, out, lse, self.dlse, *self.lengths, options)

    def assert_right(self, out, lse, gradients=None):
        """Every sequence by the project's rule; padding 0, LSE -inf there."""
        assert not out[self.padding["q"]].any() and lse[:, self.padding["q"]].isneginf().all()
        options = self.options._asdict()
        for one, (rows, keys) in enumerate(self.rows):
            q, dout, k, v = (x[None] for x in (self.q[rows], self.dout[rows], self.k[keys], self.v[keys]))
            if keys.start == keys.stop:
                assert not out[rows].any() and lse[:, rows].isneginf().all()
            elif rows.start < rows.stop:
                verdict = check(out[None, rows], lse[None, :, rows], q, k, v, **options)
                assert verdict.ok, f"sequence {one}, {tuple(q.shape)} x {tuple(k.shape)}: {verdict}"
                if gradients is not None:
                    found = tuple(x[None, of] for x, of in zip(gradients, (rows, keys, keys), strict=True))
                    verdict = check_gradients(found, dout, q, k, v, dlse=self.dlse[None, :, rows], **options)
                    assert verdict.ok, f"sequence {one}, {tuple(q.shape)} x {tuple(k.shape)}: {verdict}"
        for x, side in zip(gradients or (), "qkk", strict=False):
            assert x.isfinite().all() and not x[self.padding[side]].any()


def mixed(which, seed=0):
    """Every corner: no queries, no keys, one row, tile edges, longer than a tile, rows that do not count, padding."""
    lengths_q = [1, 0, 63, 200, 64, 0, 129, 513, 5, 300]
    lengths_k = [7, 40, 0, 65, 64, 0, 300, 200, 129, 512]
    return Batch(
        which, lengths_q, lengths_k, [9, 0, 63, 150, 64, 1, 129, 513, 0, 300], [*lengths_k[:-1], 401], (17, 70), seed
    )


@kernels((32, 64, 72, 128, 256), DTYPES, OPTIONS)
def test_every_kernel(which):
    for batch in (mixed(which), Batch(which, [150], [170]), Batch(which, [37, 1, 90], [41, 80, 2], more=(1, 0))):
        out, lse = batch.forward()
        batch.assert_right(out, lse, batch.backward(out, lse))


@kernels((64, 128), masks=("full", "causal"))
def test_equal_lengths_are_a_dense_batch_bit_for_bit(which):
    """By the same tiling: forward, dK and dV; dQ, whose order of summation varies, up to roundings."""
    arch, dtype, head_dim, _ = which
    batch = Batch(which, [200] * 5, [264] * 5)
    device = current_device()
    forward, backward = (
        select(batch.options.problem(direction, head_dim, dtype), device, arch, 264).plan
        for direction in ("fwd", "bwd")
    )
    shape = Shape(5, 5 * 200, 5 * 264, HEADS, HEADS_KV)
    parts = parts_of(backward, shape, batch.options, device.num_sms)
    tilings = {
        "fwd": forward.tiling,
        "bwd": with_groups(backward, parts, abreast_of(backward, shape)).tiling,
    }
    q, k, v, dout = (x.unflatten(0, (5, -1)) for x in (batch.q, batch.k, batch.v, batch.dout))
    options = batch.options._replace(varlen=False)
    out, lse = batch.forward()
    right = forward_cuda(q, k, v, options, None, tilings["fwd"])
    assert torch.equal(out, right[0].flatten(0, 1)) and torch.equal(lse, right[1].transpose(0, 1).flatten(1))
    dlse = batch.dlse.unflatten(1, (5, -1)).transpose(0, 1)
    expected = backward_cuda(dout, q, k, v, *right, dlse, options, tilings["bwd"])
    found = batch.backward(out, lse)
    for x, y in list(zip(found, expected, strict=True))[1:]:
        assert torch.equal(x, y.flatten(0, 1))
    torch.testing.assert_close(found[0], expected[0].flatten(0, 1), rtol=2e-2, atol=1e-3 * float(found[0].abs().max()))


@kernels((64, 128))
def test_a_dense_side(which):
    """Keys of a cache, (batch, seqlen, heads, head_dim), of which a part counts."""
    batch = Batch(which, [30, 1, 100], [256] * 3, used_k=[200, 256, 3])
    k, v = (x.unflatten(0, (3, 256)) for x in (batch.k, batch.v))
    of_query, _, _, used = batch.lengths
    out, lse = forward_ragged(batch.q, k, v, of_query, None, None, used, batch.options)
    gradients = backward_ragged(
        *(batch.dout, batch.q, k, v, out, lse, batch.dlse, of_query, None, None, used, batch.options)
    )
    assert gradients[1].shape == k.shape
    batch.assert_right(out, lse, (gradients[0], *(x.flatten(0, 1) for x in gradients[1:])))


NEEDED = 48 << 30


def _memory_for_this_process():
    """Bytes that this process has or could have."""
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()


@kernels((64, 128))
def test_many_sequences(which):
    """100,000 of up to 3 rows, and long ones among them."""
    if _memory_for_this_process() < NEEDED:
        pytest.skip("needs 48 GiB of free GPU memory: sums of dQ have a block for each sequence")
    generator = torch.Generator().manual_seed(0)
    lengths_q, lengths_k = (torch.randint(0, 4, (100_000,), generator=generator).tolist() for _ in range(2))
    lengths_q[77], lengths_k[77], lengths_q[70_000], lengths_k[70_000] = 2000, 2000, 700, 900
    batch = Batch(which, lengths_q, lengths_k)
    out, lse = batch.forward()
    try:
        gradients = batch.backward(out, lse)
    except torch.OutOfMemoryError:
        if _memory_for_this_process() < NEEDED:
            pytest.skip("other processes on this GPU have taken the memory since")
        raise
    batch.rows = [batch.rows[i] for i in (0, 1, 2, 77, 78, 69_999, 70_000, 70_001, 99_999)]
    batch.assert_right(out, lse, gradients)


@kernels((64, 128), masks=("causal", "window"))
@pytest.mark.parametrize("count", [48, 49])
def test_few_sequences_and_more(which, count):
    """Of up to 48 each block of SM90's forward kernels makes the table for itself."""
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(0, 500, (3, count), generator=generator).tolist()
    batch = Batch(which, lengths[0], lengths[1], used_q=lengths[2], more=(900, 1))
    out, lse = batch.forward()
    batch.assert_right(out, lse, batch.backward(out, lse))


@kernels((64,))
def test_a_sequence_of_a_million_tokens(which):
    """Its last rows, behind short sequences; of the others dO is 0, so that all gradients are those of the last."""
    length, last = 2**20 + 3, 70
    total = 100 + length
    generator = torch.Generator("cuda").manual_seed(0)

    def random(heads):
        return torch.randn(total, heads, 64, generator=generator, device="cuda").bfloat16()

    q, k, v, dout = random(2), random(1), random(1), random(2)
    dout[:-last] = 0
    lengths = (ints([0, 1, 100, total]), ints([0, 1, 100, total]), None, None)
    options = Options(None, True, varlen=True)
    out, lse = forward_ragged(q, k, v, *lengths, options)
    dq, dk, dv = backward_ragged(dout, q, k, v, out, lse, None, *lengths, options)
    part = [x[None] for x in (q[-last:], k[100:], v[100:])]
    assert check(out[None, -last:], lse[None, :, -last:], *part, causal=True).ok
    gradients = dq[None, -last:], dk[None, 100:], dv[None, 100:]
    assert check_gradients(gradients, dout[None, -last:], *part, causal=True).ok
    assert not dq[:-last].any() and not dk[:100].any() and not dv[:100].any()


@kernels((128,))
def test_totals_of_more_than_2_to_the_31_elements(which):
    """The first sequence and the last, whose rows lie beyond them."""
    if torch.cuda.mem_get_info()[0] < 32 << 30:
        pytest.skip("needs 32 GiB of free GPU memory")
    lengths = [200, *[2048] * 512, 333]
    bounds = [0, *itertools.accumulate(lengths)]
    generator = torch.Generator("cuda").manual_seed(0)
    q, k = (
        torch.randn(bounds[-1], heads, 128, generator=generator, device="cuda", dtype=torch.bfloat16)
        for heads in (16, 2)
    )
    assert q.numel() > 2**31
    options, given = Options(None, True, varlen=True), (ints(bounds), ints(bounds), None, None)
    out, lse = forward_ragged(q, k, k, *given, options)
    gradients = backward_ragged(q, q, k, k, out, lse, None, *given, options)
    for rows in (slice(0, 200), slice(-333, None)):
        part = [x[None, rows] for x in (q, k, k)]
        assert check(out[None, rows], lse[None, :, rows], *part, causal=True).ok
        assert check_gradients(tuple(x[None, rows] for x in gradients), part[0], *part, causal=True).ok
    del q, k, out, lse, gradients, part
    torch.cuda.empty_cache()


@kernels((64, 128))
def test_nothing_waits_for_the_device(which):
    """Not the first call of a signature either, nor autograd; the longest lengths may be tensors."""
    batch = mixed(which)
    batch.backward(*batch.forward())  # kernels are loaded
    forget()
    leaves = [x.detach().requires_grad_() for x in (batch.q, batch.k, batch.v)]
    bounds, longest = batch.lengths[:2], ints([600])[0]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            out = flash_attn_varlen_func(*leaves, *bounds, longest, longest, causal=True, seqused_q=batch.lengths[2])
            torch.autograd.grad(out, leaves, batch.dout)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@kernels((64, 128))
def test_a_graph_replays_with_other_lengths(which):
    """Of the same totals: other tensors, other bounds, other counts of rows."""
    places = mixed(which)
    others = [
        Batch(which, q, k, used, None, (17, 70), seed=i) for i, (q, k, used) in enumerate(permutations(places), 1)
    ]
    places.lengths = (*places.lengths[:3], None)
    places.backward(*places.forward())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = places.forward()
        gradients = places.backward(out, lse, deterministic=True)
    for batch in others:
        for to, source in zip(
            (places.q, places.k, places.v, places.dout, places.dlse, *places.lengths[:3], *places.padding.values()),
            (batch.q, batch.k, batch.v, batch.dout, batch.dlse, *batch.lengths[:3], *batch.padding.values()),
            strict=True,
        ):
            to.copy_(source)
        for x in (out, lse, *gradients):
            x.fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        batch.assert_right(out, lse, gradients)
        again = batch.forward()
        assert torch.equal(again[0], out) and torch.equal(again[1], lse)


def permutations(batch):
    """(lengths_q, lengths_k, used_q) of the same totals."""
    lengths_q, lengths_k = (torch.diff(x).tolist() for x in batch.lengths[:2])
    total_q, total_k, n = sum(lengths_q), sum(lengths_k), len(lengths_q)
    yield lengths_q[::-1], lengths_k[3:] + lengths_k[:3], [10_000] * n
    yield [total_q] + [0] * (n - 1), [total_k] + [0] * (n - 1), [total_q - 3] + [1] * (n - 1)
    yield [1] * (n - 1) + [total_q - n + 1], [total_k - n + 1] + [1] * (n - 1), [1] * n


@kernels((64, 128, 256))
def test_deterministic_gradients_are_the_same_bits_in_every_run(which):
    noise, other = torch.randn(2048, 2048, device="cuda"), torch.cuda.Stream()
    batch = mixed(which)
    out, lse = batch.forward()
    first = batch.backward(out, lse, deterministic=True)
    batch.assert_right(out, lse, first)
    for run in range(50):
        if run % 2:
            with torch.cuda.stream(other):
                torch.mm(noise, noise)
        again = (*batch.forward(), *batch.backward(out, lse, deterministic=True))
        assert all(torch.equal(x, y) for x, y in zip(again, (out, lse, *first), strict=True)), f"run {run}"


@kernels((64, 128))
def test_streams_at_the_same_time(which):
    """Launches of one signature that overlap share no memory."""
    batches = [mixed(which, seed) for seed in range(4)]
    expected = []
    for batch in batches:
        out, lse = batch.forward()
        expected.append((out, lse, *batch.backward(out, lse, deterministic=True)))
    streams = [torch.cuda.Stream() for _ in batches]
    torch.cuda.synchronize()
    found = [[] for _ in batches]
    for _ in range(20):
        for batch, stream, of in zip(batches, streams, found, strict=True):
            with torch.cuda.stream(stream):
                out, lse = batch.forward()
                of.append((out, lse, *batch.backward(out, lse, deterministic=True)))
    torch.cuda.synchronize()
    for results, right in zip(found, expected, strict=True):
        for one in results:
            assert all(torch.equal(x, y) for x, y in zip(one, right, strict=True))


@kernels((64,), masks=("causal", "window"))
def test_new_totals_are_as_if_they_were_the_first(which):
    """Of other totals and another number of sequences a call is launched with what an earlier one left: bit for bit as
    if there had been none, but for the order of sums of dQ."""
    sides = [
        ((280, 40), (300, 60)),
        ((20,), (20,)),
        ((5, 700, 0), (60, 800, 9)),
        ((90,), (150,)),
        ((64, 64), (128, 70)),
    ]
    batches = [Batch(which, *lengths, seed=i) for i, lengths in enumerate(sides)]
    found = []
    for batch in batches:
        out, lse = batch.forward()
        found.append((out, lse, *batch.backward(out, lse)))
        batch.assert_right(*found[-1][:2], found[-1][2:])
    for batch, (out, lse, _, dk, dv) in zip(batches, found, strict=True):
        forget()
        again = batch.forward()
        _, *of_keys = batch.backward(*again)
        assert all(torch.equal(x, y) for x, y in zip((*again, *of_keys), (out, lse, dk, dv), strict=True))


@kernels((64, 128))
def test_lengths_that_make_no_sense_are_no_fault(which):
    """And the call after one is right."""
    batch = Batch(which, [100, 200], [300, 70])
    good = batch.lengths
    for numbers in ([0, 10**6, 300], [-5, 3, 2**31 - 1], [300, 100, 0], [-(2**31)] * 3, [0, 300, 0]):
        batch.lengths = (ints(numbers), ints(numbers), None, ints([-1, 10**9]))
        batch.backward(*batch.forward())
    torch.cuda.synchronize()
    batch.lengths = good
    out, lse = batch.forward()
    batch.assert_right(out, lse, batch.backward(out, lse))


@kernels((64,))
def test_functions_and_operators(which):
    """Autograd, autocast, torch.compile without a graph for each length, opcheck and nested tensors give these bits."""
    batch = Batch(which, [100, 0, 57], [128, 9, 70])
    leaves = [x.detach().requires_grad_() for x in (batch.q, batch.k, batch.v)]
    bounds = batch.lengths[:2]
    out, lse, _ = flash_attn_varlen_func(*leaves, *bounds, causal=True, return_attn_probs=True)
    batch.assert_right(out, lse, torch.autograd.grad((out, lse), leaves, (batch.dout, batch.dlse)))
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(flash_attn_varlen_func(*(x.float() for x in leaves), *bounds, causal=True), out)
    graphs = []
    compiled = torch.compile(
        lambda *args: flash_attn_varlen_func(*args, causal=True),
        fullgraph=True,
        dynamic=True,
        backend=lambda module, _: graphs.append(module) or module.forward,
    )
    for lengths in ([100, 0, 57], [64, 65], [300] * 4):
        one = Batch(which, lengths, lengths)
        expected = one.forward()[0]
        assert torch.equal(compiled(one.q, one.k, one.v, *one.lengths[:2], max(lengths), max(lengths)), expected)
    assert len(graphs) == 1
    torch.compiler.reset()
    found = torch.library.opcheck(
        torch.ops.fa2gen.fwd_varlen.default, (batch.q, batch.k, batch.v, *batch.lengths, 0.1, True)
    )
    assert set(found.values()) == {"SUCCESS"}
    of_keys = bounds[1].long()
    nested = [
        torch.nested.nested_tensor_from_jagged(x, of)
        for x, of in zip((batch.q, batch.k, batch.v), (bounds[0].long(), of_keys, of_keys), strict=True)
    ]
    assert torch.equal(flash_attn_func(*nested, causal=True).values(), out)
    named = dict(zip(LENGTHS, batch.lengths, strict=True))
    problem = batch.options.problem("fwd", which[2], which[1])
    for chosen in ({"arch": which[0]}, {"tiling": select(problem, current_device(), which[0], 69).plan.tiling}):
        assert torch.equal(attention(batch.q, batch.k, batch.v, causal=True, **chosen, **named)[0], out)


def test_lengths_on_the_cpu_are_refused():
    q = torch.zeros(8, 2, 64, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(InvalidInput, match=r"q is on cuda:0, cu_seqlens_q on cpu.*cu_seqlens_q\.to\(q\.device\)"):
        flash_attn_varlen_func(q, q, q, ints([0, 8]).cpu(), ints([0, 8]))
