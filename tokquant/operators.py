"""Custom operators of torch.library that replace public functions while torch.compile traces. They are opaque to the compiler.

Operators take strings, numbers and tensors: a scheme as a preset's name or a YAML document, a bias as its kind and tensors,
calibrated scales as their names and tensors. Eager calls bypass the operators, since dispatching one takes longer than checking
whether something traces.
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

OLD = torch.__version__ < "2.12"  # a TorchVersion, compared as a version
"""Whether torch.compile accepts only objects of registered classes as constants."""
CODED = get_args(Coded)  # a tuple, as torch 2.10 cannot trace isinstance with a union
if OLD:
    torch.utils._pytree.register_constant(QuantScheme)

FEATURES = (
    "bool causal=False, float? scale=None, str bias_kind='none', Tensor[]? bias=None, SymInt?[]? window=None, "
    "float? softcap=None, Tensor? sinks=None, str layer='', str[]? scale_names=None, Tensor[]? scales=None, "
    "str backend='auto', bool deterministic=False"
)


def tracing() -> bool:
    """Whether this call is being traced. (`torch.compiler.is_compiling` is true in all threads while one of them compiles.)"""
    return torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting()


def begin_with(name: str, error: Exception) -> None:
    """Prefix an error's message with a layer's name, unless it has this prefix."""
    if tracing():  # a graph cannot change an error: after the break it is raised eagerly, or quoted with fullgraph=True
        torch._dynamo.graph_break(str(error.args[0]))
    if not str(error).startswith(name):
        error.args = (f"{name}: {error}",)


def operator(*more: str, tags: Sequence[torch.Tag] = ()) -> Callable[[Function], Function]:
    """Decorate a public function of q, k, v and a scheme, so that a traced call becomes `torch.ops.tokquant.<its name>`, or
    `<its name>_lse` if it returns the LSE.

    Args:
        more: arguments in addition to `FEATURES`, in the syntax of an operator schema.
        tags: tags of the operators.
    """

    def decorate(function: Function) -> Function:
        name = function.__name__
        for lse in (False, True):
            returns, operator_name = ("(Tensor, Tensor)", f"{name}_lse") if lse else ("Tensor", name)
            schema = f"(Tensor q, Tensor k, Tensor v, str scheme, *, {', '.join((*more, FEATURES))}) -> {returns}"
            LIBRARY.define(operator_name + schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
            LIBRARY.impl(operator_name, _implementation(function, lse), "CompositeExplicitAutograd")
            torch.library.register_fake(f"tokquant::{operator_name}", _fake_implementation(lse), lib=LIBRARY)
        plain, with_lse = getattr(torch.ops.tokquant, name), getattr(torch.ops.tokquant, f"{name}_lse")
        on_codes = untraced(f"{name} of QuantizedTensors")(function)

        @wraps(function)
        def wrapper(*args: Any, **given: Any) -> Any:
            if not tracing():
                on_meta = len(args) > 2 and all(isinstance(x, Tensor) and x.is_meta for x in args[:3])
                if not (on_meta or torch.jit.is_tracing() or any(map(without_numbers, args[:3]))):
                    return function(*args, **given)
                for role, x in zip("qkv", args, strict=False):
                    check_no_grad(role, x)  # an operator called within torch.func cannot see requires_grad
            if any(isinstance(x, CODED) for x in (*args, *given.values())):
                return on_codes(*args, **given)
            return (with_lse if given.pop("return_lse", False) else plain)(*args[:3], **_operator_arguments(*args[3:], **given))

        return wrapper  # type: ignore[return-value]

    return decorate


def untraced(what: str) -> Callable[[Function], Function]:
    """Decorate a function that breaks the graph of torch.compile. With fullgraph=True the error names it as `what`."""

    def decorate(function: Function) -> Function:
        eager = torch._disable_dynamo(function)

        @wraps(function)
        def wrapper(*args: Any, **given: Any) -> Any:
            if not tracing():
                return function(*args, **given)
            torch._dynamo.graph_break(f"tokquant: {what} is no operator; call it outside of what fullgraph=True compiles")
            return eager(*args, **given)

        return wrapper  # type: ignore[return-value]

    return decorate


def _operator_arguments(
    scheme: object, *, layer: str | None = None, bias: Bias | None = None, scales: LayerScales | None = None, **rest: Any
) -> dict[str, Any]:
    """The arguments of the operator for the arguments of the public function, by name."""
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
    layer_name = layer if scales is None else scales.layer
    return {"scheme": document(scheme, layer_name if layer is None else layer), "layer": layer_name or "", **rest}


def _implementation(function: Callable, lse: bool) -> Callable:
    """The operator's implementation: decodes its arguments and calls the public function."""

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
        resolved = of_document(scheme)
        layer_scales = None
        try:
            if scales is not None:
                # HeadSchemes take no scales, and `function` raises for them
                checked_for = resolved if isinstance(resolved, QuantScheme) else None
                layer_scales = LayerScales.checked_before(layer, scale_names or [], scales, checked_for)
            out = function(q, k, v, resolved, bias=bias_of(bias_kind, bias or []), scales=layer_scales, return_lse=lse, **rest)
        except (ValueError, TypeError, RuntimeError) as error:
            begin_with(layer, error)
            raise
        return tuple(x.contiguous() for x in out) if lse else out.contiguous()

    return run


def _fake_implementation(lse: bool) -> Callable:
    """The operator's fake implementation: empty outputs of the right shapes."""

    def shape(q: Tensor, k: Tensor, v: Tensor, scheme: str, *, bias: list[Tensor] | None = None, **rest: Any) -> Any:
        named = {"q": q, "k": k, "v": v, "mask": rest.get("mask"), "sinks": rest.get("sinks")}
        for name, x in (*named.items(), *(("bias", part) for part in bias or [])):
            check_no_grad(name, x)
        out = q.new_empty(q.shape)
        return (out, q.new_empty(q.shape[:-1], dtype=torch.float32)) if lse else out

    return shape


def document(scheme: object, layer: str | None = None) -> str:
    """A layer's scheme as a string: a preset's name or a YAML document. Raises SchemeError."""
    if isinstance(scheme, str) and scheme in preset_names():
        return scheme
    resolved = of_layer(scheme, layer)
    return (SchemeMap((("*", resolved),)) if isinstance(resolved, HeadSchemes) else resolved).to_yaml()


# the mark that torch.compiler.assume_constant_result sets, which would import the whole compiler: while tracing, `document` is
# evaluated once for each scheme object
document._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=256)
def of_document(written: str) -> LayerScheme:
    """The inverse of `document`. Raises SchemeError."""
    if ":" not in written:
        return preset(written)
    return of_layer(SchemeMap.from_yaml(written)) if "layers:" in written.splitlines() else QuantScheme.from_yaml(written)


def bias_of(kind: str, tensors: Sequence[Tensor]) -> Bias | None:
    """The bias of this kind made of its tensors; None for `none`. Raises ValueError."""
    if kind == "none" and not tensors:
        return None
    if kind not in KINDS:
        raise ValueError(f"bias_kind: {quote(kind)} is not valid; use one of none, {', '.join(KINDS)}{nearest(kind, KINDS)}")
    return KINDS[kind](*tensors)
