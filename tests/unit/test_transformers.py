"""transformers on fa2gen: models of many architectures are what they are with eager attention, or say why not.

The reference on the CPU computes in fp32 what kernels compute in 16 bits; here it is let to take fp32 as well, so that
results can be compared to the last bits.
"""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
import transformers
from transformers import AttentionInterface, masking_utils

from fa2gen import InvalidInput, UnsupportedProblem, flash_attn_func
from fa2gen.integrations.transformers import attention, models, register, report, rows
from fa2gen.ops import validate
from tests.transformers_zoo import SEQLEN, VOCABULARY, ZOO, Animal, errors

MAJOR = int(transformers.__version__.partition(".")[0])
LLAMA, BART = (next(animal for animal in ZOO if animal.model_type == name) for name in ("llama", "bart"))
LEFT, RIGHT, HOLES = (torch.ones(2, SEQLEN, dtype=torch.long) for _ in range(3))
LEFT[0, :6] = RIGHT[0, 11:] = HOLES[0, 3:5] = 0
PACKED = [5, 9, SEQLEN - 14]
POSITIONS = torch.cat([torch.arange(n) for n in PACKED]).unsqueeze(0)


@pytest.fixture(autouse=True)
def fp32(request, monkeypatch):
    transformers.utils.logging.set_verbosity_error()
    register()
    attention._warned.clear()
    if "bf16" not in request.fixturenames:
        monkeypatch.setitem(validate.DTYPES, torch.float32, "fp32")


@pytest.fixture
def bf16():
    """In a test's arguments: the reference takes what kernels take."""


def pair(animal: Animal, implementation: str = "fa2gen"):
    """The model with eager attention, and the same with another."""
    eager, other = animal.build("eager"), animal.build(implementation)
    other.load_state_dict(eager.state_dict())
    return eager, other


def result(model, **inputs):
    out = model(**inputs)
    return out.logits if "logits" in out else out.last_hidden_state


def apart(model, ids):
    """What a model says of the sequences of a packed batch, one by one."""
    return torch.cat([result(model, input_ids=part, use_cache=False) for part in ids.split(PACKED, dim=1)], dim=1)


def refused(animal: Animal) -> list[str]:
    """What the model needs and flash_attn_func refuses, yet."""
    values = {"softcap": 30.0, "s_aux": torch.zeros(2, dtype=torch.bfloat16)}
    q = torch.zeros(1, 4, 2, 8, dtype=torch.bfloat16)
    found = []
    for name in animal.needs:
        try:
            assert name in inspect.signature(flash_attn_func).parameters
            flash_attn_func(q, q, q, **{name: values[name]})
        except (UnsupportedProblem, AssertionError):
            found.append(name)
    return found


@pytest.mark.parametrize("animal", [x for x in ZOO if x.since <= MAJOR], ids=str)
def test_a_model_equals_its_eager_self(animal):
    """Dense, padded to either side, packed: by fa2gen in every layer, and where that refuses, by name."""
    eager, model = pair(animal)
    inputs = animal.inputs()
    modes = {"dense": {}}
    if animal.kind != "vision":
        modes |= {"left": {"attention_mask": LEFT}, "right": {"attention_mask": RIGHT}}
    if missing := refused(animal):
        with pytest.raises(UnsupportedProblem, match=f"{missing[0]}.*eager"):
            model(**inputs)
        return
    with torch.no_grad(), attention.recorded() as calls, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, more in modes.items():
            difference = result(eager, **inputs, **more) - result(model, **inputs, **more)
            if name != "dense" and animal.kind != "both":
                difference = difference[more["attention_mask"].bool()]
            assert difference.abs().max() < 2e-6, name
        if animal.kind == "decoder" and animal.runs == "fa2gen":
            ids = inputs["input_ids"][:1]
            together = result(model, input_ids=ids, position_ids=POSITIONS, use_cache=False)
            assert (apart(eager, ids) - together).abs().max() < 2e-6
    assert {call.runs for call in calls.values()} == {animal.runs}


MASKED = [
    Animal("bloom", config={"n_head": 4, "n_layer": 2}, runs="own"),
    Animal("mpt", config={"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}, runs="own"),
    Animal("megatron-bert", "encoder", runs="own"),
    Animal("splinter", "encoder", config={"max_position_embeddings": 64}),
    Animal("doge", runs="sdpa"),
    Animal("phimoe", config={"sliding_window": 6, "num_local_experts": 4}, runs="sdpa", since=5),
    Animal("nllb-moe", "both", config={**BART.config, "num_experts": 4}),
    Animal("pegasus_x", "both", config=BART.config),
]


@pytest.mark.parametrize("animal", [x for x in MASKED if x.since <= MAJOR], ids=str)
def test_a_model_that_wants_masks_gets_them(animal):
    """Attention of its own, masks that are looked into, and windows and causality that nothing but a mask says."""
    eager, model = pair(animal)
    inputs = animal.inputs()
    if animal.kind == "both":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.no_grad(), attention.recorded() as calls, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for more in ({}, {"attention_mask": LEFT}):
            difference = result(eager, **inputs, **more) - result(model, **inputs, **more)
            if more and animal.kind != "both":
                difference = difference[LEFT.bool()]
            assert difference.abs().max() < 2e-6
    assert {call.runs for call in calls.values()} == {animal.runs} - {"own"} or MAJOR == 4


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "deepseek_v3"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_gives_sdpas_tokens(model_type, cache):
    """Left padding, a sliding window that is left behind, a narrower V."""
    if (model_type, cache, MAJOR) == ("deepseek_v3", "static", 4):
        pytest.skip("transformers 4 has no static cache for it")
    animal = next(x for x in ZOO if x.model_type == model_type)
    inputs = animal.inputs()["input_ids"]
    said = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "attention_mask": LEFT}
    if cache == "static":
        said |= {"cache_implementation": "static", "disable_compile": True}
    eager, model = pair(animal)
    with attention.recorded() as calls:
        assert model.generate(inputs, **said).tolist() == eager.generate(inputs, **said).tolist()
    assert {call.runs for call in calls.values()} == {"fa2gen"}


WINDOWED = [Animal("mistral", config={"sliding_window": 6}), Animal("moshi", config={"sliding_window": 6}, since=5)]


@pytest.mark.parametrize("animal", [x for x in WINDOWED if x.since <= MAJOR], ids=str)
def test_masks_of_windows_that_generate_makes_for_a_model(animal):
    """Of a static cache: made again by the model, with padding in the window, or for attention that hears of none."""
    eager, model = pair(animal)
    ids, mask = animal.inputs()["input_ids"][:, :8], torch.ones(2, 8, dtype=torch.long)
    mask[0, :5] = 0
    said = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "attention_mask": mask}
    said |= {"cache_implementation": "static", "disable_compile": True, "output_logits": True}
    found, wanted = (m.generate(ids, return_dict_in_generate=True, **said) for m in (model, eager))
    assert found.sequences.tolist() == wanted.sequences.tolist()
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(wanted.logits), rtol=0, atol=2e-6)


def test_a_static_cache_without_a_mask_hides_what_was_not_seen():
    eager, model = pair(LLAMA)
    ids = LLAMA.inputs()["input_ids"]
    caches = [transformers.StaticCache(config=eager.config, max_cache_len=40) for _ in range(2)]
    with torch.no_grad():
        for part in ids.split([12, 1, SEQLEN - 13], dim=1):
            expected, found = (
                result(m, input_ids=part, past_key_values=c) for m, c in zip((eager, model), caches, strict=True)
            )
            assert (expected - found).abs().max() < 2e-6


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "checkpointed", "reentrant"])
def test_gradients(reentrant):
    eager, model = (x.train() for x in pair(LLAMA))
    ids = LLAMA.inputs()["input_ids"]
    weights = torch.randn(2, SEQLEN, VOCABULARY) * LEFT.unsqueeze(-1)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for m in (eager, model):
        (result(m, input_ids=ids, attention_mask=LEFT, use_cache=False) * weights).sum().backward()
    for name, p in model.named_parameters():
        expected = eager.get_parameter(name).grad
        torch.testing.assert_close(p.grad, expected, rtol=1e-4, atol=2e-6 * expected.abs().max().item(), msg=name)


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_accuracy_in_bf16(bf16, model_type):
    """Logits and gradients within 1.1 times the mean error of eager bf16, both against eager fp32, by its experts."""
    (animal,) = (x for x in ZOO if x.model_type == model_type)
    for found in errors(animal, "cpu"):
        assert max(found.logits, found.gradients) <= 1.1, found


def test_the_table_of_models_has_them_all():
    """docs/transformers-models.md, which tests/transformers_suite.py made: no test failed, no error is beyond 1.1."""
    lines = (Path(__file__).parents[2] / "docs" / "transformers-models.md").read_text().splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")][1:]
    assert [(name, runs) for name, runs, *_ in rows] == [(x.model_type, x.runs) for x in ZOO]
    for name, runs, tests, older, *ratios, tokens in rows:
        assert "passed" in tests and "failed" not in tests + older and tokens != "others", name
        assert runs == "sdpa" or all(float(x.split()[-1]) <= 1.1 for x in ratios), name


@pytest.mark.parametrize("mask", [LEFT, HOLES], ids=["left", "holes"])
def test_sequences_are_looked_for_once_a_forward(mask, monkeypatch):
    made = []
    for name in ("padded_plan", "_gathering_plan"):
        plan = getattr(rows, name)
        monkeypatch.setattr(rows, name, lambda *given, plan=plan, name=name: made.append(name) or plan(*given))
    eager, model = pair(LLAMA)
    ids = LLAMA.inputs()["input_ids"]
    with torch.no_grad():
        difference = result(eager, input_ids=ids, attention_mask=mask) - result(
            model, input_ids=ids, attention_mask=mask
        )
    assert difference[mask.bool()].abs().max() < 2e-6
    assert made == ["padded_plan" if mask is LEFT else "_gathering_plan"]


def test_packed_batches_by_cu_seq_lens():
    eager, model = pair(LLAMA)
    ids = LLAMA.inputs()["input_ids"][:1]
    bounds = torch.tensor([0, *PACKED]).cumsum(0).int()
    said = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 9, "max_length_k": torch.tensor(9)}
    with torch.no_grad():
        together = result(model, input_ids=ids, position_ids=POSITIONS, use_cache=False, **said)
        assert (apart(eager, ids) - together).abs().max() < 2e-6


@pytest.mark.parametrize("by", ["positions", "cu_seq_lens"])
@pytest.mark.parametrize("model_type", ["mistral", "gpt2"])
def test_a_packed_batch_that_is_refused_stays_apart(bf16, model_type, by):
    """Of fp32, which is refused: documents see no other, by sdpa either."""
    eager, model = pair(next(x for x in ZOO if x.model_type == model_type))
    ids = LLAMA.inputs()["input_ids"][:1]
    bounds = torch.tensor([0, *PACKED]).cumsum(0).int()
    said = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds} if by == "cu_seq_lens" else {}
    with torch.no_grad(), pytest.warns(UserWarning, match="sdpa"):
        together = result(model, input_ids=ids, position_ids=POSITIONS, use_cache=False, **said)
        assert (apart(eager, ids) - together).abs().max() < 2e-6


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_is_written_to_is_looked_at_anew(mode):
    with mode():
        positions, mask = torch.arange(SEQLEN).unsqueeze(0), torch.ones(2, SEQLEN, dtype=torch.bool)
        assert rows.Rows.of_positions(positions, 1).packed is None and rows.Rows.of(mask).joined
        positions.copy_(POSITIONS)
        mask.copy_(HOLES)
        assert rows.Rows.of_positions(positions, 1).packed is not None and not rows.Rows.of(mask).joined


def test_a_gap_in_positions_begins_no_sequence_beside_a_mask_or_a_cache():
    eager, model = pair(LLAMA)
    ids = LLAMA.inputs()["input_ids"][:1]
    said = {"input_ids": ids, "position_ids": torch.cat([torch.arange(10), torch.arange(SEQLEN - 10) + 50])[None]}
    with torch.no_grad():
        for more in ({"attention_mask": torch.ones_like(ids)}, {"use_cache": True}):
            assert (result(eager, **said, **more) - result(model, **said, **more)).abs().max() < 2e-6


# Masks ------------------------------------------------------------------------------------------------------------


def causal_mask(config, **said):
    """What the mask function makes of a model's call."""
    embeddings = torch.empty(2, SEQLEN, 32)
    usual = {"inputs_embeds": embeddings, "input_embeds": embeddings, "cache_position": torch.arange(SEQLEN)}
    usual |= {"cache": None, "past_key_values": None, "attention_mask": None}  # some by the names of older versions
    create = masking_utils.create_causal_mask
    parameters = inspect.signature(create).parameters
    return create(config=config, **{name: x for name, x in usual.items() if name in parameters} | said)


@pytest.fixture
def config():
    return LLAMA.build("fa2gen").config


def test_what_is_not_causal_windows_or_packed_is_a_mask_of_pairs(config):
    """Image tokens that see each other, a prefix, a rule of the user's: never taken for a causal mask."""
    images = torch.zeros(2, SEQLEN, dtype=torch.bool)
    images[:, 3:7] = True

    def overlay(batch, head, q, k):
        return images[batch, q] & images[batch, k]

    for said in ({"or_mask_function": overlay}, {"and_mask_function": overlay}):
        mask = causal_mask(config, **said)
        assert mask.shape == (2, 1, SEQLEN, SEQLEN)
    if MAJOR > 4:  # an intersection that holds a union
        mask = causal_mask(config, block_sequence_ids=images.long() - 1, position_ids=POSITIONS.expand(2, -1))
        assert mask.shape == (2, 1, SEQLEN, SEQLEN)


def test_masks_that_hide_nothing_are_none(config):
    assert causal_mask(config) is None
    assert causal_mask(config, attention_mask=torch.ones(2, SEQLEN)) is None
    assert causal_mask(config, position_ids=torch.arange(SEQLEN).expand(2, -1)) is None


INTERFACE = "attend = ALL_ATTENTION_FUNCTIONS[config._attn_implementation]\n"
ADDS = "class OwnAttention(Module):\n    def forward(self):\n        return softmax(scores + attention_mask)\n"


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("create_causal_mask(config, block_sequence_ids=ids)", {"overlays": True}),
        ("create_causal_mask(config, or_mask_function=image)", {"overlays": True}),
        ("create_causal_mask(config, or_mask_function=None)", {}),
        ("create_sliding_window_causal_mask(config)", {"makes_windows": True}),
        ("attend(self, q, sliding_window=self.sliding_window)", {"windows": True}),
        ("create_causal_mask(config, allow_is_causal_skip=False)", {"whole": True}),
        ('create_causal_mask(config, **{"allow_is_causal_skip": False})', {"whole": True}),
        ("class XAttention(Module):\n    def forward(self):\n        attend = " + INTERFACE, {"bidirectional": False}),
        ("class XAttention(Module):\n    is_causal = False\n    attend = " + INTERFACE, {"causal": False}),
        ("def __init__(self, is_causal: bool | None = False):", {"causal": False}),
        ("self.is_causal = False\nself.is_causal = is_causal", {"causal": False}),
        ("self.is_causal = False\nself.is_causal = config.is_decoder", {}),
        (ADDS, {"own": True}),
        ("attention_mask = torch.cat([attention_mask, bias.to(attention_mask.dtype)], dim=-1)", {"own": True}),
    ],
)
def test_what_a_models_source_says(tmp_path, line, found):
    model = tmp_path / "modeling_x.py"
    model.write_text(INTERFACE + line)
    assert models._read(str(model)) == models.Model(windows=False)._replace(**found)


def test_a_model_without_the_interface_has_attention_of_its_own_if_any(tmp_path):
    (tmp_path / "modeling_x.py").write_text(ADDS)
    (tmp_path / "modeling_y.py").write_text("self.language_model(attention_mask)")
    assert [models._read(str(tmp_path / name)).own for name in ("modeling_x.py", "modeling_y.py")] == [True, False]


@pytest.mark.skipif(
    MAJOR == 4 or not hasattr(masking_utils, "remap_positions_for_packed_sequence"), reason="transformers 5.24"
)
def test_the_compiler_finds_a_union_in_an_intersection(config):
    """Of a model without padding: its usual mask is None, one with images is a mask of pairs, whatever is loaded."""

    def shapes(images):
        mask = causal_mask(config, position_ids=POSITIONS.expand(2, -1), block_sequence_ids=images)
        return torch.zeros(1) if mask is None else torch.zeros(mask.dim())

    run = torch.compile(shapes, fullgraph=True, backend="eager")
    assert len(run(None)) == 1 and len(run(torch.zeros(2, SEQLEN, dtype=torch.long))) == 4


def compiled(model):
    torch.compiler.reset()
    return torch.compile(model, fullgraph=True, backend="aot_eager")


def test_a_padded_batch_compiles_to_one_graph():
    eager, model = pair(LLAMA)
    ids = LLAMA.inputs()["input_ids"]
    run = compiled(model)
    for mask in (LEFT, RIGHT):
        out = result(run, input_ids=ids, attention_mask=mask, use_cache=False)
        expected = result(eager, input_ids=ids, attention_mask=mask, use_cache=False)
        assert (out - expected)[mask.bool()].abs().max() < 2e-6
    out.sum().backward()
    out = result(run, input_ids=ids, attention_mask=HOLES, use_cache=False)
    assert out[0].isnan().any() and not out[1].isnan().any(), "a mask that a graph cannot serve is not served wrongly"


def test_positions_for_a_whole_batch_compile_to_one_graph_and_are_not_packed():
    eager, model = pair(LLAMA)
    ids, run = LLAMA.inputs()["input_ids"], compiled(model)
    with torch.no_grad():
        expected = result(eager, input_ids=ids, use_cache=False)
        for positions in (None, torch.arange(SEQLEN).unsqueeze(0)):
            out = result(run, input_ids=ids, position_ids=positions, use_cache=False)
            assert (out - expected).abs().max() < 2e-6
        with pytest.raises(RuntimeError, match=r"give it position_ids\.expand"):
            result(run, input_ids=ids, position_ids=POSITIONS, use_cache=False)


@pytest.mark.skipif(MAJOR == 4, reason="masks of static caches differ there")
def test_the_next_token_of_a_static_cache_compiles_to_one_graph():
    eager, model = pair(LLAMA)
    ids = LLAMA.inputs()["input_ids"]
    logits = []
    for m, run in ((eager, eager), (model, compiled(model))):
        cache = transformers.StaticCache(config=m.config, max_cache_len=32)
        with torch.no_grad():
            m(input_ids=ids[:, :15], attention_mask=LEFT[:, :15], past_key_values=cache)
            mask = m.prepare_inputs_for_generation(
                ids[:, :16], past_key_values=cache, attention_mask=LEFT[:, :16], next_sequence_length=1
            )["attention_mask"]
            logits.append(result(run, input_ids=ids[:, 15:16], attention_mask=mask, past_key_values=cache))
    assert (logits[0] - logits[1]).abs().max() < 2e-6


# Refusals ---------------------------------------------------------------------------------------------------------


class Layer(torch.nn.Module):
    is_causal = True
    num_key_value_groups = 1

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4, dtype=torch.bfloat16)


def tensors(head_dim=16, dtype=torch.bfloat16):
    torch.manual_seed(0)
    return [torch.randn(2, 3, SEQLEN, head_dim).to(dtype) for _ in range(3)]


def by(fallback="sdpa"):
    return attention.attention_by(fallback)


def test_what_is_refused_runs_by_sdpa_with_one_warning(bf16):
    q, k, v = tensors(head_dim=264)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    with pytest.warns(
        UserWarning, match=r"Layer runs by transformers' sdpa: head_dim is 264; the largest is 256"
    ) as said:
        for _ in range(2):
            out, _ = by()(Layer(), q, k, v, None)
    assert len(said) == 1
    torch.testing.assert_close(out, expected)
    with pytest.raises(UnsupportedProblem, match="head_dim is 264"):
        by(None)(Layer(), q, k, v, None)


@pytest.mark.parametrize("window", [None, 4], ids=["", "window"])
@pytest.mark.parametrize("batch", ["dense", "left", "holes", "packed"])
def test_sdpa_gets_the_mask_that_it_would_have_had(batch, window):
    """A fallback sees the keys that fa2gen would have seen: padding, packing and windows are no less there."""
    q, k, v = tensors(dtype=torch.float32)
    said = {"sliding_window": window}
    mask = {"left": LEFT, "holes": HOLES}.get(batch)
    if batch == "packed":
        bounds = torch.tensor([0, *PACKED, *PACKED]).cumsum(0).int()
        said |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    given = None if mask is None else mask.bool()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of holes beside a window
        expected, _ = by()(Layer(), q, k, v, given, **said)
    zero = torch.zeros(1, 3, SEQLEN, SEQLEN)
    with pytest.warns(UserWarning, match="position_bias"):
        out, _ = by()(Layer(), q, k, v, given, position_bias=zero, **said)
    difference = (out - expected).abs() if mask is None else (out - expected)[mask.bool()].abs()
    assert difference.max() < 1e-5


@pytest.mark.skipif(MAJOR == 4, reason="T5 has attention of its own there")
def test_a_bias_is_of_the_keys_that_are_looked_at(bf16):
    """Padding to the right that is the same for all is cut off; so is the bias beside it."""
    t5 = next(x for x in ZOO if x.model_type == "t5").configured()
    eager, model = (
        transformers.T5EncoderModel._from_config(t5, attn_implementation=name).eval() for name in ("eager", "fa2gen")
    )
    model.load_state_dict(eager.state_dict())
    ids, mask = LLAMA.inputs()["input_ids"], RIGHT[:1].expand(2, -1)
    with torch.no_grad(), pytest.warns(UserWarning, match="position_bias"):
        difference = result(eager, input_ids=ids, attention_mask=mask) - result(
            model, input_ids=ids, attention_mask=mask
        )
    assert difference[mask.bool()].abs().max() < 2e-6


def test_what_would_be_left_out_is_refused():
    q, k, v = tensors()
    for said, match in (
        ({"indices": torch.zeros(2, SEQLEN, 4)}, "sparse attention"),
        ({"cache": object()}, "continuous batching"),
        ({"some_bias": torch.zeros(3, SEQLEN, SEQLEN)}, 'some_bias was given; take attn_implementation="eager"'),
        ({"sinks": torch.zeros(2, 3, SEQLEN, 1)}, "sinks was given"),
        ({"head_scale": torch.zeros(3)}, "head_scale was given"),
    ):
        with pytest.raises(UnsupportedProblem, match=match):
            by()(Layer(), q, k, v, None, **said)
    passed = {"encoder_hidden_states": torch.zeros(2, 9, 4), "images": torch.zeros(2, 1, 4, 4), "ids": torch.arange(3)}
    by()(Layer(), q, k, v, None, use_cache=True, logits_indices=None, **passed)


def test_norms_and_rotations_in_fp32_leave_a_model_in_its_dtype(bf16):
    q, k, v = tensors()
    expected, _ = by()(Layer(), q, k, v, None)
    for given in ((q.float(), k.float(), v), (q.float(), k.float(), v.float())):
        out, _ = by()(Layer(), *given, None)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out, expected)


def test_names_that_transformers_looks_for_elsewhere_are_refused():
    with pytest.raises(ValueError, match="flash"):
        register("my_flash")
    with pytest.raises(ValueError, match="fallback"):
        register(fallback="eager")
    assert "fa2gen" in AttentionInterface()


def test_report():
    model = LLAMA.build("fa2gen")
    (line, _) = report(model)
    assert line.runs == "fa2gen" and line.module == "model.layers.0.self_attn"
    assert str(line).endswith("(LlamaAttention): 4/2 heads of 8, float32, causal")
    (line, _) = report(LLAMA.build("sdpa"))
    assert line.runs == "sdpa" and "attn_implementation is 'sdpa'" in line.why
    if MAJOR > 4:
        t5 = next(x for x in ZOO if x.model_type == "t5")
        with pytest.warns(UserWarning, match="position_bias"):
            lines = report(t5.build("fa2gen"), **t5.inputs())
        assert {line.runs for line in lines} == {"sdpa"} and "position_bias" in lines[0].why


def test_report_of_what_is_no_model():
    with pytest.raises(InvalidInput, match=r"Linear is no transformers model.*report\(model, input_ids=...\)"):
        report(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("model_type", ["bloom", "gpt_neox_japanese", "mpt"])
def test_report_says_own(model_type):
    """Of attention that no attn_implementation reaches, wherever in its class it is computed."""
    animal = next((x for x in MASKED if x.model_type == model_type), Animal(model_type))
    lines = report(animal.build("fa2gen"))
    assert [line.runs for line in lines] == ["own"] * 2


def test_report_of_a_model_that_is_refused_says_why():
    model = LLAMA.build("fa2gen")
    sinks = {"sinks": torch.zeros(4)}
    with model.model.layers[0].self_attn.register_forward_pre_hook(lambda _, x, y: (x, y | sinks), with_kwargs=True):
        first, second = report(model)
    assert first.runs == "refused" and "sinks was given" in first.why and "not reached" in second.why
    with pytest.raises(ValueError, match="input_ids"):  # the model's own, of inputs that are given
        report(model, use_cache=False)
