"""Random expressions of the language, for whoever tests it: the same from the same seed."""

from __future__ import annotations

import random

TYPES = {"width": "int", "gain": "float", "label": "int", "other": "int", "valid": "bool"}
"""Of the names that can not be told from how they are used everywhere."""


def random_score(rng: random.Random, depth: int = 3) -> str:
    """A score that depends on s smoothly enough for numbers to tell its derivative."""
    terms = [_of_score(rng, depth)]
    more = ["slope[h] * abs(i - j)", "row_bias[b, i]", "key_bias[j]", "table[h, j - i + 40]", "gain"]
    if rng.random() < 0.6:
        terms.append(rng.choice(more))
    return rng.choice([" + ", " - "]).join(terms)


def _of_score(rng: random.Random, depth: int) -> str:
    if depth == 0 or rng.random() < 0.15:
        return rng.choice(["s", "s", "0.7 * s", "s * gain", "s / (1.5 + abs(gain))"])
    inner = _of_score(rng, depth - 1)
    made = [
        f"tanh({inner})",
        f"3 * tanh(({inner}) / 3)",
        f"sigmoid({inner})",
        f"sqrt(1 + ({inner}) ** 2)",
        f"log(1 + exp(-abs({inner})))",
        f"max({inner}, {_of_score(rng, depth - 1)})",
        f"where({random_condition(rng, 1)}, {inner}, {_of_score(rng, depth - 1)})",
        f"({inner}) * {_other(rng)}",
        f"-({inner}) + {_other(rng)}",
        f"min({inner}, {_other(rng)}) + s",
        f"({inner} if i % 3 == 0 else 0.5 * s)",
        f"({inner}) / (2 + abs({_other(rng)}))",
    ]
    return rng.choice(made)


def _other(rng: random.Random) -> str:
    choices = ["gain", "0.25", "2", "slope[h]", "key_bias[j]", "row_bias[b, i]", "(i - j) / 50", "h", "0.1 * min(i, j)"]
    return rng.choice(choices)


def random_condition(rng: random.Random, depth: int = 2) -> str:
    """Which keys are seen."""
    if depth and rng.random() < 0.6:
        left, right = random_condition(rng, depth - 1), random_condition(rng, depth - 1)
        joined = [f"({left} and {right})", f"({left} or {right})", f"not {left}", f"where({left}, {right}, i < j)"]
        return rng.choice(joined)
    return rng.choice(
        [
            "j <= i",
            "i - j < width",
            "abs(i - j) <= width",
            "0 <= i - j < 2 * width",
            "i // 16 == j // 16",
            "j % 7 != 2",
            "j < seqlen_k - width",
            "(i + j) % 5 < 3",
            "2 * i + 3 * j < 100",
            "min(i, j) < 9",
            "where(j < width, 20, j) <= i",
            "i * j < 300",
            "label[i] == other[b, j]",
            "label[i] < label[j]",
            "valid[b, j]",
            "h % 2 == 0",
            "i / 3 < j + 0.5",
            "(j - i) // 8 * 8 == -16",
            "max(label[j], 2) <= other[b, i]",
        ]
    )


def inputs(torch, batch: int, heads: int, length: int) -> dict:
    """Values for every name that random expressions use; slope and biases are floats, label and other whole numbers."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int):
        return torch.randn(*shape, generator=generator)

    return {
        "width": 7,
        "gain": 0.8,
        "slope": normal(heads).abs() / 4,
        "row_bias": normal(batch, length),
        "key_bias": normal(length),
        "table": normal(heads, 81),
        "label": torch.arange(length).div(11, rounding_mode="floor").int(),
        "other": torch.randint(4, (batch, length), generator=generator).int(),
        "valid": torch.rand(batch, length, generator=generator) < 0.8,
    }
