"""The base of the pydantic models that users declare: frozen, and strict about keys and types."""

from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from tokquant.errors import SchemeError, quote
from tokquant.schemes import problems


class Strict(BaseModel):
    """A frozen model that refuses unknown keys and wrong types, with a SchemeError that quotes them."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)
    __slots__ = ("_hash",)  # a slot is left out of copies and pickles

    def __init__(self, /, *unnamed: object, **data: Any):
        if unnamed:
            fields = ", ".join(type(self).model_fields)
            raise TypeError(f"{type(self).__name__}: {quote(unnamed[0])} is given without a name; it takes {fields}, by name")
        for name, value in data.items():
            if isinstance(value, np.generic):
                data[name] = value.item()
            if isinstance(value, dict) and (odd := [key for key in value if not isinstance(key, str)]):
                raise SchemeError([(problems.printable(name), f"the key {quote(odd[0])}; keys are plain words")])
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise SchemeError(problems.explain(type(self), error)) from None

    def __hash__(self) -> int:
        # cached, as every call looks plans up by its scheme
        known: int | None = getattr(self, "_hash", None)
        if known is None:
            known = hash((type(self), *self.__dict__.values()))
            object.__setattr__(self, "_hash", known)
        return known
