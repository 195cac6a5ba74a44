"""Which schemes suit a KV cache: those where a token's codes do not depend on later tokens."""

from tokquant.errors import SchemeError
from tokquant.schemes.scheme import Cache, QuantScheme


def windows(scheme: QuantScheme) -> Cache:
    """The scheme's `cache`: its 16-bit windows and page size; by default no windows and pages of 128 tokens."""
    return scheme.cache or Cache()


def unit(scheme: QuantScheme) -> int:
    """The number of tokens that are packed at a time: those that share a scale of K or of V."""
    sizes = (
        operand.granularity.size or 1
        for operand in (scheme.k, scheme.v)
        if operand.scaled and operand.granularity.kind in ("block", "channel_block")
    )
    return max(sizes, default=1)


def check_append_only(scheme: QuantScheme) -> None:
    """Raise SchemeError, naming each part that sees later tokens, unless tokens can be appended to codes of this scheme."""
    found = []
    if scheme.balance != "none" and scheme.balance.scale == "dynamic":
        kind = scheme.balance.kind
        text = "takes its factors from all keys, later ones included; a cache takes calibrated ones"
        found.append(("balance", f"{kind} {text}: {{{kind}: {{scale: static}}}}"))
    if scheme.q.smooth == "block_mean":
        found.append(("q.smooth", "block_mean multiplies K in 16 bits, which a cache does not keep; use none"))
    if scheme.q.granularity.kind == "tensor" and scheme.q.scaled and scheme.q.scale == "dynamic":
        found.append(("q.granularity", "tensor spans the sequences of a batch, which come and go; use token or head"))
    for operand in (scheme.k, scheme.v):
        role, kind = operand.role, operand.granularity.kind
        if operand.smooth == "mean":
            text = "mean is over all tokens, later ones included; a cache takes static (a calibrated offset) or none"
            found.append((f"{role}.smooth", text))
        if operand.scaled and operand.scale == "dynamic" and kind in ("head", "channel", "tensor"):
            text = f"a dynamic scale a {kind} covers later tokens too; use scale: static, or granularity token, group or "
            found.append((f"{role}.granularity", text + ("channel_block" if kind == "channel" else "block")))
    page, together = windows(scheme).page, unit(scheme)
    if together > page:
        text = f"a page of {page} tokens does not hold a block of {together}; use page: {together}"
        found.append(
            ("cache.page", text if together <= 1024 else f"a block of {together} tokens does not fit a page; at most 1024")
        )
    if found:
        own = f"(scheme {scheme.name!r}; presets made for caches begin with kv-)"
        raise SchemeError([(place, f"{text} {own}") for place, text in found])
