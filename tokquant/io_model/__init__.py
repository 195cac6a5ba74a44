"""The I/O of attention: the exact bytes of a kernel's loads and stores, and lower bounds for every algorithm.

The bounds are those of Saha and Ye, "The I/O Complexity of Attention, or How Optimal is Flash Attention?" (arXiv 2402.07443),
with constants, and with operands of different widths.
"""

from tokquant.io_model.bounds import Bounds, Problem, lower_bounds, problem
from tokquant.io_model.counter import Launch, counting
from tokquant.io_model.report import Standing, bytes_per_score, launches, standing
from tokquant.io_model.traffic import Traffic, traffic
from tokquant.io_model.workload import Pairs, Workload

__all__ = [
    "Bounds",
    "Launch",
    "Pairs",
    "Problem",
    "Standing",
    "Traffic",
    "Workload",
    "bytes_per_score",
    "counting",
    "launches",
    "lower_bounds",
    "problem",
    "standing",
    "traffic",
]
