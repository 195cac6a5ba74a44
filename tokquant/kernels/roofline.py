"""What a kernel's main loop should take, from its instructions and the rates of its target: a model, not a measurement."""

from dataclasses import dataclass

from tokquant.kernels.candidates import Config, Loop
from tokquant.kernels.plan import Plan
from tokquant.kernels.resources import Resources
from tokquant.kernels.targets import Target
from tokquant.schemes import QuantScheme

RATES = {"tl.int8": "int8", "tl.float8e4nv": "fp8", "tl.float8e5": "fp8", "tl.float32": "fp32"}


@dataclass(frozen=True)
class Prediction:
    """Clocks of one multiprocessor for a score, and what they come to on the target's card."""

    products: float
    """Of its tensor cores, for Q K^T and P V."""
    beside: float
    """Those of them that run beside a softmax: P V in the loop for Hopper, else none."""
    exponentials: float
    instructions: float
    """Of its schedulers, for all there is in the loop."""
    roofline_tops: float
    """If products and exponentials overlapped, and nothing else took time. 1e12 multiplications and additions a second."""
    serial_tops: float
    """If a tile's softmax waits for its products and they for it, which is how Triton arranges one block; in the loop for
    Hopper, for Q K^T alone."""
    card: str

    def clocks(self, more: float = 0.0) -> float:
        """For a score, with so many clocks of further instructions: products, then softmax and what runs beside it."""
        return _clocks(self.products, self.beside, max(self.exponentials, self.instructions + more))

    @property
    def share(self) -> float:
        """Of the roofline that the serial prediction reaches."""
        return self.serial_tops / self.roofline_tops


def predict(resources: Resources, plan: Plan, head_dim: int, target: Target, loop: Loop = "portable") -> Prediction:
    """The model for whole key tiles of long sequences. Spills and memory are not in it."""
    first, _, _, second = plan.products
    scores, sums = (2 * head_dim / target.rates[RATES.get(kind, "fp16")] for kind in (first, second))
    exponentials = 1 / target.exponentials

    def tops(clocks: float) -> float:
        return 4 * head_dim / clocks * target.multiprocessors * target.gigahertz / 1e3

    products, beside = scores + sums, sums if loop == "hopper" else 0.0
    instructions = resources.instructions_per_score / target.issued
    return Prediction(
        products=products,
        beside=beside,
        exponentials=exponentials,
        instructions=instructions,
        roofline_tops=tops(max(products, exponentials)),
        serial_tops=tops(_clocks(products, beside, max(exponentials, instructions))),
        card=target.card,
    )


def _clocks(products: float, beside: float, softmax: float) -> float:
    return products - beside + max(beside, softmax)


@dataclass(frozen=True)
class Bandwidth:
    """How fast a decoding kernel should go through keys and values, on the target's card; 1e12 bytes a second."""

    instructions_per_value: float
    """Instructions of a thread in the loop over whole tiles for each value of K and V."""
    bits_per_value: float
    """Of codes, scales and zeros."""
    issued: float
    """What the schedulers' rate allows."""
    memory: float
    """What the card's memory allows, by its datasheet."""
    card: str

    @property
    def predicted(self) -> float:
        """The smaller of the two."""
        return min(self.issued, self.memory)


def bandwidth(resources: Resources, scheme: QuantScheme, config: Config, head_dim: int, target: Target) -> Bandwidth:
    """The model for long sequences: instructions against memory, nothing else. Latencies and spills are not in it."""
    bits = scheme.bits_per_value(head_dim)
    # a tile's scores come from as many keys, and as many values, of head_dim channels
    instructions = resources.instructions_per_score * config.block_m / (2 * head_dim)
    a_value = (bits["k"] + bits["v"]) / 2
    values = target.multiprocessors * target.gigahertz * target.issued / instructions / 1e3  # 1e12 a second
    return Bandwidth(
        instructions_per_value=instructions,
        bits_per_value=a_value,
        issued=values * a_value / 8,
        memory=target.terabytes,
        card=target.card,
    )
