"""Strict scalar types for config fields: 1 is not True, "5" is not 5, nan and inf are not numbers; layer ranges."""

from __future__ import annotations

import re
from typing import Annotated

from annotated_types import Ge, Gt, Le
from pydantic import AllowInfNan, ConfigDict, StrictBool, StrictFloat, StrictInt, StrictStr, StringConstraints

SECTION = ConfigDict(extra="forbid", validate_default=True)  # of every section config

Bool = StrictBool
Int = StrictInt
PosInt = Annotated[StrictInt, Gt(0)]
NonNegInt = Annotated[StrictInt, Ge(0)]
# A YAML integer is a fine float; a bool or a string is not.
Float = Annotated[StrictFloat, AllowInfNan(False)]
PosFloat = Annotated[Float, Gt(0)]
NonNegFloat = Annotated[Float, Ge(0)]
Fraction = Annotated[Float, Ge(0), Le(1)]
Str = StrictStr
NonEmptyStr = Annotated[StrictStr, StringConstraints(min_length=1)]


def layer_slice(text: str) -> slice:
    """ "15:" or "0:10" as the slice of the layers that it is in Python; ValueError for any other text."""
    if not re.fullmatch(r"(-?\d+)?:(-?\d+)?", text):
        raise ValueError(f"{text!r} is not a range of layers such as '15:' or '0:10'")
    return slice(*(int(end) if end else None for end in text.split(":")))
