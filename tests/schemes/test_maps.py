"""Scheme maps: patterns, ranges of heads, YAML there and back, and what is wrong with a map said by name."""

import pytest
import torch

import tokquant as tq
from tests.factories import qkv, scheme
from tokquant import HeadSchemes, QuantScheme, SchemeError, SchemeMap
from tokquant.schemes import of_layer, preset, read, resolve

HALF = "{q: {precision: int8}, k: {precision: int8}, v: {precision: fp16}, p: {precision: fp16}}"
TEXT = f"""
name: mine
schemes:
  half: {HALF}
layers:
  model.layers.0.*: half
  model.layers.[1-3].self_attn: {{heads: {{"0": int8, 1-3: kv-int4}}}}
  "*": int8
"""


def test_the_first_pattern_that_matches_decides():
    found = SchemeMap.from_yaml(TEXT)
    assert found["model.layers.0.self_attn"].v.precision == "fp16"
    assert found["model.layers.7.self_attn"] == preset("int8")
    assert found["model.layers.2.self_attn"] == HeadSchemes(((1, preset("int8")), (3, preset("kv-int4"))))
    assert SchemeMap((("*", preset("int8")), ("a", preset("fp8"))))["a"] == preset("int8")


def test_a_layer_that_no_pattern_matches_is_named_with_what_would_match():
    found = SchemeMap((("layers.0", preset("int8")),), "mine")
    with pytest.raises(SchemeError, match=r"'mine': no pattern matches layer 'layer.0'.*did you mean 'layers.0'.*end it with"):
        found["layer.0"]


def test_a_range_of_heads_takes_a_scheme_of_the_map_by_its_name():
    found = SchemeMap.from_yaml(f"schemes: {{half: {HALF}}}\nlayers: {{a: {{heads: {{0-2: half, 3-5: int8}}}}}}")
    assert [(heads, part.name, part.v.precision) for heads, part in found["a"].parts] == [
        (3, "half", "fp16"),
        (3, "int8", "int8"),
    ]
    assert SchemeMap.from_yaml(found.to_yaml()) == found


def test_yaml_comes_back_equal_with_presets_by_name():
    found = SchemeMap.from_yaml(TEXT)
    text = found.to_yaml()
    assert SchemeMap.from_yaml(text) == found and "kv-int4}" in text and "precision: uint8" not in text


@pytest.mark.parametrize("name", ["x", "custom"])
def test_schemes_of_one_name_keep_apart(name):
    one, other = scheme("int8", "int8", "fp16", "fp16", name=name), scheme("int8", "int4", "fp16", "fp16", name=name)
    bent = preset("int8").model_copy(update={"rotate": "hadamard"})
    found = SchemeMap((("a", one), ("b", other), ("c", bent), ("d", preset("int8"))))
    again = SchemeMap.from_yaml(found.to_yaml())
    assert again == found and again["c"].rotate == "hadamard" and again["d"] == preset("int8")


def test_layers_and_schemes_may_have_the_names_that_a_document_has():
    own = scheme("int8", "int8", "fp16", "fp16", name="layers")
    found = SchemeMap((("schemes", own), ("layers", preset("int8")), ("name", HeadSchemes(((1, own), (2, preset("int4")))))))
    assert SchemeMap.from_yaml(found.to_yaml()) == found


def test_the_digest_is_of_what_the_map_does():
    found = SchemeMap.from_yaml(TEXT)
    renamed = SchemeMap(tuple((p, s) for p, s in found.layers), "other")
    assert renamed.digest() == found.digest()
    assert SchemeMap(found.layers[::-1]).digest() != found.digest()


def test_a_file_is_a_scheme_or_a_map(tmp_path):
    path = tmp_path / "eight-bit.yaml"
    path.write_text(TEXT.replace("name: mine\n", ""))
    assert read(path).name == "eight-bit" and read(str(path))["x"] == preset("int8")
    read(path).dump(tmp_path / "again.yaml")
    assert SchemeMap.load(tmp_path / "again.yaml") == SchemeMap.load(path) == read(path)
    with pytest.raises(SchemeError, match=r"none\.yaml: No such file"):
        SchemeMap.load(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layers: {a: int9}", r"layers\.a: no scheme 'int9' under schemes, and no preset.*did you mean 'int8'"),
        ("layers: {a: 8}", r"layers\.a: 8 is no scheme"),
        ("layers: {}", "layers: is empty"),
        ("layers: int8", "layers: 'int8' is not accepted; write a mapping"),
        ("layer: {a: int8}\nlayers: {a: int8}", "layer: unknown key; a scheme map has name, layers, schemes; did you mean"),
        ("layers: {a: {heads: {0-5: int8, 7-9: int8}}}", r"layers\.a\.heads: '7-9' does not begin with head 6"),
        ("layers: {a: {heads: {1-5: int8}}}", "does not begin with head 0"),
        ("layers: {a: {heads: {0-x: int8}}}", "'0-x' is no range of heads"),
        ("layers: {a: {heads: {5-0: int8}}}", "does not begin with head 0"),
        ("layers: {a: {heads: {}}}", r"layers\.a: .* is not accepted; write \{heads"),
        ("schemes: {x: {q: {precision: int8}}}\nlayers: {a: x}", r"schemes\.x\.k: is missing"),
        ("layers: {a: {q: {precision: int8}, k: {precision: int3}}}", r"layers\.a\.k\.precision: no precision 'int3'"),
        ("layers: {a: {heads: {0: int8}}}", 'line 1: the key 0; keys are plain words, so quote it: "0"'),
        ("schemes: {a: int8}", "layers: is empty"),
        ("name: A B\nlayers: {a: int8}", "name: 'A B' is not accepted"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(text, message, tmp_path):
    path = tmp_path / "map.yaml"
    path.write_text(text)
    with pytest.raises(SchemeError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SchemeMap((("*", "int8"),)), r"layers: \('\*', 'int8'\) is no entry; give \(pattern, scheme\)"),
        (lambda: SchemeMap({"*": preset("int8")}), "layers: '\\*' is no entry.*from_data takes a mapping"),
        (lambda: SchemeMap.from_data(["*"]), r"a scheme map is a mapping with layers, not \['\*'\]"),
        (lambda: SchemeMap.from_data({"layers": {"*": {1: "int8"}}}), r"layers\.\*: the key 1; keys are plain words"),
        (lambda: QuantScheme.from_data({1: "int8"}), "the key 1; keys are plain words"),
        (lambda: SchemeMap((("*", preset("int8")),), "Mine"), "name: 'Mine' is not accepted"),
        (lambda: SchemeMap((("*", preset("int8")),))[3], "layer: 3 is no name of a layer"),
        (lambda: SchemeMap(5), r"layers: 5 is no entry; give \(pattern, scheme\)"),
        (lambda: SchemeMap(iter(())), "layers: is empty"),
        (lambda: HeadSchemes(5), r"heads: 5 is no part; give \(heads, scheme\)"),
        (lambda: HeadSchemes(()), r"heads: \(\) is no part; give \(heads, scheme\)"),
        (lambda: HeadSchemes(((-1, preset("int8")), (3, preset("int4")))), r"heads: \(-1, a QuantScheme\) is no part"),
        (lambda: HeadSchemes(((0, preset("int8")),)), r"heads: \(0, a QuantScheme\) is no part"),
        (lambda: HeadSchemes(((1, "int8"),)), r"heads: \(1, 'int8'\) is no part"),
        (lambda: HeadSchemes((preset("int8"),)), "heads: a QuantScheme is no part"),
    ],
)
def test_what_is_wrong_in_python_is_said_where_it_is_made(make, message):
    with pytest.raises(SchemeError, match=message):
        make()


def test_a_map_needs_the_layer_unless_all_take_one_scheme():
    assert of_layer(SchemeMap((("*", preset("int8")),))) == preset("int8")
    with pytest.raises(SchemeError, match=r"'mine' is a map of layers; say which one this is, as layer='model\.layers\.0"):
        of_layer(SchemeMap.from_yaml(TEXT))
    with pytest.raises(SchemeError, match=r"its heads take different schemes \(int8, kv-int4\)"):
        resolve(SchemeMap.from_yaml(TEXT), "model.layers.1.self_attn")


CASES = {
    "plain": {},
    "causal with sinks": {"causal": True, "sinks": torch.linspace(-1, 1, 8)},
    "a mask of each head": {"mask": torch.arange(8 * 50 * 50).view(1, 8, 50, 50) % 3 > 0},
    "one mask": {"mask": torch.eye(50).flip(0) - 1},
    "alibi": {"bias": tq.bias.alibi(tq.bias.alibi_slopes(8))},
    "key vector": {"bias": tq.bias.key_vector(torch.linspace(-1, 1, 8 * 50).view(8, 50))},
    "low rank": {"bias": tq.bias.lowrank(torch.ones(1, 1, 50, 16).half(), torch.ones(1, 8, 50, 16).half())},
    "dense": {"bias": tq.bias.dense(torch.ones(8, 50, 50).cumsum(0))},
}
BY_HEADS = HeadSchemes(((1, preset("int8")), (3, preset("kv-int4"))))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_each_range_of_heads_is_attended_as_by_its_own_scheme(case, backend):
    q, k, v = qkv(50, d=32, heads=8, kv_heads=4, batch=2)
    out, lse = tq.attention(q, k, v, BY_HEADS, return_lse=True, backend=backend, **case)
    codes = tq.quantize(q, k, v, BY_HEADS, backend=backend)
    again, _ = tq.attention(*codes, BY_HEADS, return_lse=True, backend=backend, **case)  # the kernels that are built already
    assert torch.equal(again, out)
    for heads, name in ((slice(0, 2), "int8"), (slice(2, 8), "kv-int4")):
        alone, sums = tq.attention(q, k, v, name, return_lse=True, backend=backend, **case)
        edge = 1e-6 if backend == "reference" else 0  # torch's product of fewer heads may sum in another order
        torch.testing.assert_close((out[:, heads], lse[:, heads]), (alone[:, heads], sums[:, heads]), rtol=edge, atol=edge)


def test_quantized_heads_say_what_they_hold():
    q, k, v = qkv(50, d=32, heads=8, kv_heads=4)
    coded = tq.quantize(q, k, v, BY_HEADS, backend="reference")
    whole, few = (tq.quantize(q, k, v, name, backend="reference")[1] for name in ("int8", "kv-int4"))
    assert coded[1].shape == k.shape and coded[1].dtype == k.dtype and coded[1].device == k.device
    assert torch.equal(coded[1].dequantize()[:, 1:], few.dequantize()[:, 1:])
    assert coded[1].bits_per_value == pytest.approx((whole.bits_per_value + 3 * few.bits_per_value) / 4)
    assert sum(x.nbytes for x in coded[1].parts) == coded[1].nbytes


def test_packed_sequences_take_ranges_of_heads_too():
    q, k, v = (x[0].transpose(0, 1) for x in qkv(50, d=32, heads=8, kv_heads=4))
    ends = torch.tensor([0, 20, 50], dtype=torch.int32)
    more = dict(cu_seqlens_q=ends, cu_seqlens_k=ends, causal=True, return_lse=True, backend="reference")
    bias = tq.bias.alibi(tq.bias.alibi_slopes(8))
    out, lse = tq.attention_varlen(q, k, v, BY_HEADS, bias=bias, **more)
    alone, sums = tq.attention_varlen(q, k, v, "kv-int4", bias=bias, **more)
    # torch sums a product of other sizes in another order
    torch.testing.assert_close(out[:, 2:], alone[:, 2:], rtol=0, atol=1e-5)
    torch.testing.assert_close(lse[:, 2:], sums[:, 2:], rtol=0, atol=1e-5)


def test_the_layer_of_a_map_goes_to_every_face(tmp_path):
    path = tmp_path / "map.yaml"
    path.write_text('layers: {a: int8, b: kv-int4, c: {heads: {"0": int8, "1": kv-int4}}}')
    q, k, v = qkv(40, d=32)
    assert torch.equal(tq.attention(q, k, v, path, layer="b"), tq.attention(q, k, v, "kv-int4"))
    assert tq.quantize(q, k, v, str(path), layer="b")[1].spec.precision == "int4"
    [found] = tq.compare(q, k, v, [path], layer="c", repeats=1)
    assert found.bits["k"] < 9 and found.scheme.name == "int8 + kv-int4"
    assert tq.compile(path, layer="b", head_dim=64).scheme == preset("kv-int4")
    assert tq.KVCache(path, layer="b", batch=1, kv_heads=2, head_dim=32).scheme == preset("kv-int4")


def test_the_layer_of_calibrated_scales_says_which_of_a_map_it_is():
    q, k, v = qkv(40, d=32)
    schemes = SchemeMap((("a", preset("kv-fp8")), ("b", preset("int8"))))
    scales = tq.Scales(schemes, {"a": dict.fromkeys(("k_scale", "v_scale"), torch.full((2, 1, 1), 0.02))})["a"]
    out = tq.attention(q, k, v, schemes, scales=scales)
    assert torch.equal(tq.scaled_dot_product_attention(q, k, v, scheme=schemes, scales=scales), out)
    assert tq.KVCache(schemes, batch=1, kv_heads=2, head_dim=32, scales=scales).scheme == preset("kv-fp8")
    with pytest.raises(tq.UnsupportedError, match="tune: needs a GPU, and q is on cpu"):
        tq.tune(q, k, v, schemes, scales=scales)


def test_ranges_that_are_not_of_these_heads_and_static_ones_are_refused():
    q, k, v = qkv(40, d=32, heads=4)
    with pytest.raises(SchemeError, match=r"its ranges are of 3 heads \(heads 0-0: int8; heads 1-2: int4\), and k has 4"):
        tq.attention(q, k, v, HeadSchemes(((1, preset("int8")), (2, preset("int4")))))
    with pytest.raises(SchemeError, match="'kv-fp8' is static, which a scheme for a range of heads cannot be"):
        tq.attention(q, k, v, HeadSchemes(((2, preset("int8")), (2, preset("kv-fp8")))))
    codes = tq.quantize(q, k, v, "int8")
    with pytest.raises(ValueError, match="attend by the scheme that quantize was given"):
        tq.attention(*codes, HeadSchemes(((2, preset("int8")), (2, preset("int4")))))
    with pytest.raises(SchemeError, match="its heads take different schemes"):
        tq.KVCache(HeadSchemes(((2, preset("int8")), (2, preset("int4")))), batch=1, kv_heads=4, head_dim=32)
