"""Models of diffusers attend by a scheme; nothing that they ask for is lost, and nothing is taken for granted of diffusers."""

import copy
import os
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

import tokquant as tq
from tokquant import operators
from tokquant.integrations.diffusers import attention, register, surface, unregister, use

diffusers = pytest.importorskip("diffusers")
dispatch = pytest.importorskip("diffusers.models.attention_dispatch")

pytestmark = pytest.mark.usefixtures("without_gradients", "nothing_listed")


@pytest.fixture
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def nothing_listed():
    """No backend of another test is listed or active."""
    yield
    for name in list(surface._added):
        unregister(name)
    dispatch._AttentionBackendRegistry._active_backend = dispatch.AttentionBackendName.NATIVE


@pytest.fixture
def calls(monkeypatch):
    """(scheme's name, q, k, v) of each attention."""
    made, run = [], attention.attention

    def recorded(q, k, v, scheme, **features):
        made.append((scheme.name, q, k, v))
        return run(q, k, v, scheme, **features)

    monkeypatch.setattr(attention, "attention", recorded)
    return made


def flux():
    """Image and text together, in two kinds of blocks."""
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    given = {
        "hidden_states": torch.randn(2, 64, 4), "encoder_hidden_states": torch.randn(2, 12, 32),
        "pooled_projections": torch.randn(2, 32), "timestep": torch.tensor([1.0, 0.3]), "img_ids": torch.rand(64, 3) * 8,
        "txt_ids": torch.zeros(12, 3),
    }  # fmt: skip
    return model.eval(), given


def wan():
    """Frames attend to each other, and to text."""
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16, freq_dim=32, ffn_dim=32,
        num_layers=2, cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip
    given = {
        "hidden_states": torch.randn(1, 4, 2, 12, 12), "timestep": torch.tensor([7]),
        "encoder_hidden_states": torch.randn(1, 20, 16),
    }  # fmt: skip
    return model.eval(), given


def ltx():
    """Text of two lengths, with a mask of floats."""
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32, num_layers=2,
        caption_channels=16,
    )  # fmt: skip
    given = {
        "hidden_states": torch.randn(2, 48, 8), "encoder_hidden_states": torch.randn(2, 20, 16),
        "timestep": torch.tensor([3, 5]), "encoder_attention_mask": torch.arange(20) < torch.tensor([[20], [7]]),
        "num_frames": 2, "height": 4, "width": 6,
    }  # fmt: skip
    return model.eval(), given


MODELS = {"flux": flux, "wan": wan, "ltx, padded text": ltx}


def cosine(x, y):
    return torch.nn.functional.cosine_similarity(x.flatten().double(), y.flatten().double(), dim=0)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_keeps_its_output(name):
    model, given = MODELS[name]()
    exact = model(**given).sample
    same = use(model, "none", backend="reference")(**given).sample
    assert (same - exact).abs().max() < 2e-5 * exact.abs().max().clamp_min(1)
    near = use(model, "int8", backend="reference")(**given).sample
    assert cosine(near, exact) > 0.999 and not torch.equal(near, exact)
    model.reset_attention_backend()
    assert torch.equal(model(**given).sample, exact)


def test_a_model_runs_on_the_kernels_of_its_device():
    model, given = flux()
    emulated = use(model, backend="reference")(**given).sample
    assert (use(model)(**given).sample - emulated).abs().max() < 1e-2


def test_a_registered_scheme_is_taken_by_name_and_in_a_block(calls):
    model, given = flux()
    exact = model(**given).sample
    register("none", backend="reference")
    with diffusers.attention_backend("tokquant"):
        assert (model(**given).sample - exact).abs().max() < 2e-5 and len(calls) == 3
    assert torch.equal(model(**given).sample, exact) and len(calls) == 3
    model.set_attention_backend("tokquant")
    assert (model(**given).sample - exact).abs().max() < 2e-5 and len(calls) == 6
    register("int8", backend="reference")
    assert cosine(model(**given).sample, exact) > 0.999 and [call[0] for call in calls[6:]] == ["int8"] * 3


ENVIRONMENT = """
import sys
import tokquant
from tokquant.integrations.diffusers import register
assert "diffusers" not in sys.modules
register("int8-fast", backend="reference")
from diffusers.models.attention_dispatch import _AttentionBackendRegistry, dispatch_attention_fn
import torch
q, k, v = (torch.randn(1, 40, 2, 16) for _ in range(3))
out = dispatch_attention_fn(q, k, v)
expected = tokquant.attention(*(x.transpose(1, 2) for x in (q, k, v)), "int8-fast", backend="reference").transpose(1, 2)
assert torch.equal(out, expected)
assert _AttentionBackendRegistry.get_active_backend()[0].value == "tokquant"
"""


def test_a_process_can_ask_for_it_in_its_environment_and_tokquant_alone_imports_no_diffusers():
    environment = {**os.environ, "DIFFUSERS_ATTN_BACKEND": "tokquant"}
    result = subprocess.run([sys.executable, "-c", ENVIRONMENT], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def dispatched(n_q=24, n_k=40, heads=4, kv_heads=4, **given):
    """What torch's backend and tokquant's make of the same, `[B, N, H, D]`."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, n, h, 16) for n, h in ((n_q, heads), (n_k, kv_heads), (n_k, kv_heads)))
    return [dispatch.dispatch_attention_fn(q, k, v, backend=name, **given) for name in ("native", "tokquant")]


EACH = torch.arange(40) < torch.tensor([[40], [25]])
GIVEN = {
    "nothing": {},
    "a scale": {"scale": 0.7},
    "causal": {"n_q": 40, "is_causal": True},
    "shared heads": {"kv_heads": 2, "enable_gqa": True},
    "a boolean mask of keys": {"attn_mask": EACH},
    "a boolean mask of keys, of four dimensions": {"attn_mask": EACH[:, None, None]},
    "floats of pairs": {"attn_mask": torch.randn(24, 40, generator=torch.Generator().manual_seed(0))},
    "floats of keys": {"attn_mask": torch.where(EACH, 0.0, -10000.0)},
    "floats of pairs, in one batch": {"attn_mask": torch.linspace(-2, 2, 40).expand(1, 24, 40)},
    "floats of heads": {"attn_mask": torch.linspace(-2, 2, 160).reshape(1, 4, 1, 40)},
    "a boolean mask of everything": {"attn_mask": torch.rand(2, 4, 24, 40, generator=torch.Generator().manual_seed(0)) < 0.8},
}


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_dispatch_means_the_same_as_torch(given):
    register("none", backend="reference")
    native, ours = dispatched(**given)
    assert ours.shape == native.shape and (ours - native).abs().max() < 2e-6


def test_within_autocast_operands_take_its_type_as_they_do_in_torch():
    register("none", backend="reference")
    q, k, v = (torch.randn(2, 24, 3, 16, dtype=kind) for kind in (torch.float32, torch.float32, torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        native, ours = (dispatch.dispatch_attention_fn(q, k, v, backend=name) for name in ("native", "tokquant"))
    assert ours.dtype == native.dtype == torch.bfloat16 and (ours - native).abs().max() < 0.02


def test_tensors_are_turned_without_copies(calls):
    register("none", backend="reference")
    q, k, v = (torch.randn(2, 24, 3, 16) for _ in range(3))
    dispatch.dispatch_attention_fn(q, k, v, backend="tokquant")
    [(_, *seen)] = calls
    assert [x.data_ptr() for x in seen] == [x.data_ptr() for x in (q, k, v)]
    assert all(x.shape == (2, 3, 24, 16) for x in seen)


def test_the_lse_is_natural_and_of_heads():
    register("none", backend="reference")
    q, k, v = (torch.randn(2, n, 3, 16) for n in (24, 40, 40))
    out, lse = dispatch.dispatch_attention_fn(q, k, v, attention_kwargs={"return_lse": True}, backend="tokquant")
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 4
    assert (lse - scores.logsumexp(-1)).abs().max() < 1e-5
    assert (out - torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)).abs().max() < 1e-5


REFUSED = {
    "dropout": ({"dropout_p": 0.1}, tq.UnsupportedError, "dropout_p: 0.1"),
    "context parallelism": ({"parallel_config": object()}, tq.UnsupportedError, "parallel_config: "),
    "causality of other lengths": ({"is_causal": True}, tq.UnsupportedError, "is_causal: of 24 queries and 40 keys"),
    "heads that are not said to be shared": ({"kv_heads": 2}, ValueError, "key: 2 heads, and query has 4; give enable_gqa"),
    "a mask of three dimensions": (
        {"attn_mask": torch.ones(2, 24, 40).bool()}, tq.UnsupportedError, r"attn_mask: shape \[2, 24, 40\] leaves open",
    ),
    "a mask for flex attention": (
        {"attn_mask": create_block_mask(lambda b, h, q, k: q >= k, None, None, 24, 40, device="cpu")},
        tq.UnsupportedError, "attn_mask: a BlockMask is for another backend",
    ),
    "a mask of another length": ({"attn_mask": torch.ones(2, 39).bool()}, ValueError, "does not broadcast"),
}  # fmt: skip


@pytest.mark.parametrize(("given", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_done_is_named(given, error, message):
    register("none", backend="reference")
    q, k, v = (torch.randn(2, n, h, 16) for n, h in ((24, 4), (40, given.get("kv_heads", 4)), (40, given.get("kv_heads", 4))))
    given = {name: value for name, value in given.items() if name != "kv_heads"}
    with pytest.raises(error, match=message):
        dispatch.dispatch_attention_fn(q, k, v, backend="tokquant", **given)


def test_training_is_refused():
    model, given = flux()
    use(model, "none", backend="reference")
    with torch.enable_grad(), pytest.raises(RuntimeError, match=r"q: requires grad, .*no_grad"):
        model(**given)


MAP = tq.SchemeMap.from_yaml("""
name: mine
layers:
  transformer_blocks.*: none
  single_transformer_blocks.1.*: {heads: {"0": int8, "1": int8-fp16}}
  "*": int8-fast
""")


def test_a_map_gives_each_layer_its_scheme(calls):
    model, given = flux()
    other, _ = flux()
    exact = model(**given).sample
    assert cosine(use(model, MAP, backend="reference")(**given).sample, exact) > 0.999
    assert [call[0] for call in calls] == ["none", "int8-fast", "int8 + int8-fp16"]
    other(**given)
    assert len(calls) == 3
    copy.deepcopy(model)(**given)
    assert [call[0] for call in calls[3:]] == [call[0] for call in calls[:3]]
    use(other, MAP, backend="reference")
    assert other.transformer_blocks[0].attn.processor._attention_backend is (
        model.transformer_blocks[0].attn.processor._attention_backend
    )


@pytest.mark.parametrize("scheme", [MAP, "kv-fp8"], ids=["a map", "scales"])
def test_a_pickled_model_keeps_its_schemes_in_another_process_too(scheme, tmp_path):
    model, given = flux()
    scales = None
    if scheme == "kv-fp8":
        calibrator = tq.Calibrator(scheme)
        with calibrator.watch(model):
            model(**given)
        scales = calibrator.scales()
    expected = use(model, scheme, scales=scales, backend="reference")(**given).sample
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(**given).sample, expected)
    if scheme is MAP:
        blocks = [each.transformer_blocks[0].attn.processor._attention_backend for each in (model, again)]
        assert blocks[0] is blocks[1]  # one graph of torch.compile
    torch.save([model, given, expected], tmp_path / "model.pt")
    code = "import sys, torch; model, given, expected = torch.load(sys.argv[1], weights_only=False); "
    code += "torch.set_grad_enabled(False); assert torch.equal(model(**given).sample, expected)"
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "model.pt"]).returncode == 0


def test_calibrated_scales_go_to_their_layers(calls):
    model, given = flux()
    calibrator = tq.Calibrator("kv-fp8")
    with calibrator.watch(model):
        exact = model(**given).sample
    scales = calibrator.scales()
    layers = ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn", "single_transformer_blocks.1.attn"]
    assert set(scales) == set(layers)
    near = use(model, "kv-fp8", scales=scales, backend="reference")(**given).sample
    assert cosine(near, exact) > 0.999 and not torch.equal(near, exact)

    with pytest.raises(tq.ScalesError, match="'kv-fp8' is static"):
        use(model, "kv-fp8")
    with pytest.raises(tq.ScalesError, match="'int8' has no static part"):
        use(model, "int8", scales=scales)
    with pytest.raises(TypeError, match="scales: a LayerScales"):
        use(model, "kv-fp8", scales=scales[layers[0]])
    with pytest.raises(TypeError, match="scales: these are of 3 layers, and diffusers does not tell"):
        register("kv-fp8", scales=scales)
    fewer = tq.Scales(scales.scheme, {layers[0]: scales[layers[0]].tensors})
    with pytest.raises(tq.ScalesError, match=r"scales: no layer 'single_transformer_blocks.0.attn'"):
        use(model, "kv-fp8", scales=fewer)
    more = tq.Scales(
        scales.scheme, {layer: scales[layer].tensors for layer in layers} | {"elsewhere": scales[layers[0]].tensors}
    )
    with pytest.raises(tq.ScalesError, match="FluxTransformer2DModel has no layer 'elsewhere'"):
        use(model, "kv-fp8", scales=more)
    part = tq.SchemeMap.from_data({"name": "part", "layers": {"single*": "kv-fp8", "*": "int8"}})
    with pytest.raises(tq.ScalesError, match=r"scales: transformer_blocks.0.attn takes scheme 'int8', which has no use for th"):
        use(model, part, scales=scales)
    calls.clear()
    assert torch.equal(model(**given).sample, near) and [call[0] for call in calls] == ["kv-fp8"] * 3


def test_nothing_is_kept_of_backends_that_no_model_has():
    model, _ = flux()
    registry = dispatch._AttentionBackendRegistry
    sizes = [len(entries) for entries in (registry._backends, registry._constraints, registry._supported_arg_names)]
    layers = [name for name, module in model.named_modules() if hasattr(module, "processor")]
    kept = []
    for _ in range(3):
        ones = {layer: {f"{role}_scale": torch.ones(2, 1, 1) for role in "kv"} for layer in layers}
        scales = tq.Scales(tq.preset("kv-fp8"), ones)
        use(model, "kv-fp8", scales=scales)
        kept.append(weakref.ref(scales[layers[0]]))
    del scales
    assert [each() is None for each in kept] == [True, True, False]
    use(model, "int8-fast")
    model.reset_attention_backend()
    assert kept[-1]() is None
    assert sizes == [len(entries) for entries in (registry._backends, registry._constraints, registry._supported_arg_names)]


def test_what_does_not_fit_a_model_is_named():
    model, _ = flux()
    with pytest.raises(
        tq.SchemeError,
        match=r"'transformer_block\.\*' matches no layer of FluxTransformer2DModel; did you mean 'transformer_blocks.0.attn'",
    ):
        use(model, tq.SchemeMap.from_yaml('layers: {"transformer_block.*": int8, "*": int8}'))
    with pytest.raises(tq.SchemeError, match=r"no pattern matches layer 'single_transformer_blocks\.0\.attn'"):
        use(model, tq.SchemeMap.from_yaml('layers: {"transformer_blocks.*": int8}'))
    with pytest.raises(TypeError, match=r"model: a str; give a torch\.nn\.Module, such as pipe\.transformer"):
        use("flux")
    for backend, words in (("tritn", "'tritn'"), (["auto"], r"\['auto'\]")):
        with pytest.raises(ValueError, match=f"backend: {words} is not valid"):
            use(model, backend=backend)
    with pytest.raises(tq.UnsupportedError, match="a Linear takes no backends; it has no attention of diffusers"):
        use(torch.nn.Linear(2, 2))
    assert all(processor._attention_backend is None for processor in model.attn_processors.values())


@pytest.mark.skipif(operators.OLD, reason="torch before 2.12 does not take ranges of heads into a graph")
def test_a_model_with_schemes_of_its_own_compiles_as_a_whole():
    model, given = flux()
    expected = use(model, MAP, backend="reference")(**given).sample
    torch._dynamo.reset()
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(**given).sample, expected)


def test_layers_that_share_a_processor_have_one_scheme():
    model, _ = flux()
    blocks = model.single_transformer_blocks
    blocks[1].attn.set_processor(blocks[0].attn.processor)
    use(model, "int8")
    with pytest.raises(
        tq.SchemeError, match=r"single_transformer_blocks.1.attn shares its processor with single_transformer_blocks.0"
    ):
        use(model, MAP)


def test_attention_that_takes_no_backend_is_not_passed_over_in_silence():
    model, _ = flux()
    theirs = diffusers.models.attention_processor.JointAttnProcessor2_0
    model.transformer_blocks[0].attn.set_processor(theirs())
    with pytest.warns(UserWarning, match="1 of 3 layers stay as they are; JointAttnProcessor2_0 takes no backend"):
        use(model)
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, out_channels=4,
    )  # fmt: skip
    with pytest.raises(
        tq.UnsupportedError, match=r"a SD3Transformer2DModel takes no backends; its attention is JointAttn.*quantized_sdpa"
    ):
        use(model)


def test_a_backend_that_was_unregistered_is_not_listed_and_says_so_where_it_is_left():
    model, given = flux()
    register("none", name="mine")
    model.set_attention_backend("mine")
    unregister("mine")
    assert dispatch._AttentionBackendRegistry._active_backend == "native"
    with pytest.raises(ValueError, match="attention backend 'mine' was unregistered; set another"):
        model(**given)
    with pytest.raises(ValueError, match="must be one of"):
        model.set_attention_backend("mine")
    with pytest.raises(ValueError, match="name: no backend 'mine' was registered"):
        unregister("mine")
    register("none", name="mine", backend="reference")
    model(**given)


BAD = {
    "a map of layers": ({"scheme": MAP}, tq.SchemeError, r"'mine' is a map of layers, .* use\(model, ...\) takes them"),
    "a name of diffusers": ({"name": "native"}, ValueError, "name: 'native' is a backend of diffusers' own"),
    "a name that it would not find": ({"name": "Tokquant"}, ValueError, "name: 'Tokquant'; use lower-case letters"),
    "an unknown scheme": ({"scheme": "int9"}, tq.SchemeError, "no preset 'int9'"),
    "an unknown backend": ({"backend": "cuda"}, ValueError, "backend: 'cuda' is not valid"),
    "a static scheme without scales": ({"scheme": "kv-fp8"}, tq.ScalesError, "'kv-fp8' is static"),
}


@pytest.mark.parametrize(("given", "error", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_register_nothing(given, error, message):
    with pytest.raises(error, match=message):
        register(**given)
    assert not surface._added and "tokquant" not in dispatch.AttentionBackendName._value2member_map_


def test_a_map_of_one_scheme_can_be_registered(calls):
    register(tq.SchemeMap.from_yaml('layers: {"*": int8-fast}'), backend="reference")
    dispatched()
    assert calls[0][0] == "int8-fast"


@pytest.mark.parametrize(
    "path", [path for part, inner in surface.NEEDED.items() for path in (part, *(f"{part}.{x}" for x in inner))]
)
def test_a_diffusers_without_what_is_used_is_refused_by_name(monkeypatch, path):
    changed = type(sys)("attention_dispatch")
    for name in surface.NEEDED:
        owner = type(sys)(name)
        for attribute in surface.NEEDED[name]:
            if path != f"{name}.{attribute}":
                setattr(owner, attribute, getattr(getattr(dispatch, name), attribute))
        if name != path:
            setattr(changed, name, owner)
    monkeypatch.setitem(sys.modules, "diffusers.models.attention_dispatch", changed)
    with pytest.raises(
        tq.UnsupportedError, match=rf"diffusers {diffusers.__version__}: .* has no (.*, )?{path}.*works with diffusers 0"
    ):
        register()


def test_a_diffusers_with_arguments_that_would_be_dropped_is_refused(monkeypatch):
    registry = dispatch._AttentionBackendRegistry
    native = registry._supported_arg_names[dispatch.AttentionBackendName.NATIVE]
    monkeypatch.setitem(registry._supported_arg_names, dispatch.AttentionBackendName.NATIVE, native | {"attention_bias"})
    with pytest.raises(tq.UnsupportedError, match="its backends take attention_bias, which tokquant does not know"):
        register()
    assert "tokquant" not in dispatch.AttentionBackendName._value2member_map_


def test_a_diffusers_without_dispatch_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers.models.attention_dispatch", None)
    with pytest.raises(tq.UnsupportedError, match=r"there is no diffusers\.models\.attention_dispatch; this works with"):
        register()


def test_without_diffusers_it_says_how_to_install_it(monkeypatch):
    class Without:
        @staticmethod
        def find_spec(name, *_):
            if name == "diffusers":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    for name in [name for name in sys.modules if name.partition(".")[0] == "diffusers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Without, *sys.meta_path])
    with pytest.raises(ImportError, match=r"diffusers is not installed: pip install 'tokquant\[diffusers\]'"):
        register()
