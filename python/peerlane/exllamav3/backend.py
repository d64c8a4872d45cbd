"""`TPBackendP2P`: ExLlamaV3's tensor-parallel collectives on a Peerlane communicator.

It has the constructor arguments and methods of ExLlamaV3's `TPBackendNative` and is used the same
way: one object per process, one process per GPU, and one more process (device -1) that only native
needs. Calls work in place on torch's current stream of their device and return at once.

Invariants:
- A rank is a device's place in the sorted device list. ExLlamaV3 joins gathered parts by device
  index, while `active_devices` has the output device last.
- All processes of a model use the same backend. Where the machine cannot do P2P, joining fails with
  the same error on every rank, and every rank then hands all calls to a `TPBackendNative`. The
  helper process starts later and finds the verdict in its environment.
- A failed wait is an exception, before the pass returns, on the rank that waited (`check="late"`:
  at a later call). The ranks recover together at the first call of their next pass, which then
  runs as if nothing had been; a rank whose process is gone cannot come back, and the error repeats.
- The extension checks tensors: a call that raises has launched nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import peerlane

from .options import Options, announce, log

if TYPE_CHECKING:
    import torch

# What says "this machine cannot do it", on all ranks alike. A rank that does not come is no such
# reason: the others cannot know what it will use.
_IMPOSSIBLE = (peerlane.UnreachableError, peerlane.UnsupportedError, peerlane.NoDriverError)

_METHODS = (
    "all_reduce",
    "broadcast",
    "gather",
    "gather_small",
    "fwd_barrier",
    "run_cpu_reduce_jobs",
    "end_cpu_reduce_jobs",
    "close",
)


class TPBackendP2P:
    """Tensor-parallel backend that writes straight into the other GPUs' memory."""

    all_reduce: Callable[..., None]
    """`all_reduce(tensor, contribution=True)` sums `tensor` over all ranks, in place. With
    `contribution=False` the tensor holds zeros, which are not sent; it still receives the sum."""

    def __init__(
        self,
        device: int,
        active_devices: list[int],
        output_device: int,
        init_method: str,
        master: bool,
        uuid: str,
        shbuf_size: int | None = None,
        cpu: bool = False,
        *,
        options: Options | None = None,
    ) -> None:
        """Joins the model's other processes; returns once all have joined.

        `init_method`, `shbuf_size` and `cpu` matter to native only. The helper process (`device`
        below 0) joins nobody. Raises `peerlane.RendezvousError` if a rank does not come.
        """
        self.device = device
        self.active_devices = list(active_devices)
        self.output_device = output_device
        self.master = master
        self.uuid = uuid
        self.options = options or Options.from_env()
        # None in the helper, and where native does the work.
        self.communicator: Any = None
        self.native: Any = None
        self._ranks = {device: rank for rank, device in enumerate(sorted(active_devices))}
        self._first_pass = True
        # Calls made until the end of the last pass.
        self._calls_before = 0
        self._last_gather: tuple[Any, int, list[int], int] | None = None

        native = {
            "device": device,
            "active_devices": active_devices,
            "output_device": output_device,
            "init_method": init_method,
            "master": master,
            "uuid": uuid,
            "cpu": device < 0,
        }
        if shbuf_size is not None:
            native["shbuf_size"] = shbuf_size

        if device < 0:
            if verdict_key(uuid) in os.environ:
                self._use_native(native)
            return
        rank = self._rank("device", device)
        self._rank("output_device", output_device)
        try:
            self.communicator = peerlane.Communicator(
                rank,
                len(self._ranks),
                f"exllamav3-{uuid}",
                self.options.device_format.format(device=device),
                deadline=max(self.options.first_deadline, self.options.deadline),
                # No more for the first call alone: `end_cpu_reduce_jobs` knows when the first pass is done.
                first_deadline=self.options.deadline,
                patience=self.options.patience,
                transport=self.options.transport,
            )
        except _IMPOSSIBLE as reason:
            self._fall_back(native, reason)
            return
        # One call from ExLlamaV3 into the extension, with no Python frame between.
        prepared = self.communicator.prepare_all_reduce(
            wire=self.options.wire, retry=self._may_repeat
        )
        self.all_reduce = prepared.run
        if master:
            wire = self.options.wire
            travel = "fp32" if wire == "native" else wire
            announce(
                f"TP backend: p2p, world size {len(self._ranks)}, fp32 sums travel as {travel}"
            )

    def broadcast(self, tensor: torch.Tensor, src_device: int) -> None:
        """Overwrites `tensor` with that of `src_device`, byte by byte."""
        self._call(self.communicator.broadcast, tensor, self._rank("src_device", src_device))

    def gather(
        self,
        tensor: torch.Tensor,
        out_tensor: torch.Tensor | None,
        gather_devices: Sequence[int],
        out_device: int,
        ldims: Sequence[int],
    ) -> None:
        """Joins the tensors of `gather_devices` along the last dimension in `out_tensor` of
        `out_device`, in the order of device indices. `ldims` are their widths; 0 for none."""
        # A model gathers the same way in every pass; comparing two short lists is cheaper than
        # checking them again.
        if self._last_gather is None or self._last_gather[0] != (gather_devices, ldims, out_device):
            self._last_gather = self._plan_gather(gather_devices, out_device, ldims)
        _, root, widths, total = self._last_gather
        if self.device not in gather_devices:
            return

        width = widths[self._ranks[self.device]]
        shape = tensor.shape
        if shape[-1] != width:
            raise _invalid("tensor", f"a last dimension of {width}, as ldims says", tuple(shape))
        if self.device == out_device:
            joined = (*shape[:-1], total)
            got = None if out_tensor is None else tuple(out_tensor.shape)
            if got != joined:
                raise _invalid("out_tensor", f"shape {joined} on the output device", got)
        elif width == 0:
            return
        else:
            out_tensor = None
        source = tensor if width else None
        self._call(self.communicator.gather, source, out_tensor, root, widths)

    def _plan_gather(
        self, gather_devices: Sequence[int], out_device: int, ldims: Sequence[int]
    ) -> tuple[Any, int, list[int], int]:
        """What was asked for, the root, every rank's width, and their sum."""
        if len(ldims) != len(gather_devices):
            raise _invalid(
                "ldims", f"{len(gather_devices)} widths, one per gather device", list(ldims)
            )
        widths = [0] * len(self._ranks)
        for device, width in zip(gather_devices, ldims):
            widths[self._rank("gather_devices", device)] = width
        if len(set(gather_devices)) != len(gather_devices):
            raise _invalid("gather_devices", "each device once", list(gather_devices))
        if min(ldims, default=0) < 0:
            raise _invalid("ldims", "widths of 0 or more", list(ldims))
        root = self._rank("out_device", out_device)
        if out_device not in gather_devices:
            raise _invalid(
                "out_device", f"one of gather_devices {list(gather_devices)}", out_device
            )
        # Copies: the caller may change its lists.
        asked = (list(gather_devices), list(ldims), out_device)
        return asked, root, widths, sum(ldims)

    def gather_small(
        self,
        tensor: torch.Tensor,
        out_tensor: torch.Tensor | None,
        gather_devices: Sequence[int],
        out_device: int,
        ldims: Sequence[int],
    ) -> None:
        """`gather`: any element type and width will do there as well."""
        self.gather(tensor, out_tensor, gather_devices, out_device, ldims)

    def fwd_barrier(self) -> None:
        """Holds this rank's stream until all ranks' streams have come here."""
        self._call(self.communicator.barrier)

    def run_cpu_reduce_jobs(self) -> None:
        """The helper process has nothing to do."""

    def end_cpu_reduce_jobs(self) -> None:
        """Ends a pass: raises if one of its waits failed."""
        if self.communicator is None:
            return
        try:
            if self.options.check == "sync":
                self.communicator.synchronize()
            else:
                self.communicator.health()
        except peerlane.Error:
            self._pass_failed()
            raise
        self._calls_before = self.communicator.calls
        if self._first_pass:
            self._first_pass = False
            self.communicator.set_deadline(self.options.deadline)

    def _call(self, method: Callable[..., None], *arguments: Any) -> None:
        try:
            method(*arguments)
        except peerlane.Error as error:
            if not self._may_repeat(error):
                raise
            method(*arguments)

    def _may_repeat(self, error: Exception) -> bool:
        """Whether the call that raised `error` can be made again: it was the first of its pass, what
        failed was an earlier pass, and all ranks have recovered from that. Otherwise this pass has
        failed."""
        if not isinstance(error, peerlane.Error):
            return False  # A wrong argument: nothing has happened.
        first = self.communicator.calls == self._calls_before
        if not first or self._is_well():
            self._pass_failed()
            return False
        try:
            self.communicator.recover()
        except peerlane.Error as again:
            self._pass_failed()
            raise again from error
        log.warning("device %d: recovered after: %s", self.device, error)
        return True

    def _is_well(self) -> bool:
        try:
            self.communicator.health()
        except peerlane.Error:
            return False
        return True

    def _pass_failed(self) -> None:
        """Tells the other ranks, so that each knows at its next call that all have to recover."""
        self._calls_before = self.communicator.calls
        self.communicator.abort()

    def close(self) -> None:
        """Leaves the other ranks. Does not raise for what failed earlier: ExLlamaV3 has its other
        processes to end after this."""
        if self.communicator is None:
            return
        try:
            self.communicator.close()
        except peerlane.Error as error:
            log.warning("device %d: closing after a failure: %s", self.device, error)
        # A child of multiprocessing ends without what others do at their exit.
        peerlane.trace.flush()

    def _rank(self, argument: str, device: int) -> int:
        rank = self._ranks.get(device)
        if rank is None:
            raise _invalid(argument, f"one of the active devices {sorted(self._ranks)}", device)
        return rank

    def _fall_back(self, arguments: dict[str, Any], reason: Exception) -> None:
        if self.master:
            announce(f"TP backend: native, because p2p cannot work here: {reason}")
            os.environ[verdict_key(self.uuid)] = "1"
        self._use_native(arguments)

    def _use_native(self, arguments: dict[str, Any]) -> None:
        from exllamav3.model.model_tp_backend import TPBackendNative

        self.native = TPBackendNative(**arguments)
        for method in _METHODS:
            setattr(self, method, getattr(self.native, method))
        if self.master:
            self.close = self._close_native

    def _close_native(self) -> None:
        os.environ.pop(verdict_key(self.uuid), None)
        self.native.close()


def verdict_key(uuid: str) -> str:
    """The variable by which the main process tells the helper, its later child, to use native."""
    return f"PEERLANE_TP_NATIVE_{uuid}"


def _invalid(argument: str, expected: str, got: object) -> ValueError:
    return ValueError(f"TPBackendP2P: {argument}: expected {expected}, got {got!r}")
