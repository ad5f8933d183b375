"""What a render says of its launch, and what its C++ launcher computes, is what `fa2gen.launch` does."""

from __future__ import annotations

import math
import random
import re
from typing import Any

import pytest

from fa2gen.features import examples_of
from fa2gen.groups import with_parts
from fa2gen.launch import launch_of
from fa2gen.options import AnyShape, CacheShape, Options, Shape
from fa2gen.plan import KernelPlan, make_plan, recipe
from fa2gen.render import render
from fa2gen.select import default_tiling
from fa2gen.spec import KernelSpec, Problem

PROBLEMS = [
    Problem(head_dim=64),
    Problem(head_dim=80, mask="causal"),
    Problem(head_dim=256, mask="causal", dtype="fp16"),
    Problem(direction="bwd", head_dim=64),
    Problem(direction="bwd", head_dim=128, mask="causal"),
    Problem(direction="bwd", head_dim=256, deterministic=True),
    Problem(head_dim=64, mask="window"),
    Problem(direction="bwd", head_dim=128, mask="window", deterministic=True),
    Problem(head_dim=192, head_dim_v=128, mask="causal"),
    Problem(direction="bwd", head_dim=192, head_dim_v=128, mask="causal"),
    Problem(direction="bwd", head_dim=64, sink=True),
    Problem(head_dim=128, mask="window", varlen=True, paged=True),
    Problem(direction="decode", head_dim=128, mask="window", paged=True),
    Problem(direction="decode", head_dim=72, mask="causal"),
    Problem(direction="bwd", head_dim=64, allow="kind[i, b] == kind[j, b] and kind[i, b] > 0"),
]
PLANS = [
    make_plan(KernelSpec(problem=problem, tiling=default_tiling(problem, arch)))
    for problem in PROBLEMS
    for arch in ("sm80", "sm90")
]
PLANS += [with_parts(plan, 2) for plan in PLANS if plan.problem.direction == "bwd" and plan.can_split_groups]
each_plan = pytest.mark.parametrize("plan", PLANS, ids=[plan.name for plan in PLANS])
NUM_SMS = 132


def computed(formulas: dict[str, str], known: dict[str, Any]) -> dict[str, Any]:
    """Their values, one after the other: C++'s `/` of whole numbers that are not negative is Python's `//`."""
    known = dict(known)
    for name, formula in formulas.items():
        known[name] = eval(
            formula.replace("/", "//"), {"min": min, "max": max, "gcd": math.gcd, "limited": limited}, known
        )
    return known


def limited(value: int, limit: int) -> int:
    """As the launcher and the comment in renders say."""
    return limit if value < 0 else min(value, limit)


def sized(plan: KernelPlan, options: Options) -> Options:
    """With a tensor of 700 positions of 3 batch entries, where the expression names one."""
    if not plan.tile_tables:
        return options
    return options._replace(expression=options.expression._replace(shapes=((700, 3),)))


def has_cache(plan: KernelPlan) -> bool:
    return plan.problem.direction == "decode" or plan.paged


def caches() -> list[CacheShape]:
    """Calls over caches, with and without new keys, rotary embeddings and fixed parts."""
    draw = random.Random(8)
    found = []
    for shape in shapes():
        page = draw.choice((1, 16, 48))
        new, splits, rotary = draw.choice((0, 1, 5)), draw.choice((-1, -1, 0, 3, 9)), draw.choice((0, 16, 64))
        pages = -(-shape.seqlen_k // page)
        seqlen_q = min(shape.seqlen_q, 64)
        sizes = shape._replace(seqlen_q=seqlen_q, seqlen_k=pages * page)
        place = (new, 3 * pages, page, shape.batch, pages + 1)
        found.append(CacheShape(*sizes, *place, splits, rotary, pages * page, True, True))
    return found


def shapes() -> list[Shape]:
    draw = random.Random(7)
    found = [Shape(1, 1, 1, 1, 1), Shape(2, 300, 200, 4, 2), Shape(64, 131072, 131072, 64, 8)]
    for _ in range(200):
        heads_kv = draw.choice((1, 2, 3, 8))
        lengths = (int(2 ** draw.uniform(0, 18)) for _ in range(2))
        found.append(Shape(draw.randint(1, 20), *lengths, heads_kv * draw.randint(1, 8), heads_kv))
    return found


@each_plan
def test_formulas_are_what_launches_compute(plan: KernelPlan):
    options = sized(plan, examples_of(plan.problem)[0])._replace(softmax_scale=0.1)
    given = dict(zip(recipe.options(plan), (699, 2), strict=False)) if plan.tile_tables else {}
    fitting = 0
    calls: list[AnyShape] = [*(caches() if has_cache(plan) else shapes())]
    for shape in calls:
        shape = shape._replace(num_heads=shape.num_heads * plan.tiling.group_parts)
        known = computed(recipe.sizes(plan), shape._asdict() | {"softmax_scale": 0.1, "num_sms": NUM_SMS} | given)
        most = max(computed({"count": text}, known)["count"] for text in recipe.limits(plan))
        try:
            launch = launch_of(plan, shape, options, NUM_SMS)
        except OverflowError:
            assert most >= 2**31
            continue
        fitting += most < 2**31
        values = {param.name: launch.values[param.name] for param in plan.params if param.name in known}
        assert {name: known[name] for name in values} == values and values.keys() >= set(plan.sizes)
        grids = tuple(
            tuple(computed({"n": text}, known)["n"] for text in recipe.grid(plan, entry)) for entry in plan.entry_points
        )
        assert grids == launch.grids
        assert {n: computed({"n": text}, known)["n"] for n, text in recipe.memory(plan).items()} == launch.scratch
    assert fitting > 100


@each_plan
def test_what_features_add_to_params(plan: KernelPlan):
    """Of every example, over lengths on both sides of every limit; no option is left out of the launcher's call."""
    added = {param.name for feature in plan.features for param in feature.params}
    assert recipe.of_features(plan).keys() == added - recipe.sizes(plan).keys()
    for example in examples_of(plan.problem):
        right = 0 if example.causal else example.window_right
        for sizes in (Shape(1, q, k, 4, 1) for q in (1, 40, 5000) for k in (1, 47, 48, 129, 5000)):
            shape = CacheShape(*sizes, 0, 9, 1, 1, 5000) if has_cache(plan) else sizes
            values = launch_of(plan, shape, sized(plan, example), NUM_SMS).values
            known = shape._asdict() | example._asdict() | {"window_right": right}
            known |= {"input_0_last_0": 699, "input_0_last_1": 2}
            for name, formula in recipe.of_features(plan).items():
                assert computed({"found": formula}, known)["found"] == values[name], (name, shape, example)


@each_plan
def test_a_render_says_how_it_is_launched(plan: KernelPlan):
    source = render(plan).source
    said = source[source.index("\n// Launch ---") :]
    for entry in plan.entry_points:
        assert (
            f"//   {entry.symbol}\n//     grid ({', '.join(recipe.grid(plan, entry))}), {entry.num_threads} threads"
            in said
        )
        assert f"{entry.shared_memory_bytes} bytes of dynamic" in said
        if entry.tensor_maps:
            assert f"maps of {', '.join(m.argument[4:] for m in entry.tensor_maps)}\n" in said
        for found in entry.tensor_maps:
            rows = "box_rows" if found.of_pages else found.box_rows
            boxes = rf"\b{found.argument[4:]}\b.*: box {found.box_cols} x {rows} x .*{found.swizzle_bytes} bytes"
            assert re.search(boxes, said)
    assert ("left so" in said) == any(scratch.cleared for scratch in plan.scratch)
    assert all(f"  {name} = {formula}\n" in said for name, formula in recipe.sizes(plan).items())


def test_the_order_of_a_kernels_arguments_is_the_recipes():
    for plan in PLANS:
        source = render(plan).source
        for entry in plan.entry_points:
            signature = source[source.index(f" {entry.symbol}(") :].partition(")")[0]
            assert re.findall(r"CUtensorMap (\w+)", signature) == [found.argument for found in entry.tensor_maps]
