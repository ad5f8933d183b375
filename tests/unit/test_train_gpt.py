"""examples/train_gpt.py on the CPU: what it counts and refuses, and that fa2gen's losses are standard attention's."""

from __future__ import annotations

import itertools
import json
import sys
import types
from dataclasses import replace

import pytest
import torch
import train_gpt
from typer.main import get_command
from typer.testing import CliRunner

from fa2gen.reference import attention_backward_tiled, attention_tiled

TINY = train_gpt.Config(layers=2, hidden=64, heads=1, vocabulary=64, seqlen=64, batch=16, learning_rate=3e-3)
SETUP = train_gpt.Setup(TINY, batch=16, seqlen=64, device="cpu")
STEPS = 120
LOSS_TOLERANCE = 0.03
"""Of losses in 120 steps: fa2gen and standard attention are 0.007 apart, torch's SDPA and it 0.003; faults more."""


# What is counted


@pytest.mark.parametrize(
    ("name", "head_dim", "billions"), [("gpt3-1.3b", 128, 1.312), ("gpt3-2.7b", 80, 2.647), ("small", 64, 0.0032)]
)
def test_models_are_those_of_table_1(name, head_dim, billions):
    config = train_gpt.MODELS[name]
    with torch.device("meta"):
        model = train_gpt.GPT(config, config.seqlen)
    hidden = config.hidden
    blocks = config.layers * (12 * hidden**2 + 13 * hidden)  # 4 + 8 products of hidden^2, biases and norms
    count = train_gpt.num_parameters(model)
    assert count == blocks + 2 * hidden + config.vocabulary * hidden
    assert count == pytest.approx(billions * 1e9, rel=2e-3 if name != "small" else 0.02)
    assert config.head_dim == head_dim


def test_flops_as_section_4_2_of_the_paper_counts():
    """6 seqlen parameters + 12 layers hidden seqlen^2 of a sequence, not halved for the causal mask."""
    config = train_gpt.MODELS["gpt3-1.3b"]
    one = 6 * 8192 * 1_311_000_000 + 12 * 24 * 2048 * 8192**2
    assert train_gpt.step_flops(config, 1_311_000_000, batch=1, seqlen=8192) == one
    assert train_gpt.step_flops(config, 1_311_000_000, batch=2, seqlen=8192) == 2 * one


# The text


def test_texts_depend_on_the_seed_alone():
    def first(seed):
        return list(itertools.islice(train_gpt.Language(seed).batches(3, 50), 2))

    (a, b), (c, d), (other, _) = first(0), first(0), first(1)
    assert torch.equal(a, c) and torch.equal(b, d)
    assert not torch.equal(a, b) and not torch.equal(a, other)
    assert a.shape == (3, 51) and a.dtype == torch.int64
    assert int(a.min()) >= 0 and int(a.max()) <= train_gpt.Language.LETTERS


def test_texts_are_words():
    language = train_gpt.Language(0)
    words = {tuple(row[: int(row.argmin())].tolist()) for row in language.words}
    text = next(language.batches(4, 100)).flatten().tolist()
    found = {tuple(group) for letters, group in itertools.groupby(text, bool) if letters}
    assert len(found - words) <= 1  # the last may be cut


# Losses


@pytest.fixture(scope="module")
def standard():
    return train_gpt.loss_curve(SETUP, train_gpt.standard_attention, STEPS)


def difference(curve, standard):
    return train_gpt.greatest_difference({"a": curve, "b": standard}, "a", "b")


def test_the_loss_curve_is_that_of_standard_attention(standard):
    curve = train_gpt.loss_curve(SETUP, train_gpt.fa2gen_attention, STEPS)
    assert curve[0] == pytest.approx(4.15, abs=0.1)  # ln 64: nothing is known yet
    assert curve[-1] < 2.0  # what the last letter alone tells is 2.0
    assert difference(curve, standard) <= LOSS_TOLERANCE


def half_of_dk(q, k, v):
    return train_gpt.fa2gen_attention(q, k.detach() + 0.5 * (k - k.detach()), v)


def another_scale(q, k, v):
    return train_gpt.flash_attn_func(q, k, v, causal=True, softmax_scale=2 * q.shape[-1] ** -0.5)


@pytest.mark.parametrize("wrong", [half_of_dk, another_scale])
def test_the_tolerance_sees_a_fault(wrong, standard):
    assert difference(train_gpt.loss_curve(SETUP, wrong, STEPS), standard) > 2 * LOSS_TOLERANCE


def test_checkpoints_change_nothing(standard):
    setup = replace(SETUP, checkpoints=True)
    assert train_gpt.loss_curve(setup, train_gpt.standard_attention, 3) == standard[:3]


@pytest.fixture(scope="module")
def documents():
    return replace(SETUP, documents="packed", batch=4)


def test_documents_are_the_same_packed_and_padded(documents):
    padded = replace(documents, documents="padded")
    for a, b in itertools.islice(zip(documents.batches(), padded.batches(), strict=False), 3):
        lengths = a.cu_seqlens.diff()
        assert sorted(lengths.tolist()) == sorted(documents.lengths) and a.inputs.shape == (4 * 64,)
        assert len(set(lengths.tolist())) > 3 and b.inputs.shape == (len(lengths), lengths.max())
        there = torch.arange(b.inputs.shape[1]) < lengths[:, None]
        assert torch.equal(b.inputs[there], a.inputs) and torch.equal(b.targets[there], a.targets)
        assert (b.targets[~there] == train_gpt.IGNORED).all() and torch.equal(a.places, there.nonzero()[:, 1])


def test_losses_of_packed_documents_are_those_of_padded_ones(documents):
    """Of the same tokens in other rows; not where documents see each other."""
    packed, padded = (
        train_gpt.loss_curve(replace(documents, documents=how), train_gpt.fa2gen_attention, 20)
        for how in ("packed", "padded")
    )
    assert packed[-1] < 0.9 * packed[0] and difference(packed, padded) <= 0.002

    def blind(q, k, v, cu_seqlens):  # to where documents begin
        return train_gpt.fa2gen_attention(q, k, v, cu_seqlens[[0, -1]])

    assert difference(train_gpt.loss_curve(documents, blind, 20), padded) > 0.01


# FlashAttention-3, played by the reference


@pytest.fixture(scope="module")
def fa3():
    """train_gpt's FlashAttention-3 attention, over operators of the library's names and signatures."""
    library = torch.library.Library("flash_attn_3", "DEF")
    library.define(
        "fwd(Tensor q, Tensor k, Tensor v, *, float softmax_scale, bool is_causal, int num_splits)"
        " -> (Tensor, Tensor, Tensor, Tensor)"
    )
    library.define(
        "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor(a!) dq, Tensor(b!) dk,"
        " Tensor(c!) dv, *, float softmax_scale, bool is_causal) -> Tensor"
    )

    def fwd(q, k, v, *, softmax_scale, is_causal, num_splits):
        assert num_splits == 1
        with torch.autocast("cpu", enabled=False):  # a kernel's sums are in fp32 there too
            out, lse = attention_tiled(q, k, v, causal=is_causal, softmax_scale=softmax_scale)
        return out, lse, q.new_empty(0), q.new_empty(0)

    def bwd(dout, q, k, v, out, lse, dq, dk, dv, *, softmax_scale, is_causal):
        gradients = attention_backward_tiled(dout, q, k, v, out, lse, causal=is_causal, softmax_scale=softmax_scale)
        for x, gradient in zip((dq, dk, dv), gradients, strict=True):
            x.copy_(gradient)
        return dq.new_empty(0)

    library.impl("fwd", fwd, "CPU")
    library.impl("bwd", bwd, "CPU")
    with pytest.MonkeyPatch.context() as patch:
        for module in ("flash_attn_3", "flash_attn_3._C"):
            patch.setitem(sys.modules, module, types.ModuleType(module))
        yield train_gpt.attention_named("fa3", None)
    library._destroy()


def test_fa3_is_differentiated(fa3):
    curves = [train_gpt.loss_curve(SETUP, attention, 5) for attention in (fa3, train_gpt.fa2gen_attention)]
    assert curves[0] == curves[1]


@pytest.mark.parametrize("name", ["fa2gen", "fa3", "sdpa", "standard"])
def test_blocks_compile_whole(name, fa3, standard):
    """With no graph break: the default compiler would take a minute to say the same."""
    attention = fa3 if name == "fa3" else train_gpt.attention_named(name, None)
    trainer = train_gpt.Trainer(SETUP)
    for block in trainer.model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    losses = [trainer.step(attention, tokens).item() for tokens in itertools.islice(SETUP.batches(), 3)]
    assert losses == pytest.approx(standard[:3], abs=1e-3)


# Speed


def test_attentions_take_turns(monkeypatch):
    order = []

    def attention_of(name):
        def attention(q, k, v):
            order.append(name)
            if name == "greedy" and len(order) > 4:
                raise torch.OutOfMemoryError("no")
            return train_gpt.standard_attention(q, k, v)

        return attention

    monkeypatch.setattr(train_gpt, "WARMUP_STEPS", 1)
    one_layer = replace(SETUP, config=replace(TINY, layers=1), batch=1)
    names = ("a", "greedy", "b")
    timings = train_gpt.interleaved(train_gpt.Trainer(one_layer), {name: attention_of(name) for name in names}, 2)
    # At the initial weights, then a warm-up step, in which one does not fit, then two that count.
    assert order == [*names, *names, "a", "b", "a", "b"]
    assert timings["greedy"] is None
    assert len(timings["a"].seconds) == len(timings["b"].seconds) == 2
    assert timings["a"].initial_loss == timings["b"].initial_loss


# The command


def run(*arguments):
    done = CliRunner().invoke(train_gpt.app, list(arguments), prog_name="train_gpt.py")
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(train_gpt, "MODELS", {"small": TINY})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_train(tiny):
    done = run("--steps", "4", "--json")
    document = json.loads(done.stdout)
    figures = document["attention"]["fa2gen"]
    assert done.exit_code == 0 and document["model"] == "small" and len(document["losses"]["fa2gen"]) == 4
    assert figures["tokens_per_second"] == pytest.approx(16 * 64 / figures["milliseconds"] * 1e3)
    flops = train_gpt.step_flops(TINY, document["parameters"], 16, 64)
    assert figures["tflops"] == pytest.approx(flops / figures["milliseconds"] * 1e3 / 1e12)
    assert "TFLOP/s" in run("--steps", "1").stdout


@pytest.mark.parametrize("how", ["--packed", "--padded"])
def test_train_on_documents(tiny, how):
    document = json.loads(run("--steps", "1", how, "--json").stdout)
    assert document["documents"] == how[2:]
    figures = document["attention"]["fa2gen"]
    assert figures["tokens_per_second"] == pytest.approx(16 * 64 / figures["milliseconds"] * 1e3)
    assert f"documents, {how[2:]}, a step" in run("--steps", "1", how).stdout


def test_longer_sequences_are_fewer(tiny):
    document = json.loads(run("--steps", "1", "--seqlen", "256", "--json").stdout)
    assert (document["batch"], document["seqlen"]) == (4, 256)


def test_compare_speed(tiny):
    done = run("--steps", "1", "--compare", "sdpa", "--compare", "standard")
    assert done.exit_code == 0
    assert "fa2gen / sdpa: " in done.stdout and "fa2gen / standard: " in done.stdout


def test_compare_losses_and_draw(tiny, tmp_path):
    pytest.importorskip("matplotlib")
    drawn = tmp_path / "losses.png"
    done = run("--steps", "2", "--compare", "standard", "--curves", "--plot", str(drawn))
    assert done.exit_code == 0 and "fa2gen and standard differ by " in done.stdout
    assert drawn.stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("--model", "gpt3-1.3b"), 3, "no NVIDIA GPU"),
        (("--attention", "fa3"), 3, "no NVIDIA GPU"),
        (("--curves",), 2, "--compare standard"),
        (("--compare", "sdpa", "--plot", "x.png"), 2, "--curves"),
        (("--packed", "--padded"), 2, "one of --packed and --padded"),
        (("--packed", "--attention", "sdpa"), 2, "fa2gen's alone takes packed documents"),
        (("--seqlen", "100000000", "--batch", "1000", "--steps", "1"), 1, "a smaller --batch or --seqlen"),
        (("--compare", "fa9"), 2, "no attention 'fa9'; there are fa2gen, sdpa, standard and fa3"),
    ],
)
def test_refusals(arguments, status, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = run(*arguments)
    assert done.exit_code == status and message in done.stderr


def test_help_has_examples(monkeypatch):
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 80)
    title, *examples = get_command(train_gpt.app).epilog.splitlines()
    shown = [line.strip() for line in run("--help").stdout.splitlines()]
    assert title == "[bold]Examples[/]" and all(line in shown for line in examples)
