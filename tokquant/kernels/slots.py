"""Attention to the 16-bit tokens of a KV cache by a Triton kernel."""

from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from tokquant.features import Features
from tokquant.kernels import launch
from tokquant.schemes import QuantScheme
from tokquant.slots import Slots, attention_to_nothing
from tokquant.tensor import QuantizedTensor
from tokquant.transfer import to_device


class TritonSlots(Slots):
    """Slots in plain tensors. One kernel attends to them and merges the result; P is rounded to the cache's type."""

    def attention(
        self, q: Tensor, mask: np.ndarray, features: Features, onto: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        launch.check(q.device, features)
        out, lse = onto or attention_to_nothing(q)
        k, v = self.k, self.v
        if launch.interpreted() and q.dtype == torch.bfloat16:
            q, k, v = q.float(), k.float(), v.float()  # the interpreter computes bf16 products wrongly
        shape = q.shape
        if shape[2] == 1:
            # heads that share a head of K see the same keys: as queries of one head, they read it once
            shape = torch.Size((shape[0], self.heads, shape[1] // self.heads, shape[3]))
        scheme = unquantized(q.dtype)
        qq, kq, vq = (
            QuantizedTensor(codes=x, scale=None, spec=spec, scheme=scheme, shape=x.shape, dtype=q.dtype)
            for x, spec in ((q.reshape(shape), scheme.q), (k, scheme.k), (v, scheme.v))
        )
        expanded = to_device(mask, q.device).expand(*shape[:3], self.count)
        masked = replace(features, causal=False, window=None, mask=expanded)
        views = out.view(shape), lse.view(shape[:3])
        launch.prepare(qq, kq, vq, scheme, masked, True, deterministic=True, onto=views).run()
        return out, lse


@lru_cache
def unquantized(dtype: torch.dtype, p: str | None = None) -> QuantScheme:
    """A scheme that keeps Q, K and V in the tensors' type, and P too unless a precision is given. Its key tile is 64."""
    precision = "fp32" if dtype == torch.float32 else "fp16"
    operands = {role: {"precision": precision} for role in "qkv"}
    return QuantScheme(name="windows", **operands, p={"precision": p or precision, "granularity": {"row_block": 64}})  # type: ignore[arg-type]
