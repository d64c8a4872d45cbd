"""How much of an asynchronous all-reduce hides behind compute on two GPUs.

    python benches/overlap.py --out FILE [--algorithms auto,copy-two-shot] [--sizes 16777216,67108864]

On each GPU an all-reduce begins beside the stream and a compute kernel that takes as long runs on the
stream; the stream then waits for the all-reduce. The figure is the time of both over the longer of the two
alone: 1 hides everything, 2 nothing. Two kinds of compute:

- `waves`: multiply-adds in blocks of 256 threads, eight for each multiprocessor at a time, in 16 waves: its
  blocks end often, and what is urgent gets in between;
- `matmul`: one torch.mm of bf16, 4096 x k x 4096: its blocks stay until the end, one on each multiprocessor.
"""

import argparse
import ctypes
import json
import pathlib
import statistics
from collections.abc import Callable, Iterable
from functools import partial

import peerlane
import torch

PTX = b"""
.version 7.8
.target sm_80
.address_size 64
.visible .entry multiply_add(.param .u64 out, .param .u32 rounds)
{
 .reg .f32 %f<6>; .reg .b32 %i, %n; .reg .pred %p; .reg .b64 %o;
 ld.param.u64 %o, [out]; ld.param.u32 %n, [rounds]; mov.u32 %i, 0;
 mov.f32 %f1, 0f3F800000; mov.f32 %f2, 0f3F800001; mov.f32 %f3, 0f3F800002; mov.f32 %f4, 0f3F800003;
 mov.f32 %f5, 0f3F7FFFFF;
LOOP:
 fma.rn.f32 %f1, %f1, %f5, %f5; fma.rn.f32 %f2, %f2, %f5, %f5;
 fma.rn.f32 %f3, %f3, %f5, %f5; fma.rn.f32 %f4, %f4, %f5, %f5;
 add.u32 %i, %i, 1; setp.lt.u32 %p, %i, %n; @%p bra LOOP;
 add.f32 %f1, %f1, %f2; add.f32 %f3, %f3, %f4; add.f32 %f1, %f1, %f3;
 setp.eq.f32 %p, %f1, 0f00000000; @%p st.global.f32 [%o], %f1;
 ret;
}
\0"""
WAVES, BLOCKS_AT_ONCE, THREADS = 16, 8, 256
REPETITIONS = 15
# Long enough for the host to queue everything behind it.
HEAD_START_CYCLES = 2_000_000

cuda = ctypes.CDLL("libcuda.so.1")


def check(code: int, call: str) -> None:
    if code:
        text = ctypes.c_char_p()
        cuda.cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"{call}: {(text.value or b'?').decode()}")


class Waves:
    """The multiply-adds on one GPU. A size is a number of rounds."""

    name, first_size, step = "waves", 100, 1

    def __init__(self, gpu: int) -> None:
        self.gpu, module = gpu, ctypes.c_void_p()
        self.function = ctypes.c_void_p()
        with torch.cuda.device(gpu):
            check(cuda.cuModuleLoadData(ctypes.byref(module), PTX), "cuModuleLoadData")
        check(
            cuda.cuModuleGetFunction(
                ctypes.byref(self.function), module, b"multiply_add"
            ),
            "cuModuleGetFunction",
        )
        self.sink = torch.zeros(1, device=f"cuda:{gpu}")
        count = torch.cuda.get_device_properties(gpu).multi_processor_count
        self.blocks = WAVES * BLOCKS_AT_ONCE * count

    def run(self, size: int) -> None:
        out, rounds = ctypes.c_uint64(self.sink.data_ptr()), ctypes.c_uint32(size)
        pointers = (ctypes.c_void_p * 2)(
            ctypes.addressof(out), ctypes.addressof(rounds)
        )
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        launch = (
            self.function,
            self.blocks,
            1,
            1,
            THREADS,
            1,
            1,
            0,
            stream,
            pointers,
            None,
        )
        check(cuda.cuLaunchKernel(*launch), "cuLaunchKernel")


class Matmul:
    """One torch.mm on one GPU. A size is the inner dimension."""

    name, first_size, step, outer, most = "matmul", 4096, 64, 4096, 65536

    def __init__(self, gpu: int) -> None:
        kind = {"device": f"cuda:{gpu}", "dtype": torch.bfloat16}
        self.left = torch.randn(self.outer * self.most, **kind)
        self.right = torch.randn(self.most * self.outer, **kind)
        self.out = torch.empty(self.outer, self.outer, **kind)

    def run(self, size: int) -> None:
        left = self.left[: self.outer * size].view(self.outer, size)
        right = self.right[: size * self.outer].view(size, self.outer)
        torch.mm(left, right, out=self.out)


class Rank:
    """A communicator, its tensor and what computes beside it."""

    def __init__(self, communicator: peerlane.Communicator, gpu: int) -> None:
        self.communicator, self.gpu = communicator, gpu
        self.stream = torch.cuda.Stream(f"cuda:{gpu}")
        self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def issue(
        self, tensor: "torch.Tensor | None", compute: Callable[[], None] | None
    ) -> None:
        with torch.cuda.device(self.gpu), torch.cuda.stream(self.stream):
            torch.cuda._sleep(HEAD_START_CYCLES)
            self.communicator.barrier()
            self.begin.record()
            work = (
                None if tensor is None else self.communicator.all_reduce_async(tensor)
            )
            if compute:
                compute()
            if work:
                work.wait()
            self.end.record()


def microseconds(
    ranks: list[Rank],
    tensors: "Iterable[torch.Tensor | None]",
    computes: Iterable[Callable[[], None] | None],
) -> float:
    """Median over repetitions of the slowest rank's time."""
    tensors, computes, samples = list(tensors), list(computes), []
    for _ in range(REPETITIONS + 3):
        for rank, tensor, compute in zip(ranks, tensors, computes):
            rank.issue(tensor, compute)
        for rank in ranks:
            rank.stream.synchronize()
            rank.communicator.health()
        samples.append(max(1e3 * rank.begin.elapsed_time(rank.end) for rank in ranks))
    return statistics.median(samples[3:])


def sized(ranks: list[Rank], kernels: list, aim: float) -> tuple[int, float]:
    """The size at which the kernels take about `aim` microseconds, and what they take."""
    size, nothing = kernels[0].first_size, [None] * len(ranks)
    for _ in range(4):
        took = microseconds(ranks, nothing, [partial(k.run, size) for k in kernels])
        if abs(took / aim - 1) < 0.02:
            break
        scaled = round(size * aim / took / kernels[0].step) * kernels[0].step
        size = max(kernels[0].step, min(scaled, getattr(kernels[0], "most", scaled)))
    return size, took


def measure(
    algorithm: str | None, sizes: list[int], kinds: list[type]
) -> Iterable[dict]:
    gpus = [0, 1]
    communicators = peerlane.Communicator.connect(
        [torch.device("cuda", gpu) for gpu in gpus], algorithm=algorithm
    )
    ranks = [Rank(c, gpu) for c, gpu in zip(communicators, gpus)]
    for kind in kinds:
        kernels = [kind(gpu) for gpu in gpus]
        for size in sizes:
            tensors = [
                torch.ones(size // 2, device=f"cuda:{g}").bfloat16() for g in gpus
            ]
            for gpu in gpus:
                torch.cuda.synchronize(gpu)
            comm = microseconds(ranks, tensors, [None, None])
            rounds, compute = sized(ranks, kernels, comm)
            both = microseconds(
                ranks, tensors, [partial(k.run, rounds) for k in kernels]
            )
            row = {
                "algorithm": algorithm or "auto",
                "compute": kind.name,
                "bytes": size,
            }
            row |= {
                "all_reduce_us": comm,
                "compute_us": compute,
                "compute_size": rounds,
            }
            row |= {"both_us": both, "ratio": both / max(comm, compute)}
            print(
                f"{row['algorithm']:15} {kind.name:7} {size >> 20:3} MiB  "
                f"{comm:7.1f} and {compute:7.1f} us alone, {both:7.1f} together: {row['ratio']:.2f}",
                flush=True,
            )
            yield row
    for communicator in communicators:
        communicator.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument(
        "--algorithms", default="auto,two-shot,copy-two-shot,copy-one-shot"
    )
    parser.add_argument("--sizes", default="16777216,67108864")
    parser.add_argument("--compute", default="waves,matmul")
    options = parser.parse_args()
    sizes = [int(size) for size in options.sizes.split(",")]
    kinds = [
        kind for kind in (Waves, Matmul) if kind.name in options.compute.split(",")
    ]
    for gpu in (0, 1):
        # What is loaded while another rank's work is waited for would never be loaded.
        with torch.cuda.device(gpu):
            torch.zeros(1, device=f"cuda:{gpu}")
            for kind in kinds:
                kind(gpu).run(kind.first_size)
            torch.cuda._sleep(1000)
            torch.cuda.synchronize()
    rows = []
    for name in options.algorithms.split(","):
        rows += measure(None if name == "auto" else name, sizes, kinds)
    result = {
        "command": "python benches/overlap.py",
        "gpu": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "rows": rows,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
