"""CUDA graphs without a GPU: launches are recorded instead of run, and run on the same memory at each replay."""

from contextlib import contextmanager
from importlib import import_module

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction


class Graph(TorchDispatchMode):
    """A recorded sequence of kernels, for Triton's interpreter, and of torch's operations."""

    def __init__(self):
        super().__init__()
        self.steps = []

    @contextmanager
    def capture(self, monkeypatch):
        """Record everything that is called inside; nothing is computed before a replay."""
        run = InterpretedFunction.run
        with monkeypatch.context() as patch, self:
            for name in ("decode", "kernels.pages", "reservation", "sequences", "transfer"):
                patch.setattr(import_module(f"tokquant.{name}"), "capturing", lambda device: True)
            patch.setattr(InterpretedFunction, "run", lambda *a, **given: self.steps.append(lambda: run(*a, **given)))
            yield

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "equal"), f"{name} waits for a GPU, which ends a capture"
        if function.is_view or name.startswith(("empty", "new_empty")):
            return function(*args, **kwargs)
        written = [x for x, of in zip(args, function._schema.arguments, strict=False) if of.is_write] + [kwargs.get("out")]
        if written[0] is not None:
            self.steps.append(lambda: function(*args, **kwargs))
            return written[0]
        made = function(*args, **kwargs)

        def again():
            for x, computed in zip(tree_leaves(made), tree_leaves(function(*args, **kwargs)), strict=True):
                x.copy_(computed)

        self.steps.append(again)
        return made

    def replay(self):
        for step in self.steps:
            step()
