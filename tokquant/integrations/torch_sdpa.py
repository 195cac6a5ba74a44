"""`quantized_sdpa`: inside a `with` block, calls of torch's scaled_dot_product_attention are quantized, models unchanged."""

import inspect
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import multi_head_attention_forward
from torch.nn.functional import scaled_dot_product_attention as torch_attention
from torch.overrides import TorchFunctionMode

from tokquant.attention import Backend, Scheme, check_backend, check_scales, scheme_of
from tokquant.calibration.scales import LayerScales, Scales
from tokquant.calibration.watching import without_dispatch
from tokquant.errors import SchemeError, UnsupportedError, nearest, quote
from tokquant.inputs import check_no_grad
from tokquant.integrations.layers import scheme_of_layers
from tokquant.integrations.modules import ModuleSchemes, SchemeAndScales
from tokquant.schemes import QuantScheme, SchemeMap
from tokquant.sdpa import scaled_dot_product_attention

Fallback = Literal["error", "warn", "silent"]
FALLBACKS = get_args(Fallback)
POSITIONS = ("query", "key", "value", "attn_mask")
MULTI_HEAD = inspect.signature(multi_head_attention_forward)
UNDISPATCHED = without_dispatch(multi_head_attention_forward)


class quantized_sdpa:
    """Inside `with tokquant.quantized_sdpa("int8"):` every call of `torch.nn.functional.scaled_dot_product_attention` in this
    thread goes to `tokquant.scaled_dot_product_attention`, including those of nn.MultiheadAttention and
    nn.TransformerEncoderLayer.

    Blocks nest: a call goes to the inner one first, and what that leaves to torch goes to the outer one. The fused path of
    torch's encoder layers, which never calls that function, is disabled inside, in all threads.

    Args:
        scheme, scales, backend: as for `tokquant.scaled_dot_product_attention`, for every call.
        model: the model that will run, for a SchemeMap of its layers, and for static schemes with the Scales of its layers.
            Layers have the names that `Calibrator.watch` and `record` give them. A call outside of its modules cannot be
            quantized. Only one thread may run the model in the block.
        fallback: what happens to a call that cannot be quantized: `error` raises and says why; `warn` runs it in torch and
            warns, once for each reason and place; `silent` runs it in torch.

    Raises: SchemeError, ScalesError and ValueError, when it is made, for arguments that no call could use.
    """

    def __init__(
        self,
        scheme: Scheme = "int8",
        *,
        scales: LayerScales | Scales | None = None,
        model: nn.Module | None = None,
        backend: Backend = "auto",
        fallback: Fallback = "error",
    ):
        if fallback not in FALLBACKS:
            raise ValueError(f"fallback: {quote(fallback)}; use one of {', '.join(FALLBACKS)}{nearest(fallback, FALLBACKS)}")
        check_backend(backend)
        self._modules = None if model is None else ModuleSchemes(model, scheme_of_layers(scheme), scales)
        same = _of_every_call(scheme, scales) if self._modules is None else None
        self._mode = _Mode(same, self._modules, backend, fallback)
        self._entered: list[ExitStack] = []

    def __enter__(self) -> "quantized_sdpa":
        with ExitStack() as stack:
            if self._modules is not None:
                stack.enter_context(self._modules.names.followed())
            stack.enter_context(_without_fused_layers())
            stack.enter_context(self._mode)
            self._entered.append(stack.pop_all())
        return self

    def __exit__(self, *raised: Any) -> None:
        self._entered.pop().close()


class _Fused:
    """Whether torch may take its fused encoder layers: what was set before the first of all blocks, which threads share."""

    lock = threading.Lock()
    blocks = 0
    before = True


@contextmanager
def _without_fused_layers() -> Iterator[None]:
    """Turn the fused path of torch's encoder layers off: those that are compiled do not look whether there is a mode."""
    with _Fused.lock:
        if not _Fused.blocks:
            _Fused.before = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
        _Fused.blocks += 1
    try:
        yield
    finally:
        with _Fused.lock:
            _Fused.blocks -= 1
            if not _Fused.blocks:
                torch.backends.mha.set_fastpath_enabled(_Fused.before)


class _Mode(TorchFunctionMode):
    """Handles calls of torch's attention: with `same` scheme and scales, or with those of each of `modules`."""

    def __init__(self, same: SchemeAndScales | None, modules: ModuleSchemes | None, backend: Backend, fallback: Fallback):
        super().__init__()
        self._same, self._modules, self._backend, self._fallback = same, modules, backend, fallback

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if function is torch_attention:
            return self._attend(*args, **kwargs)
        if function is multi_head_attention_forward:
            if not MULTI_HEAD.bind(*args, **kwargs).arguments.get("need_weights", True):
                with self:
                    return UNDISPATCHED(*args, **kwargs)
            self._leave(
                UnsupportedError("need_weights: True asks for probabilities, which no quantized kernel keeps; give False")
            )
        return function(*args, **kwargs)

    def _attend(self, *args: Any, **kwargs: Any) -> Tensor:
        layer = None if self._modules is None else self._modules.names.next()  # counted, even if torch runs the call
        try:
            for name, x in (*zip(POSITIONS, args, strict=False), *kwargs.items()):
                check_no_grad(name, x)
        except RuntimeError as error:
            self._leave(error)
            return torch_attention(*args, **kwargs)
        try:
            scheme, scales = self._same or self._modules.of(layer)  # type: ignore[union-attr]
            return scaled_dot_product_attention(*args, **kwargs, scheme=scheme, scales=scales, backend=self._backend)
        except (TypeError, ValueError, UnsupportedError) as error:
            self._leave(error)
            return torch_attention(*args, **kwargs)

    def _leave(self, error: Exception) -> None:
        """What `fallback` asks for before a call is left to torch: raise `error`, warn, or nothing."""
        if self._fallback == "error":
            raise error
        if self._fallback == "warn":
            # stacklevel points at the line that called torch
            warnings.warn(f"scaled_dot_product_attention is torch's here, not quantized: {error}", stacklevel=4)


def _of_every_call(scheme: Scheme, scales: LayerScales | Scales | None) -> SchemeAndScales:
    """What every call takes where layers are not told apart. Raises SchemeError, TypeError or ScalesError."""
    given, untold = scheme_of_layers(scheme), "which a block tells apart if it is given model=; give that, or"
    if isinstance(scales, Scales):
        raise TypeError(f"scales: these are of {len(scales)} layers, {untold} one, such as scales[{next(iter(scales))!r}]")
    if isinstance(given, SchemeMap) and given.only() is None and scales is None:
        one = f"the scheme of one layer, such as scheme[{given.layers[0][0]!r}]"
        raise SchemeError(f"scheme: {given.name!r} is a map of layers, {untold} {one}")
    found = scheme_of(given, None, scales)
    if isinstance(found, QuantScheme):
        check_scales(found, scales)
    return found, scales
