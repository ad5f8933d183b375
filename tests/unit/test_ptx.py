"""Operand lists of inline assembly: ptxas would refuse most slips, but not two operands swapped."""

from __future__ import annotations

import re

import pytest

from fa2gen.ptx import MNEMONIC, Wgmma, constraint_lines, constraints, register_lines, registers

EVERY_N = range(8, 257, 8)
KINDS = [("shared", False), ("registers", True), ("shared", True), ("registers", False)]


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"%(\d+)", text)]


@pytest.mark.parametrize("count", [1, 2, 4, 8, 64, 128])
@pytest.mark.parametrize("first", [0, 1, 8, 64])
def test_registers_are_counted_from_the_first(count, first):
    text = registers(count, first)
    assert text[0] == "{" and text[-1] == "}" and text.count("{") == text.count("}") == 1
    assert numbers(text) == list(range(first, first + count))
    assert re.fullmatch(r"\{%\d+(, %\d+)*\}", text)


@pytest.mark.parametrize("count", [1, 4, 128])
def test_constraints_name_each_element_once(count):
    assert constraints("+f", "d", count) == ", ".join(f'"+f"(d[{i}])' for i in range(count))


@pytest.mark.parametrize("count", [1, 4, 7, 8, 16, 17, 128])
@pytest.mark.parametrize("first", [0, 100])
def test_lines_are_the_list_broken_up(count, first):
    """A person reads the render: no line may run off the screen."""
    assert " ".join(register_lines(count, first)) == registers(count, first)
    assert " ".join(constraint_lines("+f", "d", count)) == constraints("+f", "d", count)
    assert all(len(line) <= 114 for line in [*register_lines(count, first), *constraint_lines("+f", "d", count)])


@pytest.mark.parametrize(("a", "transposed"), KINDS, ids=str)
@pytest.mark.parametrize("n", EVERY_N)
def test_every_operand_is_used_once_and_in_order(n, a, transposed):
    """%0 ... are numbered over the outputs, then the inputs, as the wrapper lists them."""
    op = Wgmma("bf16", n, a, transposed)
    used = numbers(registers(op.num_accumulators) + op.operands)
    inputs = 2 if a == "shared" else 5  # a and b descriptors; or four registers and b's descriptor
    assert used == list(range(op.num_accumulators + inputs))
    assert numbers(op.accumulate_operand) == [op.num_accumulators + inputs], "the predicate's operand is the last input"


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize(("a", "transposed"), KINDS, ids=str)
@pytest.mark.parametrize("n", EVERY_N)
def test_the_instruction_as_the_manual_spells_it(n, a, transposed, dtype):
    """scale-d, imm-scale-a, imm-scale-b, then imm-trans-a (only for A in shared memory) and imm-trans-b."""
    op = Wgmma(dtype, n, a, transposed)
    first = n // 2
    assert op.num_accumulators == 64 * n // 128 == first
    assert op.instruction == f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{MNEMONIC[dtype]}.{MNEMONIC[dtype]}"
    if a == "shared":
        assert op.operands == f"%{first}, %{first + 1}, p, 1, 1, 0, {int(transposed)}"
    else:
        a_registers = ", ".join(f"%{first + i}" for i in range(4))
        assert op.operands == f"{{{a_registers}}}, %{first + 4}, p, 1, 1, {int(transposed)}"


def test_every_wrapper_has_a_name_of_its_own():
    ops = [Wgmma("bf16", n, a, transposed) for n in EVERY_N for a, transposed in KINDS]
    assert len({op.function for op in ops}) == len(ops)
    assert Wgmma("bf16", 128, "shared", False).function == "wgmma_m64n128k16_ss_kk"
    assert Wgmma("bf16", 128, "registers", True).function == "wgmma_m64n128k16_rs_km"
