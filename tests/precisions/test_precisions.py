"""Every registered precision: its codes, its packing, and that its kernel fragments say the same as its torch."""

import ast
import inspect
import re
import textwrap
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from ptx import inline

import tokquant
from tokquant.precisions import PRECISIONS, Precision, names, register

SIZES = [*range(1, 10), 32, 33]
BYTES = {1: torch.int8, 2: torch.int16, 4: torch.int32}
every = pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
encoding = [precision for precision in PRECISIONS.values() if precision.triton_encode]
packed_integers = [p for p in PRECISIONS.values() if p.kind == "int" and p.packed > 1 and p.bits == p.stored_bits]
fragments = [
    pytest.param(getattr(precision, part), id=f"{part} of {precision.name}")
    for precision in PRECISIONS.values()
    for part in (
        "triton_decode",
        "triton_encode",
        "triton_encode_interpreted",
        "triton_quantize",
        "triton_quantize_interpreted",
    )
    if getattr(precision, part)
]


def patterns(precision):
    """Stored elements of every bit pattern, of a sample where they are wider than 16 bits."""
    size = precision.stored.itemsize
    end = 2 ** (8 * size - 1)
    bits = torch.arange(-end, end) if size <= 2 else torch.randint(-end, end, (2**16,))
    return bits.to(BYTES[size]).view(precision.stored)


def all_codes(precision):
    codes = precision.unpack(patterns(precision)[:, None], precision.packed).flatten()
    return bits_of(codes).unique().view(codes.dtype)


def finite_codes(precision):
    codes = all_codes(precision)
    return bits_of(codes)[precision.decode(codes).isfinite()].view(codes.dtype)


def bits_of(codes):
    return codes.view(BYTES[codes.element_size()])


def largest_of(precision):
    return precision.largest or precision.decode(finite_codes(precision)).max().item()


def around_ties(precision):
    """Values, the midpoints between neighbours, and the floats beside those, within what `encode` is given."""
    values = precision.decode(finite_codes(precision)).double().unique()
    ties = ((values[1:] + values[:-1]) / 2).float()
    infinity = torch.tensor(float("inf"))
    x = torch.cat([values.float(), ties, torch.nextafter(ties, infinity), torch.nextafter(ties, -infinity)])
    lowest = 0 if precision.roles == "p" and values.min() == 0 else -largest_of(precision)
    return x[(x >= lowest) & (x <= largest_of(precision))]


def nearest_value(x, precision):
    """The decoded value nearest to each x in float64, of the even code where two are."""
    codes = finite_codes(precision)
    values, order = precision.decode(codes).double().sort(stable=True)
    odd = (bits_of(codes)[order] & 1).bool()
    above = torch.searchsorted(values, x.double()).clamp(1, len(values) - 1)
    to_above, to_below = values[above] - x, x - values[above - 1]
    up = (to_above < to_below) | ((to_above == to_below) & odd[above - 1])
    return torch.where(up, values[above], values[above - 1]).float()


@triton.jit
def through_decode(stored, out, FRAGMENT: tl.constexpr, N: tl.constexpr, W: tl.constexpr, D: tl.constexpr):
    n = tl.arange(0, N)[:, None]
    values = FRAGMENT(tl.load(stored + n * W + tl.arange(0, W)[None, :])).reshape(N, D)
    tl.store(out + n * D + tl.arange(0, D)[None, :], values.to(tl.float32))


@triton.jit
def through_encode(p, out, FRAGMENT: tl.constexpr, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(out + n, FRAGMENT(tl.load(p + n)).to(tl.float32))


@every
@pytest.mark.parametrize("size", SIZES)
def test_unpack_inverts_pack_for_every_code_at_every_place(precision, size):
    codes = all_codes(precision)
    shift = torch.arange(len(codes))[:, None] + torch.arange(size)
    rows = bits_of(codes)[shift % len(codes)].view(codes.dtype)
    stored = precision.pack(rows)
    assert stored.dtype == precision.stored
    assert stored.shape == (len(codes), -(-size // precision.packed))
    assert torch.equal(bits_of(precision.unpack(stored, size)), bits_of(rows))


@every
def test_a_decoded_code_encodes_to_a_code_of_the_same_value(precision):
    values = precision.decode(finite_codes(precision))
    assert values.dtype == torch.float32
    assert torch.equal(precision.decode(precision.encode(values)), values)


@every
def test_encode_gives_the_nearest_value_and_the_even_code_at_ties(precision):
    if precision.stored.itemsize > 2:
        x = torch.cat([patterns(precision).float().nan_to_num(0.0), torch.randn(1000)])
        expected = x  # float32 values are the codes
    else:
        x = around_ties(precision)
        expected = nearest_value(x, precision)
    assert torch.equal(precision.decode(precision.encode(x)), expected)


@every
def test_the_largest_value_and_its_negative_are_codes(precision):
    ends = torch.tensor([largest_of(precision), -largest_of(precision)])
    if precision.roles == "p":
        ends = ends.clamp_min(0)
    assert torch.equal(precision.decode(precision.encode(ends)), ends)


@every
def test_nan_is_kept_by_a_format_that_has_it_and_becomes_zero_in_one_that_has_not(precision):
    has_nan = bool(precision.decode(all_codes(precision)).isnan().any())
    value = precision.decode(precision.encode(torch.tensor([float("nan")])))
    assert bool(value.isnan()) if has_nan else value.item() == 0


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("precision", packed_integers, ids=lambda precision: precision.name)
def test_packed_integers_are_the_bytes_of_compressed_tensors(precision, size):
    codes = torch.randint(-(2 ** (precision.bits - 1)), 2 ** (precision.bits - 1), (64, size), dtype=torch.int8)
    stored = precision.pack(codes)
    assert torch.equal(stored, pack_to_int32(codes, precision.bits).view(torch.uint8)[:, : stored.shape[1]])


@pytest.mark.ptx
@every
def test_the_triton_decode_is_unpack_then_decode_for_every_finite_pattern(precision):
    stored = patterns(precision)
    if stored.is_floating_point():
        # the interpreter takes bfloat16 numbers below the smallest normal one for zero
        kept = stored.float().isfinite() & (stored.float().abs() >= torch.finfo(torch.float32).tiny)
        stored = bits_of(stored).where(kept, 0).view(stored.dtype)
    stored = stored.reshape(-1, 16)
    n, d = stored.shape[0], 16 * precision.packed
    out = torch.full((n, d), float("nan"))
    through_decode[(1,)](stored, out, precision.triton_decode, n, 16, d)
    assert torch.equal(out, precision.decode(precision.unpack(stored, d)))


@pytest.mark.ptx
@pytest.mark.parametrize(
    "precision", [p for p in packed_integers if p.triton_decode_high], ids=lambda precision: precision.name
)
def test_codes_in_the_highest_bits_are_the_codes_times_a_power_of_two(precision):
    stored = patterns(precision).reshape(-1, 16)
    n, d = stored.shape[0], 16 * precision.packed
    out = torch.full((n, d), float("nan"))
    through_decode[(1,)](stored, out, precision.triton_decode_high, n, 16, d)
    assert torch.equal(out, precision.decode(precision.unpack(stored, d)) * 2 ** (8 - precision.bits))


@pytest.mark.parametrize(
    ("precision", "part"),
    [(p, part) for p in packed_integers for part in ("triton_decode_ptx", "triton_decode_high_ptx") if getattr(p, part)],
    ids=lambda value: getattr(value, "name", value),
)
def test_decoding_in_ptx_gives_the_same_for_every_pattern_whatever_registers_it_gets(precision, part, monkeypatch):
    texts = inline.allow(monkeypatch)
    stored = patterns(precision).reshape(-1, 16)
    n, d = stored.shape[0], 16 * precision.packed
    out = torch.full((n, d), float("nan"))
    through_decode[(1,)](stored, out, getattr(precision, part), n, 16, d)
    unit = 2 ** (8 - precision.bits) if "high" in part else 1
    assert torch.equal(out, precision.decode(precision.unpack(stored, d)) * unit) and texts


def run_encode(p, precision):
    fragment = precision.triton_encode_interpreted or precision.triton_encode
    padded = torch.nn.functional.pad(p, (0, triton.next_power_of_2(len(p)) - len(p)))
    out = torch.full_like(padded, float("nan"))
    through_encode[(1,)](padded, out, fragment, len(padded))
    return out[: len(p)]


@pytest.mark.ptx
@pytest.mark.parametrize("precision", encoding, ids=lambda precision: precision.name)
def test_the_triton_encode_gives_the_code_of_every_value_that_has_one(precision):
    p = precision.decode(finite_codes(precision))
    p = p[(p == 0) | (p >= torch.finfo(torch.float32).tiny) & (p <= largest_of(precision))]
    assert torch.equal(run_encode(p, precision), p - precision.code_zero)


@pytest.mark.ptx
@pytest.mark.parametrize("precision", [p for p in encoding if p.kind == "int"], ids=lambda precision: precision.name)
def test_the_triton_encode_of_integers_rounds_as_encode_does_ties_included(precision):
    p = torch.arange(0, 4 * precision.largest + 1) / 4
    assert torch.equal(run_encode(p, precision), precision.decode(precision.encode(p)) - precision.code_zero)


@pytest.mark.parametrize(
    "precision", [p for p in encoding if p.triton_encode_interpreted], ids=lambda precision: precision.name
)
def test_the_encode_of_the_interpreter_rounds_as_encode_does_ties_included(precision):
    values = precision.values()[precision.values() >= 0]
    middles = (values[1:] + values[:-1]) / 2
    p = torch.cat([values, middles, middles * (1 + 2**-20), middles * (1 - 2**-20), torch.rand(1000) * precision.largest])
    assert torch.equal(run_encode(p, precision), precision.decode(precision.encode(p)))


@triton.jit
def through_quantize(x, out, FRAGMENT: tl.constexpr, N: tl.constexpr, D: tl.constexpr, W: tl.constexpr):
    n = tl.arange(0, N)[:, None]
    stored = FRAGMENT(tl.load(x + n * D + tl.arange(0, D)[None, :]))
    tl.store(out + n * W + tl.arange(0, W)[None, :], stored)


@pytest.mark.ptx
@pytest.mark.parametrize(
    "precision", [p for p in PRECISIONS.values() if p.triton_quantize], ids=lambda precision: precision.name
)
def test_the_triton_quantize_is_encode_then_pack_for_every_value_and_tie_and_for_nan(precision):
    x = around_ties(precision) if precision.stored.itemsize <= 2 else torch.randn(4096)
    # the interpreter takes bfloat16 numbers below the smallest normal one for zero
    x = torch.cat([x[(x == 0) | (x.abs() >= torch.finfo(torch.float32).tiny)], -x[:1], torch.tensor([-0.0, float("nan"), 0.0])])
    rows = triton.next_power_of_2(-(-len(x) // 16))
    x = torch.nn.functional.pad(x, (0, 16 * rows - len(x))).reshape(rows, 16)
    expected = precision.pack(precision.encode(x))
    out = torch.zeros_like(expected)
    fragment = precision.triton_quantize_interpreted or precision.triton_quantize
    through_quantize[(1,)](x, out, fragment, rows, 16, out.shape[1])
    if precision.kind == "float" and precision.packed == 1:
        a, b = out.float(), expected.float()
        assert a.isnan().equal(b.isnan()) and torch.equal(a.nan_to_num(0.5), b.nan_to_num(0.5))
        assert a.signbit()[~a.isnan()].equal(b.signbit()[~b.isnan()]), "a zero keeps its sign"
    else:
        assert torch.equal(out, expected)


@pytest.mark.parametrize("fragment", fragments)
def test_a_fragment_calls_nothing_but_triton(fragment):
    function = ast.parse(textwrap.dedent(inspect.getsource(getattr(fragment, "fn", fragment)))).body[0]
    found = [node for node in ast.walk(function) if isinstance(node, ast.Name)]
    own = {node.id for node in found if isinstance(node.ctx, ast.Store)} | {a.arg for a in function.args.args}
    assert {node.id for node in found} - own - {"tl", "triton"} == set()


def test_a_taken_name_is_refused():
    with pytest.raises(ValueError, match="name: a precision 'int8' is already registered"):
        register(PRECISIONS["int8"])


def test_what_is_no_precision_is_not_registered():
    with pytest.raises(TypeError, match=r"precision: 'int8'; give a tokquant\.Precision"):
        register("int8")


@pytest.mark.parametrize("name", ["Int8", "8bit", "a b", "", "x" * 40, "q\n", "a.b", 8])
def test_a_bad_name_is_refused_and_quoted(name):
    with pytest.raises(ValueError, match=r"name: .* is no name for a precision; use lower-case letters") as error:
        replace(PRECISIONS["int8"], name=name)
    assert repr(name) in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(bits=0), "bits: 0 of precision 'int8' is not a whole number"),
        (dict(kind="log"), "kind: 'log'"),
        (dict(largest=float("nan")), "largest: nan"),
        (dict(largest="127"), "largest: '127' of precision 'int8' is not a number above zero"),
        (dict(encode=None), "encode: None of precision 'int8' is not a function"),
        (dict(stored="int8"), "stored: 'int8' of precision 'int8' is not a torch.dtype"),
        (dict(packed=3), "packed: 3"),
        (dict(packed=2), "packed: 2 codes of 8 bits do not fit an element of torch.int8"),
        (dict(stored=torch.int32), "stored: torch.int32 of precision 'int8' is not one of torch.int8, torch.uint8"),
        (dict(stored=torch.float16), "stored: torch.float16 for 8 bits; codes of up to 8 bits lie in elements of a byte"),
        (dict(roles="z"), "roles: 'z'"),
        (dict(compute="tl.int32"), "compute: 'tl.int32' of precision 'int8' is not one of tl.int8"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_a_wrong_field_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        replace(PRECISIONS["int8"], **wrong)


def test_every_field_is_described():
    page = (Path(__file__).parents[2] / "docs" / "precisions.md").read_text()
    for field in fields(Precision):
        assert re.search(rf"^\|.*`{field.name}`.* \| ", page, re.M), field.name


def test_a_precision_of_p_needs_a_triton_encode():
    with pytest.raises(ValueError, match="triton_encode: 'other' may code P"):
        replace(PRECISIONS["int8"], name="other", triton_encode=None)


LEVELS = torch.tensor([-4.0, -1.0, 0.0, 1.0, 4.0])


@pytest.fixture
def five():
    yield register(
        Precision(
            name="five",
            bits=3,
            kind="float",
            largest=4,
            stored=torch.uint8,
            roles="kv",
            encode=lambda x: torch.bucketize(x.nan_to_num(0.0), (LEVELS[1:] + LEVELS[:-1]) / 2).to(torch.uint8),
            decode=lambda codes: LEVELS[codes.int()],
            compute="tl.float16",
            triton_decode=lambda tile: tile,
        )
    )
    del PRECISIONS["five"]


def test_a_precision_registered_elsewhere_is_taken_by_schemes_quantized_and_run(five):
    coded = {"precision": "five"}
    scheme = tokquant.QuantScheme(q={"precision": "fp32"}, k=coded, v=coded, p={"precision": "fp32"})
    assert "five" in names("k") and "five" not in names("q")
    assert scheme.bits_per_value(64)["k"] == 8.5  # a code has 3 bits, and takes a byte
    q, k, v = (torch.randn(1, 2, 40, 16) for _ in range(3))
    quantized = tokquant.quantize(q, k, v, scheme, backend="reference")
    assert set(quantized[1].codes.unique().tolist()) == set(range(5))
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.dequantize() for x in quantized))
    torch.testing.assert_close(tokquant.attention(q, k, v, scheme, backend="reference"), expected)


def test_a_registered_precision_is_refused_where_it_has_no_role(five):
    with pytest.raises(tokquant.SchemeError, match=r"q\.precision: Q cannot be five; use one of"):
        tokquant.QuantScheme(**{role: {"precision": "five"} for role in "qkv"}, p={"precision": "fp32"})


def test_what_takes_anothers_place_is_in_the_next_kernel(five):
    from tokquant.kernels.plan import plan

    coded = {"precision": "five"}
    scheme = tokquant.QuantScheme(q={"precision": "fp16"}, k=coded, v=coded, p={"precision": "fp16"})
    before = plan(scheme, head_dim=64, dtype=torch.float16)
    register(replace(five, largest=2.0, triton_decode=PRECISIONS["int8"].triton_decode), replace=True)
    assert before.holes["decode_k"] is five.triton_decode
    after = plan(scheme, head_dim=64, dtype=torch.float16)
    assert after.holes["decode_k"] is PRECISIONS["int8"].triton_decode
