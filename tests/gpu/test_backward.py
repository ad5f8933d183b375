"""Gradients on a GPU, by the project's rule: every head dim, dtype and mask, over shapes, layouts and scales."""

from __future__ import annotations

import contextlib
import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fa2gen import UnsupportedProblem, env, flash_attn_func
from fa2gen.errors import Fa2GenError
from fa2gen.gpus import device_at
from fa2gen.ops.call import backward_cuda, forget, forward_cuda
from fa2gen.options import Options
from fa2gen.reference import check_gradients
from fa2gen.select import select
from fa2gen.spec import Problem
from fa2gen.store import Store

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

# (batch, seqlen_q, seqlen_k, heads, heads_kv)
SHAPES = (
    (2, 1, 1, 2, 2),
    (2, 1, 1024, 4, 2),
    (2, 113, 203, 6, 1),
    (1, 203, 113, 6, 6),  # causal: the first 90 rows see no key
    (2, 128, 217, 8, 2),
    (1, 512, 40, 2, 2),  # causal: whole blocks of queries see no key
    (1, 1023, 1024, 4, 2),
    (1, 2048, 2048, 3, 1),
    (1, 4096, 4096, 1, 1),
    (2, 0, 64, 2, 2),
    (2, 64, 0, 2, 1),
    (0, 64, 64, 2, 1),
)
LAYOUTS = ("gaps", "dense", "bhsd")
DETERMINISTIC = (64, 80, 128, 256)


def families(head_dims, dtypes=("bf16", "fp16"), masks=("full", "causal")):
    values = list(itertools.product(("sm90", "sm80"), dtypes, head_dims, masks))
    return pytest.mark.parametrize("family", values, indirect=True, ids=lambda f: f"{f[0]}_{f[1]}_d{f[2]}_{f[3]}")


def selected(arch, dtype, head_dim, mask, deterministic=False, *, seqlen_k):
    """The kernel that a call with FA2GEN_ARCH=arch gets on this GPU."""
    problem = Problem(direction="bwd", head_dim=head_dim, dtype=dtype, mask=mask, deterministic=deterministic)
    return select(problem, device_at(torch.cuda.current_device()), arch, seqlen_k)


@pytest.fixture(scope="module", autouse=True)
def backward_kernels_are_built(request, harness):
    """Backward kernels of all selected tests at once, in threads. One that does not compile fails in its own test."""
    wanted = {
        f
        for item in request.session.items
        if item.path == request.path and (f := getattr(item, "callspec", None) and item.callspec.params.get("family"))
    }
    wanted |= {(*f, True) for f in wanted if f[2] in DETERMINISTIC}
    store = Store()

    def build(family):
        for seqlen_k in harness.SEQLENS_OF_ALL_ROWS:
            with contextlib.suppress(Fa2GenError):
                selection = selected(*family, seqlen_k=seqlen_k)
                store.get_or_compile(selection.plan, selection.target)

    with ThreadPoolExecutor(env.jobs()) as pool:
        list(pool.map(build, wanted))


def gradients(harness, family, q, k, v, dout, dlse=None, scale=None, deterministic=False):
    """(dq, dk, dv) into poisoned buffers; asserts that nothing beside them was written."""
    options = Options(scale, family.mask == "causal", deterministic=deterministic)
    out, lse = forward_cuda(q, k, v, options)
    tiling = selected(*family, deterministic, seqlen_k=k.shape[1]).plan.tiling
    buffers, views = zip(*(harness.poisoned(tuple(x.shape), x.dtype) for x in (q, k, v)), strict=True)
    backward_cuda(dout, q, k, v, harness.amid_nan(out), lse, dlse, options, tiling, views)
    for name, buffer in zip(("dq", "dk", "dv"), buffers, strict=True):
        outside = torch.cat([buffer[: harness.GUARD], buffer[-harness.GUARD :]])
        assert outside.isnan().all(), f"{family}: something beside {name} was written"
    return views


def inputs(harness, family, sizes, layout="gaps", seed=0, gain=1.0):
    sizes = harness.Sizes(*sizes)
    q, k, v = harness.inputs(family, sizes, layout, seed, gain)
    dout = harness.amid_nan(torch.randn(q.shape, generator=harness.generator, device="cuda").to(q.dtype), layout)
    return q, k, v, dout


def assert_right(harness, family, q, k, v, dout, dlse=None, scale=None, deterministic=False):
    found = gradients(harness, family, q, k, v, dout, dlse, scale, deterministic)
    verdict = check_gradients(found, dout, q, k, v, dlse=dlse, causal=family.mask == "causal", softmax_scale=scale)
    assert verdict.ok, f"{family} {tuple(q.shape)} x {tuple(k.shape)}, scale {scale}: {verdict}"
    return found


@families(range(8, 257, 8))
def test_every_kernel(harness, family):
    for seed, (sizes, layout) in enumerate(zip(SHAPES, itertools.cycle(LAYOUTS), strict=False)):
        assert_right(harness, family, *inputs(harness, family, sizes, layout, seed))


LENGTHS = (1, 2, 7, 8, 15, 16, 17, 31, 63, 64, 65, 79, 80, 81, 127, 128, 129, 159, 160, 161, 191, 193, 255, 257, 385)


@families((64, 80, 128, 192, 256), dtypes=("bf16",))
def test_lengths_around_tile_edges(harness, family):
    for length in LENGTHS:
        for sizes in ((1, length, 200, 2, 1), (1, 200, length, 2, 2), (1, length, length, 2, 1)):
            assert_right(harness, family, *inputs(harness, family, sizes, "gaps", length))


@families((64, 128, 256), dtypes=("bf16",))
def test_several_waves(harness, family):
    for sizes in ((3, 700, 900, 14, 7), (7, 300, 300, 12, 4), (65, 130, 70, 3, 1)):
        assert_right(harness, family, *inputs(harness, family, sizes))


@families((40, 64, 128, 256))
def test_gradient_of_lse(harness, family):
    for sizes in ((2, 150, 300, 4, 2), (1, 300, 150, 4, 1)):
        q, k, v, dout = inputs(harness, family, sizes)
        dlse = torch.randn(sizes[0], sizes[3], sizes[1], generator=harness.generator, device="cuda")
        assert_right(harness, family, q, k, v, dout, dlse)


@families((40, 64, 128, 256))
def test_softmax_scale(harness, family):
    values = inputs(harness, family, (2, 150, 300, 4, 2))
    for scale in (1e-3, 0.05, 0.5, 1.0):
        assert_right(harness, family, *values, scale=scale)


@families((64, 128, 192, 256))
def test_large_magnitudes(harness, family):
    """Almost one-hot: a key that does not exist would get an infinite probability without its mask."""
    q, k, v, dout = inputs(harness, family, (2, 200, 333, 4, 2), gain=8.0)
    for x in gradients(harness, family, q, k, v, dout):
        assert x.isfinite().all()
    assert_right(harness, family, *inputs(harness, family, (2, 200, 333, 4, 2), gain=3.0))


@families((64, 128, 256), dtypes=("bf16",))
def test_strides(harness, family):
    """Packed tensors, expanded gradients (stride 0), and addresses that TMA does not take."""
    q, k, v, dout = inputs(harness, family, (2, 333, 333, 4, 4), "dense")
    expected = assert_right(harness, family, q, k, v, dout)
    packed = torch.stack((q, k, v), dim=2).unbind(2)
    for x, y in zip(gradients(harness, family, *packed, dout)[1:], expected[1:], strict=True):
        assert torch.equal(x, y)
    one = dout[:1, :1, :1].expand_as(dout)
    assert_right(harness, family, q, k, v, one)
    buffer = torch.empty(dout.numel() + 1, dtype=dout.dtype, device="cuda")
    assert_right(harness, family, q, k, v, buffer[1:].view(dout.shape).copy_(dout))


@families((64, 128, 256), dtypes=("bf16",), masks=("causal",))
def test_dk_and_dv_are_the_same_in_every_run(harness, family):
    """And dQ, whose order of summation varies, differs by roundings only."""
    q, k, v, dout = inputs(harness, family, (2, 1000, 1300, 8, 2))
    first = gradients(harness, family, q, k, v, dout)
    for _ in range(20):
        again = gradients(harness, family, q, k, v, dout)
        assert torch.equal(again[1], first[1]) and torch.equal(again[2], first[2])
        torch.testing.assert_close(again[0], first[0], rtol=2e-2, atol=2e-3)


# Back to back: kernels of one call start under the end of the one before ---------------------------------------------


def assert_the_same(found, expected, deterministic, what):
    assert torch.equal(found[1], expected[1]) and torch.equal(found[2], expected[2]), f"dk or dv of {what}"
    if deterministic:
        assert torch.equal(found[0], expected[0]), f"dq of {what}"
    else:
        atol = 1e-3 * float(expected[0].abs().max())
        torch.testing.assert_close(found[0], expected[0], rtol=2e-2, atol=atol, msg=lambda m: f"dq of {what}: {m}")


# A few blocks, less than a wave, several; the preprocess kernel has more blocks than the main one, and fewer.
BACK_TO_BACK = ((1, 100, 130, 2, 1), (1, 2048, 512, 8, 2), (2, 512, 2048, 8, 8), (2, 1500, 1500, 16, 16))


def variants(harness, family, sizes, deterministic, count=3):
    """Arguments of backward_cuda and its checked gradients, for inputs of one shape: they use the same scratch memory.

    Their magnitudes differ, so that what another call left there shows.
    """
    options = Options(None, family.mask == "causal", deterministic=deterministic)
    found = []
    for i in range(count):
        q, k, v, dout = inputs(harness, family, sizes, "dense", seed=i)
        dout = dout * 0.1**i
        out, lse = forward_cuda(q, k, v, options)
        found.append((dout, q, k, v, out, lse, None, options))
    return found


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "det"])
@families((64, 128, 256), dtypes=("bf16",))
def test_back_to_back(harness, family, deterministic):
    """200 calls that nobody waits for, on changing inputs, beside two busy streams."""
    noise = torch.randn(1024, 1024, device="cuda")
    others = [torch.cuda.Stream(), torch.cuda.Stream(priority=-1)]
    for sizes in BACK_TO_BACK:
        values = variants(harness, family, sizes, deterministic)
        expected = [backward_cuda(*arguments) for arguments in values]
        for (dout, q, k, v, *_), gradients_ in zip(values, expected, strict=True):
            verdict = check_gradients(gradients_, dout, q, k, v, causal=family.mask == "causal")
            assert verdict.ok, f"{family} {sizes}: {verdict}"
        torch.cuda.synchronize()
        for first in range(0, 200, 50):
            found = []
            for run in range(first, first + 50):
                if run % 3 == 0:
                    with torch.cuda.stream(others[run % 2]):
                        torch.mm(noise, noise)
                found.append(backward_cuda(*values[run % len(values)]))
            for run, gradients_ in enumerate(found, first):
                what = f"{family} {sizes}, run {run}"
                assert_the_same(gradients_, expected[run % len(values)], deterministic, what)


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "det"])
@families((64, 128, 256), dtypes=("bf16",), masks=("causal",))
def test_back_to_back_in_a_graph(harness, family, deterministic):
    """20 calls in one captured graph, 10 replays of it on changing inputs."""
    noise = torch.randn(1024, 1024, device="cuda")
    other = torch.cuda.Stream()
    for sizes in BACK_TO_BACK:
        values = variants(harness, family, sizes, deterministic)
        expected = [backward_cuda(*arguments) for arguments in values]
        places = [[x.clone() if isinstance(x, torch.Tensor) else x for x in arguments] for arguments in values]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = [backward_cuda(*places[run % len(places)]) for run in range(20)]
        for replay in range(10):
            for i, place in enumerate(places):
                for to, source in zip(place, values[(i + replay) % len(values)], strict=True):
                    if isinstance(to, torch.Tensor):
                        to.copy_(source)
            for gradients_ in captured:
                for x in gradients_:
                    x.fill_(float("nan"))
            with torch.cuda.stream(other):
                torch.mm(noise, noise)
            graph.replay()
            for run, gradients_ in enumerate(captured):
                what = f"{family} {sizes}, replay {replay}, run {run}"
                assert_the_same(gradients_, expected[(run % len(values) + replay) % len(values)], deterministic, what)


# Deterministic -------------------------------------------------------------------------------------------------------


@families(DETERMINISTIC)
def test_deterministic_kernels(harness, family):
    for seed, (sizes, layout) in enumerate(zip(SHAPES, itertools.cycle(LAYOUTS), strict=False)):
        assert_right(harness, family, *inputs(harness, family, sizes, layout, seed), deterministic=True)


@families(DETERMINISTIC, dtypes=("bf16",))
def test_deterministic_gradients_are_the_same_bits_in_every_run(harness, family):
    """Heads for themselves, grouped heads, several waves of blocks, and a load beside it that shifts their times."""
    noise = torch.randn(2048, 2048, device="cuda")
    other = torch.cuda.Stream()
    for sizes in ((2, 1000, 1300, 8, 2), (1, 4096, 4096, 4, 4), (3, 700, 2500, 14, 7)):
        values = inputs(harness, family, sizes)
        first = assert_right(harness, family, *values, deterministic=True)
        for run in range(50):
            if run % 2:
                other.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(other):
                    torch.mm(noise, noise)
            again = gradients(harness, family, *values, deterministic=True)
            assert all(torch.equal(x, y) for x, y in zip(again, first, strict=True)), f"{sizes}, run {run}"


# Autograd ------------------------------------------------------------------------------------------------------------


def leaves(sizes, head_dim=64, dtype=torch.bfloat16):
    batch, seqlen_q, seqlen_k, heads, heads_kv = sizes
    shapes = ((seqlen_q, heads), (seqlen_k, heads_kv), (seqlen_k, heads_kv))
    generator = torch.Generator("cuda").manual_seed(1)
    return [
        torch.randn(batch, s, h, head_dim, device="cuda", dtype=dtype, generator=generator).requires_grad_()
        for s, h in shapes
    ]


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_autograd(head_dim):
    q, k, v = leaves((2, 300, 400, 8, 2), head_dim)
    out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    found = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse), retain_graph=True)
    verdict = check_gradients(found, dout, q, k, v, dlse=dlse, causal=True)
    assert verdict.ok, verdict
    assert check_gradients(torch.autograd.grad(out, (q, k, v), dout), dout, q, k, v, causal=True).ok


def test_other_streams_and_graphs():
    q, k, v = leaves((2, 512, 512, 8, 2), 128)
    dout = torch.randn_like(q)
    expected = torch.autograd.grad(flash_attn_func(q, k, v, causal=True), (q, k, v), dout)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = torch.autograd.grad(flash_attn_func(q, k, v, causal=True), (q, k, v), dout)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(found[1], expected[1]) and torch.equal(found[2], expected[2])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.autograd.grad(flash_attn_func(q, k, v, causal=True), (q, k, v), dout)
    for _ in range(3):
        for x in captured:
            x.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured[1], expected[1]) and torch.equal(captured[2], expected[2])
        torch.testing.assert_close(captured[0], expected[0], rtol=2e-2, atol=2e-3)


def test_compile_fullgraph():
    q, k, v = leaves((2, 300, 300, 8, 2), 128)

    def loss(q, k, v):
        return (flash_attn_func(q, k, v, causal=True).float() ** 2).mean()

    expected = torch.autograd.grad(loss(q, k, v), (q, k, v))
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True)(q, k, v), (q, k, v))
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-2, atol=1e-5)


def test_autograd_by_sm80_kernels(monkeypatch):
    monkeypatch.setenv("FA2GEN_ARCH", "sm80")
    forget()
    q, k, v = leaves((2, 301, 402, 8, 2), 128)
    out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    found = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))
    forget()
    verdict = check_gradients(found, dout, q, k, v, dlse=dlse, causal=True)
    assert verdict.ok, verdict


def loss_of_both(q, k, v):
    out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    return (out.float() ** 2).mean() + torch.logsumexp(lse, -1).mean()


def assert_close(found, expected):
    """dQ is summed in an order that varies."""
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-3)


def test_compile_fullgraph_with_gradients_of_lse():
    leaves_ = leaves((2, 300, 400, 8, 2), 128)
    expected = torch.autograd.grad(loss_of_both(*leaves_), leaves_)
    assert_close(torch.autograd.grad(torch.compile(loss_of_both, fullgraph=True)(*leaves_), leaves_), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_autocast(dtype):
    """fp32 in, the region's dtype out, gradients in fp32; also with a backward pass inside the region."""
    leaves_ = leaves((2, 300, 400, 8, 2), 128, torch.float32)
    cast = [x.detach().to(dtype).requires_grad_() for x in leaves_]
    dout = torch.randn_like(cast[0])
    expected = torch.autograd.grad(flash_attn_func(*cast, causal=True), cast, dout)
    with torch.autocast("cuda", dtype):
        out = flash_attn_func(*leaves_, causal=True)
        assert out.dtype == dtype
        inside = torch.autograd.grad(out, leaves_, dout, retain_graph=True)
        with torch.no_grad():
            assert torch.equal(flash_attn_func(*leaves_, causal=True), out)
    for found in (inside, torch.autograd.grad(out, leaves_, dout)):
        assert_close(found, [x.float() for x in expected])


@pytest.mark.parametrize("wanted", [(0,), (1, 2), (2,)], ids=str)
def test_gradients_of_some_inputs(wanted):
    leaves_ = leaves((2, 300, 400, 8, 2), 128)
    whole = torch.autograd.grad(flash_attn_func(*leaves_).sum(), leaves_)  # of strides 0
    some = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(leaves_)]
    found = torch.autograd.grad(flash_attn_func(*some).sum(), [some[i] for i in wanted])
    assert_close(found, [whole[i] for i in wanted])


def test_outputs_used_twice():
    leaves_ = leaves((2, 300, 400, 8, 2), 128)
    dout = torch.randn_like(leaves_[0])
    expected = torch.autograd.grad(flash_attn_func(*leaves_), leaves_, 2 * dout)
    out = flash_attn_func(*leaves_)
    assert_close(torch.autograd.grad((out, out), leaves_, (dout, dout)), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant):
    leaves_ = leaves((2, 300, 400, 8, 2), 128)
    dout = torch.randn_like(leaves_[0])
    expected = torch.autograd.grad(flash_attn_func(*leaves_), leaves_, dout)
    checkpoint(flash_attn_func, *leaves_, use_reentrant=use_reentrant).backward(dout)
    assert_close([x.grad for x in leaves_], expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_of_torch_func():
    leaves_ = leaves((2, 300, 400, 8, 2), 128)
    expected = torch.autograd.grad(loss_of_both(*leaves_), leaves_)
    plain = [x.detach() for x in leaves_]
    gradients = torch.func.grad(loss_of_both, (0, 1, 2))
    assert_close(gradients(*plain), expected)
    assert_close([x[1] for x in torch.func.vmap(gradients)(*(torch.stack((x, x)) for x in plain))], expected)
    with pytest.raises(UnsupportedProblem, match="forward-mode"):
        torch.func.jvp(flash_attn_func, tuple(plain), tuple(plain))


def test_second_derivatives_are_refused():
    leaves_ = leaves((1, 64, 64, 2, 2))
    gradients = torch.autograd.grad(loss_of_both(*leaves_), leaves_, create_graph=True)
    with pytest.raises(UnsupportedProblem, match="second derivative"):
        torch.autograd.grad(gradients[0].sum(), leaves_)


def test_what_the_backward_pass_needs_may_not_change():
    leaves_ = leaves((1, 64, 64, 2, 2))
    k = leaves_[1] * 1
    loss = flash_attn_func(leaves_[0], k, leaves_[2]).sum()
    with torch.no_grad():
        k.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("with_dlse", [False, True])
def test_opcheck(with_dlse):
    q, k, v = (x.detach() for x in leaves((2, 150, 200, 4, 2)))
    out, lse = torch.ops.fa2gen.fwd(q, k, v, 0.125, True)
    dlse = torch.randn_like(lse) if with_dlse else None
    # Deterministic: two runs are compared.
    arguments = (torch.randn_like(out), q, k, v, out, lse, dlse, 0.125, True)
    found = torch.library.opcheck(torch.ops.fa2gen.bwd.default, arguments, {"deterministic": True})
    assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("causal", [False, True])
def test_deterministic_autograd_and_graphs(causal):
    q, k, v = leaves((2, 700, 900, 8, 2), 128)
    dout = torch.randn_like(q)

    def run():
        return torch.autograd.grad(flash_attn_func(q, k, v, causal=causal, deterministic=True), (q, k, v), dout)

    expected = run()
    assert check_gradients(expected, dout, q, k, v, causal=causal).ok
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(5):
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(x, y) for x, y in zip(captured, expected, strict=True))
