"""The probes of tests/probes/ show every form of operand that the templates use."""

from __future__ import annotations

import re

import pytest
from machine_probes import FOLDER, plans, probes, source, used_forms

from fa2gen.ptx import Wgmma


def test_every_form_that_a_kernel_uses_has_a_probe():
    shown = frozenset().union(*(probe.forms for probe in probes()))
    missing = {form: kernel for form, kernel in used_forms().items() if form not in shown}
    assert not missing, "no probe shows\n" + "\n".join(f"{form}: {kernel}" for form, kernel in sorted(missing.items()))


def test_used_forms_are_read_off_the_kernels():
    """Of each kind some: a pattern that matches nothing would ask for no probe."""
    used = " | ".join(used_forms())
    for kind in ("ss_kk", "rs_km", "ss_km", "ss_mk"):
        assert f"wgmma {kind}, " in used
    for name in ("ldmatrix_x4", "ldmatrix_x4_trans", "ldmatrix_x2_trans", "cp_async_16", "stmatrix_x4", "stmatrix_x2"):
        for span in (128, 64, 32):
            assert f"{name}, {span}-byte rows" in used
    for form in (
        "stmatrix_x4_trans, 128-byte rows",
        "mma_m16n8k16, bf16",
        "bulk_load",
        "bulk_reduce_add",
        "reduce_add_global_float4",
        "tma_load of 192 rows of 64 columns, 128-byte swizzle",
        "tma_load of 128 rows of 16 columns, 128-byte swizzle",  # the last panel of head dim 72
        "tma_store of 16 rows of 16 columns, 32-byte swizzle",
        "tma_store of 80 rows of 64 columns, 128-byte swizzle",  # dQ
    ):
        assert form in used_forms()


def test_wgmmas_of_the_plans_are_those_of_the_text():
    """The text is where forms are read; a name that the pattern did not match would be missed."""
    for plan in plans():
        if plan.arch == "sm90":
            ops = {
                op
                for name in dir(type(plan))
                if name.startswith("wgmma_") and isinstance(op := getattr(plan, name), Wgmma)
            }
            kinds = {re.split("k16_", op.function)[1] for op in ops}
            assert all(any(form.startswith(f"wgmma {kind}, ") for form in used_forms()) for kind in kinds), plan.name


@pytest.mark.parametrize("target", ["cuda", "cpu"])
def test_probes_do_what_they_say(target):
    """Each has the instructions of its forms in its text."""
    for probe in probes():
        text = source(probe, target).source
        for form in probe.forms:
            word = re.match(r"\w+", form)[0]
            word = f"k16_{form.split()[1].rstrip(',')}" if re.match(r"wgmma [rs]s_", form) else word
            assert word in text, f"{probe.name} does not use {form}"


def test_names_are_unique_and_every_template_is_used():
    names = [probe.name for probe in probes()]
    assert len(set(names)) == len(names)
    assert {probe.template for probe in probes()} == {path.name.removesuffix(".cu.j2") for path in FOLDER.glob("*.j2")}
