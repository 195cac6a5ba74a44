"""Operators of torch.library that stand for public functions while torch.compile traces: opaque there, with known shapes.

A scheme is a preset's name or a YAML document, a bias its kind and its tensors, calibrated scales their names and tensors.
Eager calls go past all of this: an operator's dispatch takes longer than looking whether something traces.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor

from tokquant.bias import Bias
from tokquant.bias.kinds import KINDS
from tokquant.calibration.scales import LayerScales
from tokquant.errors import ScalesError, nearest, quote
from tokquant.inputs import check_no_grad, without_numbers
from tokquant.schemes import HeadSchemes, LayerScheme, QuantScheme, SchemeMap, of_layer, preset, preset_names
from tokquant.tensor import Coded

Function = TypeVar("Function", bound=Callable[..., Any])

LIBRARY = torch.library.Library("tokquant", "FRAGMENT")

OLD = torch.__version__ < "2.12"  # compared as versions
"""Whether torch.compile takes only objects of registered classes for constants."""
CODED = get_args(Coded)  # which torch 2.10 does not compare with as a union
if OLD:
    torch.utils._pytree.register_constant(QuantScheme)

FEATURES = (
    "bool causal=False, float? scale=None, str bias_kind='none', Tensor[]? bias=None, SymInt?[]? window=None, "
    "float? softcap=None, Tensor? sinks=None, str layer='', str[]? scale_names=None, Tensor[]? scales=None, "
    "str backend='auto', bool deterministic=False"
)


def tracing() -> bool:
    """Whether this call becomes part of a graph. (`torch.compiler.is_compiling` says so in all threads while one compiles.)"""
    return torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting()


def begin_with(name: str, error: Exception) -> None:
    """Put a layer's name in front of what an error says, once."""
    if tracing():  # which can change no error: it is raised uncompiled, or quoted with fullgraph=True
        torch._dynamo.graph_break(str(error.args[0]))
    if not str(error).startswith(name):
        error.args = (f"{name}: {error}",)


def operator(*more: str, tags: Sequence[torch.Tag] = ()) -> Callable[[Function], Function]:
    """Decorate a public function of q, k, v and a scheme: `torch.ops.tokquant.<its name>` stands for it where it is traced, and
    `<its name>_lse` where it is to return the LSE.

    Args:
        more: arguments beside `FEATURES`, as a schema writes them.
        tags: of the operators.
    """

    def of(function: Function) -> Function:
        name = function.__name__
        for lse in (False, True):
            returns, own = ("(Tensor, Tensor)", f"{name}_lse") if lse else ("Tensor", name)
            schema = f"(Tensor q, Tensor k, Tensor v, str scheme, *, {', '.join((*more, FEATURES))}) -> {returns}"
            LIBRARY.define(own + schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
            LIBRARY.impl(own, _running(function, lse), "CompositeExplicitAutograd")
            torch.library.register_fake(f"tokquant::{own}", _shaped(lse), lib=LIBRARY)
        plain, with_lse = getattr(torch.ops.tokquant, name), getattr(torch.ops.tokquant, f"{name}_lse")
        on_codes = untraced(f"{name} of QuantizedTensors")(function)

        @wraps(function)
        def door(*args: Any, **given: Any) -> Any:
            if not tracing():
                shapes = len(args) > 2 and all(isinstance(x, Tensor) and x.is_meta for x in args[:3])
                if not (shapes or torch.jit.is_tracing() or any(map(without_numbers, args[:3]))):
                    return function(*args, **given)
                for role, x in zip("qkv", args, strict=False):
                    check_no_grad(role, x)  # within torch.func an operator is not told
            if any(isinstance(x, CODED) for x in (*args, *given.values())):
                return on_codes(*args, **given)
            return (with_lse if given.pop("return_lse", False) else plain)(*args[:3], **_flat(*args[3:], **given))

        return door  # type: ignore[return-value]

    return of


def untraced(what: str) -> Callable[[Function], Function]:
    """Decorate what a graph ends at: torch.compile goes on behind it, and with fullgraph=True says that it is `what`."""

    def of(function: Function) -> Function:
        eager = torch._disable_dynamo(function)

        @wraps(function)
        def door(*args: Any, **given: Any) -> Any:
            if not tracing():
                return function(*args, **given)
            torch._dynamo.graph_break(f"tokquant: {what} is no operator; call it outside of what fullgraph=True compiles")
            return eager(*args, **given)

        return door  # type: ignore[return-value]

    return of


def _flat(
    scheme: object, *, layer: str | None = None, bias: Bias | None = None, scales: LayerScales | None = None, **rest: Any
) -> dict[str, Any]:
    """Arguments as an operator takes them."""
    if OLD and not isinstance(scheme, (str, QuantScheme)):
        raise TypeError(
            f"scheme: torch {torch.__version__} puts a QuantScheme, a preset's name or a path as str into a graph, but no "
            f"{type(scheme).__name__}; give one of those, or take torch 2.12 or newer"
        )
    if bias is not None:
        rest |= {"bias_kind": bias.kind, "bias": bias.tensors()}
    if scales is not None:
        if scales.scheme is None:
            raise ScalesError(
                "scales: LayerScales without a scheme; give them one, and they are checked once, when they are made"
            )
        rest |= {"scale_names": list(scales.tensors), "scales": list(scales.tensors.values())}
    named = layer if scales is None else scales.layer
    return {"scheme": document(scheme, named if layer is None else layer), "layer": named or "", **rest}


def _running(function: Callable, lse: bool) -> Callable:
    """What an operator does: the function itself."""

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scheme: str,
        *,
        bias_kind: str = "none",
        bias: list[Tensor] | None = None,
        layer: str = "",
        scale_names: list[str] | None = None,
        scales: list[Tensor] | None = None,
        **rest: Any,
    ) -> Any:
        made = of_document(scheme)
        whole = None
        try:
            if scales is not None:
                own = made if isinstance(made, QuantScheme) else None  # heads of different schemes take no scales, and say so
                whole = LayerScales.checked_before(layer, scale_names or [], scales, own)
            out = function(q, k, v, made, bias=bias_of(bias_kind, bias or []), scales=whole, return_lse=lse, **rest)
        except (ValueError, TypeError, RuntimeError) as error:
            begin_with(layer, error)
            raise
        return tuple(x.contiguous() for x in out) if lse else out.contiguous()

    return run


def _shaped(lse: bool) -> Callable:
    """What it returns, without numbers."""

    def shape(q: Tensor, k: Tensor, v: Tensor, scheme: str, *, bias: list[Tensor] | None = None, **rest: Any) -> Any:
        named = {"q": q, "k": k, "v": v, "mask": rest.get("mask"), "sinks": rest.get("sinks")}
        for name, x in (*named.items(), *(("bias", part) for part in bias or [])):
            check_no_grad(name, x)
        out = q.new_empty(q.shape)
        return (out, q.new_empty(q.shape[:-1], dtype=torch.float32)) if lse else out

    return shape


def document(scheme: object, layer: str | None = None) -> str:
    """A layer's scheme as an operator takes it. Raises SchemeError."""
    if isinstance(scheme, str) and scheme in preset_names():
        return scheme
    found = of_layer(scheme, layer)
    return (SchemeMap((("*", found),)) if isinstance(found, HeadSchemes) else found).to_yaml()


# as torch.compiler.assume_constant_result would, which imports the whole compiler: found once, again for another object
document._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=256)
def of_document(written: str) -> LayerScheme:
    """The scheme that `document` wrote. Raises SchemeError."""
    if ":" not in written:
        return preset(written)
    return of_layer(SchemeMap.from_yaml(written)) if "layers:" in written.splitlines() else QuantScheme.from_yaml(written)


def bias_of(kind: str, tensors: Sequence[Tensor]) -> Bias | None:
    """The bias of a kind that keeps these tensors. Raises ValueError."""
    if kind == "none" and not tensors:
        return None
    if kind not in KINDS:
        raise ValueError(f"bias_kind: {quote(kind)} is not valid; use one of none, {', '.join(KINDS)}{nearest(kind, KINDS)}")
    return KINDS[kind](*tensors)
