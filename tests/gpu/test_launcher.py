"""The C++ launcher of `fa2gen render --with-host`, on a GPU: its results are ours, bit by bit."""

from __future__ import annotations

import ctypes
import shutil

import pytest
import torch

from fa2gen.gpus import current_device
from fa2gen.kernel import Kernel
from fa2gen.launch import launch_of
from fa2gen.options import Options, Shape
from fa2gen.select import select
from fa2gen.spec import Problem
from fa2gen.store import Store
from tests.launcher import Tensor, build, call_type, cuda_include

pytestmark = pytest.mark.skipif(
    cuda_include() is None or not (shutil.which("g++") or shutil.which("clang++")), reason="no cuda.h or no compiler"
)

SHAPES = (Shape(2, 300, 700, 4, 2), Shape(1, 1, 513, 2, 2))


@pytest.mark.parametrize("head_dim", [72, 128])
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
@pytest.mark.parametrize("mask", ["causal", "window"])
@pytest.mark.parametrize("arch", ["sm80", "sm90"])
def test_the_launchers_results_are_ours(tmp_path, arch, mask, direction, head_dim):
    if arch == "sm90" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip(f"sm90 kernels do not run on {torch.cuda.get_device_name()}")
    backward = direction == "bwd"
    problem = Problem(direction=direction, head_dim=head_dim, mask=mask, deterministic=backward)
    chosen = select(problem, current_device(), arch)
    plan = chosen.plan
    kernel = Kernel(plan, Store().get_or_compile(plan, chosen.target).cubin, torch.cuda.current_device())
    door, functions = build(plan, tmp_path), (ctypes.c_void_p * len(kernel.functions))(*map(int, kernel.functions))
    window = {"window_left": 100, "window_right": 0, "chunk": 0} if mask == "window" else {}
    options = Options(softmax_scale=0.1, causal=True, window_left=window.get("window_left", -1), deterministic=backward)
    stream = torch.cuda.current_stream().cuda_stream
    for shape in SHAPES:
        torch.manual_seed(7)
        made = {}
        for operand in plan.operands:
            dtype = torch.float32 if operand.of == "row" else torch.bfloat16
            made[operand.name] = torch.randn(operand.shape(shape, problem), device="cuda").to(dtype)
        addresses = {name: tensor.data_ptr() for name, tensor in made.items()}
        strides = {x.name: made[x.name].stride()[:3] for x in plan.operands if x.of != "row"}
        outputs = [made[operand.name] for operand in plan.operands if operand.out]
        launch = kernel.prepare(shape, strides, options)
        scratch = torch.zeros(max(launch.scratch_bytes, 16), dtype=torch.uint8, device="cuda")
        at, places = scratch.data_ptr(), {}
        for name, count in launch_of(plan, shape, options, kernel.num_sms).scratch.items():
            places[name], at = at, at + 4 * count
        tensors = {name: Tensor(addresses[name], *steps) for name, steps in strides.items()}
        rows = {x.name: addresses[x.name] for x in plan.operands if x.of == "row"}
        call = call_type(plan)(**shape._asdict(), softmax_scale=0.1, **window, **tensors, **rows, **places)

        poisoned(outputs)
        launch(tuple(addresses[operand.name] for operand in plan.operands), scratch.data_ptr(), stream)
        torch.cuda.synchronize()
        ours = [output.clone() for output in outputs]
        poisoned(outputs)
        assert door(functions, kernel.num_sms, ctypes.byref(call), ctypes.c_void_p(stream)) == 0
        torch.cuda.synchronize()
        for mine, launchers in zip(ours, outputs, strict=True):
            assert not mine.isnan().any() and torch.equal(mine, launchers)


def poisoned(outputs: list[torch.Tensor]) -> None:
    for output in outputs:
        output.fill_(float("nan"))
