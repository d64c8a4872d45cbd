"""The microbenchmark's cases, table and result files."""

import multiprocessing
import threading
import time

import pytest

import micro


def row(**changed):
    found = {"op": "all_reduce", "rows": 1, "width": 4096, "dtype": "float32", "bytes": 16384, "correct": True}
    return {**found, "call": 5.0, "done": 12.0, "each": 6.0, "host": 4.0, **changed}


def test_cases_keep_to_what_native_takes():
    for world in (2, 4):
        for case in micro.cases(world):
            if case.op == "gather":
                widths = micro.shares(case.width, world, 64)
                assert sum(widths) == case.width and all(width * 2 % 128 == 0 for width in widths)
            if case.op == "gather_small":
                assert case.nbytes <= 16384 and micro.shares(case.width, world, 1) == [1] * world
            if case.op == "all_reduce":
                assert case.nbytes % 32 == 0


def test_sizes_of_a_decode_step_and_of_a_prefill():
    found = {case.nbytes for case in micro.cases(2) if case.op == "all_reduce"}
    assert {16 << 10, 32 << 10, 32 << 20, 64 << 20} <= found


def test_table_marks_wrong_results_and_failures():
    backends = {"native": {"status": "ok", "rows": [row()]}, "p2p": {"status": "timeout", "rows": [row(correct=False)]}}
    text = micro.table({"backends": backends})
    assert "| all_reduce 16 KiB (1 x 4096 float32) | 5.0 / 12.0 / 6.0 | WRONG RESULT |" in text
    assert "- p2p: timeout" in text


def test_a_cut_line_of_a_killed_process_is_left_out(tmp_path):
    (tmp_path / "rows").write_text('{"op": "gather"}\n{"op": "gat')
    assert micro.rows_of(tmp_path / "rows") == [{"op": "gather"}] and micro.rows_of(tmp_path / "none") == []


def test_ranks_start_together():
    counters = multiprocessing.RawArray("q", 2)
    left = []

    def other():
        micro.Start(counters, 1).wait()
        left.append(time.monotonic())

    thread = threading.Thread(target=other)
    thread.start()
    time.sleep(0.1)
    assert not left
    micro.Start(counters, 0).wait()
    thread.join(5)
    assert left and list(counters) == [1, 1]


def test_a_rank_does_not_wait_forever(monkeypatch):
    monkeypatch.setattr(micro, "START_S", 0.05)
    with pytest.raises(TimeoutError, match="rank 0"):
        micro.Start(multiprocessing.RawArray("q", 2), 0).wait()
