"""Generates with a small Llama-shaped model of random weights from a paged cache of keys and values.

    python examples/generate.py                     prompts of several lengths, in chunks, then token by token
    python examples/generate.py --layers 16 --hidden 2048 --batch 64 --new-tokens 128         more of everything

On a GPU if there is one. What an engine does, in small: pages are handed out as sequences grow, chunks of prompts and
single tokens go through `fa2gen.serving` as vLLM calls it, keys are written by `reshape_and_cache`. Compares each token
with the one that a pass over the whole text gives, without a cache. Prints tokens a second; says "right".
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fa2gen import flash_attn_varlen_func, reshape_and_cache
from fa2gen.serving import vllm

PAGE_SIZE, HEAD_DIM, VOCABULARY = 16, 64, 512
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Of a layer's number and its q, k and v, (tokens, heads, head_dim), each: what attention gives."""


class Llama:
    """Root mean square norms, rotary embeddings, grouped queries, gated products; no bias anywhere."""

    def __init__(self, layers: int, hidden: int, device: str, dtype: torch.dtype) -> None:
        self.heads, self.heads_kv = hidden // HEAD_DIM, max(hidden // HEAD_DIM // 4, 1)
        sizes = {
            "qkv": ((self.heads + 2 * self.heads_kv) * HEAD_DIM, hidden),
            "out": (hidden, hidden),
            "gate_up": (4 * hidden, hidden),
            "down": (hidden, 2 * hidden),
        }
        generator = torch.Generator(device).manual_seed(0)

        def random(rows: int, columns: int) -> Tensor:
            weights = torch.randn(rows, columns, generator=generator, device=device)
            return (weights * columns**-0.5).to(dtype)

        self.layers = [{name: random(*size) for name, size in sizes.items()} for _ in range(layers)]
        self.embedding, self.head = 3 * random(VOCABULARY, hidden), random(VOCABULARY, hidden)

    def __call__(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Logits (tokens, vocabulary) of tokens at these positions of their sequences, both (tokens,)."""
        angles = positions[:, None] * 10_000.0 ** (-torch.arange(0, HEAD_DIM, 2, device=tokens.device) / HEAD_DIM)
        cos, sin = (x.repeat(1, 2).unsqueeze(1) for x in (angles.cos(), angles.sin()))
        x = self.embedding[tokens]
        for number, layer in enumerate(self.layers):
            qkv = F.linear(norm(x), layer["qkv"]).unflatten(-1, (-1, HEAD_DIM))
            q, k, v = qkv.split((self.heads, self.heads_kv, self.heads_kv), dim=1)
            x = x + F.linear(attend(number, turned(q, cos, sin), turned(k, cos, sin), v).flatten(1), layer["out"])
            gate, up = F.linear(norm(x), layer["gate_up"]).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, layer["down"])
        return F.linear(norm(x), self.head).float()


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:])


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    other = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return (x.float() * cos + other.float() * sin).to(x.dtype)


@dataclass
class Cache:
    """Keys and values of all layers in pages, and which pages each sequence has."""

    k: list[Tensor]
    v: list[Tensor]
    table: Tensor
    lengths: list[int]
    free: list[int]

    @classmethod
    def of(cls, model: Llama, batch: int, most: int, like: Tensor) -> Cache:
        pages = -(-most // PAGE_SIZE)
        size = (batch * pages, PAGE_SIZE, model.heads_kv, HEAD_DIM)
        k, v = (
            [like.new_full(size, float("nan")) for _ in model.layers] for _ in range(2)
        )  # nothing reads what is not written
        order = torch.randperm(batch * pages, generator=torch.Generator().manual_seed(0)).tolist()
        return cls(k, v, torch.zeros(batch, pages, dtype=torch.int32, device=like.device), [0] * batch, order)

    def slots_for(self, counts: list[int]) -> list[int]:
        """Places of so many further tokens of each sequence, one behind the other, in pages that it has or gets."""
        slots = []
        for b, count in enumerate(counts):
            for row in range(self.lengths[b], self.lengths[b] + count):
                if row % PAGE_SIZE == 0:
                    self.table[b, row // PAGE_SIZE] = self.free.pop()
                slots.append((b, row))
            self.lengths[b] += count
        pages = self.table.tolist()
        return [pages[b][row // PAGE_SIZE] * PAGE_SIZE + row % PAGE_SIZE for b, row in slots]


def step(model: Llama, cache: Cache, chunks: list[list[int]]) -> Tensor:
    """Logits of the last token of each sequence, which goes on by a chunk: of its prompt, or one token."""
    device = cache.table.device
    counts = [len(chunk) for chunk in chunks]
    positions = [cache.lengths[b] + i for b, count in enumerate(counts) for i in range(count)]
    slots = torch.tensor(cache.slots_for(counts), dtype=torch.int32, device=device)
    bounds = torch.tensor([0, *counts], device=device).cumsum(0).int()
    said = {
        "cu_seqlens_q": bounds,
        "max_seqlen_q": max(counts),
        "seqused_k": torch.tensor(cache.lengths, dtype=torch.int32, device=device),
        "max_seqlen_k": max(cache.lengths),
        "block_table": cache.table,
        "causal": True,
    }

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = cache.k[layer], cache.v[layer]
        reshape_and_cache(k.contiguous(), v.contiguous(), keys, values, slots)
        return vllm.flash_attn_varlen_func(q.contiguous(), keys, values, out=torch.empty_like(q.contiguous()), **said)

    tokens = torch.tensor([token for chunk in chunks for token in chunk], device=device)
    logits = model(tokens, torch.tensor(positions, device=device), attend)
    return logits[(bounds[1:] - 1).long()]


def recomputed(model: Llama, texts: list[list[int]], device: str) -> list[Tensor]:
    """Logits of every token of whole texts, in one pass without a cache."""
    counts = [len(text) for text in texts]
    bounds = torch.tensor([0, *counts], device=device).cumsum(0).int()
    positions = torch.cat([torch.arange(count, device=device) for count in counts])

    def attend(_: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_varlen_func(q, k, v, bounds, bounds, causal=True)

    return list(model(torch.tensor([*itertools.chain(*texts)], device=device), positions, attend).split(counts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 2), ("hidden", 256), ("batch", 3), ("new-tokens", 12), ("chunk", 24)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    if least := next((name for name, number in vars(given).items() if number < 1), None):
        parser.error(f"--{least.replace('_', '-')} must be at least 1")
    if given.hidden % HEAD_DIM:
        parser.error(f"--hidden must be a multiple of {HEAD_DIM}, a head")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Llama(given.layers, given.hidden, device, torch.bfloat16)
    random = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 60, (given.batch,), generator=random).tolist()
    prompts = [torch.randint(0, VOCABULARY, (n,), generator=random).tolist() for n in lengths]
    cache = Cache.of(model, given.batch, max(lengths) + given.new_tokens, model.embedding)

    # Prompts in chunks; who has none left waits, with no query in the batch.
    logits = torch.zeros(given.batch, VOCABULARY, device=device)
    for first in range(0, max(lengths), given.chunk):
        chunks = [prompt[first : first + given.chunk] for prompt in prompts]
        here = torch.tensor([bool(chunk) for chunk in chunks], device=device)
        logits = torch.where(here[:, None], step(model, cache, chunks), logits)
    texts = [prompt.copy() for prompt in prompts]
    seen = [logits]
    started = 0.0
    for number in range(given.new_tokens):
        if number == 2:  # kernels are there
            torch.cuda.synchronize() if device == "cuda" else None
            started = time.perf_counter()
        chosen = seen[-1].argmax(-1).tolist()
        for text, token in zip(texts, chosen, strict=True):
            text.append(token)
        seen.append(step(model, cache, [[token] for token in chosen]))
    torch.cuda.synchronize() if device == "cuda" else None
    seconds = time.perf_counter() - started

    # Token for token what a pass over the whole texts gives, unless its own best two are as close as rounding.
    behind, equal = 0.0, 0
    for b, whole in enumerate(recomputed(model, texts, device)):
        best = whole[lengths[b] - 1 : -1]
        tokens = torch.tensor(texts[b][lengths[b] :], device=device)
        equal += int((best.argmax(-1) == tokens).sum())
        gap = best.amax(-1) - best.gather(-1, tokens[:, None])[:, 0]
        behind = max(behind, (gap / best.std()).max().item())
    count = given.batch * given.new_tokens
    print([text[-given.new_tokens :] for text in texts[:3]])
    print(f"{(given.new_tokens - 2) * given.batch / seconds:,.0f} tokens/s on {device}")
    print(f"{equal} of {count} tokens as recomputed; others at most {behind:.3f} deviations behind the best")
    print("right" if equal >= 0.97 * count and behind < 0.1 else "WRONG")


if __name__ == "__main__":
    main()
