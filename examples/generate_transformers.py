"""Generates with a transformers model on fa2gen: prompts of several lengths, padded on the left, and a cache.

    python examples/generate_transformers.py                            a tiny model of random weights
    python examples/generate_transformers.py --model NAME_OR_FOLDER     one of yours, with its tokenizer

On a GPU if there is one. Compares the logits of all generated tokens with those of transformers' sdpa. Says "right".
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fa2gen.integrations.transformers import register

NEW_TOKENS = 8
TINY = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
PROMPTS = ("The quick brown fox", "Attention is", "One two three four five six")


def loaded(name: str | None) -> tuple[Any, dict[str, Any]]:
    """A model, and a batch of prompts for it."""
    if name is not None:
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16, attn_implementation="fa2gen")
        return model, dict(tokenizer(list(PROMPTS), return_tensors="pt", padding=True))
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", vocab_size=256, num_key_value_heads=2, pad_token_id=0, **TINY)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="fa2gen")
    letters = [list(prompt.encode()) for prompt in PROMPTS]
    longest = max(map(len, letters))
    tokens = torch.tensor([[0] * (longest - len(row)) + row for row in letters])
    return model, {"input_ids": tokens, "attention_mask": (tokens != 0).long()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a name or folder that transformers knows")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    register()  # the one line: from here on transformers knows "fa2gen"
    model, batch = loaded(given.model)
    model = model.to(device).eval()
    batch = {name: x.to(device) for name, x in batch.items()}
    tokens = model.generate(**batch, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    print(tokens[:, -NEW_TOKENS:].tolist())

    # Of the same tokens at once, without a cache: close calls between two tokens may go either way in bf16.
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, NEW_TOKENS), value=1)
    with torch.no_grad():
        ours = model(tokens, attention_mask=mask).logits[:, -NEW_TOKENS - 1 : -1].float()
        model.set_attn_implementation("sdpa")
        sdpa = model(tokens, attention_mask=mask).logits[:, -NEW_TOKENS - 1 : -1].float()
    difference = ((ours - sdpa).norm() / sdpa.norm()).item()
    chosen = sdpa.gather(-1, tokens[:, -NEW_TOKENS:, None]).squeeze(-1)
    behind = ((sdpa.amax(-1) - chosen) / sdpa.std()).max().item()
    print(f"logits {difference:.1e} from sdpa's; tokens at most {behind:.2f} deviations behind its best")
    print("right" if difference < 0.02 and behind < 0.1 else "WRONG")


if __name__ == "__main__":
    main()
