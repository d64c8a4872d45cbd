"""A small package named `exllamav3` that starts and drives its processes as ExLlamaV3 does.

It has what `peerlane.exllamav3.install` relies on, under the same names: a context that knows two
backends, workers that are spawned with `backend_args`, the output device run in the main process,
and a helper process started last. Its backends record who they are and move nothing.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from peerlane.exllamav3.options import ENVIRONMENT

# A spawned process of a test on files needs the stand-in before anything else.
# Only a test that has imported the package sets the variable, so the main process skips this.
STAND_IN = """
import os
if os.environ.get("PEERLANE_TEST_FOLDER"):
    import p2p_fakes
    import peerlane
    peerlane.Communicator = p2p_fakes.FileCommunicator
"""

# Looked up before any test puts the one below on the path.
WITHOUT_TORCH = importlib.util.find_spec("torch") is None
# As much of torch as Peerlane's consumers use, where there is no torch.
TORCH = """
import sys
import types

import numpy

contiguous_format = None
bfloat16 = float16 = float32 = object()
_C = types.SimpleNamespace()


class Tensor: pass


nn = types.SimpleNamespace(Parameter=Tensor)
cuda = types.SimpleNamespace(set_device=lambda device: None)


class Array(numpy.ndarray):
    device = types.SimpleNamespace(type="cpu")
    requires_grad = False

    def is_contiguous(self):
        return self.flags.c_contiguous

    def contiguous(self):
        return self.copy()

    def clone(self, memory_format):
        return self.copy()


def from_numpy(array):
    return array.view(Array)


class Capsule:
    def __init__(self, capsule):
        self.capsule = capsule

    def __dlpack__(self, **_):
        return self.capsule

    def __dlpack_device__(self):
        return 1, 0


def from_dlpack(capsule):
    return from_numpy(numpy.from_dlpack(Capsule(capsule)))


utils = types.ModuleType("torch.utils")
utils.dlpack = types.ModuleType("torch.utils.dlpack")
utils.dlpack.from_dlpack = from_dlpack
sys.modules["torch.utils"] = utils
sys.modules["torch.utils.dlpack"] = utils.dlpack
"""

FILES = {
    "__init__.py": STAND_IN,
    "version.py": '__version__ = "1.6.5"\n',
    "model/__init__.py": "",
    "modules/__init__.py": "",
    "modules/module.py": """
class Module:
    def prepare_for_device(self, x, params):
        return x
""",
    "modules/embedding.py": """
from .module import Module


class Embedding(Module):
    device = "elsewhere"

    def forward(self, x, params):
        return x

    def __init__(self, table):
        self.embedding = table

    def tp_export(self, plan, producer):
        return {"cls": Embedding, "embedding.weight": producer.send(self.embedding.weight)}

    @staticmethod
    def tp_import(local_context, exported, plan):
        return Embedding(local_context["consumer"].recv(exported["embedding.weight"]))
""",
    "model/model_tp_backend.py": """
class Recording:
    def __init__(self, device, active_devices, output_device, init_method, master, uuid, shbuf_size=1, cpu=False):
        self.device, self.master, self.uuid, self.cpu = device, master, uuid, cpu

    def all_reduce(self, tensor, contribution=True):
        tensor += 1000

    def broadcast(self, tensor, src_device): pass
    def gather(self, tensor, out_tensor, gather_devices, out_device, ldims): pass
    def gather_small(self, tensor, out_tensor, gather_devices, out_device, ldims): pass
    def fwd_barrier(self): pass
    def run_cpu_reduce_jobs(self): pass
    def end_cpu_reduce_jobs(self): pass
    def close(self): pass


class TPBackendNative(Recording): pass
class TPBackendNCCL(Recording): pass
""",
    "model/model_tp_shared.py": """
class SMProducer:
    def __init__(self, shm_name=None, buffer_size=1):
        self.sent = []

    def export(self):
        return {"shm_name": "none"}

    def send(self, tensor, cache_id=None):
        return {"method": "buffer", "tensor": tensor}

    def clear(self): pass
    def close(self): pass


class SMConsumer:
    def __init__(self, producer_imp, device=None, pin_memory=False):
        pass

    def recv(self, imp, cuda=False, slice_dim=None, first=None, last=None):
        return imp["tensor"]

    def close(self): pass
""",
    "model/model_tp_fn.py": """
import os
import sys
from .model_tp_backend import TPBackendNCCL, TPBackendNative
from .model_tp_shared import SMConsumer, SMProducer


def init_pg(device, active_devices, output_device, backend_args, master=False):
    shared = dict(device=device, active_devices=active_devices, output_device=output_device,
                  init_method=backend_args["init_method"], master=master, uuid=backend_args["uuid"])
    match backend_args["type"]:
        case "nccl":
            backend = TPBackendNCCL(**shared)
        case "native":
            backend = TPBackendNative(**shared, cpu=device < 0)
        case _:
            raise ValueError("Unknown backend type")
    return {"device": device, "backend": backend}


def mp_model_worker(conn, device, active_devices, output_device, backend_args, producer):
    try:
        local_context = init_pg(device, active_devices, output_device, backend_args)
        local_context["inf_consumer"] = SMConsumer(producer, device=device, pin_memory=True)
    except Exception as error:
        conn.send(error)
        return
    while (message := conn.recv()) != "quit":
        function, args = message
        try:
            conn.send(function(local_context, *args))
        except Exception as error:
            conn.send(error)
    local_context["backend"].close()


def mp_describe(local_context):
    backend = local_context["backend"]
    return {
        "backend": type(backend).__name__,
        "native": getattr(backend, "native", None) is not None,
        "joined": getattr(backend, "communicator", None) is not None,
        "wire": backend.options.wire if hasattr(backend, "options") else None,
        "peerlane": any(name.partition(".")[0] == "peerlane" for name in sys.modules),
        "pid": os.getpid(),
    }


def mp_sum(local_context):
    import numpy
    backend = local_context["backend"]
    joined = getattr(backend, "communicator", None)
    tensor = (joined or numpy).empty(8, numpy.float32)
    tensor[...] = local_context["device"] + 1
    backend.all_reduce(tensor, True)
    backend.end_cpu_reduce_jobs()
    return tensor.tolist()


def mp_model_forward(local_context, shared_input, params, last_kv_module_idx, prefill, single_idx):
    from ..modules.embedding import Embedding
    module = Embedding(None)
    x = local_context["inf_consumer"].recv(shared_input)
    module.forward(module.prepare_for_device(x, params), params)
    return mp_sum(local_context), sorted(params)


def mp_set_consumer(local_context, producer):
    local_context["consumer"] = SMConsumer(producer, device=local_context["device"], pin_memory=False)


def mp_recv(local_context, which, imp, *arguments):
    tensor = local_context[which].recv(imp, False, *arguments)
    return type(local_context[which]).__module__, None if tensor is None else tensor.tolist()


def mp_cpu_reduce(local_context):
    local_context["backend"].run_cpu_reduce_jobs()


def mp_echo(local_context, data):
    if isinstance(data, str):
        raise ValueError(data)
    return data


def mp_end(local_context):
    os._exit(3)


class PseudoParentConn:
    def __init__(self, device, active_devices, output_device, backend_args, producer):
        self.local_context = init_pg(device, active_devices, output_device, backend_args, master=True)
        self.local_context["inf_consumer"] = SMConsumer(producer, device=device, pin_memory=True)

    def send(self, message):
        function, args = message
        self.result = function(self.local_context, *args)

    def recv(self):
        return self.result

    def quit(self):
        self.local_context["backend"].close()
""",
    "model/model_tp.py": """
import multiprocessing
import uuid
from multiprocessing import Pipe, Process
from multiprocessing.reduction import ForkingPickler
from .model_tp_fn import *


class Model_TPMixin:
    tp_pending_acks = ()

    def create_tp_context(self, tp_backend: str):
        multiprocessing.set_start_method("spawn", force=True)
        self.tp_backend = tp_backend
        match tp_backend:
            case "nccl" | "native":
                backend_args = {"type": tp_backend, "init_method": "tcp://127.0.0.1:1", "uuid": uuid.uuid4().hex}
            case _:
                raise ValueError(f"Unkwown backend type: {tp_backend}")
        self.mp_parent_conn, self.children = {}, {}
        self.tp_producer = SMProducer(buffer_size=1 << 20)
        for device in self.active_devices + [-1]:
            if device == self.tp_output_device:
                self.mp_parent_conn[device] = PseudoParentConn(
                    device, self.active_devices, self.tp_output_device, backend_args, self.tp_producer)
                continue
            self.mp_parent_conn[device], end = Pipe()
            self.children[device] = Process(
                target=mp_model_worker,
                args=(end, device, self.active_devices, self.tp_output_device, backend_args,
                      self.tp_producer.export()))
            self.children[device].start()


    def tp_drain_acks(self):
        self.drained = getattr(self, "drained", 0) + 1
        pending, self.tp_pending_acks = self.tp_pending_acks, ()
        if pending:
            self.acks = [self.mp_parent_conn[device].recv() for device in pending]

    def prepare_inputs_for_tp(self, x, params):
        self.tp_drain_acks()
        return self.tp_producer.send(x), {}

    def prefill_tp(self, x, params, last_kv_module_idx, modules):
        return self.one_pass(x, params, last_kv_module_idx)

    def forward_tp(self, x, params, last_kv_module_idx, modules):
        return self.one_pass(x, params, last_kv_module_idx)

    def one_pass(self, x, params, last_kv_module_idx):
        x, reserve = self.prepare_inputs_for_tp(x, params)
        args = (x, params, last_kv_module_idx, False, None)
        message = ForkingPickler.dumps((mp_model_forward, args))
        others = [device for device in self.active_devices if device != self.tp_output_device]
        for device in others:
            self.mp_parent_conn[device].send_bytes(message)
        self.mp_parent_conn[self.tp_output_device].send((mp_model_forward, args))
        self.tp_pending_acks = others
        return self.mp_parent_conn[self.tp_output_device].recv()

    def _load_tp(self, tp_backend, *, progress=False):
        self.create_tp_context(tp_backend)
        self.loader = SMProducer()
        yield progress


class Model(Model_TPMixin):
    def load(self, active_devices, output_device, tp_backend):
        self.active_devices, self.tp_output_device = active_devices, output_device
        assert list(self._load_tp(tp_backend)) == [False]
        return self

    def ask(self, device, function, *args):
        self.mp_parent_conn[device].send((function, args))
        return self.mp_parent_conn[device].recv()

    def run(self, function, devices=None):
        devices = self.active_devices if devices is None else devices
        for device in devices:
            self.mp_parent_conn[device].send((function, ()))
        return {device: self.mp_parent_conn[device].recv() for device in devices}

    def unload(self):
        for device, child in self.children.items():
            if child.is_alive():
                self.mp_parent_conn[device].send("quit")
        self.mp_parent_conn[self.tp_output_device].quit()
        for child in self.children.values():
            child.join(20)
""",
}


def write(folder: Path, **changes: tuple[str, str]) -> None:
    """Writes the package; `changes` replace text in a module of `model` to make another version."""
    for name, text in FILES.items():
        old, new = changes.get(Path(name).stem, ("", ""))
        assert old in text
        path = folder / "exllamav3" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace(old, new) if old else text)
    if WITHOUT_TORCH:
        (folder / "torch.py").write_text(TORCH)


def load(monkeypatch: pytest.MonkeyPatch, folder: Path, **changes: tuple[str, str]) -> ModuleType:
    """Writes the package, imports it afresh and returns its `model_tp`."""
    write(folder, **changes)
    replaced = ("exllamav3", "torch") if WITHOUT_TORCH else ("exllamav3",)
    for name in [name for name in sys.modules if name.partition(".")[0] in replaced]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()
    return importlib.import_module("exllamav3.model.model_tp")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No option from outside changes what a test sees."""
    for key in ENVIRONMENT.values():
        monkeypatch.delenv(key, raising=False)
