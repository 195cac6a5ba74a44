"""What only a GPU can show: its own arithmetic, launches side by side, more elements than 32 bits count."""

import fcntl

import pytest
import torch
from exact import assert_exact
from factories import nan_filled, qkv

import tokquant as tq
from tokquant.evaluation.costs import scales_for
from tokquant.kernels import launch
from tokquant.schemes import preset, preset_names

pytestmark = [pytest.mark.gpu, pytest.mark.compiled]


def normal(*shape, dtype=torch.float16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda", dtype=dtype)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("name", ["kv-int8", "kv-int4"])
def test_a_cuda_graph_appends_and_attends_again_and_again(name, n):
    sizes = dict(batch=3, kv_heads=4, head_dim=128, device="cuda", capacity=8192)
    cache, beside = tq.KVCache(name, **sizes), tq.KVCache(name, **sizes)
    prompt = normal(3, 4, 700, 128)
    for each in (cache, beside):
        each.append(prompt, prompt, counts=[700, 1, 127])
    cache.reserve(41 * n)
    k, v, q = normal(3, 4, n, 128), normal(3, 4, n, 128, seed=1), normal(3, 16, n, 128)

    def step(into):
        into.append(k, v)
        return tq.decode(q, into, window=(500, 0), return_lse=True)

    for each in (cache, beside):  # kernels are compiled, and launches are chosen, before
        step(each)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(cache)
    for i in range(40):
        for x in (k, v, q):
            x.copy_(normal(*x.shape, seed=2 + i))
        graph.replay()
        for made, expected in zip(captured, step(beside), strict=True):
            torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-3)
    assert cache.lengths == beside.lengths
    for b in range(3):
        for made, expected in zip(cache.codes(b), beside.codes(b), strict=True):
            assert torch.equal(made.codes, expected.codes) and torch.equal(made.scale, expected.scale)
    for _ in range(128):  # a page, which no room is more than
        graph.replay()
    with pytest.raises(tq.CacheFullError, match="than was reserved"):
        cache.lengths  # noqa: B018


@pytest.fixture
def much_memory(tmp_path_factory):
    """40 GB, for one test at a time of whatever process."""
    with open(tmp_path_factory.getbasetemp().parent / "much-memory", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if torch.cuda.mem_get_info()[0] < 40 * 2**30:
            pytest.skip("needs 40 GB of free memory")
        yield
        torch.cuda.empty_cache()


@pytest.mark.parametrize(
    ("d", "given", "dtype"),
    [(64, {}, torch.bfloat16), (128, {"causal": True}, torch.float16), (256, {"window": (100, 20)}, torch.float16)],
    ids=str,
)
@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_float64_on_the_same_codes(name, d, given, dtype, monkeypatch):
    s = preset(name)
    tensors = [x.cuda() for x in qkv(130, 300, d, heads=4, kv_heads=2, batch=2, dtype=dtype)]
    operands = tq.quantize(*tensors, s, scales=scales_for(s, *tensors))
    monkeypatch.setattr(launch.torch, "empty", nan_filled)  # what is not written would show
    out, lse = tq.attention(*operands, s, return_lse=True, **given)
    monkeypatch.undo()
    assert_exact(out, lse, operands, s, **given)


@pytest.mark.parametrize("name", ["int8", "int8-fp8", "int8-fp16", "int4", "fp8"])
def test_a_thousand_launches_give_the_same_bits(name):
    operands = tq.quantize(*(normal(2, 4, 777, 128, seed=i) for i in range(3)), name)
    first, first_lse = tq.attention(*operands, name, causal=True, return_lse=True, deterministic=True)
    differing = torch.zeros((), dtype=torch.bool, device="cuda")
    for _ in range(1000):
        out, lse = tq.attention(*operands, name, causal=True, return_lse=True, deterministic=True)
        differing |= (out != first).any() | (lse != first_lse).any()
    assert not bool(differing)


def test_a_thousand_steps_of_decoding_give_the_same_bits():
    cache = tq.KVCache("kv-int4", batch=3, kv_heads=2, head_dim=128, device="cuda")
    cache.append(normal(3, 2, 3000, 128), normal(3, 2, 3000, 128, seed=1), counts=[3000, 517, 1])
    q = normal(3, 8, 1, 128, seed=2)
    first = tq.decode(q, cache)
    differing = torch.zeros((), dtype=torch.bool, device="cuda")
    for _ in range(1000):
        differing |= (tq.decode(q, cache) != first).any()
    assert not bool(differing) and bool(first.isfinite().all())


def test_streams_do_not_see_one_another():
    inputs = [[normal(1, 4, 1000, 64, seed=3 * i + j) for j in range(3)] for i in range(8)]
    alone = [tq.attention(*each, "int8", causal=True) for each in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    for _ in range(5):
        outs = []
        for stream, each in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                outs.append(tq.attention(*each, "int8", causal=True))
        torch.cuda.synchronize()
        assert all(torch.equal(out, one) for out, one in zip(outs, alone, strict=True))


def test_a_device_that_is_not_the_current_one_is_launched_on():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    q, k, v = (normal(1, 2, 300, 64, seed=i) for i in range(3))
    there = tq.attention(*(x.to("cuda:1") for x in (q, k, v)), "int8", deterministic=True)
    assert there.device.index == 1 and torch.equal(there.cpu(), tq.attention(q, k, v, "int8", deterministic=True).cpu())


@pytest.mark.parametrize("name", ["int8", "kv-int4"])
def test_a_batch_of_more_than_two_to_the_31_elements_is_each_of_its_sequences(name, much_memory):
    batch = 2**31 // (8 * 512 * 128) + 3
    q, k, v = (normal(batch, 8, 512, 128, seed=i) for i in range(3))
    assert q.numel() > 2**31
    out = tq.attention(q, k, v, name, causal=True, deterministic=True)
    for b in (0, batch - 2, batch - 1):
        one = tq.attention(*(x[b : b + 1] for x in (q, k, v)), name, causal=True, deterministic=True)
        assert torch.equal(out[b : b + 1], one), b


def test_a_sequence_of_more_than_two_to_the_31_elements_ends_as_its_last_tokens_say(much_memory):
    n = 2**31 // 128 + 4096
    q, k, v = normal(1, 1, 50, 128), normal(1, 1, n, 128, seed=1), normal(1, 1, n, 128, seed=2)
    for name in ("kv-int8", "int4"):  # int4 has V in 16 bits, K's mean from all tokens
        operands = tq.quantize(q, k, v, name)
        out = tq.attention(*operands, name, causal=True, window=(1000, 0), deterministic=True)
        last = [x[:, :, -2048:] for x in (k, v)]
        expected = tq.attention(q, *last, "none", causal=True, window=(1000, 0))
        near = tq.attention(q, *last, name, causal=True, window=(1000, 0))
        assert (out - expected).norm() <= 1.5 * (near - expected).norm(), name
        del operands


def test_a_cache_of_more_than_two_to_the_31_elements_is_read_to_its_end(much_memory):
    tokens, chunk = 2**31 // (8 * 128) + 2**17, 2**17
    cache = tq.KVCache("kv-int8", batch=1, kv_heads=8, head_dim=128, device="cuda", capacity=tokens)
    for start in range(0, tokens, chunk):
        k, v = normal(1, 8, chunk, 128, seed=start), normal(1, 8, chunk, 128, seed=start + 1)
        cache.append(k, v)
    few = tq.KVCache("kv-int8", batch=1, kv_heads=8, head_dim=128, device="cuda")
    few.append(k[:, :, -1024:], v[:, :, -1024:])
    q = normal(1, 32, 1, 128, seed=9)
    out, expected = (tq.decode(q, each, window=(700, 0)) for each in (cache, few))
    assert (out - expected).norm() <= 1e-2 * expected.norm()
    assert bool(tq.decode(q, cache).isfinite().all())
