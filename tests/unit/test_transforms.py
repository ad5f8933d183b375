"""What PyTorch can do to a call: each way gives the gradients of the eager call, or refuses by name.

All on the CPU, where the operators run the reference; tests/gpu/test_transforms.py has what only a GPU can show.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from fa2gen import UnsupportedProblem
from fa2gen.ops import attention, flash_attn_func
from fa2gen.ops.arguments import OF_SOME_OPERATORS
from fa2gen.options import Options

ROOT = Path(__file__).resolve().parents[2]
FWD, BWD = torch.ops.fa2gen.fwd.default, torch.ops.fa2gen.bwd.default


def inputs(batch=2, seqlen_q=9, seqlen_k=11, heads=4, heads_kv=2, head_dim=16, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seqlen_q)
    sizes = ((seqlen_q, heads), (seqlen_k, heads_kv), (seqlen_k, heads_kv))
    return tuple(torch.randn(batch, s, h, head_dim, generator=generator).to(dtype) for s, h in sizes)


def loss(out, lse):
    return (out.float() ** 2).sum() + torch.sigmoid(lse).sum()


def of_operator(q, k, v):
    return loss(*FWD(q, k, v, 0.25, True, 5))


def of_function(q, k, v):
    out, lse, _ = flash_attn_func(q, k, v, causal=True, window_size=(5, -1), return_attn_probs=True)
    return loss(out, lse)


class Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, q, k, v):
        return self.function(q, k, v)


def of(function, leaves):
    return torch.autograd.grad(function(*leaves), leaves)


def compiled(function):
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def twice(xs):
    return [torch.stack((0 * x, x)) for x in xs]


def offloaded(function, leaves):
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (x.clone(), x.device), lambda x: x[0].to(x[1])):
        total = function(*leaves)
    return torch.autograd.grad(total, leaves)


def selectively(function, leaves):
    """The forward operator's results are kept, all else is computed again."""
    counted = []

    def policy(_, operator, *args, **kwargs):
        counted.append(operator)
        return CheckpointPolicy.MUST_SAVE if operator is FWD else CheckpointPolicy.PREFER_RECOMPUTE

    total = checkpoint(
        *(function, *leaves),
        use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(policy),
    )
    found = torch.autograd.grad(total, leaves)
    assert FWD in counted
    return found


ALL = (0, 1, 2)
# Way -> gradients of a function of q, k and v, given it, the plain tensors and the leaves.
WAYS = {
    "eager": lambda f, xs, leaves: of(f, leaves),
    "func.grad": lambda f, xs, leaves: torch.func.grad(f, ALL)(*xs),
    "func.vjp": lambda f, xs, leaves: torch.func.vjp(f, *xs)[1](torch.tensor(1.0)),
    "func.jacrev": lambda f, xs, leaves: torch.func.jacrev(f, ALL)(*xs),
    "vmap of grad": lambda f, xs, leaves: [x[1] for x in torch.func.vmap(torch.func.grad(f, ALL))(*twice(xs))],
    "vmap of vjp": lambda f, xs, leaves: [
        x[1] for x in torch.func.vmap(lambda *one: torch.func.vjp(f, *one)[1](torch.tensor(1.0)))(*twice(xs))
    ],
    "grad of vmap": lambda f, xs, leaves: [
        x[1] for x in torch.func.grad(lambda *many: torch.func.vmap(f)(*many).sum(), ALL)(*twice(xs))
    ],
    "vmap over some": lambda f, xs, leaves: [
        x[1]
        for x in torch.func.vmap(torch.func.grad(f, ALL), in_dims=(2, None, 1))(
            torch.stack((0 * xs[0], xs[0]), 2), xs[1], torch.stack((0 * xs[2], xs[2]), 1)
        )
    ],
    "compile": lambda f, xs, leaves: of(compiled(f), leaves),
    "compile of func.grad": lambda f, xs, leaves: compiled(torch.func.grad(f, ALL))(*xs),
    "compile of vmap": lambda f, xs, leaves: [
        x[1] for x in compiled(torch.func.vmap(torch.func.grad(f, ALL)))(*twice(xs))
    ],
    "make_fx": lambda f, xs, leaves: of(make_fx(f)(*xs), leaves),
    "make_fx before autograd": lambda f, xs, leaves: of(make_fx(f, pre_dispatch=True)(*xs), leaves),
    "export": lambda f, xs, leaves: of(torch.export.export(Module(f), xs).module(), leaves),
    "export, strict": lambda f, xs, leaves: of(torch.export.export(Module(f), xs, strict=True).module(), leaves),
    "jit.trace": lambda f, xs, leaves: of(torch.jit.trace(f, xs, check_trace=False), leaves),
    "checkpoint": lambda f, xs, leaves: of(lambda *args: checkpoint(f, *args, use_reentrant=False), leaves),
    "checkpoint, reentrant": lambda f, xs, leaves: _backward(checkpoint(f, *leaves, use_reentrant=True), leaves),
    "selective checkpoint": lambda f, xs, leaves: selectively(f, leaves),
    "saved tensors hooks": lambda f, xs, leaves: offloaded(f, leaves),
}


def _backward(total, leaves):
    total.backward()
    return [x.grad for x in leaves]


@pytest.fixture(autouse=True)
def nothing_compiled():
    yield
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("function", [of_operator, of_function], ids=["operator", "function"])
@pytest.mark.parametrize("way", WAYS)
def test_gradients(way, function):
    xs = inputs()
    leaves = [x.clone().requires_grad_() for x in xs]
    expected = of(of_function, leaves)
    assert all(x.any() for x in expected)
    for x, y in zip(WAYS[way](function, xs, leaves), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-2, atol=1e-3)


REFUSED = {
    "jvp": lambda f, xs: torch.func.jvp(f, xs, xs),
    "jacfwd": lambda f, xs: torch.func.jacfwd(f)(*xs),
    "hessian": lambda f, xs: torch.func.hessian(f)(*xs),
    "grad of grad": lambda f, xs: torch.func.grad(lambda q: torch.func.grad(f)(q, *xs[1:]).float().sum())(xs[0]),
    "double backward": lambda f, xs: _twice(f, [x.clone().requires_grad_() for x in xs]),
}


def _twice(function, leaves):
    (dq, *_) = torch.autograd.grad(function(*leaves), leaves, create_graph=True)
    torch.autograd.grad(dq.float().sum(), leaves)


@pytest.mark.parametrize("function", [of_operator, of_function], ids=["operator", "function"])
@pytest.mark.parametrize("way", REFUSED)
def test_what_has_no_gradient_is_refused(way, function):
    with pytest.raises(UnsupportedProblem, match=r"forward-mode derivative|second derivative"):
        REFUSED[way](function, inputs())


def test_tangents_of_the_backward_operator_are_refused():
    q, k, v = inputs()
    out, lse = FWD(q, k, v, 0.25, True)
    with pytest.raises(UnsupportedProblem, match="forward-mode"):
        torch.func.jvp(lambda dout: BWD(dout, q, k, v, out, lse, None, 0.25, True), (out,), (out,))


@pytest.mark.parametrize("window", [(), (5, 2), (-1, 3)], ids=str)
def test_opcheck(window):
    """All of torch's checks, on inputs that require gradients."""
    q, k, v = (x.requires_grad_() for x in inputs())
    assert set(torch.library.opcheck(FWD, (q, k, v, 0.25, False, *window)).values()) == {"SUCCESS"}
    out, lse = (x.detach() for x in FWD(q, k, v, 0.25, False, *window))
    for dlse in (None, torch.randn_like(lse)):
        arguments = (torch.randn_like(out), q.detach(), k.detach(), v.detach(), out, lse, dlse, 0.25, False, *window)
        assert set(torch.library.opcheck(BWD, arguments, {"deterministic": True}).values()) == {"SUCCESS"}


def test_operators_have_the_options_of_a_call():
    """Each by its name, optional but for the first two: what was exported before a field was added goes on to load.
    None is keyword-only: AOTInductor of torch 2.11 leaves the defaults of those out, and calls nothing."""
    fields = [name for name in Options._fields if name not in OF_SOME_OPERATORS]
    names = [f"{way}_{kind}" for way in ("fwd", "bwd") for kind in ("varlen", "general")]
    others = [getattr(torch.ops.fa2gen, name).default for name in names]
    for operator in (FWD, BWD, *others):
        own = [a for a in operator._schema.arguments if a.name in fields]
        assert [a.name for a in own] == fields and not any(a.kwarg_only for a in own)
        expected = [Options._field_defaults[name] for name in fields[2:]]
        assert [a.default_value for a in own[2:]] == expected
        assert [a.has_default_value() for a in own] == [False, False, *(True for _ in expected)]


def test_one_tensor_as_keys_and_values():
    q, k, _ = (x.requires_grad_() for x in inputs())
    expected = torch.autograd.grad(of_function(q, k, k), (q, k))
    found = torch.autograd.grad(compiled(lambda q, x: of_function(q, x, x))(q, k), (q, k))
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-2, atol=1e-3)


def test_a_window_as_long_as_the_sequence_is_exported():
    """In export's default mode, for any length; and one of a symbolic length that does hide keys."""

    class Windowed(torch.nn.Module):
        def __init__(self, less):
            super().__init__()
            self.less = less

        def forward(self, x):
            return flash_attn_func(x, x, x, window_size=(x.shape[1] - self.less, 0))

    x, longer = inputs(heads=2, seqlen_q=11)[0], inputs(heads=2, seqlen_q=23)[0]
    for less in (0, 8):
        seqlen = torch.export.Dim("seqlen", min=9, max=64)
        program = torch.export.export(Windowed(less), (x,), dynamic_shapes={"x": {1: seqlen}}).module()
        for one in (x, longer):
            expected = flash_attn_func(one, one, one, window_size=(one.shape[1] - less, 0))
            torch.testing.assert_close(program(one), expected, rtol=0, atol=0)


def test_a_traced_module_trains_its_parameters():
    class Projected(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(16, 16, dtype=torch.bfloat16)

        def forward(self, q, k, v):
            return of_function(self.linear(q), k, v)

    module, xs = Projected(), inputs()
    expected = torch.autograd.grad(module(*xs), module.linear.weight)
    traced = torch.jit.trace(module, xs)
    torch.testing.assert_close(torch.autograd.grad(traced(*xs), module.linear.weight), expected)


def test_flops_are_those_of_torch_s_own_attention():
    leaves = [x.requires_grad_() for x in inputs()]
    with FlopCounterMode(display=False) as forward:
        out = flash_attn_func(*leaves, causal=True)
    with FlopCounterMode(display=False) as backward:
        out.float().sum().backward()
    q, kv = (2, 4, 9, 16), (2, 4, 11, 16)  # heads first, and as many for keys
    assert forward.get_total_flops() == sdpa_flop_count(q, kv, kv) == 2 * (2 * 4 * 9 * 11) * 2 * 16
    assert backward.get_total_flops() == sdpa_backward_flop_count(q, q, kv, kv)


# DTensor: two ranks, of which this process is the first; nothing here needs the other's part -----------------------


@pytest.fixture
def mesh():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dimension", [0, 2], ids=["batch", "heads"])
def test_dtensors_are_computed_where_they_are(mesh, dimension):
    """Gradients too; a functional call as well as the operator's."""
    from torch.distributed.tensor import DTensor, Shard

    xs = inputs()
    leaves = [x.clone().requires_grad_() for x in xs]
    shards = [DTensor.from_local(x, mesh, [Shard(dimension)], run_check=False) for x in leaves]
    out, lse = attention(*shards, causal=True)
    assert out.placements == (Shard(dimension),) and lse.placements == (Shard(dimension // 2),)
    assert out.shape == tuple(2 * n if i == dimension else n for i, n in enumerate(xs[0].shape))
    expected = attention(*xs, causal=True)
    assert torch.equal(out.to_local(), expected[0]) and torch.equal(lse.to_local(), expected[1])
    assert torch.equal(FWD(*shards, 0.25, True)[0].to_local(), expected[0])
    dout = torch.randn_like(expected[0])
    found = torch.autograd.grad(out.to_local(), leaves, dout)
    wanted = [x.clone().requires_grad_() for x in xs]
    for x, y in zip(found, torch.autograd.grad(attention(*wanted, causal=True)[0], wanted, dout), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dimension", [0, 2], ids=["batch", "heads"])
def test_dtensors_with_a_cap_and_sinks(mesh, dimension):
    """The general operators, both passes; sinks lie with their heads, or their gradient is a sum over the batch."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    xs = [*inputs(), torch.randn(4)]
    of_sinks = Replicate() if dimension == 0 else Shard(0)
    leaves = [x.clone().requires_grad_() for x in xs]
    places = [Shard(dimension)] * 3 + [of_sinks]
    *shards, sinks = (
        DTensor.from_local(
            x, mesh, [place], run_check=False, grad_placements=[Partial() if place.is_replicate() else place]
        )
        for x, place in zip(leaves, places, strict=True)
    )
    out = flash_attn_func(*shards, causal=True, softcap=2.0, s_aux=sinks)
    assert out.placements == (Shard(dimension),)
    wanted = [x.clone().requires_grad_() for x in xs]
    expected = flash_attn_func(*wanted[:3], causal=True, softcap=2.0, s_aux=wanted[3])
    assert torch.equal(out.to_local(), expected)
    dout = torch.randn_like(expected)
    found = torch.autograd.grad(out.to_local(), leaves, dout)
    for x, y in zip(found, torch.autograd.grad(expected, wanted, dout), strict=True):
        assert torch.equal(x, y)
    with pytest.raises(UnsupportedProblem, match="dropout of DTensors is not built"):
        flash_attn_func(*shards, 0.1)


@pytest.mark.parametrize(
    ("heads", "heads_kv", "sizes", "together"),
    [
        (8, 4, (2,), True),
        (12, 3, (2,), False),  # query head 3 would be with the wrong key heads
        (6, 3, (4,), False),
        (5, 5, (2,), True),  # of shards that are equally uneven
        (8, 8, (2, 4), True),
        (16, 4, (2, 4), True),  # over either dimension, never over both
        (24, 12, (2, 4), False),
    ],
    ids=str,
)
def test_heads_are_spread_only_with_their_keys(heads, heads_kv, sizes, together):
    """By what DTensor does with lengths that do not divide evenly: the first shards are longer."""
    from types import SimpleNamespace

    from fa2gen.ops.sharding import _heads_stay_together

    mesh = SimpleNamespace(shape=sizes, size=lambda: torch.tensor(sizes).prod().item())
    assert _heads_stay_together(heads, heads_kv, mesh) is together
    if together and heads != heads_kv:
        for size in sizes:
            of_queries, of_keys = torch.arange(heads).chunk(size), torch.arange(heads_kv).chunk(size)
            for q, k in zip(of_queries, of_keys, strict=True):
                assert (q // (heads // heads_kv)).unique().tolist() == k.tolist()


# Processes ------------------------------------------------------------------------------------------------------------


def run_python(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


LOAD = """
import sys
{imports}
assert "fa2gen.ops" not in sys.modules
xs, expected = torch.load(sys.argv[1] + ".pt")
found = torch.export.load(sys.argv[1] + ".pt2").module()(*xs)
assert torch.equal(found, expected)
"""


@pytest.mark.parametrize("imports", ["import fa2gen, torch", "import torch; torch.ops.fa2gen; import fa2gen"])
def test_a_saved_export_needs_no_more_than_the_package(imports, tmp_path):
    xs = inputs()
    torch.save((xs, of_function(*xs)), tmp_path / "case.pt")
    torch.export.save(torch.export.export(Module(of_function), xs), tmp_path / "case.pt2")
    run_python(LOAD.format(imports=imports), tmp_path / "case")


IMPORT_AGAIN = """
import importlib, sys, torch
import fa2gen, fa2gen.ops.library
from fa2gen import flash_attn_func as first
x = torch.randn(1, 8, 2, 16).bfloat16().requires_grad_()
expected = torch.autograd.grad(first(x, x, x).float().sum(), x)[0]
for module in (fa2gen, fa2gen.ops.library, fa2gen.ops):
    importlib.reload(module)
for name in [name for name in sys.modules if name.split(".")[0] == "fa2gen"]:
    del sys.modules[name]
import fa2gen
from fa2gen import flash_attn_func as second
assert second is not first
for function in (first, second):
    assert torch.equal(torch.autograd.grad(function(x, x, x).float().sum(), x)[0], expected)
try:
    torch.ops.fa2gen.fwd(x, x, x, float("nan"), True)
except fa2gen.InvalidInput:  # of the second import: its functions serve the operators now
    print("refused")
"""


def test_the_package_may_be_imported_again():
    assert run_python(IMPORT_AGAIN) == "refused\n"


def test_another_version_in_one_process_is_refused():
    code = (
        "import sys, torch, fa2gen.ops.library\n"
        "torch.ops.fa2gen._held.schemas = {'fwd': '(Tensor q) -> Tensor'}\n"
        "del sys.modules['fa2gen.ops.library']\n"
        "try: import fa2gen.ops.library\n"
        "except ImportError as error: print(error)\n"
    )
    assert "another version of fa2gen" in run_python(code)


def test_without_torch_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "try: from fa2gen import flash_attn_func\n"
        "except ImportError as error: print(error)\n"
    )
    assert "flash_attn_func needs torch: pip install torch" in run_python(code)
