"""How kernels are called: streams, graphs, threads, devices, torch.compile, and the same bits every time."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch

import fa2gen
from fa2gen.ops import attention, flash_attn_func, forget
from fa2gen.ops import call as calls


def families(head_dims, masks=("full", "causal")):
    values = list(itertools.product(("sm80", "sm90"), ("bf16",), head_dims, masks))
    return pytest.mark.parametrize("family", values, indirect=True, ids=lambda f: f"{f[0]}_{f[1]}_d{f[2]}_{f[3]}")


@pytest.fixture
def call(family):
    """attention(q, k, v) by the family's kernel."""
    return lambda q, k, v: attention(q, k, v, causal=family.mask == "causal", arch=family.arch)


@families((64, 128, 256))
def test_100_reruns_are_bitwise_equal(harness, family, call):
    q, k, v = harness.inputs(family, harness.Sizes(3, 1000, 1300, 8, 2))
    out, lse = call(q, k, v)
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(100):
        again, lse_again = call(q, k, v)
        different += (again.view(torch.int16) != out.view(torch.int16)).sum() + (lse_again != lse).sum()
    assert int(different) == 0


@families((128,))
def test_on_another_stream(harness, family, call):
    """Inputs that the stream itself produces after a delay: a launch on any other stream would read the NaN before."""
    values = harness.inputs(family, harness.Sizes(2, 500, 500, 4, 2), "dense")
    q, k, v = (torch.full_like(x, float("nan")) for x in values)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for x, value in zip((q, k, v), values, strict=True):
            x.copy_(value)
        out, lse = call(q, k, v)
    stream.synchronize()
    assert harness.judge(family, out, lse, *values).ok


@families((64, 128))
def test_streams_at_the_same_time(harness, family, call):
    """Launches of one signature that overlap share no state."""
    cases = [harness.inputs(family, harness.Sizes(2, 400, 400, 6, 3), seed=seed) for seed in range(4)]
    expected = [call(*case) for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    results = [[] for _ in cases]
    for _ in range(25):
        for stream, case, found in zip(streams, cases, results, strict=True):
            with torch.cuda.stream(stream):
                found.append(call(*case))
    torch.cuda.synchronize()
    for found, right in zip(results, expected, strict=True):
        assert all(torch.equal(out, right[0]) and torch.equal(lse, right[1]) for out, lse in found)


@families((64, 128))
def test_threads(harness, family, call):
    """Threads that have not touched CUDA before, each with a stream of its own; from a cold start too."""
    cases = [harness.inputs(family, harness.Sizes(2, 300, 300, 4, 2), seed=seed) for seed in range(6)]
    expected = [call(*case) for case in cases]
    torch.cuda.synchronize()
    forget()
    wrong = []

    def work(case, right):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(50):
                    out, lse = call(*case)
                torch.cuda.current_stream().synchronize()
            if not (torch.equal(out, right[0]) and torch.equal(lse, right[1])):
                wrong.append("another answer")
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=item) for item in zip(cases, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# CUDA graphs ------------------------------------------------------------------------------------------------------


def refill(harness, family, sizes, tensors, seed):
    for x, value in zip(tensors, harness.inputs(family, sizes, "dense", seed), strict=True):
        x.copy_(value)


@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
@families((64, 128))
def test_graph_replays_with_other_data(harness, family, call, warm):
    """Capture, with and without an earlier call of that signature; replay on other data, beside eager calls."""
    sizes = harness.Sizes(2, 333, 444, 6, 2)
    q, k, v = harness.inputs(family, sizes)
    if warm:
        call(q, k, v)
    else:
        forget()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = call(q, k, v)
        out2, lse2 = call(q, k, v)  # two launches in one graph
    for seed in range(1, 5):
        refill(harness, family, sizes, (q, k, v), seed)
        out.fill_(float("nan"))
        out2.fill_(float("nan"))
        graph.replay()
        eager = call(q, k, v)
        torch.cuda.synchronize()
        assert harness.judge(family, out, lse, q, k, v).ok
        for found in ((out, lse), (out2, lse2)):
            assert torch.equal(found[0], eager[0]) and torch.equal(found[1], eager[1])


@families((128,))
def test_graphs_replayed_at_the_same_time(harness, family, call):
    """Two graphs of one signature, on two streams, with eager calls on a third."""
    sizes = harness.Sizes(2, 700, 700, 6, 2)
    cases = [harness.inputs(family, sizes, seed=seed) for seed in range(3)]
    expected = [call(*case) for case in cases]
    torch.cuda.synchronize()
    graphs, results = [], []
    for case in cases[:2]:
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            results.append(call(*case))
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(30):
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        last = call(*cases[2])
    torch.cuda.synchronize()
    for found, right in zip([*results, last], expected, strict=True):
        assert torch.equal(found[0], right[0]) and torch.equal(found[1], right[1])


# Devices and the front door ---------------------------------------------------------------------------------------


@families((128,))
def test_on_another_device(harness, family, call):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    q, k, v = harness.inputs(family, harness.Sizes(2, 300, 300, 4, 2))
    out, lse = call(q, k, v)
    there = call(*(x.to("cuda:1") for x in (q, k, v)))
    assert torch.cuda.current_device() == 0 and there[0].device == torch.device("cuda:1")
    assert torch.equal(there[0].to("cuda:0"), out) and torch.equal(there[1].to("cuda:0"), lse)
    torch.cuda.synchronize(1)


@families((64, 128))
def test_flash_attn_func(harness, family, monkeypatch):
    """The public function picks the asked family, gives what the kernel gives, and compiles to one graph."""
    monkeypatch.setenv("FA2GEN_ARCH", family.arch)
    forget()
    causal = family.mask == "causal"
    q, k, v = harness.inputs(family, harness.Sizes(2, 300, 500, 4, 2))
    out, lse, _ = flash_attn_func(q, k, v, causal=causal, return_attn_probs=True)
    assert {spec.tiling.arch for spec, _ in calls._kernels} == {family.arch}
    assert harness.judge(family, out, lse, q, k, v).ok
    assert out.is_contiguous() and lse.dtype == torch.float32

    def model(q, k, v):
        return flash_attn_func(q * 2, k, v, causal=causal) + 1

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), model(q, k, v))
    found = torch.library.opcheck(torch.ops.fa2gen.fwd.default, (q, k, v, 0.1, causal))
    assert set(found.values()) == {"SUCCESS"}
    forget()


@pytest.mark.parametrize("arch", ["sm80", "sm90"])
def test_out_alone(arch, monkeypatch):
    """Without lse, which then goes to memory of the stream: the same bits, on streams at once, replayed, for more rows
    than that memory has, and from tensors that move."""
    monkeypatch.setenv("FA2GEN_ARCH", arch)
    if arch == "sm90" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    forget()
    generator = torch.Generator(device="cuda").manual_seed(1)

    def case(seqlen):
        shape = (3, 2, seqlen, 4, 64)
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16).unbind(0)

    cases = [case(seqlen) for seqlen in (1, 300, 300, 300, 2048, 2049)]
    assert calls.SCRATCH_ROWS == 2 * 4 * 2048
    expected = [flash_attn_func(*one, causal=True, return_attn_probs=True)[0] for one in cases]
    torch.cuda.synchronize()
    found = []
    streams = [torch.cuda.Stream() for _ in cases]
    for _ in range(25):
        for stream, one in zip(streams, cases, strict=True):
            with torch.cuda.stream(stream):
                found.append(flash_attn_func(*one, causal=True))
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = [flash_attn_func(*one, causal=True) for one in cases]
    for _ in range(3):
        for out in captured:
            out.fill_(float("nan"))
        graph.replay()
        found += [flash_attn_func(*one, causal=True) for one in cases]
    torch.cuda.synchronize()
    for i, out in enumerate(found):
        assert torch.equal(out, expected[i % len(cases)])
    assert all(torch.equal(out, right) for out, right in zip(captured, expected, strict=True))
    forget()


def test_mixed_devices_and_options_are_refused():
    q = torch.zeros(1, 8, 2, 64, dtype=torch.float16, device="cuda")
    with pytest.raises(fa2gen.InvalidInput, match=r"q is on cuda:0, k on cpu"):
        flash_attn_func(q, q.cpu(), q.cpu())
    with pytest.raises(fa2gen.InvalidInput, match="q is on cpu, k on cuda:0"):
        flash_attn_func(q.cpu(), q, q)
    with pytest.raises(fa2gen.InvalidInput, match="sm70"):
        attention(q, q, q, arch="sm70")
    with pytest.raises(fa2gen.UnsupportedProblem, match="head_dim is 264; the largest is 256"):
        flash_attn_func(*(q.new_zeros(1, 8, 2, 264),) * 3)


def test_a_dispatch_mode_sees_the_operator():
    """Eager calls go past the dispatcher; whoever listens there (tracing, flop counting) must still see them."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Listening(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    q = torch.randn(1, 64, 2, 64, device="cuda", dtype=torch.bfloat16)
    expected = fa2gen.flash_attn_func(q, q, q)
    with Listening():
        out = fa2gen.flash_attn_func(q, q, q)
    assert "fa2gen.fwd.default" in seen
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
