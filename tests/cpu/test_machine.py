"""The machine is the one that the PTX manual describes: each form of operand that the templates use, on small integers.

The probes are those of tests/probes/, which tests/gpu runs on a GPU.
"""

from __future__ import annotations

import pytest
from machine_probes import differences, probes, run_on_cpu

from fa2gen.cpu import KernelFault
from fa2gen.plan import make_plan
from fa2gen.render import Rendered, render
from fa2gen.spec import KernelSpec


@pytest.mark.parametrize("probe", probes(), ids=lambda probe: probe.name)
def test_probe(probe):
    _, expected = probe.case()
    assert not differences(run_on_cpu(probe), expected)


@pytest.mark.parametrize("kernel", ("sm90", "sm80"))
def test_swizzles_are_free_of_conflicts_and_without_them_they_are_not(machine, kernel):
    """The counters see what a swizzle is for: 8 rows of a column of chunks in 8 groups of banks."""
    name = {
        "sm90": "fa2_fwd_sm90_bf16_d128_causal_m128_n64_s2_w8",
        "sm80": "fa2_fwd_sm80_bf16_d128_causal_m64_n64_s1_w4",
    }[kernel]
    sizes = (1, 64, 64, 1, 1)
    primitives = {"sm90": ("stmatrix",), "sm80": ("ldmatrix",)}[kernel]
    _, report, *_ = machine.run(name, sizes, stats=True)
    for primitive in primitives:
        assert report.counts[primitive].wavefronts == report.counts[primitive].ideal_wavefronts > 0
    if kernel == "sm80":
        rendered = render(make_plan(KernelSpec.from_name(name)), target="cpu")
        plain = Rendered(rendered.source.replace("kSwizzleMask = 7;", "kSwizzleMask = 0;"), rendered.origins)
        verdict, report, *_ = machine.run(name, sizes, stats=True, rendered=plain)
        assert verdict.ok
        assert report.counts["ldmatrix"].wavefronts == 8 * report.counts["ldmatrix"].ideal_wavefronts


def test_a_message_names_the_template_line_and_the_seed(machine):
    name = "fa2_fwd_sm90_bf16_d128_causal_m128_n64_s2_w8"
    rendered = render(make_plan(KernelSpec.from_name(name)), target="cpu")
    deaf = Rendered(
        rendered.source.replace("mbarrier_arrive_if(barriers.v_empty(v_state.stage), leader);", ""), rendered.origins
    )
    with pytest.raises(KernelFault) as caught:
        machine.run(name, (1, 300, 400, 1, 1), rendered=deaf, seed=5)
    message = str(caught.value)
    assert "deadlock" in message and "parity" in message and "[sm90/" in message and "replay with seed=5" in message
    with pytest.raises(KernelFault) as again:
        machine.run(name, (1, 300, 400, 1, 1), rendered=deaf, seed=5)
    assert str(again.value) == message
