"""Benchmarks against other attention. All are timed in turn in one process, so that what slows the machine slows them alike."""

import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from tokquant.attention import attention as attend
from tokquant.attention import choose_backend, quantize, quantizing_backend
from tokquant.calibration.scales import LayerScales
from tokquant.decode import decode as decode_cache
from tokquant.errors import SchemeError, first_line, quote
from tokquant.evaluation import packages, peers
from tokquant.evaluation.costs import scales_for
from tokquant.evaluation.machine import machine
from tokquant.evaluation.packages import Call
from tokquant.kernels.cpu import build
from tokquant.kernels.cpu.peak import peaks
from tokquant.kernels.cpu.plan import products
from tokquant.kv_cache import KVCache
from tokquant.schemes import QuantScheme, resolve
from tokquant.timing import SCRATCH_BYTES, interleaved

MEMORY, COPY = "reading memory", "copying memory"
PRODUCTS = {"integers": "integer products", "bfloats": "bfloat16 products", "floats": "float products"}


@dataclass(frozen=True)
class Shape:
    """Sizes of a benchmark: q `[batch, heads, queries, head_dim]`, k and v `[batch, kv_heads, tokens, head_dim]`."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    tokens: int
    head_dim: int
    causal: bool

    @property
    def operations(self) -> int:
        """Multiplications and additions of Q K^T and P V, for the pairs that causality leaves."""
        pairs = self.queries * self.tokens
        if self.causal:
            seeing = min(self.queries, self.tokens)
            pairs = seeing * self.tokens - seeing * (seeing - 1) // 2
        return 4 * self.batch * self.heads * pairs * self.head_dim

    def __str__(self) -> str:
        heads = f"{self.heads} heads" + (f" over {self.kv_heads}" if self.kv_heads != self.heads else "")
        sizes = f"{self.queries} x {self.tokens} tokens, head_dim {self.head_dim}"
        return f"batch {self.batch}, {heads}, {sizes}{', causal' if self.causal else ''}"


@dataclass(frozen=True)
class Row:
    """One provider's median, or why there is none."""

    provider: str
    ms: float | None = None
    least_ms: float | None = None
    """The fastest run's. A median far above it tells of a machine that was busy with something else."""
    ratio: float | None = None
    """Speedup over the table's peer."""
    rate: float | None = None
    """Throughput in the table's unit."""
    share: float | None = None
    """Throughput as a share of the machine's own limit, measured in the same run."""
    note: str = ""


@dataclass(frozen=True)
class Table:
    """The results for one shape."""

    workload: str
    shape: Shape
    peer: str | None
    """The fastest of torch's kernels, the baseline of every `ratio`."""
    unit: Literal["GOPS", "GB/s"]
    rows: list[Row]
    machine: dict[str, str]


@dataclass(frozen=True)
class Provider:
    """One call to time, and what its time is set against."""

    call: Call
    work: float
    """Operations or bytes of a call, for its throughput; 0 where throughput means nothing."""
    units: tuple[str, ...] = ()
    """Names of the machine's limits that bound this call, each for an equal part of the work."""
    small: Call | None = None
    """The same call with hardly any K and V to read; it only warms the code."""
    compared: bool = True
    """Whether the call computes what the peer does, so that a speedup makes sense."""


Providers = dict[str, Provider | str]
"""Name -> provider, or why there is none."""


def attention(shape: Shape, schemes: Sequence[QuantScheme | str], *, device: torch.device, repeats: int = 15) -> Table:
    """Time attention over whole sequences: each scheme on codes and with quantization, torch's, and other packages'.

    On a GPU also by `backend="auto"`, which may take torch's attention where the shape was tuned (`tokquant.tune`). Tensors are
    normally distributed: float32 on a CPU, float16 on a GPU. Rates are operations a second; on a CPU also as a share of the
    peak rate of its products, measured on registers alone.

    Args:
        schemes: QuantSchemes, presets' names or paths; static ones are calibrated on the tensors.
        device: where to run; the backend is that of `auto`.
        repeats: timed runs of each.

    What does not run is a row that says why. Raises SchemeError for a scheme that is none, ValueError for two of one name and
    for a shape that does not fit memory.
    """
    named = _named(schemes)
    q, k, v = _random_tensors(shape, device)
    work, causal = shape.operations, shape.causal
    on_cpu = choose_backend("auto", device) == "cpu"
    found: Providers = {}
    for name, call in peers.attention(q, k, v, causal).items():
        found[name] = call if isinstance(call, str) else Provider(call, work)

    def coded(name: str, scheme: QuantScheme) -> Providers:
        scales = scales_for(scheme, q, k, v)
        codes = quantize(q, k, v, scheme, scales=scales)
        units = tuple(PRODUCTS[products(scheme, role, q.dtype, build.instructions())] for role in "kv") if on_cpu else ()
        whole = partial(attend, q, k, v, scheme, causal=causal, scales=scales)
        found: Providers = {
            name: Provider(partial(attend, *codes, scheme, causal=causal), work, units),
            f"{name}, with quantization": Provider(partial(whole, backend=quantizing_backend("auto", device)), work),
        }
        return found | ({f"{name}, auto": Provider(whole, work)} if device.type == "cuda" else {})

    found |= _for_each_scheme(named, coded)
    if on_cpu:
        for kind, (call, operations) in peaks(torch.get_num_threads()).items():
            found[PRODUCTS[kind]] = Provider(call, operations, compared=False)
    return _timed("attention", shape, "GOPS", found, device, repeats)


def decode(
    shape: Shape, schemes: Sequence[QuantScheme | str], *, device: torch.device, repeats: int = 15, cold: bool = True
) -> Table:
    """Time attention of one query, or a few, to many keys: on codes of Q, K and V, and with a KVCache, which quantizes Q.

    Rates are bytes of K and V a second, all that a QuantizedTensor holds, also as a share of the bandwidth of reading memory.
    Where `cold`, memory is read before each call until a CPU's caches hold nothing of K and V, as a model's other layers do,
    and a call with a few keys brings the code back; else the call itself runs untimed before. The rest is as for `attention`.
    """
    named = _named(schemes)
    q, k, v = _random_tensors(shape, device)
    # a single query is the last token, and sees every key with or without causality
    causal = shape.causal and shape.queries > 1
    few_keys = q, k[:, :, :16].contiguous(), v[:, :, :16].contiguous()
    small = peers.of_torch(*few_keys, causal)
    found: Providers = {}
    for name, call in peers.decode(q, k, v, causal).items():
        # other packages' int4 has four bytes of scale and shift for each token and head
        size = 4 if "fp32" in name else 0.5 + 4 / shape.head_dim if "int4" in name else 2
        read = size * (k.numel() + v.numel())
        found[name] = call if isinstance(call, str) else Provider(call, read, (MEMORY,), small.get(name))  # type: ignore[arg-type]

    def coded(name: str, scheme: QuantScheme) -> Providers:
        scales = scales_for(scheme, q, k, v)
        codes, few_codes = (quantize(*x, scheme=scheme, scales=scales) for x in ((q, k, v), few_keys))
        call, warm_up = (partial(attend, *x, scheme, causal=causal) for x in (codes, few_codes))
        on_codes: Providers = {name: Provider(call, codes[1].nbytes + codes[2].nbytes, (MEMORY,), warm_up)}
        return on_codes | _with_cache(name, scheme, scales, q, (k, v), few_keys[1:])

    found |= _for_each_scheme(named, coded)
    memory = torch.ones(SCRATCH_BYTES // 8, dtype=torch.int64, device=device)
    found[MEMORY] = Provider(memory.sum, SCRATCH_BYTES, compared=False)
    return _timed("decode", shape, "GB/s", found, device, repeats, lambda each: _after(memory.sum if cold else each.call, each))


def quantization(shape: Shape, schemes: Sequence[QuantScheme | str], *, device: torch.device, repeats: int = 15) -> Table:
    """Time quantization of Q, K and V against copying memory, and attention on the codes for comparison.

    Rates are bytes a second, of Q, K, V and their codes once each, also as a share of the bandwidth of a copy. The rest is as
    for `attention`.
    """
    named = _named(schemes)
    q, k, v = _random_tensors(shape, device)

    def coded(name: str, scheme: QuantScheme) -> Providers:
        scales = scales_for(scheme, q, k, v)
        codes = quantize(q, k, v, scheme, scales=scales)
        moved = sum(x.nbytes for x in (q, k, v, *codes))
        return {
            name: Provider(partial(quantize, q, k, v, scheme, scales=scales), moved, (COPY,)),
            f"{name}, attention": Provider(partial(attend, *codes, scheme, causal=shape.causal), 0),
        }

    found = _for_each_scheme(named, coded)
    here, there = (torch.ones(SCRATCH_BYTES // 2, dtype=torch.uint8, device=device) for _ in range(2))
    found[COPY] = Provider(partial(there.copy_, here), SCRATCH_BYTES)
    return _timed("quantization", shape, "GB/s", found, device, repeats)


def _for_each_scheme(named: dict[str, QuantScheme], providers_of: Callable[[str, QuantScheme], Providers]) -> Providers:
    """The providers of every scheme. A scheme that cannot quantize these tensors says why, and the others still run."""
    found: Providers = {}
    for name, scheme in named.items():
        try:
            found |= providers_of(name, scheme)
        except Exception as error:  # of the scheme, or whatever Triton's compiler raises
            found[name] = first_line(error)
    return found


def _with_cache(
    name: str, scheme: QuantScheme, scales: LayerScales | None, q: Tensor, kv: tuple[Tensor, ...], few_kv: tuple[Tensor, ...]
) -> Providers:
    """A step of decoding with a KVCache in two rows: attention, which quantizes Q, and the append of one token."""
    (batch, heads, _, head_dim), caches = kv[0].shape, []
    for k, v in (kv, few_kv):
        try:
            cache = KVCache(
                scheme, batch=batch, kv_heads=heads, head_dim=head_dim, dtype=q.dtype, device=q.device, scales=scales
            )
        except SchemeError as error:
            return {f"{name}, KVCache": first_line(error)}
        cache.append(k, v)
        caches.append(cache)
    step, warm_up = (partial(decode_cache, q, cache) for cache in caches)
    token, grown = [x[:, :, :1].contiguous() for x in kv], [cache.fork(range(batch)) for cache in caches]
    for cache in grown:
        cache.append(*token)  # untimed: the first append after a fork takes a page that is not shared
    grow, warm_growth = (partial(cache.append, *token) for cache in grown)
    size = caches[0].memory.packed + caches[0].memory.windows
    return {
        f"{name}, KVCache": Provider(step, size, (MEMORY,), warm_up),
        f"{name}, one token appended": Provider(grow, 0, small=warm_growth, compared=False),
    }


def _after(first: Call, provider: Provider) -> Call:
    """What runs untimed before a provider's call: `first`, then the provider's small call."""

    def before() -> None:
        first()
        if provider.small is not None:
            provider.small()

    return before


def _timed(
    workload: str,
    shape: Shape,
    unit: Literal["GOPS", "GB/s"],
    providers: Providers,
    device: torch.device,
    repeats: int,
    before: Callable[[Provider], Call] | None = None,
) -> Table:
    """Time every provider that runs, each after its untimed `before`, and work out speedups and throughputs."""
    failures = {name: each if isinstance(each, str) else _failure(each.call) for name, each in providers.items()}
    running = {name: each for name, each in providers.items() if isinstance(each, Provider) and not failures[name]}
    untimed = [before(each) for each in running.values()] if before else None
    runs = dict(zip(running, interleaved([each.call for each in running.values()], repeats, device, untimed), strict=True))
    times = {name: statistics.median(each) for name, each in runs.items()}
    rates = {name: each.work / times[name] / 1e6 for name, each in running.items() if each.work}
    peer = min((name for name in times if name.startswith("SDPA")), key=times.__getitem__, default=None)

    def row(name: str) -> Row:
        if name not in times:
            return Row(name, note=failures[name])
        units = running[name].units
        ratio = times[peer] / times[name] if peer and running[name].compared else None
        bounded = units and all(unit in rates for unit in units)
        share = sum(rates[name] / rates[unit] for unit in units) / len(units) if bounded else None
        return Row(name, times[name], min(runs[name]), ratio, rates.get(name), share)

    facts = machine(device, choose_backend("auto", device)) | packages.versions()
    return Table(workload, shape, peer, unit, [row(name) for name in providers], facts)


def _named(schemes: Sequence[QuantScheme | str]) -> dict[str, QuantScheme]:
    """Schemes by name, or by path where one was given, as several files may hold one name.

    Raises ValueError where two differ under one name.
    """
    if isinstance(schemes, str | QuantScheme):
        raise TypeError(f"schemes: {quote(schemes)} alone; give a list of them")
    named: dict[str, QuantScheme] = {}
    for scheme in schemes:
        name, found = scheme if isinstance(scheme, str) else scheme.name, resolve(scheme)
        if named.setdefault(name, found) != found:
            raise ValueError(f"schemes: two are called {name!r}; give each a name of its own")
    return named


def _random_tensors(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    kind = torch.float32 if device.type == "cpu" else torch.float16
    keys = (shape.batch, shape.kv_heads, shape.tokens, shape.head_dim)
    sizes = ((shape.batch, shape.heads, shape.queries, shape.head_dim), keys, keys)
    try:
        q, k, v = (torch.randn(size, generator=generator, dtype=kind, device=device) for size in sizes)
    except RuntimeError as error:
        raise ValueError(f"shape: {shape} cannot be had on {device}: {first_line(error)}") from None
    return q, k, v


def _failure(call: Call) -> str:
    """Why a call fails; empty where it runs."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            call()
        except Exception as error:  # whatever a package, or Triton's compiler, raises
            # torch's error only says that no kernel is available; the reasons are in its warnings, among headings
            reasons = (str(each.message).split(" (Triggered")[0] for each in caught)
            return "; ".join(dict.fromkeys([first_line(error), *(each for each in reasons if "because" not in each)]))
    return ""
