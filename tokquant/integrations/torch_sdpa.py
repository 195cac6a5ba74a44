"""`quantized_sdpa`: inside a `with` block, calls of torch's scaled_dot_product_attention are quantized, models unchanged."""

import inspect
import warnings
from functools import partial
from typing import Any, Literal, get_args

from torch import Tensor
from torch.nn.functional import multi_head_attention_forward
from torch.nn.functional import scaled_dot_product_attention as torch_attention
from torch.overrides import TorchFunctionMode

from tokquant.attention import Backend, Scheme, check_backend, check_scales, scheme_of
from tokquant.calibration.scales import LayerScales
from tokquant.calibration.watching import without_dispatch
from tokquant.errors import SchemeError, UnsupportedError, nearest, quote
from tokquant.inputs import check_no_grad
from tokquant.schemes import HeadSchemes, QuantScheme, SchemeMap, read
from tokquant.sdpa import scaled_dot_product_attention

Fallback = Literal["error", "warn", "silent"]
FALLBACKS = get_args(Fallback)
POSITIONS = ("query", "key", "value", "attn_mask")
MULTI_HEAD = inspect.signature(multi_head_attention_forward)


class quantized_sdpa(TorchFunctionMode):
    """Inside `with tokquant.quantized_sdpa("int8"):` every call of `torch.nn.functional.scaled_dot_product_attention` in this
    thread goes to `tokquant.scaled_dot_product_attention`, including those of nn.MultiheadAttention and
    nn.TransformerEncoderLayer.

    Blocks nest: a call goes to the inner one first, and what that leaves to torch goes to the outer one. The fused path of
    torch's encoder layers, which never calls that function, is disabled inside.

    Args:
        scheme, scales, backend: as for `tokquant.scaled_dot_product_attention`, for every call.
        fallback: what happens to a call that cannot be quantized: `error` raises and says why; `warn` runs it in torch and
            warns, once for each reason and place; `silent` runs it in torch.

    Raises: SchemeError, ScalesError and ValueError, when it is made, for arguments that no call could use.
    """

    def __init__(
        self,
        scheme: Scheme = "int8",
        *,
        scales: LayerScales | None = None,
        backend: Backend = "auto",
        fallback: Fallback = "error",
    ):
        super().__init__()
        if fallback not in FALLBACKS:
            raise ValueError(f"fallback: {quote(fallback)}; use one of {', '.join(FALLBACKS)}{nearest(fallback, FALLBACKS)}")
        given = scheme if isinstance(scheme, HeadSchemes) else read(scheme)
        if isinstance(given, SchemeMap) and given.only() is None and not isinstance(scales, LayerScales):
            raise SchemeError(
                f"scheme: {given.name!r} is a map of layers, which a block does not tell apart; give the scheme of one, "
                f"such as scheme[{given.layers[0][0]!r}]"
            )
        found, self.fallback = scheme_of(given, None, scales), fallback
        if isinstance(found, QuantScheme):
            check_scales(found, scales)
        check_backend(backend)
        self._quantized = partial(scaled_dot_product_attention, scheme=found, scales=scales, backend=backend)
        self._multi_head = without_dispatch(multi_head_attention_forward, scaled_dot_product_attention=self._attend)

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if function is torch_attention:
            return self._attend(*args, **kwargs)
        if function is multi_head_attention_forward:
            if MULTI_HEAD.bind(*args, **kwargs).arguments.get("need_weights", True):
                self._leave(
                    UnsupportedError("need_weights: True asks for probabilities, which no quantized kernel keeps; give False")
                )
            else:
                function = self._multi_head
        return function(*args, **kwargs)

    def _attend(self, *args: Any, **kwargs: Any) -> Tensor:
        try:
            for name, x in (*zip(POSITIONS, args, strict=False), *kwargs.items()):
                check_no_grad(name, x)
        except RuntimeError as error:
            self._leave(error)
            return torch_attention(*args, **kwargs)
        try:
            return self._quantized(*args, **kwargs)
        except (TypeError, ValueError, UnsupportedError) as error:
            self._leave(error)
            return torch_attention(*args, **kwargs)

    def _leave(self, error: Exception) -> None:
        """What `fallback` asks for before a call is left to torch: raise `error`, warn, or nothing."""
        if self.fallback == "error":
            raise error
        if self.fallback == "warn":
            # stacklevel points at the line that called torch
            warnings.warn(f"scaled_dot_product_attention is torch's here, not quantized: {error}", stacklevel=4)
