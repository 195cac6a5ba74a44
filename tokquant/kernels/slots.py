"""The 16-bit tokens of a KV cache, attended to by a Triton kernel."""

from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from tokquant.features import Features
from tokquant.kernels import launch
from tokquant.schemes import QuantScheme
from tokquant.slots import Slots, nothing
from tokquant.tensor import QuantizedTensor
from tokquant.transfer import to_device


class TritonSlots(Slots):
    """Slots as they come. One kernel attends to them and merges; P is rounded to the cache's type."""

    def attention(
        self, q: Tensor, attends: np.ndarray, features: Features, before: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        launch.check(q.device, features)
        out, lse = before or nothing(q)
        k, v = self.k, self.v
        if launch.interpreted() and q.dtype == torch.bfloat16:
            q, k, v = q.float(), k.float(), v.float()  # whose bf16 products are wrong
        shape = q.shape
        if shape[2] == 1:
            # heads that share a head of K see the same, and are read with it as queries of one head
            shape = torch.Size((shape[0], self.heads, shape[1] // self.heads, shape[3]))
        scheme = of_type(q.dtype)
        qq, kq, vq = (
            QuantizedTensor(codes=x, scale=None, spec=spec, scheme=scheme, shape=x.shape, dtype=q.dtype)
            for x, spec in ((q.reshape(shape), scheme.q), (k, scheme.k), (v, scheme.v))
        )
        mask = to_device(attends, q.device).expand(*shape[:3], self.count)
        seen = replace(features, causal=False, window=None, mask=mask)
        onto = out.view(shape), lse.view(shape[:3])
        launch.prepare(qq, kq, vq, scheme, seen, True, deterministic=True, onto=onto).run()
        return out, lse


@lru_cache
def of_type(dtype: torch.dtype, p: str | None = None) -> QuantScheme:
    """Everything in the tensors' own type, but for P if another is named; panels of V for a CPU have 64 tokens."""
    own = "fp32" if dtype == torch.float32 else "fp16"
    operands = {role: {"precision": own} for role in "qkv"}
    return QuantScheme(name="windows", **operands, p={"precision": p or own, "granularity": {"row_block": 64}})  # type: ignore[arg-type]
