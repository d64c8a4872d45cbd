"""Peerlane as ExLlamaV3's tensor-parallel backend.

    import peerlane.exllamav3
    peerlane.exllamav3.install()
    ...
    model.load(tensor_p=True, tp_backend="p2p")     # or "auto"

`install` works on an unmodified ExLlamaV3 and reaches the processes that it spawns; see `hooks`.
`TPBackendP2P` is the backend itself, for an ExLlamaV3 that names it in its own code.

Invariant: importing this package imports neither torch nor exllamav3 and touches no GPU.
"""

from .backend import TPBackendP2P
from .hooks import install, uninstall
from .options import Options
from .selection import Choice, choose

__all__ = ["Choice", "Options", "TPBackendP2P", "choose", "install", "uninstall"]
