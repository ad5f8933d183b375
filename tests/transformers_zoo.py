"""Tiny models of random weights, one of each architecture, and what transformers' eager attention makes of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fa2gen.integrations.transformers.attention import recorded

VOCABULARY, SEQLEN = 64, 21
_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_VISION = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "intermediate_size": 64}
_VISION |= {"num_hidden_layers": 2, "num_attention_heads": 4}
_NO_DROPOUT = ("dropout", "attention_dropout", "activation_dropout", "hidden_dropout_prob", "hidden_dropout")
_NO_DROPOUT += ("attention_probs_dropout_prob", "attn_pdrop", "embd_pdrop", "resid_pdrop", "classifier_dropout")


@dataclass(frozen=True)
class Animal:
    """One architecture: transformers' model_type, what its config says beside the usual, and what its attention asks.

    kind   "decoder", "encoder", "vision" or "both": encoder and decoder.
    needs  options of `flash_attn_func` that a plain text needs.
    runs   by what its attention runs where these are not refused: "fa2gen", or "sdpa" (a bias, chunks).
    since  the first major version of transformers whose model has the attention interface.
    """

    model_type: str
    kind: str = "decoder"
    config: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    runs: str = "fa2gen"
    since: int = 4

    def __str__(self) -> str:
        return self.model_type

    def configured(self, head_dim: int | None = None, heads: int = 4) -> Any:
        """Its config, without dropout."""
        import transformers

        usual: dict[str, Any] = {"vision": _VISION, "both": {}}.get(self.kind, _TEXT)
        given = {**usual, **self.config}
        if head_dim is not None:
            given |= {"hidden_size": head_dim * heads, "num_attention_heads": heads}
            given |= {name: head_dim for name in ("head_dim",) if name in given}
        config = transformers.AutoConfig.for_model(self.model_type, **given)
        for name in _NO_DROPOUT:
            if isinstance(getattr(config, name, None), float):
                setattr(config, name, 0.0)
        return config

    def build(self, implementation: str, head_dim: int | None = None) -> Any:
        """The model, in evaluation mode, of the same weights for each implementation."""
        import transformers

        auto = transformers.AutoModelForCausalLM if self.kind == "decoder" else transformers.AutoModel
        torch.manual_seed(1)
        return auto.from_config(self.configured(head_dim), attn_implementation=implementation).eval()

    def inputs(self, batch: int = 2) -> dict[str, Tensor]:
        torch.manual_seed(0)
        if self.kind == "vision":
            return {"pixel_values": torch.randn(batch, 3, 32, 32)}
        ids = torch.randint(3, VOCABULARY, (batch, SEQLEN))
        return {"input_ids": ids, "decoder_input_ids": ids[:, :9]} if self.kind == "both" else {"input_ids": ids}


class Routes(TorchFunctionMode):
    """To which experts a first model's tokens go, in all that run within: as often as each takes the greatest of many.

    Two experts may be so near that a rounding decides between them. Where it decides otherwise another function of
    the weights is computed, whose results say nothing of how exact attention is.

    mask  (batch, seqlen) of the tokens that count, or None: all.
    """

    def __init__(self, mask: Tensor | None = None) -> None:
        super().__init__()
        self._mask = slice(None) if mask is None else mask.flatten().bool()
        self._chosen: list[Tensor] = []
        self._at: int | None = None
        self.others = 0
        """Tokens of a layer that would have gone elsewhere."""

    def again(self) -> None:
        """What runs from now on goes where the first went."""
        self._at, self.others = 0, 0

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func not in (torch.topk, Tensor.topk):
            return found
        if self._at is None:
            self._chosen.append(found.indices)
            return found
        chosen = self._chosen[self._at]
        self._at += 1
        differ = (found.indices.sort(-1)[0] != chosen.sort(-1)[0]).any(-1)
        self.others += int(differ.flatten()[self._mask].sum())
        return torch.return_types.topk((args[0].gather(-1, chosen), chosen))


_BOTH = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "vocab_size": VOCABULARY,
}
_BOTH |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY}
_SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}
_MLA = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
_MLA |= {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

ZOO = [
    Animal("llama"),
    Animal("mistral", config={"sliding_window": 6, "head_dim": 8}),
    Animal("mixtral", config=_MOE),
    Animal("qwen2"),
    Animal("qwen3", config={"head_dim": 8}),
    Animal("qwen3_moe", config={**_MOE, "head_dim": 8}),
    Animal("gemma", config={"head_dim": 8}),
    Animal("gemma2", config={**_SLIDING, "query_pre_attn_scalar": 8}, needs=("softcap",)),
    Animal("gemma3_text", config=_SLIDING),
    Animal("phi"),
    Animal("phi3", config={"pad_token_id": 0}),
    Animal("gpt2", config=_GPT2),
    Animal("gpt_neox"),
    Animal("opt", config={"ffn_dim": 64, "word_embed_proj_dim": 32}, since=5),
    Animal("olmo2"),
    Animal("starcoder2"),
    Animal("cohere2", config=_SLIDING),
    Animal("granite"),
    Animal("stablelm", since=5),
    Animal("smollm3", config={"pad_token_id": 0}),
    Animal("glm", config={"head_dim": 8, "pad_token_id": 0}),
    Animal("helium", config={"head_dim": 8}),
    Animal("nemotron", since=5),
    Animal("deepseek_v3", config={**_MLA, "first_k_dense_replace": 1, "num_key_value_heads": 4}),
    Animal("gpt_oss", config={**_MOE, **_SLIDING}, needs=("s_aux",)),
    Animal(
        "llama4_text",
        config={**_MOE, "head_dim": 8, "attention_chunk_size": 8, "intermediate_size_mlp": 64},
        runs="sdpa",
    ),
    Animal("bert", "encoder", since=5),
    Animal("roberta", "encoder", config={"max_position_embeddings": 66}, since=5),
    Animal("distilbert", "encoder", config={"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}, since=5),
    Animal("electra", "encoder", config={"embedding_size": 32}, since=5),
    Animal("modernbert", "encoder", config={"local_attention": 8, "pad_token_id": 0}, since=5),
    Animal("clip_text_model", "encoder", since=5),
    Animal("vit", "vision"),
    Animal("dinov2", "vision"),
    Animal("clip_vision_model", "vision"),
    Animal("siglip_vision_model", "vision"),
    Animal("bart", "both", config=_BOTH, since=5),
    Animal(
        "t5",
        "both",
        config={"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
        runs="sdpa",
        since=5,
    ),
]


# How exact a model is ---------------------------------------------------------------------------------------------


class Errors(NamedTuple):
    """Of a model in bf16: mean error of logits and of gradients, over that of eager attention in bf16.

    runs   by what its attention ran.
    mode   "dense", "padded" or "packed".
    other  how many tokens experts would have been others for, by eager attention and by this one.
    """

    mode: str
    runs: set[str]
    logits: float
    gradients: float
    other: tuple[int, int]


def errors(animal: Animal, device: str) -> Iterator[Errors]:
    """Of each kind of batch, against eager attention in fp32, by the same experts as there."""
    head_dim = 64 if animal.kind == "decoder" else None
    exact, eager, model = (animal.build(name, head_dim).to(device) for name in ("eager", "eager", "fa2gen"))
    for other in (eager, model):
        other.load_state_dict(exact.state_dict())
        other.bfloat16()
    for mode, inputs in modes(animal, device):
        floats = inputs | {name: x.bfloat16() for name, x in inputs.items() if x.is_floating_point()}
        with recorded() as calls, Routes(inputs.get("attention_mask")) as routes, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            right = outcome(exact, inputs)
            found, others = [], []
            for one in (eager, model):
                routes.again()
                found.append([(x - y).abs().mean().item() for x, y in zip(outcome(one, floats), right, strict=True)])
                others.append(routes.others)
        ratios = [ours / max(theirs, 1e-12) for theirs, ours in zip(*found, strict=True)]
        yield Errors(mode, {call.runs for call in calls.values()}, *ratios, (others[0], others[1]))


def modes(animal: Animal, device: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
    inputs = {name: x.to(device) for name, x in animal.inputs(batch=4).items()}
    yield "dense", inputs
    if animal.kind != "vision":
        mask = torch.ones(4, SEQLEN, dtype=torch.long, device=device)
        mask[0, :6] = mask[1, :3] = 0
        yield "padded", {**inputs, "attention_mask": mask}
    # The eager attention of some does not keep packed sequences apart.
    if animal.kind == "decoder" and animal.runs == "fa2gen" and animal.model_type not in ("gpt_oss", "opt"):
        positions = torch.cat([torch.arange(n) for n in (5, 9, SEQLEN - 14)]).expand(4, -1).to(device)
        yield "packed", {**inputs, "position_ids": positions}


def outcome(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(what a model says, gradients), in fp32; of what counts in a padded batch."""
    out = model(**inputs, **({"use_cache": False} if "position_ids" in inputs else {}))
    said = (out.logits if "logits" in out else out.last_hidden_state).float()
    mask = inputs.get("attention_mask")
    if mask is not None and mask.shape == said.shape[:2]:
        said = said * mask.unsqueeze(-1)
    model.zero_grad()
    weights = torch.randn(said.shape, generator=torch.Generator().manual_seed(1)).to(said.device)
    (said * weights).sum().backward()
    return said.detach(), torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])
