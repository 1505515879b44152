"""`python -m hyper2kvm`."""

import sys

from hyper2kvm.cli import main

if __name__ == "__main__":
    sys.exit(main())
