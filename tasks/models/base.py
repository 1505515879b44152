"""What every value is made from."""

from __future__ import annotations

from pydantic import (
    BaseModel,
    ConfigDict,
)

SECTOR_BYTES = 512
FORMAT_VERSION = 1


class Value(BaseModel):
    """A frozen value; an unknown field is an error, not noise."""

    model_config = ConfigDict(frozen=True, extra="forbid")
