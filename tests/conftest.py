"""Two kinds of run: Triton's interpreter (the default) and the compiler (TRITON_INTERPRET=0). They cannot share a process.

Tests marked `ptx` belong to both: in the second the text that a GPU is given runs on a CPU (tests/ptx). With TOKQUANT_PTX=90 it
runs every test of the first kind so, for the GPU of that compute capability.
"""

import os
from functools import partial
from pathlib import Path

# before anything imports Triton, or NumPy, in which its interpreter computes
os.environ.setdefault("TRITON_INTERPRET", "0" if "TOKQUANT_PTX" in os.environ else "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # a core for a process: torch, NumPy, and the scripts that tests run
if os.environ["TRITON_INTERPRET"] == "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a CPU's run: what it finds must not depend on a GPU that is there

import pytest
import scripts
import torch
from hypothesis import HealthCheck, settings

from tokquant import cli, kv_cache
from tokquant.kernels.cpu import build, launch
from tokquant.plugins import load
from tokquant.quantize import quantize_operands

for plugin in filter(None, os.environ.get("TOKQUANT_PLUGINS", "").split(os.pathsep)):
    load(Path(plugin))

INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"
PTX = int(os.environ.get("TOKQUANT_PTX", 0))

settings.register_profile("tokquant", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tokquant")


def of_ptx(item):
    """Whether this run has the test run what is compiled, without a GPU."""
    return not INTERPRETED and not item.get_closest_marker("compiled") and (PTX or item.get_closest_marker("ptx"))


def pytest_collection_modifyitems(config, items):
    """Leave out what the other kind of run does, and what needs a GPU where there is none."""
    kept, left = [], []
    for item in items:
        ours = of_ptx(item) or (not PTX and bool(item.get_closest_marker("compiled")) != INTERPRETED)
        (kept if ours else left).append(item)
    config.hook.pytest_deselected(items=left)
    if not torch.cuda.is_available():
        for item in kept:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
    items[:] = kept


@pytest.fixture(autouse=True, scope="session")
def patched_once():
    """For a launch, Triton's interpreter puts its own functions into `triton.language`; it does so again at each call of a
    function in a kernel, which takes longer than most of them. The first call of each is enough."""
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    def call(function, *arguments, **named):
        if function.fn not in function.rewritten_fn:
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        yield


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch):
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("TOKQUANT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def quantized_by_torch(monkeypatch):
    """On a CPU too, for C++ kernels that quantize would be built for every test; those that are about them override this."""

    def by_torch(q, k, v, scheme, scales=None):
        return launch.packed(quantize_operands(q, k, v, scheme, scales), scheme)

    monkeypatch.setattr("tokquant.kernels.cpu.quantize.quantize_operands", by_torch)


@pytest.fixture(autouse=True)
def kept_by_torch(monkeypatch):
    """So are the pages of a KV cache."""
    monkeypatch.delitem(kv_cache.STORES, "cpu")


@pytest.fixture(autouse=True)
def built_once(tmp_path_factory, monkeypatch):
    """A C++ kernel takes a second to build: one cache folder of them for a run, all its processes together."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "built"
    monkeypatch.setattr(build, "libraries", lambda: folder / "cpu")
    return folder


@pytest.fixture
def python(built_once):
    """Python as a user starts it, who has built these kernels before."""
    return partial(scripts.python, TOKQUANT_CACHE_DIR=str(built_once))


@pytest.fixture
def on_ptx(request, monkeypatch):
    """A CPU as a GPU that runs the PTX of a compute capability, an H100's where none is given; every kernel it has run."""
    from ptx import device

    with device.stand_in(monkeypatch, getattr(request, "param", PTX or 90)) as launched:
        yield launched


@pytest.fixture(autouse=True)
def answering(request):
    """A kernel that reads where it must not leaves its process without a GPU. Where there are others, this one ends, so that
    the tests that follow have one."""
    yield
    if "PYTEST_XDIST_WORKER" in os.environ and request.node.get_closest_marker("gpu") and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)


@pytest.fixture(autouse=True)
def launches(request):
    """Where a test's launches go that says nothing of it."""
    if of_ptx(request.node):
        request.getfixturevalue("on_ptx")


@pytest.fixture
def tokquant(capsys, monkeypatch):
    """A command line: words to exit code, standard output and standard error."""

    def run(*words):
        capsys.readouterr()  # of what came before
        monkeypatch.setattr("sys.argv", ["tokquant", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
            raise SystemExit(0)
        out = capsys.readouterr()
        return stop.value.code or 0, out.out, out.err

    return run
