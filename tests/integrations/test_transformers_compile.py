"""Models of transformers go through torch.compile and torch.export whole, and give what they give uncompiled."""

import copy
import gc

import pytest
import torch
import transformers
from tiny_models import DECODERS, SIZES, decoder, prompts
from torch._dynamo import lookup_backend

import tokquant as tq
from tokquant import operators
from tokquant.integrations.transformers import TokquantCache, observing, register, run_observed, use
from tokquant.kernels.cpu import build

ATTENTION, CACHED = ({packet, packet.default} for packet in (torch.ops.tokquant.attention, torch.ops.tokquant.cached_attention))


FEATURED = [name for name in DECODERS if name.startswith(("mistral", "gemma2", "gpt-oss"))]
"""Windows, softcaps, sinks."""

BACKENDS = ("aot_eager", "eager", "eager")
"""What compiles each: what is below Dynamo is the same for all."""


@pytest.fixture(autouse=True)
def without_gradients():
    torch._dynamo.reset()
    with torch.no_grad():
        yield


class Graphs(list):
    """A backend of torch.compile that keeps what it is given: graphs of a whole call, or of what is between two breaks."""

    def __init__(self, backend="aot_eager"):
        self.backend = lookup_backend(backend)

    def __call__(self, graph, example):
        self.append(graph)
        return self.backend(graph, example)

    def calls(self, of):
        """How often each calls an operator."""
        return [sum(node.target in of for node in graph.graph.nodes) for graph in self]


def whole(function, backend="eager"):
    """A function compiled as one graph, and the graphs."""
    graphs = Graphs(backend)
    return torch.compile(function, backend=graphs, fullgraph=True), graphs


def attentions(model, backend="eager", **how):
    """Compile the attention of each layer in place, which takes a fraction of what a model takes, and give the graphs."""
    graphs = Graphs(backend)
    for layer in model.model.layers:
        layer.self_attn.compile(backend=graphs, **how)
    return graphs


def uncompiled(model, **given):
    with torch.compiler.set_stance("force_eager"):
        return model(**given, use_cache=False).logits


def scales_of(model, tokens=20):
    calibrator = tq.Calibrator("kv-fp8")
    run_observed(model, [prompts(tokens=tokens)["input_ids"]], calibrator.observe)
    return calibrator.scales()


MAP = tq.SchemeMap.from_data({"layers": {"model.layers.0.*": {"heads": {"0": "int8", "1": "int8-fp16"}}, "*": "none"}})

# ------------------------------------------------------------------ without a cache


@pytest.mark.parametrize(("name", "backend"), list(zip(FEATURED, BACKENDS, strict=True)))
def test_a_decoder_is_one_graph_with_an_operator_a_layer(name, backend):
    model = use(decoder(name), "int8", backend="reference")
    compiled, graphs = whole(model, backend)
    for padding in ("left", "right", None):
        given = prompts(padding)
        assert torch.equal(compiled(**given, use_cache=False).logits, model(**given, use_cache=False).logits)
    assert graphs.calls(ATTENTION) == [SIZES["num_hidden_layers"]]
    masks = [node.kwargs["mask"].meta["example_value"] for node in graphs[0].graph.nodes if node.target in ATTENTION]
    assert all(mask.shape == (2, 1, 1, 20) for mask in masks)  # which tokens there are, and no pairs of them


def bert():
    sizes = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    return transformers.BertModel(transformers.BertConfig(**sizes)).eval(), prompts("right")


def t5():
    config = transformers.T5Config(
        vocab_size=128, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0, eos_token_id=None
    )
    given = prompts("right") | {"decoder_input_ids": torch.randint(3, 128, (2, 9)), "use_cache": False}
    return transformers.T5ForConditionalGeneration(config).eval(), given


@pytest.mark.parametrize(("make", "layers"), [(bert, 2), (t5, 3)], ids=["an encoder", "cross attention and a position bias"])
def test_models_that_attend_to_both_sides_are_one_graph_too(make, layers):
    model, given = make()
    compiled, graphs = whole(use(model, "int8", backend="reference"))
    assert torch.equal(compiled(**given)[0], model(**given)[0]) and graphs.calls(ATTENTION) == [layers]


def test_what_use_says_later_is_heeded():
    model, given = decoder(), prompts("left")
    scales = [scales_of(model, tokens) for tokens in (20, 50)]
    graphs, seen = attentions(model, fullgraph=True), []
    for settings in (
        dict(scheme="int8"),
        dict(scheme=MAP),
        dict(scheme="kv-fp8", scales=scales[0]),
        dict(scheme="kv-fp8", scales=scales[1]),
    ):
        if operators.OLD and settings["scheme"] is MAP:
            continue
        use(model, **settings, backend="reference")
        seen.append(model(**given, use_cache=False).logits)
        assert torch.equal(seen[-1], uncompiled(model, **given))
        assert not any(torch.equal(seen[-1], other) for other in seen[:-1])
    # int8 is the same in both layers, and other scales of a scheme need no other graph
    assert len(graphs) == 1 + 2 * (len(seen) - 2)


def test_what_register_says_later_is_heeded():
    model, given = decoder(), prompts()
    graphs, found = attentions(model, fullgraph=True), []
    for scheme in ("int8", "int4"):
        register(scheme, backend="reference", name="tokquant-later")
        model.set_attn_implementation("tokquant-later")
        found.append(model(**given, use_cache=False).logits)
        assert torch.equal(found[-1], uncompiled(model, **given))
    assert not torch.equal(*found) and graphs.calls(ATTENTION) == [1, 1]
    model.set_attn_implementation("sdpa")
    assert not torch.equal(model(**given, use_cache=False).logits, found[0]) and graphs.calls(ATTENTION) == [1, 1, 0]


def test_lengths_that_change_compile_twice():
    model = use(decoder("mistral, a window"), "int8", backend="reference")
    compiled, graphs = whole(model)
    for tokens in (20, 33, 12):
        given = prompts("left", tokens=tokens)
        assert torch.equal(compiled(**given, use_cache=False).logits, model(**given, use_cache=False).logits)
    assert len(graphs) == 2  # of a number, then of any


def test_layers_compiled_one_by_one_share_a_graph():
    model, given = use(decoder(), "int8", backend="reference"), prompts("left")
    exact, graphs = model(**given, use_cache=False).logits, Graphs()
    for layer in model.model.layers:
        layer.compile(backend=graphs, fullgraph=True)
    assert torch.equal(model(**given, use_cache=False).logits, exact) and graphs.calls(ATTENTION) == [1]


def test_packed_sequences_stay_apart():
    model, ids = use(decoder(), "int8", backend="reference"), prompts(batch=1)["input_ids"]
    compiled, _ = whole(model)
    packed, one = torch.cat([torch.arange(8), torch.arange(12)])[None], torch.arange(20)[None]
    for places in (packed, one):
        given = dict(input_ids=ids, position_ids=places, use_cache=False)
        assert torch.equal(compiled(**given).logits, model(**given).logits)


def test_a_compiled_model_takes_the_block_of_quantized_sdpa_it_is_called_in():
    model, given = decoder(), prompts("left")
    model.set_attn_implementation("sdpa")
    exact, graphs = model(**given, use_cache=False).logits, attentions(model, fullgraph=True)
    with tq.quantized_sdpa("int8", backend="reference"):
        inside = model(**given, use_cache=False).logits
        assert torch.equal(inside, uncompiled(model, **given)) and graphs.calls(ATTENTION) == [1]
    torch.testing.assert_close(model(**given, use_cache=False).logits, exact)
    assert not torch.allclose(inside, exact)


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_model_holds_the_operators(strict):
    model, given = use(decoder("mistral, a window"), "int8", backend="reference"), prompts("left")
    tokens = torch.export.Dim("tokens", min=16, max=100)
    sizes = {"input_ids": {1: tokens}, "attention_mask": {1: tokens}, "use_cache": None}
    program = torch.export.export(model, (), dict(**given, use_cache=False), strict=strict, dynamic_shapes=sizes)
    assert sum(node.target in ATTENTION for node in program.graph.nodes) == 2
    longer = prompts("left", tokens=37)
    found = program.module()(**longer, use_cache=False).logits
    assert torch.equal(found, model(**longer, use_cache=False).logits)


def test_an_observer_ends_the_graph_and_sees_the_numbers():
    model, given = decoder(), prompts()
    seen = [[], []]
    with observing(model, lambda *each: seen[0].append(each)):
        exact = model(**given, use_cache=False).logits
    with observing(model, lambda *each: seen[1].append(each)):
        attentions(model, fullgraph=True)
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"tokquant: attention that is observed, .* is no operator"):
            model(**given, use_cache=False)
        seen[1].clear()
        attentions(model)
        found = model(**given, use_cache=False).logits
    assert torch.equal(found, exact) and len(seen[0]) == len(seen[1]) == 2
    for (name, *tensors), (same, *others) in zip(*seen, strict=True):
        assert name == same and all(map(torch.equal, tensors, others))


@pytest.mark.skipif(operators.OLD, reason="torch before 2.12 does not take maps into a graph")
def test_names_that_are_not_known_yet_end_the_graph_once():
    register(MAP, name="tokquant-unnamed", backend="reference")
    model, given = decoder(), prompts()
    model.set_attn_implementation("tokquant-unnamed")
    attentions(model, fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"the search for a module's name, .* is no operator"):
        model(**given, use_cache=False)
    exact = uncompiled(model, **given)
    assert torch.equal(model(**given, use_cache=False).logits, exact)


def test_maps_end_the_graphs_of_an_old_torch(monkeypatch):
    monkeypatch.setattr(operators, "OLD", True)
    model, given = use(decoder(), MAP, backend="reference"), prompts()
    exact = model(**given, use_cache=False).logits
    attentions(model, fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"before torch 2\.12 by a map of schemes, is no operator"):
        model(**given, use_cache=False)
    graphs = attentions(model)
    assert torch.equal(model(**given, use_cache=False).logits, exact)
    assert graphs and sum(graphs.calls(ATTENTION)) == 0


def test_what_is_refused_is_refused_in_a_graph_too():
    model, given = use(decoder(), "kv-int8", backend="reference"), prompts()
    for cache in (None, cache_of(model)):
        with pytest.raises(RuntimeError, match="q: requires grad"), torch.enable_grad():
            whole(model)[0](**given, past_key_values=cache, use_cache=cache is not None)
    model.model.layers[1].self_attn.attention_dropout = 0.1
    model.train()
    attentions(model, fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"dropout: 0\.1 of the probabilities .* call model\.eval\(\)"):
        model(**given, use_cache=False)
    attentions(model)
    with pytest.raises(NotImplementedError, match=r"model\.layers\.1\.self_attn: dropout: 0\.1"):
        model(**given, use_cache=False)


# ------------------------------------------------------------------ with caches


def steps(model, cache, padding="left", count=4):
    """Logits of a prompt, and of tokens one by one."""
    given, found = prompts(padding), []
    ids, mask = given["input_ids"], given["attention_mask"]
    for step in range(count):
        found.append(model(ids, attention_mask=mask, past_key_values=cache).logits)
        ids, mask = torch.full((2, 1), 5 + step), torch.nn.functional.pad(mask, (0, 1), value=1)
    return found


def cache_of(model, scheme=None):
    return TokquantCache(model) if scheme is None else TokquantCache(model, scheme, backend="reference")


@pytest.mark.parametrize(("name", "backend"), list(zip(FEATURED, BACKENDS, strict=True)))
def test_a_cache_of_codes_is_one_operator_a_layer(name, backend):
    model = use(decoder(name), "kv-int8", backend="reference")
    compiled, graphs = whole(model, backend)
    caches = [cache_of(model) for _ in range(3)]
    exact = steps(model, caches[0])
    for cache in caches[1:]:
        assert all(map(torch.equal, steps(compiled, cache), exact))
        assert cache.layers[1].held.lengths == [16, 23] and cache.memory == caches[0].memory
        assert len(cache._fetched) <= 2  # once a call for each of its masks
    # a prompt, and a token after any number of others, in whatever cache
    assert graphs.calls(CACHED) == [2, 2]


@pytest.mark.parametrize(
    ("made", "used"),
    [
        (torch.no_grad, torch.inference_mode),
        (torch.inference_mode, torch.no_grad),
        (lambda: torch.device("meta"), torch.no_grad),
    ],
    ids=["used in inference mode", "made in inference mode", "made where meta is torch's default device"],
)
def test_a_cache_is_used_wherever_it_was_made(made, used):
    model = use(decoder(), "kv-int4", backend="reference")
    exact = steps(model, cache_of(model), count=1)[0]
    attentions(model, "aot_eager", fullgraph=True)
    with made():
        cache = cache_of(model)
    with used():
        assert torch.equal(steps(model, cache, count=1)[0], exact)


def test_a_model_attends_as_before_while_another_thread_compiles(monkeypatch):
    model = use(decoder("mistral, a window"), "kv-int8", backend="reference")
    exact = steps(model, cache_of(model))
    # what every thread is told meanwhile
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert all(map(torch.equal, steps(model, cache_of(model)), exact))


def test_a_compiled_model_generates_in_beams_and_with_drafts():
    model, given = use(decoder(), "kv-int8", backend="reference"), prompts(batch=1)
    helper = decoder("mistral, a window")
    ways = [dict(num_beams=3, length_penalty=0.5), dict(assistant_model=helper)]
    run = lambda **how: model.generate(  # noqa: E731
        **given, past_key_values=cache_of(model), max_new_tokens=5, do_sample=False, **how
    )
    exact = [run(**how) for how in ways]
    model.forward, graphs = whole(model.forward)
    assert all(torch.equal(run(**how), tokens) for how, tokens in zip(ways, exact, strict=True)) and graphs.calls(CACHED)


def test_layers_compiled_one_by_one_go_on_from_a_cache():
    model = use(decoder(), "kv-int8", backend="reference")
    exact = steps(model, cache_of(model))
    graphs = attentions(model, fullgraph=True)
    assert all(map(torch.equal, steps(model, cache_of(model)), exact)) and graphs.calls(CACHED) == [1] * 4


def test_what_is_attended_to_later_is_appended_now():
    model = use(decoder(), "kv-int8", backend="reference")
    cache, ids = cache_of(model), prompts()["input_ids"]

    def prefill(ids):
        model(ids, past_key_values=cache)
        return ids + 1

    whole(prefill, "aot_eager")[0](ids)
    assert [layer.held.lengths for layer in cache.layers] == [[20, 20]] * 2


def test_a_copy_of_a_cache_goes_on_by_itself():
    model = use(decoder(), "kv-int8", backend="reference")
    compiled, _ = whole(model)
    cache = cache_of(model)
    steps(model, cache, count=1)
    twin = copy.deepcopy(cache)
    more = dict(input_ids=torch.tensor([[5], [6]]), attention_mask=torch.ones(2, 21).long())
    more["attention_mask"][:, :20] = prompts("left")["attention_mask"]
    assert torch.equal(compiled(**more, past_key_values=twin).logits, compiled(**more, past_key_values=cache).logits)
    assert twin.get_seq_length() == cache.get_seq_length() == 21


def test_errors_of_a_cache_are_raised_from_a_graph():
    model = use(decoder(), "kv-int8", backend="reference")
    cache, step = cache_of(model), dict(input_ids=torch.tensor([[5], [6]]))
    first = steps(model, cache, count=1)
    attentions(model, fullgraph=True)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn: attention_mask: it masks other columns"):
        model(**step, past_key_values=cache)
    cache.layers[0].crop(-1)
    with pytest.raises(ValueError, match=r"layer 1 holds 20 tokens where layer 0 held 19; .* reset\(\) it"):
        model(**step, attention_mask=prompts("left")["attention_mask"], past_key_values=cache)
    cache.reset()
    assert torch.equal(steps(model, cache, count=1)[0], first[0])


def test_a_layer_without_scales_is_named_in_a_graph_too():
    model, given = decoder(), prompts()
    some = {name: each for name, each in scales_of(model).items() if "layers.0." in name}
    use(model, "kv-fp8", scales=tq.Scales("kv-fp8", some), backend="reference")
    attentions(model, fullgraph=True)
    with pytest.raises(tq.ScalesError, match=r"model\.layers\.1\.self_attn: scales: .* needs k_scale"):
        model(**given, use_cache=False)


def test_the_operator_is_what_torch_expects_of_one():
    model = use(decoder(), "kv-int8", backend="reference")
    cache, q = cache_of(model), torch.randn(2, 4, 1, 16)
    steps(model, cache, count=1)
    features = dict(scale=0.2, behind=None, softcap=None, sinks=None)
    # without new keys, as it is called several times
    args = (q, None, None, cache.number, 1, "layer", None)
    attend = torch.ops.tokquant.cached_attention
    assert set(torch.library.opcheck(attend.default, args, features).values()) == {"SUCCESS"}
    assert torch.equal(attend(*args, **features), cache.layers[1].attend(q, scale=0.2))
    del cache
    gc.collect()
    with pytest.raises(RuntimeError, match="layer: cache: the TokquantCache of this number is gone"):
        attend(*args, **features)


def test_a_static_cache_of_sixteen_bits_is_one_graph_too():
    model = use(decoder("mistral, a window"), "int8", backend="reference")
    compiled, graphs = whole(model)
    caches = [transformers.StaticCache(config=model.config, max_cache_len=32) for _ in range(2)]
    assert all(map(torch.equal, steps(compiled, caches[1]), steps(model, caches[0]))) and set(graphs.calls(ATTENTION)) == {2}


@pytest.mark.slow
@pytest.mark.skipif(not build.available(), reason="inductor needs a C++ compiler")
def test_inductor_compiles_a_model_and_its_cache():
    model = use(decoder("qwen3, normed heads of their own size"), "kv-int4-kivi")  # which keeps some tokens in 16 bits
    compiled = torch.compile(model, fullgraph=True)
    for cache in (lambda: None, lambda: cache_of(model)):
        count = 1 if cache() is None else 4
        for found, exact in zip(steps(compiled, cache(), count=count), steps(model, cache(), count=count), strict=True):
            torch.testing.assert_close(found, exact, atol=2e-4, rtol=2e-4)
