"""Trains a GPT with fa2gen's attention, or with another, and says how fast: `python examples/train_gpt.py --help`.

The models are those of Table 1 of the FlashAttention-2 paper, and a small one for a laptop. The text is synthetic, made
here: nothing is downloaded. Parameters are fp32, products bf16 (autocast), the optimizer is a fused AdamW.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fa2gen import Fa2GenError, InvalidInput, flash_attn_func, flash_attn_varlen_func
from fa2gen.bench import peers
from fa2gen.bench.points import documents

Attention: TypeAlias = Callable[..., Tensor]
"""Causal attention of q, k, v (batch, seqlen, heads, head_dim), which gives the same shape; of packed documents (total,
heads, head_dim), with their cu_seqlens behind."""

AttentionName: TypeAlias = Literal["fa2gen", "sdpa", "fa3", "standard"]
ModelName: TypeAlias = Literal["small", "gpt3-1.3b", "gpt3-2.7b"]
Documents: TypeAlias = Literal["", "packed", "padded"]
"""Of a text that is cut into documents, how they lie: one behind the other, or each in a row, padded to the longest."""

FAILED, USAGE, NOTHING_TO_RUN_ON = 1, 2, 3  # exit status, as fa2gen's
WARMUP_STEPS = 3  # not timed: kernels are compiled, and the optimizer makes its state
LEARNING_RATE_STEPS = 20  # until the learning rate is what it stays at


# The model -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Sizes of a GPT, and what it is trained with where the command line does not say."""

    layers: int
    hidden: int
    heads: int
    vocabulary: int
    seqlen: int
    batch: int
    learning_rate: float

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


MODELS: Mapping[ModelName, Config] = {
    "small": Config(layers=4, hidden=256, heads=4, vocabulary=256, seqlen=256, batch=4, learning_rate=5e-4),
    # Table 1. GPT-2's vocabulary of 50,257, rounded up to a multiple of 128; 16k tokens a step.
    "gpt3-1.3b": Config(layers=24, hidden=2048, heads=16, vocabulary=50_304, seqlen=2048, batch=8, learning_rate=2e-4),
    "gpt3-2.7b": Config(
        layers=32, hidden=2560, heads=32, vocabulary=50_304, seqlen=2048, batch=8, learning_rate=1.6e-4
    ),
}


@dataclass(frozen=True)
class Text:
    """Tokens, and the one that follows each: (batch, seqlen) int64; a target of IGNORED does not count.

    Of packed documents (total,), with the place of each token in its document, and where documents begin.
    """

    inputs: Tensor
    targets: Tensor
    places: Tensor | None = None
    cu_seqlens: Tensor | None = None


IGNORED = -100  # cross_entropy's


class Block(nn.Module):
    """x (..., hidden) plus attention of it, plus an MLP of that; norms come first, as in GPT-2."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm_attention = nn.LayerNorm(config.hidden)
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden)
        self.project = nn.Linear(config.hidden, config.hidden)
        self.norm_mlp = nn.LayerNorm(config.hidden)
        self.mlp_in = nn.Linear(config.hidden, 4 * config.hidden)
        self.mlp_out = nn.Linear(4 * config.hidden, config.hidden)
        self.attention: Attention = standard_attention

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        bounds = () if cu_seqlens is None else (cu_seqlens,)
        x = x + self.project(self.attention(q, k, v, *bounds).flatten(-2))
        return x + self.mlp_out(functional.gelu(self.mlp_in(self.norm_mlp(x)), approximate="tanh"))


class GPT(nn.Module):
    """GPT-2's architecture: learned positions, and token embeddings that are the last product's weights too."""

    def __init__(self, config: Config, seqlen: int, checkpoints: bool = False) -> None:
        super().__init__()
        self.checkpoints = checkpoints
        self.tokens = nn.Embedding(config.vocabulary, config.hidden)
        self.positions = nn.Parameter(torch.empty(seqlen, config.hidden))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.hidden)

    def initialize(self) -> None:
        """GPT-2's: N(0, 0.02), and less for what is added to the residual stream, by the number of additions."""
        small = 0.02 / math.sqrt(2 * len(self.blocks))
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "norm" in name:
                nn.init.ones_(parameter)
            else:
                added = name.endswith(("project.weight", "mlp_out.weight"))
                nn.init.normal_(parameter, std=small if added else 0.02)

    def use(self, attention: Attention) -> None:
        for block in self.blocks:
            block.attention = attention

    def forward(self, text: Text) -> Tensor:
        """The mean cross entropy of the targets."""
        seqlen = text.inputs.shape[-1]
        x = self.tokens(text.inputs) + self.positions[text.places if text.places is not None else slice(seqlen)]
        bounds = () if text.cu_seqlens is None else (text.cu_seqlens,)
        for block in self.blocks:
            x = checkpoint(block, x, *bounds, use_reentrant=False) if self.checkpoints else block(x, *bounds)
        logits = functional.linear(self.norm(x), self.tokens.weight)
        return functional.cross_entropy(logits.flatten(0, -2), text.targets.flatten(), ignore_index=IGNORED)


def num_parameters(model: GPT) -> int:
    """Of products: all but the positions, which are only added. Token embeddings are one, at the end."""
    count: int = sum(parameter.numel() for parameter in model.parameters()) - model.positions.numel()
    return count


def step_flops(config: Config, parameters: int, batch: int, seqlen: int) -> float:
    """Of one step, as section 4.2 of the FlashAttention-2 paper counts: the causal mask halves nothing."""
    return batch * (6.0 * seqlen * parameters + 12.0 * config.layers * config.hidden * seqlen**2)


# Attention -----------------------------------------------------------------------------------------------------------


def fa2gen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    if cu_seqlens is None:
        out = flash_attn_func(q, k, v, causal=True)
    else:
        out = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, causal=True)
    assert isinstance(out, Tensor)
    return out


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's own, by the backend that torch picks."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def standard_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """With all scores in memory; autocast computes the softmax in fp32."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    return (torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1) @ v.to(scores.dtype)).transpose(1, 2)


def fa3_attention(library: Path | None) -> Attention:
    """FlashAttention-3's operators, of a library file or of an installed package, with autograd.

    They are wrapped in operators of our own: torch.compile cannot see through the library's, which have no fake
    implementations, and an output that may be an input.

    Raises InvalidInput where there is none.
    """
    _, missing = peers.find(["fa3"], library)
    if missing:
        raise InvalidInput(f"no FlashAttention-3 to compare with: {missing['fa3']}")
    fwd, bwd = torch.ops.flash_attn_3.fwd, torch.ops.flash_attn_3.bwd

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse, *_ = fwd(q, k, v, softmax_scale=q.shape[-1] ** -0.5, is_causal=True, num_splits=1)
        return out, lse

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        bwd(dout, q, k, v, out, lse, dq, dk, dv, softmax_scale=q.shape[-1] ** -0.5, is_causal=True)
        return dq, dk, dv

    operator = torch.library.custom_op(
        "train_gpt::fa3", forward, mutates_args=(), schema="(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)"
    )
    gradients = torch.library.custom_op(
        "train_gpt::fa3_backward",
        backward,
        mutates_args=(),
        schema="(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse) -> (Tensor, Tensor, Tensor)",
    )
    operator.register_fake(
        lambda q, k, v: (
            q.new_empty(q.shape),
            q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32),
        )
    )
    gradients.register_fake(lambda dout, q, k, v, out, lse: tuple(x.new_empty(x.shape) for x in (q, k, v)))

    def save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, *output)

    operator.register_autograd(lambda ctx, dout, _: gradients(dout, *ctx.saved_tensors), setup_context=save)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, _ = operator(q, k, v)
        return out

    return attention


ATTENTIONS: Mapping[str, Attention] = {
    "fa2gen": fa2gen_attention,
    "sdpa": sdpa_attention,
    "standard": standard_attention,
}


def attention_named(name: str, fa3_library: Path | None) -> Attention:
    """One of ATTENTIONS, or fa3. Raises InvalidInput for another name, or where FlashAttention-3 is missing."""
    if name == "fa3":
        return fa3_attention(fa3_library)
    if name not in ATTENTIONS:
        raise InvalidInput(f"no attention {name!r}; there are {', '.join(ATTENTIONS)} and fa3")
    return ATTENTIONS[name]


# Text ----------------------------------------------------------------------------------------------------------------


class Language:
    """An endless synthetic text: seeded words of 2 to 8 letters, drawn by Zipf's law, with a space after each.

    The next letter depends on the word's beginning, which attention must find. Letters are tokens 1 to 16, the space 0.
    """

    LETTERS, WORDS, LONGEST = 16, 64, 8

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        shape = (self.WORDS, self.LONGEST + 1)
        letters = torch.randint(1, self.LETTERS + 1, shape, generator=self.generator)
        lengths = torch.randint(2, self.LONGEST + 1, (self.WORDS, 1), generator=self.generator)
        place = torch.arange(self.LONGEST + 1)
        self.words = letters.masked_fill(place == lengths, 0)
        self.written = place <= lengths
        self.frequencies = 1.0 / torch.arange(1, self.WORDS + 1)

    def batches(self, batch: int, seqlen: int) -> Iterator[Tensor]:
        """(batch, seqlen + 1) int64 each: the next token of each but the last is in it too."""
        tokens = batch * (seqlen + 1)
        while True:
            # A word and its space are 3 tokens at least.
            drawn = torch.multinomial(self.frequencies, tokens // 3 + 1, replacement=True, generator=self.generator)
            yield self.words[drawn][self.written[drawn]][:tokens].view(batch, seqlen + 1)


# Training ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """All that a run depends on, but for the attention. Two trainers of one setup start with the same weights.

    documents  the same tokens a step, as documents of lengths up to seqlen, none of which sees another.
    """

    config: Config
    batch: int
    seqlen: int
    device: str
    compiles: bool = False
    checkpoints: bool = False
    seed: int = 0
    documents: Documents = ""

    @property
    def lengths(self) -> list[int]:
        """Of the sequences of a step."""
        if not self.documents:
            return [self.seqlen] * self.batch
        return documents(self.batch * self.seqlen, self.seqlen, self.seqlen / 4)

    def batches(self) -> Iterator[Text]:
        """The same texts for each attention, and the same documents in another order at each step."""
        language = Language(self.seed)
        if not self.documents:
            for tokens in language.batches(self.batch, self.seqlen):
                on_device = tokens.to(self.device)
                yield Text(on_device[:, :-1], on_device[:, 1:])
            return
        lengths = torch.tensor(self.lengths)
        order = torch.Generator().manual_seed(self.seed)
        for tokens in language.batches(1, int(lengths.sum()) + len(lengths) - 1):
            shuffled = lengths[torch.randperm(len(lengths), generator=order)]
            texts = tokens[0].split((shuffled + 1).tolist())
            yield self._laid_out([text[:-1] for text in texts], [text[1:] for text in texts])

    def _laid_out(self, inputs: list[Tensor], targets: list[Tensor]) -> Text:
        """The tokens of each document, and those that follow them, as `documents` says."""
        if self.documents == "padded":
            pad = nn.utils.rnn.pad_sequence
            whole = Text(pad(inputs, batch_first=True), pad(targets, batch_first=True, padding_value=IGNORED))
        else:
            places = torch.cat([torch.arange(len(x)) for x in inputs])
            bounds = torch.tensor([0, *itertools.accumulate(map(len, inputs))], dtype=torch.int32)
            whole = Text(torch.cat(inputs), torch.cat(targets), places, bounds)
        return Text(*(None if x is None else x.to(self.device) for x in vars(whole).values()))


class Trainer:
    """One model with its optimizer. Each step may use another attention: several take turns in one model's memory."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        torch.manual_seed(setup.seed)
        with torch.device(setup.device):
            self.model = GPT(setup.config, setup.seqlen, setup.checkpoints)
        self.model.initialize()
        self.parameters = num_parameters(self.model)
        self.flops = sum(step_flops(setup.config, self.parameters, 1, length) for length in setup.lengths)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), setup.config.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        self.schedule = torch.optim.lr_scheduler.LinearLR(
            self.optimizer, 1 / LEARNING_RATE_STEPS, 1.0, LEARNING_RATE_STEPS
        )
        if setup.compiles:
            for block in self.model.blocks:  # all blocks share one compilation for each attention
                block.compile(fullgraph=True)

    def loss(self, attention: Attention, text: Text) -> Tensor:
        self.model.use(attention)
        with torch.autocast(self.setup.device, torch.bfloat16):
            loss: Tensor = self.model(text)
        return loss

    def step(self, attention: Attention, text: Text) -> Tensor:
        """Forward, backward, update; the loss before it."""
        try:
            loss = self.loss(attention, text)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
        finally:  # also where memory did not suffice
            self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def timed_step(self, attention: Attention, text: Text) -> tuple[float, float]:
        """(seconds, loss), with an idle device before and after."""
        start = time.perf_counter()
        loss = self.step(attention, text).item()  # waits for the loss only
        if self.setup.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start, loss


def loss_curve(setup: Setup, attention: Attention, steps: int) -> list[float]:
    """The loss of each step, from the setup's initial weights."""
    trainer, batches = Trainer(setup), setup.batches()
    return [trainer.step(attention, next(batches)).item() for _ in range(steps)]


def greatest_difference(curves: Mapping[str, Sequence[float]], name: str, reference: str) -> float:
    return max(abs(a - b) for a, b in zip(curves[name], curves[reference], strict=True))


@dataclass
class Timing:
    """Of one attention: seconds of each timed step; the loss of the first step's text at the initial weights."""

    initial_loss: float
    seconds: list[float]

    def figures(self, trainer: Trainer) -> dict[str, float]:
        median = statistics.median(self.seconds)
        tokens = sum(trainer.setup.lengths)
        return {
            "initial_loss": self.initial_loss,
            "milliseconds": 1e3 * median,
            "tokens_per_second": tokens / median,
            "tflops": trainer.flops / median / 1e12,
        }


def interleaved(trainer: Trainer, attentions: Mapping[str, Attention], steps: int) -> dict[str, Timing | None]:
    """Times `steps` steps with each attention, which take turns step by step: clocks drift for all alike.

    None for an attention that memory does not suffice for.
    """
    batches = trainer.setup.batches()
    timings: dict[str, Timing | None] = {}
    text = next(batches)
    for name, attention in attentions.items():
        timings[name] = None
        # With gradients, though nobody wants them: a compiled block would be compiled once more without.
        with contextlib.suppress(torch.OutOfMemoryError):
            timings[name] = Timing(trainer.loss(attention, text).item(), [])
    for number in range(WARMUP_STEPS + steps):
        text = next(batches)
        for name, attention in attentions.items():
            if (timing := timings[name]) is None:
                continue
            timings[name] = None
            with contextlib.suppress(torch.OutOfMemoryError):
                seconds, _ = trainer.timed_step(attention, text)
                if number >= WARMUP_STEPS:
                    timing.seconds.append(seconds)
                timings[name] = timing
    return timings


# The command ---------------------------------------------------------------------------------------------------------

app = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False, add_completion=False)


@app.command(
    epilog="\n".join(
        (
            "[bold]Examples[/]",
            "python examples/train_gpt.py                the small model; needs no GPU",
            "python examples/train_gpt.py --compare standard --curves    their losses",
            "python examples/train_gpt.py --packed       on documents of many lengths",
            "python examples/train_gpt.py --model gpt3-1.3b --compile --compare fa3",
            "python examples/train_gpt.py --model gpt3-2.7b --attention sdpa --json",
        )
    )
)
def main(
    model: Annotated[ModelName, typer.Option(help="Table 1 of the paper, or small.")] = "small",
    attention: Annotated[AttentionName, typer.Option(help="sdpa is torch's, standard keeps all scores.")] = "fa2gen",
    compare: Annotated[
        list[str] | None,
        typer.Option(metavar="ATTENTION", help="Another, in turns with it; may be repeated.", show_default=False),
    ] = None,
    curves: Annotated[
        bool, typer.Option("--curves", help="Train anew with each attention and compare losses, not speed.")
    ] = False,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Default: 200, 20 for --compare; a tenth on a CPU.", show_default=False)
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences. Default: the model's tokens.", show_default=False)
    ] = None,
    seqlen: Annotated[int | None, typer.Option(min=2, help="Default: the model's.", show_default=False)] = None,
    packed: Annotated[
        bool, typer.Option("--packed", help="Cut the text into documents, packed one behind the other.")
    ] = False,
    padded: Annotated[bool, typer.Option("--padded", help="The same documents, each padded to the longest.")] = False,
    compiles: Annotated[bool, typer.Option("--compile", help="torch.compile each block.")] = False,
    checkpoints: Annotated[bool, typer.Option("--checkpoint", help="Recompute blocks in the backward pass.")] = False,
    seed: Annotated[int, typer.Option(help="Of the weights and the text.")] = 0,
    fa3_library: Annotated[
        Path | None,
        typer.Option(
            envvar="FA2GEN_FA3_LIBRARY", help="A file with the operators flash_attn_3::*.", show_default=False
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the losses into this file; needs matplotlib.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")] = False,
) -> None:
    """Train a GPT and print the loss, tokens/s and TFLOP/s, or compare attentions in speed or in loss."""
    names = list(dict.fromkeys([attention, *(compare or ())]))
    config = MODELS[model]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and (model != "small" or "fa3" in names):
        _fail(f"there is no NVIDIA GPU here, which {'fa3' if model == 'small' else model} needs", NOTHING_TO_RUN_ON)
    if curves and len(names) == 1:
        _fail("--curves compares losses: say with what, as in --compare standard", USAGE)
    if plot is not None and len(names) > 1 and not curves:
        _fail("--plot draws losses: with --compare it needs --curves", USAGE)
    if plot is not None and find_spec("matplotlib") is None:
        _fail("figures need matplotlib: pip install matplotlib", USAGE)
    if packed and padded:
        _fail("documents are packed or padded: give one of --packed and --padded", USAGE)
    if packed and names != ["fa2gen"]:
        _fail("of the attentions here fa2gen's alone takes packed documents; all take --padded ones", USAGE)
    share = 1 if device == "cuda" else 10
    seqlen = seqlen or config.seqlen
    setup = Setup(
        config,
        batch or max(1, config.batch * config.seqlen // seqlen),
        seqlen,
        device,
        compiles=compiles,
        checkpoints=checkpoints,
        seed=seed,
        documents="packed" if packed else "padded" if padded else "",
    )
    say = _silent if as_json else typer.echo
    try:
        attentions = {name: attention_named(name, fa3_library) for name in names}
        if curves:
            result = _compare_losses(setup, attentions, steps or 200 // share, say)
        elif len(names) > 1:
            result = _compare_speed(setup, attentions, steps or 20 // share, say)
        else:
            result = _train(setup, attention, attentions[attention], steps or 200 // share, say)
        if plot is not None:
            _plot(result["losses"], plot)
    except InvalidInput as error:
        _fail(str(error), USAGE)
    except (MemoryError, RuntimeError) as error:  # torch's of either device says what it could not allocate
        if isinstance(error, RuntimeError) and "alloc" not in str(error) and "out of memory" not in str(error):
            raise
        _fail(
            f"memory does not suffice for {setup.batch} x {seqlen} tokens a step: a smaller --batch or --seqlen", FAILED
        )
    except Fa2GenError as error:
        _fail(str(error), FAILED)
    if as_json:
        facts = {"model": model, **asdict(setup), "torch": torch.__version__, "gpu": _device_name(device)}
        typer.echo(json.dumps({**facts, **result}, indent=2))


def _train(setup: Setup, name: str, attention: Attention, steps: int, say: Callable[[str], object]) -> dict[str, Any]:
    trainer, batches = Trainer(setup), setup.batches()
    _say_what(trainer, say)
    every = max(1, steps // 20)
    timing, losses = Timing(math.nan, []), []
    for number in range(steps):
        seconds, loss = trainer.timed_step(attention, next(batches))
        losses.append(loss)
        timing.seconds.append(seconds)
        if number % every == 0 or number == steps - 1:
            now = Timing(loss, [seconds]).figures(trainer)
            say(f"step {number:>5}   loss {loss:.4f}   {_speed(now)}")
    timing.initial_loss = losses[0]
    timing.seconds = timing.seconds[WARMUP_STEPS:] or timing.seconds
    figures = timing.figures(trainer)
    say(f"{name}: {_speed(figures)}, median of {len(timing.seconds)} steps")
    return {"parameters": trainer.parameters, "attention": {name: figures}, "losses": {name: losses}}


def _compare_speed(
    setup: Setup, attentions: Mapping[str, Attention], steps: int, say: Callable[[str], object]
) -> dict[str, Any]:
    trainer = Trainer(setup)
    _say_what(trainer, say)
    timings = interleaved(trainer, attentions, steps)
    figures = {name: timing.figures(trainer) if timing else None for name, timing in timings.items()}
    first, *others = figures
    for name, found in figures.items():
        say(f"{name:<9}" + (f"loss {found['initial_loss']:.4f}   {_speed(found)}" if found else "out of memory"))
    ratios = {}
    for name in others:
        ours, other = figures[first], figures[name]
        if ours and other:
            ratios[name] = other["milliseconds"] / ours["milliseconds"]
            say(f"{first} / {name}: {ratios[name]:.3f} of its speed, medians of {steps} interleaved steps")
    return {"parameters": trainer.parameters, "attention": figures, "ratios": ratios}


def _compare_losses(
    setup: Setup, attentions: Mapping[str, Attention], steps: int, say: Callable[[str], object]
) -> dict[str, Any]:
    losses = {}
    for name, attention in attentions.items():
        losses[name] = loss_curve(setup, attention, steps)
        say(f"{name:<9}loss {losses[name][0]:.4f} at the first of {steps} steps, {losses[name][-1]:.4f} at the last")
    first, *others = losses
    differences = {name: greatest_difference(losses, first, name) for name in others}
    for name, difference in differences.items():
        say(f"{first} and {name} differ by {difference:.1e} at most")
    return {"losses": losses, "greatest_difference": differences}


def _say_what(trainer: Trainer, say: Callable[[str], object]) -> None:
    setup = trainer.setup
    say(
        f"{trainer.parameters / 1e6:,.1f} M parameters, {_tokens_text(setup)} a step, "
        f"{setup.config.heads} heads of {setup.config.head_dim}, on {_device_name(setup.device)}"
    )


def _tokens_text(setup: Setup) -> str:
    if setup.documents:
        return f"{sum(setup.lengths)} tokens in {len(setup.lengths)} documents, {setup.documents},"
    return f"{setup.batch} x {setup.seqlen} tokens"


def _speed(figures: Mapping[str, float]) -> str:
    return (
        f"{figures['milliseconds']:8.1f} ms   {figures['tokens_per_second']:>9,.0f} tokens/s   "
        f"{figures['tflops']:6.3g} TFLOP/s"
    )


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "the CPU"


def _plot(losses: Mapping[str, Sequence[float]], path: Path) -> None:
    import_module("matplotlib").use("Agg")
    pyplot = import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for (name, values), style in zip(losses.items(), ("-", "--", ":", "-."), strict=False):
        axes.plot(values, style, label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _silent(_: str) -> None:
    """Standard output holds the JSON document alone."""


def _fail(message: str, status: int) -> None:
    typer.echo(message, err=True)
    raise typer.Exit(status)


if __name__ == "__main__":
    app()
