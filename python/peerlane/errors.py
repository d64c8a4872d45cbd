"""What can go wrong, as exceptions.

A wrong argument is a ValueError or, if it is the wrong kind of object, a TypeError; everything else
is an Error. A call that raises has queued nothing.
"""

import builtins


class Error(RuntimeError):
    """Anything that Peerlane raises besides ValueError and TypeError."""


class DeadlineError(Error, builtins.TimeoutError):
    """A wait on the GPU reached its deadline: a rank did not come."""


class AbortedError(Error):
    """The communicator was aborted, by this rank or by another."""


class PeerLostError(Error):
    """The process of a rank has ended without closing its communicator."""


class MismatchError(Error):
    """Two ranks called different things."""


class CorruptError(Error):
    """A GPU read something other than what its peer wrote."""


class RendezvousError(Error):
    """The ranks did not meet."""


class UnreachableError(Error):
    """Two GPUs cannot reach each other."""


class NoDriverError(Error):
    """This machine has no NVIDIA driver."""


class DriverError(Error):
    """A call of the CUDA driver failed."""


class ClosedError(Error):
    """The communicator was closed."""


class UnsupportedError(Error):
    """The machine cannot do it."""
