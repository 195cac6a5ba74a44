"""KVCache: the keys and values of sequences that grow, in the codes of a scheme."""

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
from tokquant.errors import CacheFileError, ScalesError, SchemeError, UnsupportedError, quote
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
"""What keeps pages, by backend; each is made and used as `ReferencePages` is."""

MOST = 2**31 - 1
"""Of sequences, heads, channels and tokens: what 32 bits count."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a cache: `packed` holds tokens in codes, `slack` is room in pages, `windows` the slots for tokens in 16 bits."""

    packed: int
    slack: int
    windows: int


class KVCache:
    """Keys and values of `batch` growing sequences, packed in a scheme's codes page by page, for `tokquant.decode` to read.

    From its oldest token, a sequence has `sink` tokens in 16 bits, then packed tokens, then in 16 bits the `recent` newest and
    those that do not fill a block yet, as the scheme's `cache` says. Codes equal those of quantizing everything at once.

    Args:
        scheme: a QuantScheme, a preset's name, a path, or a SchemeMap whose `layer` has one scheme for all heads. No part of
            it may depend on later tokens.
        batch, kv_heads, head_dim: sizes of what is appended, `[batch, kv_heads, n, head_dim]`.
        dtype: of what is appended: float16, bfloat16 or float32 (whose windows are in 32 bits).
        capacity: tokens of all sequences together to allocate pages for, once; None lets the pages grow. Every sequence
            leaves part of its last page empty.
        scales: one layer's calibrated scales, for a scheme with static parts.
        backend: what stores and reads the pages, as for `attention`.

    Raises: SchemeError for a scheme that depends on later tokens; ScalesError, TypeError, ValueError as `attention`;
    UnsupportedError for a backend that keeps no pages.
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
            found = dtype if isinstance(dtype, torch.dtype) else quote(dtype)
            raise TypeError(f"dtype: {found}; use torch.float16, torch.bfloat16 or torch.float32")
        check_append_only(scheme)
        check_scales(scheme, scales)
        self.device, self.dtype, self.scales = check_device(device), dtype, scales
        self._shape = batch, kv_heads, head_dim
        token = torch.zeros(1, kv_heads, 1, head_dim, dtype=dtype, device=self.device)
        for spec in (scheme.k, scheme.v):  # groups and scales of other sizes say so now
            in_frame(token, frame_of(token, spec, scheme, scales), spec, scales)
        ends = windows(scheme)
        pages = batch if capacity is None else -(-capacity // ends.page)
        sizes: dict[str, Any] = dict(kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, device=self.device, pages=pages)
        with torch.inference_mode(False):  # what is made in it cannot be written outside of it
            self.backend, store = _store_of(backend, scheme, page=ends.page, scales=scales, **sizes)
        table = BlockTable(Pool(store, ends.page, pages, fixed=capacity is not None), batch)
        slots = partial(store.slots, batch, kv_heads, head_dim=head_dim, dtype=dtype, device=self.device)
        self._held = Sequences(store, table, Windows(ends.sink, ends.recent, unit(scheme), slots), self.device)

    # ------------------------------------------------------------------ tokens

    @untraced("KVCache.append")
    def append(self, k: Tensor, v: Tensor, *, counts: Numbers | None = None, positions: Numbers | None = None) -> None:
        """Add tokens `[batch, kv_heads, n, head_dim]` to the ends of the sequences.

        Args:
            counts: how many of the n each sequence takes, its first ones; all where None.
            positions: where the caller expects the first new token to be, one number or one per sequence. Other values than
                `lengths` are refused, because a token was lost or given twice.

        Raises: TypeError, ValueError and RuntimeError for what does not fit; CacheFullError. The cache is then as it was.
        """
        for name, x in (("k", k), ("v", v)):
            check_beside_cache(name, x, self._shape, self.dtype, self.device)
        if k.shape != v.shape:
            raise ValueError(f"v: shape {list(v.shape)} is not that of k, {list(k.shape)}")
        if positions is not None:
            self._check_positions(positions)
        self._held.append(k, v, None if counts is None else whole_numbers("counts", counts, k.shape[0], k.shape[2]))

    def reserve(self, tokens: int, *, longest: int | None = None) -> None:
        """Hold pages for `tokens` more of every sequence, and on a GPU count lengths there: so a CUDA graph can append.

        A graph may then capture `append` of up to a page of tokens for every sequence, without `counts` and `positions`, and
        `decode` without `counts`. Each replay goes on where the last one ended. Anything else that changes the cache gives the
        pages back, and so do `fork` and an append of more than they hold: call `reserve` again before the next replay.
        `lengths`, and what depends on them, wait for the GPU. Keep the cache as long as the graph. Where there are no CUDA
        graphs, on a CPU and with backend `reference`, pages are held and nothing else is different.

        Args:
            longest: the most tokens that a sequence will have while what is captured from now on is replayed. Where None, as
                earlier, or those of the longest sequence and `tokens` more. With another number than earlier, capture again.

        Raises: CacheFullError for more pages than are free, of which the first call takes one for itself; UnsupportedError for
        a cache without `capacity`, whose pages move as they grow, and for schemes that keep tokens in 16 bits, whose places the
        CPU counts; ValueError. The cache is then as it was. Tokens of replays without room are lost, and whatever asks for
        lengths next raises CacheFullError, once.
        """
        refuse_capture(self.device, "the pages of a KVCache, which are counted on the CPU,")
        pool = self._held.table.pool
        if not pool.fixed:
            raise UnsupportedError("capacity: None, so pages move as they grow; make the cache with capacity=")
        if self._held.windows.slots:
            raise UnsupportedError(
                f"scheme {self.scheme.name!r}: it keeps tokens in 16 bits, whose places the CPU counts; use a scheme without "
                "cache.sink, cache.recent and blocks of tokens"
            )
        capacity = len(pool.holders) * pool.page
        tokens = whole_number("tokens", tokens, 1, capacity)
        most = max(self.lengths) + tokens
        if longest is not None and whole_number("longest", longest, 1, capacity) < most:
            raise ValueError(f"longest: {longest}, and with tokens={tokens} a sequence may have {most}")
        self._held.reserve(tokens, longest)

    def truncate(self, lengths: Numbers) -> None:
        """Drop the newest tokens: keep `lengths`, one number or one per sequence.

        Where that cuts a block that shares scales, the tokens before the cut go back to 16 bits, with the values of their
        codes, and are packed again when the block is full. Raises ValueError for more than there is.
        """
        self._held.truncate(whole_numbers("lengths", lengths, self.batch, self._held.lengths))

    def forget(self, keep: int) -> list[int]:
        """Free whole pages of each sequence's oldest tokens, and none of its `keep` newest: for attention within a window.

        `lengths` and positions count what is left from then on, and `decode` sees no difference within the window. Where the
        scheme keeps tokens in 16 bits, nothing is freed. Returns how many tokens of each sequence are gone.
        """
        return self._held.forget(whole_number("keep", keep, 0)).tolist()

    def evict(self, sequences: Numbers) -> None:
        """Empty these sequences and free their pages; others can begin in their places."""
        lengths = self._held.lengths.copy()
        lengths[sequence_numbers(sequences, self.batch)] = 0
        self._held.truncate(lengths)

    def fork(self, sequences: Numbers) -> "KVCache":
        """A cache whose sequence i goes on from sequence `sequences[i]` of this one, any number of them in any order.

        Pages are shared, and copied when one of their holders appends to them; 16-bit windows are copied at once. The caches
        are independent, and a page is freed when no cache holds it.
        """
        chosen = sequence_numbers(sequences, self.batch)
        forked = object.__new__(type(self))
        forked.__dict__.update(self.__dict__)
        forked._shape = len(chosen), *self._shape[1:]
        forked._held = self._held.fork(chosen)
        return forked

    def __deepcopy__(self, memo: dict[int, Any]) -> "KVCache":
        # pages need no copy before somebody writes, and pointers of kernels cannot have one
        return self.fork(range(self.batch))

    def __reduce__(self) -> Any:
        # as it stands it would be half of a cache, and what appends to one would change the other
        raise TypeError(
            "cache: a KVCache cannot be pickled, nor copied without its pages; save(path) and KVCache.load(path) bring it to "
            "another process, and copy.deepcopy or fork go on from it in this one"
        )

    # ------------------------------------------------------------------ what it holds

    @property
    def batch(self) -> int:
        """Sequences."""
        return self._shape[0]

    @property
    def kv_heads(self) -> int:
        """Heads of K and V."""
        return self._shape[1]

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self._shape[2]

    @property
    def page(self) -> int:
        """Tokens a page."""
        return self._held.table.pool.page

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence, windows included."""
        return self._held.lengths.tolist()

    @property
    def bits_per_value(self) -> float:
        """Bits of codes, scales and zeros for a value in a full page; windows and slack are in `memory`."""
        return self._held.store.bits_per_value

    @property
    def memory(self) -> Memory:
        """Bytes now taken. A page that several sequences hold counts once; their caches share one pool."""
        table, nbytes = self._held.table, self._held.store.nbytes
        packed = nbytes * table.tokens(self._held.packed) // (len(table.pool.holders) * self.page)
        return Memory(packed=packed, slack=nbytes - packed, windows=self._held.windows.memory.nbytes)

    @property
    def nbytes(self) -> int:
        """Bytes of all pages and windows."""
        return self._held.store.nbytes + self._held.windows.memory.nbytes

    @property
    def free_pages(self) -> int:
        """Pages that nobody holds."""
        return len(self._held.table.pool.free)

    def codes(self, sequence: int) -> tuple[QuantizedTensor, QuantizedTensor]:
        """K and V of a sequence's packed tokens `[1, kv_heads, n, head_dim]`."""
        b = self._one(sequence)
        return self._held.read(b, 0, int(self._held.packed[b]))

    def windows(self, sequence: int) -> tuple[Tensor, Tensor]:
        """K and V of a sequence's tokens in 16 bits `[1, kv_heads, n, head_dim]`: first the sink, then the newest."""
        return self._held.ends(self._one(sequence))

    def __repr__(self) -> str:
        tokens, (batch, heads, d) = sum(self.lengths), self._shape
        what = f"{batch} sequences, {tokens} tokens of {heads} heads of {d} channels"
        return f"KVCache({self.scheme.name!r}, {what}, {self.bits_per_value:g} bits a value, {self.backend} on {self.device})"

    # ------------------------------------------------------------------ attention

    def attention(self, q: Tensor, features: Features, backend: str, deterministic: bool = False) -> tuple[Tensor, Tensor]:
        """Attention to everything here, for `decode`, which adds sinks: out and natural LSE, float32."""
        by_reading = None if backend == self.backend else (self.scheme, self.scales)
        return self._held.attention(q, features, by_reading, deterministic)

    def launch(self, q: Tensor, features: Features) -> Call:
        """The launch of what `attention` has a kernel do on pages, for `tune_decode`. Raises UnsupportedError where none does,
        ValueError where nothing is packed."""
        if not isinstance(self._held.store, TritonPages):
            raise UnsupportedError(f"cache: kept by {self.backend}, which has nothing to tune; make it on a GPU")
        if not self._held.packed.any():
            raise ValueError("cache: nothing is packed in it yet; append as many tokens as there will be")
        table, lengths, offset = self._held.places()
        return self._held.store.prepare(q, table, lengths, features, offset=offset, longest=int(self._held.packed.max()))

    # ------------------------------------------------------------------ files

    def save(self, path: str | os.PathLike) -> None:
        """Write all sequences to a safetensors file, atomically: canonical codes, so that any backend reads them, the scheme
        and its scales. Sequences that share pages are written in full. Raises OSError as the file system does."""
        sequences = []
        for b in range(self.batch):
            k, v = self.codes(b) if self._held.packed[b] else (None, None)
            sequences.append((k, v, *self.windows(b)))
        cache_file.write(path, Content(self.scheme, self.kv_heads, self.head_dim, self.dtype, self.scales, sequences))

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        *,
        device: torch.device | str = "cpu",
        capacity: int | None = None,
        backend: Backend = "auto",
    ) -> "KVCache":
        """A cache as `save` wrote it, on any device and backend; `capacity` as for a new one.

        Raises CacheFileError, naming the file and what is wrong: a file that is cut short, changed or of something else.
        CacheFullError where `capacity` is too small.
        """
        content = cache_file.read(path, check_device(device))
        try:
            cache = cls(
                content.scheme,
                batch=len(content.sequences),
                kv_heads=content.kv_heads,
                head_dim=content.head_dim,
                dtype=content.dtype,
                device=device,
                capacity=capacity,
                scales=content.scales,
                backend=backend,
            )
        except UnsupportedError:
            raise
        except (SchemeError, ScalesError, RuntimeError, MemoryError) as error:
            raise CacheFileError(f"{path}: {error}") from None
        cache._held.fill(content.sequences)
        return cache

    # ------------------------------------------------------------------ checks

    def _one(self, sequence: int) -> int:
        chosen = sequence_numbers(sequence, self.batch)
        if len(chosen) != 1:
            raise ValueError(f"sequence: {quote(sequence)}; give the number of one")
        return int(chosen[0])

    def _check_positions(self, positions: Numbers) -> None:
        given = whole_numbers("positions", positions, self.batch, MOST)
        if (wrong := np.nonzero(given != self._held.lengths)[0]).size:
            b = wrong[0]
            raise ValueError(f"positions: {given[b]} for sequence {b}, whose next token is at {self._held.lengths[b]}")


def _store_of(backend: str, scheme: QuantScheme, **sizes: Any) -> tuple[str, Store]:
    """A store and the backend that it is of. `auto` takes the reference, and warns, where its first choice has none such."""
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
