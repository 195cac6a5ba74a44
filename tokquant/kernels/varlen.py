"""Variable-length attention: packed sequences of different lengths, quantized and attended to by one launch each.

A value that n tokens share (a block's scale, a tile's sums, a group of V's tokens) has, for sequence b, which starts at token
s, its first place at s // n + b: places of two sequences never overlap, and a kernel needs no table to find them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokquant.autocast import joined
from tokquant.calibration.scales import LayerScales
from tokquant.features import Features
from tokquant.kernels import launch, order, targets, tuned
from tokquant.kernels.quantize import Run, VarlenBatch
from tokquant.kernels.quantize_task import LONGEST
from tokquant.kernels.triton.operands import Operand, Rows
from tokquant.kernels.wanted import Wanted
from tokquant.schemes import Operand as Spec
from tokquant.schemes import QuantScheme
from tokquant.schemes.granularity import WHOLE
from tokquant.schemes.placement import needs_code_sums, needs_query_sums, place
from tokquant.tensor import QuantizedTensor
from tokquant.transfer import to_device
from tokquant.transforms import BLOCK_MEAN, Frame, mean_over_tokens, sixteen_bit

Parts = Sequence[launch.Operands | None]
"""Q, K and V of each sequence `[1, H, n, D]`; None for one without queries or keys."""

Starts = tuple[Tensor, Tensor]
"""(of queries, of keys): the first token of each sequence, and the total, int32 `[B + 1]` on the CPU."""


@dataclass(frozen=True)
class Together:
    """Q, K and V of all sequences, as arguments of an attention kernel."""

    operands: tuple[Operand, ...]
    like: launch.Operands
    """Quantized tensors with the same types, layouts and sizes, except for the number of tokens."""
    starts: Starts
    """On the operands' device."""


def together(
    q: Tensor, k: Tensor, v: Tensor, starts: Starts, scheme: QuantScheme, scales: LayerScales | None
) -> Together | None:
    """Quantize Q, K and V `[1, H, T, D]` of all sequences by as many launches as one takes, besides the means of each.

    None where kernels cannot do that, or where a value overflows its type: the caller then quantizes sequences one by one.
    """
    if not _can_batch(scheme) or len(starts[0]) - 1 > launch.MOST:
        return None
    there = _on(q.device, starts)
    queries, keys = (
        Run(scheme, scales, q.device, VarlenBatch(own, len(each) - 1, int(each.diff().max())))
        for own, each in zip(there, starts, strict=True)
    )
    rotated = scheme.rotate == "hadamard"
    with launch.on(q.device):
        q_frame, k_frame = Frame(rotated=rotated), Frame(_offsets(k, starts[1], scheme.k, scales), rotated=rotated)
        v_frame = Frame(_offsets(v, starts[1], scheme.v, scales), rotated=scheme.rotate_v == "hadamard")
        for role, x, frame in (("q", q, q_frame), ("k", k, k_frame), ("v", v, v_frame)):
            if (getattr(scheme, role).scaled or frame.changes) and keys.task(role, x, frame) is None:
                return None
        kq, vq = keys.keys(k, k_frame), keys.values(v, v_frame)
        qq = queries.queries(q, q_frame, kq)
    if any(run.lost is not None and bool(run.lost) for run in (queries, keys)):
        return None
    # offsets are per sequence; to the rest of `launch.operand` the packed tensor is one long sequence
    v_operand = launch.operand(replace(vq, frame=Frame()))._replace(offset=v_frame.offset)
    return Together((launch.operand(qq), launch.operand(kq), v_operand), (qq, kq, vq), there)


def _on(device: torch.device, starts: Starts) -> Starts:
    """The starts on a device."""
    return to_device(starts[0].numpy(), device), to_device(starts[1].numpy(), device)


def _can_batch(scheme: QuantScheme) -> bool:
    """Whether kernels alone compute everything that depends on several tokens of a sequence, except means over all of them."""
    q, k, v = scheme.q, scheme.k, scheme.v
    dynamic = [x.granularity for x in (q, k, v) if x.scaled and x.scale == "dynamic"]
    blocks = scheme.key_tile if place(v) != "tile" else v.granularity.size
    return (
        q.smooth == "none"
        and scheme.balance == "none"
        and place(k) != "q"
        and (k.smooth == "none" or q.scaled or scheme.rotate != "none")  # else torch would use one offset of K for all of Q
        and all(each.kind != "tensor" and (each.size or 0) <= LONGEST for each in dynamic)
        and not (needs_code_sums(scheme) and (scheme.key_tile > LONGEST or blocks != scheme.key_tile))
        and not (needs_query_sums(scheme) and place(q) == "operand")
    )


def _offsets(x: Tensor, starts: Tensor, spec: Spec, scales: LayerScales | None) -> Tensor | None:
    """The offset that each sequence is smoothed by: `[B, H, 1, D]`, contiguous; None without smoothing."""
    if spec.smooth == "static":
        assert scales is not None
        return scales.offset(spec, x).expand(len(starts) - 1, -1, -1, -1).contiguous()
    if spec.smooth == "none":
        return None
    nothing = x.new_zeros((1, x.shape[1], 1, x.shape[3]), dtype=sixteen_bit(x.dtype))
    parts = x.split(starts.diff().tolist(), dim=2)
    return joined([mean_over_tokens(part) if part.shape[2] else nothing for part in parts], dim=0)


def one_after_another(parts: Parts, starts: Starts, scheme: QuantScheme) -> Together:
    """Join sequences that were quantized one by one; not all are None."""
    operands = [
        _joined([None if part is None else part[index] for part in parts], scheme, first.tolist())
        for index, first in enumerate((starts[0], starts[1], starts[1]))
    ]
    like = next(part for part in parts if part is not None)
    return Together(tuple(operands), like, _on(like[0].device, starts))


def attention(
    given: Together,
    starts: Starts,
    scheme: QuantScheme,
    features: Features,
    return_lse: bool,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention of each sequence: out `[1, H_q, T_q, D]` in q's type, LSE `[1, H_q, T_q]` float32 or None.

    Raises UnsupportedError for what no kernel does.
    """
    q, k, _ = given.like
    launch.check(q.device, features)
    wanted = Wanted.of(features, return_lse)
    made = launch.planned(given.like, scheme, replace(wanted, varlen=True))
    # tuning knows only batches of equal lengths, whose loop is the same: take its launch, of those that varlen kernels have
    batch_plan = launch.planned(given.like, scheme, wanted, portable=True)
    (q_starts, k_starts), b, heads = starts, len(starts[0]) - 1, q.shape[1]
    total_q, total_k = int(q_starts[-1]), int(k_starts[-1])
    out, lse = launch.outputs(q, (1, heads, total_q, q.shape[3]), return_lse)
    kv_bytes = sum(x.codes.nbytes for x in given.operands[1:])
    longest_q, longest_k = (int(each.diff().max()) for each in starts)
    call = launch.Call(
        plan=made,
        config=made.config if deterministic else tuned.choose(batch_plan, q.device, b * heads, longest_q, longest_k)[0],
        operands=(
            *given.operands,
            Rows(out, 0, *out.stride()[1:3]),
            lse,
            launch.arguments_of(features)._replace(q_starts=given.starts[0], k_starts=given.starts[1]),
            features.scale,
            total_q,
            total_k,
            heads,
        ),
        shape=(b, heads, longest_q),
        abreast=order.abreast(b * heads, b * k.shape[1], kv_bytes, targets.of(q.device).cache_size) if wanted.right else None,
        out=out,
        lse=lse,
        dtype=q.dtype,
    )
    return call.run()


def _joined(parts: list[QuantizedTensor | None], scheme: QuantScheme, starts: list[int]) -> Operand:
    """One operand of all sequences as a kernel's argument."""
    x = next(part for part in parts if part is not None)
    fields = [None if part is None else launch.operand(part) for part in parts]

    def laid(name: str, tokens: int | None = None, axis: int = 2, width: int = 1) -> Tensor | None:
        """A field of all sequences in one tensor, with one element along `axis` per token, or `width` per `tokens` tokens."""
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
