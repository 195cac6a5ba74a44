"""Scale files: enough to run, atomic, and checked name by name."""

import json
import math
import os
import struct
import subprocess
import sys

import pytest
import safetensors
import safetensors.torch
import torch
from factories import scheme as made_of

import tokquant as tq
from tokquant import files
from tokquant.calibration.scales import Scales
from tokquant.schemes import preset

ASYMMETRIC = {"precision": "int8", "granularity": "channel", "scale": "static", "symmetric": False, "smooth": "static"}
FULL = tq.QuantScheme(
    name="full",
    q={"precision": "int8", "granularity": "tensor", "scale": "static"},
    k=ASYMMETRIC,
    v=ASYMMETRIC | {"scale_dtype": "fp16", "granularity": "head"},
    p={"precision": "int8"},
)


def calibrated(scheme, layers=("layers.0", "layers.1")):
    calibrator = tq.Calibrator(scheme)
    for name in layers:
        calibrator.observe(name, *(torch.randn(1, h, 40, 32) for h in (4, 2, 2)))
    return calibrator.scales()


def rewritten(path, change=lambda tensors, metadata: None):
    """The file with its tensors or metadata changed, and the checksum left as it was."""
    with safetensors.safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    change(tensors, metadata)
    path.write_bytes(safetensors.torch.save(tensors, metadata))


@pytest.mark.parametrize("scheme", [preset("kv-fp8"), FULL], ids=["kv-fp8", "every static part"])
def test_a_file_alone_is_enough_to_run(scheme, tmp_path):
    scales = calibrated(scheme)
    tq.save_scales(tmp_path / "scales.safetensors", scales)
    loaded = tq.load_scales(tmp_path / "scales.safetensors")
    assert loaded.scheme == scheme and loaded.scheme.name == scheme.name and list(loaded) == list(scales)
    operands = [torch.randn(1, h, 40, 32) for h in (4, 2, 2)]
    out = tq.attention(*operands, loaded.scheme, scales=loaded["layers.1"])
    assert torch.equal(out, tq.attention(*operands, scheme, scales=scales["layers.1"]))


FRESH = """
import sys
import torch
import tokquant as tq
from safetensors.torch import load_file, save_file

scales, inputs = tq.load_scales(sys.argv[1]), load_file(sys.argv[2])
q, k, v = (inputs[role] for role in "qkv")
out = tq.attention(q, k, v, scales.scheme, scales=scales["layers.1"], causal=True, backend="reference")
save_file({"out": out}, sys.argv[3])
"""


@pytest.mark.parametrize("scheme", [preset("kv-fp8"), FULL], ids=["kv-fp8", "every static part"])
def test_a_new_process_gives_the_same_bits(scheme, tmp_path):
    scales, inputs = calibrated(scheme), {role: torch.randn(1, h, 40, 32) for role, h in (("q", 4), ("k", 2), ("v", 2))}
    tq.save_scales(tmp_path / "scales", scales)
    safetensors.torch.save_file(inputs, tmp_path / "inputs")
    words = [sys.executable, "-c", FRESH, *(str(tmp_path / name) for name in ("scales", "inputs", "out"))]
    result = subprocess.run(words, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    out = tq.attention(*inputs.values(), scheme, scales=scales["layers.1"], causal=True, backend="reference")
    assert torch.equal(safetensors.torch.load_file(tmp_path / "out")["out"], out)


def test_what_was_loaded_does_not_change_with_its_file(tmp_path):
    path, scales = tmp_path / "scales.safetensors", calibrated("kv-fp8")
    tq.save_scales(path, scales)
    loaded, size = tq.load_scales(path), path.stat().st_size
    with path.open("r+b") as file:  # in place, as `cp` writes
        file.seek(size - 16)
        file.write(bytes(16))
    for layer in scales:
        assert all(torch.equal(loaded[layer].tensors[name], x) for name, x in scales[layer].tensors.items())


def test_names_are_those_of_vllm_and_shapes_those_of_compressed_tensors(tmp_path):
    path = tmp_path / "scales.safetensors"
    tq.save_scales(path, calibrated("kv-fp8", ["model.layers.0.self_attn"]))
    with safetensors.safe_open(path, "pt") as file:
        shapes = {name: tuple(file.get_tensor(name).shape) for name in file.keys()}  # noqa: SIM118
        assert json.loads(file.metadata()["tokquant.scheme"])["name"] == "kv-fp8"
    assert shapes == {"model.layers.0.self_attn.k_scale": (2, 1, 1), "model.layers.0.self_attn.v_scale": (2, 1, 1)}


def set_to(name, value):
    def change(tensors, metadata):
        tensors[name] = value

    return change


def without(name):
    def change(tensors, metadata):
        del tensors[name]

    return change


def swapped(tensors, metadata):
    tensors["layers.0.k_scale"], tensors["layers.0.v_scale"] = tensors["layers.0.v_scale"], tensors["layers.0.k_scale"]


def in_half(tensors, metadata):
    tensors["layers.0.k_scale"] = tensors["layers.0.k_scale"].half()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_to("layers.0.k_scale", torch.zeros(2, 1, 1)), r"layers\.0\.k_scale: holds a scale that is not above zero"),
        (set_to("layers.0.k_scale", -torch.ones(2, 1, 1)), r"layers\.0\.k_scale: holds a scale that is not above zero"),
        (set_to("layers.1.v_scale", torch.tensor([[[1.0]], [[torch.inf]]])), r"layers\.1\.v_scale: .*not finite"),
        (set_to("layers.1.v_scale", torch.full((2, 1, 1), torch.nan)), r"layers\.1\.v_scale: .*not finite"),
        (without("layers.1.v_scale"), r"layers\.1\.v_scale: missing; scheme 'kv-fp8' needs k_scale, v_scale"),
        (set_to("layers.0.q_scale", torch.ones(4, 1, 1)), r"layers\.0\.q_scale: scheme 'kv-fp8' has no use for it"),
        (set_to("layers.0.k_scale", torch.ones(2, 1, 32)), r"k_scale: shape \[2, 1, 32\] is not \[H, 1, 1\] of head"),
        (set_to("layers.0.k_scale", torch.ones(2)), r"layers\.0\.k_scale: shape \[2\]"),
        (set_to("layers.0.k_scale", torch.ones(2, 1, 1, dtype=torch.int8)), r"layers\.0\.k_scale: torch.int8 is no type"),
        (set_to("k_scale", torch.ones(2, 1, 1)), "'k_scale' is no scale; names are <layer>.k_scale"),
        (set_to("layers.0.weight", torch.ones(2)), r"'layers\.0\.weight' is no scale"),
        (set_to("layers.0.k_scale", torch.ones(2, 1, 1)), "checksum"),
        (set_to("layers.2.k_scale", torch.ones(2, 1, 1)), r"layers\.2\.v_scale: missing"),
        (set_to("layers.0.k_zero", torch.ones(2, 1, 1)), r"layers\.0\.k_zero: scheme 'kv-fp8' has no use for it"),
        (set_to("layers.0.k_scale", torch.ones(2**24, 1, 1, dtype=torch.uint8)), r"layers\.0\.k_scale: torch.uint8 is no type"),
        (swapped, "checksum"),
        (in_half, "checksum"),
    ],
    ids=["zero", "negative", "infinite", "nan", "missing", "unused", "shape", "dimensions", "integers", "no layer", "foreign",
         "changed", "half a layer", "zero point", "large integers", "swapped", "other type"],
)  # fmt: skip
def test_what_is_wrong_with_a_scale_is_named(change, message, tmp_path):
    path = tmp_path / "scales.safetensors"
    tq.save_scales(path, calibrated("kv-fp8"))
    rewritten(path, change)
    with pytest.raises(tq.ScalesError, match=message):
        tq.load_scales(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: m.pop("tokquant.scheme"), "no tokquant scheme in its metadata"),
        (lambda t, m: m.update({"tokquant.scheme": "{"}), "its scheme cannot be read"),
        (lambda t, m: m.update({"tokquant.scheme": "[1]"}), r"its scheme cannot be read: a scheme is a mapping .*, not \[1\]"),
        (lambda t, m: m.update({"tokquant.scheme": "[" * 100000}), "its scheme cannot be read"),
        (lambda t, m: m.update({"tokquant.scheme": '{"q": {"precision": "int9"}}'}), "no precision 'int9'"),
        (lambda t, m: m.update({"tokquant.format": "99"}), "format '99' is not '1'"),
        (lambda t, m: m.pop("tokquant.format"), "format None is not '1'"),
        (lambda t, m: m.clear(), "no tokquant scheme in its metadata"),
        (lambda t, m: m.pop("tokquant.sha256"), "checksum differs"),
        (lambda t, m: m.update({"tokquant.sha256": "0" * 64}), "checksum differs"),
        (lambda t, m: m.update({"tokquant.scheme": m["tokquant.scheme"].replace("fp8_e4m3", "fp8_e5m2")}), "checksum differs"),
        (
            lambda t, m: m.update({"tokquant.scheme": m["tokquant.scheme"].replace("head", "tensor")}),
            "k_scale: shape .* of tensor",
        ),
        (
            lambda t, m: m.update({"tokquant.scheme": scheme_of("int8")}),
            r"layers\.0\.\w_scale: scheme 'int8' has no use for it",
        ),
        (lambda t, m: m.update({"tokquant.scheme": scheme_of(FULL)}), r"layers\.0\.q_scale: missing; scheme 'full' needs"),
        (lambda t, m: t.clear(), "no layers"),
    ],
    ids=[
        "no scheme",
        "broken scheme",
        "no mapping",
        "deep",
        "unknown precision",
        "newer format",
        "no format",
        "no metadata",
        "no checksum",
        "other checksum",
        "other precision",
        "other granularity",
        "dynamic scheme",
        "full scheme",
        "no tensors",
    ],
)
def test_what_is_wrong_with_the_metadata_is_named(change, message, tmp_path):
    path = tmp_path / "scales.safetensors"
    tq.save_scales(path, calibrated("kv-fp8"))
    rewritten(path, change)
    with pytest.raises(tq.ScalesError, match=message):
        tq.load_scales(path)


def scheme_of(scheme):
    return json.dumps((preset(scheme) if isinstance(scheme, str) else scheme).model_dump(mode="json"))


def test_a_changed_byte_is_refused_or_changes_nothing(tmp_path):
    path = tmp_path / "scales.safetensors"
    tq.save_scales(path, calibrated("kv-fp8", ["a"]))
    whole, scales = path.read_bytes(), tq.load_scales(path)
    refused = 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            read = tq.load_scales(path)
        except tq.ScalesError as error:
            assert str(path) in str(error)
            refused += 1
        else:
            assert read.scheme == scales.scheme and list(read) == ["a"]
            assert all(torch.equal(read["a"].tensors[name], value) for name, value in scales["a"].tensors.items())
    # what is left are spaces, the word that says that tensors are PyTorch's, and its key
    assert refused > len(whole) - 40


def with_header(header, data=b"\0\0\x80?\0\0\x80?"):
    return struct.pack("<Q", len(header)) + header.encode() + data


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**63 - 1) + b"{}",
        struct.pack("<Q", 2**40) + b"{}",
        with_header('{"a.k_scale":{"dtype":"F32","shape":[4611686018427387904,4,1],"data_offsets":[0,8]}}'),
        with_header('{"a.k_scale":{"dtype":"F32","shape":[1099511627776,1,1],"data_offsets":[0,4398046511104]}}'),
        with_header('{"a.k_scale":{"dtype":"F32","shape":[2,1,1],"data_offsets":[8,0]}}'),
        with_header(
            '{"a.k_scale":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
            '"a.k_scale":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'
        ),
        with_header("[" * 100000),
    ],
    ids=["endless header", "long header", "too many values", "beyond the file", "backwards", "a layer twice", "deep"],
)
def test_a_header_that_cannot_be_is_refused(content, tmp_path):
    path = tmp_path / "scales.safetensors"
    path.write_bytes(content)
    with pytest.raises(tq.ScalesError, match=f"{path}: not a safetensors file, or not a whole one"):
        tq.load_scales(path)


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "scales.safetensors"
    tq.save_scales(path, calibrated("kv-fp8", ["a"]))
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(tq.ScalesError):
            tq.load_scales(path)


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"PK\x03\x04" * 50, b"{}", bytes(range(256))], ids=lambda b: repr(b[:4]))
def test_a_foreign_file_is_refused(content, tmp_path):
    path = tmp_path / "scales.safetensors"
    path.write_bytes(content)
    with pytest.raises(tq.ScalesError, match="not a safetensors file"):
        tq.load_scales(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(tq.ScalesError, match=str(path)):
            tq.load_scales(path)


def test_scales_of_other_heads_do_not_fit():
    scales = calibrated("kv-fp8")["layers.0"]
    with pytest.raises(tq.ScalesError, match=r"layers\.0\.k_scale: shape \[2, 1, 1\] does not fit k \[1, 4, 10, 32\]"):
        tq.attention(*(torch.randn(1, 4, 10, 32) for _ in range(3)), "kv-fp8", scales=scales)


def test_scales_of_a_layer_that_is_not_there_name_the_nearest():
    with pytest.raises(tq.ScalesError, match=r"no layer 'layer\.1'.*did you mean 'layers\.1'"):
        calibrated("kv-fp8")["layer.1"]


def test_scales_check_what_they_are_given():
    with pytest.raises(tq.ScalesError, match=r"a\.v_scale: missing"):
        Scales(preset("kv-fp8"), {"a": {"k_scale": torch.ones(1, 1, 1)}})


def heads(*values):
    return torch.tensor(values).view(-1, 1, 1)


@pytest.mark.parametrize(
    ("words", "tensors", "message"),
    [
        ("head static", {"k_scale": heads(1.0, math.nan)}, r"a\.k_scale: holds a value that is not finite"),
        ("head static", {"k_scale": heads(1.0, 0.0)}, r"a\.k_scale: holds a scale that is not above zero"),
        ("head static scale=fp16", {"k_scale": heads(1e9)}, r"a\.k_scale: holds a value that is not finite"),
        ("head static scale=fp16", {"k_scale": heads(1e-9)}, r"a\.k_scale: holds a scale that is not above zero"),
        ("head static", {"k_scale": torch.ones(2, 1)}, r"a\.k_scale: shape \[2, 1\] is not \[H, 1, 1\] of head"),
        ("head static", {"k_scale": torch.ones(2, 3, 1)}, r"a\.k_scale: shape \[2, 3, 1\] is not \[H, 1, 1\] of head"),
        ("static_offset", {"k_offset": torch.ones(2, 3, 8)}, r"a\.k_offset: shape \[2, 3, 8\] is not \[H, 1, D\]$"),
    ],
)
def test_a_scale_that_no_codes_can_have_is_named(words, tensors, message):
    with pytest.raises(tq.ScalesError, match=message):
        Scales(made_of(k=f"int8 {words}"), {"a": tensors})


def test_scales_take_a_scheme_as_everything_does(tmp_path):
    tensors = {"k_scale": torch.ones(2, 1, 1), "v_scale": torch.ones(2, 1, 1)}
    preset("kv-fp8").dump(tmp_path / "mine.yaml")
    kinds = ["kv-fp8", str(tmp_path / "mine.yaml"), tq.SchemeMap((("a", preset("kv-fp8")), ("*", preset("int8"))))]
    for scheme in kinds:
        scales = Scales(scheme, {"a": tensors})
        assert scales["a"].scheme == tq.LayerScales("a", tensors, scheme).scheme == preset("kv-fp8")
        tq.LayerScales("a", tensors).check(scheme)
        assert scales.scheme.name in repr(scales)
    with pytest.raises(tq.ScalesError, match=r"a\.k_scale: scheme 'int8' has no use for it"):
        tq.LayerScales("a", tensors).check("int8")


def test_the_layers_of_two_calibrations_are_joined():
    some, others = calibrated("kv-fp8", ["a"]), calibrated("kv-fp8", ["b", "c"])
    both = Scales("kv-fp8", {**some, **others})
    assert list(both) == ["a", "b", "c"] and torch.equal(both["c"].tensors["k_scale"], others["c"].tensors["k_scale"])


def test_tensors_without_names_are_refused_and_names_do_not_change_once_they_are_checked():
    with pytest.raises(TypeError, match=r"tensors: \[a Tensor\]; give a mapping of names to tensors"):
        tq.LayerScales("a", [torch.ones(2, 1, 1)])
    with pytest.raises(TypeError, match=r"layers: \['a'\]; give a mapping of layers' names"):
        Scales("kv-fp8", ["a"])
    tensors = {"k_scale": torch.ones(2, 1, 1), "v_scale": torch.ones(2, 1, 1)}
    made = tq.LayerScales("a", tensors, "kv-fp8")
    del tensors["k_scale"]
    assert list(made.tensors) == ["k_scale", "v_scale"]


def test_a_layer_that_the_map_in_a_file_has_no_scheme_for_is_named(tmp_path):
    path, scheme = tmp_path / "scales.safetensors", tq.SchemeMap((("layers.*", preset("kv-fp8")),), "mine")
    tq.save_scales(path, calibrated(scheme))
    rewritten(path, lambda tensors, _: tensors.update({"other.k_scale": torch.ones(2, 1, 1)}))
    with pytest.raises(tq.ScalesError, match=f"{path}: scheme map 'mine': no pattern matches layer 'other'"):
        tq.load_scales(path)


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(step, tmp_path, monkeypatch):
    path = tmp_path / "scales.safetensors"
    tq.save_scales(path, calibrated("kv-fp8"))
    before = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    if step == "write":
        # the disk fills up after some bytes
        class Full:
            def __init__(self, file):
                self.file = file

            def __enter__(self):
                return self

            def __exit__(self, *_):
                self.file.close()

            def write(self, data):
                self.file.write(data[: len(data) // 2])
                fail()

        monkeypatch.setattr(files, "open", lambda *a: Full(open(*a)), raising=False)  # noqa: SIM115
    else:
        monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space left"):
        tq.save_scales(path, calibrated("kv-fp8"))
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def test_a_new_file_follows_the_umask(tmp_path):
    before = os.umask(0o022)
    try:
        files.write_atomically(tmp_path / "file", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


def test_links_are_followed_and_pipes_written_to(tmp_path):
    (tmp_path / "there").mkdir()
    link, pipe = tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(tmp_path / "there" / "file")
    files.write_atomically(link, b"x")
    assert link.is_symlink() and os.listdir(tmp_path / "there") == ["file"] and link.read_bytes() == b"x"
    loop = tmp_path / "loop"
    loop.symlink_to(loop)  # leads nowhere, so the file takes its place
    files.write_atomically(loop, b"x")
    assert loop.read_bytes() == b"x"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    files.write_atomically(pipe, b"y")
    assert os.read(reader, 2) == b"y" and pipe.is_fifo()
    os.close(reader)
    stdout, writer = os.pipe()
    files.write_atomically(f"/dev/fd/{writer}", b"z")  # what /dev/stdout is
    assert os.read(stdout, 2) == b"z"
    os.close(stdout)
    with pytest.raises(BrokenPipeError) as caught:
        files.write_atomically(f"/dev/fd/{writer}", b"z")
    assert caught.value.filename == f"/dev/fd/{writer}"
    os.close(writer)


def test_what_cannot_be_written_is_named_as_it_was_given(tmp_path):
    for path, error in ((tmp_path / "none" / "x", FileNotFoundError), (tmp_path, IsADirectoryError)):
        with pytest.raises(error) as caught:
            files.write_atomically(path, b"x")
        assert caught.value.filename == str(path) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("given", [calibrated("kv-fp8")["layers.0"], "a.safetensors"], ids=["one layer", "a path"])
def test_what_are_no_scales_of_layers_is_said(given, tmp_path):
    for write in (tq.save_scales, tq.export_checkpoint_scales):
        with pytest.raises(TypeError, match=r"scales: .*; give all layers', as Calibrator.scales"):
            write(tmp_path / "x", given)
