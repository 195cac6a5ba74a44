"""A KV cache that keeps every token as it was given: what the packed one is compared with, and the schemes it is tested on."""

from dataclasses import dataclass, replace

import torch
from factories import scheme
from torch import Tensor

import tokquant as tq
from tokquant import reference
from tokquant.calibration.scales import needed
from tokquant.features import Features
from tokquant.quantize import quantize_operands
from tokquant.schemes import Cache, preset


def with_cache(name, **cache):
    return tq.QuantScheme(**preset(name).model_dump() | {"cache": cache})


SCHEMES = {
    "kv-fp8": preset("kv-fp8"),
    "kv-int8, small pages": with_cache("kv-int8", page=16),
    "kv-int4": preset("kv-int4"),
    "kv-int4 with windows": with_cache("kv-int4", sink=5, recent=20, page=16),
    "kv-int4 with a sink": with_cache("kv-int4", sink=4, page=32),
    "KIVI in small blocks": scheme(
        "fp16", "int4 channel_block:16 asymmetric scale=fp16", "int4 group:16 asymmetric scale=fp16", "fp16",
        cache={"sink": 3, "recent": 20, "page": 16},
    ),
    "KIVI in 2 bits, no windows": scheme(
        "fp16", "int2 channel_block:32 asymmetric scale=fp16", "int2 group:16 asymmetric", "fp16"
    ),
    "static offsets, rotated": scheme(
        "int8", "int4 asymmetric static_offset scale=fp16", "int4 asymmetric static_offset", "int8 row_block:64",
        rotate="hadamard", rotate_v="hadamard", cache={"recent": 7, "page": 32},
    ),
    "FireQ's precisions": scheme("fp8_e4m3", "int4 scale=fp8_e4m3", "int4 scale=fp8_e4m3", "fp8_e4m3"),
    "calibrated balance": scheme(
        "int8", "int4 scale=fp16", "int4", "int8 row_block:64",
        balance={"rope_pairs": {"top_k": 2, "scale": "static"}}, cache={"sink": 2, "recent": 7, "page": 64},
    ),
    "calibrated balance and offset, static channels of K": scheme(
        "int8 tensor static", "int8 channel asymmetric static static_offset", "int8", "int8 row_block:32",
        balance={"channel": {"alpha": 0.25, "scale": "static"}}, cache={"page": 32},
    ),
    "K per channel with zeros, static": scheme(
        "int8", "int8 channel asymmetric static static_offset", "int8 head static", "int8 row_block:32", cache={"page": 16}
    ),
    "V in blocks under unsigned P": scheme(
        "int8", "int8 block:16", "int8 channel_block:32", "uint8 row_block:32", cache={"recent": 3, "page": 64}
    ),
    "none": preset("none"),
}  # fmt: skip
"""Every place that scales can enter, every kind of window and of block."""


def scales_for(s, heads=2, d=16):
    """Calibrated scales of a layer, where the scheme needs some."""
    if not needed(s):
        return None
    calibrator = tq.Calibrator(s)
    calibrator.observe("layer", *(torch.randn(2, h, 64, d) + 0.5 for h in (2 * heads, heads, heads)))
    return calibrator.scales()["layer"]


def block_of(s):
    return max(x.granularity.size if x.scaled and "block" in x.granularity.kind else 1 for x in (s.k, s.v))


@dataclass
class Sequence:
    """Tokens of one sequence `[1, H, n, D]`, and how many of those behind the sink are packed."""

    k: Tensor
    v: Tensor
    packed: int = 0

    def __len__(self):
        return self.k.shape[2]


class PlainCache:
    """The rules of a cache, one sequence at a time, on tokens as they were given."""

    def __init__(self, s, scales, batch, heads=2, d=16):
        self.scheme, self.scales = s, scales
        cache = s.cache or Cache()
        self.sink, self.recent, self.block = cache.sink, cache.recent, block_of(s)
        self.sequences = [Sequence(*(torch.empty(1, heads, 0, d) for _ in range(2))) for _ in range(batch)]

    def append(self, k, v, counts):
        for b, (n, own) in enumerate(zip(counts, self.sequences, strict=True)):
            own = Sequence(torch.cat([own.k, k[b : b + 1, :, :n]], 2), torch.cat([own.v, v[b : b + 1, :, :n]], 2), own.packed)
            while len(own) - self.sink - own.packed >= self.recent + self.block:
                own.packed += self.block
            self.sequences[b] = own

    def truncate(self, lengths):
        for b, n in enumerate(lengths):
            own = self.sequences[b]
            if n - self.sink < own.packed:
                # a block that is cut goes back to what its codes say
                whole = max(n - self.sink, 0) // self.block * self.block
                if n - self.sink > whole:
                    cut = slice(self.sink + whole, n)
                    for x, codes in zip((own.k, own.v), self.codes(b), strict=True):
                        x[:, :, cut] = codes.dequantize()[:, :, whole : n - self.sink]
                own.packed = whole
            self.sequences[b] = Sequence(own.k[:, :, :n].clone(), own.v[:, :, :n].clone(), own.packed)

    def forget(self, keep, page):
        whole = self.sink + self.recent + self.block > 1
        gone = [0 if whole else max(len(own) - keep, 0) // page * page for own in self.sequences]
        for b, n in enumerate(gone):
            own = self.sequences[b]
            self.sequences[b] = Sequence(own.k[:, :, n:].clone(), own.v[:, :, n:].clone(), own.packed - n)
        return gone

    def fork(self, sequences):
        forked = PlainCache(self.scheme, self.scales, 0)
        forked.sequences = [Sequence(x.k.clone(), x.v.clone(), x.packed) for x in (self.sequences[b] for b in sequences)]
        return forked

    def codes(self, b, q=None):
        """Codes of the packed tokens, quantized all at once; with those of q in front where it is given."""
        own = self.sequences[b]
        inside = slice(self.sink, self.sink + own.packed)
        k, v = own.k[:, :, inside], own.v[:, :, inside]
        made = quantize_operands(k if q is None else q, k, v, self.scheme, self.scales)
        return made[1:] if q is None else made

    def ends(self, b):
        """The tokens in 16 bits."""
        own = self.sequences[b]
        return [torch.cat([x[:, :, : self.sink], x[:, :, self.sink + own.packed :]], 2) for x in (own.k, own.v)]

    def decode(self, b, q, features, sinks=None):
        """Attention of q `[1, H_q, n, D]`: the emulation on codes, float64 on the ends, merged in float64."""
        own, n_q = self.sequences[b], q.shape[2]
        position = torch.arange(len(own))
        query = torch.arange(len(own) - n_q, len(own))[:, None]
        left, _ = features.window or (None, None)
        kept = (position <= query) & (position >= (0 if left is None else query - left))
        inside = (position >= self.sink) & (position < self.sink + own.packed)
        parts = []
        if own.packed:
            alone = replace(features, causal=False, window=None, mask=kept[:, inside].expand(1, q.shape[1], -1, -1))
            parts.append(reference.attention(*self.codes(b, q), self.scheme, alone, torch.float32))
        if not inside.all():
            alone = replace(features, causal=False, window=None, mask=kept[:, ~inside].expand(1, q.shape[1], -1, -1))
            parts.append(reference.oracle(q, *self.ends(b), alone))
        lse = torch.stack([each.double() for _, each in parts]).logsumexp(0)
        total = lse if sinks is None else torch.logaddexp(lse, sinks.double()[:, None])
        shares = [torch.exp(each - total).nan_to_num(0.0)[..., None] for _, each in parts]
        return sum(out.double() * share for (out, _), share in zip(parts, shares, strict=True)), lse


def features(d=16, **given):
    return Features(scale=given.pop("scale", d**-0.5), causal=True, **given)
