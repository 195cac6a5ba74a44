"""Every class of bad input has its own error, of the documented type, at once, naming the argument."""

import fractions
import time

import numpy as np
import pytest
import safetensors.torch
import torch
from factories import qkv

import tokquant
from tokquant import QuantScheme, Scales, ScalesError, SchemeError, bias
from tokquant.activations import Activations, sample

BASE = {role: {"precision": "int8"} for role in "qkvp"}
SHAPE = (1, 2, 20, 32)


def scheme(**changes):
    return QuantScheme(**{**BASE, **{role: {**BASE[role], **fields} for role, fields in changes.items()}})


def x(*shape, dtype=torch.float32):
    return torch.randn(*(shape or SHAPE)).to(dtype)


def refused(error, *parts, call=tokquant.attention, **changes):
    """`call` on good arguments with some changed raises `error` soon, with these parts in its message."""
    arguments = {"q": x(), "k": x(), "v": x(), "scheme": "int8", **changes}
    start = time.process_time()
    with pytest.raises(error) as raised:
        call(**arguments)
    assert time.process_time() - start < 1
    assert all(part in str(raised.value) for part in parts), str(raised.value)
    assert type(raised.value) is error


doors = pytest.mark.parametrize("call", [tokquant.attention, tokquant.quantize], ids=["attention", "quantize"])

TENSORS = {
    "a list for q": (TypeError, {"q": [[1.0]]}, "q: a list", "torch.Tensor [B, H, N, D]"),
    "an array for k": (TypeError, {"k": x().numpy()}, "k: a ndarray", "torch.Tensor"),
    "None for v": (TypeError, {"v": None}, "v: a NoneType"),
    "integers": (TypeError, {"q": x(dtype=torch.int8)}, "q: torch.int8 is not supported; use float16"),
    "float64": (TypeError, {"v": x(dtype=torch.float64)}, "v: torch.float64 is not supported"),
    "differing types": (TypeError, {"k": x(dtype=torch.float16)}, "q, k, v: types torch.float32, torch.float16"),
    "three dimensions": (ValueError, {"q": x(2, 20, 32)}, "q: shape [2, 20, 32] has 3 dimensions", "[batch, heads"),
    "five dimensions": (ValueError, {"v": x(1, *SHAPE)}, "v: shape [1, 1, 2, 20, 32] has 5 dimensions"),
    "no batch": (ValueError, {"q": x(0, 2, 20, 32)}, "q: shape [0, 2, 20, 32] is empty"),
    "no heads": (ValueError, {"k": x(1, 0, 20, 32)}, "k: shape [1, 0, 20, 32] is empty"),
    "no tokens": (ValueError, {"k": x(1, 2, 0, 32)}, "k: shape [1, 2, 0, 32] is empty"),
    "no head_dim": (ValueError, {"v": x(1, 2, 20, 0)}, "v: shape [1, 2, 20, 0] is empty"),
    "heads that do not divide": (ValueError, {"q": x(1, 3, 20, 32)}, "k: 2 heads do not divide the 3 of q"),
    "more heads of k than of q": (ValueError, {"q": x(1, 1, 20, 32)}, "k: 2 heads do not divide the 1 of q"),
    "another batch": (ValueError, {"q": x(3, 2, 20, 32)}, "k: batch 1 is not that of q, 3"),
    "another head_dim": (ValueError, {"q": x(1, 2, 20, 16)}, "k: head_dim 32 is not that of q, 16"),
    "v shorter than k": (ValueError, {"v": x(1, 2, 19, 32)}, "v: shape [1, 2, 19, 32] is not that of k, [1, 2, 20, 32]"),
    "another device": (ValueError, {"v": x().to("meta")}, "q, k, v: on cpu, cpu, meta; put them on one device"),
    "a gradient": (RuntimeError, {"k": x().requires_grad_()}, "k: requires grad", "torch.no_grad()"),
    "a nested tensor": (
        TypeError,
        {"q": torch.nested.nested_tensor([x()[0, 0]], layout=torch.jagged)},
        "q: a nested tensor; give a dense one",
        "tq.attention_varlen",
    ),
    "a sparse tensor": (TypeError, {"v": x().to_sparse()}, "v: a tensor of layout torch.sparse_coo; give a dense one"),
    "what is negated when it is read": (
        TypeError,
        {"q": torch.randn(*SHAPE, dtype=torch.complex64).conj().imag},
        "q: a view that torch negates",
        "resolve_neg()",
    ),
    "an unknown backend": (ValueError, {"backend": "refrence"}, "backend: 'refrence'", "did you mean 'reference'"),
    "no backend": (ValueError, {"backend": None}, "backend: None", "auto, triton, cpu, reference"),
    "a number as scheme": (SchemeError, {"scheme": 8}, "scheme: 8 is no scheme; give a QuantScheme"),
    "an operand as scheme": (SchemeError, {"scheme": scheme().k}, "scheme: a Keys is no scheme"),
    "an unknown scheme": (SchemeError, {"scheme": "int88"}, "no preset 'int88'", "did you mean 'int8'"),
    "a file that is not there": (SchemeError, {"scheme": "no/such.yaml"}, "no/such.yaml: No such file"),
    "no scales": (ScalesError, {"scheme": "kv-fp8"}, "scales: scheme 'kv-fp8' is static and needs k_scale, v_scale"),
    "a group too large": (SchemeError, {"scheme": scheme(v={"granularity": {"group": 64}})}, "a group of 64", "head_dim 32"),
    "fp16 overflow": (
        ValueError,
        {"scheme": scheme(v={"precision": "fp16"}), "v": x() * 1e6},
        "v: a value of",
        "precision: bf16",
    ),
    "a scale past fp16": (
        ValueError,
        {"scheme": scheme(k={"scale_dtype": "fp16"}), "k": x() * 1e9},
        "k: a scale of",
        "does not fit scale_dtype fp16 (at most 65504)",
    ),
    "a zero past fp16": (
        ValueError,
        {"scheme": scheme(k={"scale_dtype": "fp16", "symmetric": False}), "k": x() * 1e9},
        "k: a zero of",
        "does not fit scale_dtype fp16",
    ),
    "a scale past e4m3": (
        ValueError,
        {"scheme": scheme(q={"scale_dtype": "fp8_e4m3"}), "q": x() * 1e6},
        "q: a scale of",
        "does not fit scale_dtype fp8_e4m3 (at most 448)",
    ),
}


@doors
@pytest.mark.parametrize(("error", "changes", "parts"), [(e, c, p) for e, c, *p in TENSORS.values()], ids=TENSORS)
def test_tensors_and_schemes_that_cannot_be_are_refused(call, error, changes, parts):
    refused(error, *parts, call=call, **changes)


FEATURES = {
    "a NaN scale": (ValueError, {"scale": float("nan")}, "scale: nan is not finite"),
    "a scale of many digits": (ValueError, {"scale": 10**400}, "scale: "),
    "a scale beyond float32": (ValueError, {"scale": -1e39}, "scale: -1e+39 is more than float32 holds"),
    "text as scale": (TypeError, {"scale": "0.1"}, "scale: '0.1' is not a number"),
    "a truth as scale": (TypeError, {"scale": True}, "scale: True is not a number"),
    "softcap 0": (ValueError, {"softcap": 0}, "softcap: 0 is not above zero"),
    "a negative softcap": (ValueError, {"softcap": -1.5}, "softcap: -1.5 is not above zero"),
    "an infinite softcap": (ValueError, {"softcap": float("inf")}, "softcap: inf is not finite"),
    "a softcap beyond float32": (ValueError, {"softcap": 1e39}, "softcap: 1e+39 is more than float32 holds"),
    "text as softcap": (TypeError, {"softcap": "50"}, "softcap: '50' is not a number"),
    "causal 1": (TypeError, {"causal": 1}, "causal: 1 is not a bool"),
    "text for return_lse": (TypeError, {"return_lse": "no"}, "return_lse: 'no' is not a bool"),
    "a tensor for deterministic": (TypeError, {"deterministic": x(2)}, "deterministic: a Tensor is not a bool"),
    "one number as window": (ValueError, {"window": 3}, "window: 3 is not (left, right)"),
    "three numbers as window": (ValueError, {"window": (1, 2, 3)}, "window:", "is not (left, right)"),
    "a negative window": (ValueError, {"window": (-1, 0)}, "window:", "whole numbers from 0"),
    "a window of fractions": (ValueError, {"window": (1.5, 0)}, "window:", "whole numbers from 0"),
    "a negative window that is read once": (ValueError, {"window": iter((-1, 0))}, "window:", "whole numbers from 0"),
    "a window of truths": (ValueError, {"window": (True, 0)}, "window:", "whole numbers from 0"),
    "a list as mask": (TypeError, {"mask": [True]}, "mask: list is no mask", "True = attend"),
    "a mask of integers": (TypeError, {"mask": torch.ones(20, 20).int()}, "mask: torch.int32 is no mask"),
    "a small mask": (ValueError, {"mask": torch.ones(19, 20) > 0}, "mask: shape [19, 20]", "to [1, 2, 20, 20]"),
    "a mask of five dimensions": (ValueError, {"mask": x(1, 1, 1, 20, 20)}, "mask: shape [1, 1, 1, 20, 20]"),
    "a mask with a gradient": (RuntimeError, {"mask": torch.zeros(20, 20).requires_grad_()}, "mask: requires grad"),
    "a sparse mask": (TypeError, {"mask": torch.zeros(20, 20).to_sparse()}, "mask: a tensor of layout", "give a dense one"),
    "sinks that are negated when they are read": (
        TypeError,
        {"sinks": torch.zeros(2, dtype=torch.complex64).conj().imag},
        "sinks: a view that torch negates",
    ),
    "a list as sinks": (TypeError, {"sinks": [0.0, 0.0]}, "sinks: a list", "floating-point tensor [H_q]"),
    "sinks of integers": (TypeError, {"sinks": torch.zeros(2).int()}, "sinks: ", "floating-point"),
    "three sinks": (ValueError, {"sinks": torch.zeros(3)}, "sinks: shape [3] is not [2]"),
    "a tensor as bias": (TypeError, {"bias": x(20, 20)}, "bias: a Tensor; give one of tokquant.bias", "dense(tensor)"),
    "text as bias": (TypeError, {"bias": "alibi"}, "bias: a str; give one of tokquant.bias: alibi, key_vector"),
    "three slopes": (ValueError, {"bias": bias.alibi(x(3))}, "bias: slopes of shape [3], not [2]"),
    "a bias of too few keys": (ValueError, {"bias": bias.key_vector(x(19))}, "bias: values of shape [19]", "to [1, 2, 20]"),
    "a dense bias of too few keys": (ValueError, {"bias": bias.dense(x(20, 19))}, "bias: values of shape [20, 19]"),
    "factors of too few queries": (
        ValueError,
        {"bias": bias.lowrank(x(1, 2, 19, 4).half(), x(1, 2, 20, 4).half())},
        "bias: q_factors of shape [1, 2, 19, 4] do not broadcast to [1, 2, 20, 4]",
    ),
    "factors of three heads": (
        ValueError,
        {"bias": bias.lowrank(x(1, 2, 20, 4).half(), x(1, 3, 20, 4).half())},
        "bias: k_factors of shape [1, 3, 20, 4]",
    ),
    "a bias elsewhere": (ValueError, {"bias": bias.dense(x(20, 20).to("meta"))}, "bias: on meta, and q on cpu"),
    "a bias with a gradient": (RuntimeError, {"bias": bias.dense(x(20, 20).requires_grad_())}, "bias: requires grad"),
    "sinks with a gradient": (RuntimeError, {"sinks": torch.zeros(2).requires_grad_()}, "sinks: requires grad"),
}


@pytest.mark.parametrize(("error", "changes", "parts"), [(e, c, p) for e, c, *p in FEATURES.values()], ids=FEATURES)
def test_features_that_cannot_be_are_refused(error, changes, parts):
    refused(error, *parts, **changes)


@pytest.mark.parametrize("number", [fractions.Fraction(3), np.float32(3), 3], ids=lambda number: type(number).__name__)
def test_a_number_of_any_type_is_the_number_that_it_is(number):
    q, k, v = qkv(20)
    made = tokquant.attention(q, k, v, "int8", softcap=number, scale=number, backend="reference")
    assert torch.equal(made, tokquant.attention(q, k, v, "int8", softcap=3.0, scale=3.0, backend="reference"))


@doors
def test_a_gradient_is_taken_under_no_grad(call):
    tensors = [x().requires_grad_() for _ in range(3)]
    with torch.no_grad():
        call(*tensors, "int8")
    assert all(tensor.requires_grad and tensor.grad is None for tensor in tensors)


def layer(**tensors):
    return tokquant.LayerScales("layers.0", {name: torch.ones(2, 1, 1) for name in ("k_scale", "v_scale")} | tensors)


SCALES = {
    "scales for a dynamic scheme": (ScalesError, "int8", layer(), "layers.0.k_scale: scheme 'int8' has no use for it"),
    "all layers": (TypeError, "kv-fp8", Scales(tokquant.preset("kv-fp8"), {"a": layer().tensors}), "scales: ", "scales['a']"),
    "a plain dict": (TypeError, "kv-fp8", layer().tensors, "scales: a dict", "load_scales(path)"),
    "another role": (ScalesError, "kv-fp8", layer(q_scale=torch.ones(2, 1, 1)), "layers.0.q_scale: ", "did you mean"),
    "one missing": (ScalesError, "kv-fp8", tokquant.LayerScales("a", {"k_scale": torch.ones(2, 1, 1)}), "a.v_scale: missing"),
    "three heads": (
        ScalesError,
        "kv-fp8",
        layer(k_scale=torch.ones(3, 1, 1)),
        "layers.0.k_scale: shape [3, 1, 1]",
        "[2, 1, 1]",
    ),
    "zero": (ScalesError, "kv-fp8", layer(v_scale=torch.zeros(2, 1, 1)), "layers.0.v_scale: holds a scale that is not above"),
    "infinity": (ScalesError, "kv-fp8", layer(v_scale=torch.ones(2, 1, 1) / 0), "layers.0.v_scale: ", "not finite"),
    "integers": (ScalesError, "kv-fp8", layer(k_scale=torch.ones(2, 1, 1).int()), "layers.0.k_scale: torch.int32"),
    "a number": (ScalesError, "kv-fp8", layer(k_scale=1.0), "layers.0.k_scale: "),
}


@doors
@pytest.mark.parametrize(("error", "name", "scales", "parts"), [(e, n, s, p) for e, n, s, *p in SCALES.values()], ids=SCALES)
def test_scales_that_do_not_fit_are_refused(call, error, name, scales, parts):
    refused(error, *parts, call=call, scheme=name, scales=scales)


def quantized(name="int8", tokens=20, head_dim=32):
    return dict(zip("qkv", tokquant.quantize(*(x(1, 2, tokens, head_dim) for _ in range(3)), name), strict=True))


def test_quantized_tensors_beside_plain_ones_are_refused():
    refused(TypeError, "q, k, v: either all tensors or all QuantizedTensors, not QuantizedTensor, Tensor", q=quantized()["q"])


def test_quantized_tensors_of_another_scheme_are_refused():
    refused(ValueError, "q: ", "is of another scheme", **quantized(), scheme="kv-int8")


def test_quantized_tensors_whose_sums_are_of_other_key_tiles_are_refused():
    whole = tokquant.preset("int8").model_dump(mode="json")
    other = QuantScheme(**whole | {"p": {"precision": "uint8", "granularity": {"row_block": 64}}})
    refused(ValueError, "q: ", "another scheme", **quantized(), scheme=other)


def test_quantized_tensors_without_the_sums_that_p_needs_are_refused():
    refused(ValueError, "q: ", "another scheme", **quantized(scheme()), scheme=scheme(p={"precision": "uint8"}))


def test_quantized_tensors_in_another_order_are_refused():
    parts = quantized()
    refused(ValueError, "q: ", q=parts["k"], k=parts["q"], v=parts["v"])


@pytest.mark.parametrize(
    ("role", "size"), [("q", {"head_dim": 64}), ("k", {"tokens": 30}), ("v", {"tokens": 30})], ids=["q", "k", "v"]
)
def test_quantized_tensors_of_shapes_that_do_not_meet_are_refused(role, size):
    refused(ValueError, "shape" if role != "q" else "head_dim", **quantized() | {role: quantized(**size)[role]})


def test_quantized_tensors_are_not_quantized_again():
    refused(TypeError, "q: a QuantizedTensor; give a torch.Tensor", call=tokquant.quantize, **quantized())


def test_scales_beside_quantized_tensors_are_refused():
    refused(ScalesError, "scales: the tensors are quantized already", **quantized(), scales=layer())


@pytest.mark.parametrize("name", ["none", "int8", "int4", "fp8-rotated", "fireq", "kv-int2-kivi"])
@pytest.mark.parametrize("turned", [False, True], ids=["contiguous", "transposed"])
def test_the_tensors_of_the_caller_are_never_changed(name, turned):
    given = [x(1, 20, 2, 32).transpose(1, 2) if turned else x() for _ in range(3)] + [x(20, 20), x(2)]
    before, versions = [tensor.clone() for tensor in given], [tensor._version for tensor in given]
    q, k, v, mask, sinks = given
    tokquant.attention(q, k, v, name, mask=mask, sinks=sinks, softcap=20.0, causal=True)
    assert all(torch.equal(now, then) for now, then in zip(given, before, strict=True))
    assert [tensor._version for tensor in given] == versions


@pytest.fixture
def write(tmp_path):
    def write(tensors):
        path = tmp_path / "x.safetensors"
        safetensors.torch.save_file(tensors, path)
        return path

    return write


@pytest.mark.parametrize("cut", [0, 4, 100, -1], ids=["to nothing", "in its length", "in its header", "by a byte"])
def test_a_truncated_activation_file_is_refused(tmp_path, cut):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(sample().read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"cut\.safetensors: not a safetensors file, or not a whole one"):
        Activations(path)


FOREIGN = {
    "zip": b"PK\x03\x04" * 50,
    "pickle": b"\x80\x04." * 50,
    "zeros": bytes(64),
    "ones": b"\xff" * 64,
    "text": b"int8" * 9,
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_a_file_of_something_else_is_refused(tmp_path, content):
    path = tmp_path / "other.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"other\.bin: not a safetensors file"):
        Activations(path)


@pytest.mark.parametrize(("name", "part"), [("missing.safetensors", "No such file"), (".", "directory")])
def test_a_path_that_is_no_file_is_refused(tmp_path, name, part):
    with pytest.raises(ValueError, match=part) as error:
        Activations(tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path / name}: ")


@pytest.mark.parametrize("names", [[], ["weight"], ["q", "k", "v"], ["a.query", "a.key"]], ids=str)
def test_a_file_without_activations_says_how_they_are_named(write, names):
    with pytest.raises(ValueError, match=r"x\.safetensors: holds no activations; they are named <layer>\.q, <layer>\.k"):
        Activations(write({name: torch.ones(1) for name in names}))


def test_a_layer_without_v_is_named(write):
    with pytest.raises(ValueError, match=r"x\.safetensors: layer 'layers\.1' has no v"):
        Activations(write({name: x() for name in ("layers.0.q", "layers.0.k", "layers.0.v", "layers.1.q", "layers.1.k")}))


def test_an_unknown_layer_is_refused_with_the_nearest_name():
    activations = Activations(sample())
    known = next(iter(activations))
    with pytest.raises(ValueError, match="no layer") as error:
        activations[known + "0x"]
    assert repr(known + "0x") in str(error.value) and "did you mean" in str(error.value)


def test_a_layer_can_be_looked_for_without_an_error():
    activations = Activations(sample())
    assert "nowhere" not in activations and activations.get("nowhere") is None
