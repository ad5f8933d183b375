"""Scores far beyond what exp holds, finite all the same: a softmax of them is what fp32 makes it, not NaN and not 0."""

from __future__ import annotations

import pytest
import torch

from fa2gen.options import Options
from fa2gen.spec import KernelSpec
from fa2gen.testing import run_on_cpu
from tests.cpu.guard import DTYPES

KERNELS = (
    "fa2_fwd_sm80_bf16_d64_m128_n64_s2_w4",
    "fa2_fwd_sm80_fp16_d64_causal_m128_n64_s1_w4",
    "fa2_fwd_sm90_bf16_d64_m128_n64_s2_w8",
    "fa2_fwd_sm90_fp16_d64_m128_n64_s2_w8_r1",
    "fa2_fwd_sm90_bf16_d64_causal_m128_n64_s2_w8_r1",
    "fa2_fwd_sm90_fp16_d64_window_m128_n64_s2_w8_r1",
)


def attend(name, q, k, v, options):
    """(out, lse) of a kernel and of fp64, over (seqlen, 64) tensors."""
    spec = KernelSpec.from_name(name)
    q, k, v = (x.to(DTYPES[spec.problem.dtype])[None, :, None] for x in (q, k, v))
    out, lse, _ = run_on_cpu(spec, q, k, v, options)
    scores = q[0, :, 0].double() @ k[0, :, 0].double().T * options.scale(64)
    if options.mask == "causal":
        rows, keys = scores.shape
        scores = scores.masked_fill(torch.ones(rows, keys, dtype=torch.bool).triu(1 + keys - rows), -torch.inf)
    expected = scores.softmax(-1) @ v[0, :, 0].double()
    return out[0, :, 0].double(), lse[0, 0].double(), expected, scores.logsumexp(-1)


def options_of(name, softmax_scale=None):
    return Options(softmax_scale=softmax_scale, causal="causal" in name)


@pytest.mark.parametrize(
    ("name", "gain"), [(name, gain) for name in KERNELS for gain in (1e2, 1e4, 1e6) if gain < 1e5 or "bf16" in name]
)
def test_one_key_takes_it_all(name, gain):
    """Scores to 1e10, bf16 to 1e14: their maximum times the scale is rounded by hundreds, which exp2 must never see."""
    torch.manual_seed(int(gain))
    q, k, v = (torch.randn(rows, 64) for rows in (100, 300, 300))
    out, lse, expected, expected_lse = attend(name, q * gain, k * gain, v, options_of(name))
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("name", KERNELS)
def test_differences_of_large_scores_are_kept(name):
    """Scores of 2^22 plus 0 to 7, all exact in fp32: the weights are those of 0 to 7. Their maximum comes last."""
    torch.manual_seed(0)
    q, k, v = torch.zeros(100, 64), torch.zeros(256, 64), torch.randn(256, 64)
    q[:, 0], k[:, 0] = 2.0**11, 2.0**11
    q[:, 1], k[:, 1] = 1.0, torch.arange(256) // 32
    out, lse, expected, expected_lse = attend(name, q, k, v, options_of(name, softmax_scale=1.0))
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("sign", (1, -1))
def test_few_rows_of_a_warp_are_large(name, sign):
    """A row here and there, of either sign, among others and rows that see no key, in each tile of a warp."""
    torch.manual_seed(0)
    q, k, v = 1e-4 * torch.randn(300, 64), 100 * torch.randn(256, 64).abs(), torch.randn(256, 64)
    large = [7, 90, 108, 150, 299]
    q[large] = sign * 1e4 * torch.randn(len(large), 64).abs()
    out, lse, expected, expected_lse = attend(name, q, k, v, options_of(name, softmax_scale=64.0))
    unseen = expected_lse.isinf()
    assert unseen.sum() == (44 if "causal" in name else 0) and not out[unseen].any() and lse[unseen].isneginf().all()
    torch.testing.assert_close(out[~unseen], expected[~unseen], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse[~unseen], expected_lse[~unseen], rtol=1e-6, atol=1e-2)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("value", (torch.inf, torch.nan))
def test_rows_of_infinite_scores_are_nan_as_in_torch(name, value):
    torch.manual_seed(0)
    q, k, v = torch.randn(64, 64), torch.randn(256, 64).abs(), torch.randn(256, 64)
    q[5] = value
    out, _, expected, _ = attend(name, q, k, v, options_of(name))
    assert torch.equal(out.isnan(), expected.isnan()) and out[5].isnan().all()
