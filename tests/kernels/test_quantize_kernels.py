"""Quantization kernels give what the definition gives: every code and every scale, not nearly but just."""

import ast
import math
import re
from dataclasses import replace

import pytest
import torch
from factories import qkv, scheme
from quantized import CHOICES, FLOATS, MISFITS, by_torch, chosen, differences, same

import tokquant as tq
from tokquant.calibration.scales import LayerScales
from tokquant.errors import SchemeError
from tokquant.kernels import generate, quantize_plan, quantize_task, targets
from tokquant.kernels import quantize as kernels
from tokquant.kernels.products import takes_tokens_last
from tokquant.kernels.triton import quantize as template
from tokquant.kernels.triton.operands import Coded, Source, Table, Turned
from tokquant.precisions import PRECISIONS, register
from tokquant.quantize import encode
from tokquant.schemes import preset, preset_names

DYNAMIC = [name for name in preset_names() if preset(name).k.scale == "dynamic"]


def compare(q, k, v, made, scales=None):
    for one, other in zip(by_torch(q, k, v, made, scales), kernels.quantize_operands(q, k, v, made, scales), strict=True):
        assert differences(one, other) == [], one


@pytest.fixture
def started(monkeypatch):
    """The plans of the kernels that were launched."""
    plans = []
    monkeypatch.setattr(
        kernels, "_launch", lambda plan, *rest, launch=kernels._launch: (plans.append(plan), launch(plan, *rest))
    )
    return plans


@pytest.mark.ptx
@pytest.mark.parametrize("name", DYNAMIC)
def test_presets_are_quantized_as_the_definition_says(name, started):
    made = preset(name)
    compare(*qkv(37, 150, 64, 4, 2, dtype=torch.float16), made)
    scaled = [operand for operand in (made.q, made.k, made.v) if operand.scaled]
    assert len(started) == sum(1 if quantize_task.in_one_tile(operand) else 3 for operand in scaled)


@pytest.mark.parametrize(("words", "granularity", "scale", "smooth", "transforms", "p", "dtype", "shape"), CHOICES, ids=str)
def test_every_choice_is_quantized_as_the_definition_says(words, granularity, scale, smooth, transforms, p, dtype, shape):
    made = chosen(words, granularity, scale, smooth, transforms, p)
    try:
        takes_tokens_last(made, dtype)
    except tq.UnsupportedError:  # an unsigned P on a V of floats
        made = chosen(words, granularity, scale, smooth, transforms, "int8 row_block:16")
    compare(*qkv(*shape, dtype), made)


@pytest.mark.parametrize(
    ("words", "shape"),
    [
        ("int8 head", (1200, 2, 32)),
        ("int8 channel asymmetric scale=fp16", (700, 2, 16)),
        ("int4 tensor asymmetric", (300, 3, 16)),
        ("fp8_e4m3 channel_block:512 scale=fp8_e4m3", (1200, 1, 64)),
    ],
)
def test_scales_of_more_tiles_than_are_read_at_once_are_those_of_the_definition(words, shape, started, monkeypatch):
    monkeypatch.setattr(quantize_plan, "AT_ONCE", 8)
    quantize_plan.scales_plan.cache_clear()
    n, heads, d = shape
    _, k, v = qkv(1, n, d, heads, batch=2, dtype=torch.float16)
    k[1, 0, n - 1, 3], v[0, heads - 1, 5] = math.nan, 0
    compare(k[:, :, :1], k, v, scheme("int8", words, words, "int8 row_block:64"))
    quantize_plan.scales_plan.cache_clear()
    scales = [plan for plan in started if plan.name.startswith("scales")]
    tiles = min(n, 512 if "block" in words else n) // 128 * (2 * heads if "tensor" in words else 1)
    assert [tiles > plan.constants["ROWS"] for plan in scales] == [True, True]


@pytest.mark.parametrize(
    "made", [preset("int8"), scheme("fp16", "fp16", "fp16", "fp16"), scheme("int4", "int4 group:16", "int2")]
)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_floats_that_are_rotated_or_smoothed_are_rounded_as_the_definition_says(made, dtype):
    made = made.model_copy(update={"rotate": "hadamard", "rotate_v": "hadamard"})
    compare(*qkv(20, 40, 96, dtype=dtype), made)
    compare(*qkv(20, 40, 33, dtype=dtype), made.model_copy(update={"k": scheme(k="int4 mean").k}))


VIEWS = {
    "transposed from [B, N, H, D]": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "the last dimension strided": lambda x: x.mT.contiguous().mT,
    "a slice at an offset": lambda x: torch.nn.functional.pad(x, (3, 1, 5, 2))[:, :, 5:-2, 3:-1],
    "one head expanded": lambda x: x[:, :1].expand(-1, x.shape[1], -1, -1),
    "one token expanded": lambda x: x[:, :, :1].expand(-1, -1, x.shape[2], -1),
}


@pytest.mark.parametrize("name", ["int8", "int4", "int-flash"])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_any_strides_are_read(view, name):
    compare(*(view(x) for x in qkv(70, 70, 32, batch=2, dtype=torch.bfloat16)), preset(name))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize(
    "words", ["int8 scale={}", "int4 asymmetric scale={}", "fp8_e5m2 head scale={}", "int2 group:16 scale={}"]
)
@pytest.mark.parametrize("kind", ["fp32", "fp16", "fp8_e4m3"])
def test_what_is_not_finite_goes_where_it_goes_in_the_definition(kind, words, value):
    q, k, v = qkv(20, 40, 32)
    k[0, 1, 7, 5] = v[0, 0, 39, 31] = value
    words = words.format(kind)
    compare(q, k, v, scheme("int8", words, words, "int8 row_block:32"))


@pytest.mark.parametrize("kind", ["fp32", "fp16", "fp8_e4m3"])
@pytest.mark.parametrize("precision", ["int8", "int4 asymmetric", "fp8_e4m3", "fp4_e2m1"])
def test_zeros_and_tiny_values_keep_the_scales_of_the_definition(precision, kind):
    q, k, v = qkv(8, 24, 32)
    k[:, :, 3], v[:, :, 5] = 0, 0
    k[:, :, 4], v[:, :, 6] = 1e-38, -1e-45
    k[:, :, 9] = v[:, :, 9] = 2.0  # one value
    words = f"{precision} token scale={kind}"
    compare(q, k, v, scheme("int8", words, words, "int8 row_block:32"))


@pytest.mark.parametrize("precision", [p for p in PRECISIONS.values() if p.largest and "k" in p.roles], ids=lambda p: p.name)
def test_ties_go_to_the_even_code(precision):
    """The largest is R, so the scale is 1 and values are what `encode` is given."""
    values = precision.values().double()
    ties = ((values[1:] + values[:-1]) / 2).float()
    x = torch.cat([ties, torch.nextafter(ties, torch.tensor(math.inf)), torch.nextafter(ties, torch.tensor(-math.inf))])
    x = x[x.abs() <= precision.largest]
    x = torch.nn.functional.pad(x, (0, -len(x) % 31)).reshape(1, 1, -1, 31)
    k = torch.cat([torch.full_like(x[..., :1], precision.largest), x], dim=3)
    _, kq, _ = kernels.quantize_operands(k, k, k, scheme(k=f"{precision.name} token"))
    assert bool((kq.scale == 1).all())
    assert same(kq.codes, by_torch(k, k, k, scheme(k=f"{precision.name} token"))[1].codes)


@pytest.mark.parametrize("precision", ["int8", "int4 asymmetric", "fp8_e4m3"])
@pytest.mark.parametrize("granularity", ["tensor", "head", "channel"])
def test_static_scales_are_used_as_they_are(precision, granularity, started):
    shape = {"tensor": (1, 1, 1), "head": (2, 1, 1), "channel": (2, 1, 16)}[granularity]
    tensors = {f"{role}_scale": torch.rand(shape) + 0.01 for role in "kv"}
    if "asymmetric" in precision:
        tensors |= {f"{role}_zero": -torch.rand(shape) for role in "kv"}
    tensors["k_offset"] = torch.randn(2, 1, 16, dtype=torch.float64)
    made = scheme(
        "int8", f"{precision} {granularity} static static_offset", f"{precision} {granularity} static", "int8 row_block:32"
    )
    compare(*qkv(20, 40, 16, 4, 2, 2), made, LayerScales("layer", tensors))
    assert len(started) == 3, "nothing is reduced but for Q"


@pytest.mark.parametrize(("words", "value", "message"), MISFITS, ids=[words for words, *_ in MISFITS])
def test_what_does_not_fit_its_type_is_the_error_of_the_definition(words, value, message):
    q, k, v = qkv(4)
    k[0, 0, 2, :2] = torch.as_tensor(value)
    with pytest.raises(ValueError, match=message):
        tq.quantize(q, k, v, scheme(k=words), backend="triton")


def test_a_group_that_does_not_divide_head_dim_is_the_error_of_the_definition():
    with pytest.raises(SchemeError, match=r"k\.granularity: a group of 32 channels does not divide head_dim 48"):
        tq.quantize(*qkv(4, d=48), scheme(k="int8 group:32"), backend="triton")


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_floats_that_nothing_is_done_to_are_the_callers_own_tensors(backend, started):
    q, k, v = qkv(20, dtype=torch.float16)
    codes = tq.quantize(q, k, v, scheme("fp16", "fp16", "fp16", "fp16"), backend=backend)
    assert all(x.codes.data_ptr() == y.data_ptr() for x, y in zip(codes, (q, k, v), strict=True))
    assert not started


EXTREME = [
    f"{words} scale=fp16"
    for words in (
        "int8 token", "int2 token", "int8 token asymmetric", "int2 block:32 asymmetric", "int8 head mean", "int4 token mean"
    )
]  # fmt: skip


@pytest.mark.parametrize("rotate", ["none", "hadamard"])
@pytest.mark.parametrize("words", EXTREME)
def test_the_largest_numbers_of_fp16_have_the_scales_of_the_definition(words, rotate):
    q, k, v = (65504 * (torch.randint(0, 2, (1, 1, n, 64)) * 2.0 - 1).half() for n in (5, 70, 70))
    made = scheme(k=words, rotate=rotate)
    try:
        expected = tq.quantize(q, k, v, made, backend="reference")
    except ValueError as error:
        with pytest.raises(ValueError, match=re.escape(str(error))):
            tq.quantize(q, k, v, made, backend="triton")
        return
    found = tq.quantize(q, k, v, made, backend="triton")
    assert torch.equal(found[1].scale, expected[1].scale) and not differences(found[1], expected[1])


def test_a_calibrated_offset_may_be_larger_than_the_tensors_type_holds():
    q, k, v = qkv(5, 20, 32, dtype=torch.float16)
    scales = LayerScales("layer", {"k_offset": torch.full((2, 1, 32), 1e8)})
    with pytest.raises(ValueError, match=r"k: a scale of .* does not fit scale_dtype fp16"):
        tq.quantize(q, k, v, scheme(k="int8 static_offset scale=fp16"), scales=scales, backend="triton")


def test_scales_that_always_fit_make_nobody_wait(monkeypatch):
    """On a GPU, each truth value of a tensor is a wait."""
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda x: pytest.fail("a tensor was looked at"))
    for name in ("int8", "int8-fast", "int-flash", "fp8-rotated", "kv-int8", "kv-int4-kivi"):
        tq.quantize(*qkv(20, 40, 32, dtype=torch.float16), name, backend="triton")


def test_a_precision_without_a_fragment_is_quantized_by_torch_for_its_operand_alone(started):
    five = register(replace(PRECISIONS["int8"], name="mine", triton_quantize=None))
    try:
        compare(*qkv(20, 40, 32), scheme("int8", "mine", "int8", "int8 row_block:32"))
        assert [plan.name for plan in started] == ["quantize_q_int8", "quantize_v_int8"]
        assert quantize_task.lacking(scheme(k="mine").k, 32) == "k: precision mine has no triton_quantize"
    finally:
        del PRECISIONS[five.name]


def test_what_no_kernel_takes_is_said():
    assert quantize_task.lacking(scheme(k="int8").k, 64) is None
    assert quantize_task.lacking(scheme(k="int8").k, 512) == "k: head_dim 512 is more than a kernel holds"
    assert "sm_80 has no fp8" in quantize_task.lacking(scheme(v="fp8_e4m3").v, 64, targets.TARGETS["sm_80"])
    assert "sm_80 has no fp8" in quantize_task.lacking(scheme(v="int8 scale=fp8_e4m3").v, 64, targets.TARGETS["sm_80"])
    compare(*qkv(3, 5, 264), preset("int8"))


def test_the_template_runs_as_it_stands():
    """Its holes are filled for int8 per token."""
    q = qkv(100, d=64)[0]
    codes, scale = torch.full(q.shape, 99, dtype=torch.uint8), torch.full((1, 2, 100, 1), math.nan)
    made = Coded(codes=codes, scale=scale, scale_batch=200, scale_head=100, scale_row=1)
    template.quantize[(2, 2, 1)](Source(q, *q.stride()), Turned(), made, Table(), 100, TOKENS=64)
    expected = encode(q, q.dtype, scheme("int8").q)
    assert codes.view(torch.int8).equal(expected.codes) and scale.equal(expected.scale)


@pytest.mark.parametrize("name", DYNAMIC)
def test_a_kernel_imports_only_triton_and_has_no_free_names(name, started):
    kernels.quantize_operands(*qkv(4, dtype=torch.float16), preset(name))
    for plan in started:
        tree = ast.parse(generate.render(plan))
        names = {node.id: type(node.ctx) for node in ast.walk(tree) if isinstance(node, ast.Name)}
        stored = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        stored |= {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        stored |= {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
        assert set(names) <= stored | {"triton", "tl", "Any", "NamedTuple", "float", "range"}
        assert not [n for n in ast.walk(tree) if isinstance(n, ast.If)], "branches on constants are resolved"
