"""The Python API: the source document's `VMwareClient`, which runs the same flows as the UI and the command line."""

from __future__ import annotations

import asyncio
import logging

from pydantic import SecretStr

from flows.run import flow_of, run_flow
from flows.verify import verify_copy
from hyper2kvm.settings import Settings, password_from
from tasks.models import CONNECTIONS, DownloadManifest, ExportOptions, Manifest, Migration, Verification, VerifyJob

log = logging.getLogger(__name__)


class VMwareClient:
    """A vCenter or ESXi host to take VMs from.

    host: name or address, `host:port` understood. pwd, ca_file, thumbprint: what is left out comes from
    VCENTER_PASSWORD, VCENTER_CA_FILE, VCENTER_THUMBPRINT. Nothing is connected until an export is awaited.

        client = VMwareClient(host="vcenter.example.com", user="admin@vsphere.local", pwd="…")
        manifest = await client.async_export_vm(ExportOptions(vm_name="web", output_dir="/data/exports"))
    """

    def __init__(
        self,
        host: str,
        user: str,
        pwd: str | None = None,
        *,
        port: int | None = None,
        ca_file: str | None = None,
        thumbprint: str | None = None,
        verify: bool = True,
        connections: int = CONNECTIONS,
        host_tickets: bool = True,
    ) -> None:
        """Keep the settings. Raises InvalidInput where no password is given, set or asked for."""
        password = SecretStr(pwd) if pwd else password_from(None, username=user, host=host)
        self._settings = Settings(
            host=host,
            username=user,
            password=password,
            port=port,
            ca_file=ca_file,
            thumbprint=thumbprint,
            verify=verify,
            connections=connections,
            host_tickets=host_tickets,
        )

    async def async_export_vm(self, options: ExportOptions) -> Manifest | DownloadManifest | Migration:
        """Run the flow of `options.export_mode` and return its manifest; raise classes of `tasks.errors`.

        A mode or transport that is not built yet is refused with NotBuilt before anything is connected.
        """
        manifest: Manifest | DownloadManifest | Migration = await run_flow(
            flow_of(options, self._settings.vcenter()), say=log.info
        )
        return manifest

    def export_vm(self, options: ExportOptions) -> Manifest | DownloadManifest | Migration:
        """The same, blocking."""
        return asyncio.run(self.async_export_vm(options))

    async def async_verify(self, job: VerifyJob) -> Verification:
        """Prove again that a copy is what was copied, and say what was read; raise IntegrityMismatch where it is not.

        The vCenter is asked only where `job.against_source` says so.
        """
        vcenter = self._settings.vcenter() if job.against_source else None
        return await run_flow(verify_copy, say=log.info, options=job, vcenter=vcenter)

    def verify(self, job: VerifyJob) -> Verification:
        """The same, blocking."""
        return asyncio.run(self.async_verify(job))
