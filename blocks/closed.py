"""The schema of a block whose every field may be left out.

Prefect's server takes what stands for a block as the block itself or as a reference to a saved one, and refuses what
is both. Where no field is required, a reference is both, unless the schema says that there are no other fields.
"""

from __future__ import annotations

from typing import Any

from prefect.blocks.core import Block, schema_extra


def closed(schema: dict[str, Any], model: type[Block]) -> None:
    """Fill in a block's schema as Prefect does, and close it: a pydantic `json_schema_extra`."""
    schema_extra(schema, model)
    schema["additionalProperties"] = False
