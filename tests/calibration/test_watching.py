"""Watching a model: layers have the model's names, and what is seen is what was given to torch's attention."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import tokquant as tq
from tokquant import activations
from tokquant.calibration.watching import Watcher


class Attention(nn.Module):
    """Self-attention with two heads of K and V for four of Q."""

    def __init__(self, times=1, repeated=False):
        super().__init__()
        self.qkv, self.times, self.repeated = nn.Linear(64, 128), times, repeated

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (8, 16)).transpose(1, 2).split([4, 2, 2], dim=1)
        for _ in range(self.times):
            if self.repeated:
                k, v = (y.repeat_interleave(2, dim=1) for y in (k, v))
                out = scaled_dot_product_attention(q, k, v, is_causal=True)
            else:
                out = torch.nn.functional.scaled_dot_product_attention(q, key=k, value=v, enable_gqa=True)
        return out.transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.self_attn, self.norm = Attention(**options), nn.LayerNorm(64)

    def forward(self, x):
        return x + self.self_attn(self.norm(x))


def watched(model, *inputs, observer="amax", scheme="kv-fp8"):
    calibrator = tq.Calibrator(scheme, observer)
    with calibrator.watch(model):
        for x in inputs:
            model(x)
    return calibrator


def untouched(model):
    return all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_scales_are_those_of_observing_k_and_v_by_hand():
    model = nn.Sequential(Block(), Block())
    x, seen = torch.randn(2, 30, 64), {}
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            module.register_forward_pre_hook(lambda m, args, name=name: seen.update({name: (m, args[0])}))
    plain = model(x)
    expected = tq.Calibrator("kv-fp8")
    for name, (module, given) in seen.items():
        expected.observe(name, *module.qkv(given).unflatten(-1, (8, 16)).transpose(1, 2).detach().split([4, 2, 2], dim=1))
    calibrator = tq.Calibrator("kv-fp8")
    with calibrator.watch(model):
        assert torch.equal(model(x), plain), "watching changes no output"
    assert list(calibrator.layers) == ["0.self_attn", "1.self_attn"]
    assert calibrator.layers["0.self_attn"].shapes == {"q": (4, 16), "k": (2, 16), "v": (2, 16)}
    for name, layer in calibrator.scales().items():
        assert all(torch.equal(value, expected.scales()[name].tensors[key]) for key, value in layer.tensors.items())


def test_batches_in_one_block_or_in_several_are_the_same():
    model, inputs = Block(), [torch.randn(1, n, 64) for n in (5, 9)]
    together, apart = watched(model, *inputs), tq.Calibrator("kv-fp8")
    for x in inputs:
        with apart.watch(model):
            model(x)
    assert together.layers["self_attn"].tokens == apart.layers["self_attn"].tokens == {"q": 14, "k": 14, "v": 14}
    assert torch.equal(*(c.scales()["self_attn"].tensors["k_scale"] for c in (together, apart)))


def test_repeated_heads_are_seen_as_they_are_given():
    assert watched(Block(repeated=True), torch.randn(1, 5, 64)).layers["self_attn"].shapes["k"] == (4, 16)


def test_within_autocast_operands_are_seen_in_its_type_as_torch_takes_them():
    class Rotated(nn.Module):
        def forward(self, x):
            return scaled_dot_product_attention(x.float(), x.float(), x)

    calibrator, x = tq.Calibrator("kv-fp8"), torch.randn(1, 2, 9, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16), calibrator.watch(model := Rotated()):
        model(x)
    by_hand = tq.Calibrator("kv-fp8")
    by_hand.observe("Rotated", x, x, x)
    assert torch.equal(calibrator.scales()["Rotated"].tensors["k_scale"], by_hand.scales()["Rotated"].tensors["k_scale"])


def test_further_calls_in_one_forward_have_names_of_their_own():
    model = Block(times=3)
    calibrator = watched(model, torch.randn(1, 5, 64), torch.randn(1, 7, 64))
    assert {name: layer.tokens["k"] for name, layer in calibrator.layers.items()} == {
        "self_attn": 12, "self_attn:2": 12, "self_attn:3": 12,
    }  # fmt: skip


def test_a_module_that_runs_twice_is_one_layer():
    block = Block()
    assert watched(nn.Sequential(block, block), torch.randn(1, 5, 64)).layers["0.self_attn"].tokens["k"] == 10


def test_a_model_that_attends_itself_has_its_own_name():
    assert list(watched(Attention(), torch.randn(1, 5, 64)).layers) == ["Attention"]


def test_only_modules_of_the_model_are_watched():
    model, other = Block(), Block()
    calibrator = tq.Calibrator("kv-fp8")
    with calibrator.watch(model):
        other(torch.randn(1, 5, 64))
        scaled_dot_product_attention(*(torch.randn(1, 2, 5, 16) for _ in range(3)))
        model(torch.randn(1, 5, 64))
    assert calibrator.layers["self_attn"].tokens["k"] == 5 and len(calibrator.layers) == 1


def test_gradients_still_flow():
    model = Block()
    with tq.Calibrator("kv-fp8").watch(model):
        model(torch.randn(1, 5, 64)).sum().backward()
    assert model.self_attn.qkv.weight.grad is not None


def test_nothing_is_left_behind_when_the_model_raises():
    model = nn.Sequential(Block(), nn.Linear(63, 1))
    calibrator = tq.Calibrator("kv-fp8")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), calibrator.watch(model):
        model(torch.randn(1, 5, 64))
    assert untouched(model) and torch.overrides._get_current_function_mode_stack() == []
    assert calibrator.layers["0.self_attn"].tokens["k"] == 5, "what was seen before counts"
    model[0](torch.randn(1, 5, 64))
    assert calibrator.layers["0.self_attn"].tokens["k"] == 5


def test_a_module_that_raises_and_is_caught_does_not_name_what_follows():
    class Careful(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(1, 1), Attention()

        def forward(self, x):
            try:
                self.first(x)
            except RuntimeError:
                return self.second(x)

    assert list(watched(Careful(), torch.randn(1, 5, 64)).layers) == ["second"]


def test_what_cannot_be_observed_names_the_layer():
    model = Block()
    with pytest.raises(TypeError, match=r"self_attn: q: torch.float64 is not supported"):
        watched(model.double(), torch.randn(1, 5, 64, dtype=torch.float64))
    model.float().self_attn.qkv.bias.data.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"^self_attn\.q: holds a value that is not finite"):
        watched(model, torch.randn(1, 5, 64))
    assert untouched(model)


@pytest.mark.parametrize(
    ("run", "why"), [(True, "no torch scaled_dot_product_attention was seen"), (False, "the model did not run")]
)
def test_no_attention_at_all_says_what_to_do(run, why):
    model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=f"watch: {why}.*attn_implementation='sdpa'.*observe"):
        watched(model, *([torch.randn(1, 4)] if run else []))
    with (
        pytest.raises(TypeError, match=r"model: a function; give a torch\.nn\.Module"),
        tq.Calibrator("kv-fp8").watch(untouched),
    ):
        pass


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_torchs_transformer_layers_are_seen(training):
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(training), torch.randn(2, 10, 32)
    with torch.no_grad():
        expected = model(x)
        calibrator = tq.Calibrator("kv-fp8")
        with calibrator.watch(model):
            assert torch.allclose(model(x), expected, atol=1e-6)
    assert list(calibrator.layers) == ["layers.0.self_attn", "layers.1.self_attn"]
    own = model.layers[0].self_attn
    k = nn.functional.linear(x, own.in_proj_weight[32:64], own.in_proj_bias[32:64]).unflatten(-1, (4, 8)).transpose(1, 2)
    largest = k.abs().amax(dim=(0, 2, 3)) / 448
    assert torch.allclose(calibrator.scales()["layers.0.self_attn"].tensors["k_scale"].flatten(), largest, rtol=1e-5)


def test_torchs_attention_that_returns_weights_takes_another_way():
    model, x = nn.MultiheadAttention(32, 4, batch_first=True), torch.randn(2, 10, 32)
    with pytest.raises(ValueError, match="need_weights=False"), tq.Calibrator("kv-fp8").watch(model):
        model(x, x, x)
    calibrator = tq.Calibrator("kv-fp8")
    with calibrator.watch(model):
        model(x, x, x, need_weights=False)
    assert calibrator.layers["MultiheadAttention"].shapes["k"] == (4, 8)


def test_a_llama_has_the_names_of_its_modules_and_its_own_heads():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    calibrator = tq.Calibrator("kv-fp8", "mse")
    with torch.no_grad(), calibrator.watch(model):
        model(torch.randint(3, 128, (2, 12)))
    assert list(calibrator.layers) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert calibrator.scales()["model.layers.0.self_attn"].tensors["k_scale"].shape == (2, 1, 1)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"), torch.no_grad(), calibrator.watch(model):
        model(torch.randint(3, 128, (2, 12)))


def test_what_is_recorded_is_what_a_calibrator_would_observe(tmp_path):
    model, (x, y), seen = nn.Sequential(Block(), Block(times=2)), torch.randn(2, 1, 20, 64), {}
    with Watcher(model, lambda name, *operands: seen.setdefault(name, operands)).watching():
        model(x)
    with tq.record(model) as layers:
        model(x)
        model(y)  # of which nothing is kept
    assert list(layers) == list(seen) == ["0.self_attn", "1.self_attn", "1.self_attn:2"]
    for name, operands in layers.items():
        assert all(torch.equal(*pair) and not pair[0].requires_grad for pair in zip(operands, seen[name], strict=True))
    activations.save(tmp_path / "layers.safetensors", layers)
    read = activations.Activations(tmp_path / "layers.safetensors")
    assert all(torch.equal(*pair) for name in layers for pair in zip(read[name], layers[name], strict=True))
    assert tq.search(layers, ["int8", "int8-fast"], budget="bits=12", rows=4).layers[0].layer == "0.self_attn"


def test_what_cannot_be_recorded_names_the_layer():
    model = Block().double()
    with pytest.raises(TypeError, match=r"self_attn: q: torch.float64 is not supported"), tq.record(model):
        model(torch.randn(1, 5, 64, dtype=torch.float64))
    with pytest.raises(ValueError, match="the model did not run"), tq.record(model):
        pass
    assert untouched(model)
