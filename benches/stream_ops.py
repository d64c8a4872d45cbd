"""What the pieces of a scheduled step cost on two GPUs: flags, copies, events, and what they need.

    python benches/stream_ops.py --out FILE

Everything of a row is queued behind a gate, so that the host does not count; a figure is the median of
seven tries, microseconds for one operation. `held` rows run while a kernel holds every multiprocessor: what
ends before it needs none.
"""

import argparse
import ctypes
import json
import pathlib
import statistics
from collections.abc import Callable

import torch

MIB = 1 << 20
WAIT, WRITE = 1, 2
HOLD_NS = 3_000_000
PTX = b"""
.version 7.8
.target sm_80
.address_size 64
.visible .entry hold(.param .u64 ns)
{
 .reg .b64 %a, %b, %c, %d; .reg .pred %p;
 ld.param.u64 %c, [ns]; mov.u64 %a, %globaltimer;
LOOP: mov.u64 %b, %globaltimer; sub.u64 %d, %b, %a; setp.lt.u64 %p, %d, %c; @%p bra LOOP;
 ret;
}
\0"""

cuda = ctypes.CDLL("libcuda.so.1")


def call(name: str, *arguments: object) -> None:
    code = getattr(cuda, name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        cuda.cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"{name}: {(text.value or b'?').decode()}")


class Operation(ctypes.Structure):
    """CUstreamBatchMemOpParams."""

    _fields_ = [
        ("kind", ctypes.c_uint32),
        ("_pad", ctypes.c_uint32),
        ("address", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("_more", ctypes.c_uint32),
        ("_alias", ctypes.c_uint64),
        ("_reserved", ctypes.c_uint64),
    ]


class Gpu:
    def __init__(self, number: int) -> None:
        self.number = number
        torch.cuda.set_device(number)
        torch.zeros(1, device=f"cuda:{number}")
        self.context = ctypes.c_void_p()
        call("cuCtxGetCurrent", ctypes.byref(self.context))
        memory = ctypes.c_uint64()
        call("cuMemAlloc_v2", ctypes.byref(memory), ctypes.c_size_t(160 * MIB))
        call("cuMemsetD8_v2", memory, 0, ctypes.c_size_t(4096))
        # Flags, then data.
        self.flags, self.data = memory.value, memory.value + MIB
        self.stream = ctypes.c_void_p()
        call("cuStreamCreateWithPriority", ctypes.byref(self.stream), 1, -5)

    def event(self, flags: int = 0) -> ctypes.c_void_p:
        torch.cuda.set_device(self.number)
        event = ctypes.c_void_p()
        call("cuEventCreate", ctypes.byref(event), flags)
        return event

    def batch(self, *operations: tuple[int, int, int]) -> None:
        array = (Operation * len(operations))()
        for entry, (kind, address, value) in zip(array, operations):
            entry.kind, entry.address, entry.value = kind, address, value
            entry.flags = 1 if kind == WAIT else 0
        call("cuStreamBatchMemOp_v2", self.stream, len(operations), array, 0)

    def copy(self, to: int, source: int, size: int) -> None:
        call(
            "cuMemcpyDtoDAsync_v2",
            ctypes.c_uint64(to),
            ctypes.c_uint64(source),
            ctypes.c_size_t(size),
            self.stream,
        )


def pinned() -> int:
    address = ctypes.c_void_p()
    call("cuMemHostAlloc", ctypes.byref(address), ctypes.c_size_t(4096), 3)
    ctypes.memset(address, 0, 4096)
    return address.value


def timed(gpus: list[Gpu], gate: int, queue: Callable[[], None], count: int) -> float:
    """Time between two events around what `queue` puts on the first GPU's stream, over `count`."""
    word, samples, first = ctypes.cast(gate, ctypes.POINTER(ctypes.c_uint32)), [], gpus[0]
    for _ in range(7):
        word[0] = 0
        begin, end = first.event(), first.event()
        for gpu in gpus:
            torch.cuda.set_device(gpu.number)
            gpu.batch((WAIT, gate, 1))
        call("cuEventRecord", begin, first.stream)
        queue()
        call("cuEventRecord", end, first.stream)
        word[0] = 1
        for gpu in gpus:
            call("cuStreamSynchronize", gpu.stream)
        took = ctypes.c_float()
        call("cuEventElapsedTime", ctypes.byref(took), begin, end)
        samples.append(1e3 * took.value / count)
    return round(statistics.median(samples), 2)


def rows(one: Gpu, two: Gpu) -> dict[str, float]:
    gate, host, many = pinned(), pinned(), 100
    flag, theirs = one.flags, two.flags

    def repeated(operation: Callable[[], None], count: int = many) -> float:
        return timed([one], gate, lambda: [operation() for _ in range(count)], count)

    def exchange(size: int) -> float:
        """A flag, after a copy if size is not 0, there and back."""

        def queue() -> None:
            for _ in range(many):
                for here, there in ((one, two), (two, one)):
                    if size:
                        here.copy(there.data, here.data + 64 * MIB, size)
                    here.batch((WRITE, there.flags + 128, 1))
                    there.batch((WAIT, there.flags + 128, 1), (WRITE, there.flags + 128, 0))

        return timed([one, two], gate, queue, many)

    def copied(mib: int, flagged: bool) -> float:
        def one_copy() -> None:
            one.copy(two.data, one.data, mib * MIB)
            if flagged:
                one.batch((WRITE, theirs, 1))

        return repeated(one_copy, 8)

    figures = {
        "write a word of this GPU": repeated(lambda: one.batch((WRITE, flag, 1))),
        "write a word of the peer": repeated(lambda: one.batch((WRITE, theirs, 1))),
        "write a word of the host": repeated(lambda: one.batch((WRITE, host, 1))),
        "wait and reset": repeated(lambda: one.batch((WAIT, flag + 64, 0), (WRITE, flag + 64, 0))),
        "note, wait, reset, note": repeated(
            lambda: one.batch(
                (WRITE, host, 1), (WAIT, flag + 64, 0), (WRITE, flag + 64, 0), (WRITE, host, 0)
            )
        ),
        "flag there and back": exchange(0),
        "2 KiB and flag there and back": exchange(2048),
    }
    for mib in (4, 8, 16, 32, 64):
        figures[f"copy of {mib} MiB to the peer"] = copied(mib, False)
        figures[f"copy of {mib} MiB to the peer, and a flag"] = copied(mib, True)
    return figures


def held(one: Gpu, two: Gpu) -> dict[str, bool]:
    """Whether copies and flags end while a kernel holds all multiprocessors."""
    torch.cuda.set_device(one.number)
    module, function, low = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
    call("cuModuleLoadData", ctypes.byref(module), PTX)
    call("cuModuleGetFunction", ctypes.byref(function), module, b"hold")
    call("cuFuncSetAttribute", function, 8, 200 * 1024)
    call("cuStreamCreateWithPriority", ctypes.byref(low), 1, 0)
    blocks = torch.cuda.get_device_properties(one.number).multi_processor_count
    works = {
        "copy of 16 MiB to the peer": lambda: one.copy(two.data, one.data, 16 * MIB),
        "copy of 16 MiB on this GPU": lambda: one.copy(one.data + 64 * MIB, one.data, 16 * MIB),
        "wait and reset": lambda: one.batch((WAIT, one.flags + 64, 0), (WRITE, one.flags + 64, 0)),
    }
    answers = {}
    for name, work in works.items():
        nanoseconds = ctypes.c_uint64(HOLD_NS)
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(nanoseconds))
        shape = (blocks, 1, 1, 1024, 1, 1, 200 * 1024)
        call("cuLaunchKernel", function, *shape, low, pointers, None)
        work()
        call("cuStreamSynchronize", one.stream)
        # CUDA_ERROR_NOT_READY: the kernel still runs.
        answers[name] = cuda.cuStreamQuery(low) == 600
        call("cuStreamSynchronize", low)
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    options = parser.parse_args()
    one, two = Gpu(0), Gpu(1)
    for here, there in ((one, two), (two, one)):
        torch.cuda.set_device(here.number)
        call("cuCtxEnablePeerAccess", there.context, 0)
    torch.cuda.set_device(0)
    held(one, two)
    result = {
        "command": "python benches/stream_ops.py",
        "gpu": torch.cuda.get_device_name(0),
        "microseconds": rows(one, two),
        "ends while all multiprocessors are held": held(one, two),
    }
    text = json.dumps(result, indent=1)
    print(text)
    options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
