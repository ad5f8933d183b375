"""Gradients with no GPU: the reference, the operator, autograd, plans and launch facts of the backward kernels."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from fa2gen import InfeasibleSpec, InvalidInput, UnsupportedProblem, attention, flash_attn_func
from fa2gen.compile import launch_facts
from fa2gen.features import examples_of
from fa2gen.groups import with_groups
from fa2gen.launch import launch_of
from fa2gen.layout import accumulator_position
from fa2gen.ops import flash_attn_qkvpacked_func
from fa2gen.options import Options, Shape
from fa2gen.plan import feasible_tilings, make_plan
from fa2gen.reference import attention_backward_tiled, attention_reference, attention_tiled, check_gradients
from fa2gen.render import render
from fa2gen.select import default_tiling
from fa2gen.spec import KernelSpec, Problem, Tiling

# (batch, seqlen_q, seqlen_k, heads, heads_kv)
SHAPES = ((2, 50, 70, 4, 2), (1, 70, 50, 4, 1), (1, 33, 33, 2, 2), (1, 1, 40, 2, 1), (1, 40, 1, 2, 1))
EMPTY = ((1, 5, 0, 2, 2), (1, 0, 5, 2, 1), (0, 5, 5, 2, 1))


def scaled(plan, softmax_scale):
    """The options of a typical call of a plan, with another scale."""
    return examples_of(plan.problem)[0]._replace(softmax_scale=softmax_scale)


def inputs(sizes, head_dim=16, dtype=torch.bfloat16):
    batch, seqlen_q, seqlen_k, heads, heads_kv = sizes
    generator = torch.Generator().manual_seed(seqlen_q * 101 + seqlen_k)
    shapes = ((seqlen_q, heads), (seqlen_k, heads_kv), (seqlen_k, heads_kv), (seqlen_q, heads))
    values = [torch.randn(batch, s, h, head_dim, generator=generator, dtype=torch.float64).to(dtype) for s, h in shapes]
    q, k, v = (x.requires_grad_() for x in values[:3])
    return q, k, v, values[3], torch.randn(batch, heads, seqlen_q, generator=generator)


# The reference -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", [*SHAPES, *EMPTY])
def test_algorithm_2_is_the_gradient_of_attention(sizes, causal):
    """In fp64, against autograd through the definition."""
    q, k, v, dout, dlse = inputs(sizes, dtype=torch.float64)
    dlse = dlse.double()
    out, lse = attention_reference(q, k, v, causal=causal)
    no_key = lse.isneginf()
    expected = torch.autograd.grad([out, lse.masked_fill(no_key, 0)], (q, k, v), [dout, dlse.masked_fill(no_key, 0)])
    with torch.no_grad():
        out, lse = attention_tiled(q, k, v, causal=causal)
        found = attention_backward_tiled(dout, q, k, v, out, lse, dlse, causal=causal, tile_m=16, tile_n=24)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


def test_the_rule_refuses_wrong_gradients():
    q, k, v, dout, _ = inputs(SHAPES[0])
    right = torch.autograd.grad(flash_attn_func(q, k, v, causal=True), (q, k, v), dout)
    assert check_gradients(right, dout, q, k, v, causal=True).ok
    for i in range(3):
        for change in (lambda x: x * 1.02, lambda x: x.roll(1, 1), lambda x: x.masked_fill(x == x.max(), torch.nan)):
            wrong = [change(x) if i == j else x for j, x in enumerate(right)]
            assert not check_gradients(tuple(wrong), dout, q, k, v, causal=True).ok


# Autograd ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", SHAPES)
def test_flash_attn_func_is_differentiable(sizes, causal):
    q, k, v, dout, dlse = inputs(sizes)
    out, lse, _ = flash_attn_func(q, k, v, softmax_scale=0.3, causal=causal, return_attn_probs=True)
    options: dict[str, Any] = {"causal": causal, "softmax_scale": 0.3}
    found = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse), retain_graph=True)
    verdict = check_gradients(found, dout, q, k, v, dlse=dlse, **options)
    assert verdict.ok, verdict
    of_out = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    assert check_gradients(of_out, dout, q, k, v, **options).ok
    of_lse = torch.autograd.grad(lse, (q, k, v), dlse)
    assert check_gradients(of_lse, torch.zeros_like(dout), q, k, v, dlse=dlse, **options).ok


@pytest.mark.parametrize("sizes", EMPTY)
def test_gradients_of_nothing_are_zero(sizes):
    q, k, v, dout, _ = inputs(sizes)
    for x in torch.autograd.grad(flash_attn_func(q, k, v), (q, k, v), dout):
        assert not x.any()


def test_only_what_requires_a_gradient_gets_one():
    q, k, v, dout, _ = inputs(SHAPES[0])
    whole = torch.autograd.grad(flash_attn_func(q, k, v), (q, k, v), dout)
    (dk,) = torch.autograd.grad(flash_attn_func(q.detach(), k, v.detach()), (k,), dout)
    assert torch.equal(dk, whole[1])


def test_packed_and_strided_tensors():
    qkv = torch.randn(2, 20, 3, 4, 16, dtype=torch.bfloat16, requires_grad=True)
    out = flash_attn_qkvpacked_func(qkv, causal=True)
    dout = torch.randn(2, 4, 20, 16, dtype=torch.bfloat16).transpose(1, 2)
    (found,) = torch.autograd.grad(out, qkv, dout)
    q, k, v = qkv.unbind(2)
    assert check_gradients(found.unbind(2), dout, q, k, v, causal=True).ok


@pytest.mark.parametrize("wanted", [(0,), (1, 2), (2,), (0, 1)], ids=str)
def test_gradients_of_some_inputs(wanted):
    q, k, v, dout, dlse = inputs(SHAPES[0])
    whole = torch.autograd.grad(attention(q, k, v), (q, k, v), (dout, dlse))
    some = [x.requires_grad_(i in wanted) for i, x in enumerate(x.detach() for x in (q, k, v))]
    found = torch.autograd.grad(attention(*some), [some[i] for i in wanted], (dout, dlse))
    assert all(torch.equal(x, whole[i]) for x, i in zip(found, wanted, strict=True))


def test_gradients_of_sums_and_of_outputs_used_twice():
    """The gradient of a sum has strides of 0; two uses add theirs."""
    q, k, v, dout, _ = inputs(SHAPES[0])
    expected = torch.autograd.grad(flash_attn_func(q, k, v), (q, k, v), torch.ones_like(dout))
    found = torch.autograd.grad(flash_attn_func(q, k, v).sum(), (q, k, v))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    expected = torch.autograd.grad(flash_attn_func(q, k, v), (q, k, v), 2 * dout)
    out = flash_attn_func(q, k, v)
    found = torch.autograd.grad((out, out), (q, k, v), (dout, dout))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.fixture
def plain(monkeypatch):
    """Calls of CUDA tensors that ask for out alone pass the operator by: so do those of CPU tensors here."""
    monkeypatch.setattr("fa2gen.ops.flash.is_plain", lambda q, k, v: True)
    monkeypatch.setattr(
        "fa2gen.ops.autograd.forward_cuda",
        lambda q, k, v, options: attention_tiled(q, k, v, **Options(*options)._asdict()),
    )


@pytest.mark.parametrize("wanted", [(0, 1, 2), (1,)], ids=str)
def test_gradients_of_a_plain_call(wanted, plain):
    """As through the operator: once and again, of a sum, with saved tensors that hooks move, and recomputed."""
    q, k, v, dout, _ = inputs(SHAPES[0])
    whole = torch.autograd.grad(attention(q, k, v, causal=True)[0], (q, k, v), dout)
    given = [x.detach().requires_grad_(i in wanted) for i, x in enumerate((q, k, v))]
    leaves, expected = [given[i] for i in wanted], [whole[i] for i in wanted]

    def call(*tensors):
        return flash_attn_func(*tensors, causal=True)

    out = call(*given)
    assert type(out.grad_fn).__name__ == "OutputBackward"
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: x.clone(), lambda x: x.transpose(1, 2).clone().transpose(1, 2)
    ):
        moved = call(*given)
    again = checkpoint(call, *given, use_reentrant=False)
    for one in (out, out, moved, again):
        found = torch.autograd.grad(one, leaves, dout, retain_graph=True)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    (second,) = torch.autograd.grad(call(*given), leaves[:1], dout, create_graph=True)
    with pytest.raises(UnsupportedProblem, match="second derivative"):
        second.float().square().sum().backward()


@pytest.mark.parametrize("changed", ["q", "k", "v", "out"])
def test_what_the_backward_pass_needs_may_not_change(changed):
    tensors = dict(zip("qkv", (1 * x for x in inputs(SHAPES[0])[:3]), strict=True))
    tensors["out"] = out = flash_attn_func(tensors["q"], tensors["k"], tensors["v"])
    loss = out.sum()
    with torch.no_grad():
        tensors[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def loss_of_both(q, k, v):
    out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    return (out.float() ** 2).sum() + torch.logsumexp(lse, -1).sum()


def test_compiles_to_one_graph_with_gradients_of_lse():
    q, k, v, *_ = inputs(SHAPES[0])
    expected = torch.autograd.grad(loss_of_both(q, k, v), (q, k, v))
    compiled = torch.compile(loss_of_both, fullgraph=True, backend="aot_eager", dynamic=True)
    found = torch.autograd.grad(compiled(q, k, v), (q, k, v))
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-2, atol=1e-3)


def test_dual_tensors_are_refused():
    """A kernel would drop the tangents."""
    q, k, v = (x.detach() for x in inputs(SHAPES[0])[:3])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(k, k)
        with pytest.raises(UnsupportedProblem, match="forward-mode"):
            flash_attn_func(q, dual, v)
        assert flash_attn_func(q, k, v).shape == q.shape


# Autocast ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_autocast_casts_as_torch_does(dtype, compiled):
    """Also of mixed dtypes; the gradients have those of the inputs."""
    q, k, v, dout, _ = inputs(SHAPES[0], dtype=torch.float32)
    k = k.detach().to(torch.float16).requires_grad_()

    def run(q, k, v):
        with torch.autocast("cpu", dtype):
            return flash_attn_func(q, k, v, causal=True)

    out = (torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run)(q, k, v)
    assert out.dtype == dtype
    found = torch.autograd.grad(out, (q, k, v), dout.to(dtype))
    cast = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(flash_attn_func(*cast, causal=True), cast, dout.to(dtype))
    for x, y, leaf in zip(found, expected, (q, k, v), strict=True):
        assert x.dtype == leaf.dtype and torch.equal(x, y.to(leaf.dtype))
    with torch.autocast("cpu", dtype):
        assert torch.nn.functional.scaled_dot_product_attention(q, q.half(), q).dtype == dtype


def test_autocast_leaves_the_reference_exact():
    """Its products are in fp32: autocast would round their operands, in the backward pass too."""
    q, k, v, dout, _ = inputs(SHAPES[0])
    expected = torch.autograd.grad(out := flash_attn_func(q, k, v), (q, k, v), dout)
    with torch.autocast("cpu", torch.bfloat16):
        again = flash_attn_func(q, k, v)
        found = torch.autograd.grad(again, (q, k, v), dout)
    assert torch.equal(again, out)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_autocast_does_not_take_fp64():
    q, k, v, *_ = inputs(SHAPES[0], dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(UnsupportedProblem, match="float64"):
        flash_attn_func(q, k, v)
    with pytest.raises(UnsupportedProblem, match="float32"):
        flash_attn_func(*(x.float() for x in (q, k, v)))


@pytest.mark.filterwarnings("ignore:Input #")
def test_second_derivatives_are_refused_where_they_are_taken():
    """Not silently zero; and a graph that is kept for another part's second derivative is no error."""
    q, k, v, dout, _ = inputs(SHAPES[0])
    (dq,) = torch.autograd.grad(flash_attn_func(q, k, v), (q,), dout, create_graph=True)
    with pytest.raises(UnsupportedProblem, match="differentiated once"):
        torch.autograd.grad(dq.sum(), (k,))
    small = [x.detach()[:1, :1, :1, :8].clone().requires_grad_() for x in (q, k, v)]
    with pytest.raises(UnsupportedProblem, match=r"second derivative.*gradgradcheck.*math backend"):
        torch.autograd.gradgradcheck(flash_attn_func, small)


def test_deterministic_is_a_promise_that_the_cpu_keeps():
    q, k, v, dout, _ = inputs(SHAPES[0])
    runs = [torch.autograd.grad(flash_attn_func(q, k, v, deterministic=True), (q, k, v), dout) for _ in range(3)]
    assert all(torch.equal(x, y) for again in runs for x, y in zip(again, runs[0], strict=True))


def test_a_chosen_kernel_has_no_gradient():
    q, k, v, *_ = inputs(SHAPES[0])
    with pytest.raises(UnsupportedProblem, match="arch and tiling"):
        attention(q, k, v, arch="sm90")


# The operator --------------------------------------------------------------------------------------------------------


def test_fake_cuda_tensors_get_shapes():
    """The operator alone: a torch without CUDA does not survive autograd on a CUDA device, fake or not."""
    with FakeTensorMode():
        q, k = (torch.empty(2, s, h, 64, dtype=torch.bfloat16, device="cuda") for s, h in ((9, 4), (7, 2)))
        out, lse = attention(q, k, k)
        gradients = torch.ops.fa2gen.bwd(out, q, k, k, out, lse, None, 0.25, True)
        assert [x.shape for x in gradients] == [q.shape, k.shape, k.shape]


def test_bad_arguments_of_the_operator():
    q, k, v, dout, _ = (x.detach() for x in inputs(SHAPES[0]))
    out, lse = torch.ops.fa2gen.fwd(q, k, v, 0.25, True)
    for position, bad, word in (
        (0, dout[:, 1:], "dout"),
        (4, out.float(), "out"),
        (5, lse[:, :1], "lse"),
        (6, lse.half(), "dlse"),
    ):
        arguments = [dout, q, k, v, out, lse, lse, 0.25, True]
        arguments[position] = bad
        with pytest.raises(InvalidInput, match=f"^{word} is"):
            torch.ops.fa2gen.bwd(*arguments)


# Plans ---------------------------------------------------------------------------------------------------------------


def plans():
    for d, v in ((192, 128), (64, 128), (128, 168), (72, 184), (256, 8), (8, 256)):
        problem = Problem(direction="bwd", head_dim=d, head_dim_v=v)
        yield make_plan(KernelSpec(problem=problem, tiling=default_tiling(problem, "sm90")))
    for head_dim, (mask, deterministic) in itertools.product(
        range(8, 257, 8), (("full", False), ("causal", False), ("full", True))
    ):
        problem = Problem(direction="bwd", head_dim=head_dim, mask=mask, deterministic=deterministic)
        # In an order that is the same in every process: xdist compares what its workers collect.
        others = feasible_tilings(problem, "sm90") if head_dim % 40 == 0 and not deterministic else ()
        tilings = dict.fromkeys((default_tiling(problem, "sm90"), *others))
        for plan in (make_plan(KernelSpec(problem=problem, tiling=tiling)) for tiling in tilings):
            yield plan
            if plan.can_take_turns:
                yield with_groups(plan, 1, in_turn=True)


PLANS = {plan.name: plan for plan in sorted(plans(), key=lambda plan: plan.name)}  # in one order in every process


@pytest.mark.parametrize("name", PLANS)
def test_shared_memory(name):
    plan = PLANS[name]
    score_bytes = plan.num_ds_stages * plan.ds_tile.bytes
    dq_bytes = 4 * plan.dq_block_floats
    keys = [
        (plan.memory.offsets["k"], plan.k_tile.bytes, 1024),
        (plan.memory.offsets["v"], plan.v_tile.bytes, 1024),
    ]
    slots = []
    if plan.is_persistent:
        slots = [(plan.memory.offsets["block_slots"], 2 * 16, 16)]
        if plan.holds_v:  # which one stage is enough for
            keys = [(0, 2 * plan.k_tile.bytes, 1024), (2 * plan.k_tile.bytes, plan.v_tile.bytes, 1024)]
        else:
            keys += [(begin + plan.k_tile.bytes + plan.v_tile.bytes, size, 1024) for begin, size, _ in keys]
        # A warp's rows of dK, or of dV, are staged in its place for dQ.
        row_bytes = 128 * -(-plan.head_dim // 64)
        dq_bytes = 4 * plan.num_mma_warps * plan.dq_slice_floats
        assert 4 * plan.dq_slice_floats >= 16 * row_bytes and not 4 * plan.dq_slice_floats % 1024
    parts = [
        *keys,
        (plan.memory.offsets["q"], plan.num_stages * plan.q_tile.bytes, 1024),
        (plan.memory.offsets["dout"], plan.num_dout_stages * plan.o_tile.bytes, 1024),
        *([(plan.memory.offsets["p"], score_bytes, 1024)] if plan.passes_p else []),
        (plan.memory.offsets["ds"], score_bytes, 1024),
        *([(plan.memory.offsets["dq"], dq_bytes, 1024 if plan.is_persistent else 16)] if plan.stages_dq else []),
        (plan.memory.offsets["lse"], plan.num_stages * plan.statistics_bytes, 16),
        (plan.memory.offsets["dpsum"], plan.num_dout_stages * plan.statistics_bytes, 16),
        *slots,
        (plan.memory.offsets["barriers"], plan.barriers.region.bytes, 8),
    ]
    end = 0
    for begin, size, alignment in parts:
        assert begin == end and begin % alignment == 0
        end = begin + size
    assert end == plan.shared_memory_bytes <= 232_448
    # Stages and panels keep to the 8-row pattern of the swizzle, bulk copies to 16 bytes.
    assert (
        not plan.q_tile.panel_bytes % 1024
        and not plan.k_tile.panel_bytes % 1024
        and not plan.ds_tile.panel_bytes % 1024
    )
    assert not plan.statistics_bytes % 16 and not 4 * plan.dq_slice_floats % 16


@pytest.mark.parametrize("name", PLANS)
def test_the_sums_of_dq_hold_every_element_once(name):
    """Where a warp puts register r of its lane l, and which element of dQ that is."""
    plan = PLANS[name]
    found = set()
    rows = plan.dq_slice_floats // 32  # registers of one thread
    for slice_, lane, register in itertools.product(range(plan.num_dq_slices), range(32), range(rows)):
        warp, tile = slice_ % 4, slice_ // 4
        row, column = accumulator_position(warp, lane, register)
        row += 64 * tile
        query, dimension = (column, row) if plan.swaps_dq else (row, column)
        assert query < plan.tile_m
        found.add((query, dimension))
    assert len(found) == plan.dq_block_floats
    assert found >= set(itertools.product(range(plan.tile_m), range(plan.head_dim)))


def test_launch_facts():
    problem = Problem(direction="bwd", head_dim=128, mask="causal")
    plan: Any = make_plan(KernelSpec(problem=problem, tiling=default_tiling(problem, "sm90")))
    launch = launch_of(plan, Shape(2, 300, 1000, 12, 4), scaled(plan, 0.125), 132)
    blocks = -(-300 // plan.tile_m)
    assert launch.grids == tuple((count, 1, 1) for count in (blocks * 24, 8 * 8, blocks * 24))
    assert launch.scratch["lse_log2"] == blocks * plan.tile_m * 24
    assert launch.scratch["dq_acc"] == blocks * plan.tile_m * 128 * 24
    assert {param.name for param in plan.params} - set(launch.values) == {
        *("o", "dout", "lse", "dlse", "lse_log2", "dpsum", "dq_acc", "dq_sums"),
        *(f"{name}_{step}_stride" for name in ("o", "dout") for step in ("batch", "row", "head")),
    }
    assert "dq_turns" not in launch.scratch
    for shape in (Shape(1 << 20, 1 << 20, 8, 64, 64), Shape(1, 1 << 30, 1 << 30, 1, 1)):
        with pytest.raises(OverflowError):
            launch_of(plan, shape, scaled(plan, 0.125), 132)


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_launch_facts_of_deterministic_kernels(mask):
    """A turn for each share of dQ of a block of queries; sections of heads though the mask alone asks for none."""
    problem = Problem(direction="bwd", head_dim=128, mask=mask, deterministic=True)
    plan: Any = make_plan(KernelSpec(problem=problem, tiling=default_tiling(problem, "sm90")))
    launch = launch_of(plan, Shape(2, 8192, 8192, 16, 16), scaled(plan, 0.125), 132)
    assert launch.grids[0][0] == -(-8192 // plan.tile_m) * 32
    assert launch.scratch["dq_turns"] == launch.grids[0][0] * 2  # each warpgroup hands over its own
    assert launch.values["heads_per_section"] == 16  # of 8 MiB of Q, dO and dQ each, in 128 MiB
    assert launch_of(plan, Shape(32, 512, 512, 16, 16), scaled(plan, 0.125), 132).values["heads_per_section"] == 64
    assert plan.pack_params(launch.values | dict.fromkeys({param.name for param in plan.params} - {*launch.values}, 0))
    names = [param.name for param in plan.params]
    assert names.index("dq_turns") == names.index("dq_acc") + 1 and "heads_per_section" in names
    usual: Any = make_plan(KernelSpec(problem=problem.model_copy(update={"deterministic": False}), tiling=plan.tiling))
    assert len(plan.barriers.all) == len(usual.barriers.all)  # the pair of dQ
    assert {param.name for param in usual.params}.isdisjoint({"dq_turns"})


def test_which_kernels_start_early():
    """Behind another kernel of the same call only. A stored cubin says so: one without the waits must not be used."""
    problem = Problem(direction="bwd", head_dim=128)
    plan = make_plan(KernelSpec(problem=problem, tiling=default_tiling(problem, "sm90")))
    assert [entry.starts_early for entry in plan.entry_points] == [False, True, True]
    assert [entry["starts_early"] for entry in launch_facts(plan)["entry_points"]] == [False, True, True]
    for arch in ("sm80", "sm90"):
        problem = Problem(head_dim=128)
        forward = make_plan(KernelSpec(problem=problem, tiling=default_tiling(problem, arch)))
        assert [entry.starts_early for entry in forward.entry_points] == [False]
        assert "griddepcontrol" not in render(forward).source


def test_what_does_not_fit_says_why():
    problem = Problem(direction="bwd", head_dim=128)
    for changes, words in (
        ({"tile_m": 128}, "shared memory|registers"),
        ({"tile_n": 144}, "keys"),
        ({"num_mma_warps": 12}, "mma warps"),
        ({"swizzle_bytes": 64}, "swizzle"),
        ({"lazy_rescale": 1}, "lazy rescale"),
        ({"tile_m": 80, "tile_n": 64}, "query rows"),
    ):
        tiling = Tiling(**{"arch": "sm90", "tile_m": 64, "tile_n": 128, "num_stages": 2, "num_mma_warps": 8} | changes)
        with pytest.raises(InfeasibleSpec, match=f"(?s)({words}).*nearest"):
            make_plan(KernelSpec(problem=problem, tiling=tiling))


def test_deterministic_gradients_by_products_need_two_stages():
    """With one they compile, and spill; a tuned row with one stage, made without, must then be passed over."""
    name = "fa2_bwd_sm90_bf16_d256_causal{}_m64_n64_s{}_w8"
    for made in (name.format("", 1), name.format("_det", 2)):
        assert make_plan(KernelSpec.from_name(made)).name == made
    with pytest.raises(InfeasibleSpec, match=r"(?s)stages +1 given.*needs 2.*nearest"):
        make_plan(KernelSpec.from_name(name.format("_det", 1)))
