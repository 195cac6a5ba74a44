"""KVCache: the quantized keys and values of growing sequences."""

import os
import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokquant import cache_file
from tokquant.attention import Backend, check_scales, choose_backend, scheme_of
from tokquant.cache_file import Content
from tokquant.calibration.scales import LayerScales
from tokquant.errors import CacheFileError, CacheFullError, ScalesError, SchemeError, UnsupportedError, quote
from tokquant.features import Features
from tokquant.inputs import DTYPES, check_beside_cache, check_device
from tokquant.kernels.cpu.pages import CpuPages
from tokquant.kernels.decode_launch import Call
from tokquant.kernels.pages import TritonPages
from tokquant.operators import untraced
from tokquant.pages import ReferencePages, Store, frame_of
from tokquant.paging import BlockTable, Pool
from tokquant.quantize import in_frame
from tokquant.schemes import QuantScheme, SchemeMap, resolve
from tokquant.schemes.appending import check_append_only, unit, windows
from tokquant.sequences import Sequences
from tokquant.tensor import QuantizedTensor
from tokquant.transfer import refuse_capture
from tokquant.whole_numbers import Numbers, sequence_numbers, whole_number, whole_numbers
from tokquant.windows import Windows

STORES: dict[str, Any] = {"triton": TritonPages, "cpu": CpuPages, "reference": ReferencePages}
"""The store of pages of each backend, a class with the interface of `ReferencePages`."""

MOST = 2**31 - 1
"""The most sequences, heads, channels and tokens: counts are 32-bit integers."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a cache: `packed` tokens, `slack` (empty room in pages), and `windows`, all slots for 16-bit tokens."""

    packed: int
    slack: int
    windows: int


class KVCache:
    """Keys and values of `batch` growing sequences, quantized by a scheme and stored in pages, which `tokquant.decode` reads.

    From its oldest token to its newest, a sequence has `sink` tokens in 16 bits, then packed (quantized) tokens, then again in
    16 bits the `recent` newest and those that do not fill a block yet. The scheme's `cache` sets `sink` and `recent`. Codes
    equal those of quantizing everything at once.

    Args:
        scheme: a QuantScheme, a preset's name, a path, or a SchemeMap whose `layer` has one scheme for all heads. No part of
            it may depend on later tokens.
        batch, kv_heads, head_dim: sizes of the tensors to append, `[batch, kv_heads, n, head_dim]`.
        dtype: type of these tensors: float16, bfloat16 or float32 (which keeps windows in 32 bits).
        capacity: allocate pages once, for this many tokens of all sequences together, where part of each sequence's last page
            stays empty. None lets the pages grow.
        scales: one layer's calibrated scales, for a scheme with static parts.
        backend: stores and reads the pages; names as for `attention`.

    Raises: SchemeError for a scheme that depends on later tokens; ScalesError, TypeError, ValueError as `attention`;
    UnsupportedError for a backend that cannot store pages of this scheme.
    """

    def __init__(
        self,
        scheme: QuantScheme | SchemeMap | str,
        *,
        layer: str | None = None,
        batch: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str = "cpu",
        capacity: int | None = None,
        scales: LayerScales | None = None,
        backend: Backend = "auto",
    ):
        self.scheme = scheme = resolve(scheme_of(scheme, layer, scales))
        batch = whole_number("batch", batch, 1, MOST)
        kv_heads = whole_number("kv_heads", kv_heads, 1, MOST)
        head_dim = whole_number("head_dim", head_dim, 1, MOST)
        capacity = None if capacity is None else whole_number("capacity", capacity, 1, MOST)
        if dtype not in DTYPES:
            written = dtype if isinstance(dtype, torch.dtype) else quote(dtype)
            raise TypeError(f"dtype: {written}; use torch.float16, torch.bfloat16 or torch.float32")
        check_append_only(scheme)
        check_scales(scheme, scales)
        self.device, self.dtype, self.scales = check_device(device), dtype, scales
        self._shape, self._asked = (batch, kv_heads, head_dim), backend
        token = torch.zeros(1, kv_heads, 1, head_dim, dtype=dtype, device=self.device)
        for spec in (scheme.k, scheme.v):  # quantize one token, which raises for groups and scales of other sizes
            in_frame(token, frame_of(token, spec, scheme, scales), spec, scales)
        layout = windows(scheme)
        pages = batch if capacity is None else -(-capacity // layout.page)
        sizes: dict[str, Any] = dict(kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, device=self.device, pages=pages)
        with torch.inference_mode(False):  # tensors made in inference mode could not be written outside of it
            self.backend, store = _make_store(backend, scheme, page=layout.page, scales=scales, **sizes)
        table = BlockTable(Pool(store, layout.page, pages, fixed=capacity is not None), batch)
        slots = partial(store.slots, batch, kv_heads, head_dim=head_dim, dtype=dtype, device=self.device)
        self._sequences = Sequences(store, table, Windows(layout.sink, layout.recent, unit(scheme), slots), self.device)

    # ------------------------------------------------------------------ tokens

    @untraced("KVCache.append")
    def append(self, k: Tensor, v: Tensor, *, counts: Numbers | None = None, positions: Numbers | None = None) -> None:
        """Add tokens `[batch, kv_heads, n, head_dim]` to the ends of the sequences.

        Args:
            counts: how many of its n tokens each sequence appends, its first ones; all where None.
            positions: the position of the first new token by the caller's count, one number or one per sequence. Any that
                differs from `lengths` is refused, because a token was lost or given twice.

        Raises: TypeError, ValueError and RuntimeError for arguments that do not fit the cache; CacheFullError where no page is
        free. The cache is then as it was.
        """
        for name, x in (("k", k), ("v", v)):
            check_beside_cache(name, x, self._shape, self.dtype, self.device)
        if k.shape != v.shape:
            raise ValueError(f"v: shape {list(v.shape)} is not that of k, {list(k.shape)}")
        if positions is not None:
            self._check_positions(positions)
        self._sequences.append(k, v, None if counts is None else whole_numbers("counts", counts, k.shape[0], k.shape[2]))

    def reserve(self, tokens: int, *, longest: int | None = None) -> None:
        """Reserve pages for `tokens` more of every sequence, and count lengths on the GPU, so that a CUDA graph can append.

        A graph may then capture `append` of up to a page of tokens for every sequence, without `counts` and `positions`, and
        `decode` without `counts`. Each replay continues where the last one ended. Anything else that changes the cache releases
        the reserved pages, and so do `fork` and an append of more tokens than they hold: call `reserve` again before the next
        replay. `lengths`, and everything that depends on them, waits for the GPU. Keep the cache as long as the graph. Where
        there are no CUDA graphs, on a CPU and with backend `reference`, pages are reserved and nothing else changes.

        Args:
            longest: the most tokens that a sequence will have during replays of graphs that are captured from now on. None
                stands for the value of the last call, or at first for the longest sequence and `tokens` more. After a change,
                capture again.

        Raises: CacheFullError for more pages than are free (the first call takes one more, as a spare page); UnsupportedError
        for a cache without `capacity`, whose pages move as they grow, and for schemes that keep tokens in 16 bits, whose slots
        the CPU counts; ValueError for numbers out of range, or if a sequence could outgrow `longest`. The cache is then as it
        was. A replay without room loses its tokens, and the next call that needs lengths raises CacheFullError, once.
        """
        refuse_capture(self.device, "the pages of a KVCache, which are counted on the CPU,")
        pool = self._sequences.table.pool
        if not pool.fixed:
            raise UnsupportedError("capacity: None, so pages move as they grow; make the cache with capacity=")
        if self._sequences.windows.slot_count:
            raise UnsupportedError(
                f"scheme {self.scheme.name!r}: it keeps tokens in 16 bits, whose places the CPU counts; use a scheme without "
                "cache.sink, cache.recent and blocks of tokens"
            )
        capacity = len(pool.holders) * pool.page
        tokens = whole_number("tokens", tokens, 1, capacity)
        most = max(self.lengths) + tokens
        if longest is not None and whole_number("longest", longest, 1, capacity) < most:
            raise ValueError(f"longest: {longest}, and with tokens={tokens} a sequence may have {most}")
        self._sequences.reserve(tokens, longest)

    def truncate(self, lengths: Numbers) -> None:
        """Drop the newest tokens: keep `lengths`, one number or one per sequence.

        If that cuts a block that shares a scale, the tokens of it that stay are dequantized to 16 bits, and packed again when
        the block is full. Raises ValueError for more tokens than a sequence has.
        """
        self._sequences.truncate(whole_numbers("lengths", lengths, self.batch, self._sequences.lengths))

    def forget(self, keep: int) -> list[int]:
        """Free whole pages of each sequence's oldest tokens, but none of its `keep` newest: for attention within a window.

        From then on `lengths` and positions count the remaining tokens; `decode` gives the same result if its window reaches
        none of the others. If the scheme keeps tokens in 16 bits, nothing is freed. Returns how many tokens of each sequence
        were freed.
        """
        return self._sequences.forget(whole_number("keep", keep, 0)).tolist()

    def evict(self, sequences: Numbers) -> None:
        """Empty these sequences and free their pages. New sequences can take their places in the batch."""
        lengths = self._sequences.lengths.copy()
        lengths[sequence_numbers(sequences, self.batch)] = 0
        self._sequences.truncate(lengths)

    def fork(self, sequences: Numbers) -> "KVCache":
        """A cache whose sequence i continues sequence `sequences[i]` of this one. Any number may be given, in any order.

        Pages are shared, and copied when a sequence that shares one appends to it; 16-bit windows are copied at once. The
        caches are independent, and a page is freed when no cache holds it.
        """
        chosen = sequence_numbers(sequences, self.batch)
        forked = object.__new__(type(self))
        forked.__dict__.update(self.__dict__)
        forked._shape = len(chosen), *self._shape[1:]
        forked._sequences = self._sequences.fork(chosen)
        return forked

    def __copy__(self) -> "KVCache":
        return self.fork(range(self.batch))

    def __deepcopy__(self, memo: dict[int, Any]) -> "KVCache":
        return self.fork(range(self.batch))  # pages need no copy before one is written

    def __reduce__(self) -> tuple[Any, ...]:
        table = self._sequences.table
        pages = max(len(table.pool.holders), int(table.page_counts.sum()))  # more where sequences share some
        capacity = pages * self.page if table.pool.fixed else None
        return self._restore, (self._content(), capacity, self._asked)

    # ------------------------------------------------------------------ contents and sizes

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self._shape[0]

    @property
    def kv_heads(self) -> int:
        """Number of heads of K and V."""
        return self._shape[1]

    @property
    def head_dim(self) -> int:
        """Channels per head."""
        return self._shape[2]

    @property
    def page(self) -> int:
        """Tokens per page."""
        return self._sequences.table.pool.page

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence, 16-bit windows included."""
        return self._sequences.lengths.tolist()

    @property
    def bits_per_value(self) -> float:
        """Bits of codes, scales and zeros per value of a full page. `memory` has windows and slack."""
        return self._sequences.store.bits_per_value

    @property
    def memory(self) -> Memory:
        """Bytes that are allocated now. A shared page counts once, and forks share one pool of pages."""
        table, nbytes = self._sequences.table, self._sequences.store.nbytes
        packed = nbytes * table.count_tokens(self._sequences.packed) // (len(table.pool.holders) * self.page)
        return Memory(packed=packed, slack=nbytes - packed, windows=self._sequences.windows.slots.nbytes)

    @property
    def nbytes(self) -> int:
        """Bytes of all pages and windows."""
        return self._sequences.store.nbytes + self._sequences.windows.slots.nbytes

    @property
    def free_pages(self) -> int:
        """Number of free pages."""
        return len(self._sequences.table.pool.free)

    def codes(self, sequence: int) -> tuple[QuantizedTensor, QuantizedTensor]:
        """K and V of a sequence's packed tokens `[1, kv_heads, n, head_dim]`."""
        b = self._one(sequence)
        return self._sequences.read(b, 0, int(self._sequences.packed[b]))

    def windows(self, sequence: int) -> tuple[Tensor, Tensor]:
        """K and V of a sequence's 16-bit tokens `[1, kv_heads, n, head_dim]`: first the sink, then the newest."""
        return self._sequences.ends(self._one(sequence))

    def __repr__(self) -> str:
        tokens, (batch, heads, d) = sum(self.lengths), self._shape
        sizes = f"{batch} sequences, {tokens} tokens of {heads} heads of {d} channels"
        return f"KVCache({self.scheme.name!r}, {sizes}, {self.bits_per_value:g} bits a value, {self.backend} on {self.device})"

    # ------------------------------------------------------------------ attention

    def attention(self, q: Tensor, features: Features, backend: str, deterministic: bool = False) -> tuple[Tensor, Tensor]:
        """Attention to all tokens, without attention sinks, for `decode`: out and natural LSE, float32."""
        by_reading = None if backend == self.backend else (self.scheme, self.scales)
        return self._sequences.attention(q, features, by_reading, deterministic)

    def launch(self, q: Tensor, features: Features) -> Call:
        """The launch of the kernel that reads the pages in `attention`, for `tune_decode`.

        Raises UnsupportedError for a backend without Triton kernels, ValueError where nothing is packed.
        """
        if not isinstance(self._sequences.store, TritonPages):
            raise UnsupportedError(f"cache: kept by {self.backend}, which has nothing to tune; make it on a GPU")
        if not self._sequences.packed.any():
            raise ValueError("cache: nothing is packed in it yet; append as many tokens as there will be")
        table, lengths, offset = self._sequences.places()
        longest = int(self._sequences.packed.max())
        return self._sequences.store.prepare(q, table, lengths, features, offset=offset, longest=longest)

    # ------------------------------------------------------------------ files

    def save(self, path: str | os.PathLike) -> None:
        """Write all sequences to a safetensors file, atomically: codes in a layout that any backend reads, scheme and scales.

        Sequences that share pages are each written in full. Raises OSError as the file system does.
        """
        cache_file.write(path, self._content())

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        *,
        device: torch.device | str = "cpu",
        capacity: int | None = None,
        backend: Backend = "auto",
    ) -> "KVCache":
        """Load a cache that `save` wrote, on any device and backend; `capacity` as for a new one.

        Raises CacheFileError, naming the file and what is wrong, for a file that is cut short, changed or no cache;
        CacheFullError where `capacity` is too small.
        """
        content = cache_file.read(path, check_device(device))
        try:
            return cls._restore(content, capacity, backend)
        except (UnsupportedError, CacheFullError):
            raise
        except (SchemeError, ScalesError, RuntimeError, MemoryError) as error:
            raise CacheFileError(f"{path}: {error}") from None

    def _content(self) -> Content:
        sequences = []
        for b in range(self.batch):
            k, v = self.codes(b) if self._sequences.packed[b] else (None, None)
            sequences.append((k, v, *self.windows(b)))
        return Content(self.scheme, self.kv_heads, self.head_dim, self.dtype, self.scales, sequences)

    @classmethod
    def _restore(cls, content: Content, capacity: int | None, backend: Backend) -> "KVCache":
        cache = cls(
            content.scheme,
            batch=len(content.sequences),
            kv_heads=content.kv_heads,
            head_dim=content.head_dim,
            dtype=content.dtype,
            device=content.sequences[0][2].device,
            capacity=capacity,
            scales=content.scales,
            backend=backend,
        )
        cache._sequences.fill(content.sequences)
        return cache

    # ------------------------------------------------------------------ checks

    def _one(self, sequence: int) -> int:
        chosen = sequence_numbers(sequence, self.batch)
        if len(chosen) != 1:
            raise ValueError(f"sequence: {quote(sequence)}; give the number of one sequence")
        return int(chosen[0])

    def _check_positions(self, positions: Numbers) -> None:
        given = whole_numbers("positions", positions, self.batch, MOST)
        if (wrong := np.nonzero(given != self._sequences.lengths)[0]).size:
            b = wrong[0]
            raise ValueError(f"positions: {given[b]} for sequence {b}, whose next token is at {self._sequences.lengths[b]}")


def _make_store(backend: str, scheme: QuantScheme, **sizes: Any) -> tuple[str, Store]:
    """A backend and a new store of it. `auto` warns and takes the reference if its first choice does not support the scheme."""
    chosen = choose_backend(backend, sizes["device"])
    if chosen in STORES:
        try:
            return chosen, STORES[chosen](scheme, **sizes)
        except UnsupportedError as error:
            if backend != "auto":
                raise
            warnings.warn(f"this cache is kept and read by the reference, many times slower: {error}", stacklevel=3)
    elif backend != "auto":
        raise UnsupportedError(f"backend: {quote(backend)} keeps no pages; use auto or one of {', '.join(STORES)}")
    return "reference", ReferencePages(scheme, **sizes)
