"""Dropout in PyTorch, without a GPU: random bits, what they drop, gradients by the mask, and every way of calling."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fa2gen import UnsupportedProblem
from fa2gen.features.dropout import DROP_ROTATIONS, DROP_STEPS, INDEPENDENT_ELEMENTS, LAST_ROTATION, keep_steps
from fa2gen.ops import attention, flash_attn_func, flash_attn_kvpacked_func, flash_attn_varlen_func
from fa2gen.reference import _philox, dropout_keep

FWD, BWD = torch.ops.fa2gen.fwd_general.default, torch.ops.fa2gen.bwd_general.default
NO_LENGTHS = (None,) * 4
HEADS, HEAD_DIM = 4, 16


@pytest.fixture(autouse=True)
def nothing_compiled():
    yield
    torch.compiler.reset()


def inputs(seqlen_q=40, seqlen_k=70, heads_kv=2):
    generator = torch.Generator().manual_seed(seqlen_k)
    sizes = ((seqlen_q, HEADS), (seqlen_k, heads_kv), (seqlen_k, heads_kv))
    return [torch.randn(2, s, h, HEAD_DIM, generator=generator).bfloat16().requires_grad_() for s, h in sizes]


def gradients(results, leaves):
    ways = [torch.linspace(-1, 1, x.numel()).view(x.shape).to(x.dtype) for x in results]
    return torch.autograd.grad(results, leaves, ways)


def by_mask(q, k, v, mask, p, causal=False, cap=0.0):
    """(out, lse) in fp64 by a mask of +1 and -1."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(HEADS // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * HEAD_DIM**-0.5
    scores = cap * torch.tanh(scores / cap) if cap else scores
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(scores.shape[-1] - scores.shape[-2])
        scores = scores.masked_fill(~seen, -math.inf)
    probs = scores.softmax(-1) * (mask > 0) / (1 - p)
    return torch.einsum("bhqk,bkhd->bqhd", probs, v), scores.logsumexp(-1)


# Random bits ---------------------------------------------------------------------------------------------------------


def test_philox_by_its_known_answers():
    """Of Random123's kat_vectors, philox4x32 with 7 rounds and with 10."""
    ones, pi = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    for rounds, counter, key, right in (
        (7, (0,) * 4, (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (7, (ones,) * 4, (ones, ones), (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        (7, pi, (0xA4093822, 0x299F31D0), (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
        (10, (0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (10, pi, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ):
        found = _philox([torch.tensor(x) for x in counter], key, rounds)
        assert tuple(int(x) for x in found) == right


def test_keep_steps():
    assert [keep_steps(p) for p in (0.5, 0.25, 1e-9, 1 - 1e-9)] == [2048, 3072, DROP_STEPS - 1, 1]


def rank(rows):
    """Of bits, each row's in one number."""
    by_length = {}
    for row in rows:
        while row and row.bit_length() in by_length:
            row ^= by_length[row.bit_length()]
        if row:
            by_length[row.bit_length()] = row
    return len(by_length)


def test_numbers_of_one_call_are_independent():
    """If its bits are: 8 digits of any INDEPENDENT_ELEMENTS elements, and 12 of any two, but where the last four of one
    are the other's second four."""

    def digits(element):
        """Each as the bits that it is the sum of, the first first."""

        def drawn(word, turns):
            return 1 << 32 * word + (element - turns) % 32

        def sums(turns):
            once, again = DROP_ROTATIONS
            return [
                drawn(i, turns + once[i])
                ^ drawn((i + 1) % 4, turns + again[(i + 1) % 4])
                ^ drawn((i + 2) % 4, turns + again[(i + 2) % 4])
                for i in range(4)
            ]

        return [*(drawn(i, 0) for i in range(4)), *sums(0), *sums(LAST_ROTATION)]

    of = [digits(element) for element in range(32)]  # by symmetry one of the elements may be the first
    for others in itertools.combinations(range(1, 32), INDEPENDENT_ELEMENTS - 1):
        assert rank(x for i in (0, *others) for x in of[i][:8]) == 8 * INDEPENDENT_ELEMENTS
    alike = {i for i in range(1, 32) if rank(of[0] + of[i]) < 24}
    assert alike == {LAST_ROTATION, 32 - LAST_ROTATION}


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_as_much_is_dropped_as_is_asked_for(p):
    """Of all, of each head, row and column, and of neighbours both; within six standard deviations."""
    bits = torch.randint(-(1 << 63), (1 << 63) - 1, (2,), generator=torch.Generator().manual_seed(3))
    dropped = ~dropout_keep(bits, p, 4, (0, 256), (0, 512), (0, 2))

    def is_near(x, expected):
        deviation = math.sqrt(expected * (1 - expected) / x.numel())
        assert abs(x.double().mean().item() - expected) < 6 * deviation + 1 / DROP_STEPS

    is_near(dropped, p)
    for part in (*dropped[0], *dropped[1, 0].split(32), *dropped[1, 1].T.split(32)):
        is_near(part, p)
    for distance in (1, 2, 8, 16, 32, 64):
        is_near(dropped[..., distance:] & dropped[..., :-distance], p * p)
        is_near(dropped[..., distance:, :] & dropped[..., :-distance, :], p * p)
    is_near(dropped[0] & dropped[1], p * p)
    is_near(dropped[:, 0] & dropped[:, 1], p * p)


def test_a_part_of_the_mask_is_what_the_whole_has_there():
    bits = torch.tensor([3, 1 << 40])
    whole = dropout_keep(bits, 0.3, 3, (0, 100), (0, 130), (0, 4))
    assert torch.equal(dropout_keep(bits, 0.3, 3, (17, 90), (33, 120), (2, 3)), whole[2:3, :, 17:90, 33:120])


# Calls ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("causal", "cap"), [(False, 0.0), (True, 0.0), (True, 1.5)])
@pytest.mark.parametrize("p", [0.001, 0.17, 0.9])
def test_results_and_gradients_are_those_of_the_mask(causal, cap, p):
    leaves = inputs()
    out, lse, mask = flash_attn_func(*leaves, dropout_p=p, causal=causal, softcap=cap, return_attn_probs=True)
    assert mask.shape == (2, HEADS, 40, 70) and set(mask.unique().tolist()) <= {-1.0, 1.0}
    right = by_mask(*leaves, mask, p, causal, cap)
    scale = 1 / (1 - p)
    torch.testing.assert_close(out.double(), right[0], rtol=0.01, atol=0.01 * scale)
    torch.testing.assert_close(lse.double(), right[1], rtol=1e-6, atol=1e-5)
    for x, y in zip(gradients((out, lse), leaves), gradients(right, leaves), strict=True):
        torch.testing.assert_close(x, y, rtol=0.02, atol=0.02 * scale)


def test_the_generator_decides():
    leaves = inputs()
    torch.manual_seed(0)
    first, second = (flash_attn_func(*leaves, dropout_p=0.2) for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(flash_attn_func(*leaves, dropout_p=0.2), first) and not torch.equal(first, second)
    before = torch.get_rng_state()
    plain = flash_attn_func(*leaves)
    assert torch.equal(flash_attn_func(*leaves, dropout_p=0.0), plain) and torch.equal(torch.get_rng_state(), before)


def test_every_function_drops_the_same():
    q, k, v = inputs(heads_kv=HEADS)
    bounds = [torch.tensor([0, n, 2 * n], dtype=torch.int32) for n in (40, 70)]
    rows = [x.flatten(0, 1) for x in (q, k, v)]
    longest = {"max_seqlen_q": 40, "max_seqlen_k": 70}

    def of(function, *args, **options):
        torch.manual_seed(5)
        return function(*args, dropout_p=0.3, **options)

    out, lse, mask = of(flash_attn_func, q, k, v, return_attn_probs=True)
    ragged = of(flash_attn_varlen_func, *rows, *bounds, **longest, return_attn_probs=True)
    assert torch.equal(ragged[0].view(out.shape), out) and torch.equal(ragged[2], mask)
    assert torch.equal(of(flash_attn_kvpacked_func, q, torch.stack([k, v], 2)), out)
    assert torch.equal(of(attention, q, k, v)[0], out)
    sinks = torch.tensor([0.0, 1.0, 2.0, -math.inf])
    assert torch.equal(of(flash_attn_func, q, k, v, s_aux=sinks, return_attn_probs=True)[2], mask)
    assert torch.equal(lse, flash_attn_func(q, k, v, return_attn_probs=True)[1])


def test_checkpoints_draw_the_same_again():
    leaves = inputs()

    def loss(*leaves):
        return (flash_attn_func(*leaves, dropout_p=0.3).float() ** 2).sum()

    torch.manual_seed(1)
    right = torch.autograd.grad(loss(*leaves), leaves)
    torch.manual_seed(1)
    total = torch.utils.checkpoint.checkpoint(loss, *leaves, use_reentrant=False)
    assert all(torch.equal(x, y) for x, y in zip(torch.autograd.grad(total, leaves), right, strict=True))


def test_operators_pass_torchs_checks():
    q, k, v = inputs()
    bits = torch.tensor([12345678901234, -98765432109876])
    forward = (q, k, v, *NO_LENGTHS, None, bits, [], 0.25, True)
    assert set(torch.library.opcheck(FWD, forward, {"dropout_p": 0.2}).values()) == {"SUCCESS"}
    q, k, v = (x.detach() for x in (q, k, v))
    out, lse = FWD(q, k, v, *NO_LENGTHS, None, bits, [], 0.25, True, dropout_p=0.2)
    given = (torch.randn_like(out), q, k, v, out, lse, None, *NO_LENGTHS, None, bits, [], 0.25, True)
    assert set(torch.library.opcheck(BWD, given, {"dropout_p": 0.2}).values()) == {"SUCCESS"}


def test_compiled_and_mapped():
    """A graph draws anew at each call; forward and backward of one call drop the same."""
    leaves = inputs()
    compiled = torch.compile(lambda *x: flash_attn_func(*x, dropout_p=0.5), fullgraph=True, backend="aot_eager")
    first, second = (compiled(*leaves) for _ in range(2))
    assert not torch.equal(first, second)
    v = leaves[2]
    (dv,) = torch.autograd.grad(second, v, second)
    # <dO, O> = <dV, V>, if O and dV are by the same mask
    torch.testing.assert_close((second.double() ** 2).sum(), (dv.double() * v.double()).sum(), rtol=0.01, atol=0.1)
    with pytest.raises(UnsupportedProblem, match="vmap of attention with sinks, dropout"):
        torch.func.vmap(lambda *x: flash_attn_func(*x, dropout_p=0.5), randomness="different")(
            *(x.detach().unsqueeze(0) for x in leaves)
        )
