"""The exact bytes that a launch loads and stores, from the sizes alone: a model of every load and store of the template."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tokquant.errors import UnsupportedError
from tokquant.io_model.workload import Pairs, Walk, Workload
from tokquant.kernels.compile import Kernel
from tokquant.kernels.decode_plan import DecodePlan
from tokquant.kernels.signature import POINTERS, arguments

BYTES = {pointer: dtype.itemsize for dtype, pointer in POINTERS.items()}

KINDS = {
    "Q.codes": "q",
    "K.codes": "k",
    "V.codes": "v",
    "Out.data": "o",
    "Lse": "lse",
    "scale": "scales",
    "zero": "zeros",
    "offset": "means",
    "companion": "means",
    "code_sum": "sums",
    "correction": "sums",
    "logit_offset": "sums",
    "log2_weight": "weights",
    "inverse_weight": "weights",
    "F.bias": "bias",
    "F.k_factors": "bias",
    "F.mask": "mask",
    "F.sinks": "sinks",
}
"""Kind of each tensor, by its name; by its field alone where that does not depend on the operand."""


@dataclass(frozen=True)
class Traffic:
    """Bytes loaded and stored. Lanes of one load that share an address move it once; masked lanes move nothing."""

    tensors: Mapping[str, int]
    """Bytes of each tensor, by its name in the kernel: for attention `Q.codes`, `K.scale`, `F.mask`, `Out.data`, `Lse` ..."""

    @property
    def total(self) -> int:
        """Bytes of all tensors."""
        return sum(self.tensors.values())

    @property
    def kinds(self) -> dict[str, int]:
        """Bytes by kind: codes of q, k and v; o, lse, scales, zeros, means, sums, weights, bias, mask, sinks."""
        found: dict[str, int] = {}
        for name, moved in self.tensors.items():
            kind = KINDS.get(name) or KINDS.get(name.partition(".")[2], name)
            found[kind] = found.get(kind, 0) + moved
        order = dict.fromkeys([*KINDS.values(), *found])
        return {kind: found[kind] for kind in order if kind in found}


def traffic(kernel: Kernel, workload: Workload) -> Traffic:
    """Bytes that a launch of the kernel under its `config` moves: keys and values once for each block of queries of each head.

    Equal, tensor by tensor, to what `counting` finds in Triton's interpreter. Caches are not modelled: a load counts each time
    it is issued, wherever it is served from.

    Raises ValueError where kernel and workload do not fit, UnsupportedError for kernels of sequences of different lengths
    (count each by itself) and of pages.
    """
    if isinstance(kernel.plan, DecodePlan) or kernel.wanted.varlen:
        raise UnsupportedError(
            "kernel: what it moves is not modelled where sequences have lengths of their own, or lie in pages"
        )
    workload.kv_heads(kernel)
    widths = _widths(kernel, workload)
    moved: dict[str, int] = {}
    for tensor, elements in _elements(kernel.plan.constants, Walk.of(kernel, workload), workload):
        moved[tensor] = moved.get(tensor, 0) + workload.batch * workload.heads * elements * widths[tensor]
    return Traffic(moved)


def _widths(kernel: Kernel, workload: Workload) -> dict[str, int]:
    """Bytes of an element of each tensor of the kernel."""
    found: dict[str, int] = {}
    for name, value in arguments(kernel).items():
        parts = [(f"{name}.{field}", part) for field, part in value._asdict().items()] if hasattr(value, "_asdict") else []
        found |= {path: BYTES[part] for path, part in parts or [(name, value)] if part in BYTES}
    if workload.mask.bytes:
        found["F.mask"] = workload.mask.bytes
    if workload.bias.bytes and kernel.wanted.bias == "dense":
        found["F.bias"] = workload.bias.bytes
    if kernel.wanted.sinks:
        found["F.sinks"] = workload.sink_bytes
    return found


def _elements(c: Mapping[str, Any], walk: Walk, workload: Workload) -> Iterator[tuple[str, int]]:
    """Each load and store of the template, in its order: the tensor, and the elements moved over all blocks of one head."""
    d, blocks, tiles, rows, keys = c["D"], len(walk.rows), int(walk.tiles.sum()), int(walk.rows.sum()), int(walk.keys.sum())

    def pairs(given: Pairs) -> int:
        if given.rows:
            return int((walk.rows * (walk.keys if given.keys else walk.tiles)).sum())
        return keys if given.keys else tiles

    yield "Q.codes", rows * -(-d // c["Q_PACKED"])
    if c["Q_SCALED"]:
        yield "Q.scale", walk.row_groups(c["Q_GROUP"])
    if c["Q_DECODED"]:
        yield "Q.scale", walk.row_groups(c["Q_GROUP"]) * (d // c["Q_CHANNELS"])
    if c["K_ZERO"]:
        yield "Q.code_sum", rows
    if c["BLOCK_MEANS"]:
        yield "Q.offset", blocks * d
    if c["ALIBI"]:
        yield "F.bias", blocks
    if c["LOWRANK"]:
        yield "F.bias", rows * c["RANK"]

    # loads of each tile of keys
    yield "K.codes", keys * -(-d // c["K_PACKED"])
    k_scales = walk.key_groups(c["K_GROUP"])
    if c["K_SCALED"]:
        yield "K.scale", k_scales
    if c["K_DECODED"]:
        yield "K.scale", k_scales * (d // c["K_CHANNELS"])
    if c["K_ZERO_DECODED"]:
        yield "K.zero", k_scales * (d // c["K_CHANNELS"])
    if c["K_ZERO"]:
        yield "K.zero", k_scales
    if c["BLOCK_MEANS"]:
        yield "K.companion", keys * d
    if c["LOWERED_SOFTCAP"]:
        yield "Q.logit_offset", int((walk.rows * walk.tiles).sum())
    if c["KEY_VECTOR"]:
        yield "F.bias", keys
    if c["LOWRANK"]:
        yield "F.k_factors", keys * c["RANK"]
    if c["DENSE_BIAS"]:
        yield "F.bias", pairs(workload.bias)
    if c["ADDITIVE_MASK"] or c["BOOLEAN_MASK"]:
        yield "F.mask", pairs(workload.mask)
    if c["V_PER_TOKEN"]:
        yield "V.log2_weight", keys
        yield "V.inverse_weight", keys
    if c["TOKENS_LAST"]:
        # stored and read in whole groups of tokens
        stored = -(-walk.n_k // c["V_TOKENS"]) * c["V_TOKENS"]
        yield "V.codes", int(walk.keys_of(stored).sum()) // c["V_STACKED"] * d
    if c["TOKENS_FIRST"]:
        yield "V.codes", keys * -(-d // c["V_PACKED"])
    v_scales = walk.key_groups(c["V_GROUP"])
    if c["V_DECODED"]:
        yield "V.scale", v_scales * (d // c["V_CHANNELS"])
    if c["V_ZERO_DECODED"]:
        yield "V.zero", v_scales * (d // c["V_CHANNELS"])
    columns = d if c["V_COLUMN"] else 1
    if c["V_PER_TILE"]:
        yield "V.scale", tiles * columns
    if c["UNSIGNED_P"]:
        yield "V.correction", tiles * d
    if c["V_TILE_ZERO"]:
        yield "V.zero", tiles * columns
    if c["V_TOKEN_ZERO"]:
        yield "V.zero", keys

    # loads and stores of each block of queries, after the loop
    if c["LOWERED_LOGITS"]:
        yield "Q.logit_offset", rows
    if c["SINKS"]:
        yield "F.sinks", blocks
    if c["V_ON_OUTPUT"]:
        yield "V.scale", blocks * columns
    if c["V_OUTPUT_ZERO"]:
        yield "V.zero", blocks * columns
    if c["V_MEAN"]:
        yield "V.offset", blocks * d
    yield "Out.data", rows * d
    if c["WITH_LSE"]:
        yield "Lse", rows
