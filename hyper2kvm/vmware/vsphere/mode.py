"""`from hyper2kvm.vmware.vsphere.mode import ExportOptions`, as the source document has it."""

from tasks.models import ExportOptions

__all__ = ["ExportOptions"]
