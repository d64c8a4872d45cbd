"""`python -m peerlane.exllamav3`: what `tp_backend="auto"` would choose on this machine, and why.

Invariant: it only asks the driver; it starts no process and allocates nothing on a GPU.
"""

from __future__ import annotations

import argparse
import sys
from importlib import metadata

import peerlane

from .options import Options
from .selection import choose


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m peerlane.exllamav3", description=__doc__)
    parser.add_argument("--devices", help="GPUs that the model will use, as 0,1 (default: all)")
    devices = parser.parse_args(arguments).devices
    try:
        options = Options.from_env()
        wanted = None if devices is None else [int(device) for device in devices.split(",")]
    except ValueError as error:
        parser.error(str(error))

    print(f"ExLlamaV3: {_version('exllamav3')}; torch: {_version('torch')}")
    print(f"options: {options}")
    try:
        topology = peerlane.topology()
    except peerlane.Error as error:
        print(f"auto: native ({error})")
        return 0
    for node in topology["nodes"]:
        print(
            "GPU {}: {}, compute capability {}.{}".format(
                node["ordinal"], node["name"], *node["compute_capability"]
            )
        )
    choice = choose(
        wanted if wanted is not None else [node["ordinal"] for node in topology["nodes"]], topology
    )
    print(f"auto: {choice.backend} ({choice.reason})")
    return 0


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
