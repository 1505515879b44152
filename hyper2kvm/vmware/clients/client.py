"""`from hyper2kvm.vmware.clients.client import VMwareClient`, as the source document has it."""

from hyper2kvm.client import VMwareClient

__all__ = ["VMwareClient"]
