"""Where compiled kernels are found and kept, and what is said where that fails."""

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from factories import qkv

import tokquant as tq
from tokquant.features import Features
from tokquant.kernels import store
from tokquant.kernels.cpu import build, launch
from tokquant.kernels.cpu.instructions import INSTRUCTIONS, of_macros

pytestmark = pytest.mark.skipif(not build.available(), reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def built_once():
    """Not here."""


TEXT = 'extern "C" int answer() { return 41; }\n'


@pytest.fixture
def compilations(monkeypatch):
    """How often the compiler runs."""
    counted = []
    compiling = build._compile
    monkeypatch.setattr(build, "_compile", lambda *given: (counted.append(1), compiling(*given)))
    return counted


def answer():
    return build.load("answer", TEXT, "portable").answer()


def kept():
    [path] = (store.folder() / "cpu").glob("answer_*.so")
    return path


def test_a_kernel_is_built_once_and_found_again(compilations):
    assert [answer(), answer()] == [41, 41] and len(compilations) == 1
    assert (store.folder() / "cpu").stat().st_mode & 0o777 == 0o700
    [text] = (store.folder() / "kernels").glob("answer_*.cpp")
    assert text.read_text() == TEXT


def test_a_umask_that_lets_the_group_write_costs_no_second_compilation(compilations):
    before = os.umask(0o002)
    try:
        assert [answer(), answer()] == [41, 41] and len(compilations) == 1
    finally:
        os.umask(before)
    assert kept().stat().st_mode & 0o777 == 0o600


def test_a_folder_that_hands_down_its_group_costs_no_second_compilation(compilations):
    store.folder().mkdir(exist_ok=True)
    store.folder().chmod(0o2700)
    assert [answer(), answer()] == [41, 41] and len(compilations) == 1
    assert (store.folder() / "cpu").stat().st_mode & 0o7777 == 0o2700


def test_the_folder_stays_where_it_is_when_the_process_goes_elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOKQUANT_CACHE_DIR", "relative")
    assert store.folder() == tmp_path / "relative"
    monkeypatch.chdir("/")
    assert store.folder() == tmp_path / "relative"


def test_the_home_of_a_user_without_one_is_no_folder_in_this_one(monkeypatch):
    for name in ("TOKQUANT_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    store._named.cache_clear()
    assert store.folder() == Path("/.cache/tokquant")
    store._named.cache_clear()


def test_threads_that_want_one_kernel_at_once_build_it_once(compilations):
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda _: answer(), range(4))) == [41] * 4
    assert len(compilations) == 1


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_process_that_is_forked_while_another_thread_builds_does_not_wait_for_it():
    with build.BUILDING["answer"]:
        child = os.fork()
        if not child:
            os._exit(0 if build.BUILDING["answer"].acquire(timeout=5) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_another_text_compiler_or_set_has_another_name(monkeypatch, compilations):
    answer()
    build.load("answer", TEXT + "\n", "portable")
    build.load("answer", TEXT, build.instructions())
    command = build.compiler().command
    monkeypatch.setattr(build, "compiler", lambda: build.Compiler(command, "another", ()))
    answer()
    assert len(compilations) == len(list((store.folder() / "cpu").glob("*.so"))) == 4


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o777, 0o1700])
def test_nothing_is_loaded_from_or_kept_in_a_folder_that_others_reach(mode, compilations):
    answer()
    (store.folder() / "cpu").chmod(mode)
    kept().write_bytes(b"poison")
    assert answer() == 41 and len(compilations) == 2
    assert kept().read_bytes() == b"poison" and (store.folder() / "cpu").stat().st_mode & 0o7777 == mode


def test_nothing_is_loaded_from_a_folder_of_another_user_or_a_link_to_one(monkeypatch, tmp_path, compilations):
    answer()
    folder = store.folder() / "cpu"
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert answer() == 41 and len(compilations) == 2
    folder.unlink()
    (tmp_path / "elsewhere").rename(folder)
    monkeypatch.setattr(build.os, "geteuid", lambda: os.getuid() + 1)
    assert answer() == 41 and len(compilations) == 3


@pytest.mark.parametrize("poison", ["another library", "cut short", "writable by others", "a link"])
def test_a_bad_entry_is_a_miss(poison, tmp_path, compilations):
    answer()
    path = kept()
    whole = path.read_bytes()
    if poison == "another library":
        path.write_bytes(whole[:8000] + bytes([whole[8000] ^ 1]) + whole[8001:])
    elif poison == "cut short":
        path.write_bytes(whole[: len(whole) // 2])
    elif poison == "writable by others":
        path.chmod(0o666)
    else:
        path.rename(tmp_path / "elsewhere.so")
        path.symlink_to(tmp_path / "elsewhere.so")
    assert answer() == 41 and len(compilations) == 2
    assert kept().read_bytes() == whole and not kept().is_symlink(), "it is replaced by a good one"
    assert answer() == 41 and len(compilations) == 2


def test_a_folder_that_cannot_be_made_costs_a_compilation_each_time(monkeypatch, tmp_path, compilations):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TOKQUANT_CACHE_DIR", str(tmp_path / "file"))
    assert [answer(), answer()] == [41, 41] and len(compilations) == 2


def test_a_temporary_folder_that_nothing_is_run_from_is_only_built_in(monkeypatch, tmp_path):
    def mapped(path, load=build.ctypes.CDLL):
        if "tokquant-" in path:
            raise OSError(f"{path}: failed to map segment from shared object")
        return load(path)

    monkeypatch.setattr(build.ctypes, "CDLL", mapped)
    assert answer() == 41
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TOKQUANT_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(
        tq.UnsupportedError, match=r"built and cannot be loaded: .*failed to map .*; set TOKQUANT_CACHE_DIR or TMPDIR"
    ):
        answer()


def test_a_failing_compiler_says_its_first_lines():
    with pytest.raises(
        tq.UnsupportedError, match=r"fails on broken_\w+\.cpp; set CXX .*backend='reference'(.|\n)*nonsense"
    ) as raised:
        build.load("broken", "nonsense;\n" * 50, "portable")
    assert len(str(raised.value).splitlines()) <= 9


def test_a_compiler_that_writes_nothing_fails(monkeypatch):
    monkeypatch.setenv("CXX", "true")
    with pytest.raises(tq.UnsupportedError, match=r"backend: true \(.*\) fails on answer_\w+\.cpp; set CXX"):
        answer()


@pytest.mark.parametrize(("name", "value"), [("CXX", "no-such-compiler"), ("CXX", 'g++ "-O1'), ("PATH", "/nowhere")])
def test_without_a_compiler_the_backend_says_what_to_do(name, value, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv(name, value)
    assert not build.available()
    with pytest.raises(tq.UnsupportedError, match=r"needs a C\+\+ compiler.*install one.*backend='reference'"):
        tq.attention(*qkv(), "int8", backend="cpu")


def test_auto_is_cpu_on_a_cpu_and_without_a_compiler_the_reference_with_one_notice(monkeypatch):
    operands = qkv()
    assert torch.equal(tq.attention(*operands, "int8"), tq.attention(*operands, "int8", backend="cpu"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        outs = [tq.attention(*operands, "int8") for _ in range(2)]
    assert torch.equal(outs[0], tq.attention(*operands, "int8", backend="reference"))
    [notice] = said
    assert "no C++ compiler" in str(notice.message) and "install g++ or set CXX" in str(notice.message)


def test_a_set_that_is_none_or_not_here_is_refused(monkeypatch):
    monkeypatch.setenv(build.CHOICE, "avx")
    with pytest.raises(ValueError, match=r"'avx' is not valid; use one of avx512_bf16, .*, portable; did you mean 'avx2'"):
        build.instructions()
    monkeypatch.setenv(build.CHOICE, "avx2")
    monkeypatch.setattr(build, "compiler", lambda: build.Compiler(("c++",), "", ("portable",)))
    with pytest.raises(tq.UnsupportedError, match=r"c\+\+ has no avx2 for this processor; use one of portable"):
        build.instructions()


def test_a_processor_without_products_of_bfloat16_has_the_next_set():
    known = {macro for one in INSTRUCTIONS.values() for macro in one.macros}
    assert of_macros(known)[:2] == ("avx512_bf16", "avx512_vnni")
    assert of_macros(known - {"__AVX512BF16__"})[0] == "avx512_vnni"


@pytest.fixture
def compiler_that(tmp_path, monkeypatch):
    """Puts a compiler into CXX that treats some words as others do: a shell's `case` of each word."""

    def put(cases):
        script = tmp_path / "c++"
        words = f'for word; do shift; case "$word" in {cases} esac; set -- "$@" "$word"; done'
        script.write_text(f'#!/bin/sh\n{words}\nexec {" ".join(build.compiler().command)} "$@"\n')
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))

    return put


def test_without_openmp_kernels_run_on_one_thread(compiler_that):
    operands = qkv(600, 600, 32, 4)
    out = tq.attention(*operands, "int8", backend="cpu")
    assert build.compiler().threads == ("-fopenmp",)
    compiler_that("-fopenmp) exit 1;;")
    assert build.compiler().threads == () and build.compiler().instructions
    assert torch.equal(tq.attention(*operands, "int8", backend="cpu"), out)


def test_openmp_is_torchs_own_where_a_compiler_comes_without(compiler_that):
    operands = qkv(600, 600, 32, 4)
    out = tq.attention(*operands, "int8", backend="cpu")
    compiler_that('-Xpreprocessor) ours=1; continue;; -fopenmp) [ "$ours" ] || exit 1;; -lomp) word=-lgomp;;')
    found = build.compiler().threads
    assert found[:2] == ("-Xpreprocessor", "-fopenmp") and str(Path(torch.__file__).parent / "lib") in found[2]
    assert torch.equal(tq.attention(*operands, "int8", backend="cpu"), out)


def test_a_compiler_that_has_another_word_for_this_processor_is_asked_by_that(compiler_that):
    here = build.compiler().instructions
    compiler_that("-march=native) exit 1;; -mcpu=native) word=-march=native;;")
    assert build.compiler().instructions == here


def test_a_compiler_that_cannot_be_asked_once_is_asked_again(compiler_that, tmp_path):
    here, asked = build.compiler().instructions, tmp_path / "asked"
    compiler_that(f"-march=native) [ -e {asked} ] || {{ touch {asked}; exit 1; }};;")
    assert build.compiler().instructions == here and asked.exists()


def test_kernels_without_vector_instructions_are_told_of(compiler_that):
    compiler_that("-march=native|-mcpu=native) exit 1;;")
    with pytest.warns(UserWarning, match=r"use no vector instructions.*; set CXX"):
        assert build.instructions() == "portable"


def test_a_compiler_may_say_what_it_is_in_another_encoding(compiler_that):
    compiler_that(r"--version) printf 'c++ \251\n'; exit;;")
    assert build.compiler().version == "c++ \N{REPLACEMENT CHARACTER}"


def test_tensors_elsewhere_are_refused():
    x = torch.empty(1, 1, 16, 16, device="meta")
    q, k, v = tq.quantize(*qkv(16, 16, 16, 1), "none", backend="reference")
    with pytest.raises(tq.UnsupportedError, match=r"takes tensors in memory, and q is on meta"):
        launch.attention(replace(q, codes=x), k, v, q.scheme, Features(scale=1.0), False)
