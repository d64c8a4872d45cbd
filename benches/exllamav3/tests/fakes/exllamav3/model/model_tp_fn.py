from .model_tp_backend import TPBackendNative, TPBackendNCCL, TPBackendP2P


class TPBackendNull:
    pass


KINDS = {"nccl": TPBackendNCCL, "p2p": TPBackendP2P}


def init_pg(device, active_devices, output_device, backend_args):
    kind = KINDS.get(backend_args["type"]) or TPBackendNative
    backend = kind(device=device, master=device == output_device)
    return {"device": device, "active_devices": active_devices, "output_device": output_device, "backend": backend}


def mp_model_worker(*_):
    pass
