"""torch.compile goes through the public functions as one operator, which gives what they give."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from factories import qkv, scheme, some_factors
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import tokquant as tq
from tokquant import operators
from tokquant.kernels.cpu import build

TOKENS = torch.tensor([0, 20, 48], dtype=torch.int32)
MINE = scheme("int8", "int8 mean", "int8 channel", "int8 row_block:64", name="mine")
BIASES = {
    "alibi": tq.bias.alibi(torch.tensor([0.5, 0.1])),
    "a value a key": tq.bias.key_vector(torch.linspace(-1, 1, 48)),
    "low rank": tq.bias.lowrank(some_factors(1, 2, 48, 3), some_factors(1, 1, 48, 3)),
    "factors of svd": tq.bias.svd(torch.ones(2, 48, 48)),
    "dense": tq.bias.dense(torch.linspace(-2, 2, 48)),
}
FEATURES = {
    "nothing more": {},
    "causal": {"causal": True, "scale": 0.2},
    "a window open to one side, softcap, sinks": {"window": (9, None), "softcap": 3.0, "sinks": torch.tensor([0.0, 2.0])},
    "a boolean mask, deterministic": {"mask": torch.ones(48, 48).tril(9) > 0, "deterministic": True},
    "a mask that is added": {"mask": torch.linspace(-3, 3, 48)},
} | {f"a bias: {name}": {"bias": bias} for name, bias in BIASES.items()}


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()


def compiled(function, backend="aot_eager"):
    return torch.compile(function, backend=backend, fullgraph=True)


def agree(made, expected):
    for x, y in zip(*(out if isinstance(out, tuple) else (out,) for out in (made, expected)), strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y) and not x.isnan().any()
    return True


@pytest.mark.parametrize("number", range(len(FEATURES)), ids=list(FEATURES))
def test_compiled_attention_is_attention_bit_for_bit(number):
    q, k, v = qkv()
    how = dict(list(FEATURES.values())[number], return_lse=number % 2 == 1, backend="reference")
    made = compiled(lambda q, features: tq.attention(2 * q, k, v, "int8", **features))(q, how)
    assert agree(made, tq.attention(2 * q, k, v, "int8", **how))


@pytest.mark.parametrize("backend", ["auto", "triton", "reference"])
def test_every_backend_works_in_a_graph(backend):
    q, k, v = qkv(dtype=torch.float16)
    made = compiled(lambda q: tq.attention(q, k, v, MINE, causal=True, backend=backend))(q)
    assert agree(made, tq.attention(q, k, v, MINE, causal=True, backend=backend))


def test_packed_sequences_compile():
    q, k, v = (x[0].transpose(0, 1) for x in qkv())
    call = lambda q, tokens: tq.attention_varlen(  # noqa: E731
        q,
        k,
        v,
        MINE,
        cu_seqlens_q=tokens,
        cu_seqlens_k=tokens,
        max_seqlen_q=28,
        causal=True,
        return_lse=True,
        backend="reference",
    )
    assert agree(compiled(call)(q, TOKENS), call(q, TOKENS))


def test_calibrated_scales_go_into_a_graph():
    q, k, v = qkv()
    calibrator = tq.Calibrator("kv-fp8")
    calibrator.observe("layer", q, k, v)
    scales = calibrator.scales()["layer"]
    call = lambda q: tq.attention(q, k, v, "kv-fp8", scales=scales, backend="reference")  # noqa: E731
    assert agree(compiled(call)(q), call(q))
    # values are not looked at in a graph, so somebody must have
    unchecked = tq.LayerScales("layer", scales.tensors)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="LayerScales without a scheme"):
        compiled(lambda q: tq.attention(q, k, v, "kv-fp8", scales=unchecked))(q)
    with pytest.raises(tq.ScalesError, match=r"layer\.k_scale: scheme 'int8' has no use for it"):
        compiled(lambda q: tq.attention(q, k, v, "int8", scales=scales))(q)


@pytest.mark.parametrize("written", ["int8", MINE, Path, str], ids=["a preset", "a QuantScheme", "a path", "a path as str"])
def test_a_scheme_in_a_module_is_found_once(written, tmp_path, monkeypatch):
    if written in (Path, str):
        if operators.OLD and written is Path:
            pytest.skip("torch before 2.12 does not take paths into a graph")
        MINE.dump(tmp_path / "mine.yaml")
        written = written(tmp_path / "mine.yaml")
    q, k, v = qkv()

    class Layer(torch.nn.Module):
        scheme = written

        def forward(self, q):
            return tq.attention(q, k, v, self.scheme, backend="reference")

    layer, counter = Layer(), CompileCounter()
    expected, run = layer(q), compiled(layer, counter)
    assert agree(run(q), expected)
    monkeypatch.setattr("tokquant.operators.of_layer", None)
    assert agree(run(q), expected) and counter.frame_count == 1
    monkeypatch.undo()
    layer.scheme = "int4"
    assert agree(run(q), tq.attention(q, k, v, "int4", backend="reference")) and counter.frame_count == 2


@pytest.mark.parametrize("again", [lambda one: tq.QuantScheme.from_yaml(one.to_yaml()), copy.deepcopy], ids=["read", "copied"])
def test_layers_whose_schemes_are_read_or_copied_share_a_graph(again):
    q, k, v = qkv()
    counter = CompileCounter()
    run = compiled(lambda q, scheme: tq.attention(q, k, v, scheme, backend="reference"), counter)
    first = again(MINE)
    assert agree(run(q, first), run(q, again(first))) and counter.frame_count == 1
    other = MINE.model_copy(update={"name": "other"}, deep=True)
    assert agree(run(q, again(other)), run(q, first)) and counter.frame_count == 2 and first.name == "mine"


@pytest.mark.parametrize("scheme", [tq.SchemeMap((("*", MINE),)), Path("mine.yaml")], ids=["a map", "a path"])
def test_what_an_old_torch_does_not_take_is_named(monkeypatch, scheme):
    monkeypatch.setattr(operators, "OLD", True)
    q, k, v = qkv()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=f"but no {type(scheme).__name__}; give one of those"):
        compiled(lambda q: tq.attention(q, k, v, scheme, layer="layers.0"))(q)


@pytest.mark.skipif(operators.OLD, reason="torch before 2.12 does not take maps into a graph")
def test_a_map_of_layers_and_heads_goes_into_a_graph():
    q, k, v = qkv()
    heads = tq.HeadSchemes(((1, tq.preset("int8")), (1, MINE)))
    schemes = tq.SchemeMap((("layers.0", tq.preset("int4")), ("layers.*", heads)))

    def call(q, layer):
        return tq.attention(q, k, v, schemes, layer=layer, causal=True, backend="reference")

    for layer, own in (("layers.0", "int4"), ("layers.7", heads)):
        assert agree(compiled(call)(q, layer), call(q, layer))
        assert agree(call(q, layer), tq.attention(q, k, v, own, causal=True, backend="reference"))
    scales = tq.LayerScales("layers.7", {"k_scale": torch.ones(2, 1, 1), "v_scale": torch.ones(2, 1, 1)}, tq.preset("kv-fp8"))
    with pytest.raises(tq.ScalesError, match="no scheme of these heads has a use for them"):
        compiled(lambda q: tq.attention(q, k, v, schemes, scales=scales))(q)


def test_lengths_that_change_compile_once():
    counter = CompileCounter()
    run = compiled(lambda q, k, v: tq.attention(q, k, v, "none", causal=True, backend="reference"), counter)
    for n in (16, 33, 100, 5):
        operands = qkv(n, n + 7)
        for x in operands:
            torch._dynamo.mark_dynamic(x, 2)
        assert agree(run(*operands), tq.attention(*operands, "none", causal=True, backend="reference"))
    assert counter.frame_count == 1


def test_a_window_that_changes_compiles_twice_at_most():
    q, k, v = qkv()
    counter = CompileCounter()
    run = compiled(lambda q, left: tq.attention(q, k, v, "none", window=(left, 0), backend="reference"), counter)
    for left in (3, 4, 5, 11):
        assert agree(run(q, left), tq.attention(q, k, v, "none", window=(left, 0), backend="reference"))
    assert counter.frame_count == 2  # a number, then any number


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_without_gradients_a_layer_with_parameters_compiles(without):
    project = torch.nn.Linear(32, 96)

    def layer(x):
        q, k, v = project(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        return tq.attention(q, k, v, "int8", causal=True, backend="reference")

    x = torch.randn(2, 20, 32)
    with without():
        assert agree(compiled(layer)(x), layer(x))
    for run in (layer, compiled(layer)):
        with pytest.raises(RuntimeError, match="q: requires grad, and quantized attention has no backward"):
            run(x)


@pytest.mark.parametrize("name", ["k", "mask", "sinks", "bias"])
def test_a_gradient_of_whatever_is_refused_in_a_graph_too(name):
    q, k, v = qkv()
    given = {"k": k, "mask": torch.zeros(48, 48), "sinks": torch.zeros(2), "bias": torch.zeros(48)}
    given[name].requires_grad_()

    def call(q, k, mask, sinks, bias):
        return tq.attention(q, k, v, "int8", mask=mask, sinks=sinks, bias=tq.bias.Dense(bias), backend="reference")

    for run in (call, compiled(call)):
        with pytest.raises(RuntimeError, match=f"{name}: requires grad"):
            run(q, **given)


BAD = {
    "shapes that do not fit": (ValueError, "is not that of k", lambda q: tq.attention(q, q, q[:, :, :3], "int8")),
    "three dimensions": (ValueError, "q: shape .* has 3 dim", lambda q: tq.attention(q[0], q, q, "int8")),
    "a softcap below zero": (ValueError, "softcap: -1.0 is not above", lambda q: tq.attention(q, q, q, "int8", softcap=-1.0)),
    "a window that is none": (ValueError, "window: ", lambda q: tq.attention(q, q, q, "int8", window=(-1, 0))),
    "another backend": (ValueError, "backend: 'cuda'", lambda q: tq.attention(q, q, q, "int8", backend="cuda")),
    "missing scales": (tq.ScalesError, "needs k_scale", lambda q: tq.attention(q, q, q, "kv-fp8")),
    "an unknown scheme": (RuntimeError, "did you mean 'int8'", lambda q: tq.attention(q, q, q, "int88")),
}  # fmt: skip


@pytest.mark.parametrize(("error", "text", "call"), BAD.values(), ids=BAD)
def test_bad_input_of_a_graph_says_the_same(error, text, call):
    with pytest.raises(error, match=text):
        compiled(call)(qkv()[0])


def operator_calls():
    q, k, v = qkv()
    written = operators.document(MINE)
    features = dict(causal=True, window=[9, None], softcap=2.0, sinks=torch.zeros(2), backend="reference")
    bias = dict(bias_kind="lowrank", bias=BIASES["low rank"].tensors())
    scales = dict(layer="l", scale_names=["k_scale", "v_scale"], scales=[torch.full((2, 1, 1), 0.1)] * 2)
    yield "attention", (q, k, v, written), {}
    yield "attention_lse", (q, k, v, "int8"), {**features, **bias, "mask": torch.zeros(48, 48)}
    yield "attention", (q, k, v, "kv-fp8"), {**scales, "backend": "reference"}
    tokens = dict(cu_seqlens_q=TOKENS, cu_seqlens_k=TOKENS)
    packed = [x[0].transpose(0, 1) for x in (q, k, v)]
    yield "attention_varlen", (*packed, written), {**tokens, "backend": "reference"}
    # not contiguous, which what comes out is
    yield "attention_varlen_lse", (*(x.mT.contiguous().mT for x in packed), "int8"), {**tokens, "backend": "reference"}
    yield "attention_varlen_lse", (*packed, "int8"), {**tokens, "backend": "triton"}


@pytest.mark.parametrize(("name", "args", "given"), list(operator_calls()))
def test_an_operator_is_what_torch_expects_of_one(name, args, given):
    operator = getattr(torch.ops.tokquant, name).default
    results = torch.library.opcheck(operator, args, given)
    assert set(results.values()) == {"SUCCESS"} and len(results) == 4


def test_an_operator_gives_what_the_function_gives():
    q, k, v = qkv()
    made = torch.ops.tokquant.attention(q, k, v, "int8", causal=True, window=[5, None], backend="reference")
    assert torch.equal(made, tq.attention(q, k, v, "int8", causal=True, window=(5, None), backend="reference"))
    with pytest.raises(ValueError, match=r"bias_kind: 'alibbi' is not valid; .* did you mean 'alibi'"):
        torch.ops.tokquant.attention(q, k, v, "int8", bias_kind="alibbi", bias=[torch.ones(2)])


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_holds_the_operator_and_the_whole_scheme(strict):
    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return tq.attention(q, k, v, MINE, causal=True, backend="reference")

    operands = qkv()
    program = torch.export.export(Layer(), operands, strict=strict)
    [call] = [node for node in program.graph.nodes if node.target is torch.ops.tokquant.attention.default]
    written = call.kwargs.get("scheme", call.args[3:] and call.args[3])
    assert operators.of_document(written) == MINE
    assert agree(program.module()(*operands), Layer()(*operands))


def test_what_is_no_operator_ends_a_graph_and_says_so():
    operands = qkv()
    cache = tq.KVCache("kv-int4", batch=1, kv_heads=2, head_dim=32, dtype=torch.float32)

    def on_codes(q, k, v):
        return tq.attention(*tq.quantize(q, k, v, "int8", backend="reference"), "int8", backend="reference") + 1

    def step(q, k, v):
        cache.append(k, v)
        return tq.decode(q, cache) * 2

    made = torch.compile(on_codes, backend="aot_eager")(*operands)
    assert agree(made, on_codes(*operands))
    made = torch.compile(step, backend="aot_eager")(*operands)
    assert agree(made, 2 * tq.decode(operands[0], cache)) and cache.lengths == [48]
    torch._dynamo.reset()
    for call, what in ((on_codes, "quantize"), (step, "KVCache.append")):
        with pytest.raises(torch._dynamo.exc.Unsupported, match=f"tokquant: {what} is no operator"):
            compiled(call)(*operands)
    codes = tq.quantize(*operands, "int8")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="attention of QuantizedTensors is no operator"):
        compiled(lambda: tq.attention(*codes, "int8"))()


@pytest.mark.slow
@pytest.mark.skipif(not build.available(), reason="inductor needs a C++ compiler")
def test_inductor_compiles_a_layer():
    project = torch.nn.Linear(32, 96)

    def layer(x):
        q, k, v = project(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        out, lse = tq.attention(q, k, v, MINE, causal=True, return_lse=True)
        return torch.nn.functional.gelu(out.transpose(1, 2).flatten(2)), lse

    with torch.no_grad():
        for n in (20, 33, 47):
            x = torch.randn(2, n, 32)
            for made, expected in zip(torch.compile(layer, fullgraph=True)(x), layer(x), strict=True):
                torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.compiled
@pytest.mark.parametrize("name", ["int8", "int8-fast", "int8-fp16", "int4"])
def test_a_cuda_graph_replays_attention_on_other_inputs(name):
    operands = [torch.randn(1, 4, 256, 64, device="cuda", dtype=torch.float16) for _ in range(3)]
    call = lambda: tq.attention(*operands, name, causal=True, return_lse=True)  # noqa: E731
    call()  # kernels are compiled, and the launch is chosen, before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for x in operands:
        x.copy_(torch.randn_like(x))
    for x in captured:
        x.fill_(float("nan"))
    graph.replay()
    assert agree(captured, call())


@pytest.mark.gpu
@pytest.mark.compiled
def test_a_capture_says_what_it_cannot_wait_for():
    operands = [torch.randn(1, 4, 256, 64, device="cuda", dtype=torch.float16) for _ in range(3)]
    tq.attention(*operands, "kv-int8")
    with pytest.raises(tq.UnsupportedError, match="no CUDA graph can wait"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        tq.attention(*operands, "kv-int8")
    with pytest.raises(tq.UnsupportedError, match="tune: a CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        tq.tune(*operands, "int8")


def test_nothing_is_tuned_while_a_cuda_graph_is_captured(monkeypatch):
    from tokquant.tune import need_gpu

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(tq.UnsupportedError, match="tune: a CUDA graph is being captured"):
        need_gpu(torch.device("cuda"))


def test_outside_of_torch_compile_too_tensors_that_hold_no_numbers_go_to_the_operator():
    q, k, v = qkv(batch=3, heads=4, kv_heads=2)
    given = dict(scheme=MINE, causal=True, backend="reference")
    expected = tq.attention(q, k, v, return_lse=True, **given)

    with FakeTensorMode() as mode:
        out, lse = tq.attention(*map(mode.from_tensor, (q, k, v)), return_lse=True, **given)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, q.shape[:-1], torch.float32)
    out = tq.attention(*(x.to("meta") for x in (q, k, v)), **given)
    assert (out.shape, out.dtype, out.is_meta) == (q.shape, q.dtype, True)
    with warnings.catch_warnings(action="ignore"):  # of what torch finds slow in both
        mapped = torch.vmap(lambda *each: tq.attention(*(x[None] for x in each), return_lse=True, **given))(q, k, v)
        traced = torch.jit.trace(lambda q, k, v: tq.attention(q, k, v, **given), (q[:1], k[:1], v[:1]))
    assert agree(tuple(x[:, 0] for x in mapped), expected)
    assert agree(traced(q[1:], k[1:], v[1:]), expected[0][1:])
    with pytest.raises(RuntimeError, match="q: requires grad, and quantized attention has no backward"):
        torch.func.grad(lambda q: tq.attention(q, k, v, **given).sum())(q)


@pytest.mark.parametrize("call", ["quantize", "append", "decode"])
def test_what_is_no_operator_refuses_tensors_that_hold_no_numbers(call):
    cache, (q, k, v) = tq.KVCache("kv-int8", batch=1, kv_heads=2, head_dim=32, dtype=torch.float32), qkv()
    cache.append(k, v)
    calls = {
        "quantize": lambda q, k, v: tq.quantize(q, k, v, "int8"),
        "append": lambda q, k, v: cache.append(k, v),
        "decode": lambda q, k, v: tq.decode(q, cache),
    }
    with FakeTensorMode() as mode, pytest.raises(TypeError, match=r"[qk]: stands for numbers that it does not hold"):
        calls[call](*map(mode.from_tensor, (q, k, v)))
    with pytest.raises(TypeError, match=r"[qk]: stands for numbers that it does not hold"):
        torch.vmap(lambda *each: calls[call](*(x[None] for x in each)))(q, k, v)
    assert cache.lengths == [48]
