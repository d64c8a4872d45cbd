"""Tensors between processes: `TensorExporter`, `TensorImporter` and `TensorView`."""

import gc
import weakref
from multiprocessing.connection import Connection

import numpy as np
import pytest
from conftest import Processes

import peerlane
from peerlane import TensorExporter, TensorImporter

KINDS = [
    "bool",
    "int8",
    "uint8",
    "int16",
    "int32",
    "int64",
    "float16",
    "float32",
    "float64",
    "complex64",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 0, 2), (2, 3, 5, 1), (1,) * 8])
def test_arrays_of_all_kinds(kind: str, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(1).integers(0, 2, shape).astype(kind)
    with TensorExporter(least=4096, checksums=True) as exporter:
        importer = TensorImporter(exporter.handle, 0)
        view = importer.import_(exporter.export(array))
        assert (tuple(view.shape), view.nbytes) == (shape, array.nbytes)
        found = np.from_dlpack(view)
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)


def test_arrays_that_are_not_contiguous() -> None:
    whole = np.arange(2 * 3 * 5, dtype=np.int32).reshape(2, 3, 5)
    with TensorExporter() as exporter:
        importer = TensorImporter(exporter.handle, 0)
        for array in (whole.T, whole[:, ::2], whole[::-1, 1:, ::-2], whole[:, :, :0], whole[1:]):
            view = importer.import_(exporter.export(array))
            np.testing.assert_array_equal(np.from_dlpack(view), array)


def test_arrays_that_are_read_only() -> None:
    array = np.arange(6, dtype=np.int16)
    array.flags.writeable = False
    with TensorExporter() as exporter:
        importer = TensorImporter(exporter.handle, 0)
        once = np.from_dlpack(importer.import_(exporter.export(array)))
        assert not once.flags.writeable
        twice = np.from_dlpack(importer.import_(exporter.export(once)))
        np.testing.assert_array_equal(twice, array)


def test_parts() -> None:
    whole = np.arange(4 * 6, dtype=np.float32).reshape(4, 6)
    with TensorExporter() as exporter:
        view = TensorImporter(exporter.handle, 0).import_(exporter.export(whole))
        part = view.narrow(1, 2, 5).narrow(0, 1, 3)
        np.testing.assert_array_equal(np.from_dlpack(part), whole[1:3, 2:5])
        assert part.shape == [2, 3] and part.nbytes == 24
        with pytest.raises(ValueError, match="dim: expected below 2"):
            view.narrow(2, 0, 1)
        with pytest.raises(ValueError, match="indices: expected a part of 0..4"):
            view.narrow(0, 0, 5)


def test_what_is_looked_at_stays() -> None:
    exporter = TensorExporter(least=4096)
    importer = TensorImporter(exporter.handle, 0)
    descriptor = exporter.export(np.full(1000, 1, np.uint8))
    array = np.from_dlpack(importer.import_(descriptor))
    unused = importer.import_(descriptor).__dlpack__()
    for value in range(2, 9):
        exporter.clear()
        exporter.export(np.full(1000, value, np.uint8))
        with pytest.raises(peerlane.ClosedError, match="the tensor was given up"):
            importer.import_(descriptor)
    assert (array == 1).all()
    assert exporter.usage()["reserved"] == 8192 and exporter.usage()["used"] == 1024
    exporter.close()
    assert (array == 1).all()
    del unused
    with pytest.raises(peerlane.ClosedError, match="transfer export: it was closed"):
        exporter.export(array)


def test_views_that_are_gone_hold_nothing() -> None:
    with TensorExporter(least=4096) as exporter:
        importer = TensorImporter(exporter.handle, 0)
        for _ in range(50):
            view = importer.import_(exporter.export(np.ones(500)))
            arrays = [np.from_dlpack(view), np.from_dlpack(view), view.__dlpack__()]
            del view, arrays
            gc.collect()
            exporter.clear()
        assert exporter.usage()["segments"] == 1


def test_arrays_with_a_name_are_kept() -> None:
    with TensorExporter(named=10_000) as exporter:
        importer = TensorImporter(exporter.handle, 0)
        one, two = np.full(6000, 1, np.uint8), np.full(6000, 2, np.uint8)
        seen = weakref.ref(one)
        descriptor = exporter.export(one, name=5)
        exporter.clear()
        assert exporter.export(one, name=5) == descriptor
        view = importer.import_(descriptor)
        del one
        gc.collect()
        assert seen() is not None
        exporter.export(two, name=6)
        gc.collect()
        assert seen() is None and exporter.usage()["named"] == 6000
        assert (np.from_dlpack(view) == 1).all()
        with pytest.raises(peerlane.ClosedError):
            importer.import_(descriptor)


def test_an_owner_is_kept_in_place_of_an_array() -> None:
    with TensorExporter(named=10_000) as exporter:
        importer = TensorImporter(exporter.handle, 0)
        owner = np.zeros(1)
        seen = weakref.ref(owner)
        assert exporter.find(5) is None
        descriptor = exporter.export(np.full(6000, 7, np.uint8), name=5, owner=owner)
        assert exporter.find(5) == descriptor
        del owner
        gc.collect()
        assert seen() is not None
        assert (np.from_dlpack(importer.import_(descriptor)) == 7).all()
        # What goes may run anything, this exporter's methods too.
        weakref.finalize(seen(), exporter.export, np.ones(3), name=9)
        exporter.export(np.full(6000, 8, np.uint8), name=6)
        gc.collect()
        assert seen() is None and exporter.find(5) is None and exporter.find(9) is not None


def test_copies_are_for_the_taker_to_make() -> None:
    with TensorExporter() as exporter:
        view = TensorImporter(exporter.handle, 0).import_(exporter.export(np.ones(3)))
        with pytest.raises(BufferError, match="copy=True"):
            view.__dlpack__(copy=True)
        with pytest.raises(BufferError, match="another device"):
            view.__dlpack__(dl_device=(2, 0))
        view.__dlpack__(None, max_version=(1, 0), dl_device=(1, 0), copy=False)


def test_mistakes() -> None:
    for arguments, words in (
        ({"least": 0}, "least: expected 1 to"),
        ({"least": 9, "most": 8}, "least: expected 1 to"),
    ):
        with pytest.raises(ValueError, match=words):
            TensorExporter(**arguments)
    with TensorExporter(least=4096, most=4096) as exporter:
        for wrong in ([1, 2], "text", None):
            with pytest.raises(TypeError, match="tensor: expected a tensor in host memory"):
                exporter.export(wrong)
        with pytest.raises(peerlane.UnsupportedError, match="has no room for 8192 more"):
            exporter.export(np.ones(1024))
        importer = TensorImporter(exporter.handle, 0)
        good = exporter.export(np.ones(4))
        for wrong in (b"", good[:-1], good + b"\0", b"\2" + good[1:]):
            with pytest.raises(peerlane.CorruptError):
                importer.import_(wrong)
        with pytest.raises(ValueError, match="index: expected below 32"):
            TensorImporter(exporter.handle, 32)
    with pytest.raises(ValueError, match="handle: expected the text of an exporter"):
        TensorImporter("nonsense", 0)


def look(rank: int, name: str, answers: Connection) -> None:
    importer = TensorImporter(name, rank)
    answers.send("ready")
    array = np.from_dlpack(importer.import_(answers.recv()))
    answers.send(int(array.sum()))
    answers.recv()


def test_processes_see_the_same_memory(processes: Processes) -> None:
    with TensorExporter() as exporter:
        processes.start(look, 3, exporter.handle, duplex=True)
        assert [processes.answer(rank) for rank in range(3)] == ["ready"] * 3
        descriptor = exporter.export(np.arange(100_000, dtype=np.int64))
        for connection in processes.answers:
            connection.send(descriptor)
        assert [processes.answer(rank) for rank in range(3)] == [4_999_950_000] * 3
        exporter.clear()
        assert exporter.usage()["reserved"] > 800_000
        for connection in processes.answers:
            connection.send(None)
        assert processes.exit_codes() == [0] * 3
        exporter.clear()
        assert exporter.usage()["reserved"] == 0
        exporter.export(np.ones(3))
        assert exporter.usage()["reserved"] == 1 << 20


def test_a_gpu_looks_where_it_lies() -> None:
    array = np.arange(6000, dtype=np.int32)
    with TensorExporter() as exporter:
        view = TensorImporter(exporter.handle, 0).import_(exporter.export(array))
        mapped = view.map("sim:0/2")
        assert mapped.device == "sim:0/2" and mapped.data_ptr != 0
        with pytest.raises(BufferError, match="sim:0/2: DLPack has no simulated GPUs"):
            mapped.__dlpack__()
        for wrong in ("sim:2/2", "gpu"):
            with pytest.raises(ValueError, match="TensorView.map: device"):
                view.map(wrong)
        with pytest.raises(ValueError, match="view: expected at least one element"):
            view.narrow(0, 5, 5).map("sim:0/2")
