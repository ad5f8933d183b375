"""Windows and chunks on a GPU, both passes, by the project's rule."""

from __future__ import annotations

import itertools

import pytest
import torch

from fa2gen import cases
from fa2gen.gpus import current_device
from fa2gen.options import Options, Shape
from fa2gen.select import select
from fa2gen.spec import KernelSpec, Problem

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

SHAPES = (
    Shape(2, 1, 1, 2, 2),
    Shape(2, 1, 1024, 4, 2),
    Shape(2, 113, 203, 6, 1),
    Shape(1, 203, 113, 6, 6),
    Shape(2, 128, 217, 8, 2),
    Shape(1, 1023, 1024, 4, 2),
    Shape(1, 2048, 2048, 4, 1),
)
OPTIONS = [
    Options(window_left=left, window_right=right)
    for left, right in ((0, 0), (-1, 0), (16, 0), (128, 0), (64, 32), (0, 17), (1000, 3), (5000, 5000))
]
OPTIONS += [
    Options(causal=True, window_left=100),
    Options(causal=True, chunk=256),
    Options(window_left=300, window_right=40, chunk=500),
]
KERNELS = list(itertools.product(("sm90", "sm80"), ("bf16", "fp16"), (64, 80, 128, 192, 256)))


def selected(arch: str, problem: Problem, seqlen_k: int) -> KernelSpec:
    if arch == "sm90" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip(f"sm90 kernels do not run on {torch.cuda.get_device_name()}")
    return select(problem, current_device(), arch, seqlen_k).plan.spec


def ran(spec: KernelSpec, shape: Shape, options: Options, **how) -> cases.Case:
    case = cases.make(spec, shape, options, device="cuda", **how)
    cases.run(case, "gpu")
    verdict = cases.verdict(case)
    assert verdict.ok, f"{spec.name}, {shape}, {options}: {verdict}"
    assert cases.written_outside(case) is None
    return case


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
@pytest.mark.parametrize(("arch", "dtype", "head_dim"), KERNELS)
def test_every_window(arch, dtype, head_dim, direction):
    for shape, options in itertools.product(SHAPES, OPTIONS):
        spec = selected(arch, options.problem(direction, head_dim, dtype), shape.seqlen_k)
        ran(spec, shape, options)


@pytest.mark.parametrize(("arch", "dtype", "head_dim"), [kernel for kernel in KERNELS if kernel[1] == "bf16"])
def test_deterministic_gradients_are_the_same_bits_in_every_run(arch, dtype, head_dim):
    """Turns begin at the first block of keys that sees a block of queries: with many blocks in flight, no deadlock."""
    for limits in ({"causal": True, "window_left": 200}, {"window_left": 64, "window_right": 700}, {"chunk": 300}):
        options = Options(deterministic=True, **limits)
        shape = Shape(2, 3000, 3500, 8, 2)
        spec = selected(arch, options.problem("bwd", head_dim, dtype), shape.seqlen_k)
        case = ran(spec, shape, options, with_dlse=True)
        first = {name: x.clone() for name, x in case.results.items()}
        for _ in range(10):
            case.forget_results()
            cases.run(case, "gpu")
            assert all(torch.equal(x, first[name]) for name, x in case.results.items())


@pytest.mark.parametrize("arch", ["sm90", "sm80"])
def test_a_window_that_hides_nothing_gives_the_bits_of_the_plain_kernel(arch):
    for options, direction in itertools.product((Options(), Options(causal=True)), ("fwd", "bwd")):
        options = options._replace(deterministic=direction == "bwd")
        plain = selected(arch, options.problem(direction, 128, "bf16"), 1100)
        window = KernelSpec(problem=plain.problem.model_copy(update={"mask": "window"}), tiling=plain.tiling)
        case = ran(plain, Shape(2, 900, 1100, 4, 2), options)
        expected = {name: x.clone() for name, x in case.results.items()}
        case.forget_results()
        cases.prepare(cases.load(window), case)()
        assert all(torch.equal(x, expected[name]) for name, x in case.results.items())
