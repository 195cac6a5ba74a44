"""Intercepts the attention of any torch model: which module calls torch's attention, and with which tensors."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tokquant.autocast import cast_by_autocast
from tokquant.inputs import check_tensors

ATTENTION = torch.nn.functional.scaled_dot_product_attention
OF_MODULE = torch.nn.functional.multi_head_attention_forward


@contextmanager
def record(model: nn.Module) -> Iterator[dict[str, tuple[Tensor, Tensor, Tensor]]]:
    """Keep Q, K and V of the attention that modules of `model` run in this block, for `search`, or for `activations.save`.

    Yields a dictionary that is filled: a layer's name -> copies of its tensors `[B, H, N, D]` on the CPU. What is seen,
    and under which name, is as for `Calibrator.watch`. If a module runs several times, its first run is kept.

    Raises ValueError if no attention was seen by the end; TypeError or ValueError, with the layer's name, for tensors that
    `quantize` would refuse.
    """
    layers: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def keep(name: str, *operands: Tensor) -> None:
        q, k, v = (x.detach() for x in operands)
        check_tensors(q, k, v)
        if name not in layers:
            layers[name] = q.to("cpu", copy=True), k.to("cpu", copy=True), v.to("cpu", copy=True)

    with Watcher(model, keep).watching():
        yield layers


class LayerNames:
    """Names each attention that a module of `model` runs: by the innermost module, with `:2` for its second in one run.

    Only what runs in a block of `followed` is named.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.ran = False
        """Whether any module ran."""
        self._running: list[list] = []
        """Stack of the modules that are running, the innermost last: [name, attention calls so far]."""

    def of_modules(self) -> list[str]:
        """The name of each module: the model's own is that of its class."""
        return [name or type(self.model).__name__ for name, _ in self.model.named_modules()]

    def next(self) -> str | None:
        """The name of the attention that is run now, to be asked for once for each; None outside of the model."""
        if not self._running:
            return None
        innermost = self._running[-1]
        innermost[1] += 1
        name, times = innermost
        return name if times == 1 else f"{name}:{times}"

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Follow in this block which modules run."""
        with ExitStack() as stack:
            for name, (_, module) in zip(self.of_modules(), self.model.named_modules(), strict=True):
                for hook in self._hooks(module, name):
                    stack.callback(hook.remove)
            yield

    def _hooks(self, module: nn.Module, name: str) -> Iterator[Any]:
        def enter(*_: Any) -> None:
            self.ran = True
            self._running.append([name, 0])

        def leave(*_: Any) -> None:
            self._running.pop()

        yield module.register_forward_pre_hook(enter)
        # always_call: also where the module raises and its caller goes on
        yield module.register_forward_hook(leave, always_call=True)


class Watcher(TorchFunctionMode):
    """Calls `observe` with the name, q, k and v of each attention that a module of `model` runs."""

    def __init__(self, model: nn.Module, observe: Callable[[str, Tensor, Tensor, Tensor], None]):
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: a {type(model).__name__}; give a torch.nn.Module, or q, k and v to observe()")
        self.layers, self.observe = LayerNames(model), observe
        self.seen = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch in this block. Raises ValueError at its end if no attention was seen."""
        with self.layers.followed(), self:
            yield
        if not self.seen:
            raise ValueError(
                "watch: "
                + ("no torch scaled_dot_product_attention was seen" if self.layers.ran else "the model did not run")
                + "; run it in the block, uncompiled, with attention that goes through torch's (transformers: "
                "attn_implementation='sdpa'; diffusers: reset_attention_backend(); nn.MultiheadAttention: need_weights=False), "
                "or give q, k and v to observe()"
            )

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is OF_MODULE:
            with self:
                return without_dispatch(func)(*args, **kwargs)
        out = func(*args, **kwargs)
        if func is ATTENTION and (name := self.layers.next()):
            self._attended(name, *cast_by_autocast(*_operands(*args, **kwargs)))
        return out

    def _attended(self, name: str, q: Tensor, k: Tensor, v: Tensor) -> None:
        try:
            self.observe(name, q, k, v)
        except (ValueError, TypeError) as error:
            raise error if str(error).startswith(f"{name}.") else type(error)(f"{name}: {error}") from None
        self.seen = True


def _operands(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query, key, value


def without_dispatch(function: Callable, **changed: Any) -> FunctionType:
    """A copy of a function of torch that is not dispatched to modes, with some of its globals `changed`. Torch is left alone.

    Torch turns a mode off while the mode handles a function. Calling this copy with the mode on again lets the mode see what
    the function calls, without being handed the function itself again and again.
    """
    assert isinstance(function, FunctionType)
    names = {**function.__globals__, "has_torch_function": lambda _: False, **changed}
    made = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made
