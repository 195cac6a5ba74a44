"""Sequences of their own lengths in one launch: what was quantized one by one, laid one after another.

What holds n tokens (a block's scale, a tile's sums, a group of V's tokens) begins for sequence b, which starts at token s, at
place s // n + b: no two meet there, and a kernel finds it without a table.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tokquant.features import Features
from tokquant.kernels import launch, order, targets, tuned
from tokquant.kernels.triton.operands import Operand, Rows
from tokquant.kernels.wanted import Wanted
from tokquant.schemes import QuantScheme
from tokquant.schemes.granularity import WHOLE
from tokquant.schemes.placement import place
from tokquant.tensor import QuantizedTensor
from tokquant.transfer import to_device
from tokquant.transforms import BLOCK_MEAN

Parts = Sequence[launch.Operands | None]
"""Q, K and V of each sequence `[1, H, n, D]`; None for one without queries or keys."""


def attention(
    parts: Parts,
    starts: tuple[Tensor, Tensor],
    scheme: QuantScheme,
    features: Features,
    return_lse: bool,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention of each sequence: out `[1, H_q, T_q, D]` in q's type, LSE `[1, H_q, T_q]` float32 or None.

    Args:
        starts: of Q and K, int32 `[B + 1]` on the CPU: where each sequence begins, and the end.

    Raises UnsupportedError for what no kernel does.
    """
    present = [part for part in parts if part is not None]
    q = present[0][0]
    launch.check(q.device, features)
    wanted = Wanted.of(features, return_lse)
    made = launch.planned(present[0], scheme, replace(wanted, varlen=True))
    # its loop is that of a batch, and so is the launch that suits it, of those that sequences have too
    alike = launch.planned(present[0], scheme, wanted, portable=True)
    (q_starts, k_starts), b, heads = starts, len(parts), q.shape[1]
    total_q, total_k = int(q_starts[-1]), int(k_starts[-1])
    out, lse = launch.outputs(q, (1, heads, total_q, q.shape[3]), return_lse)
    operands = [
        _joined([None if part is None else part[index] for part in parts], scheme, of.tolist())
        for index, of in enumerate((q_starts, k_starts, k_starts))
    ]
    kv_bytes = sum(x.codes.nbytes for x in operands[1:])
    on_device = {name: to_device(of.numpy(), q.device) for name, of in (("q_starts", q_starts), ("k_starts", k_starts))}
    longest_q, longest_k = (int(each.diff().max()) for each in starts)
    call = launch.Call(
        plan=made,
        config=made.config if deterministic else tuned.choose(alike, q.device, b * heads, longest_q, longest_k)[0],
        operands=(
            *operands,
            Rows(out, 0, *out.stride()[1:3]),
            lse,
            launch.arguments_of(features)._replace(**on_device),
            features.scale,
            total_q,
            total_k,
            heads,
        ),
        shape=(b, heads, longest_q),
        abreast=order.abreast(b * heads, b * present[0][1].shape[1], kv_bytes, targets.of(q.device).cache_size)
        if wanted.right
        else None,
        out=out,
        lse=lse,
        dtype=q.dtype,
    )
    return call.run()


def _joined(parts: list[QuantizedTensor | None], scheme: QuantScheme, starts: list[int]) -> Operand:
    """One operand of all sequences as a kernel takes it."""
    x = next(part for part in parts if part is not None)
    fields = [None if part is None else launch.operand(part) for part in parts]

    def laid(name: str, tokens: int | None = None, axis: int = 2, width: int = 1) -> Tensor | None:
        """A field of every sequence in one tensor: an element of `axis` a token, or `width` elements for so many tokens."""
        given = [None if each is None else getattr(each, name) for each in fields]
        like = next(each for each in given if each is not None) if any(each is not None for each in given) else None
        if like is None:
            return None
        places = [start if tokens is None else (start // tokens + index) * width for index, start in enumerate(starts)]
        shape = list(like.shape)
        shape[axis] = places[-1]
        together = torch.zeros(shape, dtype=torch.uint8 if like.itemsize == 1 else like.dtype, device=like.device)
        together = together.view(like.dtype)
        for first, each in zip(places, given, strict=False):
            if each is not None:
                together.narrow(axis, first, each.shape[axis]).copy_(each)
        return together

    packed = x.spec.format.packed
    codes = laid("codes", 16 * packed, axis=3, width=16) if x.layout == "tokens_last" else laid("codes")
    group = x.spec.granularity.cover(WHOLE, x.shape[3])[0]
    scale = laid("scale", group)
    return Operand(
        codes,
        *launch.strides(codes),
        scale,
        laid("zero", None if place(x.spec) == "p" else group),
        *launch.strides(scale),
        laid("offset", BLOCK_MEAN) if x.spec.role == "q" else laid("offset", WHOLE, axis=0),
        laid("code_sum"),
        laid("correction", scheme.key_tile),
        laid("log2_weight"),
        laid("inverse_weight"),
        laid("logit_offset"),
        laid("companion"),
    )
