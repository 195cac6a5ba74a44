"""Balance: K's channels are multiplied by factors, and Q's divided by them, to make both easier to quantize.

Q K^T does not change.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema

from tokquant.errors import SchemeError, nearest, quote
from tokquant.schemes.strict import Strict

Largest = Annotated[float, Field(ge=1e-4, le=1e4)]


class Balance(Strict):
    """The base of both rules: `dynamic` factors are computed for each sequence, `static` ones are calibrated (`k_balance`)."""

    kind: ClassVar[str] = ""
    scale: Literal["dynamic", "static"] = "dynamic"

    def written(self) -> str | dict[str, Any]:
        """As it is written in a scheme: `"channel"`, or `{"channel": {"alpha": 0.25}}`."""
        changed = self.model_dump(exclude_defaults=True)
        return {self.kind: changed} if changed else self.kind


class ChannelBalance(Balance):
    """SmoothQuant's rule (arXiv 2211.10438): K's channel is multiplied by max |Q|^alpha / max |K|^(1 - alpha).

    With alpha = 0 every channel of K has a largest magnitude of 1, with alpha = 1 every channel of Q.
    """

    kind = "channel"
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5


class RopePairBalance(Balance):
    """FireQ's rule (arXiv 2505.20839, 3.3): the two channels that RoPE rotates together (f, f + D/2) share one factor, which
    scales the pair's largest norm to `alpha`.

    The `top_k` channels of each head of K with the largest magnitudes, and their partners, have factors of their own instead,
    which scale their largest magnitudes to `beta`.
    """

    kind = "rope_pairs"
    alpha: Largest = 8.0
    beta: Largest = 8.0
    top_k: Annotated[int, Field(ge=0, le=2**20)] = 0


KINDS: dict[str, type[ChannelBalance | RopePairBalance]] = {rule.kind: rule for rule in (ChannelBalance, RopePairBalance)}


def parse(value: object) -> object:
    """`"none"` or a rule, from what was written. Raises SchemeError."""
    if value == "none" or isinstance(value, ChannelBalance | RopePairBalance):
        return value
    [(kind, parameters)] = value.items() if isinstance(value, dict) and len(value) == 1 else [(value, {})]
    if not isinstance(kind, str) or kind not in KINDS:
        names = ("none", *KINDS)
        text = f"no balance {quote(value)}; use none, channel, rope_pairs, {{channel: {{...}}}} or {{rope_pairs: {{...}}}}"
        raise SchemeError(text + nearest(kind, names))
    if not isinstance(parameters, dict):
        raise SchemeError([(kind, f"{quote(parameters)} is not accepted; write a mapping such as {{scale: static}}")])
    if odd := [key for key in parameters if not isinstance(key, str)]:
        raise SchemeError([(kind, f"the key {quote(odd[0])}; keys are plain words")])
    try:
        return KINDS[kind](**parameters)
    except SchemeError as error:
        raise SchemeError([(f"{kind}.{place}", text) for place, text in error.problems]) from None


def _schema() -> dict[str, Any]:
    rules = [
        {"type": "object", "properties": {kind: rule.model_json_schema()}, "required": [kind], "additionalProperties": False}
        for kind, rule in KINDS.items()
    ]
    return {"anyOf": [{"type": "string", "enum": ["none", *KINDS]}, *rules]}


SchemeBalance = Annotated[
    Literal["none"] | ChannelBalance | RopePairBalance,
    BeforeValidator(parse),
    PlainSerializer(lambda balance: balance if balance == "none" else balance.written()),
    WithJsonSchema(_schema()),
]
