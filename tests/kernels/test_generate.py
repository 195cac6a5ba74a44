"""The text of a kernel: standalone, verbatim, a pure function of its plan."""

import ast
import inspect
import linecache
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import tokquant as tq
from tokquant.kernels import generate, store
from tokquant.kernels.holes import lay_v
from tokquant.kernels.plan import plan
from tokquant.kernels.triton import decode, fragments, scales, template
from tokquant.kernels.wanted import Wanted
from tokquant.precisions import PRECISIONS
from tokquant.schemes import preset, preset_names


def planned(name, **features):
    return plan(preset(name), head_dim=64, dtype=torch.float16, wanted=Wanted(**features))


@pytest.mark.parametrize("name", preset_names())
def test_a_kernel_imports_only_triton_and_has_no_free_names(name):
    tree = ast.parse(generate.render(planned(name, right=True, lse=True)))
    imports = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    imports |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imports == {"triton", "triton.language", "typing"}
    stored = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    defined = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    arguments = {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
    known = stored | defined | arguments | {"triton", "tl", "Any", "NamedTuple", "float", "range"}
    assert {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} <= known


@pytest.mark.parametrize("name", preset_names())
def test_a_kernel_shows_the_features_it_has_and_no_others(name):
    scheme, text = preset(name), generate.render(planned(name))
    assert ("# bottom-right" in text) is False
    assert "# bottom-right" in generate.render(planned(name, right=True))
    assert ("    mean = tl.load" in text) is (scheme.v.smooth == "mean")
    assert ("V.correction" in text) is (scheme.p.precision == "uint8")
    assert ("F.bias" in text) is ("tl.dot(q_factors" in text) is ("def consecutive" in text) is False
    assert "tl.dot(q_factors" in generate.render(planned(name, bias="lowrank"))
    assert "consecutive" in generate.render(planned(name, bias="past_alibi"))
    assert "if RIGHT" not in text and "if V_" not in text, "branches on constants are resolved"


@pytest.mark.parametrize("name", preset_names())
def test_fragments_stand_verbatim_in_the_kernel(name):
    made = planned(name)
    text = generate.render(made)
    for hole, fragment in made.holes.items():
        source = inspect.getsource(getattr(fragment, "fn", fragment))
        assert source[source.index("(") :].rstrip() in text, hole


@pytest.mark.parametrize("kernel", [template.attention, decode.decode], ids=["attention", "decode"])
def test_only_sums_and_maxima_go_through_the_loop_over_keys(kernel):
    """A name of before that the loop gives another type is one that only compilers refuse."""
    tree = ast.parse(inspect.getsource(getattr(kernel, "fn", kernel)))
    stored = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    [loop] = [n for n in ast.walk(tree) if isinstance(n, ast.For) and ast.unparse(n.iter).startswith("range")]
    before = {n.id for n in stored if n.lineno < loop.lineno}
    within = {n.id for n in stored if loop.lineno < n.lineno <= loop.end_lineno}
    assert before & within == {"acc", "l", "m", "r", "zeros"}


def test_equal_plans_give_equal_text_in_any_process():
    text = generate.render(planned("int8", right=True))
    program = (
        "import torch; from tokquant.kernels import generate; from tokquant.kernels.plan import plan;"
        "from tokquant.schemes import preset; from tokquant.kernels.wanted import Wanted; import sys;"
        "sys.stdout.write(generate.render(plan(preset('int8'), head_dim=64, dtype=torch.float16, wanted=Wanted(right=True))))"
    )
    other = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"}
    )
    assert other.stdout == text


def test_the_schemes_name_never_reaches_the_kernel():
    scheme = preset("int8").model_copy(update={"name": "mallory"})
    assert "mallory" not in generate.render(plan(scheme, head_dim=64, dtype=torch.float16))


def test_the_template_runs_as_it_stands():
    """Its holes are filled for int8 per token, V per channel."""
    from tokquant.kernels import launch
    from tokquant.kernels.triton.operands import Features, Rows

    scheme = tq.QuantScheme(
        q={"precision": "int8"},
        k={"precision": "int8"},
        v={"precision": "int8", "granularity": "head"},
        p={"precision": "int8"},
    )
    q, k, v = tq.quantize(*(torch.randn(1, 2, 100, 64) for _ in range(3)), scheme, backend="reference")
    out = torch.full((1, 2, 100, 64), float("nan"))
    operands = [launch.operand(x) for x in (q, k, v)]
    rows, features = Rows(out, *out.stride()[:3]), Features(*[None] * len(Features._fields))
    template.attention[(1, 2, 1)](*operands, rows, None, features, 0.125, 100, 100, 2, BLOCK_M=128, BLOCK_N=128)
    assert torch.allclose(out, tq.attention(q, k, v, scheme, backend="reference"), atol=1e-5)


def test_what_lies_on_disk_is_never_run():
    made = planned("int8")
    generate.load.cache_clear()
    kernel = generate.load(made)
    [path] = (store.folder() / "kernels").iterdir()
    assert path.read_text() == generate.render(made)
    path.write_text("raise SystemExit('poisoned')")
    generate.load.cache_clear()
    assert inspect.getsource(generate.load(made).fn) == inspect.getsource(kernel.fn)
    assert path.read_text() == generate.render(made), "the copy is put right"
    assert "".join(linecache.getlines(str(path))) == generate.render(made)


def test_a_cache_folder_that_cannot_be_written_only_lacks_the_copy(monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("TOKQUANT_CACHE_DIR", str(blocked))
    generate.load.cache_clear()
    assert callable(generate.load(planned("int8-fast")).fn)
    assert not store.writable()


def test_fragments_call_nothing_but_triton():
    for name, fragment in [*vars(fragments).items(), *vars(scales).items()]:
        function = getattr(fragment, "fn", None)
        if function is None or name in ("tl", "triton"):
            continue
        tree = ast.parse(inspect.getsource(function))
        loaded = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        local = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        assert loaded - local - {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)} <= {"tl", "triton", "float"}, name


@pytest.mark.parametrize(("product", "lay"), [("tl.int8", fragments.side_by_side_ptx), ("tl.float16", fragments.side_by_side)])
def test_packed_values_go_through_registers_of_four_where_they_are_bytes_of_a_gpu(product, lay):
    packed = replace(PRECISIONS["int4"], compute=product)
    assert lay_v(packed, product, tokens_last=False, nvidia=True) is lay
    assert lay_v(packed, product, tokens_last=False, nvidia=False) is fragments.side_by_side
