"""Finetunes a transformers model whose every attention runs on fa2gen, on packed documents of their own lengths.

    python examples/finetune_transformers.py                            a tiny model of random weights
    python examples/finetune_transformers.py --model NAME_OR_FOLDER     one of yours

On a GPU if there is one. Compares the losses with those of transformers' sdpa. Says "right".
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DataCollatorWithFlattening

from fa2gen.integrations.transformers import register, report

STEPS = 4
TINY = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
LENGTHS = (61, 9, 30, 44)


def model_of(name: str | None, attention: str) -> Any:
    """The same weights for every attention."""
    torch.manual_seed(0)
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16, attn_implementation=attention)
    config = AutoConfig.for_model("llama", vocab_size=256, num_key_value_heads=2, **TINY)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)


def losses_of(model: Any, batch: dict[str, Any]) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(STEPS):
        loss = model(**batch, use_cache=False).loss  # with a cache, sdpa would not look for documents
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a name or folder that transformers knows")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    documents = [{"input_ids": torch.randint(256, (length,), generator=generator).tolist()} for length in LENGTHS]
    # Documents one behind the other in a batch of one; position_ids begin anew with each.
    batch = {name: x.to(device) for name, x in DataCollatorWithFlattening()(documents).items() if hasattr(x, "to")}

    register()  # the one line: from here on transformers knows "fa2gen"
    model = model_of(given.model, "fa2gen").to(device)
    for line in report(model):
        print(line)
    ours = losses_of(model, batch)
    sdpa = losses_of(model_of(given.model, "sdpa").to(device), batch)
    print(f"fa2gen: {' '.join(f'{loss:.3f}' for loss in ours)}")
    print(f"sdpa:   {' '.join(f'{loss:.3f}' for loss in sdpa)}")
    print("right" if torch.allclose(torch.tensor(ours), torch.tensor(sdpa), atol=0.01) else "WRONG")


if __name__ == "__main__":
    main()
