"""Peer-to-peer collectives for the GPUs of one machine."""

import os
import sys

from . import trace
from ._peerlane import (
    ChannelMessage,
    ChannelReader,
    ChannelWriter,
    Communicator,
    Event,
    MappedTensor,
    PreparedAllReduce,
    Registration,
    TensorExporter,
    TensorImporter,
    TensorView,
    Work,
    Workers,
    WorkList,
    _set_self_test_program,
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

_set_self_test_program(sys.executable, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

__all__ = [
    "AbortedError",
    "ChannelMessage",
    "ChannelReader",
    "ChannelWriter",
    "ClosedError",
    "Communicator",
    "CorruptError",
    "DeadlineError",
    "DriverError",
    "Error",
    "Event",
    "MappedTensor",
    "MismatchError",
    "NoDriverError",
    "PeerLostError",
    "PreparedAllReduce",
    "Registration",
    "RendezvousError",
    "TensorExporter",
    "TensorImporter",
    "TensorView",
    "UnreachableError",
    "UnsupportedError",
    "Work",
    "WorkList",
    "Workers",
    "topology",
    "trace",
    "version",
]
