"""One process for each rank, on simulated GPUs: what a real program does."""

import os
from multiprocessing.connection import Connection

import numpy as np
import pytest
from conftest import Processes

import peerlane
from peerlane import Communicator

WORLD = 2


def work(rank: int, name: str, answers: Connection) -> None:
    try:
        with Communicator(rank, WORLD, name, f"sim:{rank}/{WORLD}", patience=60) as communicator:
            array = communicator.empty(1000, "float32")
            array[:] = rank + 1
            communicator.all_reduce(array)
            communicator.synchronize()
            answers.send(bool((array == 3).all()))
            communicator.barrier()
    except peerlane.Error as error:
        answers.send(f"{type(error).__name__}: {error}")


def test_all_reduce_between_processes(processes: Processes) -> None:
    processes.start(work, WORLD, f"peerlane-test-{os.getpid()}")
    assert [processes.answer(rank) for rank in range(WORLD)] == [True] * WORLD
    assert processes.exit_codes() == [0] * WORLD


def test_a_rank_alone_gives_up() -> None:
    name = f"peerlane-test-alone-{os.getpid()}"
    with pytest.raises(peerlane.RendezvousError, match="^rendezvous of 2 ranks: "):
        Communicator(0, 2, name, "sim:0/2", patience=0.2)


def test_a_group_of_one_process() -> None:
    with Communicator(0, 1, f"peerlane-test-one-{os.getpid()}", "sim:0/1") as communicator:
        array = communicator.empty(3, "float32")
        array[:] = 4
        communicator.all_reduce(array)
        communicator.synchronize()
        np.testing.assert_array_equal(array, np.full(3, 4, np.float32))
