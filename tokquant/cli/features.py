"""Command line options for the features of attention, as arguments of `tq.compile` and as random tensors to time."""

from dataclasses import dataclass
from typing import Annotated, Any, get_args

import torch
import typer
from torch import Tensor

from tokquant import bias as biases
from tokquant.errors import nearest, quote
from tokquant.io_model.workload import Workload
from tokquant.kernels.wanted import BiasKind, MaskKind
from tokquant.tuning.work import Step

Window = Annotated[
    int | None,
    typer.Option("--window", min=0, help="Keys that a query sees before its own position, and after it unless --causal."),
]
Softcap = Annotated[float | None, typer.Option("--softcap", help="Scores are softcap * tanh(score / softcap).")]
Mask = Annotated[str, typer.Option("--mask", metavar="<str>", help=f"One of {', '.join(get_args(MaskKind))}.")]
Bias = Annotated[str, typer.Option("--bias", metavar="<str>", help=f"One of {', '.join(get_args(BiasKind))}.")]
BiasRank = Annotated[int, typer.Option("--bias-rank", min=1, help="Rank of a low-rank bias.")]
Sinks = Annotated[bool, typer.Option("--sinks", help="Attention sinks: one more logit per head in the softmax.")]
Lse = Annotated[bool, typer.Option("--lse", help="Return the log-sum-exp as a second output.")]
Varlen = Annotated[bool, typer.Option("--varlen", help="Sequences of different lengths, one after another.")]
Decode = Annotated[bool, typer.Option("--decode", help="The kernel that reads a KV cache, for one new token.")]
SharedHeads = Annotated[int, typer.Option("--shared-heads", min=1, help="Heads of Q for each head of K and V.")]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The features that the options ask for. Raises ValueError for an unknown kind, or a softcap that is not above zero."""

    causal: bool
    window: int | None
    softcap: float | None
    mask: str
    bias: str
    bias_rank: int
    sinks: bool
    lse: bool

    def __post_init__(self) -> None:
        for name, kinds in (("mask", get_args(MaskKind)), ("bias", get_args(BiasKind))):
            given = getattr(self, name)
            if given not in kinds:
                raise ValueError(f"--{name}: {quote(given)} is not valid; use {', '.join(kinds)}{nearest(given, kinds)}")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"--softcap: {self.softcap} is not above zero; leave it out for none")

    @property
    def reach(self) -> tuple[int | None, int | None] | None:
        """The window as `tq.attention` takes it."""
        return None if self.window is None else (self.window, 0 if self.causal else self.window)

    def flags(self) -> dict[str, Any]:
        """Arguments of `tq.compile`."""
        return dict(
            causal=self.causal,
            window=self.window is not None,
            softcap=self.softcap is not None,
            mask=self.mask,
            bias=self.bias,
            bias_rank=self.bias_rank,
            sinks=self.sinks,
            return_lse=self.lse,
        )

    def workload(self, batch: int, heads: int, n_q: int, n_k: int) -> Workload:
        """The I/O model's workload for a call of these sizes."""
        return Workload(batch=batch, heads=heads, n_q=n_q, n_k=n_k, window=self.reach or (None, None))

    def step(self, batch: int, heads: int, queries: int, keys: int) -> Step:
        """The planner's description of a decoding step of these sizes."""
        return Step(batch=batch, heads=heads, queries=queries, keys=keys, left=self.window)

    def of_cache(self) -> dict[str, Any]:
        """Arguments of `tq.tune_decode`. Raises ValueError for options that do not apply to its kernels."""
        for name, default, reason in (
            ("mask", "none", "kernels that read a cache have none"),
            ("bias", "none", "kernels that read a cache have none"),
            ("sinks", False, "they make no other kernel of a cache"),
            ("lse", False, "kernels that read a cache have it in any case"),
        ):
            if getattr(self, name) != default:
                raise ValueError(f"--{name}: {reason}; leave it out")
        return dict(softcap=self.softcap, window=None if self.window is None else (self.window, 0))

    def tensors(self, q: Tensor, k: Tensor) -> dict[str, Any]:
        """Arguments of `tq.tune` for these q and k, with random tensors. Heads share a mask and a dense bias."""
        (_, heads, n_q, _), n_k, device = q.shape, k.shape[2], q.device
        arguments: dict[str, Any] = dict(causal=self.causal, window=self.reach, softcap=self.softcap, return_lse=self.lse)
        if self.mask != "none":
            values = torch.rand(1, 1, n_q, n_k, dtype=q.dtype, device=device)
            arguments["mask"] = values > 0.1 if self.mask == "boolean" else values
        if self.sinks:
            arguments["sinks"] = torch.zeros(heads, device=device)
        match self.bias:
            case "alibi":
                arguments["bias"] = biases.alibi(biases.alibi_slopes(heads, device))
            case "key_vector":
                arguments["bias"] = biases.key_vector(torch.randn(1, heads, n_k, device=device))
            case "lowrank":
                factor_type = torch.float16 if q.dtype == torch.float32 else q.dtype
                factors = (torch.randn(1, heads, n, self.bias_rank, dtype=factor_type, device=device) for n in (n_q, n_k))
                arguments["bias"] = biases.lowrank(*factors)
            case "dense":
                arguments["bias"] = biases.dense(torch.randn(1, 1, n_q, n_k, dtype=q.dtype, device=device))
        return arguments
