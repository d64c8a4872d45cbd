from __future__ import annotations

from typing import Any


class TPBackendNative:
    def __init__(self, **named: Any):
        self.master = named["master"]

    def close(self) -> None:
        pass


class TPBackendNCCL(TPBackendNative):
    pass


class TPBackendP2P(TPBackendNative):
    pass
