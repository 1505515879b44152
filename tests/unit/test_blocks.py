"""Parameters that are references to saved blocks, held to the schemas of flows as Prefect's server holds them."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools import is_valid_schema, validate

from blocks import ESXiHost
from flows.export import export_vm
from flows.migration_wave import migration_wave, saved_wave
from flows.vddk_download import vddk_download

OPTIONS = {"vm_name": "web", "output_dir": "/data"}


def saved() -> dict[str, Any]:
    return {"$ref": {"block_document_id": str(uuid4())}}


@pytest.mark.parametrize(
    ("flow", "parameters"),
    [
        (export_vm, {"vcenter": saved(), "options": OPTIONS, "toolkit": saved()}),
        (export_vm, {"vcenter": saved(), "options": OPTIONS, "nbd_source": saved(), "esxi_host": saved()}),
        (export_vm, {"vcenter": saved(), "options": OPTIONS, "toolkit": None}),
        (export_vm, {"vcenter": saved(), "options": OPTIONS, "toolkit": {"libdir": "/opt/vddk"}}),
        (vddk_download, {"vcenter": saved(), "options": OPTIONS, "toolkit": saved()}),
        (migration_wave, {"vcenter": saved(), "wave": {"select": ["*"], "output_dir": "/data"}}),
        (saved_wave, {"wave": saved()}),
    ],
)
def test_a_saved_block_is_taken_by_reference(flow: Any, parameters: dict[str, Any]) -> None:
    schema = parameter_schema(flow).model_dump()
    is_valid_schema(schema, preprocess=False)
    validate(parameters, schema, raise_on_error=True, preprocess=True)


def test_an_esxi_host_without_key_and_password_is_refused() -> None:
    with pytest.raises(ValueError, match="give a key or a password of root at esx1"):
        ESXiHost(host="esx1", host_key=f"SHA256:{'A' * 43}")
