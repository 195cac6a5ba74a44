"""The text of C++ kernels: whole, alone, and without what a kernel does not have."""

import ctypes
import re
import subprocess
from types import SimpleNamespace

import pytest
import torch

from tokquant.kernels.cpu import build, generate, launch, quantize_plan
from tokquant.kernels.cpu.plan import literal, plan
from tokquant.kernels.wanted import Wanted
from tokquant.schemes import preset
from tokquant.transforms import Steps

EVERYTHING = Wanted(left=True, right=True, mask="additive", softcap=True, sinks=True, lse=True, bias="lowrank")


PLAIN = Wanted()


def text_of(name, wanted=PLAIN, **given):
    return generate.render(
        plan(preset(name), **dict(head_dim=64, dtype=torch.float32, wanted=wanted, instructions="avx512_vnni") | given)
    )


def test_the_template_has_a_default_for_every_constant_of_a_plan():
    template = (generate.HERE / "attention.cpp").read_text()
    written = {m["name"]: m["value"] for m in map(generate.CONSTANT.fullmatch, template.splitlines()) if m}
    made = plan(preset("int8"), head_dim=64, dtype=torch.float32, wanted=Wanted(), instructions="portable")
    assert written.keys() == made.constants.keys()


def test_a_number_is_written_as_its_float32_whatever_torchs_default_device():
    with torch.device("meta"):
        assert literal(0.1) == "0.10000000149011612f"


@pytest.mark.skipif(not build.available(), reason="needs a C++ compiler")
def test_the_template_compiles_as_it_stands(tmp_path):
    command = [*build.compiler().command, "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
    subprocess.run([*command, "-Wno-unknown-pragmas", generate.HERE / "attention.cpp"], check=True)


@pytest.mark.skipif(not build.available(), reason="needs a C++ compiler")
@pytest.mark.parametrize("name", ["int8", "fp8", "kv-int4"])
def test_a_kernel_compiles_without_a_warning(name, tmp_path):
    source = tmp_path / "kernel.cpp"
    source.write_text(text_of(name, EVERYTHING, instructions="portable"))
    command = [*build.compiler().command, "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
    subprocess.run([*command, "-Wno-unknown-pragmas", source], check=True)


@pytest.mark.skipif(not build.available(), reason="needs a C++ compiler")
def test_arguments_are_packed_as_a_compiler_lays_them_out(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "load", lambda *_: SimpleNamespace(attention=SimpleNamespace(), quantize=SimpleNamespace()))
    given = dict(head_dim=64, dtype=torch.float32, instructions="portable")
    # with a softcap alone a float comes last, and padding behind it
    plans = [plan(preset(name), wanted=w, **given) for name in ("int8", "fp8") for w in (EVERYTHING, Wanted(softcap=True))]
    tasks = [quantize_plan.task_of(preset("kv-int4"), role, 64, torch.float16, Steps(128, True, True, True)) for role in "qkv"]
    plans += [quantize_plan.plan(task, "portable") for task in tasks]
    text, packed = "#include <cstddef>\n#include <cstdint>\n", []
    for i, made in enumerate(plans):
        _, names, pack = launch.load.__wrapped__(made)
        packed.append((len(names), pack(*range(1, len(names) + 1))))
        declared = re.search(r"struct Arguments (\{.*?\n\};)", generate.render(made), re.DOTALL)[1]
        declared = re.sub(r"(const )?\w+\*", "void*", declared)
        read = "".join(f"    *to++ = double(intptr_t(a->{name}));\n" for name in names)
        text += f"struct Arguments{i} {declared}\n"
        text += f'extern "C" size_t read{i}(const Arguments{i}* a, double* to) {{\n{read}    return sizeof *a;\n}}\n'
    source, library = tmp_path / "arguments.cpp", tmp_path / "arguments.so"
    source.write_text(text)
    subprocess.run([*build.compiler().command, "-std=c++17", "-shared", "-fPIC", source, "-o", library], check=True)
    functions = ctypes.CDLL(str(library))
    for i, (number, data) in enumerate(packed):
        found = (ctypes.c_double * number)()
        size = functions[f"read{i}"](ctypes.c_char_p(data), found)
        assert list(found) == list(range(1, number + 1)) and size == len(data), plans[i].title


def test_a_kernel_needs_no_other_file_and_has_no_condition_left():
    text = text_of("int8", EVERYTHING)
    assert not re.search(r'#include "', text)
    assert re.findall(r"#if.*|#else|#endif", text) == []
    assert set(re.findall(r"#include <(\w+)", text)) == {"cmath", "cstdint", "cstring", "immintrin"}


def test_fragments_are_copied_as_they_stand():
    text = text_of("fp8")
    for file in ("lanes.h", "avx512_vnni.h"):
        assert (generate.HERE / file).read_text() in text
    assert preset("fp8").p.format.cpp_encode in text


def test_a_kernel_shows_the_features_that_it_has_and_no_others():
    plain, full = text_of("int8"), text_of("int8", EVERYTHING)
    for word in ("a.left", "a.right", "a.mask", "softcap", "sinks", "a.lse", "factors", "tanh"):
        assert word not in plain and word in full, word
    assert "hadamard" not in plain and "hadamard" not in full
    assert "v_mean" in plain and "dot(" in plain and "kept(" not in plain
    assert len(plain.splitlines()) < 700
