"""A roofline model of a kernel's main loop, from its instructions and its target's rates: predictions, not measurements."""

from dataclasses import dataclass

from tokquant.kernels.candidates import Config, Loop
from tokquant.kernels.plan import Plan
from tokquant.kernels.resources import Resources
from tokquant.kernels.targets import Target
from tokquant.schemes import QuantScheme

RATES = {"tl.int8": "int8", "tl.float8e4nv": "fp8", "tl.float8e5": "fp8", "tl.float32": "fp32"}


@dataclass(frozen=True)
class Prediction:
    """Predicted clocks of one multiprocessor per score, and the resulting throughput of the target's card."""

    products: float
    """Clocks of the tensor cores, for Q K^T and P V."""
    beside: float
    """The part of `products` that overlaps with the softmax: P V in the loop for Hopper, else none."""
    exponentials: float
    """Clocks of the units that compute exponentials."""
    instructions: float
    """Clocks in which the schedulers issue all instructions of the loop."""
    roofline_tops: float
    """If products and exponentials overlapped, and nothing else took time. 1e12 multiplications and additions a second."""
    serial_tops: float
    """If products and softmax of a tile wait for each other, as Triton schedules one block; in the loop for Hopper only Q K^T
    and softmax do."""
    card: str

    def clocks(self, more: float = 0.0) -> float:
        """Clocks per score, with `more` clocks of further instructions: products, then softmax with what overlaps it."""
        return _clocks(self.products, self.beside, max(self.exponentials, self.instructions + more))

    @property
    def share(self) -> float:
        """The serial prediction as a share of the roofline."""
        return self.serial_tops / self.roofline_tops


def predict(resources: Resources, plan: Plan, head_dim: int, target: Target, loop: Loop = "portable") -> Prediction:
    """Predict the main loop on whole key tiles of long sequences. Spills and memory traffic are not modelled."""
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
    """Predicted bandwidth at which a decoding kernel reads keys and values on the target's card, 1e12 bytes a second."""

    instructions_per_value: float
    """Instructions of a thread in the main loop for each value of K and V."""
    bits_per_value: float
    """Bits of codes, scales and zeros per value of K and V."""
    issued: float
    """The limit by the schedulers' rate of instructions."""
    memory: float
    """The limit by the card's memory, from its datasheet."""
    card: str

    @property
    def predicted(self) -> float:
        """The lower of the two limits."""
        return min(self.issued, self.memory)


def bandwidth(resources: Resources, scheme: QuantScheme, config: Config, head_dim: int, target: Target) -> Bandwidth:
    """Predict decoding of long sequences, limited by instructions or by memory. Latencies and spills are not modelled."""
    bits = scheme.bits_per_value(head_dim)
    # a key and its value, of head_dim channels each, give block_m scores
    instructions = resources.instructions_per_score * config.block_m / (2 * head_dim)
    bits_per_value = (bits["k"] + bits["v"]) / 2
    values = target.multiprocessors * target.gigahertz * target.issued / instructions / 1e3  # 1e12 a second
    return Bandwidth(
        instructions_per_value=instructions,
        bits_per_value=bits_per_value,
        issued=values * bits_per_value / 8,
        memory=target.terabytes,
        card=target.card,
    )
