"""Files of caches: what was kept comes back bit for bit, and what is wrong with a file is named."""

import json
import os

import pytest
import safetensors
import safetensors.torch
import torch
from plain_cache import SCHEMES, scales_for, with_cache

import tokquant as tq
from tokquant.schemes import preset
from tokquant.tensor_files import checksum

H, D = 2, 16
KIVI = SCHEMES["KIVI in small blocks"]


def filled(s, lengths=(75, 0, 2), dtype=torch.float16):
    made = tq.schemes.resolve(s)
    cache = tq.KVCache(made, batch=len(lengths), kv_heads=H, head_dim=D, dtype=dtype, scales=scales_for(made, H, D))
    cache.append(*(torch.randn(len(lengths), H, max(lengths), D).to(dtype) for _ in range(2)), counts=lengths)
    return cache


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache.safetensors"


def rewritten(path, change):
    """The file with its tensors or metadata changed, and the checksum left as it was."""
    with safetensors.safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    change(tensors, metadata)
    path.write_bytes(safetensors.torch.save(tensors, metadata))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("s", [preset("kv-fp8"), preset("kv-int4"), KIVI], ids=["kv-fp8", "kv-int4", "KIVI"])
def test_a_file_alone_is_enough_to_go_on(s, dtype, path):
    cache = filled(s, dtype=dtype)
    cache.save(path)
    loaded = tq.KVCache.load(path)
    assert loaded.scheme == cache.scheme and loaded.lengths == cache.lengths and loaded.dtype == dtype
    more = [torch.randn(3, H, 40, D).to(dtype) for _ in range(2)]
    q = torch.randn(3, 2 * H, 40, D).to(dtype)
    for each in (cache, loaded):
        each.append(*more)
    assert torch.equal(tq.decode(q, loaded), tq.decode(q, cache))


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("tokens", [0, 1])
def test_heads_of_one_channel_and_sequences_of_nothing_have_a_file(tokens, heads, path):
    cache = tq.KVCache(with_cache("kv-int8", sink=4), batch=2, kv_heads=heads, head_dim=1)
    cache.append(*torch.randn(2, 2, heads, 3, 1).half(), counts=[tokens, 3])
    cache.save(path)
    loaded = tq.KVCache.load(path)
    assert loaded.lengths == [tokens, 3] and all(map(torch.equal, loaded.windows(1), cache.windows(1)))


def test_codes_in_the_file_are_canonical_and_named(path):
    cache = filled(KIVI)
    cache.save(path)
    with safetensors.safe_open(path, "pt") as file:
        names = set(file.keys())
        packed = {"codes", "scale", "zero"}
        assert names == {f"0.{role}.{part}" for role in "kv" for part in packed} | {
            f"{b}.window.{role}" for b in range(3) for role in "kv"
        }
        assert torch.equal(file.get_tensor("0.k.codes"), cache.codes(0)[0].codes)
        assert json.loads(file.metadata()["tokquant.shape"])["tokens"] == [[48, 27], [0, 0], [0, 2]]


def test_the_file_is_no_larger_than_the_bits_say(path):
    cache = filled("kv-int4", (1024,))
    cache.save(path)
    assert path.stat().st_size < 1024 * H * D * 2 * cache.bits_per_value / 8 + 3000


def test_a_pool_of_a_given_capacity_must_hold_the_file(path):
    filled("kv-int4", (300, 10)).save(path)
    assert tq.KVCache.load(path, capacity=512).free_pages == 0
    with pytest.raises(tq.CacheFullError, match="4 more pages of 128 tokens are needed, and 3 of 3 are free"):
        tq.KVCache.load(path, capacity=300)


def set_to(name, value):
    return lambda tensors, metadata: tensors.update({name: value})


def without(name):
    return lambda tensors, metadata: tensors.pop(name)


def shaped(**changes):
    def change(tensors, metadata):
        metadata["tokquant.shape"] = json.dumps(json.loads(metadata["tokquant.shape"]) | changes)

    return change


def flipped(name, byte):
    def change(tensors, metadata):
        tensors[name] = tensors[name].clone()
        tensors[name].view(torch.uint8).view(-1)[0] ^= byte

    return change


WRONG = {
    "no codes": (without("0.k.codes"), "'0.k.codes' is missing"),
    "no window": (without("2.window.v"), "'2.window.v' is missing"),
    "no scale": (without("0.v.scale"), "'0.v.scale' is missing"),
    "one more": (set_to("0.k.rest", torch.ones(1)), "'0.k.rest' does not belong to a cache of this scheme"),
    "one more sequence": (set_to("3.window.k", torch.ones(1)), "'3.window.k' does not belong"),
    "scales of no use": (set_to("scales.k_scale", torch.ones(2, 1, 1)), "'scales.k_scale' does not belong"),
    "another shape": (set_to("0.k.codes", torch.zeros(1, H, 48, 4).byte()), r"'0.k.codes' is \[1, 2, 48, 4\] of torch.uint8"),
    "another type": (set_to("0.k.codes", torch.zeros(1, H, 48, 8).char()), r"\[1, 2, 48, 8\] of torch.int8; .*torch.uint8"),
    "a scale of zero": (set_to("0.k.scale", torch.zeros(1, H, 3, D).half()), "'0.k.scale' holds a scale that is not above"),
    "a bit of a code": (flipped("0.k.codes", 1), "codes or scheme are not those that were written"),
    "a bit of a window": (flipped("0.window.v", 16), "codes or scheme are not those that were written"),
    "no scheme": (lambda t, m: m.pop("tokquant.scheme"), "its tokquant.scheme cannot be read"),
    "a broken scheme": (lambda t, m: m.update({"tokquant.scheme": "{"}), "its tokquant.scheme cannot be read"),
    "a scheme that is a list": (lambda t, m: m.update({"tokquant.scheme": "[1]"}), "tokquant.scheme cannot be read: .* is no"),
    "a deep scheme": (lambda t, m: m.update({"tokquant.scheme": "[" * 100000}), "its tokquant.scheme cannot"),
    "a scheme that cannot grow": (
        lambda t, m: m.update({"tokquant.scheme": json.dumps(preset("int8").model_dump(mode="json"))}), "k.smooth: mean",
    ),
    "a scheme of other codes": (
        lambda t, m: m.update({"tokquant.scheme": json.dumps(preset("kv-int8").model_dump(mode="json"))}), "no state of a",
    ),
    "a scheme of another rotation": (
        lambda t, m: m.update({"tokquant.scheme": m["tokquant.scheme"].replace('"rotate": "none"', '"rotate": "hadamard"')}),
        "codes or scheme are not those that were written",
    ),
    "no format": (lambda t, m: m.pop("tokquant.cache"), "holds no KV cache; it was not written by KVCache.save"),
    "a newer format": (lambda t, m: m.update({"tokquant.cache": "99"}), "format '99' is not '1'"),
    "no sizes": (lambda t, m: m.pop("tokquant.shape"), "its tokquant.shape cannot be read"),
    "sizes that are a number": (lambda t, m: m.update({"tokquant.shape": "7"}), "tokquant.shape cannot be read: 7 is no"),
    "sizes of something else": (lambda t, m: m.update({"tokquant.shape": "{}"}), "kv_heads: None is not a whole number"),
    "no checksum": (lambda t, m: m.pop("tokquant.sha256"), "codes or scheme are not those that were written"),
    "heads without end": (shaped(kv_heads=10**30), "kv_heads: .* is not a whole number from 1"),
    "half a head": (shaped(kv_heads=0.5), "kv_heads: 0.5 is not a whole number"),
    "other heads": (shaped(kv_heads=3), r"\[1, 2, 48, 8\] of torch.uint8; a cache of these sizes has \[1, 3, 48, 8\]"),
    "a negative head_dim": (shaped(head_dim=-1), "head_dim: -1"),
    "an unknown type": (shaped(dtype="float8"), "dtype: 'float8'; it is one of float16, bfloat16, float32"),
    "a type that is a list": (shaped(dtype=[1]), r"dtype: \[1\]; it is one of"),
    "no tokens": (shaped(tokens=[]), "tokens: "),
    "tokens that are a number": (shaped(tokens=3), "tokens: 3 is not a pair"),
    "negative tokens": (shaped(tokens=[[-16, 20], [0, 0], [0, 2]]), r"tokens: \[-16, 20\] of sequence 0 is not a pair"),
    "endless tokens": (shaped(tokens=[[2**40, 20], [0, 0], [0, 2]]), "of sequence 0 is not a pair"),
    "three numbers": (shaped(tokens=[[48, 27, 1], [0, 0], [0, 2]]), "of sequence 0 is not a pair"),
    "a part of a block": (shaped(tokens=[[40, 35], [0, 0], [0, 2]]), r"\[40, 35\] of sequence 0 is no state of a cache"),
    "a sink that is missing": (shaped(tokens=[[48, 2], [0, 0], [0, 2]]), r"\[48, 2\] of sequence 0 is no state"),
    "a window too long": (shaped(tokens=[[48, 200], [0, 0], [0, 2]]), r"\[48, 200\] of sequence 0 is no state"),
    "a window that is not": (shaped(tokens=[[48, 26], [0, 0], [0, 2]]), r"'0.window.k' is \[1, 2, 27, 16\]"),
    "fewer sequences": (shaped(tokens=[[48, 27]]), "'1.window.k' does not belong"),
    "more sequences": (shaped(tokens=[[48, 27], [0, 0], [0, 2], [0, 0]]), "'3.window.k' is missing"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_with_a_file_is_named(change, message, path):
    filled(KIVI).save(path)
    rewritten(path, change)
    with pytest.raises(tq.CacheFileError, match=message) as error:
        tq.KVCache.load(path)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("scales.k_scale"), r"scales\.k_scale: missing"),
        (set_to("scales.v_scale", -torch.ones(2, 1, 1)), r"scales\.v_scale: holds a scale that is not above zero"),
        (set_to("scales.v_scale", torch.full((2, 1, 1), torch.nan)), r"scales\.v_scale: .*not finite"),
        (set_to("scales.k_scale", torch.ones(3, 1, 1)), r"scales\.k_scale: shape \[3, 1, 1\] does not fit"),
        (flipped("scales.k_scale", 1), "codes or scheme are not those that were written"),
    ],
    ids=["missing", "negative", "nan", "heads", "a bit"],
)
def test_what_is_wrong_with_its_scales_is_named(change, message, path):
    filled("kv-fp8").save(path)
    rewritten(path, change)
    with pytest.raises(tq.CacheFileError, match=message):
        tq.KVCache.load(path)


def test_a_code_that_quantization_never_gives_is_refused(path):
    filled("kv-int8").save(path)
    rewritten(path, lambda tensors, _: tensors["0.k.codes"].fill_(-128))
    with pytest.raises(tq.CacheFileError, match=r"'0\.k\.codes' holds a code beyond 127"):
        tq.KVCache.load(path)


def test_sizes_that_no_memory_holds_are_refused(path):
    filled("kv-int4", (1,)).save(path)

    def change(tensors, metadata):
        tensors.clear()
        tensors |= {f"0.window.{role}": torch.empty(1, 2**20, 0, 2**20, dtype=torch.float16) for role in "kv"}
        shaped(kv_heads=2**20, head_dim=2**20, tokens=[[0, 0]])(tensors, metadata)
        metadata["tokquant.sha256"] = checksum(tensors, metadata["tokquant.scheme"] + metadata["tokquant.shape"])

    rewritten(path, change)
    with pytest.raises(tq.CacheFileError, match=r"cache\.safetensors: "):
        tq.KVCache.load(path)


def test_every_truncation_is_refused(path):
    filled("kv-int4", (3,)).save(path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(tq.CacheFileError, match="not a safetensors file, or not a whole one"):
            tq.KVCache.load(path)


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"PK\x03\x04" * 50, b"{}", bytes(range(256))], ids=lambda b: repr(b[:4]))
def test_a_foreign_file_is_refused(content, path):
    path.write_bytes(content)
    with pytest.raises(tq.CacheFileError, match="not a safetensors file"):
        tq.KVCache.load(path)


def test_a_file_of_scales_is_no_cache(path):
    calibrator = tq.Calibrator("kv-fp8")
    calibrator.observe("a", *(torch.randn(1, 2, 8, 16) for _ in range(3)))
    tq.save_scales(path, calibrator.scales())
    with pytest.raises(tq.CacheFileError, match="holds no KV cache; it was not written by KVCache"):
        tq.KVCache.load(path)


def test_a_missing_file_a_folder_and_a_name_that_is_none_are_named(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path, tmp_path / ("x" * 300)):
        with pytest.raises(tq.CacheFileError, match=str(path)):
            tq.KVCache.load(path)


def test_a_save_that_fails_leaves_the_old_file_and_the_cache(path, monkeypatch):
    cache = filled("kv-int4")
    cache.save(path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    cache.truncate([50, 0, 2])
    with pytest.raises(OSError, match="No space left"):
        cache.save(path)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]
    assert cache.lengths == [50, 0, 2]
