"""Inside the block what calls torch's attention is quantized, or says that it is not; outside nothing has changed."""

import threading
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as torch_attention

import tokquant as tq
from tokquant.integrations import torch_sdpa

X = torch.randn(2, 4, 24, 16, generator=torch.Generator().manual_seed(0))
MAP = tq.SchemeMap.from_data({"name": "two", "layers": {"a": "int8", "*": "kv-int4"}})


def attend(x=X, **how):
    return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True, **how)


def quantized(scheme="int8"):
    return tq.attention(X, X, X, scheme, causal=True, backend="reference")


def block(scheme="int8", **how):
    return tq.quantized_sdpa(scheme, backend="reference", **how)


@pytest.fixture
def counted(monkeypatch):
    """How often attention was quantized."""
    calls = []

    def counting(*args, **kwargs):
        calls.append(args)
        return tq.scaled_dot_product_attention(*args, **kwargs)

    monkeypatch.setattr(torch_sdpa, "scaled_dot_product_attention", counting)
    return calls


def test_inside_it_is_quantized_and_outside_torchs():
    before = attend()
    with block():
        assert torch.equal(attend(), quantized())
    assert torch.equal(attend(), before) and not torch.equal(before, quantized())


def test_the_inner_of_two_blocks_counts():
    with block("int8"):
        with block("int4"):
            assert torch.equal(attend(), quantized("int4"))
        assert torch.equal(attend(), quantized("int8"))


def test_what_an_inner_block_leaves_goes_to_the_outer():
    with block("int8"), tq.quantized_sdpa("int4", backend="triton", fallback="silent"):
        # more channels than a kernel of Triton's takes
        x = torch.randn(1, 1, 4, 300)
        assert torch.equal(attend(x), tq.attention(x, x, x, "int8", causal=True, backend="reference"))


def test_an_exception_ends_the_block():
    with pytest.raises(ZeroDivisionError), block():
        _ = 1 / 0
    assert torch.equal(attend(), torch_attention(X, X, X, is_causal=True))


def test_another_thread_is_not_inside():
    found = []
    with block():
        other = threading.Thread(target=lambda: found.append(attend()))
        other.start()
        other.join()
    assert torch.equal(found[0], attend())


def test_by_default_what_cannot_be_quantized_raises():
    x = X.clone().requires_grad_()
    with block():
        with pytest.raises(tq.UnsupportedError, match=r"dropout_p: 0\.5"):
            attend(dropout_p=0.5)
        with pytest.raises(TypeError, match=r"torch\.float64 is not supported"):
            attend(X.double())
        with pytest.raises(RuntimeError, match="query: requires grad"):
            attend(x)
        with pytest.raises(tq.UnsupportedError, match="need_weights: True"), torch.no_grad():
            nn.MultiheadAttention(16, 2)(X[0], X[0], X[0])


def test_a_warning_is_given_once_for_each_reason_and_place():
    x = X.clone().requires_grad_()
    with warnings.catch_warnings(record=True) as said, block(fallback="warn"):
        warnings.simplefilter("default")
        for _ in range(3):
            made = attend(X.double())
            attend(x).sum().backward()
    assert torch.equal(made, attend(X.double())) and x.grad is not None
    reasons = [str(each.message).partition("quantized: ")[2] for each in said]
    assert [reason.split(":")[0] for reason in reasons] == ["q", "query"]
    assert all(each.filename == __file__ for each in said)


def test_silence_is_there_for_those_who_ask():
    with warnings.catch_warnings(), block(fallback="silent"):
        warnings.simplefilter("error")
        assert torch.equal(attend(X.double()), torch_attention(*3 * [X.double()], is_causal=True))
        weights = nn.MultiheadAttention(16, 2)(X[0], X[0], X[0])[1]
    assert weights.shape == (24, 4, 4)


def test_errors_of_the_machine_are_no_reason(monkeypatch):
    def broken(*args, **kwargs):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("tokquant.sdpa.attention", broken)
    with pytest.raises(torch.OutOfMemoryError), block(fallback="silent"):
        attend()


def test_what_no_call_could_take_is_refused_before():
    for error, how, text in (
        (tq.SchemeError, {"scheme": "int88"}, "did you mean 'int8'"),
        (tq.SchemeError, {"scheme": MAP}, r"'two' is a map of layers, which a block tells apart.* model=.*scheme\['a'\]"),
        (tq.ScalesError, {"scheme": "kv-fp8"}, "needs k_scale"),
        (ValueError, {"fallback": "warm"}, "fallback: 'warm'; use one of error, warn, silent; did you mean 'warn'"),
        (ValueError, {"backend": "cuda"}, "backend: 'cuda' is not valid"),
    ):
        with pytest.raises(error, match=text):
            tq.quantized_sdpa(**how)


def test_one_layer_of_a_map_is_taken_with_schemes_of_its_heads():
    layers = tq.SchemeMap.from_data({"layers": {"a": {"heads": {"0-1": "int8", "2-3": "kv-int4"}}, "*": "int8"}})
    with block(layers["a"]):
        out = attend()
    assert torch.equal(out, quantized(layers["a"]))


TOKENS = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
PADDED = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
SEEN = nn.Transformer.generate_square_subsequent_mask(5)
MODULES = {
    "multi-head attention": (
        lambda: nn.MultiheadAttention(16, 2, batch_first=True),
        lambda m: m(TOKENS, TOKENS, TOKENS, key_padding_mask=PADDED, need_weights=False)[0],
        1,
    ),
    "an encoder layer": (lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), lambda m: m(TOKENS), 1),
    "an encoder of padded sequences": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2, enable_nested_tensor=False),
        lambda m: m(TOKENS, src_key_padding_mask=PADDED),
        2,
    ),
    "a decoder layer": (
        lambda: nn.TransformerDecoderLayer(16, 2, 32, batch_first=True),
        lambda m: m(TOKENS, TOKENS, tgt_mask=SEEN, tgt_is_causal=True),
        2,
    ),
}


@pytest.mark.parametrize(("make", "call", "attentions"), MODULES.values(), ids=MODULES)
def test_modules_of_torch_are_quantized_in_eval_mode(make, call, attentions, counted):
    module = make().eval()
    with torch.no_grad():
        plain = call(module)
        with block("none"):
            exact = call(module)
        assert len(counted) == attentions
        with block("int4"):
            coarse = call(module)
    torch.testing.assert_close(exact, plain, atol=1e-5, rtol=1e-5)
    assert 1e-4 < (coarse - plain).abs().max() < 0.5
    with torch.no_grad():
        assert torch.equal(call(module), plain)


def test_a_compiled_function_takes_the_block_it_is_called_in():
    run = torch.compile(attend, backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()
    for _ in range(2):
        assert torch.equal(run(), torch_attention(X, X, X, is_causal=True))
        for scheme in ("int8", "int4"):
            with block(scheme):
                assert torch.equal(run(), quantized(scheme))


def test_compiled_layers_of_torch_are_quantized_too():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    run = torch.compile(model, backend="aot_eager")
    torch._dynamo.reset()
    with torch.no_grad():
        plain = run(TOKENS)
        with block("int4"):
            assert torch.equal(run(TOKENS), model(TOKENS))
        assert torch.equal(run(TOKENS), plain) and torch.backends.mha.get_fastpath_enabled()


def test_fused_layers_are_on_again_when_the_last_of_overlapping_blocks_ends():
    entered, leave = threading.Event(), threading.Event()

    def first():
        with block():
            entered.set()
            leave.wait(60)

    other = threading.Thread(target=first)
    other.start()
    assert entered.wait(60)
    with block():
        leave.set()
        other.join()
        assert not torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


class Twice(nn.Module):
    """Attends to its input, and to what that gives."""

    def forward(self, x):
        return attend(attend(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = Twice(), Twice()

    def forward(self, x):
        return self.b(self.a(x))


LAYERS = tq.SchemeMap.from_data({"layers": {"a": "int8", "a:2": "none", "b": "kv-int4", "*": "int4"}})


@pytest.mark.parametrize("compiled", [False, True])
def test_the_layers_of_a_model_have_schemes_of_their_own(compiled):
    model = Model()
    expected = X
    for scheme in ("int8", "none", "kv-int4", "int4"):
        expected = tq.attention(expected, expected, expected, scheme, causal=True, backend="reference")
    torch._dynamo.reset()
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    plain = run(X)
    for _ in range(2):
        with block(LAYERS, model=model):
            assert torch.equal(run(X), expected)
    assert torch.equal(run(X), plain)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_layers_of_a_model_have_scales_of_their_own():
    model, calibrator = Model(), tq.Calibrator("kv-fp8")
    with calibrator.watch(model):
        model(X)
    scales, expected = calibrator.scales(), X
    assert list(scales) == ["a", "a:2", "b", "b:2"]
    for layer in scales:
        operands = (expected, expected, expected)
        expected = tq.attention(*operands, "kv-fp8", scales=scales[layer], causal=True, backend="reference")
    with block("kv-fp8", scales=scales, model=model):
        assert torch.equal(model(X), expected)


def test_a_call_that_torch_runs_is_counted_among_those_of_its_module():
    model = Model()
    model.a.forward = lambda x: attend(attend(x.clone().requires_grad_()).detach())
    expected = torch_attention(X, X, X, is_causal=True)
    for scheme in ("none", "kv-int4", "int4"):
        expected = tq.attention(expected, expected, expected, scheme, causal=True, backend="reference")
    with block(LAYERS, model=model, fallback="silent"):
        assert torch.equal(model(X), expected)


def test_what_no_layer_of_a_model_could_take_is_refused():
    model, calibrator = Model(), tq.Calibrator("kv-fp8")
    calibrator.observe("c", X, X, X)
    for error, how, text in (
        (tq.SchemeError, {"scheme": MAP, "model": nn.Identity()}, "'two': 'a' matches no module of Identity"),
        (tq.ScalesError, {"scheme": "kv-fp8", "scales": calibrator.scales(), "model": model}, "Model has no module 'c'"),
        (TypeError, {"scheme": "kv-fp8", "scales": calibrator.scales()["c"], "model": model}, "scales: a LayerScales; give"),
        (TypeError, {"scheme": "kv-fp8", "scales": calibrator.scales()}, r"tells apart if it is given model=.*scales\['c'\]"),
        (TypeError, {"model": "unet"}, "model: a str; give a torch.nn.Module"),
    ):
        with pytest.raises(error, match=text):
            tq.quantized_sdpa(**how)


def test_a_layer_without_a_scheme_or_scales_and_a_call_of_no_layer_are_refused():
    model = Model()
    with block(LAYERS, model=model), pytest.raises(tq.UnsupportedError, match="none of Model's modules runs"):
        attend()
    some = tq.SchemeMap.from_data({"layers": {"a*": "int8"}})
    with block(some, model=model), pytest.raises(tq.SchemeError, match="no pattern matches layer 'b'"):
        model(X)
    with block("kv-fp8", model=model), pytest.raises(tq.ScalesError, match="needs k_scale"):
        model(X)


def test_a_model_of_transformers_is_quantized():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    config._attn_implementation = "sdpa"
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 128, (2, 12))
    padding = torch.ones_like(ids)
    padding[0, :4] = 0
    with torch.no_grad():
        plain = model(ids, attention_mask=padding).logits
        with block("none"):
            exact = model(ids, attention_mask=padding).logits
        with block("int8"):
            near = model(ids, attention_mask=padding).logits
    seen = padding.bool()
    torch.testing.assert_close(exact[seen], plain[seen], atol=1e-4, rtol=1e-4)
    assert 0 < (near - plain)[seen].norm() / plain[seen].norm() < 0.02
