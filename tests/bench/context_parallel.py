"""Context parallel beside one GPU: torchrun --nproc-per-node W tests/bench/context_parallel.py [--rows 131072 32768]

For each length and scheme: how many times as fast as one GPU with the whole sequence, causal, 32 heads of 128 over 8 of
keys, bf16, forward and backward; the contestants take turns, of about as long each. First, of each scheme, of 4096 rows
mean errors against fp32 over those of one GPU, of as many as are timed mean differences from one GPU over mean
magnitudes; the greatest difference, and whether a second run gives the same bits.

With --parts also, of the first process: milliseconds of its kernels by what they do, as torch's profiler has them, and
in how many of those it computes.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from fa2gen import attention
from fa2gen.distributed import context_parallel_attention, shard, unshard

HEADS, HEADS_KV, HEAD_DIM = 32, 8, 128
MOST_IN_FP32 = 4096  # rows, whose scores of a group of heads take 256 MiB
MODES = [(scheme, layout) for layout in ("zigzag", "contiguous") for scheme in ("ring", "allgather", "ulysses")]
CAUSAL_MODES = [mode for mode in MODES if mode[1] == "zigzag" or mode[0] == "ulysses"]


def leaves(rows: int) -> list[Any]:
    """q, k, v and dout (1, rows, heads, head_dim), the same in every process."""
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = (HEADS, HEADS_KV, HEADS_KV, HEADS)
    tensors = [torch.randn(1, rows, n, HEAD_DIM, device="cuda", generator=generator) for n in sizes]
    return [x.to(torch.bfloat16) for x in tensors]


def run(attend: Callable[..., Any], tensors: list[Any]) -> tuple[Any, ...]:
    """(out, dq, dk, dv)."""
    *qkv, dout = tensors
    inputs = [x.detach().requires_grad_() for x in qkv]
    out, _ = attend(*inputs)
    return out.detach(), *torch.autograd.grad(out, inputs, dout)


def in_fp32(tensors: list[Any]) -> tuple[Any, ...]:
    """(out, dq, dk, dv) by torch's matrix products, of a group of heads at a time."""

    def attend(q: Any, k: Any, v: Any) -> tuple[Any, None]:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
        scores = (q @ k.transpose(2, 3) * HEAD_DIM**-0.5).masked_fill(hidden, float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2), None

    parts = []
    for at in range(HEADS_KV):
        shares = [x.shape[2] // HEADS_KV for x in tensors]
        of_group = [x[:, :, at * n : (at + 1) * n].float() for x, n in zip(tensors, shares, strict=True)]
        parts.append(run(attend, of_group))
    return tuple(torch.cat(x, dim=2) for x in zip(*parts, strict=True))


def compare(rows: int) -> None:
    whole, in_full = leaves(rows), rows <= MOST_IN_FP32
    one_gpu = run(partial(attention, causal=True), whole)
    exact = in_fp32(whole) if in_full else one_gpu
    if dist.get_rank() == 0:
        what = "error against fp32 over one GPU's" if in_full else "difference from one GPU over magnitude"
        print(f"{rows} rows: mean {what}, and the greatest difference from one GPU")
    for scheme, layout in MODES if in_full else CAUSAL_MODES:
        spread = partial(context_parallel_attention, causal=True, scheme=scheme, layout=layout, deterministic=True)
        here = [shard(x, layout=layout) for x in whole]
        found, again = run(spread, here), run(spread, here)
        says = []
        for name, x, one, right in zip(("out", "dq", "dk", "dv"), found, one_gpu, exact, strict=True):
            spread_out = unshard(x, layout=layout).float()
            error, beside = spread_out - right, one.float() - (right if in_full else 0.0)
            share = (error.abs().mean() / beside.abs().mean()).item()
            says.append(f"{name} {share:.2{'f' if in_full else 'e'}} {(spread_out - one.float()).abs().max():.1e}")
        same = all(torch.equal(x, y) for x, y in zip(found, again, strict=True))
        if dist.get_rank() == 0:
            print(f"{scheme:10} {layout:10} {'; '.join(says)}; {'same bits' if same else 'OTHER BITS'}")


def timed(call: Callable[[], Any], calls: int) -> float:
    """Milliseconds of the slowest process a call, of so many in a row."""
    dist.barrier()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize()
    took = torch.tensor(start.elapsed_time(end) / calls, device="cuda")
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return took.item()


def measure(rows: int, rounds: int, strides: list[int | None], parts: bool) -> None:
    whole, world = leaves(rows), dist.get_world_size()
    contestants: dict[str, tuple[Callable[..., Any], list[Any]]] = {"one GPU": (partial(attention, causal=True), whole)}
    some = [x[:, :, : x.shape[2] // world] for x in whole]  # what a process computes, without the others
    contestants["its part of the heads alone"] = partial(attention, causal=True), some
    for scheme, layout in CAUSAL_MODES:
        here = [shard(x, layout=layout) for x in whole]
        for stride in [None] if scheme == "ring" else strides:
            spread = partial(context_parallel_attention, causal=True, scheme=scheme, layout=layout, head_stride=stride)
            contestants[f"{scheme} {layout}{f' {stride} heads' if stride else ''}"] = spread, here
    times: dict[tuple[str, str], list[float]] = {}
    for at in range(rounds + 1):  # the first warms up; each begins with another, as a GPU is slower once it is hot
        first = at % len(contestants)
        for name, (attend, tensors) in [*contestants.items()][first:] + [*contestants.items()][:first]:
            calls = 1 if name == "one GPU" else world  # about as long: a GPU's clock follows what it did just before
            with torch.no_grad():
                forward = timed(lambda a=attend, t=tensors: a(*t[:3]), calls)
            both = timed(lambda a=attend, t=tensors: run(a, t), calls)
            if at:
                times.setdefault((name, "forward"), []).append(forward)
                times.setdefault((name, "forward and backward"), []).append(both)
    if parts:
        for name, (attend, tensors) in contestants.items():
            show_parts(name, lambda a=attend, t=tensors: run(a, t))
    if dist.get_rank():
        return
    for what in ("forward", "forward and backward"):
        base = statistics.median(times["one GPU", what])
        print(f"{rows} rows, {what}: one GPU {base:.2f} ms")
        for name in list(contestants)[1:]:
            took = statistics.median(times[name, what])
            share = base / took / world
            print(f"  {name:26} {took:8.2f} ms  {base / took:.3f} times as fast, {share:.3f} of linear")


KINDS = {"fa2_fwd": "forward", "fa2_bwd": "gradients", "fa2_": "around them", "nccl": "exchanges"}


def show_parts(name: str, call: Callable[[], Any]) -> None:
    """Print milliseconds of a call's kernels by what they do."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    took: dict[str, float] = {}
    spans = []
    for event in profiled.events():
        if "CUDA" not in str(event.device_type):
            continue
        kind = next((kind for word, kind in KINDS.items() if word in event.name), "copies and sums")
        took[kind] = took.get(kind, 0.0) + event.time_range.elapsed_us() / 1000
        if kind != "exchanges":
            spans.append((event.time_range.start, event.time_range.end))
    busy = end = 0.0
    for first, last in sorted(spans):
        busy += max(0.0, last - max(first, end))
        end = max(end, last)
    if dist.get_rank() == 0:
        says = ", ".join(f"{kind} {ms:.1f}" for kind, ms in sorted(took.items()))
        print(f"  {name:26} {says}; computes in {busy / 1000:.1f} of {(end - min(spans)[0]) / 1000:.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[131072, 32768])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--head-strides", type=int, nargs="+", help="instead of what each scheme takes by itself")
    parser.add_argument("--no-compare", action="store_true")
    parser.add_argument("--parts", action="store_true")
    given = parser.parse_args()
    dist.init_process_group("nccl")
    torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    for rows in () if given.no_compare else (MOST_IN_FP32, *given.rows):
        compare(rows)
    for rows in given.rows:
        measure(rows, given.rounds, given.head_strides or [None], given.parts)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
