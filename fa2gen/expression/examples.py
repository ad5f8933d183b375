"""Ten expressions that attention is known for, with inputs of any size: what the README shows and tests run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

__all__ = ["EXAMPLES", "Example", "Sizes"]


class Sizes(NamedTuple):
    """Of a call: query heads, and the lengths of each sequence."""

    batch: int
    heads: int
    seqlen_q: int
    seqlen_k: int


@dataclass(frozen=True)
class Example:
    """Texts as `parse` takes them, and how their inputs are made.

    inputs  (torch, sizes) -> the numbers and tensors by name, the same each time.
    """

    score: str = ""
    allow: str = ""
    inputs: Callable[[Any, Sizes], Mapping[str, Any]] = lambda _, __: {}


def _normal(torch: Any, *shape: int) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def _runs(torch: Any, sizes: Sizes, step: int) -> Any:
    """(batch, the longer length) numbers 0, 0, ..., 1, 1, ...: runs of different lengths about `step`."""
    length = max(sizes.seqlen_q, sizes.seqlen_k)
    steps = torch.randint(1, 2 * step, (sizes.batch, length), generator=torch.Generator().manual_seed(8))
    begins = steps.cumsum(1)
    return (torch.arange(length)[None, :, None] >= begins[:, None, :]).sum(-1).int()


def _slopes(torch: Any, sizes: Sizes) -> Mapping[str, Any]:
    return {"slope": 2.0 ** (-8.0 * torch.arange(1, sizes.heads + 1) / sizes.heads)}


def _buckets(torch: Any, sizes: Sizes) -> Mapping[str, Any]:
    """T5's 32 buckets of relative positions, of both directions."""
    distance = torch.arange(-sizes.seqlen_q + 1, sizes.seqlen_k)
    near = distance.abs()
    far = 8 + ((near / 8).clamp(min=1).log() / math.log(128 / 8) * 8).int().clamp(max=7)
    bucket = torch.where(near < 8, near, far) + 16 * (distance > 0)
    return {"bucket": bucket.int(), "bias": _normal(torch, sizes.heads, 32)}


def _images(torch: Any, sizes: Sizes) -> Mapping[str, Any]:
    """Runs of text (0) and images (their numbers) in turn."""
    runs = _runs(torch, sizes, 40)
    return {"image": torch.where(runs % 2 == 1, runs, 0)}


def _tree(torch: Any, sizes: Sizes) -> Mapping[str, Any]:
    """Of a random tree of tokens, when a walk through it enters and leaves each."""
    count = max(sizes.seqlen_q, sizes.seqlen_k)
    generator = torch.Generator().manual_seed(9)
    parents = [int(torch.randint(max(0, i - 3), i, (), generator=generator)) if i else -1 for i in range(count)]
    weight = [1] * count
    for child in range(count - 1, 0, -1):
        weight[parents[child]] += weight[child]
    enter, used = [0] * count, [1] * count
    for child in range(1, count):
        enter[child] = enter[parents[child]] + used[parents[child]]
        used[parents[child]] += weight[child]
    leave = [first + size for first, size in zip(enter, weight, strict=True)]
    return {"enter": torch.tensor(enter).int(), "leave": torch.tensor(leave).int()}


def _lengths(torch: Any, sizes: Sizes) -> Any:
    generator = torch.Generator().manual_seed(10)
    return torch.randint(sizes.seqlen_k + 1, (sizes.batch,), generator=generator).int()


EXAMPLES: dict[str, Example] = {
    "softcap": Example(score="cap * tanh(s / cap)", inputs=lambda _, __: {"cap": 5.0}),
    "alibi": Example(score="s - slope[h] * abs(i + seqlen_k - seqlen_q - j)", inputs=_slopes),
    "t5": Example(score="s + bias[h, bucket[j - i + seqlen_q - 1]]", inputs=_buckets),
    "distance": Example(score="s + r[abs(i - j)]", inputs=lambda torch, _: {"r": _normal(torch, 64)}),
    "prefix": Example(allow="j <= i or j < prefix[b]", inputs=lambda torch, sizes: {"prefix": _lengths(torch, sizes)}),
    "window_with_sinks": Example(
        allow="j <= i and (i - j < window or j < sinks)", inputs=lambda _, __: {"window": 40, "sinks": 4}
    ),
    "documents": Example(
        allow="j <= i and document[b, i] == document[b, j]",
        inputs=lambda torch, sizes: {"document": _runs(torch, sizes, 50)},
    ),
    "images": Example(allow="j <= i or (image[b, i] == image[b, j] and image[b, i] > 0)", inputs=_images),
    "tree": Example(allow="enter[j] <= enter[i] and enter[i] < leave[j]", inputs=_tree),
    "padding": Example(allow="j < length[b]", inputs=lambda torch, sizes: {"length": _lengths(torch, sizes)}),
}
"""By name."""
