"""Short ways to write inputs and schemes, pairwise combinations of them, and bounds on the error of an output."""

import math
import os
import random
from dataclasses import replace
from itertools import combinations, product

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tokquant import bias
from tokquant.schemes import QuantScheme, preset, preset_names
from tokquant.schemes.placement import place
from tokquant.tensor import QuantizedTensor

INF = math.inf

SIZED = ("block", "channel_block", "group", "row_block")


def operand(words: str) -> dict:
    """The operand of a scheme that words like `"int4 block:64 asymmetric mean scale=fp16"` describe."""
    precision, *rest = words.split()
    made: dict = {"precision": precision}
    for word in rest:
        kind, _, size = word.partition(":")
        if kind in SIZED:
            made["granularity"] = {kind: int(size)}
        elif word.startswith("scale="):
            made["scale_dtype"] = word.removeprefix("scale=")
        elif word == "asymmetric":
            made["symmetric"] = False
        elif word == "static":
            made["scale"] = "static"
        elif word in ("mean", "block_mean"):
            made["smooth"] = word
        elif word == "static_offset":
            made["smooth"] = "static"
        else:
            made["granularity"] = word
    return made


def scheme(q: str = "fp32", k: str = "fp32", v: str = "fp32", p: str = "fp32", **rest) -> QuantScheme:
    """A scheme whose operands are described in words; those that are not given stay exact."""
    return QuantScheme(q=operand(q), k=operand(k), v=operand(v), p=operand(p), **rest)


def qkv(
    n_q: int = 48,
    n_k: int | None = None,
    d: int = 32,
    heads: int = 2,
    kv_heads: int | None = None,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal Q, K and V. Keys and values have a different mean in every channel, as in models."""
    generator = torch.Generator().manual_seed(seed)
    n_k, kv_heads = n_k or n_q, kv_heads or heads

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    q = normal(batch, heads, n_q, d)
    k, v = (normal(batch, kv_heads, n_k, d) + normal(1, kv_heads, 1, d) for _ in range(2))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def pairwise(**axes: list) -> list[tuple]:
    """Rows with one value of each axis, such that any two values of two axes are together in some row (pairwise testing).

    Greedy, and the same on every run.
    """
    names, chance = list(axes), random.Random(0)
    wanted = {((a, i), (b, j)) for a, b in combinations(names, 2) for i, j in product(range(len(axes[a])), range(len(axes[b])))}
    rows = []
    while wanted:
        (a, i), (b, j) = min(wanted)
        best: tuple[int, dict] = (-1, {})
        for _ in range(20):
            row = {name: chance.randrange(len(axes[name])) for name in names} | {a: i, b: j}
            met = sum(pair in wanted for pair in combinations(row.items(), 2))
            best = max(best, (met, row), key=lambda entry: entry[0])
        row = best[1]
        wanted -= set(combinations(row.items(), 2))
        rows.append(tuple(axes[name][row[name]] for name in names))
    return rows


# the rounding error of P, in units of its codes: relative, and the absolute one below which it never falls
PROBABILITY_ROUNDING = {
    "fp32": (2.0**-24, 0),
    "fp16": (2.0**-11, 2.0**-25),
    "bf16": (2.0**-8, 0),
    "fp8_e4m3": (2.0**-4, 2.0**-10),
    "fp8_e5m2": (2.0**-3, 2.0**-17),
    "int8": (0, 0.5),
    "uint8": (0, 0.5),
}


def decoded(x):
    """The values of codes in the frame that they were quantized in, float64; rounded to the input's type if a product is of
    decoded values."""
    return x.scaled_values().to(x.dtype).double() if place(x.spec) == "operand" else x.scaled_values(torch.float64)


def without_offset(x):
    """Values in the original frame without the offset. For K per channel also without its zeros, which are in Q's logits."""
    values = x.stored_values().double() * x.scale.double() if place(x.spec) == "q" else decoded(x)
    return replace(x.frame, offset=None).undo(values)


def exact_operands(q, k, v):
    """Float64 operands whose exact attention the emulation approximates. Offsets of Q and K become extra channels of both."""
    left, right = [without_offset(q)], [without_offset(k)]
    if k.companion is not None:
        left.append(q.offset.double()[:, :, torch.arange(q.shape[2]) // 128])
        right.append(k.companion.double())
    if q.logit_offset is not None:
        left.append(q.logit_offset.double())
        right.append(torch.ones(*k.shape[:3], 1, dtype=torch.float64, device=k.device))
    return torch.cat(left, dim=3), torch.cat(right, dim=3), v.frame.undo(decoded(v))


def dense_logits(q, k, features):
    """Natural logits [B, H, N_q, N_k], written out."""
    n_q, n_k = q.shape[2], k.shape[2]
    s = features.scale * q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1).mT
    if features.softcap:
        s = features.softcap * torch.tanh(s / features.softcap)
    left, right = features.window or (None, None)
    ahead = torch.arange(n_k) - (torch.arange(n_q)[:, None] + n_k - n_q)
    for beyond in (features.causal and ahead > 0, left is not None and ahead < -left, right is not None and ahead > right):
        if beyond is not False:
            s = s.masked_fill(beyond.to(s.device), -INF)
    if features.bias is not None:
        s = s + dense_bias(features.bias, n_q, n_k)
    if features.mask is not None:
        s = s.masked_fill(~features.mask, -INF) if features.mask.dtype == torch.bool else s + features.mask
    return s


def dense_bias(given, n_q, n_k):
    """A bias written out: float64, broadcastable to [B, H, N_q, N_k]."""
    if given.kind == "alibi":
        distances = [[abs(i + n_k - n_q - j) for j in range(n_k)] for i in range(n_q)]
        return -given.slopes.double()[:, None, None] * torch.tensor(distances, device=given.slopes.device)
    if given.kind == "key_vector":
        return given.values.double()[..., None, :]
    if given.kind == "lowrank":
        return torch.einsum("...ir,...jr->...ij", given.q_factors.double(), given.k_factors.double())
    return given.values.double()


def summed(given, n_q, n_k):
    """The sum of the magnitudes of a bias's terms, which bounds its rounding error."""
    if given.kind == "alibi":
        # kernels count keys from the first of 128 queries
        return dense_bias(given, n_q, n_k).abs() + 128 * given.slopes.double().abs()[:, None, None]
    if given.kind == "lowrank":
        return dense_bias(bias.lowrank(given.q_factors.abs(), given.k_factors.abs()), n_q, n_k)
    return dense_bias(given, n_q, n_k).abs()


def bounds(operands, made, features):
    """Bounds on the difference of output [B, H, N_q, D] and LSE [B, H, N_q] to the oracle's, by P's rounding and float32's."""
    q, _, v = operands
    left, right, values = exact_operands(*operands)
    shared = q.shape[1] // v.shape[1]
    s = dense_logits(left, right, features)
    lse = total = s.logsumexp(dim=-1, keepdim=True)
    if features.sinks is not None:
        total = torch.logaddexp(total, features.sinks.double()[:, None, None])
    total = total.masked_fill(total == -INF, 0)
    weight = torch.zeros(1, 1, 1, 1, dtype=torch.float64, device=s.device)
    if place(v.spec) == "p":
        weight = math.log(2) * v.log2_weight.double().mT.repeat_interleave(shared, dim=1)
    tiles = (s + weight).split(made.key_tile, dim=3)
    running, share, rate = torch.full_like(s[..., :1], -INF), [], made.p.format.largest or 1.0
    floor = math.log(2.0**-64) if made.p.granularity.kind == "row_block" else 0
    name = made.p.precision if made.p.format.bits != 16 or v.dtype == torch.float32 else str(v.dtype)
    relative, least = PROBABILITY_ROUNDING[{"torch.float16": "fp16", "torch.bfloat16": "bf16"}.get(name, name)]
    for tile in tiles:
        largest = tile.amax(dim=-1, keepdim=True)
        running = torch.maximum(running, largest)
        r = torch.maximum(largest, running + floor) if floor else running
        code = rate * torch.exp(tile - r.masked_fill(r == -INF, 0))
        error = torch.where(code > 0, (relative * code).clamp(min=least), 0)
        share.append(error / rate * torch.exp(r - total))
    shares = torch.cat(share, dim=3) * torch.exp(-weight)
    # zeros are added with P unrounded; what is rounded meets the stored codes
    bare = v.stored_values().double() * v.spread(v.scale).double() if v.zero is not None else decoded(v)
    bare = decoded(v) if place(v.spec) == "operand" else bare
    numerator = shares @ bare.abs().repeat_interleave(shared, dim=1)
    if v.frame.rotated:
        numerator = numerator.norm(dim=-1, keepdim=True)
    lost = shares.sum(dim=-1, keepdim=True) if made.normalizer == "quantized" else torch.zeros_like(total)
    lost_of_keys = lost * torch.exp(total - lse).nan_to_num(0, posinf=0)
    assert lost.max() < 0.9 and lost_of_keys.max() < 0.9
    reach = values.abs().amax(dim=(2, 3))[:, :, None, None].repeat_interleave(shared, dim=1)
    logit = abs(features.scale) * left.norm(dim=3, keepdim=True) * right.norm(dim=3).amax()
    if features.bias is not None:
        logit = logit + torch.where(s > -INF, summed(features.bias, *s.shape[2:]), 0).amax(dim=-1, keepdim=True)
    # exponents reach the floor of 64 in base 2, and are off by as many ulps
    rounding = 2.0**-24 * ((96 if floor else 16) + 4 * logit)
    out = (numerator + 3 * lost * reach) / (1 - lost) + rounding * reach
    output_type = torch.finfo(q.dtype).eps / 2 if q.dtype != torch.float32 else 0
    return out * 1.001 + output_type * (reach + out), (rounding - torch.log1p(-lost_of_keys)).squeeze(-1)


def gpu_rounding(out, made):
    """What a GPU's arithmetic adds to these bounds, relative to the largest |V|: exponentials are accurate to 22 bits, and sums
    of fp8 products in tensor cores to about 14."""
    if os.environ["TRITON_INTERPRET"] == "1":
        return 0.0
    if any(x.precision.startswith("fp8") for x in (made.q, made.p)):
        return 5e-3
    return 2e-4 if out.is_cuda else 0.0


def some_mask(b, h, n_q, n_k):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(b, h, n_q, n_k, generator=generator) > 0.4


def some_factors(*shape, dtype=torch.float16):
    generator = torch.Generator().manual_seed(2)
    return (0.6 * torch.randn(*shape, generator=generator)).to(dtype)


SLOPES = torch.tensor([0.9, 0.25, 2.0**-4, 2.0**-8])


def waves(n_q, n_k):
    return 2 * torch.arange(n_q * n_k).float().sin().reshape(n_q, n_k)


# name: shape as `qkv` takes it (n_q, n_k, d, heads, kv_heads, batch), and features
CASES = {
    "one token": ((1, 1, 16, 1, 1, 1), {}),
    "one query of many keys": ((1, 133, 64, 4, 1, 2), {"causal": True}),
    "odd lengths": ((37, 101, 48, 2, 2, 1), {}),
    "more queries than keys, causal": ((70, 33, 32, 4, 2, 1), {"causal": True}),
    "four heads to one, window": ((65, 65, 80, 4, 1, 1), {"window": (17, 9)}),
    "causal window": ((90, 130, 32, 2, 1, 1), {"causal": True, "window": (40, None)}),
    "boolean mask": ((33, 70, 128, 2, 2, 2), {"mask": some_mask(2, 1, 33, 70)}),
    "boolean mask of keys": ((33, 70, 32, 2, 2, 1), {"mask": some_mask(1, 1, 1, 70), "causal": True}),
    "additive mask of heads": ((20, 150, 32, 4, 2, 1), {"mask": torch.linspace(-3, 3, 4)[:, None, None] * waves(20, 150)}),
    "softcap and scale": ((20, 150, 64, 4, 2, 1), {"softcap": 2.0, "scale": 0.4}),
    "sinks": ((20, 150, 64, 4, 2, 1), {"sinks": torch.tensor([-3.0, 0.0, 2.0, 8.0])}),
    "everything": (
        (97, 161, 96, 4, 2, 2),
        {"causal": True, "window": (120, 5), "mask": torch.where(some_mask(1, 4, 97, 161), 0.5, -INF), "softcap": 5.0,
         "sinks": torch.tensor([-3.0, 0.0, 2.0, 8.0]), "scale": 0.2},
    ),
    "alibi, causal": ((90, 230, 32, 4, 2, 1), {"causal": True, "bias": bias.alibi(SLOPES)}),
    "alibi to both sides, sinks": ((150, 70, 48, 4, 4, 1), {"bias": bias.alibi(SLOPES), "sinks": SLOPES}),
    "alibi, causal, everything": (
        (140, 161, 32, 4, 2, 1),
        {"causal": True, "window": (90, None), "bias": bias.alibi(SLOPES), "mask": waves(140, 161), "softcap": 5.0,
         "sinks": SLOPES},
    ),
    "a bias of keys, window": ((40, 200, 32, 4, 2, 2), {"bias": bias.key_vector(some_factors(2, 4, 200)), "window": (60, 20)}),
    "low rank, boolean mask": (
        (33, 140, 64, 4, 2, 2),
        {"bias": bias.lowrank(some_factors(2, 4, 33, 13), some_factors(1, 1, 140, 13)), "mask": some_mask(2, 1, 33, 140)},
    ),
    "dense bias, everything": (
        (97, 161, 32, 4, 2, 2),
        {"causal": True, "window": (120, 5), "mask": torch.where(some_mask(1, 4, 97, 161), 0.5, -INF), "softcap": 5.0,
         "bias": bias.dense(some_factors(4, 97, 161)), "sinks": torch.tensor([-3.0, 0.0, 2.0, 8.0])},
    ),
    "dense bias, boolean mask": (
        (37, 101, 48, 2, 2, 1), {"bias": bias.dense(waves(37, 101).expand(2, -1, -1)), "mask": some_mask(1, 1, 37, 101)}
    ),
}  # fmt: skip

SCHEMES = {name: preset(name) for name in preset_names() if preset(name).k.scale == "dynamic"} | {
    "int4 q and k, v in 4 bits under unsigned p": scheme("int4", "int4", "int4 block:64", "uint8 row_block:64"),
    "k per channel, folded into q": scheme("int8", "int8 channel mean", "int8 tensor", "int8 row_block:64"),
    "k per channel with zeros": scheme(
        "int8", "int8 channel asymmetric mean", "int4 block:64 asymmetric mean", "int8 row_block:32",
        rotate="hadamard", rotate_v="hadamard",
    ),
    "small blocks of q and k": scheme("int8 block:16", "int8 block:32", "int8 head", "int8 row_block:64"),
    "tensor scales, unsigned unit": scheme("int8 tensor", "int8 tensor", "int8 tensor", "uint8"),
    "half precision scales": scheme("int8 head scale=fp16", "int8 head scale=fp16", "int8 head scale=fp8_e4m3", "int8"),
    "int2 keys and values": scheme("int8", "int2", "int2", "int8 row_block:64"),
    "fp4 keys and values": scheme("fp8_e4m3", "fp4_e2m1", "fp4_e2m1 channel", "fp16"),
    "decoded fp4": scheme("fp4_e2m1 channel", "fp4_e2m1 channel_block:16", "fp4_e2m1 group:16", "int8"),
    "e5m2 with int4": scheme("fp8_e5m2", "int4", "fp8_e5m2 head", "fp8_e5m2"),
    "integer p on 16-bit v": scheme("int8", "int8", "fp16", "int8 row_block:64"),
    "zeros of k a head, of v a channel": scheme(
        "int8", "int8 head asymmetric", "int4 channel asymmetric mean", "uint8 row_block:64", rotate_v="hadamard"
    ),
    "zeros of v a channel and block": scheme(
        "int4 group:16", "int8", "int8 channel_block:64 asymmetric", "int8 row_block:64"
    ),
    "quantized normalizer, block means, zeros of v a token": scheme(
        "int8 block_mean", "int8 mean", "int4 asymmetric mean", "uint8 row_block:32",
        normalizer="quantized", rotate_v="hadamard",
    ),
}  # fmt: skip


def fits(s, head_dim):
    return all(head_dim % (o.granularity.size or 1) == 0 for o in (s.q, s.k, s.v) if o.granularity.kind == "group")


def nan_filled(*size, empty=torch.empty, **options):
    out = empty(*size, **options)
    return out.fill_(float("nan")) if out.is_floating_point() else out


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for x in made if isinstance(made, tuple | list) else (made,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().size() // x.element_size())
        return made


def integer_scores(q: QuantizedTensor, k: QuantizedTensor) -> Tensor:
    """The products of the codes alone, int32 `[B, H_q, N_q, N_k]`."""
    shared = q.shape[1] // k.shape[1]
    return (q.stored_values() @ k.stored_values().repeat_interleave(shared, dim=1).mT).to(torch.int32)
