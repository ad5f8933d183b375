"""Shared-memory layouts against their definition: what TMA writes, wgmma and ldmatrix find, without bank conflicts."""

from __future__ import annotations

import random

import pytest

from fa2gen.layout import Panels, accumulator_position, align_up, ceil_div, swizzle

SPANS = (128, 64, 32)
BANKS, BANK_BYTES, CHUNK_BYTES = 32, 4, 16


def swizzle_by_bits(address: int, span: int) -> int:
    """CUTLASS's Swizzle<b, 4, 3>, bit by bit: address bit 4 + i is xored with bit 7 + i."""
    bits = [(address >> i) & 1 for i in range(40)]
    for i in range({128: 3, 64: 2, 32: 1}[span]):
        bits[4 + i] ^= bits[7 + i]
    return sum(bit << i for i, bit in enumerate(bits))


@pytest.mark.parametrize("span", SPANS)
def test_swizzle_is_the_hardware_s(span):
    rng = random.Random(span)
    for address in [*range(4096), *(rng.randrange(1 << 32) for _ in range(2000))]:
        assert swizzle(address, span) == swizzle_by_bits(address, span)


@pytest.mark.parametrize("span", SPANS)
def test_swizzle_loses_nothing(span):
    """Two elements at one address would be a wrong answer that no compiler sees."""
    assert sorted(swizzle(address, span) for address in range(8192)) == list(range(8192))
    assert all(swizzle(swizzle(address, span), span) == address for address in range(8192))


@pytest.mark.parametrize("span", SPANS)
def test_swizzle_moves_whole_chunks_within_their_row(span):
    """A copy of 16 bytes stays one copy, and a panel's row stays in its place."""
    for address in range(8192):
        moved = swizzle(address, span)
        assert moved // span == address // span and moved % CHUNK_BYTES == address % CHUNK_BYTES


@pytest.mark.parametrize("span", SPANS)
def test_eight_rows_of_a_chunk_column_have_no_bank_conflict(span):
    """ldmatrix and wgmma read 8 rows of 16 bytes at once: together they must touch every bank once."""
    for column in range(0, span, CHUNK_BYTES):
        for first_row in range(0, 64, 8):
            starts = [swizzle((first_row + row) * span + column, span) for row in range(8)]
            banks = sorted((start // BANK_BYTES + word) % BANKS for start in starts for word in range(4))
            assert banks == list(range(BANKS))


def test_without_a_swizzle_there_are_conflicts():
    """That the test above can fail."""
    banks = {(row * 128 // BANK_BYTES + word) % BANKS for row in range(8) for word in range(4)}
    assert len(banks) == 4


@pytest.mark.parametrize("span", SPANS)
def test_swizzle_repeats_every_1024_bytes(span):
    """So a tile on a 1024-byte boundary may compute it from offsets: what kernels do."""
    for base in (1024, 7 * 1024, 1 << 17):
        assert all(swizzle(base + offset, span) == base + swizzle(offset, span) for offset in range(0, 4096, 2))


@pytest.mark.parametrize("span", SPANS)
def test_chunk_form_of_the_swizzle(span):
    """Kernels write the same as `chunk ^ ((row >> shift) & mask)`."""
    shift, mask = {128: (0, 7), 64: (1, 3), 32: (2, 1)}[span]
    for row in range(64):
        for chunk in range(span // CHUNK_BYTES):
            expected = row * span + (chunk ^ ((row >> shift) & mask)) * CHUNK_BYTES
            assert swizzle(row * span + chunk * CHUNK_BYTES, span) == expected


@pytest.mark.parametrize("n", range(8, 257, 8))
def test_an_accumulator_covers_its_tile_exactly_once(n):
    """64 x n elements of a wgmma over 4 warps, 32 lanes and n / 2 registers."""
    owned = [accumulator_position(warp, lane, r) for warp in range(4) for lane in range(32) for r in range(n // 2)]
    assert sorted(owned) == [(row, column) for row in range(64) for column in range(n)]


def test_accumulator_position_as_the_manual_draws_it():
    """A few corners of the figure in the PTX manual, "wgmma D fragment layout"."""
    for place, owner in {
        (0, 0): (0, 0, 0),
        (0, 1): (0, 0, 1),
        (8, 0): (0, 0, 2),
        (0, 8): (0, 0, 4),
        (0, 6): (0, 3, 0),
        (1, 0): (0, 4, 0),
        (7, 7): (0, 31, 1),
        (16, 0): (1, 0, 0),
        (63, 15): (3, 31, 7),
    }.items():
        assert accumulator_position(*owner) == place


def test_a_quad_shares_its_rows_and_nothing_else_does():
    """Row sums are added over four lanes: those and only those hold the row."""
    for warp in range(4):
        rows = [{accumulator_position(warp, lane, r)[0] for r in range(64)} for lane in range(32)]
        for lane, other in ((a, b) for a in range(32) for b in range(32)):
            assert (rows[lane] == rows[other]) == (lane // 4 == other // 4)
            assert lane // 4 == other // 4 or not rows[lane] & rows[other]


def test_the_accumulator_is_the_next_product_s_operand():
    """P goes from D fragment to A fragment with no shuffle: the A layout of m16k16, from the manual."""
    for lane in range(32):
        for step in range(4):
            for pair in range(4):  # A register `pair` of this step holds two neighbouring elements
                row = lane // 4 + 8 * (pair % 2)
                column = 16 * step + 2 * (lane % 4) + 8 * (pair // 2)
                register = 2 * (4 * step + pair)
                assert accumulator_position(0, lane, register) == (row, column)
                assert accumulator_position(0, lane, register + 1) == (row, column + 1)


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("head_dim", range(8, 257, 8))
def test_panels_hold_every_column(head_dim, span):
    for rows in (64, 80, 128, 192):
        panels = Panels(rows, head_dim, span)
        assert panels.columns * 2 == span
        assert (panels.count - 1) * panels.columns < head_dim <= panels.count * panels.columns
        assert panels.bytes == panels.count * rows * span >= 2 * rows * head_dim


def test_rounding():
    for value in range(200):
        for step in (1, 2, 7, 16, 1024):
            assert align_up(value, step) == min(n for n in range(value, value + step) if n % step == 0)
            assert ceil_div(value, step) == align_up(value, step) // step
