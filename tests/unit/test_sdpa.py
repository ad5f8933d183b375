"""torch's attention on fa2gen. aten's operators are taken over for CPU tensors here, which no user can ask for: so all
that is behind F.scaled_dot_product_attention on a GPU runs without one. (On the CPU that function takes others.)"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import current_flash_attention_impl, list_flash_attention_impls
from torch.nn.attention.varlen import AuxRequest, varlen_attn

import fa2gen
from fa2gen import UnsupportedProblem
from fa2gen.integrations.sdpa import Overrides
from fa2gen.reference import attention_reference, check_gradients

WORKER = Path(__file__).with_name("context_parallel_on_cpu.py")
SDPA = torch.ops.aten._scaled_dot_product_flash_attention


@pytest.fixture(autouse=True)
def overrides():
    made = Overrides("CPU")
    yield made
    made.remove()


def tensors(seqlen_q, seqlen_k, bshd, heads=4, heads_kv=2):
    """(batch, heads, seqlen, head_dim), in memory like that or with heads behind seqlen."""
    torch.manual_seed(0)
    xs = []
    for seqlen, n in ((seqlen_q, heads), (seqlen_k, heads_kv), (seqlen_k, heads_kv)):
        x = torch.randn(2, seqlen, n, 16).bfloat16()
        xs.append((x.transpose(1, 2) if bshd else x.transpose(1, 2).contiguous()).requires_grad_())
    return xs


@pytest.mark.parametrize("bshd", [True, False], ids=["bshd", "bhsd"])
@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "causal"), [(70, 70, True), (40, 70, False), (40, 70, True), (70, 40, True)]
)
def test_scaled_dot_product_attention(seqlen_q, seqlen_k, causal, bshd):
    """Causal from the top left, grouped queries, and strides as torch's compiler expects them."""
    q, k, v = tensors(seqlen_q, seqlen_k, bshd)
    out, lse, *_ = SDPA(q, k, v, 0.0, causal, scale=0.3)
    assert out.stride() == q.stride()
    dout = torch.randn(out.shape).bfloat16()
    found = torch.autograd.grad(out, (q, k, v), dout)
    assert [x.stride() for x in found] == [x.stride() for x in (q, k, v)]
    q, k, v, dout = (x.detach().transpose(1, 2) for x in (q, k, v, dout))
    # From the top left: as from the bottom right of as many keys as queries, those that are not there being hidden.
    mask = {"window_right": seqlen_q - seqlen_k} if causal and seqlen_q > seqlen_k else {"causal": causal}
    seen = min(seqlen_q, seqlen_k) if causal else seqlen_k
    expected, expected_lse = attention_reference(q, k[:, :seen], v[:, :seen], softmax_scale=0.3, **mask)
    torch.testing.assert_close(out.transpose(1, 2), expected, rtol=0, atol=1e-2)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-4)
    dq, dk, dv = (x.transpose(1, 2) for x in found)
    assert not dk[:, seen:].any() and not dv[:, seen:].any()
    given = (dout, q, k[:, :seen].contiguous(), v[:, :seen].contiguous())
    verdict = check_gradients((dq, dk[:, :seen], dv[:, :seen]), *given, softmax_scale=0.3, **mask)
    assert verdict.ok, verdict


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (5, 0), (3, 2)], ids=str)
def test_varlen_attn(window):
    torch.manual_seed(0)
    lengths, bounds = [30, 0, 41], torch.tensor([0, 30, 30, 71], dtype=torch.int32)
    q, k, v = (torch.randn(71, n, 16).bfloat16().requires_grad_() for n in (4, 2, 2))
    said = {"window_size": window, "enable_gqa": True, "scale": 0.3}
    out, lse = varlen_attn(q, k, v, bounds, bounds, 41, 41, return_aux=AuxRequest(lse=True), **said)
    grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    parts = [x.detach().split(lengths) for x in (q, k, v)]
    for i in (0, 2):
        one = [x[i].unsqueeze(0).requires_grad_() for x in parts]
        expected, expected_lse, _ = fa2gen.flash_attn_func(
            *one, softmax_scale=0.3, window_size=window, return_attn_probs=True
        )
        torch.testing.assert_close(out.split(lengths)[i], expected[0], rtol=0, atol=1e-2)
        assert lse.shape == (4, 71)
        torch.testing.assert_close(lse.split(lengths, dim=1)[i], expected_lse[0], rtol=0, atol=1e-4)
        for found, right in zip(grads, torch.autograd.grad(expected, one, torch.ones_like(expected)), strict=True):
            torch.testing.assert_close(found.split(lengths)[i], right[0], rtol=0, atol=3e-2)


def test_results_into_a_given_tensor():
    if not hasattr(torch.ops.aten, "_flash_attention_forward_no_dropout_inplace"):
        pytest.skip("torch 2.13 and later")
    q = torch.randn(1, 9, 2, 16).bfloat16()
    out = torch.full_like(q, float("nan"))
    said = (q, q, q, None, None, 9, 9, 0.0, True, False)
    lse = torch.ops.aten._flash_attention_forward_no_dropout_inplace(out, *said)
    expected, expected_lse, *_ = torch.ops.aten._flash_attention_forward(*said)
    assert out.equal(expected) and lse.equal(expected_lse)


def test_refusals_say_how_to_get_torchs_own_back(overrides):
    q = torch.randn(1, 2, 9, 16).bfloat16()
    with pytest.raises(RuntimeError, match=r"dropout_p=0.5 .*restore_flash_attention_impl"):
        SDPA(q, q, q, 0.5)
    overrides.remove()
    with pytest.raises(NotImplementedError, match="CPU"):
        SDPA(q, q, q)


def test_what_torch_forgets_in_the_backward_pass_is_refused():
    q = torch.randn(1, 9, 2, 16).bfloat16().requires_grad_()
    said = (q, q, q, None, None, 9, 9, 0.0, True, False)
    with pytest.raises(UnsupportedProblem, match="alibi_slopes has no gradient"):
        torch.ops.aten._flash_attention_forward(*said, alibi_slopes=torch.ones(2))
    with torch.no_grad():
        out = torch.ops.aten._flash_attention_forward(*said, alibi_slopes=torch.ones(2))[0]
    assert out.equal(fa2gen.flash_attn_func(q, q, q, causal=True, alibi_slopes=torch.ones(2)).detach())


def test_enable_sdpa_is_undone_whole():
    """With the last that is enabled, in whatever order they end; each ends once, and may be enabled again."""
    assert "fa2gen" in list_flash_attention_impls()
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()

    def enabled():
        found = current_flash_attention_impl() == "fa2gen"
        assert torch.backends.cuda.cudnn_sdp_enabled() == (cudnn and not found)
        return found

    with fa2gen.enable_sdpa() as first:
        assert enabled()
    assert not enabled()
    with first:
        assert enabled()
        second = fa2gen.enable_sdpa()
    first.disable()
    assert enabled()
    second.disable()
    assert not enabled()
    second.disable()
    assert not enabled()


def test_context_parallel(tmp_path):
    """torch's ring attention, over two processes: out and gradients are one process's."""
    command = [sys.executable, str(WORKER)]
    ranks = [
        subprocess.Popen([*command, str(rank), "2", str(tmp_path / "store")], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        for process in ranks:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in ranks:
            process.kill()
