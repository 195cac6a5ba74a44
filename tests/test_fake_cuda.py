"""What runs on the CPU around kernels, for tensors of a GPU that is not there: devices are not mixed, and nothing waits."""

from itertools import accumulate

import pytest
import torch
from fake_cuda import fake_cuda

import tokquant as tq
from tokquant.bias import Alibi
from tokquant.schemes import preset, preset_names

pytestmark = pytest.mark.compiled

STATIC = [name for name in preset_names() if "static" in str(preset(name).model_dump())]
MAY_NOT_FIT = {"kv-int4", "fireq"}  # rotated or balanced, with scales in fp16 that its numbers then may go beyond


@pytest.fixture
def seen(monkeypatch):
    with fake_cuda(monkeypatch) as seen:
        yield seen


def some(*shape, dtype=torch.float16):
    return torch.empty(shape, dtype=dtype, device="cuda")


def three(n_q=300, n_k=300, d=64):
    return some(2, 4, n_q, d), some(2, 2, n_k, d), some(2, 2, n_k, d)


@pytest.mark.parametrize("name", sorted(set(preset_names()) - set(STATIC)))
def test_attention_waits_for_nothing_but_scales_that_may_not_fit_their_type(name, seen):
    out, lse = tq.attention(*three(), name, causal=True, return_lse=True)
    assert out.is_cuda and lse.is_cuda and seen.launched[-1].startswith("attention")
    assert seen.waits == (["kernels/quantize.py"] if name in MAY_NOT_FIT else [])


# by tokquant and by torch: means, those of K once more for the heads of Q, and what V's codes are corrected and weighted by
LAUNCHES = {
    "int8-fp8": (6, 2),
    "int8-fast": (6, 2),
    "int8": (4, 5),
    "int8-token": (4, 8),
    "fp8": (10, 0),
    "int-flash": (6, 0),
    "int4": (3, 6),
    "kv-int8": (4, 6),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_call_launches_no_more_kernels_than_it_did(name, seen):
    tq.attention(*three(), name, causal=True)
    assert (len(seen.launched), len(seen.computed)) == LAUNCHES[name], seen


@pytest.mark.parametrize(("name", "means"), [("fp8", 0), ("int8", 2)])
def test_sequences_launch_what_one_does_and_their_means(name, means, seen):
    def launches(lengths):
        starts = torch.tensor([0, *accumulate(lengths)])
        before = len(seen.launched), len(seen.computed)
        operands = (some(sum(lengths), heads, 64) for heads in (4, 2, 2))
        tq.attention_varlen(*operands, name, cu_seqlens_q=starts, cu_seqlens_k=starts, causal=True)
        return len(seen.launched) - before[0], len(seen.computed) - before[1]

    few, many = launches([100, 300]), launches([70, 300, 5, 128, 1, 40])
    assert many == (few[0], few[1] + 4 * means) and not seen.waits


FEATURES = {
    "a window, softcap and sinks": lambda: dict(window=(100, 3), softcap=3.0, sinks=some(4)),
    "a boolean mask": lambda: dict(mask=some(2, 1, 300, 300, dtype=torch.bool)),
    "an additive mask": lambda: dict(mask=some(4, 1, 300)),
    "slopes": lambda: dict(bias=Alibi(some(4, dtype=torch.float32)), causal=True),
    "a bias of keys": lambda: dict(bias=tq.bias.key_vector(some(300))),
    "factors": lambda: dict(bias=tq.bias.lowrank(some(1, 4, 300, 8), some(1, 4, 300, 8))),
    "a dense bias": lambda: dict(bias=tq.bias.dense(some(4, 300, 300))),
}


@pytest.mark.parametrize("given", FEATURES.values(), ids=FEATURES)
def test_features_wait_for_nothing(given, seen):
    assert tq.attention(*three(), "int8", **given()).is_cuda and not seen.waits


@pytest.mark.parametrize("name", STATIC)
def test_static_scales_of_a_file_are_used_where_the_tensors_are(name, seen, tmp_path, monkeypatch):
    calibrator = tq.Calibrator(name)
    calibrator.observe("layer", *(torch.randn(2, heads, 50, 64) for heads in (4, 2, 2)))
    tq.save_scales(tmp_path / "scales.safetensors", calibrator.scales())
    scales = tq.load_scales(tmp_path / "scales.safetensors")
    assert tq.attention(*three(), name, scales=scales["layer"], causal=True).is_cuda and not seen.waits
    cache = tq.KVCache(name, batch=2, kv_heads=2, head_dim=64, device="cuda", scales=scales["layer"])
    cache.append(some(2, 2, 70, 64), some(2, 2, 70, 64))
    seen.waits.clear()
    assert tq.decode(some(2, 8, 1, 64), cache).is_cuda and not seen.waits


@pytest.mark.parametrize("name", ["kv-int8", "kv-int4", "kv-int4-kivi", "kv-int2-kivi"])
def test_a_step_of_decoding_waits_for_nothing(name, seen):
    cache = tq.KVCache(name, batch=2, kv_heads=2, head_dim=64, device="cuda")
    cache.append(some(2, 2, 300, 64), some(2, 2, 300, 64), counts=[300, 17])
    seen.waits.clear()
    for _ in range(40):  # beyond a window
        cache.append(some(2, 2, 1, 64), some(2, 2, 1, 64))
        out = tq.decode(some(2, 8, 1, 64), cache, window=(200, 0), softcap=3.0, sinks=some(8))
    assert out.is_cuda and not seen.waits
    cache.truncate([20, 30])
    cache.fork([0, 0, 1])
    assert tq.decode(some(2, 8, 1, 64), cache).is_cuda


def test_a_step_with_16_bit_windows_is_a_launch_more(seen):
    cache = tq.KVCache("kv-int4-kivi", batch=2, kv_heads=2, head_dim=64, device="cuda")
    cache.append(some(2, 2, 300, 64), some(2, 2, 300, 64))
    q = some(2, 8, 1, 64)
    seen.launched.clear(), seen.computed.clear()
    tq.decode(q, cache)
    assert [name.split("_")[0] for name in seen.launched] == ["decode", "attention"]
    # lengths, how many tokens are newer, and which slots are seen; the output's type
    assert seen.computed == ["aten::_to_copy"] * 4


@pytest.mark.parametrize("name", ["kv-int8", "kv-int4"])
def test_a_step_in_reserved_room_is_launches_alone(name, seen, monkeypatch):
    cache = tq.KVCache(name, batch=2, kv_heads=2, head_dim=64, device="cuda", capacity=4096)
    cache.append(some(2, 2, 300, 64), some(2, 2, 300, 64), counts=[300, 17])
    cache.reserve(1000)
    new, q = some(2, 2, 1, 64), some(2, 8, 1, 64)
    for capturing in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda now=capturing: now)
        for each in (seen.launched, seen.computed, seen.waits):
            each.clear()
        cache.append(new, new)
        tq.decode(q, cache)
    # K, V, the queries, attention and its merge; lengths, up to what there is room for, and the output's type
    assert (len(seen.launched), len(seen.computed), seen.waits) == (5, 3, [])


def test_sequences_one_after_another_stay_on_the_gpu(seen):
    starts = torch.tensor([0, 100, 100, 356], dtype=torch.int32)
    q, k, v = (some(356, heads, 64) for heads in (4, 2, 2))
    out = tq.attention_varlen(q, k, v, "int8", cu_seqlens_q=starts, cu_seqlens_k=starts, causal=True)
    assert out.is_cuda and seen.launched[-1].startswith("attention") and not seen.waits


def test_models_that_call_torchs_attention_stay_on_the_gpu(seen):
    layer = torch.nn.TransformerEncoderLayer(128, 2, batch_first=True, device="cuda", dtype=torch.float16).eval()
    with tq.quantized_sdpa("int8"), torch.no_grad():
        assert layer(some(2, 50, 128)).is_cuda
    assert any(name.startswith("attention") for name in seen.launched)


def test_numbers_of_a_calibration_are_waited_for(seen):
    calibrator = tq.Calibrator("kv-fp8")
    with pytest.raises(ValueError, match="not finite"):  # for here there are none
        calibrator.observe("layer", *three())
    assert seen.waits
