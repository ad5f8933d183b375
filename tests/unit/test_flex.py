"""FlexAttention's functions as expressions: the same numbers as the functions themselves, or a refusal by name."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from fa2gen import attention
from fa2gen.errors import InvalidInput, UnsupportedProblem
from fa2gen.expression import evaluate, parse
from fa2gen.flex import from_flex

HEADS, LENGTH = 4, 40
DOCUMENT = torch.arange(LENGTH).div(9, rounding_mode="floor").int()
SLOPE = torch.rand(HEADS, generator=torch.Generator().manual_seed(0))
RELATIVE = torch.randn(HEADS, 2 * LENGTH - 1, generator=torch.Generator().manual_seed(1))
CAP = torch.tensor(7.0)
OFFSETS = torch.tensor([3, 8])
NARROW = torch.arange(LENGTH).to(torch.int8)
VALID = DOCUMENT[None] != torch.tensor([[1], [2]])


def softcap(score, b, h, q_idx, kv_idx):
    return 20 * torch.tanh(score / 20)


def captured_cap(score, b, h, q_idx, kv_idx):
    return CAP * torch.tanh(score / CAP)


def alibi(score, b, h, q_idx, kv_idx):
    return score - SLOPE[h] * (q_idx - kv_idx).abs()


def alibi_by_exponent(score, b, h, q_idx, kv_idx):
    return score + torch.exp2(-((h + 1) * 8.0 / HEADS)) * (kv_idx - q_idx)


def relative(score, b, h, q_idx, kv_idx):
    return score + RELATIVE[h, q_idx - kv_idx + LENGTH - 1]


def relative_from_the_end(score, b, h, q_idx, kv_idx):
    return score + RELATIVE[h, q_idx - kv_idx]


def causal_score(score, b, h, q_idx, kv_idx):
    return torch.where(q_idx >= kv_idx, score, -float("inf"))


def causal_and_capped(score, b, h, q_idx, kv_idx):
    capped = torch.where(q_idx < kv_idx, float("-inf"), 5 * torch.tanh(score / 5))
    return torch.where(kv_idx < LENGTH - b, capped, -torch.inf)


def many(score, b, h, q_idx, kv_idx):
    x = torch.where((q_idx // 16 == kv_idx // 16) | ~VALID[b, kv_idx], torch.nn.functional.relu(score), score**2 / 3)
    x = x + torch.log1p(score.abs()) + (q_idx % 3).float() + torch.clamp(score, -1.0, 2.0) + score.square() * 0.5**h
    x = x * (q_idx > kv_idx) - (h > 1) / 4 + torch.maximum(h == 1, score)
    x = x + torch.where(b == 0, ~VALID[b, kv_idx], score) + ((h > 0) * (q_idx < 9) + (kv_idx == 5)) * 2
    return x.sigmoid() - torch.maximum(score, -score).sqrt() + torch.rsub(score, 1, alpha=2) + (q_idx < 3).float()


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


def window(b, h, q_idx, kv_idx):
    return (q_idx >= kv_idx) & (q_idx - kv_idx <= 12)


def documents(b, h, q_idx, kv_idx):
    return torch.logical_and(DOCUMENT[q_idx] == DOCUMENT[kv_idx], causal(b, h, q_idx, kv_idx))


def offset(b, h, q_idx, kv_idx):
    return q_idx + OFFSETS[b] >= kv_idx


def neighbours(b, h, q_idx, kv_idx):
    qx, qy, kx, ky = q_idx // 8, q_idx % 8, kv_idx // 8, kv_idx % 8
    return ((qx.clamp(1, 3) - kx).abs() <= 1) & ((qy.clamp(min=1, max=6) - ky).abs() <= 1)


def of_both(b, h, q_idx, kv_idx):
    return VALID[b, kv_idx] ^ (h % 2 == 0) | torch.logical_not(q_idx != kv_idx)


def floats_of_whole_numbers(score, b, h, q_idx, kv_idx):
    """Beyond 32 bits and what a float holds exactly, were they whole numbers."""
    far = (q_idx + 5000 * DOCUMENT[kv_idx]).float() ** 3
    return score + 1e-13 * far - (q_idx.float() // 3 + kv_idx.float() % 5) * 1e8 / 1e9 + NARROW[kv_idx].int() * 100


class Held:
    """A score of a method, whose tensors its object holds."""

    def __init__(self):
        self.slope = SLOPE

    def score(self, score, b, h, q_idx, kv_idx):
        return score * self.slope[h]


SCORES = [softcap, captured_cap, alibi, alibi_by_exponent, relative, relative_from_the_end, causal_score]
SCORES += [causal_and_capped, many, floats_of_whole_numbers, Held().score]
MASKS = [causal, window, documents, offset, neighbours, of_both]


def grid() -> list[torch.Tensor]:
    """b, h, i, j over a call."""
    sizes = (2, HEADS, LENGTH, LENGTH)
    return [torch.arange(size).view([-1 if axis == a else 1 for a in range(4)]) for axis, size in enumerate(sizes)]


@pytest.mark.parametrize("score_mod", SCORES)
def test_scores_are_those_of_the_function(score_mod):
    made = from_flex(score_mod)
    s = 3 * torch.randn(2, HEADS, LENGTH, LENGTH, generator=torch.Generator().manual_seed(2))
    program = parse(made.score, made.allow, {name: kind_of(x) for name, x in made.inputs.items()})
    values = dict(zip("bhij", grid(), strict=True)) | {"s": s} | made.inputs
    found = evaluate(program, "score", torch, values)
    found = torch.where(evaluate(program, "allow", torch, values), found, -math.inf)
    assert torch.allclose(found, score_mod(s, *grid()), rtol=1e-5, atol=1e-5), made.score


@pytest.mark.parametrize("mask_mod", MASKS)
def test_masks_are_those_of_the_function(mask_mod):
    made = from_flex(mask_mod=mask_mod)
    program = parse(allow=made.allow, types={name: kind_of(x) for name, x in made.inputs.items()})
    found = evaluate(program, "allow", torch, dict(zip("bhij", grid(), strict=True)) | made.inputs)
    assert torch.equal(*torch.broadcast_tensors(found, mask_mod(*grid()))), made.allow


def kind_of(x: torch.Tensor) -> str:
    return "bool" if x.dtype == torch.bool else "float" if x.is_floating_point() else "int"


def test_attention_is_that_of_flex_attention():
    """What somebody types who comes from there, but for the order of heads and rows."""
    q, k, v = torch.randn(3, 2, LENGTH, HEADS, 16, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    found, _ = attention(q, k, v, **from_flex(causal_and_capped, window)._asdict())
    q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))
    scores = causal_and_capped(q @ k.mT * 16**-0.5, *grid()).masked_fill(~window(*grid()), -math.inf)
    truth = torch.nan_to_num(scores.softmax(-1)) @ v
    assert torch.allclose(found.float(), truth.transpose(1, 2), atol=2e-2)


def test_texts_read_as_somebody_would_write_them():
    made = from_flex(alibi, documents)
    assert made.score == "s - SLOPE[h] * abs(i - j)"
    assert made.allow == "DOCUMENT[i] == DOCUMENT[j] and j <= i"
    assert made.inputs["SLOPE"] is SLOPE and made.inputs["DOCUMENT"] is DOCUMENT, "gradients reach the user's tensor"


def test_conditions_beside_switches():
    for mask_mod, allow in (
        (lambda b, h, q, k: (q >= k) == True, "(j <= i) == True"),  # noqa: E712
        (lambda b, h, q, k: (q >= k) & True, "j <= i and True"),
        (lambda b, h, q, k: (q > 3) <= (k > 3), "where(3 < i, 1, 0) <= where(3 < j, 1, 0)"),
    ):
        assert from_flex(mask_mod=mask_mod).allow == allow


def test_tensors_have_the_names_that_functions_have_for_them():
    assert from_flex(captured_cap).score == "CAP[0] * tanh(s / CAP[0])"
    assert from_flex(Held().score).score == "s * slope[h]"
    assert list(from_flex(functools.partial(lambda s, b, h, i, j, w: s + w[h], w=SLOPE)).inputs) == ["w"]


def test_views_of_one_memory_are_told_apart():
    table = torch.arange(81.0).reshape(9, 9)
    row, column = table[0], table[:, 0]
    found = from_flex(lambda s, b, h, i, j: s + row[i] - column[j])
    assert (found.score, [*found.inputs]) == ("s + row[i] - column[j]", ["row", "column"])


def test_a_tensor_that_the_text_lost_is_no_input():
    bias = torch.randn(9)
    assert from_flex(lambda s, b, h, i, j: s + 0 * bias[j]).inputs == {}


def test_tensors_of_one_name_are_told_apart():
    def bias_of(table):
        return lambda score, b, h, q_idx, kv_idx: score + table[kv_idx]

    def twice(score, b, h, q_idx, kv_idx):
        return one(two(score, b, h, q_idx, kv_idx), b, h, q_idx, kv_idx)

    one, two = bias_of(torch.zeros(LENGTH)), bias_of(torch.ones(LENGTH))
    made = from_flex(twice)
    assert len(made.inputs) == 2 and {float(x.sum()) for x in made.inputs.values()} == {0.0, LENGTH}


def branches(b, h, q_idx, kv_idx):
    return kv_idx > 2 if q_idx > 3 else q_idx > kv_idx


REFUSED = {
    branches: "branches decides by a value",
    lambda b, h, q, k: (q - k).sin() > 0: "uses sin, for which the language has no word",
    lambda b, h, q, k: DOCUMENT > 0: "gives something else than one element",
    lambda b, h, q, k: DOCUMENT.sum() > q: "uses a tensor (40,) without indices",
    lambda b, h, q, k: VALID[b].any(): "takes more than one number of a tensor (2, 40)",
    lambda b, h, q, k: (q & k) == 0: "uses bitwise_and of whole numbers",
    lambda b, h, q, k: (q * 0.3).int() > k: "makes a whole number of a float",
    lambda b, h, q, k: torch.div(q, 3, rounding_mode="trunc") > k: "rounds a quotient towards zero",
    lambda b, h, q, k: NARROW[q] - NARROW[k] < 2: "computes in torch.int8, which wraps",
    lambda b, h, q, k: VALID[0, k]: "indexes something that it computed, by select",
    lambda b, h, q, k: (q - k) ** 0 > 0: "is not in the language: allow, column",
}


@pytest.mark.parametrize("mask_mod", REFUSED, ids=REFUSED.values())
def test_what_has_no_word_is_refused_by_name(mask_mod):
    with pytest.raises(UnsupportedProblem) as caught:
        from_flex(mask_mod=mask_mod)
    assert REFUSED[mask_mod] in str(caught.value)


def test_scores_that_are_infinite_inside_are_refused():
    def inner(score, b, h, q_idx, kv_idx):
        return torch.where(q_idx >= kv_idx, score, -float("inf")) + 1

    with pytest.raises(UnsupportedProblem, match="-inf elsewhere than at its end; hide keys by mask_mod"):
        from_flex(inner)


def test_other_arguments_are_refused():
    with pytest.raises(InvalidInput, match="has 3 arguments; it is called with b, h, i, j"):
        from_flex(mask_mod=lambda b, h, q: q > 0)
    with pytest.raises(InvalidInput, match="are functions, not str"):
        from_flex("s")
    assert from_flex() == ("", "", {})
