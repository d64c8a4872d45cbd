"""Passes of models on the stand-in for ExLlamaV3, in a program of its own: a process records once in its life.

Invariant: what it prints does not depend on whether it is traced.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any


def passes(model: Any) -> list[Any]:
    """Two decoding passes and a prompt's, with what each rank made of them."""
    import numpy as np
    import p2p_tree

    if p2p_tree.WITHOUT_TORCH:
        import torch

        tensor = torch.from_numpy
    else:
        from torch import from_numpy as tensor

    found = []
    for method, tokens in (("forward_tp", 1), ("forward_tp", 1), ("prefill_tp", 64)):
        params = {"a": 1}
        ids = tensor(np.ones((1, tokens), np.int64))
        found.append([getattr(model, method)(ids, params, 0, []), sorted(params)])
    model.tp_drain_acks()
    return [*found, model.acks]


def main(folder: str, backend: str) -> list[Any]:
    sys.path.insert(0, folder)
    from exllamav3.model import model_tp

    import peerlane.exllamav3

    if here := os.environ.get("TEST_TRACE_HERE"):
        peerlane.trace.start(here)
    before = dict(vars(model_tp.Model_TPMixin))
    options = replace(peerlane.exllamav3.Options.from_env(), device_format="sim:{device}/8")
    peerlane.exllamav3.install(options=options)
    model = model_tp.Model().load([2, 0, 1], 1, backend)
    try:
        found = passes(model)
    finally:
        model.unload()
    peerlane.exllamav3.uninstall()
    assert dict(vars(model_tp.Model_TPMixin)) == before
    return found


if __name__ == "__main__":
    import p2p_timeline

    print(json.dumps(p2p_timeline.main(*map(str, map(Path, sys.argv[1:])))))
