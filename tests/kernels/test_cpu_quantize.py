"""C++ kernels that quantize give what the definition gives: every code and every scale, not nearly but just."""

import math
import re
import subprocess
from dataclasses import replace

import pytest
import torch
from factories import qkv, scheme
from quantized import CHOICES, FLOATS, MISFITS, chosen, differences, same

import tokquant as tq
from tokquant import blocks
from tokquant.calibration.scales import LayerScales
from tokquant.errors import SchemeError
from tokquant.kernels.cpu import bound, build, generate, launch, quantize_plan
from tokquant.kernels.cpu import quantize as kernels
from tokquant.kernels.cpu.bound import BoundKernel
from tokquant.kernels.cpu.quantize_plan import lacking
from tokquant.precisions import PRECISIONS, register
from tokquant.quantize import quantize_operands
from tokquant.schemes import preset, preset_names
from tokquant.schemes.scheme import SCALE_TYPES
from tokquant.transforms import Frame

# a kernel takes most of a second to build: fast tests share them, and leave the rest to the slow run
slow = pytest.mark.slow
pytestmark = pytest.mark.skipif(not build.available(), reason="needs a C++ compiler")

DYNAMIC = [name for name in preset_names() if preset(name).k.scale == "dynamic"]


@pytest.fixture(autouse=True)
def quantized_by_torch():
    """Here by kernels."""


def differing(q, k, v, made, scales=None):
    """The fields in which kernels and definition differ, laid out for a CPU; or what attention reads."""
    expected = launch.packed(quantize_operands(q, k, v, made, scales), made)
    operands = kernels.quantize_operands(q, k, v, made, scales)
    found = [f"{name} of {one}" for one, other in zip(expected, operands, strict=True) for name in differences(one, other)]
    for place, name in ((0, "q"), (2, "v_scale")):
        read = [launch.operand_arguments(x[place], made).get(name) for x in (expected, operands)]
        found += [] if same(*read) else [f"{name} as attention reads it"]
    return found


@pytest.fixture(autouse=True)
def used_memory(monkeypatch):
    """What a kernel does not write shows."""
    monkeypatch.setattr(torch, "empty", lambda *size, empty=torch.empty, **rest: spoiled(empty(*size, **rest)))


def spoiled(x):
    x.view(torch.uint8).fill_(0xA5)
    return x


@pytest.fixture
def planned(monkeypatch):
    """The tasks that kernels were started for."""
    tasks = []
    monkeypatch.setattr(kernels, "plan", lambda task, *rest: (tasks.append(task), quantize_plan.plan(task, *rest))[1])
    return tasks


FEW = ("int8", "kv-int4", "kv-int2-kivi")


@pytest.mark.parametrize("name", [pytest.param(x, marks=[] if x in FEW else slow) for x in DYNAMIC])
def test_presets_are_quantized_as_the_definition_says(name, planned):
    made = preset(name)
    assert differing(*qkv(37, 150, 64, 4, 2), made) == []
    assert [task.spec.role for task in planned] == (["k", "v"] if made.q.precision == "fp32" else ["k", "q", "v"])


@pytest.mark.parametrize("instructions", ["avx2", "portable"])  # registers of half and of a quarter of 16 numbers
def test_registers_of_any_width_give_the_same_codes(instructions, monkeypatch):
    if instructions not in build.compiler().instructions:
        pytest.skip("not of this processor")
    monkeypatch.setenv(build.CHOICE, instructions)
    made = scheme("int4 scale=fp16", "int8 asymmetric scale=fp8_e4m3", "fp8_e5m2 head", "fp16", rotate="hadamard")
    q, k, v = (x.half() for x in qkv(37, 150, 42, 4, 2))
    q[0, 0, 1] = v[0, 1, 2] = -0.0
    q[0, 1, 2, 5] = k[0, 1, 3, 7] = v[0, 0, 149, 41] = math.nan
    assert differing(q, k, v, made) == []


SOME = [pytest.param(*row, marks=[] if place % 40 == 9 else slow) for place, row in enumerate(CHOICES)]


@pytest.mark.parametrize(("words", "granularity", "scale", "smooth", "transforms", "p", "dtype", "shape"), SOME, ids=str)
def test_every_choice_is_quantized_as_the_definition_says(words, granularity, scale, smooth, transforms, p, dtype, shape):
    assert differing(*qkv(*shape, dtype), chosen(words, granularity, scale, smooth, transforms, p)) == []


@pytest.mark.parametrize(
    ("d", "dtype"),
    [pytest.param(d, kind, marks=[] if (d, kind) == (33, torch.float32) else slow) for d in (33, 96) for kind in FLOATS],
    ids=str,
)
def test_floats_that_are_rotated_or_only_laid_out_are_those_of_the_definition(d, dtype):
    made = scheme("fp16", "fp16", "fp16", "fp16", rotate="hadamard")
    assert differing(*qkv(20, 40, d, dtype=dtype), made) == []


VIEWS = {
    "transposed from [B, N, H, D]": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "the last dimension strided": lambda x: x.mT.contiguous().mT,
    "a slice at an offset": lambda x: torch.nn.functional.pad(x, (3, 1, 5, 2))[:, :, 5:-2, 3:-1],
    "one head expanded": lambda x: x[:, :1].expand(-1, x.shape[1], -1, -1),
    "one token expanded": lambda x: x[:, :, :1].expand(-1, -1, x.shape[2], -1),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_any_strides_are_read(view):
    assert differing(*(view(x) for x in qkv(70, 70, 64, batch=2)), preset("int8")) == []


@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize(
    "words",
    ["int4 asymmetric scale=fp16"]
    + [
        pytest.param(words, marks=slow)
        for words in ("int8", "int4 asymmetric", "fp8_e5m2 head", "fp4_e2m1 head", "int2 group:16 scale=fp8_e4m3")
    ],
)
def test_what_is_not_finite_goes_where_it_goes_in_the_definition(words, value):
    q, k, v = qkv(20, 40, 32)
    k[0, 1, 7, 5] = v[0, 0, 39, 31] = value
    made = scheme("int8", words, words, "int8 row_block:32")
    expected = launch.packed(quantize_operands(q, k, v, made), made)
    for one, other in zip(expected, kernels.quantize_operands(q, k, v, made), strict=True):
        # a NaN is one whatever its bits, and zero has two signs
        assert [name for name in differences(one, other) if name != "codes"] == []
        assert same(one.stored_values(), other.stored_values())


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("dtype", [*(pytest.param(x, marks=slow) for x in FLOATS[:2]), torch.float32], ids=str)
def test_floats_that_are_not_finite_are_laid_out_as_they_are(value, dtype):
    q, k, v = qkv(20, 40, 33, dtype=dtype)
    k[0, 1, 7, 5], v[0, 0, 39, 31] = value, -value
    made = scheme("fp16", "fp16", "fp16", "fp16", rotate="hadamard")
    for one, other in zip(quantize_operands(q, k, v, made), kernels.quantize_operands(q, k, v, made), strict=True):
        assert same(one.stored_values(), other.stored_values())


@pytest.mark.parametrize(
    ("precision", "kind"),
    [("int8", "fp8_e4m3"), ("int4 asymmetric", "fp16")]
    + [
        pytest.param(precision, kind, marks=slow)
        for precision in ("int8", "int4 asymmetric", "fp8_e4m3", "fp4_e2m1")
        for kind in ("fp32", "fp16", "fp8_e4m3")
    ],
)
def test_zeros_and_tiny_values_keep_the_scales_of_the_definition(precision, kind):
    q, k, v = qkv(8, 24, 32)
    k[:, :, 3], v[:, :, 5] = 0, 0
    k[:, :, 4], v[:, :, 6] = 1e-38, -1e-45
    k[:, :, 9] = v[:, :, 9] = 2.0  # one value
    words = f"{precision} token scale={kind}"
    assert differing(q, k, v, scheme("int8", words, words, "int8 row_block:32")) == []


@pytest.mark.parametrize(
    "precision",
    [
        pytest.param(p, marks=[] if p.name in ("int8", "fp8_e4m3", "fp4_e2m1") else slow)
        for p in PRECISIONS.values()
        if p.largest and "k" in p.roles
    ],
    ids=lambda p: p.name,
)
def test_ties_go_to_the_even_code(precision):
    """The largest is R, so the scale is 1 and values are what `encode` is given."""
    values = precision.values().double()
    ties = ((values[1:] + values[:-1]) / 2).float()
    x = torch.cat([ties, torch.nextafter(ties, torch.tensor(math.inf)), torch.nextafter(ties, torch.tensor(-math.inf))])
    x = x[x.abs() <= precision.largest]
    x = torch.nn.functional.pad(x, (0, -len(x) % 31)).reshape(1, 1, -1, 31)
    k = torch.cat([torch.full_like(x[..., :1], precision.largest), x], dim=3)
    made = scheme(k=f"{precision.name} token")
    assert bool((kernels.quantize_operands(k, k, k, made)[1].scale == 1).all())
    assert differing(k, k, k, made) == []


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_casts_to_16_bits_are_torchs(kind):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    near = torch.cat([bits << 16, (bits << 16) + 0x8000, (bits << 16) + 0x1000, (bits << 16) + 0x3000, (bits << 16) + 1])
    x = near.view(torch.float32).reshape(1, 1, -1, 64)
    x = torch.where(x.abs() < (65520 if kind == torch.float16 else math.inf), x, math.nan)
    name = "fp16" if kind == torch.float16 else "bf16"
    _, k, _ = kernels.quantize_operands(x, x, x, scheme("fp32", name, "fp32", "fp32"))
    assert same(k.stored_values(), x.to(kind).float())


@pytest.mark.parametrize(
    ("precision", "granularity"),
    [("int4 asymmetric", "channel")]
    + [
        pytest.param(precision, granularity, marks=slow)
        for precision in ("int8", "int4 asymmetric", "fp8_e4m3")
        for granularity in ("tensor", "head", "channel")
    ],
)
def test_static_scales_are_used_as_they_are(precision, granularity):
    shape = {"tensor": (1, 1, 1), "head": (2, 1, 1), "channel": (2, 1, 16)}[granularity]
    tensors = {f"{role}_scale": torch.rand(shape) + 0.01 for role in "kv"}
    if "asymmetric" in precision:
        tensors |= {f"{role}_zero": -torch.rand(shape) for role in "kv"}
    tensors["k_offset"] = torch.randn(2, 1, 16, dtype=torch.float64)
    made = scheme(
        "int8", f"{precision} {granularity} static static_offset", f"{precision} {granularity} static", "int8 row_block:32"
    )
    assert differing(*qkv(20, 40, 16, 4, 2, 2), made, LayerScales("layer", tensors)) == []


@pytest.mark.parametrize(
    ("words", "value", "message"),
    [pytest.param(*each, id=each[0], marks=[] if place in (0, 5) else slow) for place, each in enumerate(MISFITS)],
)
def test_what_does_not_fit_its_type_is_the_error_of_the_definition(words, value, message):
    q, k, v = qkv(4)
    k[0, 0, 2, :2] = torch.as_tensor(value)
    with pytest.raises(ValueError, match=message):
        tq.quantize(q, k, v, scheme(k=words), backend="cpu")


def test_a_group_that_does_not_divide_head_dim_is_the_error_of_the_definition():
    with pytest.raises(SchemeError, match=r"k\.granularity: a group of 32 channels does not divide head_dim 48"):
        tq.quantize(*qkv(4, d=48), scheme(k="int8 group:32"), backend="cpu")


def test_floats_of_q_that_nothing_is_done_to_are_the_callers_own_tensor():
    q, k, v = qkv(20, dtype=torch.float16)
    codes = tq.quantize(q, k, v, scheme("fp16", "fp16", "fp16", "fp16"), backend="cpu")
    assert codes[0].codes.data_ptr() == q.data_ptr()


def test_a_precision_without_a_fragment_is_quantized_by_torch_for_its_operand_alone(planned):
    five = register(replace(PRECISIONS["int8"], name="mine", cpp_quantize=""))
    try:
        made = scheme("int8", "mine", "int8", "int8 row_block:32")
        assert differing(*qkv(20, 40, 32), made) == []
        assert [task.spec.role for task in planned] == ["q", "v"]
        assert lacking(replace(task_of("k", "int8"), spec=made.k)) == "k: precision mine has no cpp_quantize"
    finally:
        del PRECISIONS[five.name]


@pytest.mark.parametrize("d", [1, pytest.param(1100, marks=slow)])
def test_extreme_head_dims_are_quantized(d):
    assert differing(*qkv(3, 20, d, 1), preset("int8")) == []


@pytest.mark.parametrize("instructions", build.compiler().instructions[1:] if build.available() else [])
@pytest.mark.parametrize("name", ["kv-int4", pytest.param("int8", marks=slow)])
def test_every_instruction_set_gives_the_same_codes(name, instructions, monkeypatch):
    monkeypatch.setenv(build.CHOICE, instructions)
    assert differing(*qkv(37, 150, 64, 4, 2), preset(name)) == []


def test_what_calls_look_up_is_that_of_their_own_shapes_types_and_instructions(monkeypatch):
    asked = []
    loading = launch.load
    monkeypatch.setattr(bound, "load", lambda made: (asked.append(made.instructions), loading(made))[1])
    made = preset("int8")
    for shape in ((37, 150, 64, 4, 2), (20, 40, 64, 4, 2), (37, 150, 32, 4, 2), (37, 150, 64, 4, 2)):
        for dtype in (torch.float32, torch.float16):
            assert differing(*qkv(*shape, dtype=dtype), made) == [], (shape, dtype)
    monkeypatch.setenv(build.CHOICE, "portable")
    assert differing(*qkv(37, 150, 64, 4, 2), made) == []
    assert set(asked[-3:]) == {"portable"} and asked[:3] == [build.compiler().instructions[0]] * 3


def test_a_kernel_takes_what_every_call_says_anew_first():
    for role in "qkv":
        names = launch.load(quantize_plan.plan(task_of(role, "int8"), "portable"))[1]
        assert names[: len(bound.CALL_ARGUMENTS)] == bound.CALL_ARGUMENTS


def test_codes_do_not_depend_on_the_number_of_threads():
    before, made = torch.get_num_threads(), preset("int8-fast")
    try:
        for threads in (1, 5):
            torch.set_num_threads(threads)
            assert differing(*qkv(300, 700, 64, 4, 2), made) == [], f"{threads} threads"
    finally:
        torch.set_num_threads(before)


def garbage(*size, dtype):
    """Memory that somebody else's numbers lie in."""
    return torch.randint(0, 255, (*size[:-1], size[-1] * dtype.itemsize), dtype=torch.uint8).view(dtype)


PAGED = {name: preset(name) for name in ("kv-int8", "kv-int4")} | {
    "int2, odd head_dim": scheme("int8", "int2 asymmetric", "int2", "int8 row_block:16"),
    "fp8 and fp4 in groups": scheme("fp16", "fp8_e4m3 group:16", "fp4_e2m1 group:16 scale=fp8_e4m3", "fp16"),
    "16 bits": scheme("fp16", "bf16", "fp16", "fp16"),
}


@pytest.mark.parametrize("name", [pytest.param(x, marks=slow if x[:2] in ("fp", "16") else []) for x in PAGED])
@pytest.mark.parametrize("role", ["k", "v"])
def test_tokens_appended_to_pages_are_those_of_a_whole_tensor(name, role):
    check_pages(PAGED[name], role, 42 if "odd" in name else 64)


def check_pages(made, role, d, page=128, n=300):
    spec = getattr(made, role)
    x = qkv(8, n, d, 2, batch=2)[1]
    rotated = role == "k" and made.rotate == "hadamard"
    task = quantize_plan.task_of(made, role, d, torch.float32, Frame(rotated=rotated).steps(), paged=True)
    columns = spec.granularity.scale_shape((1, 1, page, d))[3] if spec.scaled else 1
    size = kernels.allocate_codes(torch.Size((9, 2, page, d)), task).shape
    codes = garbage(*size, dtype=torch.int32)
    scale = garbage(9, 2, page, columns, dtype=SCALE_TYPES[spec.scale_dtype]) if spec.scaled else None
    zero = garbage(9, 2, page, columns, dtype=SCALE_TYPES[spec.scale_dtype]) if spec.scaled and not spec.symmetric else None
    kept = [None if y is None else y.clone() for y in (codes, scale, zero)]
    given = {"codes": codes, "scale": scale, "zero": zero}
    append = BoundKernel(quantize_plan.plan(task, build.instructions()), given, page)
    table = torch.tensor([[3, 0, 7], [8, 1, 4]], dtype=torch.int32)
    # the second sequence is 37 tokens ahead
    assert append(x[1:, :, :37], table[1:].contiguous(), torch.zeros(1, dtype=torch.int32))
    lengths = torch.tensor([0, 37], dtype=torch.int32)
    for count in (1, 1, 13, 1, 140, 5, 16, 80):
        new = torch.stack([x[b, :, lengths[b] : lengths[b] + count] for b in range(2)])
        assert append(new, table, lengths)
        lengths += count
    expected = launch.packed(quantize_operands(x, x, x, made), made)["qkv".index(role)]
    fields = launch.operand_arguments(expected, made)
    back = blocks.keys_of if role == "k" else blocks.values_of
    for b in range(2):
        end = int(lengths[b])
        for at in range(0, end, page):
            count, own = min(page, end - at), int(table[b, at // page])
            # a page is a short sequence
            ours, before = (back(y[own : own + 1], task.bits, page, d) for y in (codes, kept[0]))
            whole = back(expected.codes[b : b + 1], task.bits, n, d)
            assert torch.equal(ours[0, :, :count], whole[0, :, at : at + count])
            assert torch.equal(ours[0, :, count:], before[0, :, count:]), "what is not written stays"
            for stored, old, field in ((scale, kept[1], f"{role}_scale"), (zero, kept[2], f"{role}_zero")):
                if stored is not None:
                    assert same(stored[own, :, :count], fields[field].view(expected.scale.shape)[b, :, at : at + count])
                    assert same(stored[own, :, count:], old[own, :, count:])
    unused = [i for i in range(9) if i not in table.flatten().tolist()]
    assert torch.equal(codes[unused], kept[0][unused])


def test_tokens_that_do_not_fit_a_page_s_type_are_told():
    task = task_of("k", "kv-int8")
    codes = kernels.allocate_codes(torch.Size((1, 1, 16, 64)), task)
    given = {"codes": codes, "scale": torch.empty(1, 1, 16, 1, dtype=torch.float16)}
    append = BoundKernel(quantize_plan.plan(task, build.instructions()), given, 16)
    table, first = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    assert not append(torch.full((1, 1, 1, 64), 1e9), table, first)
    assert append(torch.ones(1, 1, 1, 64), table, first)


def task_of(role, name, dtype=torch.float32, **rest):
    return replace(quantize_plan.task_of(preset(name), role, 64, dtype, Frame().steps()), **rest)


EVERYTHING = dict(offset_tokens=128, balanced=True, rotated=True, folded=True, k_offset=True, k_origin=True, code_sum=True)


def test_the_template_has_a_default_for_every_constant_of_a_plan():
    head = (generate.HERE / "quantize.cpp").read_text().split('#include "lanes.h"')[0]
    written = {m["name"] for m in map(generate.CONSTANT.fullmatch, head.splitlines()) if m}
    assert written == quantize_plan.plan(task_of("k", "int8"), "portable").constants.keys()


def warnings_of(path):
    command = [*build.compiler().command, "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
    return subprocess.run([*command, "-Wno-unknown-pragmas", path], capture_output=True, text=True).stderr


def test_the_template_compiles_as_it_stands():
    assert warnings_of(generate.HERE / "quantize.cpp") == ""


@pytest.mark.parametrize(
    "task",
    [task_of("q", "int8", **EVERYTHING), task_of("v", "kv-int4", torch.bfloat16), task_of("k", "kv-int2-kivi", torch.float16),
     task_of("v", "int8-fast", offset_tokens=128), task_of("v", "int8", code_sum=True), task_of("k", "kv-fp8")],
    ids=str,
)  # fmt: skip
def test_a_kernel_is_whole_and_compiles_without_a_warning(task, tmp_path):
    text = generate.render(quantize_plan.plan(task, "avx512_vnni"))
    assert not re.search(r'#include "|#if|#else|#endif', text)
    assert set(re.findall(r"#include <(\w+)", text)) == {"cmath", "cstdint", "cstring"}
    (tmp_path / "kernel.cpp").write_text(text)
    assert warnings_of(tmp_path / "kernel.cpp") == ""


def test_a_kernel_shows_what_it_does_and_nothing_else():
    plain = generate.render(quantize_plan.plan(task_of("k", "kv-int8"), "portable"))
    full = generate.render(quantize_plan.plan(task_of("q", "int8", **EVERYTHING), "portable"))
    for word in ("a.offset", "a.balance", "butterflies", "a.fold", "a.k_offset", "a.k_origin", "logit", "code_sum"):
        assert word not in plain and word in full, word
    assert "lowest" not in plain.split("struct Scratch")[0]
