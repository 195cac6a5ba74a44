"""Logits of a language model beside exact ones: perplexity, divergence, agreement."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 128
"""Tokens per chunk, as a chunk's logits are copied to float32."""


@dataclass
class Agreement:
    """How well logits agree with exact ones, summed over the tokens added so far."""

    tokens: int = 0
    loss: float = 0.0
    divergence: float = 0.0
    same: int = 0
    exact_loss: float = 0.0

    def add(self, logits: Tensor, exact: Tensor, targets: Tensor) -> None:
        """Add tokens: logits and exact ones `[N, vocabulary]`, what came next `[N]`. Raises ValueError where shapes differ."""
        if logits.shape != exact.shape or logits.shape[:1] != targets.shape:
            shapes = ", ".join(str(list(x.shape)) for x in (logits, exact, targets))
            raise ValueError(f"logits, exact, targets: shapes {shapes} do not fit; give [N, vocabulary] twice, and [N]")
        for start in range(0, len(targets), ROWS):
            rows = slice(start, start + ROWS)
            log_q, log_p = (x[rows].float().log_softmax(dim=-1) for x in (logits, exact))
            self.loss -= log_q.gather(1, targets[rows, None]).sum(dtype=torch.float64).item()
            self.exact_loss -= log_p.gather(1, targets[rows, None]).sum(dtype=torch.float64).item()
            # a probability of zero takes no part, whatever the logarithm of the other
            terms = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q))
            self.divergence += terms.sum(dtype=torch.float64).item()
            self.same += int((log_q.argmax(dim=-1) == log_p.argmax(dim=-1)).sum())
        self.tokens += len(targets)

    @property
    def perplexity(self) -> float:
        """exp of the mean loss; infinite where that is beyond float64."""
        return _exp(self.loss / self.tokens)

    @property
    def exact_perplexity(self) -> float:
        """The perplexity of the exact logits on the same tokens."""
        return _exp(self.exact_loss / self.tokens)

    @property
    def kl(self) -> float:
        """Mean Kullback-Leibler divergence from the exact distribution, in nats a token."""
        return self.divergence / self.tokens

    @property
    def top1(self) -> float:
        """Share of tokens for which both predict the same next token."""
        return self.same / self.tokens


def _exp(mean: float) -> float:
    return math.exp(mean) if mean < 700 else math.inf
