"""Peer-to-peer collectives for the GPUs of one machine."""

from ._peerlane import (
    Communicator,
    Event,
    PreparedAllReduce,
    Registration,
    Work,
    topology,
    version,
)
from .errors import (
    AbortedError,
    ClosedError,
    CorruptError,
    DeadlineError,
    DriverError,
    Error,
    MismatchError,
    NoDriverError,
    PeerLostError,
    RendezvousError,
    UnreachableError,
    UnsupportedError,
)

__version__ = version()

__all__ = [
    "AbortedError",
    "ClosedError",
    "Communicator",
    "DeadlineError",
    "DriverError",
    "Error",
    "Event",
    "CorruptError",
    "MismatchError",
    "NoDriverError",
    "PeerLostError",
    "PreparedAllReduce",
    "Registration",
    "RendezvousError",
    "UnreachableError",
    "UnsupportedError",
    "Work",
    "topology",
    "version",
]
