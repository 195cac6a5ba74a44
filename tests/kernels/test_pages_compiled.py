"""Kernels that write and read pages, compiled for GPUs that are not here: what they take, and on a GPU what they give."""

import json
from importlib.metadata import version

import pytest
import torch
from paged import differs, filled
from quantized import differences
from test_pages import BLOCKS, FEATURES, SCHEMES, dtype_of

import tokquant as tq
from tokquant import cli
from tokquant.features import Features
from tokquant.kernels import decode_launch as module
from tokquant.kernels import generate, resources
from tokquant.kernels.pages import TritonPages
from tokquant.pages import ReferencePages
from tokquant.schemes import preset

KINDS = ["kv-fp8", "kv-int8", "kv-int4", "kv-int4-kivi", "kv-int2-kivi", "fireq without its balance"]
IS_36, IS_39 = (version("triton").startswith(each) for each in ("3.6.", "3.9."))

# instructions for a value of K or V in the loop over whole tiles; sm_90, head_dim 128, up to 16 rows
BUDGETS = {"kv-int8": 1.6, "kv-int4": 2.6 if IS_36 else 2.2}


@pytest.mark.skipif(not (IS_36 or IS_39), reason="the budgets are those of Triton 3.6 and 3.9")
@pytest.mark.compiled
@pytest.mark.parametrize("name", BUDGETS)
def test_the_loop_over_keys_keeps_its_budget(name):
    kernel = tq.compile(name, head_dim=128, decode=True, shared_heads=8, target="sm_90")
    found = kernel.resources
    assert kernel.bandwidth.instructions_per_value <= BUDGETS[name]
    assert not {"I2F", "F2I", "LDL", "STL"} & set(found.loop) and found.spill_bytes <= 16
    assert found.blocks_per_multiprocessor >= 4 and all(name.startswith("IMMA") for name in found.tensor_core)
    assert kernel.bandwidth.predicted == kernel.bandwidth.memory, "memory is slower than what is issued"


OFTEN = {("sm_80", "kv-int8"), ("sm_100", "kv-fp8"), ("gfx942", "kv-int4"), ("sm_80", "kv-int4-kivi")}
HERE = [
    pytest.param(target, name, marks=[] if (target, name) in OFTEN else pytest.mark.slow)
    for target in ("sm_80", "sm_90", "sm_100", "gfx942")
    for name in KINDS
]


@pytest.mark.compiled
@pytest.mark.parametrize(("target", "name"), HERE)
def test_every_kind_of_cache_compiles_with_few_spills(name, target):
    try:
        kernel = tq.compile(SCHEMES[name], head_dim=128, decode=True, shared_heads=4, window=True, target=target)
    except tq.UnsupportedError as error:
        assert target in ("sm_80", "gfx942") and "fp8" in str(error)
        return
    found = (each.resources for each in kernel.candidates())
    assert any(each.fits and each.spill_bytes <= 96 and not each.spills_in_loop for each in found)


@pytest.mark.compiled
@pytest.mark.parametrize("given", [dict(mask="boolean"), dict(bias="alibi"), dict(varlen=True), dict(sinks=True)], ids=str)
def test_what_a_kernel_for_pages_does_not_have_is_refused(given):
    with pytest.raises(tq.UnsupportedError, match=r"^(decode|sinks): "):
        tq.compile("kv-int8", head_dim=64, decode=True, **given)
    with pytest.raises(ValueError, match="bandwidth: this kernel does not read pages"):
        _ = tq.compile("kv-int8", head_dim=64).bandwidth


# in tests/kernels/test_pages.py the others are launched so too, and run as PTX
LAUNCHED = [
    pytest.param(name, marks=[] if name in ("kv-int8", "kv-int4", "kv-int4-kivi") else pytest.mark.slow) for name in KINDS
]


@pytest.mark.compiled
@pytest.mark.parametrize("name", LAUNCHED)
def test_a_launch_compiles_with_its_own_arguments(name, absent_gpu, monkeypatch):
    """Appending a token and many, one run of keys and several, and merging those."""
    compiled = []

    class Kernel:
        def __init__(self, function):
            self.function = function

        def __getitem__(self, grid):
            return lambda *given, **options: compiled.append(self.function.warmup(*given, grid=grid, **options))

    load = generate.load
    monkeypatch.setattr(generate, "load", lambda plan: Kernel(load(plan)))
    monkeypatch.setattr(module, "merge", Kernel(module.merge))
    monkeypatch.setattr(module.launch, "check", lambda *_: None)
    monkeypatch.setattr(module.launch, "available", lambda _: True)
    s = SCHEMES[name]
    case = filled(s, (320, 64), d=128, dtype=torch.float16, step=None)
    x = torch.zeros(2, 2, 1 if name not in BLOCKS else 32, 128, dtype=torch.float16)
    case.store.write(x, x, case.table, case.lengths)
    case.attend(Features(scale=0.1, causal=True, window=(100, None)), offset=case.lengths, longest=128)
    case.attend(Features(scale=0.1, causal=True), deterministic=True, longest=1024)
    names = [each.metadata.name for each in compiled]
    assert names.count("merge") == 1 and sum(each.startswith("decode") for each in names) == 2
    for each in compiled:
        _, stack, _ = resources.machine_code(each)
        assert stack <= (256 if each.metadata.name.startswith("decode") else 16), each.metadata.name
        if each.metadata.name.startswith("decode"):
            assert "cp.async.cg.shared.global" in each.asm["ptx"], "tiles are fetched ahead"


@pytest.mark.compiled
def test_the_command_line_says_how_fast_a_cache_should_be_read(capsys, monkeypatch):
    words = ["tokquant", "compile", "kv-int8", "--head-dim", "64", "--decode", "--shared-heads", "4", "--json"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit):
        cli.main()
        raise SystemExit(0)
    found = json.loads(capsys.readouterr().out)
    assert found["kernel"].startswith("decode_") and found["config"]["block_m"] == 16
    assert found["bandwidth"]["predicted"] == min(found["bandwidth"]["issued"], found["bandwidth"]["memory"]) > 0


# ---------------------------------------------------------------------------- on a GPU


@pytest.mark.compiled
@pytest.mark.gpu
@pytest.mark.parametrize("name", SCHEMES)
def test_a_gpu_writes_the_codes_of_the_definition_and_attends_as_the_emulation(name):
    s = SCHEMES[name]
    lengths = (1024, 256, 128) if name in BLOCKS else (1000, 131, 1)
    step = 128 if name in BLOCKS else 97
    options = dict(d=128, page=128, device="cuda", dtype=dtype_of(s))
    kinds = (TritonPages, ReferencePages)
    for one, other in zip(*(filled(s, lengths, step=step, kinds=(kind,), **options) for kind in kinds), strict=True):
        for b, tokens in enumerate(lengths):
            for x, y in zip(one.store.read(one.table[b], tokens), other.store.read(other.table[b], tokens), strict=True):
                assert differences(x, y) == []
    for deterministic in (False, True):
        assert not differs(s, Features(scale=0.1, causal=True), deterministic=deterministic, lengths=lengths, **options)


@pytest.mark.compiled
@pytest.mark.gpu
@pytest.mark.parametrize("name", FEATURES)
def test_features_agree_on_a_gpu(name):
    shape, given = FEATURES[name]
    features = Features(**({"scale": 0.125} | given))
    for scheme in ("kv-int4", "kv-int8"):
        assert not differs(preset(scheme), features, device="cuda", **{"lengths": (200, 131), **shape})
