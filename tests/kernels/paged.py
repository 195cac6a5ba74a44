"""Paged stores filled with sequences, and checks of attention to them."""

from dataclasses import dataclass, replace

import torch
from factories import bounds, exact_operands, gpu_rounding, qkv
from quantized import differences

from tokquant.calibration.scales import LayerScales, needed
from tokquant.kernels.pages import TritonPages
from tokquant.pages import attention_by_reading
from tokquant.quantize import frame_of_queries, queries
from tokquant.reference import oracle


def some_scales(made, heads, d):
    """Random static scales, zeros and offsets, as far as the scheme needs them."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name in needed(made):
        kind = getattr(made, name[0]).granularity.kind
        shape = (1, 1, 1) if kind == "tensor" else (heads, 1, d if kind == "channel" else 1)
        value = torch.rand(shape, generator=generator)
        if name.endswith("_offset"):
            tensors[name] = torch.randn(heads, 1, d, generator=generator)
        elif name.endswith("_balance"):
            tensors[name] = 0.2 + 4 * torch.rand(heads, 1, d, generator=generator)
        else:
            tensors[name] = -2 - value if name.endswith("_zero") else (0.1 + value) * 6 / (made.k.format.largest or 1)
    return LayerScales("layer", tensors) if tensors else None


@dataclass
class Filled:
    """A store with sequences in pages of random order, and queries for them."""

    store: TritonPages
    table: torch.Tensor
    lengths: torch.Tensor
    q: torch.Tensor

    def attend(self, features, **options):
        return self.store.attention(self.q, self.table, self.lengths, features, **options)

    def emulated(self, features, offset=None):
        """Attention by the emulation, on the codes that are read back from the store."""
        store = self.store
        return attention_by_reading(store, store.scheme, store.scales, self.q, self.table, self.lengths, features, offset)

    def operands(self, b):
        """Q, K and V of one sequence as `tokquant.attention` takes them."""
        store = self.store
        k, v = store.read(self.table[b], int(self.lengths[b]))
        q = self.q[b : b + 1]
        q = queries(q, frame_of_queries(q, k, k.frame), k, store.scheme, store.scales)
        return tuple(replace(x, scheme=store.scheme) for x in (q, k, v))


def filled(
    made,
    lengths=(200, 131),
    *,
    n_q=1,
    d=64,
    kv_heads=2,
    shared=2,
    page=128,
    dtype=torch.float32,
    device="cpu",
    kinds=(TritonPages,),
    step=None,
):
    """A store of each kind, alone or as a list, filled with sequences of these lengths, `step` tokens at a time."""
    longest, batch = max(lengths), len(lengths)
    q, k, v = (x.to(device) for x in qkv(n_q, longest, d, kv_heads * shared, kv_heads, batch, dtype))
    columns = -(-longest // page)
    generator = torch.Generator().manual_seed(1)
    table = torch.randperm(batch * columns, generator=generator).reshape(batch, columns).int().to(device)
    lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
    scales = some_scales(made, kv_heads, d)
    stores = []
    for kind in kinds:
        store = kind(
            made, kv_heads=kv_heads, head_dim=d, dtype=dtype, device=torch.device(device), pages=batch * columns, page=page,
            scales=scales,
        )  # fmt: skip
        for start in range(0, longest, step or longest):
            some = slice(start, start + (step or longest))
            first = lengths.clamp(max=start)  # nothing is added to sequences that are complete
            store.write(k[:, :, some], v[:, :, some], table, first, (lengths - first).clamp(max=step or longest))
        stores.append(Filled(store, table, lengths, q))
    return stores[0] if len(stores) == 1 else stores


def unlike(ours, theirs) -> list[str]:
    """The fields in which any sequence differs when it is read back from both stores."""
    found = []
    for b, tokens in enumerate(ours.lengths.tolist()):
        for one, other in zip(*(x.store.read(x.table[b], tokens) for x in (ours, theirs)), strict=True):
            found += [f"{one!r}: {name}" for name in differences(one, other)]
    return found


def differs(made, features, offset=None, *, deterministic=False, **shape) -> str:
    """As `wrong`, for a store that is filled with these arguments of `filled`."""
    return wrong(filled(made, **shape), features, offset, deterministic=deterministic)


def wrong(case, features, offset=None, *, deterministic=False) -> str:
    """Names a result of attention to pages that differs from the emulation, or is further from float64 on the same codes than
    P's rounding allows. Empty if none is."""
    made = case.store.scheme
    expected, expected_lse = case.emulated(features, offset)
    out, lse = case.attend(features, offset=offset, deterministic=deterministic)
    operands = [case.operands(b) for b in range(len(case.lengths))]
    reach, more = max(v.dequantize().abs().max() for _, _, v in operands), gpu_rounding(out, made)
    # a code of P close to a tie may be rounded the other way: one step in a few rows
    step = 2**-3 if made.p.precision.startswith("fp8") else 1 / (made.p.format.largest or 512)
    if not (out - expected).abs().max() <= step * reach:
        return "output"
    if not deterministic and not (out - expected).abs().mean() <= (1e-4 + more) * reach:
        return "output, on the average"
    if not torch.allclose(lse, expected_lse, atol=4 * more + (2e-5 if made.normalizer == "exact" else 2e-2), rtol=1e-5):
        return "LSE"
    for b, codes in enumerate(operands if offset is None else ()):
        exact, exact_lse = oracle(*exact_operands(*codes), features)
        most, most_lse = bounds(codes, made, features)
        kept = exact_lse.isfinite()
        if not bool(((out[b : b + 1] - exact).abs() <= most + more * reach).all()):
            return "output, from float64"
        if not bool(((lse[b : b + 1] - exact_lse).abs() <= most_lse + 4 * more)[kept].all()):
            return "LSE, from float64"
    return ""
