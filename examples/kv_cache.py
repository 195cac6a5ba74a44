"""A KV cache in few bits: how accurate each scheme is on keys as models make them, and a prompt that is read once.

Run: python examples/kv_cache.py
"""

import tempfile
from pathlib import Path

import torch

import tokquant as tq
from tokquant.calibration.scales import needed


def rope(x, base=10_000.0):
    """Rotary embedding of [B, H, N, D], halves as pairs."""
    n, half = x.shape[2], x.shape[3] // 2
    angle = torch.arange(n)[:, None] * base ** (-torch.arange(half) / half)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()], dim=-1)


def activations(tokens=2048, heads=1, d=128, queries=128, seed=0):
    """Q of the newest tokens, K and V: a few channels of K have a large bias, where RoPE turns slowly."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, heads, tokens, d, generator=generator) for _ in range(3))
    k[..., torch.tensor([d // 2 - 3, d // 2 - 9, d - 6])] += torch.tensor([12.0, -9.0, 15.0])
    return rope(q)[:, :, -queries:], rope(k), v


def variant(name, k=None, **changes):
    """A preset with some of it changed."""
    made = tq.preset(name).model_dump() | changes
    return tq.QuantScheme(**made | {"name": "variant", "k": made["k"] | (k or {})})


FIREQ = tq.preset("fireq").model_dump() | {"balance": "none"}

SCHEMES = {
    "kv-fp8": tq.preset("kv-fp8"),
    "kv-int8": tq.preset("kv-int8"),
    "int4, neither": variant("kv-int4", rotate="none"),
    "int4, static offset of K": variant("kv-int4", rotate="none", k={"smooth": "static"}),
    "kv-int4 (Hadamard)": tq.preset("kv-int4"),
    "kv-int4 and static offset of K": variant("kv-int4", k={"smooth": "static"}),
    "kv-int4-kivi": tq.preset("kv-int4-kivi"),
    "kv-int2-kivi": tq.preset("kv-int2-kivi"),
    "fireq without its balance": tq.QuantScheme(**FIREQ),
    "fireq, calibrated": variant("fireq", balance={"rope_pairs": {"scale": "static"}}),
    "fireq, calibrated, top_k 8": variant("fireq", balance={"rope_pairs": {"scale": "static", "top_k": 8}}),
}


def calibrated(scheme):
    """Scales from other activations of the same layer, where the scheme has static parts."""
    if not needed(scheme):
        return None
    calibrator = tq.Calibrator(scheme)
    calibrator.observe("layer", *activations(seed=1))
    return calibrator.scales()["layer"]


def errors():
    """Bits of a value and relative RMS error of decoding the queries, by scheme."""
    q, k, v = activations()
    exact = tq.attention(q, k, v, "none", causal=True, backend="reference")
    found = {}
    for name, scheme in SCHEMES.items():
        cache = tq.KVCache(scheme, batch=1, kv_heads=1, head_dim=128, dtype=q.dtype, scales=calibrated(scheme))
        cache.append(k, v)
        error = (tq.decode(q, cache) - exact).norm() / exact.norm()
        found[name] = cache.bits_per_value, error.item()
    return found


def conversation(folder):
    """A prompt is packed and saved once; two answers go on from it and share its pages."""
    q, k, v = activations(tokens=600)
    prompt = tq.KVCache("kv-int4", batch=1, kv_heads=1, head_dim=128, dtype=q.dtype)
    for chunk in range(0, 600, 200):
        rows = slice(chunk, chunk + 200)
        prompt.append(k[:, :, rows], v[:, :, rows])
    prompt.save(folder / "prompt.safetensors")

    loaded = tq.KVCache.load(folder / "prompt.safetensors")
    answers = loaded.fork([0, 0])
    shared = answers.memory.packed
    for _ in range(3):
        q, k, v = (torch.randn(2, 1, 1, 128) for _ in range(3))
        answers.append(k, v)
        tq.decode(q, answers)
    answers.truncate([601, 603])  # a draft whose last two tokens were refused
    return loaded.lengths, answers.lengths, shared, answers.memory.packed


if __name__ == "__main__":
    print(f"{'':32}{'bits':>6}{'error':>8}")
    for name, (bits, error) in errors().items():
        print(f"{name:32}{bits:6.3g}{error:8.3f}")
    with tempfile.TemporaryDirectory() as folder:
        prompt, answers, before, after = conversation(Path(folder))
    print(f"\na prompt of {prompt[0]} tokens, answers of {answers}: {before} bytes grew to {after}")
