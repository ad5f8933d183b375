"""The reference is right (a naive fp64 loop agrees), Algorithm 1 equals it, and the rule tells right from wrong."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from fa2gen.reference import Verdict, attention_reference, attention_tiled, check

# (batch, seqlen_q, seqlen_k, heads, heads_kv)
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 5, 9, 4, 2),
    (1, 9, 5, 6, 1),
    (2, 7, 7, 2, 2),
    (1, 3, 0, 2, 2),
    (1, 0, 3, 2, 1),
    (0, 3, 3, 2, 1),
]


def tensors(batch, seqlen_q, seqlen_k, heads, heads_kv, head_dim=16, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = ((seqlen_q, heads), (seqlen_k, heads_kv), (seqlen_k, heads_kv))
    return tuple(
        torch.randn(batch, s, h, head_dim, generator=generator, dtype=torch.float64).to(dtype) for s, h in sizes
    )


def naive(q, k, v, causal, scale):
    """One row at a time, as the formula reads."""
    batch, seqlen_q, heads, _ = q.shape
    seqlen_k, heads_kv = k.shape[1:3]
    out = torch.zeros_like(q)
    lse = torch.full((batch, heads, seqlen_q), -math.inf, dtype=q.dtype)
    for b in range(batch):
        for h in range(heads):
            for i in range(seqlen_q):
                visible = max(0, min(seqlen_k, i + 1 + seqlen_k - seqlen_q)) if causal else seqlen_k
                if visible:
                    g = h // (heads // heads_kv)
                    weights = (k[b, :visible, g] @ q[b, i, h] * scale).exp()
                    out[b, i, h] = weights @ v[b, :visible, g] / weights.sum()
                    lse[b, h, i] = weights.sum().log()
    return out, lse


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_is_the_formula(shape, causal):
    q, k, v = tensors(*shape)
    for scale in (None, 0.7):
        expected = naive(q, k, v, causal, scale or q.shape[-1] ** -0.5)
        for options in ({}, {"upcast": False}, {"upcast": False, "reorder_ops": True}):
            result = attention_reference(q, k, v, causal=causal, softmax_scale=scale, **options)
            torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tiles", [(1, 1), (4, 3), (16, 32), (128, 128)], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 70, 45, 4, 1), (1, 45, 70, 3, 3)], ids=str)
def test_algorithm_1_equals_the_reference(shape, causal, tiles):
    q, k, v = tensors(*shape)
    tiled = attention_tiled(q, k, v, causal=causal, softmax_scale=0.3, tile_m=tiles[0], tile_n=tiles[1])
    plain = attention_reference(q, k, v, causal=causal, softmax_scale=0.3)
    torch.testing.assert_close(tiled, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_inputs(dtype):
    q, k, v = tensors(2, 33, 47, 4, 2, dtype=dtype)
    out, lse = attention_tiled(q, k, v)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert check(out, lse, q, k, v).ok


def test_large_scores_do_not_overflow():
    q, k, v = tensors(1, 8, 8, 1, 1, dtype=torch.float32)
    out, lse = attention_tiled(q * 1e3, k, v, softmax_scale=1.0)
    torch.testing.assert_close((out, lse), attention_reference(q * 1e3, k, v, softmax_scale=1.0))
    assert out.isfinite().all()


def test_rows_without_keys_are_zero_and_minus_infinity():
    q, k, v = tensors(1, 9, 5, 2, 1)
    out, lse = attention_tiled(q, k, v, causal=True)
    assert not out[:, :4].any() and out[:, 4:].all()
    assert lse[..., :4].isneginf().all() and lse[..., 4:].isfinite().all()


# The rule ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def case():
    q, k, v = tensors(2, 61, 83, 4, 2, head_dim=64, dtype=torch.bfloat16)
    return (*attention_reference(q, k, v, causal=True), q, k, v)


def verdict(case, change_out=lambda x: x, change_lse=lambda x: x):
    out, lse, q, k, v = case
    return check(change_out(out.clone()), change_lse(lse.clone()), q, k, v, causal=True)


def put(value, *at):
    def change(x):
        x[at] = value
        return x

    return change


def test_the_truth_passes(case):
    found = verdict(case)
    assert found.ok and found.max_error == found.mean_error == found.lse_error == 0
    assert "ok" in str(found)


@pytest.mark.parametrize(
    "change",
    [
        put(math.nan, 1, 60, 3, 63),
        put(math.inf, 0, 0, 0, 0),
        put(7.0, 1, 2, 3, 4),
        lambda x: x.roll(1, 2),
        lambda x: x * 0,
    ],
    ids=["nan", "inf", "one element", "wrong head", "zeros"],
)
def test_wrong_outputs_fail(case, change):
    found = verdict(case, change_out=change)
    assert not found.ok and "WRONG" in str(found)


def test_a_small_bias_everywhere_fails_by_its_mean(case):
    found = verdict(case, change_out=lambda x: x * 1.02)
    assert found.max_error <= found.max_allowed and found.mean_error > found.mean_allowed and not found.ok


@pytest.mark.parametrize(
    "change",
    [put(math.nan, 0, 0, 5), put(-math.inf, 0, 0, 5), lambda x: x / math.log(2), lambda x: x + 1e-3],
    ids=["nan", "minus infinity", "base 2", "shifted"],
)
def test_wrong_lse_fails(case, change):
    assert not verdict(case, change_lse=change).ok


def test_lse_of_rows_without_keys():
    q, k, v = tensors(1, 5, 3, 1, 1, dtype=torch.float16)
    out, lse = attention_reference(q, k, v, causal=True)
    assert check(out, lse, q, k, v, causal=True).ok
    assert not check(out, lse.nan_to_num(neginf=math.inf), q, k, v, causal=True).ok  # flash_attn 2's +inf
    assert not check(out.masked_fill(lse.isneginf().mT[..., None], math.nan), lse, q, k, v, causal=True).ok


def test_one_key_leaves_a_small_absolute_tolerance():
    """With one key PyTorch is exact, and a relative rule would ask for equality."""
    q, k, v = tensors(1, 1, 1, 2, 2, dtype=torch.float16)
    found = check(*attention_reference(q, k, v), q, k, v)
    assert 0 < found.max_allowed < 5e-3 and 0 < found.mean_allowed < 1e-3


def test_nothing_to_compare():
    q, k, v = tensors(2, 0, 3, 2, 2, dtype=torch.float16)
    assert check(*attention_reference(q, k, v), q, k, v).ok


def test_nan_is_never_ok():
    good = Verdict(1.0, 1.0, 0.0, 0.0, 0.0, 0.0)
    assert good.ok
    for name in ("max_error", "max_allowed", "mean_error", "mean_allowed", "lse_error", "lse_allowed"):
        assert not Verdict(**{**vars(good), name: math.nan}).ok


@pytest.mark.parametrize(
    "setting",
    [
        "torch.backends.fp32_precision = 'tf32'",
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
        "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
        "torch.backends.cuda.matmul.allow_tf32 = True",
        "torch.set_float32_matmul_precision('medium')",
    ],
)
def test_the_truth_is_fp32_whatever_products_are_in(setting):
    """A process of its own for each: torch refuses to read what was set by other names. Nothing is left changed."""
    code = (
        "import torch\n"
        "from fa2gen.reference import attention_reference, check, check_gradients\n"
        "g = torch.Generator().manual_seed(0)\n"
        "q, k, v = (torch.randn(1, 200, 2, 64, generator=g).to(torch.bfloat16) for _ in range(3))\n"
        "expected = attention_reference(q, k, v)\n"
        f"{setting}\n"
        "backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul\n"
        "state = lambda: [b.fp32_precision for b in backends]\n"
        "before = state()\n"
        "verdict = check(*expected, q, k, v)\n"
        "assert verdict.max_error == 0 and verdict.lse_error == 0, verdict\n"
        "check_gradients((q, k, v), q, q, k, v)\n"
        "assert state() == before\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
