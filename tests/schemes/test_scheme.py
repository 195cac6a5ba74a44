"""The scheme: what is accepted, what is refused and how that is said, and identity."""

import json
import string
import time

import pytest
import torch
from factories import scheme as in_words

import tokquant
from tokquant import QuantScheme, SchemeError, precisions
from tokquant.schemes.placement import as_bytes, lowers_logits, needs_code_sums

BASE = {role: {"precision": "int8"} for role in "qkvp"}
POWERS = [2**n for n in range(4, 21)]
PLAIN = ["token", "tensor", "head", "channel"]
GRANULARITIES = PLAIN + [{kind: size} for kind in ("block", "channel_block", "group") for size in (16, 128, 2**20)]
INTEGERS = ["int8", "int4", "int2"]


def scheme(**changes):
    """Int8 throughout, changed: `k={...}` adds to K's fields."""
    return QuantScheme(**{**BASE, **{key: merged(key, value) for key, value in changes.items()}})


def merged(key, value):
    return {**BASE[key], **value} if key in BASE and isinstance(value, dict) else value


def problem(**changes):
    with pytest.raises(SchemeError) as error:
        scheme(**changes)
    return str(error.value)


ACCEPTED = [
    *({role: {"precision": name}} for role in "qkvp" for name in precisions.names(role)),
    *({role: {"granularity": granularity}} for role in "qkv" for granularity in GRANULARITIES),
    *({"p": {"granularity": granularity}} for granularity in ["unit", *({"row_block": n} for n in POWERS[:6])]),
    *({role: {"symmetric": False, "precision": name}} for role in "kv" for name in INTEGERS),
    *({role: {"scale": "static", "granularity": kind}} for role in "qkv" for kind in PLAIN[1:]),
    *({role: {"scale_dtype": kind}} for role in "qkv" for kind in ("fp32", "fp16", "fp8_e4m3")),
    *({role: {"smooth": smooth}} for role in "kv" for smooth in ("none", "mean", "static")),
    *({"q": {"smooth": smooth}} for smooth in ("none", "block_mean")),
    *({key: value} for key in ("rotate", "rotate_v") for value in ("none", "hadamard")),
    *({"balance": value} for value in ("none", "channel", "rope_pairs")),
    *({"balance": {"channel": value}} for value in ({"alpha": 0}, {"alpha": 1}, {"scale": "static", "alpha": 0.25})),
    *({"balance": {"rope_pairs": value}} for value in ({"scale": "static"}, {"alpha": 4, "beta": 0.5, "top_k": 3})),
    *({"normalizer": value} for value in ("exact", "quantized")),
    *({"cache": value} for value in (None, {}, {"sink": 4, "recent": 0, "page": 16}, {"recent": 2**20})),
    *({"name": value} for value in ("custom", "a", "8", "kv-int4.v2_b", "x" * 64)),
]


@pytest.mark.parametrize("change", ACCEPTED, ids=json.dumps)
def test_is_accepted_and_kept_as_written(change):
    [(key, written)] = change.items()
    kept = scheme(**change).model_dump(mode="json")[key]
    assert kept == written if not isinstance(written, dict) else written.items() <= kept.items()


def test_what_is_left_out_has_the_default_of_the_design():
    operand = {"precision": "int8", "granularity": "token", "symmetric": True}
    operand |= {"scale": "dynamic", "scale_dtype": "fp32", "smooth": "none"}
    p = {"precision": "int8", "granularity": "unit"}
    rest = {"rotate": "none", "rotate_v": "none", "balance": "none", "normalizer": "exact", "cache": None}
    assert scheme().model_dump(mode="json") == {"name": "custom", "q": operand, "k": operand, "v": operand, "p": p, **rest}
    assert scheme(cache={}).model_dump()["cache"] == {"sink": 0, "recent": 0, "page": 128}


def test_a_scheme_says_all_that_is_done_to_an_operand():
    made = scheme(k={"smooth": "mean", "symmetric": False}, v={"precision": "fp16", "smooth": "mean"})
    assert str(made) == "q int8 token, k int8 token asymmetric less mean, v fp16 less mean, p int8 unit"


def test_what_has_no_name_is_refused_with_the_names():
    with pytest.raises(TypeError, match=r"QuantScheme: 'int8' is given without a name; it takes name, q, k, v, p, .*, by name"):
        QuantScheme("int8")


@pytest.mark.parametrize(("place", "field"), [("", "name"), ("k", "precision"), ("v", "granularity"), ("cache", "sink")])
def test_cannot_be_changed(place, field):
    whole = scheme(cache={})
    with pytest.raises(ValueError, match="frozen"):
        setattr(getattr(whole, place) if place else whole, field, "int4")
    assert whole == scheme(cache={})


CHANGES = {
    "q": [{"precision": "int4"}, {"granularity": "head"}, {"scale_dtype": "fp16"}, {"smooth": "block_mean"}],
    "k": [{"granularity": {"block": 16}}, {"granularity": {"block": 32}}, {"symmetric": False}, {"smooth": "mean"}],
    "v": [{"granularity": "head"}, {"granularity": "head", "scale": "static"}, {"granularity": {"channel_block": 128}}],
    "p": [{"precision": "uint8"}, {"granularity": {"row_block": 128}}, {"granularity": {"row_block": 64}}],
    "cache": [{}, {"sink": 1}, {"recent": 1}, {"page": 64}],
    "balance": ["rope_pairs", {"channel": {"alpha": 0.25}}, {"channel": {"scale": "static"}}]
    + [{"rope_pairs": value} for value in ({"alpha": 4}, {"beta": 4}, {"top_k": 1}, {"scale": "static"})],
}
SINGLE = {"rotate": "hadamard", "rotate_v": "hadamard", "balance": "channel", "normalizer": "quantized"}


def test_schemes_that_differ_in_any_field_differ_in_digest_and_are_not_equal():
    changed = [scheme(), *(scheme(**{key: value}) for key, values in CHANGES.items() for value in values)]
    changed += [scheme(**{key: value}) for key, value in SINGLE.items()]
    assert len({one.digest() for one in changed}) == len(set(changed)) == len(changed)
    assert all(len(one.digest()) == 12 and set(one.digest()) <= set(string.hexdigits.lower()) for one in changed)


def test_a_default_written_out_changes_neither_equality_nor_hash_nor_digest():
    short, long = scheme(), QuantScheme(**scheme().model_dump(mode="json"))
    assert (short, hash(short), short.digest()) == (long, hash(long), long.digest())


@pytest.mark.parametrize("word", ["channel", "rope_pairs"])
def test_a_balance_whose_parameters_are_the_defaults_is_the_plain_word(word):
    defaults = {"scale": "dynamic", "alpha": 0.5} if word == "channel" else {"alpha": 8, "beta": 8.0, "top_k": 0}
    short = scheme(balance=word)
    for long in (scheme(balance={word: defaults}), scheme(balance={word: {}}), scheme(balance=short.balance)):
        assert (long, hash(long), long.digest()) == (short, hash(short), short.digest())
        assert long.model_dump(mode="json")["balance"] == long.model_dump()["balance"] == word


def test_a_granularity_that_was_read_may_be_given_again():
    given = scheme(k={"granularity": {"block": 64}}, p={"granularity": {"row_block": 64}})
    assert scheme(k={"granularity": given.k.granularity}, p={"granularity": given.p.granularity}) == given


def test_a_name_changes_equality_but_not_the_digest():
    assert scheme(name="a") != scheme(name="b")
    assert scheme(name="a").digest() == scheme(name="b").digest()


REFUSED = {
    "an unknown key": ({"rotat": "hadamard"}, "rotat: unknown key; use name, q, k, v, p", "did you mean 'rotate'"),
    "an unknown key of k": ({"k": {"granularty": "token"}}, "k.granularty: unknown key", "did you mean 'granularity'"),
    "an unknown key of p": ({"p": {"scale": "static"}}, "p.scale: unknown key; use precision, granularity"),
    "an unknown key of cache": ({"cache": {"sinks": 1}}, "cache.sinks: unknown key", "did you mean 'sink'"),
    "an unknown precision": ({"k": {"precision": "int88"}}, "k.precision: no precision 'int88'", "did you mean 'int8'"),
    "a number as precision": ({"k": {"precision": 8}}, "k.precision: 8 is not accepted"),
    "P of int4": ({"p": {"precision": "int4"}}, "p.precision: P cannot be int4; use one of", "uint8"),
    "Q of uint8": ({"q": {"precision": "uint8"}}, "q.precision: Q cannot be uint8; use one of"),
    "row_block 100": ({"p": {"granularity": {"row_block": 100}}}, "p.granularity: row_block of 100", "a power of two"),
    "P per token": ({"p": {"granularity": "token"}}, "p.granularity: no granularity 'token' for P", "unit or {row_block: n}"),
    "block 3": ({"k": {"granularity": {"block": 3}}}, "k.granularity: block of 3:", "power of two from 16"),
    "block True": ({"k": {"granularity": {"block": True}}}, "block of True:", "power of two from 16"),
    "block 1e3": ({"v": {"granularity": {"block": 1e3}}}, "v.granularity: block of 1000.0:", "power of two from 16"),
    "block of text": ({"k": {"granularity": {"block": "64"}}}, "block of '64':", "power of two from 16"),
    "group 8": ({"v": {"granularity": {"group": 8}}}, "group of 8:", "power of two from 16"),
    "block without a size": ({"k": {"granularity": "block"}}, "k.granularity: 'block' needs a size: {block: 32}"),
    "two granularities": ({"k": {"granularity": {"block": 16, "group": 16}}}, "{'block': 16, 'group': 16}", "use one of token"),
    "a granularity that is near": ({"q": {"granularity": "tokens"}}, "no granularity 'tokens'", "did you mean 'token'"),
    "a sized granularity that is near": ({"k": {"granularity": {"blok": 32}}}, "{'blok': 32}", "did you mean 'block'"),
    "static per token": (
        {"k": {"scale": "static"}},
        "k.scale: static scales cannot follow granularity token",
        "tensor, head or",
    ),
    "static on fp16": ({"v": {"precision": "fp16", "scale": "static"}}, "v.scale: fp16 has no scale that could be static"),
    "asymmetric fp8": (
        {"k": {"precision": "fp8_e4m3", "symmetric": False}},
        "k.symmetric: fp8_e4m3 has no zero",
        "integers of K and V",
    ),
    "asymmetric q": ({"q": {"symmetric": False}}, "q.symmetric: Q has no zero point"),
    "symmetric as a word": ({"k": {"symmetric": "no"}}, "k.symmetric: 'no' is not accepted", "boolean"),
    "symmetric as a number": ({"k": {"symmetric": 1}}, "k.symmetric: 1 is not accepted", "boolean"),
    "symmetric q as a number": ({"q": {"symmetric": 1}}, "q.symmetric: 1 is not accepted"),
    "a small channel_block": (
        {"v": {"granularity": {"channel_block": 64}}, "p": {"granularity": {"row_block": 128}}},
        "v.granularity: channel_block 64 is smaller than P's row_block of 128",
        "use {channel_block: 128}, or p with granularity {row_block: 64}",
    ),
    "block_mean of k": ({"k": {"smooth": "block_mean"}}, "k.smooth: 'block_mean' is not accepted; use 'none', 'mean'"),
    "mean of q": ({"q": {"smooth": "mean"}}, "q.smooth: 'mean' is not accepted; use 'none' or 'block_mean'"),
    "scale_dtype bf16": ({"k": {"scale_dtype": "bf16"}}, "k.scale_dtype: 'bf16' is not accepted; use 'fp32', 'fp16'"),
    "another case": ({"rotate": "Hadamard"}, "rotate: 'Hadamard' is not accepted", "did you mean 'hadamard'"),
    "a balance that is near": (
        {"balance": "chanel"},
        "balance: no balance 'chanel'; use none, channel",
        "did you mean 'channel'",
    ),
    "two balances": ({"balance": {"channel": {}, "rope_pairs": {}}}, "balance: no balance {'channel': {}, 'rope_pairs': {}}"),
    "no balance in particular": ({"balance": {}}, "balance: no balance {}; use none", "{rope_pairs: {...}}"),
    "a balance with a number": ({"balance": {"channel": 0.5}}, "balance.channel: 0.5 is not accepted; write a mapping such as"),
    "an unknown key of a balance": (
        {"balance": {"channel": {"top_k": 1}}},
        "balance.channel.top_k: unknown key; use scale, alpha",
    ),
    "alpha beyond 1": ({"balance": {"channel": {"alpha": 1.5}}}, "balance.channel.alpha: 1.5 is not accepted", "equal to 1"),
    "alpha NaN": ({"balance": {"channel": {"alpha": float("nan")}}}, "balance.channel.alpha: nan is not accepted", "finite"),
    "alpha zero": ({"balance": {"rope_pairs": {"alpha": 0}}}, "balance.rope_pairs.alpha: 0 is not accepted", "0.0001"),
    "alpha as text": ({"balance": {"rope_pairs": {"alpha": "8"}}}, "balance.rope_pairs.alpha: '8' is not accepted", "number"),
    "half a channel": ({"balance": {"rope_pairs": {"top_k": 1.5}}}, "balance.rope_pairs.top_k: 1.5 is not accepted", "integer"),
    "a scale of neither kind": ({"balance": {"rope_pairs": {"scale": "statc"}}}, "scale: 'statc'", "did you mean 'static'"),
    "a key of a balance that is no word": (
        {"balance": {"channel": {1: 2}}},
        "balance.channel: the key 1; keys are plain words",
    ),
    "page 100": ({"cache": {"page": 100}}, "cache.page: 100 is not accepted; use a power of two"),
    "page 64.0": ({"cache": {"page": 64.0}}, "cache.page: 64.0 is not accepted"),
    "a negative sink": ({"cache": {"sink": -1}}, "cache.sink: -1 is not accepted", "greater than or equal to 0"),
    "True as a sink": ({"cache": {"sink": True}}, "cache.sink: True is not accepted", "integer"),
    "a name with a space": ({"name": "my scheme"}, "name: 'my scheme' is not accepted"),
    "a name with a newline": ({"name": "a\n"}, "name: 'a\\n' is not accepted"),
    "a word for an operand": ({"k": "int8"}, "k: 'int8' is not accepted", "{precision: int8}"),
    "nothing for an operand": ({"v": None}, "v: None is not accepted", "{precision: int8}"),
    "a key that is no word": ({"k": {1: 2}}, "k", "1"),
}


@pytest.mark.parametrize(("change", "parts"), [(c, parts) for c, *parts in REFUSED.values()], ids=REFUSED)
def test_is_refused_with_what_was_written_and_what_would_work(change, parts):
    text = problem(**change)
    assert all(part in text for part in parts), text
    assert len(text.splitlines()) == 1


def test_every_mistake_is_told_at_once():
    text = problem(q={"precision": "int9"}, v={"smooth": "men"}, rotat="none")
    assert [line.split(":")[0] for line in text.splitlines()] == ["q.precision", "v.smooth", "rotat"]


@pytest.mark.parametrize(
    ("words", "k_bytes", "v_bytes", "sums", "lowered"),
    [
        (("int8", "int8 mean", "int8", "uint8 row_block:64"), True, True, True, True),
        (("int8 group:16", "int8", "int8 group:16", "uint8 row_block:64"), False, False, False, False),
        (("int8", "int8 channel asymmetric", "fp16", "uint8"), True, False, False, True),
        (("int8", "int8 asymmetric", "int8", "int8"), True, True, False, False),
        (("int8", "int8 channel", "int8 channel", "int8"), True, True, False, False),
        (("int8", "int8 group:16", "fp8_e4m3", "fp8_e4m3"), False, False, False, False),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, tuple) else None,
)
def test_what_a_scheme_asks_of_a_kernel_follows_from_where_its_scales_enter(words, k_bytes, v_bytes, sums, lowered):
    made = in_words(*words)
    assert (as_bytes(made, "k"), as_bytes(made, "v")) == (k_bytes, v_bytes)
    assert (needs_code_sums(made), lowers_logits(made)) == (sums, lowered)


def test_missing_operands_are_named():
    with pytest.raises(SchemeError) as error:
        QuantScheme(q={"precision": "int8"})
    assert [place for place, _ in error.value.problems] == ["k", "v", "p"]
    assert {text for _, text in error.value.problems} == {"is missing"}


def test_a_group_that_does_not_divide_head_dim_is_refused_when_it_meets_it():
    grouped = scheme(v={"granularity": {"group": 32}})
    x = torch.randn(1, 1, 4, 48)
    for meet in (lambda: tokquant.quantize(x, x, x, grouped), lambda: grouped.bits_per_value(48)):
        with pytest.raises(SchemeError, match=r"a group of 32 channels does not divide head_dim 48; use group: 16"):
            meet()


def test_the_json_schema_lists_what_is_accepted():
    whole = QuantScheme.model_json_schema()
    assert whole["additionalProperties"] is False and set(whole["required"]) == set("qkvp")
    for role, model in zip("qkvp", ("Queries", "Keys", "Values", "Probabilities"), strict=True):
        part = whole["$defs"][model]
        assert part["additionalProperties"] is False and part["required"] == ["precision"]
        assert part["properties"]["precision"]["enum"] == precisions.names(role)
        plain, *sized = part["properties"]["granularity"]["anyOf"]
        assert plain["enum"] == (["unit"] if role == "p" else PLAIN)
        kinds = ["row_block"] if role == "p" else ["block", "channel_block", "group"]
        assert [one["required"] for one in sized] == [[kind] for kind in kinds]


def test_the_json_schema_gives_defaults_as_they_are_written():
    parts = QuantScheme.model_json_schema()["$defs"]
    defaults = {model: part["properties"]["granularity"]["default"] for model, part in parts.items() if model != "Cache"}
    assert defaults == {"Queries": "token", "Keys": "token", "Values": "token", "Probabilities": "unit"}


def test_the_json_schema_has_the_parameters_of_each_balance():
    words, *rules = QuantScheme.model_json_schema()["properties"]["balance"]["anyOf"]
    assert words["enum"] == ["none", "channel", "rope_pairs"]
    parameters = {kind: part for rule in rules for kind, part in rule["properties"].items()}
    assert {kind: list(part["properties"]) for kind, part in parameters.items()} == {
        "channel": ["scale", "alpha"],
        "rope_pairs": ["scale", "alpha", "beta", "top_k"],
    }
    assert all(part["additionalProperties"] is False for part in (*parameters.values(), *rules))


@pytest.mark.parametrize("place", ["granularity", "smooth", "unknown"])
def test_a_mapping_nested_very_deep_is_refused_shortly(place):
    deep = {}
    for _ in range(5000):
        deep = {"a": deep}
    assert len(problem(k={place: deep})) < 500


def test_a_mapping_nested_wide_is_refused_quickly():
    wide = {}
    for _ in range(9):
        wide = {key: wide for key in "abcd"}
    start = time.process_time()
    problem(k={"granularity": wide})
    assert time.process_time() - start < 0.3
