"""Loads the processes of a model with a real ExLlamaV3, on a machine without GPUs.

Run as a program in an interpreter of its own, with `sitecustomize` from the same test on the path.
ExLlamaV3's own code makes the context, spawns the workers and drives them; only its compiled
extension and torch's CUDA calls do nothing, and Peerlane's ranks meet through files.
"""

from __future__ import annotations

import json
import sys
from typing import Any

# Put first on the path of the program and of every process that it spawns.
SITECUSTOMIZE = """
import sys
import types
from unittest import mock

import torch

stub = types.ModuleType("exllamav3.ext")
stub.exllamav3_ext = mock.MagicMock(name="exllamav3_ext")
stub.exllamav3_ext.cuda_host_get_device_pointer = lambda pointer: pointer
sys.modules["exllamav3.ext"] = stub
torch.cuda.set_device = lambda device: None
torch.cuda.synchronize = lambda device=None: None
zeros = torch.zeros
torch.zeros = lambda *size, device=None, **more: zeros(*size, **more)

import p2p_fakes
import peerlane

peerlane.Communicator = p2p_fakes.FileCommunicator
"""


def describe(local_context: dict[str, Any]) -> dict[str, Any]:
    backend = local_context["backend"]
    native = getattr(backend, "native", None)
    return {"backend": type(backend).__name__, "native": type(native).__name__}


def one_pass(local_context: dict[str, Any]) -> list[float]:
    """What a forward pass asks of the backend, on host memory."""
    import numpy as np

    backend, device = local_context["backend"], local_context["device"]
    output = local_context["output_device"]
    tensor = np.full(8, device + 1, np.float32)
    backend.all_reduce(tensor, True)
    backend.broadcast(tensor, output)
    joined = np.zeros((1, 256), np.float16) if device == output else None
    part = np.full((1, 128), device, np.float16)
    backend.gather(part, joined, sorted(local_context["active_devices"]), output, [128, 128])
    backend.end_cpu_reduce_jobs()
    return [float(tensor[0]), *([] if joined is None else joined[0, ::128].tolist())]


def look_up(local_context: dict[str, Any]) -> dict[str, Any]:
    """What the first module says of some tokens, and whether its table is in an exporter's memory."""
    import torch

    module = local_context["modules"][0]
    ids = torch.tensor([[3, 0, 2]])
    rows = module.forward(module.prepare_for_device(ids, {}), {})
    at = module.embedding.weight.data_ptr()
    with open("/proc/self/maps") as maps:
        spans = [line.split()[0].split("-") for line in maps if "peerlane-tensors" in line]
    shared = any(int(first, 16) <= at < int(end, 16) for first, end in spans)
    return {"rows": rows.tolist(), "dtype": str(rows.dtype), "shared": shared}


def embedding_of_all(model: Any) -> list[dict[str, Any]]:
    """Loads a real embedding as ExLlamaV3's loader does, and asks all ranks."""
    import torch
    from exllamav3.model import model_tp_fn
    from exllamav3.modules.embedding import Embedding

    from peerlane.exllamav3.tensors import Producer

    module = Embedding(None, "model.embed_tokens", 5, 4, out_dtype=torch.float)
    module.device = torch.device("cpu")
    weight = torch.arange(20).half().view(5, 4)
    module.embedding = torch.nn.Embedding(5, 4, _weight=weight, _freeze=True)
    ask, ranks = model.tp_worker_dispatch_wait_multi, model.active_devices
    producer = Producer()
    ask(ranks, model_tp_fn.mp_set_plan, ({1: None, 0: None}, ranks))
    ends = [
        (producer,) if device == model.tp_output_device else (producer.export(),)
        for device in ranks
    ]
    ask(ranks, model_tp_fn.mp_set_consumer, (), ends)
    exported = module.tp_export(None, producer)
    ask(ranks, model_tp_fn.mp_model_append, (exported,))
    producer.clear()
    module.unload()
    ask(ranks, model_tp_fn.mp_close_consumer, ())
    producer.close()
    return ask(ranks, look_up, ())


def traced_pass(model: Any) -> bool:
    """A pass of ExLlamaV3's own through all modules there are; whether its parameters are what they were."""
    import torch

    # ExLlamaV3 writes into a pass's parameters, so each has its own.
    passes: list[dict[str, Any]] = [{}, {}]
    for params in passes:
        model.prefill_tp(torch.tensor([[3, 0, 2]]), params, 0, [])
    model.tp_drain_acks()
    return not any("peerlane_pass" in params for params in passes)


def main(backend: str) -> dict[str, Any]:
    from exllamav3.model import model_tp, model_tp_fn

    import peerlane.exllamav3

    before = model_tp.Model_TPMixin.create_tp_context, model_tp_fn.init_pg
    peerlane.exllamav3.install()
    model = model_tp.Model_TPMixin()
    model.active_devices, model.tp_output_device = [1, 0], 0
    model.create_tp_context(backend)
    children = [child for child in model.mp_children if hasattr(child, "exitcode")]
    # With channels there may be no helper process to ask.
    devices = [1, -1, 0] if len(children) == 2 else [1, 0]
    seen = dict(zip(map(str, devices), model.tp_worker_dispatch_wait_multi(devices, describe, ())))
    outcome = {"seen": seen, "tp_backend": model.tp_backend, "processes": 1 + len(children)}
    outcome["connection"] = type(model.mp_parent_conn[1]).__name__
    if backend == "p2p" and seen["0"]["native"] == "NoneType":
        model.tp_worker_dispatch(-1, model_tp_fn.mp_cpu_reduce, ())
        outcome["pass"] = model.tp_worker_dispatch_wait_multi(model.active_devices, one_pass, ())
        assert model.tp_worker_result(-1) is None
        if len(children) == 1 or peerlane.trace.is_recording():
            outcome["embedding"] = embedding_of_all(model)
        if peerlane.trace.is_recording():
            outcome["traced"] = traced_pass(model)
    model.destroy_tp_context()
    # ExLlamaV3 terminates a child that has not ended after 2 s, as may be on a busy machine, and does not wait for that.
    for child in children:
        child.join(30)
    outcome["left over"] = sum(child.exitcode is None for child in children)
    peerlane.exllamav3.uninstall()
    after = model_tp.Model_TPMixin.create_tp_context, model_tp_fn.init_pg
    outcome["restored"] = before == after
    return outcome


if __name__ == "__main__":
    import p2p_real

    print(json.dumps(p2p_real.main(sys.argv[1])))
