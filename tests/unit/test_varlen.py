"""Ragged batches in PyTorch, without a GPU: against one dense call for each sequence, forward and backward.

What kernels do is tested elsewhere (tests/cpu, tests/gpu); here are the operators, their reference, and the functions.
"""

from __future__ import annotations

import inspect
import itertools
import math

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fa2gen import UnsupportedProblem
from fa2gen.ops import (
    attention,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from fa2gen.ops.validate import LENGTHS
from fa2gen.options import Options
from fa2gen.padding import index_first_axis, pad_input, unpad_input
from fa2gen.reference import attention_ragged

FWD, BWD = torch.ops.fa2gen.fwd_varlen.default, torch.ops.fa2gen.bwd_varlen.default
HEADS, HEADS_KV, HEAD_DIM = 4, 2, 16


@pytest.fixture(autouse=True)
def nothing_compiled():
    yield
    torch.compiler.reset()


def bounds(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def ints(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


class Batch:
    """Sequences of lengths_q and lengths_k rows, of which used_q and used_k count; all other rows are NaN.

    more        rows behind the last sequence.
    q, k, v     leaves that require gradients; packed, or where `dense` names a side (batch, seqlen, heads, head_dim).
    """

    def __init__(self, lengths_q, lengths_k, used_q=None, used_k=None, more=(0, 0), dense="", dtype=torch.bfloat16):
        generator = torch.Generator().manual_seed(len(lengths_q))
        self.used = tuple(None if used is None else ints(*used) for used in (used_q, used_k))
        self.cu, self.rows, leaves = [], [], []
        sides = ((lengths_q, used_q, more[0], "q", (HEADS,)), (lengths_k, used_k, more[1], "k", (HEADS_KV, HEADS_KV)))
        for lengths, used, rest, side, heads in sides:
            starts = [0, *itertools.accumulate(lengths)]
            counted = lengths if used is None else [min(pair) for pair in zip(lengths, used, strict=True)]
            self.rows.append([slice(start, start + n) for start, n in zip(starts, counted, strict=False)])
            for n in heads:
                x = torch.full((starts[-1] + rest, n, HEAD_DIM), math.nan, dtype=dtype)
                for rows in self.rows[-1]:
                    size = (rows.stop - rows.start, n, HEAD_DIM)
                    x[rows] = torch.randn(size, generator=generator).to(dtype)
                leaves.append(x.unflatten(0, (len(lengths), -1)) if side in dense else x)
            self.cu.append(None if side in dense else bounds(lengths))
        self.q, self.k, self.v = (x.requires_grad_() for x in leaves)

    @property
    def lengths(self):
        return (*self.cu, *self.used)

    def call(self, **options):
        named = {"seqused_q": self.used[0], "seqused_k": self.used[1], "return_attn_probs": True, **options}
        return flash_attn_varlen_func(self.q, self.k, self.v, *self.cu, **named)[:2]

    def one_by_one(self, **options):
        """(out, lse), packed, of a dense call for each sequence; padding 0 and -inf."""
        q, k, v = (x if x.dim() == 3 else x.flatten(0, 1) for x in (self.q, self.k, self.v))
        out, lse = q.new_zeros(q.shape), torch.full((HEADS, q.shape[0]), -math.inf)
        for rows, keys in zip(*self.rows, strict=True):
            found = flash_attn_func(
                *(x.unsqueeze(0) for x in (q[rows], k[keys], v[keys])), return_attn_probs=True, **options
            )
            out[rows], lse[:, rows] = found[0][0], found[1][0]
        return out.view(self.q.shape), lse

    def gradients(self, out, lse):
        """Of numbers that differ in every row; in those of padding NaN."""
        padding = torch.ones(lse.shape[1], dtype=torch.bool)
        for rows in self.rows[0]:
            padding[rows] = False
        dout = torch.linspace(-1, 1, out.numel()).view(-1, HEADS, HEAD_DIM).to(out.dtype)
        dout = dout.masked_fill(padding[:, None, None], math.nan).view(out.shape)
        dlse = torch.linspace(-1, 1, lse.numel()).view(lse.shape).masked_fill(padding, math.nan)
        return torch.autograd.grad((out, lse), (self.q, self.k, self.v), (dout, dlse))


BATCHES = {
    "one": lambda: Batch([7], [9]),
    "equal": lambda: Batch([5, 5, 5], [5, 5, 5]),
    "unequal": lambda: Batch([3, 130, 1], [140, 2, 17]),
    "no queries in some": lambda: Batch([0, 4, 0, 0, 3], [2, 5, 1, 3, 0]),
    "no keys in some": lambda: Batch([2, 4, 3], [0, 5, 0]),
    "no keys at all": lambda: Batch([2, 3], [0, 0]),
    "padding": lambda: Batch([3, 4], [2, 9], more=(5, 7)),
    "used": lambda: Batch([3, 4, 6], [2, 9, 3], used_q=[1, 9, 0], used_k=[2, 0, 2], more=(2, 1)),
    "dense keys": lambda: Batch([3, 4], [6, 6], used_k=[6, 2], dense="k"),
    "dense queries": lambda: Batch([4, 4], [1, 6], used_q=[1, 4], dense="q"),
    "both dense": lambda: Batch([4, 4], [6, 6], used_q=[1, 4], used_k=[3, 6], dense="qk"),
    "no sequences": lambda: Batch([], [], more=(3, 2)),
    "nothing": lambda: Batch([], []),
}
OPTIONS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (3, 2), "softmax_scale": 0.3},
    "chunk": {"causal": True, "attention_chunk": 4},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_each_sequence_is_as_alone(batch, options):
    """Bit for bit, and NaN in padding, in its gradients, or in rows that do not count reaches nothing."""
    batch = batch()
    out, lse = batch.call(**options)
    right_out, right_lse = batch.one_by_one(**options)
    assert out.is_contiguous() and lse.is_contiguous() and lse.dtype == torch.float32
    assert out.shape == batch.q.shape and torch.equal(out, right_out) and torch.equal(lse, right_lse)
    found = batch.gradients(out, lse)
    if not right_out.requires_grad:  # no sequence has anything
        assert all(not x.any() for x in found)
        return
    expected = batch.gradients(right_out, right_lse)
    for x, y, leaf in zip(found, expected, (batch.q, batch.k, batch.v), strict=True):
        assert x.shape == leaf.shape and x.is_contiguous() and torch.equal(x, y.nan_to_num(0.0))


def test_lengths_that_make_no_sense_stay_within_the_tensors():
    """As kernels take them: clamped; neither an error nor a row from elsewhere."""
    batch = Batch([3, 4], [2, 9])
    for cu in (ints(0, 100, 7), ints(-5, 3, 99), ints(5, 2, 1), ints(7, 7, 7)):
        out, lse, _ = flash_attn_varlen_func(batch.q, batch.k, batch.v, cu, cu, return_attn_probs=True)
        assert out.isfinite().all() and not lse.isnan().any()
        torch.autograd.grad(out.float().sum(), (batch.q, batch.k, batch.v))


# Functions ----------------------------------------------------------------------------------------------

_FLASH = {
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "alibi_slopes": None,
    "deterministic": False,
    "return_attn_probs": False,
}
_SIDES = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"


@pytest.mark.parametrize(
    ("function", "first", "last"),
    [
        (flash_attn_varlen_func, f"q k v {_SIDES}", {"block_table": None}),
        (flash_attn_varlen_qkvpacked_func, "qkv cu_seqlens max_seqlen", {}),
        (flash_attn_varlen_kvpacked_func, f"q kv {_SIDES}", {}),
    ],
)
def test_signature_is_that_of_flash_attn(function, first, last):
    parameters = inspect.signature(function).parameters
    own = [name for name, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY]
    assert own == ["seqused_q", "seqused_k", "attention_chunk", "s_aux"]
    assert [*parameters] == [*first.split(), *_FLASH, *last, *own]
    assert {name: parameters[name].default for name in (*_FLASH, *last)} == _FLASH | last


@pytest.mark.parametrize("longest", [(130, 140), (ints(130)[0], ints(140)[0]), (None, None), (1, 1)], ids=str)
def test_the_longest_lengths_change_nothing(longest):
    batch = BATCHES["unequal"]()
    out = flash_attn_varlen_func(batch.q, batch.k, batch.v, *batch.cu, *longest, causal=True)
    assert torch.equal(out, batch.one_by_one(causal=True)[0])


SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])


@pytest.mark.parametrize(
    ("said", "in_flash"),
    [
        ({"window_size": (3, 0)}, {"window_size": (3, 0)}),
        ({"s_aux": SINKS, "causal": True}, {"s_aux": SINKS, "causal": True}),
        ({"score": "cap * tanh(s / cap)", "inputs": {"cap": 0.5}}, {"softcap": 0.5}),
    ],
)
def test_attention_takes_lengths(said, in_flash):
    batch = BATCHES["used"]()
    named = dict(zip(LENGTHS, batch.lengths, strict=True))
    out, lse = attention(batch.q, batch.k, batch.v, **named, **said)
    right_out, right_lse = batch.call(**in_flash)
    assert torch.equal(out, right_out) and torch.equal(lse, right_lse)
    for x, y in zip(batch.gradients(out, lse), batch.gradients(right_out, right_lse), strict=True):
        assert torch.equal(x, y)


def test_packed_inputs():
    batch = Batch([3, 4, 2], [3, 4, 2], used_q=[2, 4, 2], used_k=[2, 4, 2])
    q = batch.q.detach()
    cu, used = batch.cu[0], {"seqused_q": batch.used[0], "seqused_k": batch.used[1]}
    expected = flash_attn_varlen_func(q, q, q, cu, cu, 4, 4, causal=True, **used)
    qkv = torch.stack((q, q, q), dim=1)
    assert torch.equal(flash_attn_varlen_qkvpacked_func(qkv, cu, 4, causal=True, **used), expected)
    found = flash_attn_varlen_kvpacked_func(q, qkv[:, 1:], cu, cu, 4, 4, causal=True, **used)
    assert torch.equal(found, expected)


def test_autocast():
    batch = Batch([3, 4], [2, 9], dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = flash_attn_varlen_func(batch.q, batch.k, batch.v, *batch.cu)
        assert out.dtype == torch.bfloat16
        gradients = torch.autograd.grad(out.float().sum(), (batch.q, batch.k, batch.v))
    assert all(x.dtype == torch.float32 and x.any() for x in gradients)


def test_deterministic_is_an_option_of_the_gradients():
    batch = BATCHES["unequal"]()
    seen = []
    with torch.library._scoped_library("fa2gen", "IMPL") as library:
        library.impl("bwd_varlen", lambda *a, **named: seen.append((*a, *named.values())) or (a[1], a[2], a[3]), "Meta")
        leaves = [x.detach().to("meta").requires_grad_() for x in (batch.q, batch.k, batch.v)]
        out = flash_attn_varlen_func(*leaves, *(x.to("meta") for x in batch.cu), deterministic=True)
        torch.autograd.grad(out.float().sum(), leaves)
    assert seen[0][-1] is True


# PyTorch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["unequal", "used", "dense keys", "no keys at all", "nothing"])
def test_opcheck(name):
    batch = BATCHES[name]()
    arguments = (*(x.detach().nan_to_num(0.0) for x in (batch.q, batch.k, batch.v)), *batch.lengths, 0.25, True)
    arguments = (*(x.requires_grad_() for x in arguments[:3]), *arguments[3:])
    assert set(torch.library.opcheck(FWD, arguments).values()) == {"SUCCESS"}
    out, lse = (x.detach() for x in FWD(*arguments))
    tensors = [x.detach() for x in arguments[:3]]
    for dlse in (None, torch.ones_like(lse)):
        backward = (torch.ones_like(out), *tensors, out, lse, dlse, *batch.lengths, 0.25, True)
        assert set(torch.library.opcheck(BWD, backward).values()) == {"SUCCESS"}


def test_compiled_once_whatever_the_lengths():
    """One graph, forward and backward; no other one for other lengths, totals, counts, or longest sequences."""
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    @torch.compile(fullgraph=True, backend=backend, dynamic=True)
    def compiled(q, k, v, cu_q, cu_k, longest):
        return flash_attn_varlen_func(q * 2, k, v, cu_q, cu_k, longest, longest, causal=True) * 3

    for lengths_q, lengths_k in (([3, 5], [4, 6]), ([8, 1], [9, 3]), ([2, 7, 6], [5, 6, 9]), ([40] * 5, [30] * 5)):
        batch = Batch(lengths_q, lengths_k)
        tensors = (batch.q, batch.k, batch.v)
        expected = flash_attn_varlen_func(batch.q * 2, batch.k, batch.v, *batch.cu, causal=True) * 3
        found = compiled(*tensors, *batch.cu, max(lengths_k))
        assert torch.equal(found, expected)
        for x, y in zip(*(torch.autograd.grad(x.float().sum(), tensors) for x in (found, expected)), strict=True):
            assert torch.equal(x, y)
    assert len(graphs) == 1


def test_compiled_by_aot_autograd():
    batch = BATCHES["used"]()
    tensors = [x.detach().nan_to_num(0.0).requires_grad_() for x in (batch.q, batch.k, batch.v)]

    def loss(q, k, v, cu_q, cu_k, used_q, used_k):
        out, lse, _ = flash_attn_varlen_func(
            *(q, k, v, cu_q, cu_k), seqused_q=used_q, seqused_k=used_k, return_attn_probs=True
        )
        return (out.float() ** 2).sum() + lse.sigmoid().sum()

    found, expected = (
        torch.autograd.grad(f(*tensors, *batch.lengths), tensors)
        for f in (torch.compile(loss, fullgraph=True, backend="aot_eager"), loss)
    )
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-2, atol=1e-3)


def test_exported_for_any_total():
    class Module(torch.nn.Module):
        def forward(self, x, cu):
            return flash_attn_varlen_func(x, x, x, cu, cu, causal=True)

    dims = {"x": {0: torch.export.Dim("total", min=2, max=64)}, "cu": {0: torch.export.Dim("bounds", min=2, max=9)}}
    one, other = (Batch(lengths, lengths) for lengths in ([3, 4], [5, 0, 9]))
    program = torch.export.export(Module(), (one.q.detach(), one.cu[0]), dynamic_shapes=dims).module()
    for batch in (one, other):
        q, cu = batch.q.detach(), batch.cu[0]
        assert torch.equal(program(q, cu), flash_attn_varlen_func(q, q, q, cu, cu, causal=True))


@pytest.mark.parametrize("device", ["cuda", "cpu", "meta"])
def test_fake_tensors(device):
    with FakeTensorMode():
        q, k = (torch.empty(n, h, 64, dtype=torch.float16, device=device) for n, h in ((8, 6), (9, 2)))
        cu = torch.empty(3, dtype=torch.int32, device=device)
        out, lse, none = flash_attn_varlen_func(q, k, k, cu, cu, return_attn_probs=True)
    assert none is None and (out.shape, out.dtype, out.device.type) == (q.shape, q.dtype, device)
    assert (lse.shape, lse.dtype, lse.device.type) == ((6, 8), torch.float32, device)


@pytest.mark.parametrize("name", ["unequal", "used", "dense keys"])
def test_gradients_of_a_plain_call(name, monkeypatch):
    """Calls of CUDA tensors that ask for out alone pass the operator by, as those of CPU tensors do here: gradients are
    those through it, once and again, recomputed, of some tensors alone; and lengths may not change before."""
    batch = BATCHES[name]()
    leaves = (batch.q, batch.k, batch.v)
    out, _ = batch.call(causal=True)
    dout = torch.ones_like(out)
    expected = torch.autograd.grad(out, leaves, dout)
    monkeypatch.setattr("fa2gen.ops.flash_varlen.is_plain", lambda q, k, v: True)
    monkeypatch.setattr(
        "fa2gen.ops.autograd.forward_ragged",
        lambda *given: attention_ragged(*given[:-2], **Options(*given[-2])._asdict()),
    )
    bounds_q, bounds_k = (x if x is None else x.clone() for x in batch.cu)

    def call(*tensors):
        used = {"seqused_q": batch.used[0], "seqused_k": batch.used[1]}
        return flash_attn_varlen_func(*tensors, bounds_q, bounds_k, causal=True, **used)

    plain, some = call(*leaves), call(batch.q.detach(), batch.k, batch.v.detach())
    assert type(plain.grad_fn).__name__ == "RaggedOutputBackward"
    for one in (plain, plain, checkpoint(call, *leaves, use_reentrant=False)):
        found = torch.autograd.grad(one, leaves, dout, retain_graph=True)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert torch.equal(torch.autograd.grad(some, batch.k, dout)[0], expected[1])
    bounds_q += 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(plain, leaves, dout)


def test_second_derivatives_are_refused():
    batch = BATCHES["unequal"]()
    out, _ = batch.call()
    (dq,) = torch.autograd.grad(out.float().sum(), batch.q, create_graph=True)
    with pytest.raises(UnsupportedProblem, match="second derivative"):
        torch.autograd.grad(dq.float().sum(), batch.q)


def test_flops_are_those_of_each_sequence():
    batch = BATCHES["unequal"]()
    with FlopCounterMode(display=False) as counter:
        out, _ = batch.call(causal=True)
        forward = counter.get_total_flops()
        out.float().sum().backward()
    pairs = 3 * 140 + 130 * 2 + 1 * 17
    assert forward == 4 * HEADS * HEAD_DIM * pairs
    assert counter.get_total_flops() - forward == 10 * HEADS * HEAD_DIM * pairs


@pytest.fixture
def mesh():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    torch.distributed.destroy_process_group()


def test_dtensors_of_heads_are_computed_where_they_are(mesh):
    from torch.distributed.tensor import DTensor, Replicate, Shard

    batch = BATCHES["unequal"]()
    leaves = [batch.q, batch.k, batch.v]
    shards = [DTensor.from_local(x, mesh, [Shard(1)], run_check=False) for x in leaves]
    cu = [DTensor.from_local(x, mesh, [Replicate()], run_check=False) for x in batch.cu]
    out, lse, _ = flash_attn_varlen_func(*shards, *cu, causal=True, return_attn_probs=True)
    assert out.placements == (Shard(1),) and lse.placements == (Shard(0),)
    expected = batch.call(causal=True)
    assert torch.equal(out.to_local(), expected[0]) and torch.equal(lse.to_local(), expected[1])
    found = torch.autograd.grad(out.to_local().float().sum(), leaves)
    for x, y in zip(found, torch.autograd.grad(expected[0].float().sum(), leaves), strict=True):
        assert torch.equal(x, y)


# Nested tensors ----------------------------------------------------------------------------------------------


def jagged(lengths, heads, offsets=None):
    x = torch.randn(sum(lengths), heads, HEAD_DIM, generator=torch.Generator().manual_seed(heads)).bfloat16()
    return torch.nested.nested_tensor_from_jagged(x, bounds(lengths).long() if offsets is None else offsets)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_jagged_tensors(compiled):
    """Queries and keys of different lengths; out has q's layout, so that q + out is one, and gradients reach all."""
    q, k = jagged([3, 8, 1], HEADS).requires_grad_(), jagged([5, 8, 2], HEADS_KV).requires_grad_()
    v = jagged([5, 8, 2], HEADS_KV, k.offsets()).requires_grad_()
    function = torch.compile(flash_attn_func, fullgraph=True, backend="aot_eager") if compiled else flash_attn_func
    out = function(q, k, v, causal=True)
    expected = [
        flash_attn_func(*(x.unsqueeze(0) for x in one), causal=True)[0]
        for one in zip(*map(list, map(torch.Tensor.unbind, (q, k, v))), strict=True)
    ]
    assert out.layout == torch.jagged and out.shape == q.shape and (q + out).shape == q.shape
    assert all(torch.equal(x, y) for x, y in zip(out.unbind(), expected, strict=True))
    found = torch.autograd.grad(out.values().float().sum(), (q, k, v))
    right = torch.autograd.grad(sum(x.float().sum() for x in expected), (q, k, v))
    assert all(torch.equal(x.values(), y.values()) for x, y in zip(found, right, strict=True))


def test_jagged_tensors_with_holes():
    values = torch.randn(9, HEADS, HEAD_DIM).bfloat16()
    offsets, lengths = torch.tensor([0, 4, 9]), torch.tensor([2, 5])
    values[2:4] = math.nan
    x = torch.nested.nested_tensor_from_jagged(values, offsets, lengths)
    out, lse = attention(x, x, x)
    expected = [attention(*(y[None],) * 3) for y in (values[:2], values[4:])]
    for y, (right, right_lse), rows in zip(out.unbind(), expected, (slice(0, 2), slice(4, 9)), strict=True):
        assert torch.equal(y, right[0]) and torch.equal(lse[:, rows], right_lse[0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_is_advised_for_other_nested_tensors_works():
    q, k = jagged([3, 8], HEADS), jagged([3, 8], HEADS)
    expected = flash_attn_func(q, k, k).unbind()
    strided = [torch.nested.nested_tensor(list(x.unbind()), layout=torch.strided) for x in (q, k)]
    again = [torch.nested.as_nested_tensor(x.unbind(), layout=torch.jagged) for x in strided]
    lengths = [x.offsets().int() for x in again]
    out = flash_attn_varlen_func(again[0].values(), again[1].values(), again[1].values(), *lengths)
    assert torch.equal(out, torch.cat(expected))
    v = torch.nested.nested_tensor_from_jagged(again[1].values(), k.offsets(), k.lengths())
    assert all(torch.equal(x, y) for x, y in zip(flash_attn_func(q, k, v).unbind(), expected, strict=True))
    transposed = q.transpose(1, 2)
    found = flash_attn_func(transposed.transpose(1, 2), k, k).unbind()
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


# Padding ----------------------------------------------------------------------------------------------


def test_padded_batches_are_packed_and_padded_again():
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1]])
    unused = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    x = torch.randn(3, 4, 2, 5, requires_grad=True)
    packed, indices, cu, longest, used = unpad_input(x, mask)
    assert indices.tolist() == [0, 1, 9, 10, 11] and cu.tolist() == [0, 2, 2, 5] and longest == 3
    assert cu.dtype == used.dtype == torch.int32 and used.tolist() == [2, 0, 3]
    assert torch.equal(packed, x.flatten(0, 1)[indices]) and torch.equal(
        packed, index_first_axis(x.flatten(0, 1), indices)
    )
    padded = pad_input(packed, indices, 3, 4)
    assert torch.equal(padded, x * mask[..., None, None])
    (gradient,) = torch.autograd.grad((padded * 3).sum(), x)
    assert torch.equal(gradient, 3.0 * mask[..., None, None].expand_as(x))
    packed, indices, cu, longest, used = unpad_input(x, mask.bool(), unused.bool())
    assert indices.tolist() == [0, 1, 2, 9, 10, 11] and cu.tolist() == [0, 3, 3, 6] and used.tolist() == [2, 0, 3]
    assert unpad_input(x[:0], mask[:0])[3] == 0


def test_a_padded_batch_by_way_of_a_packed_one():
    """What models do with a mask: the rows that count are those of a dense call for each sequence."""
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    q, k, v = (torch.randn(2, 5, 2, HEAD_DIM).bfloat16() for _ in range(3))
    packed = [unpad_input(x, mask) for x in (q, k, v)]
    _, indices, cu, longest, _ = packed[0]
    out = flash_attn_varlen_func(*(x[0] for x in packed), cu, cu, longest, longest, causal=True)
    out = pad_input(out, indices, 2, 5)
    assert (
        torch.equal(out[:1, :3], flash_attn_func(*(x[:1, :3] for x in (q, k, v)), causal=True)) and not out[0, 3:].any()
    )
    assert torch.equal(out[1:], flash_attn_func(*(x[1:] for x in (q, k, v)), causal=True))
