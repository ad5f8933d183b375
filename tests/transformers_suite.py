"""A table of models in transformers on fa2gen: transformers' own tests of attention, errors, tokens.

    python -m tests.transformers_suite FOLDER [--only llama ...] [--device cuda]

FOLDER is `tests` of transformers' repository, or of its source distribution (which has the tests that all models share,
and no model's own), of the version that is installed. parameterized and accelerate must be there. What is run, of
`test_modeling_common.ModelTesterMixin`:

    the tests that compare sdpa with eager attention, in fp32, fp16 and bf16, padded to either side and without a mask,
    with fa2gen in the place of sdpa; those that compare flash attention with eager attention; and a model from a
    config, in training.

transformers leaves out what a model says it does not have. Beside them: whether generate gives sdpa's tokens, and mean
errors of logits and gradients in bf16 over those of eager attention, in batches of all kinds.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import types
import unittest
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import transformers
from torch import Tensor

from fa2gen.integrations.transformers import attention, register
from fa2gen.ops import validate
from tests.transformers_zoo import ZOO, Animal, errors

PACKAGE = "transformers_tests"
MAJOR = int(transformers.__version__.partition(".")[0])


class _Absent(types.ModuleType):
    """A module that the folder does not have: whatever is imported from it is a class without anything."""

    def __getattr__(self, name: str) -> type:
        return type(name, (), {})


def common_tests(folder: Path) -> Any:
    """The module test_modeling_common of a folder."""
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(folder)]
    sys.modules[PACKAGE] = package
    for name in ("generation", "exporters"):
        if not (folder / name).is_dir():
            sys.modules[f"{PACKAGE}.{name}"] = _Absent(name)
    for name in ("generation.test_utils", "exporters.test_export"):
        if not (folder / f"{name.replace('.', '/')}.py").is_file():
            sys.modules[f"{PACKAGE}.{name}"] = _Absent(name)
    return importlib.import_module(f"{PACKAGE}.test_modeling_common")


class _Tester:
    """Configs and inputs of an animal, as transformers' tests ask a model's tester for them."""

    num_masks, mask_length = 4, 16  # of an image's patches

    def __init__(self, animal: Animal) -> None:
        self._animal = animal
        if animal.kind == "vision":  # patches, and but for one model a token of the whole image
            self.seq_length = 16 + (animal.model_type != "siglip_vision_model")

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Tensor]]:
        inputs = self._animal.inputs(batch=7)
        if self._animal.kind != "vision":
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if self._animal.kind == "both":
            inputs["decoder_attention_mask"] = torch.ones_like(inputs["decoder_input_ids"])
        return self._animal.configured(), inputs


def suite_of(animal: Animal, common: Any) -> unittest.TestCase:
    """A test case of the animal with the tests of `common`."""
    config = type(animal.configured())
    autos = [transformers.AutoModel, *[transformers.AutoModelForCausalLM] * (animal.kind == "decoder")]
    classes = tuple(dict.fromkeys(auto._model_mapping[config] for auto in autos if config in auto._model_mapping))
    said = {"model_tester": _Tester(animal), "all_model_classes": classes}
    return type(animal.model_type, (common.ModelTesterMixin, unittest.TestCase), said)()


@contextmanager
def in_the_place_of_sdpa(implementation: str) -> Iterator[None]:
    """An attention implementation, where a test loads a model with sdpa."""
    load = transformers.PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]

    def loaded(cls: Any, *given: Any, **said: Any) -> Any:
        if said.get("attn_implementation") == "sdpa":
            said["attn_implementation"] = implementation
        return load(cls, *given, **said)

    with patch.object(transformers.PreTrainedModel, "from_pretrained", classmethod(loaded)):
        yield


def tests_of(case: Any, common: Any) -> Iterator[tuple[str, Callable[[str], None]]]:
    """(name, test of an attention implementation)."""
    for name, *said in common.TEST_EAGER_MATCHES_SDPA_INFERENCE_PARAMETERIZATION:

        def as_sdpa(implementation: str, name: str = name, said: Any = said) -> None:
            # Softcap and sinks, which sdpa has not, are no reason to leave a model out.
            with in_the_place_of_sdpa(implementation), patch.object(case.all_model_classes[0], "_supports_sdpa", True):
                common._test_eager_matches_sdpa_inference(case, name, *said)

        yield name, as_sdpa
    for side in ("left", "right"):
        yield f"flash_{side}", partial(case.flash_attn_inference_equivalence, padding_side=side)
    yield "from_config", case.flash_attn_from_config


class Outcome(NamedTuple):
    """Of an architecture: by what its attention ran, and how many tests passed, failed and were left out, and why."""

    runs: set[str]
    passed: int
    failed: dict[str, str]
    left_out: dict[str, str]


def outcome_of(animal: Animal, common: Any) -> Outcome:
    """Runs the tests; fp32 is let through, as in test_transformers.py, so that they compare to the last bits."""
    case, passed = suite_of(animal, common), 0
    failed: dict[str, str] = {}
    left_out: dict[str, str] = {}
    with attention.recorded() as calls, patch.dict(validate.DTYPES, {torch.float32: "fp32"}):
        for name, test in tests_of(case, common):
            try:
                test("fa2gen")
                passed += 1
            except unittest.SkipTest as reason:
                left_out[name] = str(reason)
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
                try:
                    test("eager")
                    failed[name] = said
                except Exception:
                    left_out[name] = f"fails with eager attention, too: {said}"
        return Outcome({call.runs for call in calls.values()}, passed, failed, left_out)


def tokens_agree(animal: Animal) -> bool:
    """Whether generate gives sdpa's tokens, of prompts of two lengths; in fp32."""
    inputs = animal.inputs()["input_ids"]
    mask = torch.ones_like(inputs)
    mask[0, :6] = 0
    said = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "attention_mask": mask}
    with patch.dict(validate.DTYPES, {torch.float32: "fp32"}):
        theirs, ours = (animal.build(name).generate(inputs, **said) for name in ("sdpa", "fa2gen"))
    return bool(torch.equal(theirs, ours))


def row_of(animal: Animal, common: Any, device: str) -> tuple[str, ...]:
    """Of the table: architecture, by what it runs, tests, logits, gradients, tokens."""
    found = list(errors(animal, device))
    runs = set().union(*(x.runs for x in found))
    tests = "-"
    if common is not None:
        suite = outcome_of(animal, common)
        runs |= suite.runs
        tests = f"{suite.passed} passed, {len(suite.failed)} failed, {len(suite.left_out)} left out"
        for name, why in (suite.failed | suite.left_out).items():
            print(f"  {animal.model_type} {name}: {why.strip().splitlines()[0][:200]}", file=sys.stderr)
    # sdpa has neither softcap nor sinks.
    generates = animal.kind == "decoder" and not animal.needs and device == "cpu"
    tokens = ("sdpa's" if tokens_agree(animal) else "others") if generates else "-"
    ratios = (f"{min(x):.2f} to {max(x):.2f}" for x in zip(*((x.logits, x.gradients) for x in found), strict=True))
    return animal.model_type, " and ".join(sorted(runs)), tests, *ratios, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="without one, no tests of transformers' are run")
    parser.add_argument("--only", nargs="+", help="architectures")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    register()
    common = common_tests(given.folder) if given.folder else None
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, {given.device}\n")
    print("| architecture | runs by | transformers' tests | logits | gradients | tokens |\n|---|---|---|---|---|---|")
    for animal in ZOO:
        if animal.since <= MAJOR and (not given.only or animal.model_type in given.only):
            print(f"| {' | '.join(row_of(animal, common, given.device))} |", flush=True)


if __name__ == "__main__":
    main()
