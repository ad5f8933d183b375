"""Bad input: every case is an error of ours that names the rule, the numbers, and the nearest thing that works.

One table: what is tried, the class of the error, and words that its message must hold. Nothing here needs a GPU; what a
GPU would see is validated by the same functions, on the CPU or on fake CUDA tensors.
"""

# ruff: noqa: E501  (the table reads better with one case a line)

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from torch._subclasses import FakeTensorMode

import fa2gen
from fa2gen import Fa2GenError, InfeasibleSpec, InvalidInput, KernelSpec, Problem, Tiling, UnsupportedProblem, make_plan
from fa2gen.ops import (
    attention,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
    forward_into,
)
from fa2gen.ops.validate import describe
from fa2gen.padding import unpad_input
from fa2gen.select import Device, default_tiling, kernel_arch

BF16, FP16 = torch.bfloat16, torch.float16


def t(*shape: int, dtype: Any = BF16, device: str = "cpu") -> Any:
    return torch.zeros(shape, dtype=dtype, device=device)


Q, K = (2, 5, 6, 64), (2, 7, 2, 64)


def run(q: Any = None, k: Any = None, v: Any = None, **options: Any) -> Any:
    """flash_attn_func on good tensors, but for what is given."""
    q, k = (t(*Q) if q is None else q), (t(*K) if k is None else k)
    return flash_attn_func(q, k, (k if v is None else v), **options)


def cached(**other: Any) -> Any:
    """`flash_attn_with_kvcache` of two sequences with room for 32 keys, and of what else is given."""
    return flash_attn_with_kvcache(
        **{"q": t(2, 1, 6, 64), "k_cache": t(2, 32, 2, 64), "v_cache": t(2, 32, 2, 64), **other}
    )


def turned(**other: Any) -> Any:
    """The same, with a new key and angles."""
    new = {"k": t(2, 1, 2, 64), "v": t(2, 1, 2, 64), "rotary_cos": t(32, 16), "rotary_sin": t(32, 16)}
    return cached(**{**new, "cache_seqlens": 3, **other})


def modified(score: Any, allow: str = "", **inputs: Any) -> Any:
    """A call with an expression."""
    return attention(t(*Q), t(*K), t(*K), score=score, allow=allow, inputs=inputs)


def learned(score: str, **inputs: Any) -> None:
    """The gradient of a call with tensors that learn, in one order."""
    given = {name: x.float().requires_grad_() for name, x in inputs.items()}
    attention(t(*Q), t(*K), t(*K), score=score, inputs=given, deterministic=True)[0].sum().backward()


def ints(*numbers: int) -> Any:
    return torch.tensor(numbers, dtype=torch.int32)


def over_pages(**given):
    """`ragged` over four pages of 16 keys."""
    pages = {"k": t(4, 16, 2, 64), "v": t(4, 16, 2, 64), "cu_seqlens_k": None, "seqused_k": ints(20, 30)}
    return ragged(**{**pages, "block_table": ints(0, 1, 2, 3).view(2, 2), **given})


def ragged(q: Any = None, k: Any = None, v: Any = None, **changes: Any) -> Any:
    """flash_attn_varlen_func of two sequences, but for what is given."""
    q, k = (t(8, 6, 64) if q is None else q), (t(9, 2, 64) if k is None else k)
    named = {"cu_seqlens_q": ints(0, 3, 8), "cu_seqlens_k": ints(0, 4, 9), **changes}
    return flash_attn_varlen_func(q, k, (k if v is None else v), **named)


def nested(layout: Any) -> Any:
    """Two sequences of 3 and 5 rows."""
    return torch.nested.nested_tensor([t(3, 2, 64), t(5, 2, 64)], layout=layout)


def all_of(head_dim: int) -> Any:
    x = t(1, 4, 2, head_dim)
    return flash_attn_func(x, x, x)


def fake_cuda(run: Callable[[], Any]) -> Any:
    with FakeTensorMode():
        return run()


def wide(x: Any) -> Any:
    """The same values with a stride of 2 in the last dimension."""
    return torch.cat([x, x], dim=-1)[..., ::2]


def gpu(name: str, major: int, minor: int) -> Device:
    return Device(name=name, compute_capability=(major, minor), shared_memory_per_block=101_376, num_sms=84)


def plan(head_dim: int = 128, **tiling: Any) -> Any:
    return make_plan(KernelSpec(problem=Problem(head_dim=head_dim), tiling=Tiling(**tiling)))


def sm90(**changes: Any) -> dict[str, Any]:
    return {"arch": "sm90", "tile_m": 128, "tile_n": 128, "num_stages": 2, "num_mma_warps": 8, **changes}


GOOD_NAME = "fa2_fwd_sm90_bf16_d128_m128_n128_s2_w8"
CUDA = '128; } extern "C" __global__ void evil() { asm("trap;");'


class Case(NamedTuple):
    error: type[Fa2GenError]
    words: str
    """Separated by |; each must be in the message."""
    run: Callable[[], Any]


CASES: dict[str, Case] = {
    # dtype
    "fp32": Case(UnsupportedProblem, "float32|float16|bfloat16|.to(", lambda: run(t(*Q, dtype=torch.float32), t(*K, dtype=torch.float32))),
    "fp64": Case(UnsupportedProblem, "float64|bfloat16", lambda: run(t(*Q, dtype=torch.float64), t(*K, dtype=torch.float64))),
    "int32": Case(UnsupportedProblem, "int32|bfloat16", lambda: run(t(*Q, dtype=torch.int32), t(*K, dtype=torch.int32))),
    "fp8": Case(UnsupportedProblem, "float8_e4m3fn|bfloat16", lambda: run(t(*Q).to(torch.float8_e4m3fn), t(*K).to(torch.float8_e4m3fn))),
    "k of another dtype": Case(InvalidInput, "q is torch.bfloat16|k is torch.float16|k.to(q.dtype)", lambda: run(k=t(*K, dtype=FP16))),
    "v of another dtype": Case(InvalidInput, "v is torch.float16|v.to(q.dtype)", lambda: run(v=t(*K, dtype=FP16))),
    # what is not a tensor
    "q is None": Case(InvalidInput, "q must be a torch.Tensor|NoneType", lambda: flash_attn_func(None, t(*K), t(*K))),
    "k is a numpy array": Case(InvalidInput, "k must be|ndarray|as_tensor", lambda: run(k=numpy.zeros(K))),
    "v is a list": Case(InvalidInput, "v must be|list", lambda: run(v=[[[[0.0]]]])),
    "q is a number, with a window": Case(InvalidInput, "q must be|3 (int)", lambda: run(q=3, window_size=(-1, 0))),
    "q is nested": Case(UnsupportedProblem, "q is a nested tensor|all three|flash_attn_varlen_func|q.values()", lambda: run(nested(torch.jagged))),
    "k is nested, strided": Case(UnsupportedProblem, "k is a nested tensor|k.unbind()|layout=torch.jagged", lambda: run(k=nested(torch.strided))),
    "qkv is nested": Case(UnsupportedProblem, "qkv is a nested tensor", lambda: flash_attn_qkvpacked_func(nested(torch.strided))),
    "lengths and nested": Case(UnsupportedProblem, "q is a nested tensor|q.values()", lambda: attention(*[nested(torch.jagged)] * 3, cu_seqlens_q=ints(0, 8), cu_seqlens_k=ints(0, 8))),
    "lengths of attention are a list": Case(InvalidInput, "seqused_k must be a torch.Tensor or None|dtype=torch.int32", lambda: attention(t(*Q), t(*K), t(*K), seqused_k=[8, 9])),
    "arch and nested": Case(UnsupportedProblem, "v is a nested tensor", lambda: attention(t(*Q), t(*K), nested(torch.jagged), arch="sm80")),
    "the operator and nested": Case(UnsupportedProblem, "q is a nested tensor", lambda: torch.ops.fa2gen.fwd(nested(torch.strided), t(*K), t(*K), 0.1, True)),
    "the operator and a scale": Case(InvalidInput, "nan|finite", lambda: torch.ops.fa2gen.fwd(t(*Q), t(*K), t(*K), math.nan, True)),
    "the operator and a window": Case(InvalidInput, "window_left is -2|-1", lambda: torch.ops.fa2gen.fwd(t(*Q), t(*K), t(*K), 0.1, True, window_left=-2)),
    "s_aux is a list": Case(InvalidInput, "s_aux must be|list|as_tensor", lambda: run(s_aux=[0.0] * 6)),
    "s_aux of integers": Case(InvalidInput, "s_aux must be|int64|s_aux.float()", lambda: run(s_aux=torch.zeros(6, dtype=torch.int64))),
    "s_aux of fp64": Case(InvalidInput, "s_aux must be|float64", lambda: run(s_aux=torch.zeros(6, dtype=torch.float64))),
    "s_aux for the key heads": Case(InvalidInput, "s_aux is|(2,)|(6,), one logit a query head", lambda: run(s_aux=torch.zeros(2))),
    "s_aux with a batch": Case(InvalidInput, "s_aux is|(6,)", lambda: run(s_aux=torch.zeros(1, 6))),
    "s_aux elsewhere": Case(InvalidInput, "s_aux is|meta|on cpu", lambda: run(s_aux=torch.zeros(6, device="meta"))),
    "s_aux with a stride": Case(InvalidInput, "s_aux has a stride of 2|contiguous()", lambda: run(s_aux=torch.zeros(12)[::2])),
    "the operator and a gradient of a part": Case(UnsupportedProblem, "partial results|detach", lambda: torch.ops.fa2gen.fwd(t(*Q).requires_grad_(), t(*K), t(*K), 0.1, True, partial=True)),
    "the operator and 16-bit sinks": Case(InvalidInput, "s_aux is|torch.float32", lambda: torch.ops.fa2gen.fwd_general(t(*Q), t(*K), t(*K), None, None, None, None, t(6), None, [], 0.1, True)),
    "ragged: s_aux for the key heads": Case(InvalidInput, "s_aux is|(6,)", lambda: ragged(s_aux=torch.zeros(2))),
    "q is sparse": Case(UnsupportedProblem, "sparse|to_dense", lambda: run(t(*Q).to_sparse())),
    # rank and shape
    "q of rank 3": Case(InvalidInput, "q has 3 dimensions|(batch, seqlen, heads, head_dim)|unsqueeze(0)", lambda: run(t(5, 6, 64))),
    "k of rank 2": Case(InvalidInput, "k has 2 dimensions", lambda: run(k=t(7, 64))),
    "v of rank 5": Case(InvalidInput, "v has 5 dimensions", lambda: run(v=t(1, 2, 7, 2, 64))),
    "q of rank 0": Case(InvalidInput, "q has 0 dimensions", lambda: run(t())),
    "k of another batch": Case(InvalidInput, "q has batch 2|k has batch 3", lambda: run(k=t(3, 7, 2, 64))),
    "v of another batch": Case(InvalidInput, "v has batch 1", lambda: run(v=t(1, 7, 2, 64))),
    "v of another seqlen": Case(InvalidInput, "k has seqlen 7|v has seqlen 8", lambda: run(v=t(2, 8, 2, 64))),
    "v of other heads": Case(InvalidInput, "k has heads 2|v has heads 1", lambda: run(v=t(2, 7, 1, 64))),
    "k of another head dim": Case(UnsupportedProblem, "head_dim 64|k has 32|pad", lambda: run(k=t(2, 7, 2, 32))),
    "v of head dim 0": Case(InvalidInput, "v's head_dim is 0|from 1 to 256", lambda: run(v=t(2, 7, 2, 0))),
    "v of head dim 264": Case(UnsupportedProblem, "v's head_dim is 264|256|scaled_dot_product_attention", lambda: run(v=t(2, 7, 2, 264))),
    "packed qkv of rank 4": Case(InvalidInput, "qkv has shape|(batch, seqlen, 3, heads, head_dim)", lambda: flash_attn_qkvpacked_func(t(*Q))),
    "packed qkv of two": Case(InvalidInput, "qkv has shape (2, 5, 2, 6, 64)|3", lambda: flash_attn_qkvpacked_func(t(2, 5, 2, 6, 64))),
    "packed kv of three": Case(InvalidInput, "kv has shape|(batch, seqlen, 2, heads", lambda: flash_attn_kvpacked_func(t(*Q), t(2, 7, 3, 2, 64))),
    "packed qkv is None": Case(InvalidInput, "qkv must be", lambda: flash_attn_qkvpacked_func(None)),
    # heads
    "heads 6:4": Case(InvalidInput, "q has 6 heads|have 4|multiple|nearest for k and v: 3", lambda: run(k=t(2, 7, 4, 64))),
    "heads 2:6": Case(InvalidInput, "q has 2 heads|have 6|nearest for k and v: 2", lambda: run(q=t(2, 5, 2, 64), k=t(2, 7, 6, 64))),
    "no heads for keys": Case(InvalidInput, "q has 6 heads|have 0", lambda: run(k=t(2, 7, 0, 64))),
    # head dim
    "head dim 0": Case(InvalidInput, "head_dim is 0|from 1 to 256", lambda: all_of(0)),
    "head dim 264": Case(UnsupportedProblem, "head_dim is 264|256|scaled_dot_product_attention", lambda: all_of(264)),
    # strides and devices
    "q with a strided last dim": Case(InvalidInput, "q.stride(-1) is 2|q.contiguous()", lambda: run(wide(t(*Q)))),
    "k with a strided last dim": Case(InvalidInput, "k.stride(-1) is 2|k.contiguous()", lambda: run(k=wide(t(*K)))),
    "v transposed": Case(InvalidInput, "v.stride(-1)|v.contiguous()", lambda: run(v=t(2, 7, 64, 2).transpose(2, 3))),
    "q expanded in the last dim": Case(InvalidInput, "q.stride(-1) is 0", lambda: run(t(2, 5, 6, 1).expand(*Q))),
    "k on another device": Case(InvalidInput, "q is on cpu|k on meta|k.to(q.device)", lambda: run(k=t(*K, device="meta"))),
    "q on cuda, v on cpu": Case(
        InvalidInput, "q is on cuda:0|v on cpu", lambda: fake_cuda(lambda: run(t(*Q, device="cuda"), t(*K, device="cuda"), t(*K)))
    ),
    "q on no supported device": Case(UnsupportedProblem, "xpu|cuda|CPU", lambda: fake_cuda(lambda: run(t(*Q, device="xpu"), t(*K, device="xpu")))),
    "arch on the CPU": Case(InvalidInput, "cpu|leave them out", lambda: attention(t(*Q), t(*K), t(*K), arch="sm80")),
    "forward_into on the CPU": Case(
        InvalidInput, "cpu|fa2gen.attention", lambda: forward_into(t(*Q), t(2, 6, 5, dtype=torch.float32), t(*Q), t(*K), t(*K))
    ),
    # scale
    "scale nan": Case(InvalidInput, "nan|finite|head_dim ** -0.5", lambda: run(softmax_scale=math.nan)),
    "scale inf": Case(InvalidInput, "inf|finite", lambda: run(softmax_scale=math.inf)),
    "scale negative": Case(UnsupportedProblem, "-0.5|-q", lambda: run(softmax_scale=-0.5)),
    "scale zero": Case(UnsupportedProblem, "softmax_scale is 0|mean of v", lambda: run(softmax_scale=0.0)),
    "scale below fp32": Case(UnsupportedProblem, "1e-300|scale q", lambda: run(softmax_scale=1e-300)),
    "scale above fp32": Case(UnsupportedProblem, "1e+300|scale q", lambda: run(softmax_scale=1e300)),
    "scale is text": Case(InvalidInput, "softmax_scale must be a number|'auto'", lambda: run(softmax_scale="auto")),
    "scale is a tensor": Case(InvalidInput, "softmax_scale must be a number|a tensor ()", lambda: run(softmax_scale=torch.tensor(0.1))),
    "scale is True": Case(InvalidInput, "True|did you mean causal", lambda: flash_attn_func(t(*Q), t(*K), t(*K), 0.0, True)),
    "causal is text": Case(InvalidInput, "causal must be|'yes'", lambda: run(causal="yes")),
    "causal is a window": Case(InvalidInput, "causal must be|tuple", lambda: run(causal=(-1, 0))),
    # not built yet
    "all is dropped": Case(InvalidInput, "dropout_p is 1.0|less than 1", lambda: run(dropout_p=1.0)),
    "scale where dropout goes": Case(InvalidInput, "dropout_p is 1.5|fourth positional|softmax_scale", lambda: flash_attn_func(t(*Q), t(*K), t(*K), 1.5)),
    "the operator and a negative dropout": Case(InvalidInput, "dropout_p is -0.1|from 0", lambda: torch.ops.fa2gen.fwd_general(t(*Q), t(*K), t(*K), None, None, None, None, None, torch.zeros(2, dtype=torch.int64), [], 0.1, True, dropout_p=-0.1)),
    "dropout without random bits": Case(InvalidInput, "dropout_p 0.1 needs rng_state|(2,) int64", lambda: torch.ops.fa2gen.fwd_general(t(*Q), t(*K), t(*K), None, None, None, None, None, None, [], 0.1, True, dropout_p=0.1)),
    "random bits without dropout": Case(InvalidInput, "takes no rng_state", lambda: torch.ops.fa2gen.fwd_general(t(*Q), t(*K), t(*K), None, None, None, None, None, torch.zeros(2, dtype=torch.int64), [], 0.1, True)),
    "random bits of int32": Case(InvalidInput, "rng_state is|torch.int64", lambda: torch.ops.fa2gen.fwd_general(t(*Q), t(*K), t(*K), None, None, None, None, None, ints(1, 2), [], 0.1, True, dropout_p=0.1)),
    "dropout nan": Case(InvalidInput, "dropout_p is nan|from 0", lambda: run(dropout_p=math.nan)),
    "dropout below 0": Case(InvalidInput, "dropout_p is -0.1|from 0", lambda: run(dropout_p=-0.1)),
    "dropout is True": Case(InvalidInput, "dropout_p must be a number|True", lambda: run(dropout_p=True)),
    "softcap": Case(InvalidInput, "softcap|-30.0|above 0", lambda: run(softcap=-30.0)),
    "softcap is no number": Case(InvalidInput, "softcap|nan|above 0", lambda: run(softcap=math.nan)),
    "dropout of a tensor that learns": Case(UnsupportedProblem, "dropout|has a gradient|detach()", lambda: attention(t(*Q), t(*K), t(*K), score="s + bias[h]", inputs={"bias": torch.zeros(6, requires_grad=True)}, dropout_p=0.1)),
    "number beyond fp32": Case(InvalidInput, "cap of the expression is 1e+39|finite in fp32", lambda: modified("cap * tanh(s / cap)", cap=1e39)),
    "whole number beyond 32 bits": Case(InvalidInput, "w of the expression is 2147483648|32 bits", lambda: modified("s", "i - j < w", w=2**31)),
    "a half in place of a whole number": Case(InvalidInput, "// is for whole numbers", lambda: modified("s", "i // n == j // n", n=numpy.float32(2.5))),
    "ids beyond 32 bits": Case(InvalidInput, "document holds whole numbers beyond 32 bits", lambda: modified("s", "document[i] == document[j]", document=torch.arange(Q[1]) * 2**32)),
    "tensor without a layout": Case(InvalidInput, "bias must be a dense tensor|sparse", lambda: modified("s + bias[h]", bias=torch.ones(6).to_sparse())),
    "complex tensor": Case(InvalidInput, "bias must be|real numbers", lambda: modified("s + bias[h]", bias=torch.ones(6) * 1j)),
    "alibi of too few heads": Case(InvalidInput, "(5,)|must be 6", lambda: run(alibi_slopes=torch.zeros(5))),
    "allow: unsigned numbers": Case(InvalidInput, "r is torch.uint32|r.to(torch.int32)", lambda: modified("s", "r[j] > 0", r=torch.zeros(8, dtype=torch.uint32))),
    "alibi is a list": Case(InvalidInput, "alibi_slopes|(heads,)", lambda: run(alibi_slopes=[0.5])),
    "softcap is a list": Case(InvalidInput, "softcap must be a number|list|pass 0.0", lambda: run(softcap=[])),
    "dropout is None": Case(InvalidInput, "dropout_p must be a number|NoneType", lambda: run(dropout_p=None)),
    "dropout is two numbers": Case(InvalidInput, "dropout_p must be a number|a tensor (2,)", lambda: run(dropout_p=torch.zeros(2))),
    "deterministic is text": Case(InvalidInput, "deterministic must be True or False|'no'", lambda: run(deterministic="no")),
    "deterministic is two flags": Case(InvalidInput, "deterministic must be|a tensor (2,)|.item()", lambda: run(deterministic=torch.ones(2))),
    "probs are two flags": Case(InvalidInput, "return_attn_probs must be|a tensor (2,)", lambda: run(return_attn_probs=torch.ones(2))),
    "causal is 2": Case(InvalidInput, "causal must be True or False|2 (int)", lambda: run(causal=2)),
    "causal is a tensor": Case(InvalidInput, "causal must be|a tensor ()|.item()", lambda: run(causal=torch.tensor(True))),
    "scale of 400 digits": Case(InvalidInput, "inf|finite", lambda: run(softmax_scale=10**400)),
    "scale that overflows scores": Case(UnsupportedProblem, "1e+38|scale q", lambda: run(softmax_scale=1e38)),
    "chunk below 0": Case(InvalidInput, "attention_chunk must be|-1 (int)", lambda: run(attention_chunk=-1)),
    "chunk is a float": Case(InvalidInput, "attention_chunk must be|2.0 (float)", lambda: run(attention_chunk=2.0)),
    "chunk is True": Case(InvalidInput, "attention_chunk must be|True", lambda: run(attention_chunk=True)),
    "window of a flag": Case(InvalidInput, "window_size is (True, 0)", lambda: run(window_size=(True, 0))),
    "window of three in numpy": Case(InvalidInput, "window_size is|(left, right)", lambda: run(window_size=numpy.zeros(3, int))),
    "window of floats in numpy": Case(InvalidInput, "window_size is|whole number", lambda: run(window_size=numpy.zeros(2))),
    "window of rank 2": Case(InvalidInput, "window_size is|(left, right)", lambda: run(window_size=torch.zeros(2, 2, dtype=torch.int32))),
    "window of two in a side": Case(InvalidInput, "window_size is", lambda: run(window_size=(torch.zeros(2, dtype=torch.int32), 0))),
    "window of one side": Case(InvalidInput, "window_size is (3,)|(left, right)", lambda: run(window_size=(3,))),
    "window below -1": Case(InvalidInput, "window_size is (-2, 0)|-1 for no limit", lambda: run(window_size=(-2, 0))),
    "window of floats": Case(InvalidInput, "window_size is (1.5, 0)", lambda: run(window_size=(1.5, 0))),
    "window of text": Case(InvalidInput, "window_size is 'full'|(left, right)", lambda: run(window_size="full")),
    "window is a number": Case(InvalidInput, "window_size is 128|(left, right)", lambda: run(window_size=128)),
    "gradient and arch": Case(
        UnsupportedProblem, "arch|detach", lambda: fa2gen.attention(t(*Q).requires_grad_(), t(*K), t(*K), arch="sm90")
    ),
    # caches
    "kvcache: q of rank 3": Case(InvalidInput, "q has 3 dimensions|must have 4", lambda: cached(q=t(5, 6, 64))),
    "kvcache: a cache of rank 3": Case(InvalidInput, "k_cache has 3 dimensions|(batch, rows, heads_kv, head_dim)", lambda: cached(k_cache=t(32, 2, 64))),
    "kvcache: fp32": Case(UnsupportedProblem, "torch.float32|bfloat16", lambda: cached(q=t(2, 1, 6, 64, dtype=torch.float32), k_cache=t(2, 32, 2, 64, dtype=torch.float32), v_cache=t(2, 32, 2, 64, dtype=torch.float32))),
    "kvcache: another dtype": Case(InvalidInput, "v_cache is torch.float16", lambda: cached(v_cache=t(2, 32, 2, 64, dtype=torch.float16))),
    "kvcache: caches of two shapes": Case(InvalidInput, "k_cache has shape|v_cache|equal", lambda: cached(v_cache=t(2, 31, 2, 64))),
    "kvcache: head dims": Case(UnsupportedProblem, "head_dim 72|64", lambda: cached(q=t(2, 1, 6, 72))),
    "kvcache: head dim 12": Case(UnsupportedProblem, "head_dim is 12|never copied|of head_dim 16|12**-0.5", lambda: cached(q=t(2, 1, 6, 12), k_cache=t(2, 32, 2, 12), v_cache=t(2, 32, 2, 12))),
    "kvcache: head dim 300": Case(UnsupportedProblem, "head_dim is 300|256", lambda: cached(q=t(2, 1, 6, 300), k_cache=t(2, 32, 2, 300), v_cache=t(2, 32, 2, 300))),
    "kvcache: heads": Case(InvalidInput, "7 heads|2", lambda: cached(q=t(2, 1, 7, 64))),
    "kvcache: a cache's last stride": Case(InvalidInput, "k_cache has strides|never copied", lambda: cached(k_cache=t(2, 32, 64, 2).transpose(2, 3))),
    "kvcache: a cache's row stride": Case(InvalidInput, "v_cache has strides|multiples of 8", lambda: cached(v_cache=t(2, 32, 2, 65)[..., :64])),
    "kvcache: too few entries": Case(InvalidInput, "q has 3 sequences|2|cache_batch_idx", lambda: cached(q=t(3, 1, 6, 64))),
    "kvcache: lengths of int64": Case(InvalidInput, "cache_seqlens is torch.int64|to(torch.int32)", lambda: cached(cache_seqlens=torch.tensor([3, 4]))),
    "kvcache: lengths of three": Case(InvalidInput, "cache_seqlens has shape (3,)|(2,)", lambda: cached(cache_seqlens=ints(1, 2, 3))),
    "kvcache: a length of text": Case(InvalidInput, "cache_seqlens must be a whole number|'7'", lambda: cached(cache_seqlens="7")),
    "kvcache: a length that is a switch": Case(InvalidInput, "cache_seqlens must be a whole number|True", lambda: cached(cache_seqlens=True)),
    "kvcache: a table of rank 1": Case(InvalidInput, "block_table has shape (4,)|pages", lambda: cached(block_table=ints(0, 1, 2, 3))),
    "kvcache: a table of columns": Case(InvalidInput, "block_table has strides|contiguous", lambda: cached(block_table=ints(0, 1, 2, 3).view(2, 2).T)),
    "kvcache: padding of int64": Case(InvalidInput, "cache_leftpad is torch.int64", lambda: cached(cache_leftpad=torch.tensor([0, 0]))),
    "kvcache: k alone": Case(InvalidInput, "v is missing", lambda: cached(k=t(2, 1, 2, 64), cache_seqlens=3)),
    "kvcache: new keys without lengths": Case(InvalidInput, "give cache_seqlens", lambda: cached(k=t(2, 1, 2, 64), v=t(2, 1, 2, 64))),
    "kvcache: new keys of other heads": Case(InvalidInput, "k has shape (2, 1, 3, 64)|seqlen_new", lambda: cached(k=t(2, 1, 3, 64), v=t(2, 1, 2, 64), cache_seqlens=3)),
    "kvcache: new values of another length": Case(InvalidInput, "k has shape|v (2, 2, 2, 64)", lambda: cached(k=t(2, 1, 2, 64), v=t(2, 2, 2, 64), cache_seqlens=3)),
    "kvcache: angles without keys": Case(InvalidInput, "rotary embeddings are of new keys", lambda: cached(rotary_cos=t(32, 16), rotary_sin=t(32, 16))),
    "kvcache: cosines alone": Case(InvalidInput, "rotary_cos and rotary_sin are given together", lambda: turned(rotary_sin=None)),
    "kvcache: angles of fp32": Case(InvalidInput, "rotary_sin is|float32|bfloat16", lambda: turned(rotary_sin=t(32, 16, dtype=torch.float32))),
    "kvcache: an odd width of angles": Case(InvalidInput, "rotary_cos has 12 columns|multiple of 16", lambda: turned(rotary_cos=t(32, 12), rotary_sin=t(32, 12))),
    "kvcache: too few angles": Case(InvalidInput, "rotary_cos has 31 positions|32", lambda: turned(rotary_cos=t(31, 16), rotary_sin=t(31, 16))),
    "kvcache: softcap": Case(InvalidInput, "softcap|-30.0|above 0", lambda: cached(softcap=-30.0)),
    "kvcache: slopes of five heads": Case(InvalidInput, "(5,)|must be 6", lambda: cached(alibi_slopes=torch.zeros(5))),
    "kvcache: sinks of five heads": Case(InvalidInput, "s_aux is|(6,)", lambda: cached(s_aux=torch.zeros(5))),
    "kvcache: sinks are a list": Case(InvalidInput, "s_aux must be a tensor|list", lambda: cached(s_aux=[0.0] * 6)),
    "kvcache: caches of two types": Case(InvalidInput, "k_cache is torch.float8_e4m3fn|v_cache is torch.bfloat16", lambda: cached(k_cache=t(2, 32, 2, 64).to(torch.float8_e4m3fn))),
    "kvcache: caches of uint8": Case(InvalidInput, "k_cache is torch.uint8", lambda: cached(k_cache=t(2, 32, 2, 64).to(torch.uint8), v_cache=t(2, 32, 2, 64).to(torch.uint8))),
    "kvcache: 8 bits of head dim 72": Case(UnsupportedProblem, "head_dim is 72|multiple of 16|80", lambda: cached(q=t(2, 1, 6, 72), k_cache=t(2, 32, 2, 72).to(torch.int8), v_cache=t(2, 32, 2, 72).to(torch.int8))),
    "kvcache: scales of one dimension": Case(InvalidInput, "k_descale is|(2, 2)|expand", lambda: cached(k_cache=t(2, 32, 2, 64).to(torch.int8), v_cache=t(2, 32, 2, 64).to(torch.int8), k_descale=torch.ones(2))),
    "kvcache: lengths on another device": Case(InvalidInput, "q is on cpu, cache_seqlens on meta", lambda: cached(cache_seqlens=torch.empty(2, dtype=torch.int32, device="meta"))),
    "kvcache: values on another device": Case(InvalidInput, "q is on cpu, v_cache on meta", lambda: cached(v_cache=torch.empty(2, 32, 2, 64, dtype=torch.bfloat16, device="meta"))),
    "kvcache: e4m3 on an A100": Case(InfeasibleSpec, "e4m3|sm80|int8", lambda: default_tiling(Problem(direction="decode", head_dim=64, cache_dtype="e4m3"), "sm80")),
    "kvcache: splits": Case(InvalidInput, "num_splits is 257|256", lambda: cached(num_splits=257)),
    "kvcache: splits of text": Case(InvalidInput, "num_splits must be a whole number|'2'", lambda: cached(num_splits="2")),
    "kvcache: a gradient": Case(UnsupportedProblem, "has no gradient|torch.no_grad()", lambda: cached(q=t(2, 1, 6, 64).requires_grad_()).sum().backward()),
    "kvcache: no tensor": Case(InvalidInput, "block_table must be a torch.Tensor|list", lambda: cached(block_table=[[0, 1]])),
    # ragged batches
    "ragged: q of rank 4": Case(InvalidInput, "q has 4 dimensions|with cu_seqlens_q it must have 3|(total_q, heads, head_dim)|q.flatten(0, 1)", lambda: ragged(q=t(2, 5, 6, 64))),
    "ragged: k of rank 3, no bounds": Case(InvalidInput, "k has 3 dimensions|without cu_seqlens_k it must have 4|give cu_seqlens_k", lambda: ragged(cu_seqlens_k=None)),
    "ragged: v of rank 2": Case(InvalidInput, "v has 2 dimensions|(total_k, heads, head_dim)", lambda: ragged(v=t(9, 64))),
    "ragged: fp32": Case(UnsupportedProblem, "float32|bfloat16", lambda: ragged(q=t(8, 6, 64, dtype=torch.float32), k=t(9, 2, 64, dtype=torch.float32))),
    "ragged: k of another dtype": Case(InvalidInput, "q is torch.bfloat16|k is torch.float16", lambda: ragged(k=t(9, 2, 64, dtype=FP16))),
    "ragged: v of other rows": Case(InvalidInput, "k has rows 9, v has rows 8|slice one", lambda: ragged(v=t(8, 2, 64))),
    "ragged: v of other heads": Case(InvalidInput, "k has heads 2, v has heads 1", lambda: ragged(v=t(9, 1, 64))),
    "ragged: heads 6:4": Case(InvalidInput, "q has 6 heads|have 4|nearest for k and v: 3", lambda: ragged(k=t(9, 4, 64))),
    "ragged: k of another head dim": Case(UnsupportedProblem, "head_dim 64|k has 32|pad", lambda: ragged(k=t(9, 2, 32))),
    "ragged: q with a strided last dim": Case(InvalidInput, "q.stride(-1) is 2|q.contiguous()", lambda: ragged(q=wide(t(8, 6, 64)))),
    "ragged: bounds in int64": Case(InvalidInput, "cu_seqlens_q is torch.int64|torch.int32|.to(torch.int32)", lambda: ragged(cu_seqlens_q=torch.tensor([0, 3, 8]))),
    "ragged: bounds of floats": Case(InvalidInput, "cu_seqlens_k is torch.float32|torch.int32|whole numbers", lambda: ragged(cu_seqlens_k=torch.zeros(3))),
    "ragged: bounds are a list": Case(InvalidInput, "cu_seqlens_q must be a torch.Tensor or None, not list|dtype=torch.int32", lambda: ragged(cu_seqlens_q=[0, 3, 8])),
    "ragged: bounds of rank 2": Case(InvalidInput, "cu_seqlens_q has shape (1, 3)|(batch + 1,)", lambda: ragged(cu_seqlens_q=ints(0, 3, 8).unsqueeze(0))),
    "ragged: bounds of nothing": Case(InvalidInput, "cu_seqlens_q has shape (0,)|(batch + 1,)", lambda: ragged(cu_seqlens_q=ints())),
    "ragged: bounds with gaps": Case(InvalidInput, "cu_seqlens_q has a stride of 2|cu_seqlens_q.contiguous()", lambda: ragged(cu_seqlens_q=ints(0, 1, 3, 5, 8)[::2])),
    "ragged: of 2 and 3 sequences": Case(InvalidInput, "cu_seqlens_q is of 2 sequences, cu_seqlens_k of 3", lambda: ragged(cu_seqlens_k=ints(0, 3, 5, 9))),
    "ragged: used of 3 sequences": Case(InvalidInput, "cu_seqlens_q is of 2 sequences, seqused_k of 3|one for each", lambda: ragged(seqused_k=ints(1, 2, 3))),
    "ragged: used in int64": Case(InvalidInput, "seqused_q is torch.int64|torch.int32", lambda: ragged(seqused_q=torch.tensor([1, 2]))),
    "ragged: used of rank 0": Case(InvalidInput, "seqused_q has shape ()|(batch,)", lambda: ragged(seqused_q=torch.tensor(1, dtype=torch.int32))),
    "ragged: dense keys of 3 sequences": Case(InvalidInput, "cu_seqlens_q is of 2 sequences, k of 3", lambda: ragged(k=t(3, 4, 2, 64), cu_seqlens_k=None)),
    "ragged: dense keys, unevenly spaced": Case(InvalidInput, "k has batches 768 elements apart, of 4 rows 128 apart|k.contiguous()", lambda: ragged(k=t(2, 6, 2, 64)[:, :4], cu_seqlens_k=None)),
    "ragged: no lengths": Case(InvalidInput, "cu_seqlens and seqused are all None|flash_attn_func", lambda: ragged(q=t(2, 4, 6, 64), k=t(2, 4, 2, 64), cu_seqlens_q=None, cu_seqlens_k=None)),
    "ragged: bounds on the CPU": Case(InvalidInput, "q is on cuda:0, cu_seqlens_q on cpu|cu_seqlens_q.to(q.device)", lambda: fake_cuda(lambda: ragged(q=t(8, 6, 64, device="cuda"), k=t(9, 2, 64, device="cuda")))),
    "ragged: q is None": Case(InvalidInput, "q must be a torch.Tensor|NoneType", lambda: flash_attn_varlen_func(None, t(9, 2, 64), t(9, 2, 64), ints(0, 8), ints(0, 9))),
    "ragged: longest of floats": Case(InvalidInput, "max_seqlen_k must be a whole number|5.0 (float)", lambda: ragged(max_seqlen_k=5.0)),
    "ragged: longest below 0": Case(InvalidInput, "max_seqlen_q must be a whole number|-1 (int)", lambda: ragged(max_seqlen_q=-1)),
    "append: another head dim": Case(InvalidInput, "key is a tensor (4, 2, 32)|key_cache a tensor (4, 16, 2, 64)|head_dim", lambda: fa2gen.reshape_and_cache(t(4, 2, 32), t(4, 2, 32), t(4, 16, 2, 64), t(4, 16, 2, 64), ints(0, 1, 2, 3))),
    "append: fewer values": Case(InvalidInput, "key has shape (4, 2, 64), value (3, 2, 64)|equal", lambda: fa2gen.reshape_and_cache(t(4, 2, 64), t(3, 2, 64), t(4, 16, 2, 64), t(4, 16, 2, 64), ints(0, 1, 2, 3))),
    "pages: a table of rank 1": Case(InvalidInput, "block_table has shape (2,)|(batch, pages", lambda: over_pages(block_table=ints(0, 1))),
    "pages: a table in int64": Case(InvalidInput, "block_table is torch.int64|torch.int32", lambda: over_pages(block_table=torch.zeros(2, 2, dtype=torch.int64))),
    "pages: a table in columns": Case(InvalidInput, "block_table has strides|.contiguous()", lambda: over_pages(block_table=ints(0, 1, 1, 0).view(2, 2).t())),
    "pages: too few rows": Case(InvalidInput, "block_table has 1 rows|2 sequences", lambda: over_pages(block_table=ints(0, 1).view(1, 2))),
    "pages: packed keys": Case(InvalidInput, "k has 3 dimensions|(pages, page_size, heads_kv, head_dim)", lambda: over_pages(k=t(9, 2, 64))),
    "pages: of no rows": Case(InvalidInput, "k has shape (4, 0, 2, 64)|a row in it", lambda: over_pages(k=t(4, 0, 2, 64), v=t(4, 0, 2, 64))),
    "pages: as many of v": Case(InvalidInput, "k has shape|must be equal", lambda: over_pages(v=t(5, 16, 2, 64))),
    "pages: rows not on 16 bytes": Case(InvalidInput, "k has strides|multiples of 8", lambda: over_pages(k=t(4, 16, 2, 68)[..., :64])),
    "pages: head dim 60": Case(UnsupportedProblem, "head_dim is 60|never copied|64", lambda: over_pages(q=t(8, 6, 60), k=t(4, 16, 2, 60), v=t(4, 16, 2, 60))),
    "pages: of another head dim": Case(UnsupportedProblem, "q has head_dim 64, k has 72", lambda: over_pages(k=t(4, 16, 2, 72))),
    "pages: lengths of 3 sequences": Case(InvalidInput, "cu_seqlens_q is of 2 sequences, seqused_k of 3", lambda: over_pages(seqused_k=ints(1, 2, 3))),
    "ragged: dropout above 1": Case(InvalidInput, "dropout_p is 1.5|less than 1", lambda: ragged(dropout_p=1.5)),
    "ragged: a mask of unknown size": Case(InvalidInput, "max_seqlen_q|None|whole numbers", lambda: ragged(dropout_p=0.1, return_attn_probs=True)),
    "ragged: dropout is two numbers": Case(InvalidInput, "dropout_p must be a number", lambda: ragged(dropout_p=torch.zeros(2))),
    "ragged: softcap": Case(InvalidInput, "softcap|above 0", lambda: ragged(softcap=-3.0)),
    "score: no text": Case(InvalidInput, "score|tanh|3", lambda: modified(3)),
    "score: no expression": Case(InvalidInput, "score, column", lambda: modified("s +")),
    "score: hostile": Case(InvalidInput, "score, column", lambda: modified("__import__('os').getpid()")),
    "score: a number is missing": Case(InvalidInput, "cap|inputs", lambda: modified("s / cap")),
    "score: too many numbers": Case(InvalidInput, "'bend'|cap", lambda: modified("s / cap", cap=1.0, bend=2.0)),
    "score: an infinite number": Case(InvalidInput, "cap of|inf|finite", lambda: modified("s / cap", cap=math.inf)),
    "score: no number": Case(InvalidInput, "cap|number|str", lambda: modified("s / cap", cap="1")),
    "allow: of the score": Case(InvalidInput, "allow, column 1|s, the score", lambda: modified("s", "s > 0")),
    "allow: nothing divides": Case(InvalidInput, "divides by 0|positive", lambda: modified("s", "i // size == 1", size=0)),
    "allow: too far": Case(InvalidInput, "reaches|2147483647", lambda: modified("s", "i * far * far < j", far=40000)),
    "score: a tensor of another rank": Case(InvalidInput, "slope|1 dimensions", lambda: modified("s * slope[h]", slope=t(6, 2))),
    "score: a tensor of another size": Case(InvalidInput, "(5,)|must be 6", lambda: modified("s * slope[h]", slope=t(5))),
    "score: a tensor is no number": Case(InvalidInput, "slope[h]", lambda: modified("s * slope", slope=t(6))),
    "score: a number is no tensor": Case(InvalidInput, "slope|tensor", lambda: modified("s * slope[h]", slope=1.0)),
    "score: a deterministic gradient of several elements": Case(
        UnsupportedProblem, "input_0, (6,)|expand", lambda: learned("s * slope[h]", slope=t(6))
    ),
    "spec: a number that learns": Case(
        InvalidInput, "'cap'|slope|cap[0]", lambda: Problem(direction="bwd", head_dim=64, score="s * cap + slope[h]", learned="cap")
    ),
    "ragged: scale nan": Case(InvalidInput, "nan|finite", lambda: ragged(softmax_scale=math.nan)),
    "ragged: causal is text": Case(InvalidInput, "causal must be|'yes'", lambda: ragged(causal="yes")),
    "ragged: qkv of two": Case(InvalidInput, "qkv has shape (8, 2, 6, 64)|(total, 3, heads, head_dim)|dim=1", lambda: flash_attn_varlen_qkvpacked_func(t(8, 2, 6, 64), ints(0, 8), 8)),
    "ragged: kv of rank 5": Case(InvalidInput, "kv has shape|(total, 2, heads, head_dim)", lambda: flash_attn_varlen_kvpacked_func(t(8, 6, 64), t(1, 9, 2, 2, 64), ints(0, 8), ints(0, 9), 8, 9)),
    "ragged: nested": Case(UnsupportedProblem, "q is a nested tensor", lambda: ragged(q=nested(torch.jagged))),
    "ragged: the operator's lse": Case(InvalidInput, "lse is|it must be (6, 8)", lambda: torch.ops.fa2gen.bwd_varlen(t(8, 6, 64), t(8, 6, 64), t(9, 2, 64), t(9, 2, 64), t(8, 6, 64), t(8, 6, dtype=torch.float32), None, ints(0, 8), ints(0, 9), None, None, 0.1, True)),
    "ragged: vmap": Case(UnsupportedProblem, "vmap|one behind the other", lambda: torch.func.vmap(lambda q: ragged(q=q))(t(3, 8, 6, 64))),
    "nested: offsets of their own": Case(InvalidInput, "offsets of their own|nested_tensor_from_jagged(v.values(), k.offsets()", lambda: run(nested(torch.jagged), nested(torch.jagged), nested(torch.jagged))),
    "nested: heads first": Case(UnsupportedProblem, "q is nested with its jagged dimension elsewhere|q.transpose(1, 2)", lambda: run(nested(torch.jagged).transpose(1, 2), nested(torch.jagged))),
    "nested: of rank 3": Case(InvalidInput, "q has 3 dimensions|(batch, jagged, heads, head_dim)", lambda: run(torch.nested.nested_tensor([t(3, 64), t(5, 64)], layout=torch.jagged), nested(torch.jagged))),
    "nested: strided": Case(UnsupportedProblem, "q is a nested tensor|as_nested_tensor(q.unbind(), layout=torch.jagged)", lambda: run(nested(torch.strided), nested(torch.strided))),
    "mask of another batch": Case(InvalidInput, "attention_mask has shape (2, 4)|hidden_states (2, 5, 6, 64)", lambda: unpad_input(t(*Q), t(2, 4, dtype=torch.int32))),
    # GPUs
    "a Turing GPU": Case(UnsupportedProblem, "T4|7.5|8.0|9.0", lambda: kernel_arch(gpu("NVIDIA T4", 7, 5))),
    "a B200": Case(UnsupportedProblem, "B200|10.0|9.0", lambda: kernel_arch(gpu("NVIDIA B200", 10, 0))),
    "an RTX 5090": Case(UnsupportedProblem, "12.0|8.9", lambda: kernel_arch(gpu("NVIDIA GeForce RTX 5090", 12, 0))),
    "sm90 kernels on 8.9": Case(UnsupportedProblem, "sm90|8.9|Nearest|sm80", lambda: kernel_arch(gpu("NVIDIA L40S", 8, 9), "sm90")),
    # specs
    "spec: misspelt problem field": Case(InvalidInput, "head_dims|did you mean 'head_dim'", lambda: Problem(head_dims=64)),
    "spec: misspelt tiling field": Case(InvalidInput, "tile_k|did you mean", lambda: Tiling(**sm90(tile_k=64))),
    "spec: misspelt stages": Case(InvalidInput, "num_stage|did you mean 'num_stages'", lambda: Tiling(**sm90(num_stage=2))),
    "spec: unknown field": Case(InvalidInput, "frobnicate|known fields", lambda: Problem(head_dim=64, frobnicate=1)),
    "spec: no head dim": Case(InvalidInput, "head_dim|required", lambda: Problem()),
    "spec: head dim 0": Case(InvalidInput, "multiple of 8|nearest 8", lambda: Problem(head_dim=0)),
    "spec: head dim 12": Case(InvalidInput, "multiple of 8|nearest 16|12", lambda: Problem(head_dim=12)),
    "spec: head dim 264": Case(InvalidInput, "256|nearest 256|264", lambda: Problem(head_dim=264)),
    "spec: head dim -8": Case(InvalidInput, "multiple of 8|nearest 8", lambda: Problem(head_dim=-8)),
    "spec: head dim is a float": Case(InvalidInput, "head_dim|64.0", lambda: Problem(head_dim=64.0)),
    "spec: head dim is text": Case(InvalidInput, "head_dim|integer", lambda: Problem(head_dim="64")),
    "spec: head dim is CUDA": Case(InvalidInput, "head_dim|integer", lambda: Problem(head_dim=CUDA)),
    "spec: dtype is CUDA": Case(InvalidInput, "dtype|fp16|bf16", lambda: Problem(head_dim=64, dtype=CUDA)),
    "spec: mask is CUDA": Case(InvalidInput, "mask|full|causal", lambda: Problem(head_dim=64, mask='full"); asm("trap;')),
    "spec: arch is CUDA": Case(InvalidInput, "arch|sm80|sm90", lambda: Tiling(**sm90(arch="sm90\n__device__ int x;"))),
    "spec: dtype fp8": Case(InvalidInput, "dtype|fp16|fp8", lambda: Problem(head_dim=64, dtype="fp8")),
    "spec: direction": Case(InvalidInput, "direction|fwd", lambda: Problem(head_dim=64, direction="back")),
    "spec: arch sm100": Case(InvalidInput, "arch|sm80|sm90", lambda: Tiling(**sm90(arch="sm100"))),
    "spec: tile_n 24": Case(InvalidInput, "tile_n|multiple of 16|24", lambda: Tiling(**sm90(tile_n=24))),
    "spec: tile_n 0": Case(InvalidInput, "tile_n|16 to 256", lambda: Tiling(**sm90(tile_n=0))),
    "spec: no stages": Case(InvalidInput, "num_stages|from 1", lambda: Tiling(**sm90(num_stages=0))),
    "spec: a million stages": Case(InvalidInput, "num_stages|to 8", lambda: Tiling(**sm90(num_stages=10**6))),
    "spec: no warps": Case(InvalidInput, "num_mma_warps|from 1", lambda: Tiling(**sm90(num_mma_warps=0))),
    "spec: swizzle 48": Case(InvalidInput, "swizzle_bytes|128|32", lambda: Tiling(**sm90(swizzle_bytes=48))),
    "name: CUDA in it": Case(InvalidInput, "not a kernel name|look like", lambda: KernelSpec.from_name(GOOD_NAME + "(){}")),
    "name: a path": Case(InvalidInput, "not a kernel name", lambda: KernelSpec.from_name("../../" + GOOD_NAME)),
    "name: a line break": Case(InvalidInput, "not a kernel name", lambda: KernelSpec.from_name(GOOD_NAME + "\n")),
    "name: head dim 12": Case(InvalidInput, "multiple of 8", lambda: KernelSpec.from_name(GOOD_NAME.replace("d128", "d12"))),
    "name: leading zero": Case(InvalidInput, GOOD_NAME, lambda: KernelSpec.from_name(GOOD_NAME.replace("d128", "d0128"))),
    "name: a default spelt out": Case(InvalidInput, GOOD_NAME, lambda: KernelSpec.from_name(GOOD_NAME + "_z128")),
    "name: sm70": Case(InvalidInput, "arch|sm70", lambda: KernelSpec.from_name(GOOD_NAME.replace("sm90", "sm70"))),
    "plan: too much shared memory": Case(InfeasibleSpec, "shared memory|232,448 B|nearest", lambda: plan(256, **sm90())),
    "plan: rows against warps": Case(InfeasibleSpec, "tile_m|nearest", lambda: plan(64, **sm90(tile_m=64))),
    "plan: warps of half a warpgroup": Case(InfeasibleSpec, "warps|nearest", lambda: plan(64, **sm90(num_mma_warps=6))),
    "plan: too many registers": Case(InfeasibleSpec, "registers|nearest", lambda: plan(64, **sm90(tile_n=256))),
}  # fmt: skip


def test_the_table_is_long_enough():
    assert len(CASES) >= 60


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_bad_input(case):
    with pytest.raises(Fa2GenError) as caught:
        case.run()
    message = str(caught.value)
    assert type(caught.value) is case.error, message
    missing = [word for word in case.words.split("|") if word not in message]
    assert not missing, f"{missing} not in: {message}"
    assert len(message) < 1500


@pytest.mark.parametrize("name", ["dtype", "mask", "arch"])
def test_cuda_in_a_spec_never_reaches_a_source(name):
    """The one way from text to a kernel is a spec, and its text fields are closed sets."""
    spec = KernelSpec(problem=Problem(head_dim=64), tiling=default_tiling(Problem(head_dim=64), "sm90"))
    field = spec.problem if hasattr(spec.problem, name) else spec.tiling
    with pytest.raises(InvalidInput):
        type(field)(**{**field.model_dump(), name: CUDA})
    with pytest.raises(Exception, match="frozen"):
        setattr(field, name, CUDA)


def test_errors_are_also_what_python_would_raise():
    assert issubclass(fa2gen.InvalidInput, ValueError)
    assert issubclass(fa2gen.UnsupportedProblem, NotImplementedError)
    assert issubclass(fa2gen.InfeasibleSpec, ValueError)


# Whatever an argument is ---------------------------------------------------------------------------------------------

ROWS, KEYS = t(4, 2, 16), t(4, 1, 16)
BOUNDS = ints(0, 1, 4)
CACHE = {"q": t(2, 1, 2, 16), "k_cache": t(2, 8, 1, 16), "v_cache": t(2, 8, 1, 16), "cache_seqlens": ints(3, 4)}
PAIR = {"cu_seqlens_q": BOUNDS, "cu_seqlens_k": BOUNDS, "max_seqlen_q": 3, "max_seqlen_k": 3}
DENSE = {"q": ROWS[None], "k": KEYS[None], "v": KEYS[None]}
STATE = {"out_a": ROWS[None], "lse_a": t(1, 2, 4, dtype=torch.float32)}
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "attention": (attention, DENSE),
    "attention, packed": (attention, {"q": ROWS, "k": KEYS, "v": KEYS, "cu_seqlens_q": BOUNDS, "cu_seqlens_k": BOUNDS}),
    "func": (flash_attn_func, DENSE),
    "kvpacked": (flash_attn_kvpacked_func, {"q": ROWS[None], "kv": t(1, 4, 2, 1, 16)}),
    "qkvpacked": (flash_attn_qkvpacked_func, {"qkv": t(1, 4, 3, 2, 16)}),
    "varlen": (flash_attn_varlen_func, {"q": ROWS, "k": KEYS, "v": KEYS, **PAIR}),
    "varlen kvpacked": (flash_attn_varlen_kvpacked_func, {"q": ROWS, "kv": t(4, 2, 1, 16), **PAIR}),
    "varlen qkvpacked": (flash_attn_varlen_qkvpacked_func, {"qkv": t(4, 3, 2, 16), "cu_seqlens": BOUNDS}),
    "pages": (over_pages, {"q": t(8, 6, 64)}),
    "cache": (flash_attn_with_kvcache, CACHE),
    "pages of a cache": (flash_attn_with_kvcache, {**CACHE, "block_table": ints(0, 1).view(2, 1)}),
    "new keys": (
        flash_attn_with_kvcache,
        {**CACHE, **dict.fromkeys("kv", t(2, 1, 1, 16)), **dict.fromkeys(("rotary_cos", "rotary_sin"), t(8, 8))},
    ),
    "merge": (fa2gen.merge_states, {**STATE, "out_b": STATE["out_a"], "lse_b": STATE["lse_a"]}),
    "append": (
        fa2gen.reshape_and_cache,
        {
            **dict.fromkeys(("key", "value"), KEYS),
            **dict.fromkeys(("key_cache", "value_cache"), CACHE["k_cache"]),
            "slot_mapping": torch.arange(4),
        },
    ),
    "unpad": (unpad_input, {"hidden_states": t(1, 4, 32), "attention_mask": t(1, 4, dtype=torch.int32)}),
    "number": (lambda cap: modified("cap * s", cap=cap), {"cap": 2.0}),
    "tensor": (lambda cap: modified("cap[h] * s", cap=cap), {"cap": t(6, dtype=torch.float32)}),
}  # fmt: skip
ANYTHING: dict[str, Any] = {
    "strided nested": torch.nested.nested_tensor([t(1, 2, 16), t(3, 2, 16)]),
    "jagged": torch.nested.nested_tensor([t(1, 2, 16), t(3, 2, 16)], layout=torch.jagged),
    "sparse": t(1, 4, 2, 16).float().to_sparse(),
    "complex": torch.ones(1, 4, 2, 16, dtype=torch.complex64),
    "fp8": torch.ones(1, 4, 2, 16).to(torch.float8_e4m3fn),
    "meta": t(1, 4, 2, 16, device="meta"),
    "strided": t(1, 4, 2, 32)[..., ::2],
    "five dimensions": t(1, 1, 4, 2, 16),
    "empty": t(0),
    "one number": torch.tensor(1.0),
    "two numbers": torch.ones(2),
    "two whole numbers": ints(1, 2),
    "arrays": (numpy.ones(2), numpy.float64(1), numpy.int64(2), numpy.bool_(True)),
    "numbers": (-1, 2, 2.5, 1j, 10**400, -(10**400), 1e38, math.nan, math.inf, True, None),
    "texts": ("no", "", "\ud800", b"x"),
    "others": ([], [1, 2], {}, {"x": object()}, object(), int, len, (10**30, 10**30), (torch.ones(2), 0)),
}


@pytest.mark.parametrize("call", CALLS)
def test_whatever_an_argument_is_the_error_is_ours(call):
    """Each argument of each function by itself: what it cannot be is refused by name, not by torch or Python."""
    function, good = CALLS[call]
    function(**good)
    names = good if call in ("pages", "number", "tensor") else inspect.signature(function).parameters
    for name in names:
        for kind, value in ANYTHING.items():
            for one in value if isinstance(value, tuple) else [value]:
                try:
                    function(**{**good, name: one})
                except Fa2GenError as error:
                    assert len(str(error)) < 1500
                except Exception as error:
                    pytest.fail(f"{name}, {kind}, {describe(one)}: {type(error).__name__}: {error}")
