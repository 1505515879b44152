"""The front door: the command line and the Python API. It turns words into flow parameters; the work is in `flows`."""

__version__ = "0.1.0"
