"""What preset flex measures: scores and masks of expressions, with inputs as models have them, and the functions that
FlexAttention takes for them. Nothing is imported of torch before it is asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from random import Random
from typing import Any

__all__ = ["WORKLOADS", "Workload", "documents_of"]

_CAP = 50.0  # Gemma 2's
_DOCUMENTS = 8  # of a batch entry
_TEXT, _IMAGES = (50, 300), (144, 256, 576)  # tokens from one image to the next, and of an image


def _causal(b: Any, h: Any, i: Any, j: Any) -> Any:
    return j <= i


def _all_causal(_: int, seqlen: int) -> float:
    return seqlen**2 / 2


@dataclass(frozen=True)
class Workload:
    """Texts that name one input, and what it is in calls.

    causal   whether the mask is causal beside what the expression hides.
    cap      the input, where it is a number.
    numbers  (batch, seqlen, heads) -> it, where it is a tensor, in lists.
    seen     (batch entry, seqlen) -> how many scores of a head are seen.
    modify   (input) -> FlexAttention's score_mod; None: scores are as they are.
    visible  (input) -> its mask_mod.
    """

    score: str = ""
    allow: str = ""
    causal: bool = True
    cap: float = 0.0
    numbers: Callable[[int, int, int], list[Any]] | None = None
    seen: Callable[[int, int], float] = _all_causal
    modify: Callable[[Any], Callable[..., Any]] | None = None
    visible: Callable[[Any], Callable[..., Any]] = lambda _: _causal

    def input(self, batch: int, seqlen: int, heads: int, device: Any) -> Any:
        """The number, or the tensor: fp32, or int32 of whole numbers."""
        if self.numbers is None:
            return self.cap
        torch = import_module("torch")
        made = torch.tensor(self.numbers(batch, seqlen, heads), device=device)
        return made if made.is_floating_point() else made.int()


def documents_of(entry: int, seqlen: int) -> list[int]:
    """Lengths of a batch entry's documents, cut at random places; the same each time."""
    cuts = sorted(Random(entry).sample(range(1, seqlen), min(_DOCUMENTS, seqlen) - 1))
    return [end - begin for begin, end in itertools.pairwise((0, *cuts, seqlen))]


def _images_of(entry: int, seqlen: int) -> list[int]:
    """Lengths of text and of images in turn, text first; the same each time."""
    random = Random(entry)
    lengths: list[int] = []
    while (left := seqlen - sum(lengths)) > 0:
        length = random.choice(_IMAGES) if len(lengths) % 2 else random.randint(*_TEXT)
        lengths.append(min(length, left))
    return lengths


def _repeated(numbers: Sequence[int], times: Sequence[int]) -> list[int]:
    return [number for number, count in zip(numbers, times, strict=True) for _ in range(count)]


def _documents(batch: int, seqlen: int, _: int) -> list[Any]:
    """(batch, seqlen): the document of each token."""
    entries = (documents_of(entry, seqlen) for entry in range(batch))
    return [_repeated(range(len(lengths)), lengths) for lengths in entries]


def _images(batch: int, seqlen: int, _: int) -> list[Any]:
    """(batch, seqlen): the image of each token; 0: none."""
    entries = (_images_of(entry, seqlen) for entry in range(batch))
    return [_repeated([n if n % 2 else 0 for n in range(len(lengths))], lengths) for lengths in entries]


def _slopes(_: int, __: int, heads: int) -> list[Any]:
    """ALiBi's, of so many heads."""
    return [2.0 ** (-8.0 * head / heads) for head in range(1, heads + 1)]


def _of_documents(entry: int, seqlen: int) -> float:
    return sum(length**2 for length in documents_of(entry, seqlen)) / 2


def _of_images(entry: int, seqlen: int) -> float:
    return (seqlen**2 + sum(length**2 for length in _images_of(entry, seqlen)[1::2])) / 2


def _capped(cap: float) -> Callable[..., Any]:
    tanh = import_module("torch").tanh
    return lambda s, b, h, i, j: cap * tanh(s / cap)


WORKLOADS: Mapping[str, Workload] = {
    "softcap": Workload(score="cap * tanh(s / cap)", cap=_CAP, modify=_capped),
    "alibi": Workload(
        score="s - slope[h] * abs(i + seqlen_k - seqlen_q - j)",
        numbers=_slopes,
        modify=lambda slope: lambda s, b, h, i, j: s - slope[h] * (i - j).abs(),
    ),
    "documents": Workload(
        allow="document[b, i] == document[b, j]",
        numbers=_documents,
        seen=_of_documents,
        visible=lambda document: lambda b, h, i, j: (j <= i) & (document[b, i] == document[b, j]),
    ),
    "images": Workload(
        allow="j <= i or (image[b, i] == image[b, j] and image[b, i] > 0)",
        causal=False,
        numbers=_images,
        seen=_of_images,
        visible=lambda image: lambda b, h, i, j: (j <= i) | ((image[b, i] == image[b, j]) & (image[b, i] > 0)),
    ),
}
"""By name."""
