"""The compiled part of peerlane. A tensor is a torch.Tensor, an object with
__cuda_array_interface__ or, on a simulated GPU, a numpy array from Communicator.empty."""

from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from types import TracebackType
from typing import Any, Literal, TypeAlias

_Device: TypeAlias = int | str | Any  # or torch.device
_Stream: TypeAlias = int | Any | None  # or torch.cuda.Stream
_Event: TypeAlias = int | Event | Any  # or torch.cuda.Event
_Op: TypeAlias = Literal["sum", "max", "min", "avg"]
_Wire: TypeAlias = Literal["native", "bf16"]
_DType: TypeAlias = Literal["float32", "float16", "bfloat16"]
_Algorithm: TypeAlias = Literal[
    "auto",
    "packet",
    "full",
    "two-shot",
    "staged",
    "ring",
    "tree",
    "double-tree",
    "hierarchical",
    "copy-two-shot",
    "copy-ring",
    "copy-tree",
    "copy-double-tree",
    "copy-hierarchical",
    "copy-one-shot",
]
_Route: TypeAlias = Literal[
    "auto",
    "direct",
    "hub",
    "chain",
    "tree",
    "double-tree",
    "copy-direct",
    "copy-hub",
    "copy-chain",
    "copy-tree",
    "copy-double-tree",
]
_Tuning: TypeAlias = str | PathLike[str]  # "auto", "off" or a file
_Transport: TypeAlias = Literal["auto", "p2p", "host"]

class Communicator:
    """One rank of a group of GPUs. The calls queue work on a stream and return at once.

    A tensor must stay alive until the stream has passed the call. Ranks make the same calls in the
    same order.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        name: str,
        device: _Device,
        *,
        deadline: float = 10.0,
        patience: float = 120.0,
        mailbox_bytes: int | None = None,
        staging_bytes: int | None = None,
        chunk_bytes: int | None = None,
        max_blocks: int | None = None,
        algorithm: _Algorithm | None = None,
        route: _Route | None = None,
        fixed: bool = False,
        exact: bool = True,
        tuning: _Tuning = "auto",
        transport: _Transport | None = None,
        sizing: bool | tuple[int, int] = False,
        first_deadline: float | None = None,
        checked: bool = False,
    ) -> None:
        """Joins the group called name and returns once all world_size ranks have.

        device is the index of a GPU, "cuda:0", a torch.device, or "sim:3/8" for GPU 3 of a
        simulated machine of 8. Waits on the GPU end after deadline seconds, in a rank's first call
        after first_deadline (six times as long), the wait for the other ranks to join after patience
        seconds. With checked, ranks compare on the GPU what they call, and checksums of what travels
        (docs/reliability.md). transport says what carries data: "p2p", "host"
        (pinned host memory), or "auto", each pair's better one. What is left out of algorithm, route,
        fixed, exact, tuning and transport the environment may say (docs/tuning.md). With sizing,
        adapt may change mailbox_bytes, between the least and the most bytes given (docs/sizing.md).
        Algorithms and routes called copy-... copy through a staging area of staging_bytes, chunk_bytes
        at once; without either there is one of 64 MiB if algorithm or route is one of those.
        """

    @staticmethod
    def connect(
        devices: Iterable[_Device],
        *,
        deadline: float = 10.0,
        mailbox_bytes: int | None = None,
        staging_bytes: int | None = None,
        chunk_bytes: int | None = None,
        max_blocks: int | None = None,
        algorithm: _Algorithm | None = None,
        route: _Route | None = None,
        fixed: bool = False,
        exact: bool = True,
        tuning: _Tuning = "auto",
        transport: _Transport | None = None,
        sizing: bool | tuple[int, int] = False,
        first_deadline: float | None = None,
        checked: bool = False,
    ) -> list[Communicator]:
        """All ranks of a group in this process, rank r on devices[r], for one thread to drive."""

    @property
    def rank(self) -> int:
        """This rank's number."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""

    @property
    def generation(self) -> int:
        """How often the ranks have recovered or shrunk."""

    @property
    def device(self) -> str:
        """This rank's GPU."""

    @property
    def mailbox_bytes(self) -> int:
        """Bytes of device memory that this rank's mailbox takes."""

    def transport(self, from_rank: int, to_rank: int) -> Literal["p2p", "host"]:
        """What carries data from one rank to another."""

    def all_reduce(
        self,
        tensor: Any,
        out: Any | None = None,
        *,
        op: _Op = "sum",
        wire: _Wire = "native",
        contribution: bool = True,
        dtype: _DType | None = None,
        algorithm: _Algorithm | None = None,
        stream: _Stream = None,
        registration: Registration | None = None,
    ) -> None:
        """Every rank ends with the reduction of all ranks' tensors, in place without an out.

        wire="bf16" sends float32 elements as bfloat16. With contribution=False this rank adds
        nothing and still receives. dtype="bfloat16" says what two-byte elements are that the
        array cannot name. With a registration the tensor is the registered one or a part of it,
        at a multiple of 16 bytes that is the same on every rank, and is reduced without a mailbox.
        algorithm comes before the communicator's.
        """

    def register(self, tensor: Any) -> Registration:
        """Lets every rank reach this tensor of every other. All ranks call it, each from its own
        thread or process, with as many bytes, and wait for each other up to the deadline."""

    def deregister(self, registration: Registration) -> None:
        """Ends the use of a registration. All ranks call it; it waits for this rank's GPU."""

    @staticmethod
    def register_all(ranks: list[Communicator], tensors: list[Any]) -> list[Registration]:
        """register, for one thread that drives all ranks."""

    @staticmethod
    def deregister_all(ranks: list[Communicator], registrations: list[Registration]) -> None:
        """deregister, for one thread that drives all ranks."""

    def prepare_all_reduce(
        self,
        *,
        op: _Op = "sum",
        wire: _Wire = "native",
        retry: Callable[[Exception], bool] | None = None,
    ) -> PreparedAllReduce:
        """An all-reduce in place whose options are fixed, for callers to whom every microsecond
        counts. When a call fails, retry gets the exception, and says whether to call once more."""

    def reduce_scatter(
        self,
        tensor: Any,
        out: Any,
        *,
        op: _Op = "sum",
        wire: _Wire = "native",
        contribution: bool = True,
        dtype: _DType | None = None,
        stream: _Stream = None,
    ) -> None:
        """Rank r ends with the reduction of all ranks' r-th parts."""

    def all_gather(self, tensor: Any, out: Any, *, stream: _Stream = None) -> None:
        """Every rank ends with all ranks' tensors, one after the other in rank order."""

    def broadcast(
        self, tensor: Any, root: int, *, route: _Route | None = None, stream: _Stream = None
    ) -> None:
        """Every rank ends with the root's tensor, in place. route comes before the communicator's."""

    def gather(
        self,
        tensor: Any | None,
        out: Any | None,
        root: int,
        widths: Sequence[int],
        *,
        stream: _Stream = None,
    ) -> None:
        """The root ends with the tensors of all ranks that have one, joined along their last
        dimension.

        widths holds every rank's last dimension, 0 for a rank that brings nothing. out is None on
        all ranks but the root; a rank that is neither the root nor brings anything need not call.
        """

    def all_reduce_async(
        self,
        tensor: Any,
        out: Any | None = None,
        *,
        op: _Op = "sum",
        wire: _Wire = "native",
        contribution: bool = True,
        dtype: _DType | None = None,
        algorithm: _Algorithm | None = None,
        stream: _Stream = None,
    ) -> Work:
        """all_reduce beside the stream: begins once the stream has come to it, and the stream goes
        on. The tensors must not be touched until the work is done; the work keeps them alive."""

    def reduce_scatter_async(
        self,
        tensor: Any,
        out: Any,
        *,
        op: _Op = "sum",
        wire: _Wire = "native",
        contribution: bool = True,
        dtype: _DType | None = None,
        stream: _Stream = None,
    ) -> Work:
        """reduce_scatter beside the stream."""

    def all_gather_async(self, tensor: Any, out: Any, *, stream: _Stream = None) -> Work:
        """all_gather beside the stream."""

    def broadcast_async(
        self, tensor: Any, root: int, *, route: _Route | None = None, stream: _Stream = None
    ) -> Work:
        """broadcast beside the stream."""

    def gather_async(
        self,
        tensor: Any | None,
        out: Any | None,
        root: int,
        widths: Sequence[int],
        *,
        stream: _Stream = None,
    ) -> Work:
        """gather beside the stream."""

    def all_reduce_chunks(
        self,
        tensor: Any,
        chunks: Sequence[tuple[int, int, _Event]],
        *,
        op: _Op = "sum",
        wire: _Wire = "native",
        contribution: bool = True,
        dtype: _DType | None = None,
    ) -> list[Work]:
        """Reduces a tensor in place in chunks (first_row, rows, event) of its first dimension, in
        the order given, each once its event has come. The events are recorded before the call.

        All ranks bring the same chunks. A call that raises after some chunks have begun keeps the
        tensor alive until the communicator is closed.
        """

    def record_event(self, *, stream: _Stream = None) -> Event:
        """An event recorded on the stream, for all_reduce_chunks without torch."""

    def barrier(self, *, stream: _Stream = None) -> None:
        """Holds the stream until every rank has reached its barrier."""

    def synchronize(self, stream: _Stream = None) -> None:
        """Waits until everything queued on the stream is done, then raises what went wrong."""

    def adapt(self) -> bool:
        """Lets the sizes of mailboxes follow the calls since the last time; whether there is new
        memory. All ranks call it, each in its thread or process, after the same calls."""

    @staticmethod
    def adapt_all(ranks: Sequence[Communicator]) -> bool:
        """adapt for all ranks of a group of connect, in rank order, by one thread."""

    @property
    def calls(self) -> int:
        """How many calls of this rank have been queued, captured ones included."""

    def recover(self) -> None:
        """Brings the communicator back after an abort, a time-out or any other error of its calls. All ranks
        call it, each in its thread or process. Tensors, registrations and CUDA graphs stay valid."""

    @staticmethod
    def recover_all(ranks: Sequence[Communicator]) -> None:
        """recover for all ranks of a group of connect, in rank order, by one thread."""

    def shrink(self, without: Iterable[int]) -> None:
        """Goes on without these ranks, which are gone or hang. All others call it, each in its thread or process, and
        are numbered anew. CUDA graphs with earlier calls must not run any more; tensors are registered again."""

    @staticmethod
    def shrink_all(ranks: Sequence[Communicator], without: Iterable[int]) -> None:
        """shrink for all ranks that are left of a group of connect, in rank order, by one thread."""

    def usage(self) -> dict[str, Any]:
        """What this rank's calls have brought: calls, bytes, largest, largest_since (the last adapt) and
        several_turns (did not fit at once) for all_reduce, scheduled, reduce_scatter, all_gather, broadcast,
        gather and barrier; captured (with sizing), adapts, resizes, mailbox_bytes, staging_bytes."""

    def health(self) -> None:
        """Raises what went wrong so far; never waits."""

    def set_deadline(self, seconds: float) -> None:
        """How long this rank's waits may last from its next call on."""

    def abort(self) -> None:
        """Ends every wait of every rank; their calls raise from then on."""

    def close(self) -> None:
        """Waits for everything queued on this rank's GPU and leaves the group.

        Raises what went wrong before, if nothing has raised it yet. A second call does nothing.
        """

    def empty(self, shape: int | Iterable[int], dtype: Any) -> Any:
        """A numpy array in this rank's memory, which must be simulated.

        dtype is numpy's, or "bfloat16": then ml_dtypes.bfloat16 if that can be imported, else
        uint16.
        """

    def __enter__(self) -> Communicator: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        _value: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None: ...

def topology(devices: Iterable[_Device] | None = None) -> dict[str, Any]:
    """The GPUs, or all real ones, and how they reach each other: `peerlane topo --json`'s facts."""

def version() -> str:
    """The version of the library."""

class Span:
    """A span of this thread for `with`: recorded at its end, if this process records, with its arguments: ints
    from 0 on as they are, all else as str() has it. `pass=KIND` makes it a pass, whose stages are summed up; `sends` and
    `hears` name the two ends of a message."""

    def __init__(self, name: str, /, **args: object) -> None: ...
    def __enter__(self) -> Span: ...
    def __exit__(self, *_why: object) -> bool: ...

def trace_start(directory: str | PathLike[str]) -> None:
    """Records this process into a new file in the directory until it ends. UnsupportedError if that cannot be, or it records
    already. `peerlane trace --from DIR` shows the files of all processes."""

def trace_flush() -> None:
    """Writes what has been recorded until now; a process that ends in an orderly way does so itself."""

def trace_is_recording() -> bool:
    """Whether this process records."""

class PreparedAllReduce:
    """An all-reduce in place whose options are fixed."""

    def run(self, tensor: Any, contribution: bool = True) -> None:
        """`Communicator.all_reduce` of `tensor` on torch's current stream."""

class Registration:
    """A tensor of each rank that all ranks reach. It keeps its rank's tensor alive until it is
    deregistered; if it goes before, the communicator does until it is closed."""

    @property
    def nbytes(self) -> int:
        """Bytes of each rank's tensor."""

class Work:
    """An asynchronous call. It keeps its tensors alive until it is known to be done; if the work
    goes before that, the communicator does."""

    def query(self) -> bool:
        """Whether the call is done, well or not."""

    def wait(self, stream: _Stream = None) -> None:
        """Makes the stream wait for the call, torch's current stream if none is given. The host
        does not wait."""

    def synchronize(self) -> None:
        """Waits on the host until the call is done, then raises what went wrong in it or before."""

class Workers:
    """The ranks of this process, each with a thread of its own that runs recorded lists without the
    interpreter. It takes the communicators over: they are closed to others."""

    def __init__(
        self, ranks: Sequence[Communicator], *, spin: float | None = None, near: bool = True
    ) -> None:
        """`ranks` are those of `Communicator.connect`, or some of them. For `spin` seconds a thread looks for its
        next list before it sleeps; None: 100 us where there is a core for each, else none. `near` keeps each
        thread on the cores that the system says are near its GPU."""

    def list(self) -> WorkList:
        """An empty list for these ranks, which are counted from 0 in their order here."""

    def run(self, list: WorkList) -> None:
        """Queues a list on all ranks, on their own streams; returns once all of it is queued. Raises what the first
        rank met, a callback's exception included; the group has to recover then."""

    def synchronize(self) -> None:
        """Waits until all that was queued is done on all ranks, then raises what went wrong."""

    def recover(self) -> None:
        """Lets all ranks go on after an error, as Communicator.recover."""

    def stream(self, rank: int) -> int:
        """The stream that a rank's operations are queued on: a cudaStream_t, for torch.cuda.ExternalStream."""

    def is_near(self, rank: int) -> bool:
        """Whether a rank's thread stays on the cores near its GPU."""

    def abort(self) -> None:
        """Ends all waits of all ranks, from any thread."""

    def close(self) -> None:
        """Waits for what is queued, ends the threads and closes the ranks."""

    def __len__(self) -> int: ...
    def __enter__(self) -> Workers: ...
    def __exit__(self, *_why: object) -> None: ...

class WorkList:
    """Operations of all ranks, in the order in which they are queued; tensors and functions stay alive as long
    as it does. What is added after a run is part of the next one."""

    def all_reduce(
        self,
        tensors: Sequence[Any],
        *,
        op: _Op = "sum",
        wire: _Wire = "native",
        dtype: _DType | None = None,
    ) -> None:
        """Every rank's tensor becomes the reduction of all ranks', in place."""

    def all_gather(self, tensors: Sequence[Any], outs: Sequence[Any]) -> None:
        """Every rank's out becomes all ranks' tensors, one after the other in rank order."""

    def broadcast(self, tensors: Sequence[Any], root: int, *, route: _Route | None = None) -> None:
        """Every rank's tensor becomes that of rank root."""

    def barrier(self) -> None:
        """No rank's stream goes on before all have come here."""

    def copy(self, rank: int, out: Any, tensor: Any) -> None:
        """Copies a tensor of one rank's GPU to another of the same size there."""

    def callback(self, rank: int, function: Callable[[int, int], object]) -> None:
        """Calls function(rank, stream) on that rank's thread, when everything before it has been queued, not done."""

    def __len__(self) -> int: ...

class Event:
    """A recorded event."""

    @property
    def cuda_event(self) -> int:
        """The CUDA event."""

class ChannelMessage:
    """A message of a channel."""

    @property
    def payload(self) -> bytes:
        """Its bytes."""

    @property
    def kind(self) -> int:
        """What the writer calls it."""

    @property
    def flags(self) -> int:
        """More of that."""

    @property
    def sequence(self) -> int:
        """Its number among all messages of the channel, counted from 1."""

class ChannelWriter:
    """The end of a channel that sends: one writer, up to 32 readers, a ring in shared memory.

    capacity is the ring's bytes, 4096 to 2**32, rounded up to a power of two; spin is for how many
    seconds waits spin before they sleep (20e-6). Waits release the GIL. ValueError names a wrong
    argument; DeadlineError, PeerLostError, ClosedError, AbortedError (poisoned) and CorruptError
    say what became of the channel.
    """

    def __init__(self, capacity: int, readers: int, *, spin: float | None = None) -> None: ...
    @property
    def handle(self) -> str:
        """The text by which a reader opens the channel, in any process of this user."""

    @property
    def max_payload(self) -> int:
        """Most bytes of a payload."""

    @property
    def readers(self) -> int:
        """Number of readers."""

    def send(
        self,
        payload: Any,
        *,
        kind: int | None = None,
        flags: int | None = None,
        readers: Iterable[int] | None = None,
        timeout: float | None = None,
    ) -> int:
        """Sends the bytes of payload, and what was staged, to readers (their indices; all that are
        not forgotten if None). kind and flags are 16 bits for the caller (0). Waits for space for
        up to timeout seconds (10). Returns the message's sequence number."""

    def stage(
        self,
        payload: Any,
        *,
        kind: int | None = None,
        flags: int | None = None,
        readers: Iterable[int] | None = None,
        timeout: float | None = None,
    ) -> int:
        """As send, but readers see it with the next publish or send."""

    def publish(self) -> None:
        """Lets the readers see what was staged, with one wake-up at most for all of them."""

    def attached(self, reader: int) -> bool:
        """Whether this reader has opened the channel."""

    def forget(self, reader: int) -> None:
        """Goes on without a reader, dead or alive."""

    def poison(self, reason: int = 0) -> None:
        """Ends the channel at once, and every wait on every side. May be called by any thread."""

    def close(self) -> None:
        """Closes the channel: readers receive what was sent before, then ClosedError."""

    def __enter__(self) -> ChannelWriter: ...
    def __exit__(self, *_exception: object) -> None: ...

class ChannelReader:
    """The end of a channel that receives, as reader index of the ChannelWriter whose handle it is."""

    def __init__(self, handle: str, index: int, *, spin: float | None = None) -> None: ...
    @property
    def index(self) -> int:
        """Which reader it is."""

    def recv(self, timeout: float | None = None) -> ChannelMessage:
        """The next message; waits for up to timeout seconds (10)."""

    def poll(self, timeout: float | None = None) -> bool:
        """Whether there is a message; waits for one for up to timeout seconds (0)."""

    def try_recv(self) -> ChannelMessage | None:
        """The next message, or None if there is none yet."""

    def poison(self, reason: int = 0) -> None:
        """Ends the channel at once, and every wait on every side. May be called by any thread."""

    def close(self) -> None:
        """Closes this end: sending to it is an error from then on."""

    def __enter__(self) -> ChannelReader: ...
    def __exit__(self, *_exception: object) -> None: ...

class TensorExporter:
    """Hands tensors in host memory to up to 32 importers, processes of this user, through shared memory.

    The arena has least bytes (2**20) from the beginning and grows up to most (2**34); tensors that are
    kept by name may have named bytes (2**32) beside it. With checksums every import compares one.
    ValueError and TypeError name a wrong argument; UnsupportedError says that there is no room, and
    who holds what was given up; ClosedError that it was closed.
    """

    def __init__(
        self,
        *,
        least: int | None = None,
        most: int | None = None,
        named: int | None = None,
        checksums: bool = False,
    ) -> None: ...
    @property
    def handle(self) -> str:
        """The text by which importers open it, in any process of this user."""

    def export(self, tensor: Any, *, name: int | None = None, owner: Any = None) -> bytes:
        """Copies a tensor in host memory (anything with __dlpack__) into the arena, and returns its
        descriptor. One with a name is copied the first time only and kept through clear; as long, it
        is kept alive, or owner in its place."""

    def find(self, name: int) -> bytes | None:
        """The descriptor of the tensor that is kept under this name."""

    def clear(self) -> None:
        """Gives up everything exported so far but what has a name. Views stay as they are."""

    def usage(self) -> dict[str, int]:
        """Bytes reserved, used since the last clear, used at most, and kept by name; segments made."""

    def close(self) -> None:
        """Ends it. Views stay as they are."""

    def __enter__(self) -> TensorExporter: ...
    def __exit__(self, *_exception: object) -> None: ...

class TensorImporter:
    """Opens the arena of a TensorExporter, by its handle, as the importer of this index, below 32,
    which no other process is."""

    def __init__(self, handle: str, index: int) -> None: ...
    def import_(self, descriptor: bytes) -> TensorView:
        """The tensor of a descriptor, where it is. ClosedError if the exporter has given it up;
        CorruptError if the descriptor is none, or the checksum is another."""

class TensorView:
    """A tensor in an exporter's memory, which stays as it is while the view or anything made of it by
    from_dlpack lives. Other processes see the same memory: do not write."""

    @property
    def shape(self) -> list[int]:
        """Its sizes, outermost first."""

    @property
    def nbytes(self) -> int:
        """Its bytes, without gaps."""

    def narrow(self, dim: int, first: int, last: int) -> TensorView:
        """The part of it with the indices from first to before last in dimension dim."""

    def __dlpack__(
        self,
        stream: Any = None,
        *,
        max_version: Any = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """For from_dlpack of numpy, torch and others. BufferError if they ask for a copy."""

    def __dlpack_device__(self) -> tuple[int, int]:
        """Host memory."""

    def map(self, device: Any) -> MappedTensor:
        """The same for a GPU ("cuda:0"), which reads it where it lies, over its bus. Pins its pages, of which each can be in one
        MappedTensor of a process only. DriverError if the driver does not pin them."""

class MappedTensor:
    """A tensor in an exporter's memory that a GPU reads. It stays as it is, and pinned, while this or anything made of it by from_dlpack
    lives. Kernels must not write it."""

    @property
    def device(self) -> str:
        """The GPU."""

    @property
    def data_ptr(self) -> int:
        """Where the GPU finds its first element."""

    def __dlpack__(
        self,
        stream: Any = None,
        *,
        max_version: Any = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """For from_dlpack of torch and others. BufferError if they ask for a copy, or on a simulated GPU."""

    def __dlpack_device__(self) -> tuple[int, int]:
        """Its GPU's."""
