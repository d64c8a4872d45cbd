"""Spans of ExLlamaV3's passes, for `peerlane trace`.

While a process records, these of ExLlamaV3 are wrapped: a pass (`pass`: decode, prefill or warm-up), in it what prepares its
inputs, sends its command to each worker (`dispatch`) and takes the last pass's acknowledgements (`acks`); on every rank its part of
the pass (`rank`), the tensors it receives (`inputs`), the embedding, and what it uploads. A worker's `woken` marks when it has the
command: from the beginning of `dispatch` until then is what waking it took.

Invariants:
- Without a recorder nothing is wrapped, and a wrapped function does what it did: it is told nothing but the pass's name, which it is
  not shown.
- Models of other backends are left alone.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import os
import threading
from collections.abc import Callable
from typing import Any

from peerlane.trace import Span

# What a command says of its pass, among the parameters that ExLlamaV3 passes on.
KEY = "peerlane_pass"
# By which a process's children are told to record.
VARIABLE = "PEERLANE_TRACE"
# Passes of more tokens a row are a prompt's.
FEW = 16

_numbers = itertools.count(1)


class _Current(threading.local):
    """Where this thread is."""

    def __init__(self) -> None:
        self.passes: list[tuple[str, str]] = []
        """Kinds and names of the passes that it makes, if it is the main process's: one at a time."""
        self.parts = 0
        """How deep it is in spans of a pass."""


_current = _Current()

Wrapped = Callable[..., Any]
# Owner, attribute, what makes the replacement, original: what `hooks` puts there and takes away again.
Patch = tuple[Any, str, Callable[[Wrapped], Wrapped], Any]


def of_main() -> list[Patch]:
    """What is wrapped in the main process."""
    mixin = _module("model", "model_tp").Model_TPMixin
    found = [
        (mixin, "forward_tp", _pass_of("decode")),
        (mixin, "prefill_tp", _pass_of("prefill")),
        (mixin, "prepare_inputs_for_tp", _spanned("prepare inputs")),
        (mixin, "tp_drain_acks", _acks),
        # The name by which it is sent to workers, and by which theirs is found.
        (_module("model", "model_tp"), "mp_model_forward", _part),
    ]
    return [(owner, name, make, vars(owner)[name]) for owner, name, make in found] + of_all()


def of_all() -> list[Patch]:
    """What is wrapped in every process."""
    from .tensors import Consumer

    functions, shared = _module("model", "model_tp_fn"), _module("model", "model_tp_shared")
    found = [
        (functions, "mp_model_forward", _part),
        (shared.SMConsumer, "recv", _spanned("inputs")),
        (Consumer, "recv", _spanned("inputs")),
        (_module("modules", "embedding").Embedding, "forward", _spanned("embedding")),
        (_module("modules", "module").Module, "prepare_for_device", _upload),
    ]
    return [(owner, name, make, vars(owner)[name]) for owner, name, make in found]


def watch_dispatch(model: Any) -> None:
    """Wraps the main process's ends of the connections to a model's workers."""
    for device in model.active_devices:
        if device != model.tp_output_device:
            model.mp_parent_conn[device] = Watched(model.mp_parent_conn[device], device)


class Watched:
    """A connection to a worker, with a span around what is sent in a pass."""

    def __init__(self, connection: Any, device: int) -> None:
        self.connection = connection
        self.device = device

    def send_bytes(self, data: Any) -> None:
        if not _current.passes:
            return self.connection.send_bytes(data)
        with Span("dispatch", sends=f"{_current.passes[-1][1]}/{self.device}"):
            self.connection.send_bytes(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.connection, name)


class _Part:
    """A pass or a rank's part of it, in which stages are recorded."""

    def __init__(self, name: str, kind: str) -> None:
        self.span = Span(name, **{"pass": kind})

    def __enter__(self) -> None:
        _current.parts += 1
        self.span.__enter__()

    def __exit__(self, *why: object) -> None:
        self.span.__exit__(*why)
        _current.parts -= 1


def _pass_of(kind: str) -> Callable[[Wrapped], Wrapped]:
    def make(original: Wrapped) -> Wrapped:
        @functools.wraps(original)
        def run(self: Any, x: Any, params: dict[str, Any], *rest: Any, **named: Any) -> Any:
            if self.tp_backend != "p2p":
                return original(self, x, params, *rest, **named)
            is_prompt = len(x.shape) > 1 and x.shape[1] > FEW
            shown = "warm-up" if params.get("tp_warmup") else "prefill" if is_prompt else kind
            name = f"{os.getpid()}/{next(_numbers)}"
            if os.environ.get(VARIABLE):
                # The workers record, too; others would show it to ExLlamaV3.
                params[KEY] = shown, name
            _current.passes.append((shown, name))
            try:
                with _Part("pass", shown):
                    return original(self, x, params, *rest, **named)
            finally:
                _current.passes.pop()
                params.pop(KEY, None)

        return run

    return make


@functools.cache
def _part(original: Wrapped) -> Wrapped:
    """A rank's part of a pass. The same object under both names: pickle looks."""

    @functools.wraps(original)
    def mp_model_forward(
        local_context: dict[str, Any], shared_input: Any, params: dict[str, Any], *rest: Any
    ) -> Any:
        about = params.pop(KEY, None)
        if _current.passes:
            about = _current.passes[-1]
        if about is None:
            return original(local_context, shared_input, params, *rest)
        kind, name = about
        with _Part("rank", kind):
            if not _current.passes:
                with Span("woken", hears=f"{name}/{local_context['device']}"):
                    pass
            return original(local_context, shared_input, params, *rest)

    return mp_model_forward


def _acks(original: Wrapped) -> Wrapped:
    @functools.wraps(original)
    def tp_drain_acks(self: Any) -> None:
        if not (_current.parts and self.tp_pending_acks):
            return original(self)
        with Span("acks"):
            return original(self)

    return tp_drain_acks


def _spanned(name: str) -> Callable[[Wrapped], Wrapped]:
    def make(original: Wrapped) -> Wrapped:
        @functools.wraps(original)
        def run(*arguments: Any, **named: Any) -> Any:
            if not _current.parts:
                return original(*arguments, **named)
            with Span(name):
                return original(*arguments, **named)

        return run

    return make


def _upload(original: Wrapped) -> Wrapped:
    """Only what is not on the GPU yet is a stage."""

    @functools.wraps(original)
    def prepare_for_device(self: Any, x: Any, params: dict[str, Any]) -> Any:
        if x.device == self.device or not _current.parts:
            return original(self, x, params)
        with Span("upload"):
            return original(self, x, params)

    return prepare_for_device


def _module(package: str, name: str) -> Any:
    return importlib.import_module(f"exllamav3.{package}.{name}")
