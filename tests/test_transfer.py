"""What a GPU would wait for, or a CUDA graph would freeze, told without a GPU."""

import re
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tokquant as tq
from tokquant.calibration.scales import LayerScales
from tokquant.kernels import decode_launch, generate, pages
from tokquant.transfer import to_device

GPU = torch.device("cuda")
PACKAGE = Path(tq.__file__).parent


class NothingIsRead(TorchDispatchMode):
    """Raises where a number of a tensor is looked at, for which a GPU would be waited for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "equal"), f"{func} waits for a GPU"
        return func(*args, **kwargs or {})


@pytest.fixture
def no_kernels(monkeypatch):
    """Launches do nothing: what is before and after them remains."""

    class Kernel:
        def __getitem__(self, grid):
            return lambda *_, **__: None

    monkeypatch.setattr(generate, "load", lambda *_: Kernel())
    monkeypatch.setattr(decode_launch, "merge", Kernel())
    # which looks for scales that do not fit; on a GPU after more than 16 tokens alone
    monkeypatch.setattr(pages.TritonPages, "check", lambda self: None)


@pytest.fixture
def capturing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


@pytest.mark.parametrize("scheme", ["kv-int8", "kv-int4", "kv-int4-kivi"])
@pytest.mark.parametrize("given", [{}, dict(sinks=torch.zeros(4), window=(40, 0))], ids=["plain", "sinks and a window"])
def test_appending_and_decoding_wait_for_nothing(scheme, given, no_kernels):
    cache = tq.KVCache(scheme, batch=2, kv_heads=2, head_dim=64, backend="triton")

    def step(n, **counts):
        x = torch.randn(2, 2, n, 64).half()
        cache.append(x, x, **counts)
        tq.decode(torch.randn(2, 4, min(n, 3), 64).half(), cache, **counts, **given)

    for n in (200, 1):  # what is decided once is decided now
        step(n)
    with NothingIsRead():
        for n in (1, 1, 40):
            step(n)
        step(2, counts=[2, 1])


@pytest.mark.parametrize("scheme", ["int8", "int8-fp16", "int4", "fp8"])
def test_attention_with_symmetric_scales_in_fp32_waits_for_nothing(scheme, no_kernels):
    q, k, v = (torch.randn(1, 4, 100, 64).half() for _ in range(3))
    for mode in (nullcontext(), NothingIsRead()):  # what is decided once is decided first
        with mode:
            tq.attention(q, k, v, scheme, causal=True, backend="triton")


def test_numbers_go_to_a_gpu_from_pinned_memory_and_nobody_waits(monkeypatch):
    pinned, copied = [], []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **given: copied.append((args, given)) or self)
    numbers = np.arange(6).reshape(2, 3)
    assert to_device(numbers.T, GPU).tolist() == numbers.T.tolist()
    assert len(pinned) == 1 and copied == [((GPU,), {"non_blocking": True})]


def test_there_is_one_way_from_numpy_to_a_device():
    others = [path.name for path in PACKAGE.rglob("*.py") if re.search(r"from_numpy\(.*\)\.to\(", path.read_text())]
    assert set(others) <= {"transfer.py"}


def test_a_cuda_graph_would_freeze_lengths_and_is_refused(capturing):
    cache = tq.KVCache("kv-int8", batch=1, kv_heads=2, head_dim=32, backend="reference")
    x = torch.randn(1, 2, 20, 32).half()
    cache.append(x, x)
    cache._sequences.device = GPU
    with pytest.raises(tq.UnsupportedError, match=r"lengths of a KVCache.*reserve.* at every replay of a CUDA graph"):
        cache.append(x, x)
    assert cache.lengths == [20]
    with pytest.raises(tq.UnsupportedError, match=r"counted on the CPU.* at every replay of a CUDA graph"):
        tq.decode(x, cache)
    with pytest.raises(tq.UnsupportedError, match="CUDA graph"):
        to_device(np.zeros(3), GPU)


def test_scales_are_copied_to_a_device_once(monkeypatch):
    scheme = tq.preset("kv-fp8")
    tensors = {name: torch.ones(2, 1, 1) for name in ("k_scale", "v_scale")}
    scales, x = LayerScales("0", tensors, scheme), torch.empty(1, 2, 8, 64, device="meta")
    first = scales.scale(scheme.k, x)
    whole = torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, other, *a: whole(self, other, *a) if other != x.device else pytest.fail()
    )
    again = scales.scale(scheme.k, x)
    assert first.device == again.device == x.device and again.shape == (1, 2, 1, 1)


def test_a_launch_has_its_limits_for_quantization_too(no_kernels):
    x = torch.zeros(1, 1, 1, 32).half().expand(70000, 1, 1, 32)
    with pytest.raises(tq.UnsupportedError, match="q, k, v: batch 70000 and 1 heads; a launch takes at most 65535"):
        tq.quantize(x, x, x, "int8-fp16", backend="triton")
    store = pages.TritonPages(
        tq.preset("kv-int8"), kv_heads=1, head_dim=32, dtype=torch.float16, device=torch.device("cpu"), pages=1, page=128
    )
    table = torch.zeros(70000, 1, dtype=torch.int32)
    with pytest.raises(tq.UnsupportedError, match="k, v: batch 70000"):
        store.write(x, x, table, table[:, 0])
