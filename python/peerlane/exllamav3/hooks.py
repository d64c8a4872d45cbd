"""`install`: teaches an unmodified ExLlamaV3 the backends "p2p" and "auto".

These of ExLlamaV3 are replaced in the main process:

- `Model_TPMixin.create_tp_context`, which knows only "native" and "nccl", gets a string that equals
  "native" but is of the type `P2P`. ExLlamaV3 passes it on in `backend_args` to every process.
- `model_tp_fn.init_pg`, which makes the backend of a process, runs for such a string with
  `TPBackendP2P` in place of `TPBackendNative`.
- `model_tp_fn.SMConsumer` is Peerlane's for what Peerlane's producers export; `Embedding.tp_export` and `tp_import` share
  the table if that is what it goes through.
- What a pass is made of is wrapped while the process records a trace (`timeline`).
- `Model_TPMixin._load_tp` and `create_tp_context` find, with `channel=True`, Peerlane's `Pipe`, `Process` and `SMProducer`
  under these names.

Spawned processes are fresh interpreters without these replacements. Each of them unpickles its
`backend_args` first, and unpickling a `P2P` replaces its `init_pg`.

Invariant: a model loaded with "native" or "nccl" runs ExLlamaV3's own code in all its processes, and
its children never import Peerlane.
"""

from __future__ import annotations

import functools
import importlib
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from peerlane import trace

from . import timeline
from .backend import TPBackendP2P
from .dispatch import Dispatch, spin_of
from .embeddings import tp_export, tp_import
from .options import Options, announce
from .selection import choose
from .tensors import Producer, consumer

VERSIONS = "1.4.1 to 1.6.5"

# What stands in ExLlamaV3 now: (owner, attribute, original, replacement).
_patches: list[tuple[Any, str, Any, Any]] = []
_options = Options()


def install(
    *, exact: bool | None = None, channel: bool | None = None, options: Options | None = None
) -> None:
    """Makes `tp_backend="p2p"` and `tp_backend="auto"` work in models loaded from now on.

    `exact=True` sends fp32 sums as they are rather than rounded to bf16. `channel=True` puts channels
    in the place of the pipes between a p2p model's processes, and does without its helper process.
    `options` replaces what the environment says. A second call only changes options. Raises ImportError if ExLlamaV3 cannot be
    imported, RuntimeError if it lacks what is replaced.
    """
    global _options
    wanted = options or Options.from_env()
    if exact is not None:
        wanted = replace(wanted, wire="native" if exact else "bf16")
    if channel is not None:
        wanted = replace(wanted, channel=channel)
    if not _patches:
        model_tp, model_tp_fn = _module("model_tp"), _module("model_tp_fn")
        _need(_module("model_tp_backend"), "TPBackendNative")
        mixin = _need(model_tp, "Model_TPMixin")
        # Both are looked at before either is replaced.
        found = [
            (
                mixin,
                "create_tp_context",
                _create_tp_context,
                _create_tp_context_of(mixin),
            ),
            (mixin, "_load_tp", _load_tp, _load_tp_of(mixin)),
            (model_tp_fn, "init_pg", _init_pg, _init_pg_of(model_tp_fn)),
            (model_tp_fn, "SMConsumer", consumer, _need(model_tp_fn, "SMConsumer")),
            *_embedding_of(("tp_export", tp_export), ("tp_import", tp_import)),
            *(timeline.of_main() if trace.is_recording() else []),
        ]
        for owner, attribute, make, original in found:
            _put(owner, attribute, make, original)
    _options = wanted


def uninstall() -> None:
    """Puts ExLlamaV3's own functions back. Models that are loaded keep their backend."""
    for owner, attribute, _, replacement in _patches:
        if vars(owner).get(attribute) is not replacement:
            raise RuntimeError(
                f"peerlane.exllamav3.uninstall: {_path(owner, attribute)}: expected Peerlane's function, got "
                f"{getattr(owner, attribute)!r}, which was put over it and has to go first"
            )
    while _patches:
        owner, attribute, original, _ = _patches.pop()
        setattr(owner, attribute, original)


class P2P(str):
    """The backend type that ExLlamaV3 takes for "native" and Peerlane for its own."""

    options: Options
    met: bool
    """Whether a backend has been made from it in this process."""

    def __new__(cls, options: Options) -> P2P:
        self = super().__new__(cls, "native")
        self.options = options
        self.met = False
        return self

    def __reduce__(self) -> tuple[Callable[[Options], P2P], tuple[Options]]:
        return _arrive, (self.options,)


def _arrive(options: Options) -> P2P:
    """Runs in a spawned process, before ExLlamaV3's worker does."""
    if not _patches:
        model_tp_fn = _module("model_tp_fn")
        _put(model_tp_fn, "init_pg", _init_pg, _init_pg_of(model_tp_fn))
        _put(model_tp_fn, "SMConsumer", consumer, _need(model_tp_fn, "SMConsumer"))
        for found in _embedding_of(("tp_import", tp_import)):
            _put(*found)
        for found in timeline.of_all() if trace.is_recording() else []:
            _put(*found)
    return P2P(options)


def _create_tp_context(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def create_tp_context(self: Any, tp_backend: str) -> Any:
        if tp_backend == "auto":
            choice = choose(self.active_devices)
            announce(f"TP backend: auto chose {choice.backend} ({choice.reason})")
            tp_backend = choice.backend
        if tp_backend != "p2p":
            return original(self, tp_backend)
        p2p = P2P(_options)
        dispatch = None
        create = original
        if _options.channel:
            dispatch = Dispatch(spin_of(_options, len(self.active_devices)))
            create = _with(
                original, Pipe=dispatch.pipe, Process=dispatch.process, SMProducer=Producer
            )
        result = create(self, p2p)
        if dispatch is not None:
            self.tp_producer.settle = self.tp_drain_acks
            if dispatch.helper is not None:
                self.mp_parent_conn[-1] = dispatch.helper
        if trace.is_recording():
            timeline.watch_dispatch(self)
        self.tp_backend = "p2p"
        if not p2p.met:
            raise RuntimeError(
                f"ExLlamaV3 {_version()}: create_tp_context: expected it to pass its tp_backend on as "
                f"backend_args['type'], got a native backend; Peerlane knows {VERSIONS}"
            )
        return result

    return create_tp_context


def _load_tp(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_tp(self: Any, *arguments: Any, **named: Any) -> Any:
        theirs = original.__globals__["SMProducer"]  # type: ignore[attr-defined]

        def producer(*arguments: Any, **named: Any) -> Any:
            # By now it is known what "auto" stands for.
            ours = self.tp_backend == "p2p" and _options.channel
            return (Producer if ours else theirs)(*arguments, **named)

        return _with(original, SMProducer=producer)(self, *arguments, **named)

    return load_tp


def _init_pg(original: types.FunctionType) -> Callable[..., Any]:
    @functools.wraps(original)
    def init_pg(
        device: int,
        active_devices: list[int],
        output_device: int,
        backend_args: dict[str, Any],
        master: bool = False,
    ) -> Any:
        p2p = backend_args["type"]
        if not isinstance(p2p, P2P):
            return original(device, active_devices, output_device, backend_args, master)
        p2p.met = True
        backend = functools.partial(TPBackendP2P, options=p2p.options)
        with_p2p = _with(original, TPBackendNative=backend)
        return with_p2p(device, active_devices, output_device, backend_args, master)

    return init_pg


def _with(function: Callable[..., Any], **names: Any) -> Callable[..., Any]:
    """The function, with other things under these global names. A namespace of its own rather than a swap in the
    module: another thread may be loading a model that needs what is there."""
    assert isinstance(function, types.FunctionType)
    made = types.FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _create_tp_context_of(mixin: Any) -> Callable[..., Any]:
    """ExLlamaV3's `create_tp_context`, if it makes its processes as the replacement expects it."""
    original = _need(mixin, "create_tp_context", ("tp_backend",))
    for name in ("Pipe", "Process", "SMProducer", "mp_parent_conn", "tp_producer"):
        _uses(original, _path(mixin, "create_tp_context"), name)
    _need(mixin, "tp_drain_acks")
    return original


def _load_tp_of(mixin: Any) -> Callable[..., Any]:
    original = _need(mixin, "_load_tp")
    _uses(original, _path(mixin, "_load_tp"), "SMProducer")
    return original


def _embedding_of(*wanted: tuple[str, Callable[..., Any]]) -> list[Any]:
    """ExLlamaV3's `Embedding` with what is put into it."""
    embedding = _need(_module("embedding", "modules"), "Embedding")
    for name, _ in wanted:
        if name not in vars(embedding):
            raise _lacking(_path(embedding, name), None)
    return [(embedding, name, make, vars(embedding)[name]) for name, make in wanted]


def _init_pg_of(model_tp_fn: types.ModuleType) -> types.FunctionType:
    """ExLlamaV3's `init_pg`, if it and its callers look names up where the replacement expects it."""
    original = _need(
        model_tp_fn,
        "init_pg",
        ("device", "active_devices", "output_device", "backend_args", "master"),
    )
    users = {
        "init_pg": (original, "TPBackendNative"),
        "mp_model_worker": (_need(model_tp_fn, "mp_model_worker"), "init_pg"),
        "PseudoParentConn.__init__": (_need(model_tp_fn, "PseudoParentConn").__init__, "init_pg"),
    }
    for user, (function, name) in users.items():
        _uses(function, _path(model_tp_fn, user), name)
    return original


def _uses(function: Any, path: str, name: str) -> None:
    code = getattr(function, "__code__", None)
    if code is None or name not in code.co_names or function.__closure__:
        raise _lacking(f"{path} as a plain function that uses the name {name}", function)


def _put(owner: Any, attribute: str, make: Callable[..., Any], original: Any) -> None:
    replacement = make(original)
    setattr(owner, attribute, replacement)
    _patches.append((owner, attribute, original, replacement))


def _module(name: str, package: str = "model") -> types.ModuleType:
    try:
        return importlib.import_module(f"exllamav3.{package}.{name}")
    except ModuleNotFoundError as error:
        if error.name == "exllamav3":
            raise ImportError(
                f"peerlane.exllamav3.install: expected ExLlamaV3 ({VERSIONS}) to be installed, got: {error}"
            ) from error
        if error.name in (f"exllamav3.{package}", f"exllamav3.{package}.{name}"):
            raise _lacking(f"the module exllamav3.{package}.{name}", None) from error
        raise


def _need(owner: Any, attribute: str, parameters: tuple[str, ...] = ()) -> Any:
    found = getattr(owner, attribute, None)
    if found is None:
        raise _lacking(_path(owner, attribute), None)
    code = getattr(found, "__code__", None)
    taken = () if code is None else code.co_varnames[: code.co_argcount]
    if missing := [parameter for parameter in parameters if parameter not in taken]:
        raise _lacking(f"{_path(owner, attribute)} with the parameter {missing[0]}", taken)
    return found


def _lacking(expected: str, got: object) -> RuntimeError:
    return RuntimeError(
        f"ExLlamaV3 {_version()}: expected {expected}, got {got!r}; Peerlane knows {VERSIONS}"
    )


def _path(owner: Any, attribute: str) -> str:
    module = (
        owner.__name__
        if isinstance(owner, types.ModuleType)
        else f"{owner.__module__}.{owner.__name__}"
    )
    return f"{module}.{attribute}"


def _version() -> str:
    try:
        return importlib.import_module("exllamav3.version").__version__
    except (ImportError, AttributeError):
        return "of an unknown version"
