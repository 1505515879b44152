"""When and where flows run: not installed with the rest, run from the repository's root (`python -m deployments.…`)."""

POOL = "hyper2kvm"  # the work pool that deployments/prefect.yaml names
