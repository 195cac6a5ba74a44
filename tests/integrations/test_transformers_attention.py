"""Models of transformers attend by a scheme, and nothing that they ask of attention is lost."""

import copy
import gc
import subprocess
import sys

import pytest
import torch
import transformers
from tiny_models import DECODERS, SIZES, cosine, decoder, eagerly, prompts
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

import tokquant as tq
from tokquant.integrations.transformers import TokquantCache, observing, register, registration, use
from tokquant.integrations.transformers.masks import Ordered

pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.fixture
def without_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("padding", [None, "left", "right"], ids=["whole", "padded left", "padded right"])
@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_keeps_its_logits(name, padding):
    model, given = decoder(name), prompts(padding)
    tokens = given["attention_mask"].bool()
    exact = eagerly(model)(**given).logits[tokens]
    same = use(model, "none", backend="reference")(**given).logits[tokens]
    assert (same - exact).abs().max() < 2e-5
    near = use(model, "int8", backend="reference")(**given).logits[tokens]
    assert cosine(near, exact) > 0.999 and not torch.equal(near, exact)


def test_a_decoder_runs_on_the_kernels_of_its_device():
    model, given = decoder("mistral, a window"), prompts("left")
    tokens = given["attention_mask"].bool()
    same = use(model, "none")(**given).logits[tokens]
    assert (same - eagerly(model)(**given).logits[tokens]).abs().max() < 2e-5


@pytest.mark.parametrize("cache", [None, "codes"], ids=["no cache", "a cache of codes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_within_autocast_a_model_attends_in_its_type_though_rotated_keys_have_another(dtype, cache):
    model, given = decoder().to(dtype), prompts("left")
    tokens = given["attention_mask"].bool()
    exact = eagerly(model.float())(**given).logits[tokens]
    use(model.to(dtype), "kv-int8", backend="reference")
    held = TokquantCache(model) if cache else None
    with torch.autocast("cpu", torch.bfloat16):
        found = model(**given, past_key_values=held, use_cache=held is not None).logits[tokens]
        assert cosine(found, exact) > 0.997
        if held is not None:
            assert held.layers[0].held.dtype == torch.bfloat16
            more = {"attention_mask": torch.ones(2, 21, dtype=torch.long), "input_ids": given["input_ids"][:, :1]}
            more["attention_mask"][:, :20] = given["attention_mask"]
            assert model(**more, past_key_values=held).logits.shape == (2, 1, 128)


def test_an_encoder_keeps_its_states_without_causality():
    sizes = dict(SIZES, num_attention_heads=4)
    del sizes["num_key_value_heads"]
    model = transformers.BertModel(transformers.BertConfig(**sizes)).eval()
    given = prompts("right")
    tokens = given["attention_mask"].bool()
    exact = eagerly(model)(**given).last_hidden_state[tokens]
    assert (use(model, "none", backend="reference")(**given).last_hidden_state[tokens] - exact).abs().max() < 2e-5
    assert cosine(use(model, "int8", backend="reference")(**given).last_hidden_state[tokens], exact) > 0.999


def whisper():
    config = transformers.WhisperConfig(
        vocab_size=128, d_model=64, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=8, max_source_positions=30, max_target_positions=40,
        pad_token_id=0, bos_token_id=1, eos_token_id=None, decoder_start_token_id=1, init_std=0.15,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config).eval()


def test_cross_attention_sees_all_of_the_encoder():
    model, given = whisper(), dict(input_features=torch.randn(2, 8, 60), decoder_input_ids=torch.randint(3, 128, (2, 12)))
    exact = eagerly(model)(**given).logits
    assert (use(model, "none", backend="reference")(**given).logits - exact).abs().max() < 2e-5
    assert cosine(use(model, "int8", backend="reference")(**given).logits, exact) > 0.999


def test_a_position_bias_is_added():
    config = transformers.T5Config(
        vocab_size=128, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0, eos_token_id=None
    )
    model, given = transformers.T5ForConditionalGeneration(config).eval(), prompts("right")
    given["decoder_input_ids"] = torch.randint(3, 128, (2, 9))
    exact = eagerly(model)(**given).logits
    assert (use(model, "none", backend="reference")(**given).logits - exact).abs().max() < 2e-5 * exact.abs().max()
    biases = [m for n, m in model.named_modules() if n.endswith("relative_attention_bias")]
    for each in biases:
        each.weight.zero_()
    assert (use(model, "none", backend="reference")(**given).logits - exact).abs().max() > 0.01 * exact.abs().max()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_chunks_of_a_prompt_see_what_came_before(cache):
    model, given = decoder("mistral, a window"), prompts("left")
    tokens = given["attention_mask"].bool()
    exact = eagerly(model)(**given).logits[tokens]
    use(model, "none", backend="reference")
    kept = {
        "dynamic": lambda: transformers.DynamicCache(config=model.config),
        "static": lambda: transformers.StaticCache(config=model.config, max_cache_len=32),
    }[cache]()
    parts, end = [], 0
    for n in (9, 6, 1, 4):
        mask = given["attention_mask"][:, : end + n]
        ids = given["input_ids"][:, end : end + n]
        # positions are counted from the first column here, as in a single call
        places = torch.arange(end, end + n)[None]
        parts.append(model(ids, attention_mask=mask, position_ids=places, past_key_values=kept).logits)
        end += n
    assert (torch.cat(parts, dim=1)[tokens] - exact).abs().max() < 2e-5


def test_a_mask_of_the_callers_is_heeded():
    model, given = decoder(), prompts()
    mask = torch.rand(2, 1, 20, 20) < 0.6
    mask |= torch.eye(20, dtype=torch.bool)
    exact = eagerly(model)(given["input_ids"], attention_mask=torch.zeros(()).masked_fill(~mask, -torch.inf)).logits
    use(model, "none", backend="reference")
    assert (model(given["input_ids"], attention_mask=mask).logits - exact).abs().max() < 2e-5


def test_packed_sequences_do_not_see_one_another():
    model, ids = decoder(), prompts(batch=1)["input_ids"]
    places = torch.cat([torch.arange(8), torch.arange(12)])[None]
    exact = torch.cat([eagerly(model)(part).logits for part in (ids[:, :8], ids[:, 8:])], dim=1)
    use(model, "none", backend="reference")
    assert (model(ids, position_ids=places, use_cache=False).logits - exact).abs().max() < 2e-5
    starts = dict(cu_seq_lens_q=torch.tensor([0, 8, 20]), cu_seq_lens_k=torch.tensor([0, 8, 20]))
    with pytest.raises(NotImplementedError, match=r"layers\.0\.self_attn: cu_seq_lens_q: packed sequences are told by"):
        model(ids, **starts)


@pytest.mark.parametrize("create", [create_causal_mask, create_sliding_window_causal_mask])
@pytest.mark.parametrize("padding", [None, "left"])
def test_masks_of_order_and_padding_are_written_out_only_for_who_asks(create, padding):
    config = transformers.MistralConfig(**SIZES, sliding_window=5)
    register("none")
    given = dict(inputs_embeds=torch.zeros(2, 20, 4), attention_mask=prompts(padding)["attention_mask"], past_key_values=None)
    config._attn_implementation = "tokquant"
    mask = create(config, **given)
    config._attn_implementation = "sdpa"
    exact = create(config, **given)
    if exact is None or mask is None:
        assert mask is exact is None
        return
    assert isinstance(mask, Ordered) and mask.shape == exact.shape
    with torch._C.DisableTorchFunctionSubclass():
        assert mask.untyped_storage().nbytes() == 1
    for look in (lambda x: x[:, :, 3:, :10], lambda x: x & True, lambda x: ~x, lambda x: torch.where(x, 1.0, 0.0)):
        assert torch.equal(look(mask), look(exact)) and type(look(mask)) is torch.Tensor


def test_a_mask_stays_what_it_is_on_its_way_to_another_device():
    config = transformers.MistralConfig(**SIZES, sliding_window=5)
    register("none")
    config._attn_implementation = "tokquant"
    given = dict(inputs_embeds=torch.zeros(2, 20, 4), attention_mask=prompts("left")["attention_mask"], past_key_values=None)
    mask = create_sliding_window_causal_mask(config, **given)
    moved = mask.to("cpu", non_blocking=True)
    assert isinstance(moved, Ordered) and moved.window == 5 and torch.equal(moved.tokens, mask.tokens)
    assert torch.equal(moved & True, mask & True) and type(mask.to(torch.float16)) is torch.Tensor


def names_seen(model, given):
    seen = []
    with observing(model, lambda name, q, k, v: seen.append((name, q.shape, k.shape))):
        model(**given)
    return seen


def test_names_are_those_of_the_model():
    model, given = decoder(), prompts()
    assert names_seen(model, given) == [
        (f"model.layers.{i}.self_attn", (2, 4, 20, 16), (2, 2, 20, 16)) for i in range(SIZES["num_hidden_layers"])
    ]
    assert model.config._attn_implementation == "sdpa" and not hasattr(model.model.layers[0].self_attn, "_tokquant")


def test_what_is_observed_takes_no_cache_of_codes():
    model = use(decoder(), "kv-int8", backend="reference")
    cache = TokquantCache(model)
    with (
        observing(model, lambda *_: None),
        pytest.raises(NotImplementedError, match=r"layers\.0.*: past_key_values: .* without it"),
    ):
        model(**prompts(), past_key_values=cache)
    assert cache.get_seq_length() == 0


def test_each_of_several_models_has_its_own_scheme():
    given = prompts()
    models = [use(decoder(), scheme, backend="reference") for scheme in ("none", "int8", "int4")]
    alone = [model(**given).logits for model in models]
    for model, out in zip(reversed(models), reversed(alone), strict=True):
        assert torch.equal(model(**given).logits, out)
    assert not torch.equal(alone[0], alone[1]) and not torch.equal(alone[1], alone[2])
    assert torch.equal(copy.deepcopy(models[2])(**given).logits, alone[2])


def test_a_map_gives_each_layer_its_scheme_by_its_name():
    given, layers = prompts(), {"model.layers.0.*": "int4", "*": "none"}
    mapped = tq.SchemeMap.from_data({"layers": layers})
    chosen = use(decoder(), mapped, backend="reference")(**given).logits
    # found by name alone, among all models that live
    register(mapped, backend="reference", name="tokquant-map")
    others = [decoder() for _ in range(2)]
    for model in others:
        model.set_attn_implementation("tokquant-map")
        assert torch.equal(model(**given).logits, chosen)
    every = use(decoder(), "int4", backend="reference")(**given).logits
    assert not torch.equal(chosen, every)
    # a name that a scheme was registered under goes before a model's own
    use(others[0], "int4", backend="reference").set_attn_implementation("tokquant-map")
    assert torch.equal(others[0](**given).logits, chosen)


def test_what_is_registered_serves_models_without_a_scheme_of_their_own():
    given = prompts()
    register("int4", backend="reference")
    model = transformers.AutoModelForCausalLM.from_config(decoder().config, attn_implementation="tokquant").eval()
    four = model(**given).logits
    use(decoder(), "int8", backend="reference")
    assert torch.equal(model(**given).logits, four)
    register("none", backend="reference")
    assert not torch.equal(model(**given).logits, four)


def test_a_registered_map_of_one_scheme_knows_layers_by_their_names():
    register(tq.SchemeMap.from_data({"layers": {"model.layers.*": "none"}}), name="tokquant-one", backend="reference")
    model, given = decoder(), prompts()
    exact = eagerly(model)(**given).logits
    model.set_attn_implementation("tokquant-one")
    torch.testing.assert_close(model(**given).logits, exact)


def test_a_module_that_is_replaced_leaves_the_others_their_scheme():
    register(tq.SchemeMap.from_data({"layers": {"*": "none"}}), backend="reference")
    model, given = use(decoder(), "int4", backend="reference"), prompts()
    model.model.layers[0].self_attn = decoder().model.layers[0].self_attn
    model.model.layers[0].self_attn.config = model.config
    mixed = tq.SchemeMap.from_data({"layers": {"model.layers.0.*": "none", "*": "int4"}})
    found = model(**given).logits
    assert torch.equal(found, use(decoder(), mixed, backend="reference")(**given).logits)


def test_a_bare_module_without_a_model_says_so():
    register(tq.SchemeMap.from_data({"layers": {"a": "int8", "b": "none"}}), name="tokquant-lost")
    model = decoder()
    model.set_attn_implementation("tokquant-lost")
    layer, rotary = model.model.layers[0], model.model.rotary_emb
    del model
    gc.collect()
    states = torch.randn(1, 4, 64)
    with pytest.raises(ValueError, match="is in no transformers model, so it has no name"):
        layer(states, position_embeddings=rotary(states, torch.arange(4)[None]))


def test_a_model_of_the_config_of_another_that_was_changed_says_what_to_do(monkeypatch):
    monkeypatch.setattr(registration, "IMPLEMENTATIONS", set())  # as before any register()
    model = decoder()
    use(model, "none")
    with pytest.raises(ValueError, match=r"has no scheme.*if use\(\) changed another model.*a copy of the config"):
        type(model)(model.config).eval()(**prompts())


def test_training_and_weights_are_refused():
    model, given = use(decoder(), "int8", backend="reference"), prompts()
    with pytest.raises(RuntimeError, match=r"model\.layers\.0\.self_attn: q: requires grad"), torch.enable_grad():
        model(**given)
    model.model.layers[1].self_attn.attention_dropout = 0.1
    with pytest.raises(NotImplementedError, match=r"model\.layers\.1\.self_attn: dropout: 0\.1 .* call model\.eval\(\)"):
        model.train()(**given)
    with pytest.raises((NotImplementedError, ValueError), match="eager"):
        model.eval().config.output_attentions = True
        model(**given)


def test_values_of_another_size_than_keys_are_refused_by_name():
    model = use(decoder(), "int8", backend="reference")
    attend = transformers.AttentionInterface()["tokquant"]
    q, k, v = torch.randn(1, 4, 6, 16), torch.randn(1, 2, 6, 16), torch.randn(1, 2, 6, 8)
    with pytest.raises(NotImplementedError, match=r"layers\.0\.self_attn: head_dim: that of query, key and value is 16, 16, 8"):
        attend(model.model.layers[0].self_attn, q, k, v, None)
    with pytest.raises(NotImplementedError, match="indices: attention to chosen keys"):
        attend(model.model.layers[0].self_attn, q, k, k, None, indices=torch.zeros(1))


def test_schemes_of_heads_are_those_of_every_layer():
    heads = tq.HeadSchemes(((1, tq.preset("int8")), (1, tq.preset("int8-fp16"))))
    mapped = tq.SchemeMap.from_data({"layers": {"*": {"heads": {"0": "int8", "1": "int8-fp16"}}}})
    given = prompts()
    ours, theirs = (use(decoder(), each, backend="reference")(**given).logits for each in (heads, mapped))
    assert torch.equal(ours, theirs) and not torch.equal(ours, use(decoder(), "int8", backend="reference")(**given).logits)


def test_of_a_wrapper_the_model_inside_is_named():
    model, given = decoder(), prompts()
    wrapped = torch.nn.Sequential(torch.compile(model, backend="eager"))
    with pytest.raises(
        TypeError, match=r"model: a Sequential; .*; this one holds such a model: model\.get_submodule\('0\._orig_mod'\)"
    ):
        use(wrapped, "int8")
    use(wrapped.get_submodule("0._orig_mod"), "int8", backend="reference")
    assert torch.equal(wrapped[0](**given).logits, use(decoder(), "int8", backend="reference")(**given).logits)


def test_what_does_not_fit_a_model_leaves_it_as_it_was():
    model = decoder()
    ones = {"k_scale": torch.ones(2, 1, 1), "v_scale": torch.ones(2, 1, 1)}
    static = tq.Scales(tq.preset("kv-fp8"), {"layers.0": ones})
    both = tq.Scales(tq.preset("kv-fp8"), {f"model.layers.{i}.self_attn": ones for i in range(2)})
    half = tq.SchemeMap.from_data({"name": "half", "layers": {"*.0.*": "kv-fp8", "*": "int8"}})
    for wrong, message in [
        (dict(scheme="int9"), "int9"),
        (dict(scheme="kv-fp8"), "scheme 'kv-fp8' is static; calibrate it"),
        (dict(scheme="int8", scales=static), "has no static part"),
        (dict(scheme="kv-fp8", scales=static), "LlamaForCausalLM has no module 'layers.0'"),
        (
            dict(scheme=half, scales=both),
            r"layers\.1\.self_attn takes scheme 'int8', which has no use for them; calibrate for 'half'",
        ),
        (dict(scheme="int8", backend="cuda"), "backend: 'cuda' is not valid"),
        (
            dict(scheme=tq.SchemeMap.from_data({"layers": {"model.layer.*": "int8", "*": "none"}})),
            r"'model\.layer\.\*' matches no module",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            use(model, **wrong)
    assert model.config._attn_implementation == "sdpa" and not hasattr(model, "_tokquant")
    with pytest.raises(ValueError, match=r"name: 'my-flash' means something else to transformers"):
        register("int8", name="my-flash")
    with pytest.raises(TypeError, match="model: a Linear"):
        use(torch.nn.Linear(2, 2), "int8")


def test_a_model_that_looks_up_no_attention_is_refused():
    config = transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2)
    model = transformers.BloomForCausalLM(config)
    with pytest.raises(NotImplementedError, match="BloomForCausalLM has its attention written out"):
        use(model, "int8")


def test_importing_tokquant_imports_neither_transformers_nor_the_compiler():
    code = "import sys, tokquant, tokquant.cli; assert not {'transformers', 'torch._dynamo'} & sys.modules.keys()"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
