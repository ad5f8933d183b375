"""The PyTorch door on a machine without a GPU: the operator, its fake implementation, and flash_attn's functions."""

from __future__ import annotations

import inspect
import math

import numpy
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import fa2gen.ops
from fa2gen.ops import (
    attention,
    flash,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    flash_kvcache,
    flash_varlen,
)
from fa2gen.options import Options
from fa2gen.reference import attention_reference, check, check_gradients

FWD = torch.ops.fa2gen.fwd.default


def tensors(batch=2, seqlen_q=37, seqlen_k=53, heads=6, heads_kv=2, head_dim=40, dtype=torch.bfloat16, device=None):
    """Random on the CPU; on another device (fake tensors) just there."""

    def make(seqlen, n):
        shape = (batch, seqlen, n, head_dim)
        return torch.randn(shape).to(dtype) if device is None else torch.empty(shape, dtype=dtype, device=device)

    torch.manual_seed(0)
    return make(seqlen_q, heads), make(seqlen_k, heads_kv), make(seqlen_k, heads_kv)


def assert_same(result, expected):
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


# The operator -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("sizes", [{}, {"seqlen_q": 0}, {"seqlen_k": 0}, {"batch": 0}, {"heads": 2}], ids=str)
def test_opcheck(sizes, causal):
    found = torch.library.opcheck(FWD, (*tensors(**sizes), 0.2, causal))
    assert set(found.values()) == {"SUCCESS"}


def test_opcheck_of_strided_views():
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors())
    assert set(torch.library.opcheck(FWD, (q, k, v, 0.2, True)).values()) == {"SUCCESS"}


def test_inductor_keeps_strides():
    assert torch.Tag.needs_fixed_stride_order in FWD.tags


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_cpu_tensors_run_the_reference(causal, dtype):
    q, k, v = tensors(dtype=dtype)
    out, lse = attention(q, k, v, causal=causal, softmax_scale=0.3)
    assert out.dtype == dtype and out.is_contiguous() and out.shape == q.shape
    assert lse.dtype == torch.float32 and lse.is_contiguous() and lse.shape == (2, 6, 37)
    assert check(out, lse, q, k, v, causal=causal, softmax_scale=0.3).ok


@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(40, 8), (40, 72), (59, 111)])
def test_values_of_another_head_dim(head_dim, head_dim_v):
    """out, dout and dv have v's head dim, the scale is of q's: through every door, and under every transform."""
    q, k, _ = tensors(head_dim=head_dim)
    v = torch.randn(2, 53, 2, head_dim_v).to(q.dtype)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = attention(q, k, v, causal=True)
    assert out.shape == (2, 37, 6, head_dim_v) and out.is_contiguous()
    assert check(out, lse, q, k, v, causal=True).ok
    dout = torch.randn(out.shape).to(out.dtype)
    gradients = torch.autograd.grad(out, leaves, dout)
    assert check_gradients(gradients, dout, q, k, v, causal=True).ok
    assert set(torch.library.opcheck(FWD, (q, k, v, 0.2, True)).values()) == {"SUCCESS"}
    assert_same(flash_attn_func(q, k, v, causal=True), out)

    bounds_q, bounds_k = (torch.arange(0, 3 * n, n, dtype=torch.int32) for n in (37, 53))
    packed = flash_attn_varlen_func(*(x.flatten(0, 1) for x in leaves), bounds_q, bounds_k, causal=True)
    torch.testing.assert_close(packed, out.flatten(0, 1))
    of_packed = torch.autograd.grad(packed, leaves, dout.flatten(0, 1))
    torch.testing.assert_close(of_packed, gradients, rtol=0.02, atol=0.01)
    arguments = (*(x.detach().flatten(0, 1) for x in leaves), bounds_q, bounds_k, None, None, 0.2, True)
    checked = torch.library.opcheck(torch.ops.fa2gen.fwd_varlen.default, arguments)
    assert set(checked.values()) == {"SUCCESS"}

    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(attention(q, k, v)[0], leaves, dout)
    assert counter.get_total_flops() == 2 * 2 * 6 * 37 * 53 * (4 * head_dim + 3 * head_dim_v)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_to_one_graph(dynamic):
    q, k, v = tensors()

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=dynamic)
    def compiled(q, k, v):
        out, lse, _ = flash_attn_func(q * 2, k, v, causal=True, window_size=[-1, 0], return_attn_probs=True)
        return out * 3, lse

    for seqlen in (37, 41, 53):
        q2 = torch.nn.functional.pad(q, (0, 0, 0, 0, 0, seqlen - q.shape[1]))
        expected, lse = attention(q2 * 2, k, v, causal=True)
        assert_same(compiled(q2, k, v), (expected * 3, lse))
    torch.compiler.reset()


@pytest.mark.parametrize("device", ["cuda", "cpu", "meta"])
def test_fake_tensors(device):
    """Shapes, strides, dtypes and devices of the results are known without running anything, also for CUDA."""
    with FakeTensorMode():
        q, k, v = tensors(device=device)
        q = torch.empty(2, 6, 37, 40, dtype=q.dtype, device=device).transpose(1, 2)
        out, lse, none = flash_attn_func(q, k, v, return_attn_probs=True)
    assert none is None
    assert (out.shape, out.dtype, out.device.type) == (q.shape, q.dtype, device) and out.is_contiguous()
    assert (lse.shape, lse.dtype, lse.device.type) == ((2, 6, 37), torch.float32, device) and lse.is_contiguous()


def test_fake_tensors_are_validated():
    with FakeTensorMode(), pytest.raises(fa2gen.InvalidInput, match="multiple"):
        flash_attn_func(*tensors(heads=5, device="cuda"))


# flash_attn's functions -------------------------------------------------------------------------------------------

_OPTIONS = {
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "alibi_slopes": None,
    "deterministic": False,
    "return_attn_probs": False,
}


@pytest.mark.parametrize(
    ("function", "tensor_names"),
    [(flash_attn_func, "q k v"), (flash_attn_qkvpacked_func, "qkv"), (flash_attn_kvpacked_func, "q kv")],
)
def test_signature_is_that_of_flash_attn(function, tensor_names):
    parameters = inspect.signature(function).parameters
    own = [name for name, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY]
    assert own == ["attention_chunk", "s_aux"]
    assert [*parameters] == [*tensor_names.split(), *_OPTIONS, *own]
    assert {name: parameters[name].default for name in _OPTIONS} == _OPTIONS


def test_every_name_is_there():
    for name in fa2gen.ops.__all__:
        assert callable(getattr(fa2gen.ops, name))
    assert fa2gen.flash_attn_func is flash_attn_func


def test_return_values():
    q, k, v = tensors()
    out = flash_attn_func(q, k, v)
    also, lse, probs = flash_attn_func(q, k, v, return_attn_probs=True)
    assert_same(also, out)
    assert probs is None
    assert_same(lse, attention(q, k, v)[1])


def test_default_scale_and_its_types():
    q, k, v = tensors()
    out = flash_attn_func(q, k, v)
    for scale in (40**-0.5, numpy.float64(40**-0.5)):
        assert_same(flash_attn_func(q, k, v, softmax_scale=scale), out)
    assert_same(flash_attn_func(q, k, v, softmax_scale=1), flash_attn_func(q, k, v, 0.0, 1.0))


@pytest.mark.parametrize(
    ("window", "causal", "same_as"),
    [
        ((-1, -1), False, False),
        ([-1, -1], True, True),
        ((None, None), False, False),
        (None, True, True),
        ((-1, 0), False, True),
        ((None, 0), False, True),
        ((-1, 5), True, True),
        ((52, -1), False, False),
        ((1000, 1000), False, False),
        ((1000, 0), True, True),
    ],
    ids=str,
)
def test_windows_that_are_no_windows(window, causal, same_as):
    q, k, v = tensors()
    assert_same(flash_attn_func(q, k, v, causal=causal, window_size=window), flash_attn_func(q, k, v, causal=same_as))


def test_windows_in_every_writing():
    """Sequences, arrays and tensors of two; None and -1 for no limit. All hide what they say."""
    q, k, v = tensors()
    expected = attention_reference(q, k, v, window_left=3, window_right=5)[0]
    for window in ((3, 5), [3, 5], numpy.array([3, 5]), torch.tensor([3, 5]), (numpy.int64(3), torch.tensor(5))):
        torch.testing.assert_close(flash_attn_func(q, k, v, window_size=window), expected, rtol=1e-2, atol=1e-2)
    one_sided = flash_attn_func(q, k, v, window_size=[3, None])
    assert_same(one_sided, flash_attn_func(q, k, v, window_size=(3, -1)))
    assert not torch.equal(one_sided, flash_attn_func(q, k, v))
    assert_same(attention(q, k, v, window_size=(3, 5))[0], flash_attn_func(q, k, v, window_size=(3, 5)))


def test_chunks():
    q, k, v = tensors()
    expected = attention_reference(q, k, v, causal=True, chunk=16)[0]
    found = flash_attn_func(q, k, v, causal=True, attention_chunk=numpy.int32(16))
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    assert_same(flash_attn_func(q, k, v, causal=True, attention_chunk=53), flash_attn_func(q, k, v, causal=True))


def test_deterministic_changes_nothing():
    q, k, v = tensors()
    assert_same(flash_attn_func(q, k, v, deterministic=True), flash_attn_func(q, k, v))


def test_packed_inputs():
    qkv = torch.stack(tensors(seqlen_k=37, heads_kv=6), dim=2)
    expected = flash_attn_func(*qkv.unbind(2), causal=True)
    assert_same(flash_attn_qkvpacked_func(qkv, causal=True), expected)
    assert_same(flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:], causal=True), expected)


def test_views_give_what_copies_give():
    q, k, v = tensors()
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert not views[0].is_contiguous()
    out = flash_attn_func(*views)
    assert out.is_contiguous()
    assert_same(out, flash_attn_func(q, k, v))


@pytest.mark.parametrize(
    "sizes", [{"seqlen_q": 0}, {"seqlen_k": 0}, {"batch": 0}, {"heads": 0, "heads_kv": 0}, {"heads": 0}], ids=str
)
def test_empty_problems_are_defined(sizes):
    q, k, v = tensors(**sizes)
    out, lse = attention(q, k, v, causal=True)
    assert out.shape == q.shape and not out.any()
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1]) and lse.isneginf().all()


def test_causal_is_aligned_to_the_bottom_right():
    q, k, v = tensors(seqlen_q=9, seqlen_k=5)
    out, lse = attention(q, k, v, causal=True)
    assert not out[:, :4].any() and lse[..., :4].isneginf().all()
    assert_same(out[:, 4], v[:, 0].repeat_interleave(3, dim=1))


def test_gradients_cost_nothing_where_they_are_not_wanted():
    q, k, v = (x.requires_grad_() for x in tensors())
    out = flash_attn_func(q.detach(), k.detach(), v.detach())
    assert flash_attn_func(q, k, v).requires_grad
    with torch.no_grad():
        assert_same(flash_attn_func(q, k, v), out)
    with torch.inference_mode():
        assert_same(flash_attn_func(q, k, v), out)


def test_plain_calls_say_all_options(monkeypatch):
    """Or they and others would be two signatures, each prepared for itself."""
    said = []
    for module, name, place in (
        (flash, "forward_out", 3),
        (flash_varlen, "forward_ragged_out", 4),
        (flash_kvcache, "read_out", 7),
    ):
        monkeypatch.setattr(module, "is_plain", lambda *_: True)
        monkeypatch.setattr(module, name, lambda *given, place=place: said.append(given[place]))
    q, k, v = tensors(batch=1)
    bounds = [torch.tensor([0, n], dtype=torch.int32) for n in (37, 53)]
    flash_attn_func(q, k, v)
    flash_attn_varlen_func(q[0], k[0], v[0], *bounds, 37, 53)
    flash_attn_with_kvcache(q, k, v)
    fields = [len(options) for options in said]
    assert fields == [len(Options._fields)] * 3


def test_long_sequences_need_no_score_matrix():
    """The CPU implementation is Algorithm 1: a million keys cost no more memory than a tile of scores."""
    q = torch.randn(1, 8, 1, 8, dtype=torch.float16)
    k = torch.randn(1, 1 << 20, 1, 8, dtype=torch.float16)
    out, lse = attention(q, k, k)
    torch.testing.assert_close(out, attention_reference(q, k, k)[0], rtol=1e-3, atol=1e-3)
    assert math.isclose(float(lse.mean()), math.log(1 << 20), abs_tol=2.0)
