"""generate() on codes: greedy, in beams, assisted, padded; and how many bytes they take."""

import copy

import pytest
import torch
import transformers
from tiny_models import DECODERS, SIZES, cosine, decoder, eagerly, prompts

import tokquant as tq
from tokquant.integrations.transformers import TokquantCache, register, run_observed, use

NEW = 4


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def generated(model, given, cache=None, **options):
    """Tokens, and the logits of each new one `[B, new, vocabulary]`."""
    found = model.generate(
        **given,
        past_key_values=cache,
        max_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return found.sequences, torch.stack(found.logits, dim=1)


def cache_of(model, scheme="none", **options):
    return TokquantCache(model, scheme, backend="reference", **options)


@pytest.mark.parametrize(("name", "padding"), [(name, "left") for name in DECODERS] + [("llama, grouped heads", None)])
def test_greedy_generation_is_that_of_eager_attention(name, padding):
    model, given = decoder(name), prompts(padding)
    tokens, exact = generated(eagerly(model), given)
    use(model, "none", backend="reference")
    for cache in (None, cache_of(model)):
        same, logits = generated(model, given, cache)
        assert torch.equal(same, tokens) and (logits - exact).abs().max() < 5e-5
    # the same tokens once more, in eight bits
    cache = cache_of(model, "kv-int8")
    steps = [model(**given, past_key_values=cache).logits[:, -1]]
    for t in range(20, 22):
        mask = torch.nn.functional.pad(given["attention_mask"], (0, t - 19), value=1)
        steps.append(model(tokens[:, t : t + 1], attention_mask=mask, past_key_values=cache).logits[:, -1])
    near = torch.stack(steps, dim=1)
    assert cosine(near, exact[:, :3]) > 0.999 and not torch.equal(near, exact[:, :3])
    assert all(layer.held.lengths == [15 if padding else 22, 22] for layer in cache.layers)


def test_generation_runs_on_kernels_of_the_cpu():
    model, given = decoder("gpt-oss, sinks"), prompts("left")
    tokens, exact = generated(eagerly(model), given)
    same, logits = generated(use(model, "none"), given, TokquantCache(model, "none"))
    assert torch.equal(same, tokens) and (logits - exact).abs().max() < 5e-5


@pytest.mark.parametrize("scheme", ["kv-int4", "kv-int4-kivi"])
def test_a_prompt_in_chunks_or_token_by_token_gives_the_same_as_all_at_once(scheme):
    model, given = use(decoder("qwen3, normed heads of their own size"), scheme, backend="reference"), prompts("left")
    wide = scheme == "kv-int4-kivi"  # whose last tokens wait in 16 bits
    results = []
    for chunks in ((20,), (12, 8), (1,) * 20):
        cache, parts, end = cache_of(model, scheme), [], 0
        for n in chunks:
            ids, mask = given["input_ids"][:, end : end + n], given["attention_mask"][:, : end + n]
            places = torch.arange(end, end + n)[None]
            parts.append(model(ids, attention_mask=mask, position_ids=places, past_key_values=cache).logits)
            end += n
        results.append(torch.cat(parts, dim=1)[given["attention_mask"].bool()])
    for each in results[1:]:
        assert (each - results[0]).abs().max() < 1e-4
    assert wide == (cache.layers[0].held.codes(1)[0].shape[2] == 0)


def test_right_padding_is_not_kept_either():
    model, given = use(decoder(), "none", backend="reference"), prompts("right")
    cache = cache_of(model)
    out = model(**given, past_key_values=cache).logits
    tokens = given["attention_mask"].bool()
    exact = eagerly(model)(**given).logits
    assert (out - exact)[tokens].abs().max() < 2e-5 and cache.layers[1].held.lengths == [13, 20]
    # what comes next is behind the padding, at its own position
    mask = torch.nn.functional.pad(given["attention_mask"], (0, 1), value=1)
    ids, places = torch.tensor([[5], [6]]), torch.tensor([[13], [20]])
    use(model, "none", backend="reference")
    decoded = model(ids, attention_mask=mask, position_ids=places, past_key_values=cache).logits[0, 0]
    alone = torch.cat([given["input_ids"][:1, :13], ids[:1]], dim=1)
    assert (decoded - eagerly(model)(alone).logits[0, -1]).abs().max() < 2e-5


def test_beams_share_pages_and_find_what_they_find_without_codes():
    model, given = decoder(), prompts("left")
    options = dict(num_beams=3, length_penalty=0.5)
    tokens, _ = generated(eagerly(model), given, **options)
    cache = cache_of(use(model, "none", backend="reference"))
    assert torch.equal(generated(model, given, cache, **options)[0], tokens)
    assert cache.layers[0].held.batch == 6


def test_assisted_decoding_takes_drafts_back():
    model, helper, given = decoder(), decoder("mistral, a window"), prompts(batch=1)
    tokens, _ = generated(eagerly(model), given)
    cache = cache_of(use(model, "none", backend="reference"))
    assert torch.equal(generated(model, given, cache, assistant_model=helper)[0], tokens)
    cropped = cache.get_seq_length()
    assert cropped == 20 + NEW - 1 and cache.layers[1].held.lengths == [cropped]


def test_crop_counts_columns_and_takes_back_tokens():
    model, given = use(decoder(), "kv-int8", backend="reference"), prompts("right")
    cache = cache_of(model, "kv-int8")
    model(**given, past_key_values=cache)
    cache.crop(-4)
    assert cache.get_seq_length() == 16 and cache.layers[0].held.lengths == [13, 16]
    cache.crop(-5)
    assert cache.layers[0].held.lengths == [11, 11] and cache.layers[0].tokens.all()
    with pytest.raises(ValueError, match="crop: -12 of 11 columns"):
        cache.crop(-12)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes == 0
    model(prompts(batch=3)["input_ids"], past_key_values=cache)
    assert cache.layers[0].held.lengths == [20] * 3


def test_sequences_are_chosen_and_repeated():
    model, given = use(decoder(), "none", backend="reference"), prompts("left")
    cache = cache_of(model)
    model(**given, past_key_values=cache)
    twice, second = copy.deepcopy(cache), copy.deepcopy(cache)
    twice.batch_repeat_interleave(2)
    second.batch_select_indices(torch.tensor([1]))
    assert twice.layers[0].held.lengths == [13, 13, 20, 20] and second.layers[1].held.lengths == [20]
    ids, ones = torch.tensor([[7], [8]]), torch.ones(2, 1).long()
    mask = torch.cat([given["attention_mask"], ones], dim=1)
    exact = model(ids, attention_mask=mask, past_key_values=cache).logits
    out = model(ids.repeat_interleave(2, 0), attention_mask=mask.repeat_interleave(2, 0), past_key_values=twice).logits
    assert (out - exact.repeat_interleave(2, 0)).abs().max() < 1e-5
    assert (model(ids[1:], attention_mask=mask[1:], past_key_values=second).logits - exact[1:]).abs().max() < 1e-5


@pytest.mark.parametrize("windows", [{}, {"sink": 4, "recent": 8}], ids=["codes", "windows"])
def test_a_saved_prompt_goes_on_as_the_one_that_was_kept(windows, tmp_path):
    s = tq.QuantScheme(**tq.preset("kv-int4").model_dump() | {"name": "s", "cache": windows})
    model, given = use(decoder(), s), prompts("left")
    cache = TokquantCache(model)
    model(input_ids=given["input_ids"][:, :-1], attention_mask=given["attention_mask"][:, :-1], past_key_values=cache)
    torch.save(cache, tmp_path / "prompt.pt")
    loaded = torch.load(tmp_path / "prompt.pt", weights_only=False)
    assert int(loaded.number) != int(cache.number) and loaded.memory == cache.memory
    kept, again = (model.generate(**given, past_key_values=each, max_new_tokens=6, do_sample=False) for each in (cache, loaded))
    assert torch.equal(kept, again) and loaded.get_seq_length() == cache.get_seq_length()


def test_a_window_lets_go_of_what_it_has_passed():
    small = tq.QuantScheme(**tq.preset("none").model_dump() | {"name": "small", "cache": {"page": 16}})
    model, given = decoder("gemma2, softcap and a scale"), prompts("left", tokens=240)
    exact = eagerly(model)(**given).logits[:, -40:]
    use(model, "none", backend="reference")
    cache, parts, end = cache_of(model, small), [], 0
    for n in (200, 10, 30):
        ids, mask = given["input_ids"][:, end : end + n], given["attention_mask"][:, : end + n]
        places = torch.arange(end, end + n)[None]
        parts.append(model(ids, attention_mask=mask, position_ids=places, past_key_values=cache).logits)
        end += n
    assert (torch.cat(parts[1:], dim=1) - exact).abs().max() < 5e-5
    windowed, whole = cache.layers
    # 7 before each query and 128 to take back, in pages of 16, and the last chunk
    assert whole.held.lengths == [233, 240] and all(7 + 128 <= n - 30 < 7 + 128 + 16 for n in windowed.held.lengths)
    assert cache.get_seq_length() == 240
    cache.crop(-35)
    again = model(
        given["input_ids"][:, 205:],
        position_ids=torch.arange(205, 240)[None],
        attention_mask=given["attention_mask"],
        past_key_values=cache,
    )
    assert (again.logits - exact[:, 5:]).abs().max() < 5e-5
    cache.crop(-100)
    with pytest.raises(ValueError, match="crop: -100; a layer with a window keeps 128 tokens to take back"):
        cache.crop(-100)


def test_speech_is_generated_with_the_cross_attention_in_16_bits():
    config = transformers.WhisperConfig(
        vocab_size=128, d_model=64, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=8, max_source_positions=30, max_target_positions=40,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, init_std=0.15,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config).eval()
    start, features = torch.randint(3, 128, (2, 4)), torch.randn(2, 8, 60)

    def steps(own):
        both = transformers.EncoderDecoderCache(own, transformers.DynamicCache())
        given = dict(input_features=features, past_key_values=both)
        return torch.cat([model(decoder_input_ids=ids, **given).logits for ids in (start[:, :3], start[:, 3:])], dim=1)

    exact = eagerly(model)(input_features=features, decoder_input_ids=start).logits
    use(model, "none", backend="reference")
    assert (steps(cache_of(model)) - exact).abs().max() < 2e-5
    both = transformers.EncoderDecoderCache(transformers.DynamicCache(), cache_of(model))
    with pytest.raises(NotImplementedError, match=r"encoder_attn: attention_mask: a TokquantCache is attended to causally"):
        model(input_features=features, decoder_input_ids=start, past_key_values=both)


def test_four_bits_take_about_a_quarter_of_sixteen():
    model = decoder("qwen3, normed heads of their own size").half()
    given = prompts("left", tokens=251)
    use(model, "kv-int4", backend="reference")
    cache = cache_of(model, "kv-int4", capacity=2 * 256)
    generated(model, given, cache)
    plain = transformers.DynamicCache(config=model.config)
    generated(model, given, plain)
    sixteen = sum(x.nbytes for layer in plain.layers for x in (layer.keys, layer.values))
    # 4 bits, a scale and a zero of 16 for 32 channels: 5 of 16; at 128 channels it is 4.25
    assert 0.3 < cache.nbytes / sixteen < 0.33 and cache.layers[0].held.bits_per_value == 5


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_other_attention_cannot_read_codes_and_says_so(attention):
    model = decoder()
    model.set_attn_implementation(attention)
    with pytest.raises(NotImplementedError, match=f"model: it attends by '{attention}', which reads no codes; call"):
        TokquantCache(model, "kv-int8")
    cache = TokquantCache(model.config, "kv-int8", backend="reference")
    with pytest.raises(NotImplementedError, match="a TokquantCache gives codes, which only tokquant's attention reads"):
        model(**prompts(), past_key_values=cache)


def test_a_mask_that_changes_its_mind_is_refused_and_nothing_is_appended():
    model, given = use(decoder(), "kv-int8", backend="reference"), prompts("left")
    cache = cache_of(model, "kv-int8")
    model(**given, past_key_values=cache)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn: attention_mask: it masks other columns"):
        model(torch.tensor([[5], [6]]), past_key_values=cache)
    assert cache.get_seq_length() == 20 and cache.layers[0].held.lengths == [13, 20]
    packed = torch.ones(2, 1, 3, 23, dtype=torch.bool)
    with pytest.raises(NotImplementedError, match="attended to causally"):
        model(torch.full((2, 3), 5), attention_mask=packed, past_key_values=cache)


def test_after_a_call_that_ended_between_layers_a_cache_is_not_used_on():
    model, given = use(decoder(), "none", backend="reference"), prompts()
    cache, step = cache_of(model), torch.tensor([[5], [6]])
    exact = model(**given, past_key_values=cache).logits

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(step, past_key_values=cache)
    hook.remove()
    with pytest.raises(ValueError, match=r"layer 1 holds 20 tokens where layer 0 held 21; .* reset\(\) it"):
        model(step, past_key_values=cache)
    cache.reset()
    torch.testing.assert_close(model(**given, past_key_values=cache).logits, exact)


@pytest.mark.parametrize("scheme", ["kv-int8", "kv-int4-kivi"])
def test_a_layer_whose_attention_fails_keeps_nothing_of_the_call(scheme, monkeypatch):
    model, given = use(decoder("qwen3, normed heads of their own size"), scheme, backend="reference"), prompts("left")
    step = dict(
        input_ids=torch.tensor([[5], [6]]), attention_mask=torch.nn.functional.pad(given["attention_mask"], (0, 1), value=1)
    )
    caches = [cache_of(model, scheme) for _ in range(2)]
    for call in (given, step):
        exact = model(**call, past_key_values=caches[0]).logits
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match=r"layers\.0\.self_attn: out of memory"):
            patch.setattr("tokquant.integrations.transformers.cache_layer.decode", raising("out of memory"))
            model(**call, past_key_values=caches[1])
        assert torch.equal(model(**call, past_key_values=caches[1]).logits, exact)


def raising(text):
    def raise_it(*_, **__):
        raise RuntimeError(text)

    return raise_it


def test_a_cache_of_other_sequences_or_another_model_says_so():
    model = use(decoder(), "none", backend="reference")
    cache = cache_of(model)
    model(**prompts("left"), past_key_values=cache)
    with pytest.raises(ValueError, match="holds 2 sequences, and 3 come"):
        generated(model, prompts("left", batch=3, tokens=30), cache)
    small = transformers.LlamaConfig(**SIZES | {"num_hidden_layers": 1})
    with pytest.raises(ValueError, match="has 1 layers, and the model more"):
        model(**prompts(), past_key_values=TokquantCache(small, "none", backend="reference"))


def test_what_a_cache_cannot_keep_is_refused_at_once():
    model = use(decoder(), "none", backend="reference")
    with pytest.raises(tq.SchemeError, match="smooth"):
        TokquantCache(model, "int8")
    with pytest.raises(tq.ScalesError, match="'kv-fp8' is static"):
        TokquantCache(model, "kv-fp8")
    heads = tq.SchemeMap.from_data({"layers": {"*": {"heads": {"0": "kv-int8", "1": "kv-int4"}}}})
    with pytest.raises(tq.SchemeError, match="its heads take different schemes"):
        TokquantCache(model, heads)
    with pytest.raises(TypeError, match="model: a str; give a transformers model, or its config"):
        TokquantCache("kv-int8")
    chunked = transformers.Llama4TextConfig(**SIZES, num_local_experts=1, layer_types=["chunked_attention", "full_attention"])
    with pytest.raises(NotImplementedError, match="layer 0 is of type 'chunked_attention'"):
        TokquantCache(chunked, "kv-int8")
    with pytest.raises(tq.CacheFullError, match=r"layers\.0\.self_attn: the cache is full"):
        generated(model, prompts(), cache_of(model, "kv-int8", capacity=1))


def test_without_a_scheme_a_cache_takes_that_of_the_model_with_its_scales():
    model, given = decoder(), prompts()
    with pytest.raises(tq.SchemeError, match=r"scheme: none is given, and the model has none .* call .*use\(model, scheme\)"):
        TokquantCache(model)
    calibrator = tq.Calibrator("kv-fp8")
    run_observed(model, [given["input_ids"]], calibrator.observe)
    scales = calibrator.scales()
    use(model, "kv-fp8", scales=scales, backend="reference")
    for name, own in (("scales", scales), ("backend", "reference")):
        with pytest.raises(tq.SchemeError, match=f"^{name}: no scheme is given, .*; leave {name} out, or give a scheme"):
            TokquantCache(model, **{name: own})
    short, long = TokquantCache(model), cache_of(model, "kv-fp8", scales=scales)
    assert torch.equal(model(**given, past_key_values=short).logits, model(**given, past_key_values=long).logits)
    assert short.memory == long.memory and short.layers[0].held.scheme.name == "kv-fp8"


def test_a_map_gives_each_layer_of_a_cache_its_scheme_and_its_scales():
    model, given = decoder(), prompts()
    names = [f"model.layers.{i}.self_attn" for i in range(2)]
    calibrator = tq.Calibrator("kv-fp8")
    run_observed(model, [given["input_ids"]], calibrator.observe)
    mixed = tq.SchemeMap.from_data({"layers": {names[0]: "kv-fp8", "*": "kv-int4"}})
    # models that themselves attend by one scheme, and need no names
    register("none", backend="reference")
    other = decoder()
    other.set_attn_implementation("tokquant")
    for each in (use(model, "none", backend="reference"), other):
        cache = TokquantCache(each.config, mixed, scales=calibrator.scales(), backend="reference")
        each(**given, past_key_values=cache)
        assert [layer.held.scheme.name for layer in cache.layers] == ["kv-fp8", "kv-int4"]
        assert cache.layers[0].held.scales.layer == names[0]
