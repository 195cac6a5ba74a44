"""A calibration in a file: going on from it is as if it had never stopped, and a file that is wrong says how."""

import json

import pytest
import safetensors
import safetensors.torch
import torch
from factories import scheme

import tokquant as tq

FULL = scheme(
    q="int8 tensor static",
    k="int8 channel static asymmetric static_offset",
    v="int4 head static static_offset",
    rotate="hadamard",
)


def batch(n=30, d=16):
    return tuple(torch.randn(2, h, n, d, dtype=torch.bfloat16) for h in (4, 2, 2))


def begun(observer="mse", s=FULL):
    calibrator = tq.Calibrator(s, observer)
    for name in ("layers.0", "layers.1"):
        calibrator.observe(name, *batch())
    return calibrator


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "state.safetensors"
    begun().save(path)
    return path


@pytest.mark.parametrize("observer", ["amax", "percentile:99.5", "mse", "ema:0.75"])
def test_going_on_from_a_file_is_as_never_having_stopped(observer, tmp_path):
    whole = begun(observer)
    whole.sources["digest"] = "a.safetensors"
    whole.save(tmp_path / "state")
    loaded = tq.Calibrator.load(tmp_path / "state")
    assert (loaded.scheme, loaded.observer, loaded.sources) == (whole.scheme, whole.observer, whole.sources)
    more = {"layers.1": batch(n=3), "layers.2": batch()}
    for calibrator in (whole, loaded):
        for name, operands in more.items():
            calibrator.observe(name, *operands)
    assert list(loaded.scales()) == ["layers.0", "layers.1", "layers.2"]
    for name, layer in whole.scales().items():
        for key, value in layer.tensors.items():
            found = loaded.scales()[name].tensors[key]
            assert torch.equal(found, value) and found.dtype == value.dtype, (name, key)


def test_parts_of_a_job_merge_from_their_files(tmp_path):
    parts = [begun("percentile:99", scheme(v="int8 head static")) for _ in range(2)]
    for number, part in enumerate(parts):
        part.sources[str(number)] = f"{number}.safetensors"
        part.save(tmp_path / str(number))
    one, other = (tq.Calibrator.load(tmp_path / str(number)) for number in range(2))
    one.merge(other)
    parts[0].merge(parts[1])
    assert torch.equal(*(c.scales()["layers.0"].tensors["v_scale"] for c in (one, parts[0])))
    with pytest.raises(ValueError, match=r"merge: both have seen '1.safetensors', which would count twice"):
        one.merge(other)
    with pytest.raises(ValueError, match=r"merge: this is the calibrator itself"):
        one.merge(one)
    for unlike in (tq.Calibrator(one.scheme, "mse"), tq.Calibrator("kv-fp8", one.observer)):
        with pytest.raises(ValueError, match="merge: the other calibrator has another scheme or observer"):
            one.merge(unlike)
    with pytest.raises(TypeError, match=r"merge: 'state'; give another Calibrator"):
        one.merge("state")


def rewritten(path, change):
    """The file with its tensors or its description changed, and the checksum left as it was."""
    with safetensors.safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    description = json.loads(metadata["tokquant.state"])
    change(tensors, metadata, description)
    if "tokquant.state" in metadata and metadata["tokquant.state"] != "{":
        metadata["tokquant.state"] = json.dumps(description)
    path.write_bytes(safetensors.torch.save(tensors, metadata))


BINS = "layers.0.k_scale.bins"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m, d: t.pop(BINS), f"'{BINS}' is missing"),
        (lambda t, m, d: t.update(extra=torch.ones(1)), "'extra' does not belong to a calibration of this scheme"),
        (lambda t, m, d: t.update({BINS: t[BINS].long()}), rf"'{BINS}' is \[2, 16, 512\] of torch.int64; it should be"),
        (lambda t, m, d: t[BINS].add_(1), r"layers.0.k_scale.bins: not the counts of 60 tokens"),
        (lambda t, m, d: t["layers.1.v_scale.low"].fill_(torch.nan), r"layers.1.v_scale.low, high: not finite"),
        (lambda t, m, d: t["layers.1.v_scale.low"].fill_(-torch.inf), r"layers.1.v_scale.low, high: not finite"),
        (lambda t, m, d: t["layers.1.v_scale.low"].fill_(1e30), r"layers.1.v_scale.low, high: .* a low above its high"),
        (
            lambda t, m, d: t["layers.1.v_offset.sum"].fill_(torch.inf),
            r"layers.1.v_offset.sum: holds a value that is not finite",
        ),
        (lambda t, m, d: t["layers.1.v_offset.sum"].add_(1), "checksum differs"),
        (lambda t, m, d: d["sources"].update(a="b"), "checksum differs"),
        (lambda t, m, d: d["layers"]["layers.0"]["tokens"].update(k=61), "not the counts of 61 tokens"),
        (lambda t, m, d: d["layers"]["layers.0"].update(dtype="int8"), "layer 'layers.0' is described wrongly"),
        (lambda t, m, d: d["layers"]["layers.0"].update(dtype=["float16"]), "layer 'layers.0' is described wrongly"),
        (lambda t, m, d: d["layers"]["layers.0"]["tokens"].update(k=2**64), "layer 'layers.0' is described wrongly"),
        (lambda t, m, d: d["layers"]["layers.0"].update(tokens={"k": -1}), "layer 'layers.0' is described wrongly"),
        (lambda t, m, d: d["layers"]["layers.0"]["shapes"].update(k=[2**40, 1]), "heads and channels of k, is more than"),
        (lambda t, m, d: d["layers"]["layers.0"]["shapes"].update(k="x"), "'x' is no pair of heads and channels of k"),
        (lambda t, m, d: d.pop("layers"), "its description lacks scheme, layers or sources"),
        (lambda t, m, d: d.update(observer="mean"), "observer: 'mean' is not valid"),
        (lambda t, m, d: d["scheme"]["k"].update(precision="int9"), "no precision 'int9'"),
        (lambda t, m, d: m.update({"tokquant.state": "{"}), "its description cannot be read"),
        (lambda t, m, d: m.update({"tokquant.calibration": "99"}), "format '99' is not '1'"),
        (lambda t, m, d: m.pop("tokquant.calibration"), "holds no calibration"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(change, message, path):
    rewritten(path, change)
    with pytest.raises(tq.ScalesError, match=message) as error:
        tq.Calibrator.load(path)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize("batches", [0, 61])
def test_a_moving_average_is_of_one_batch_to_as_many_as_there_are_tokens(batches, path):
    calibrator = begun("ema:0.75")
    calibrator.observe("layers.2", *(x[:1] for x in batch(n=1)))
    calibrator.save(path)
    tq.Calibrator.load(path)
    rewritten(path, lambda t, m, d: t["layers.0.k_scale.batches"].fill_(batches))
    with pytest.raises(tq.ScalesError, match=rf"layers\.0\.k_scale\.batches: {batches} of 60 tokens"):
        tq.Calibrator.load(path)


def test_a_file_of_something_else_or_a_part_of_one_is_refused(path, tmp_path):
    tq.save_scales(tmp_path / "scales", begun().scales())
    with pytest.raises(tq.ScalesError, match=r"holds no calibration; it was not written by Calibrator\.save"):
        tq.Calibrator.load(tmp_path / "scales")
    with pytest.raises(tq.ScalesError, match="no tokquant scheme in its metadata"):
        tq.load_scales(path)
    whole = path.read_bytes()
    for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(tq.ScalesError, match="not a safetensors file, or not a whole one"):
            tq.Calibrator.load(path)
    with pytest.raises(tq.ScalesError, match="No such file"):
        tq.Calibrator.load(tmp_path / "none")


def test_a_save_that_fails_leaves_the_old_file(path, monkeypatch):
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        begun().save(path)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]
