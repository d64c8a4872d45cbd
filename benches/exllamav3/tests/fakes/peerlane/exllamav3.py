from dataclasses import dataclass

from exllamav3.model.model_tp_backend import TPBackendP2P  # noqa: F401


@dataclass(frozen=True)
class Options:
    check: str = "sync"
    wire: str = "bf16"

    @staticmethod
    def from_env():
        return Options()


def install(options):
    assert isinstance(options, Options)
