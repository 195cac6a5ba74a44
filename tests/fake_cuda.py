"""A simulated GPU: tensors on `cuda` have shapes, types and devices, but no values.

Operations that mix devices fail as on a real GPU, as does a launch with a CPU tensor. Launches, and reads of values that would
wait for a GPU, are recorded.
"""

import ctypes
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import tokquant
from tokquant import inputs, operators
from tokquant.kernels import launch

PACKAGE = Path(tokquant.__file__).parent
PROPERTIES = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30)


@dataclass
class Seen:
    """A record of what happened."""

    launched: list[str] = field(default_factory=list)
    """Names of Triton kernels."""
    waits: list[str] = field(default_factory=list)
    """Files of the package that read a value from the GPU, which would wait for it."""
    computed: list[str] = field(default_factory=list)
    """Operations of torch that would launch a kernel of their own."""


class OnlyCuda(TorchDispatchMode):
    """Fakes operations on GPU tensors, and runs those on CPU tensors."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.fake, self.seen = FakeTensorMode(), seen

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        there = any(isinstance(x, FakeTensor) or (isinstance(x, torch.device) and x.type == "cuda") for x in leaves)
        if not there:
            return function(*args, **kwargs)
        if function is torch.ops.aten._local_scalar_dense.default:
            files = (Path(frame.filename) for frame in reversed(traceback.extract_stack()))
            self.seen.waits.append(next(str(file.relative_to(PACKAGE)) for file in files if file.is_relative_to(PACKAGE)))
            return False if args[0].dtype == torch.bool else 0
        if function.name().startswith("aten::") and not function.is_view and "empty" not in function.name():
            self.seen.computed.append(function.name())
        args, kwargs = tree_map_only(torch.Tensor, self.fake.from_tensor, (args, kwargs))
        with self.fake:
            return function(*args, **kwargs)


def guard_nothing() -> None:
    """Let torch switch to a CUDA device without doing anything: it would raise an error where there is no GPU."""
    libc10 = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 20).in_dll(libc10, "_ZN3c104impl26device_guard_impl_registryE")
    cuda, meta = 1, 14
    guards[cuda] = guards[meta]


@contextmanager
def fake_cuda(monkeypatch) -> Iterator[Seen]:
    """An H100 whose kernels do nothing."""
    from triton.runtime.jit import JITFunction

    seen = Seen()
    if not torch.cuda.is_available():
        guard_nothing()

    def run(self, *arguments, grid, warmup, **options):
        tensors = [x for x in tree_leaves(arguments) if isinstance(x, torch.Tensor)]
        assert {x.device.type for x in tensors} <= {"cuda"}, f"{self.__name__} is given tensors of a CPU"
        seen.launched.append(self.__name__)

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(launch, "aligned", lambda codes: True)  # the original asks for an address
    for module in (inputs, operators):  # fake tensors have no values, but the real ones that they stand for do
        monkeypatch.setattr(module, "without_numbers", lambda x: False)
    for name, answer in {
        "_lazy_init": None,
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "is_current_stream_capturing": False,
        "get_device_capability": (9, 0),
        "get_device_properties": PROPERTIES,
        "get_device_name": PROPERTIES.name,
        "device": nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *a, answer=answer, **k: answer)
    with OnlyCuda(seen):
        yield seen
