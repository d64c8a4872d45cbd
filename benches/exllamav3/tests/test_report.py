"""From a results file to tables."""

import report

LINE = "stream-hash dev={} pass=1   {} model.layers.{:<30} {} (1, 16, 4096) torch.float32\n"


def run(backend, turn=1, **result):
    return {"version": "1.6.5", "model": "8b", "backend": backend, "round": turn, "status": "ok", "result": result}


def decode(*speeds):
    return {"steps_per_s": list(speeds), "busy_cores": 2.0}


def data(*runs):
    machine = {"gpus": ["NVIDIA H200"] * 2, "driver": "580"}
    return {"machine": machine, "date": "2026-11-22", "command": "bench.py run", "runs": list(runs), "skipped": []}


def find(lines, start):
    return next(line[2:-2].split(" | ") for line in lines if start in line)


def test_columns_and_ratios():
    lines = report.speed_table(
        [
            run("native", decode_1=decode(100, 90, 110)),
            run("p2p", decode_1=decode(150, 150, 150)),
            run("ceiling", decode_1=decode(200)),
        ]
    )
    head, cells = find(lines, "measure"), find(lines, "steps/s")
    assert dict(zip(head, cells)) == {
        "ExLlamaV3": "1.6.5", "model": "8b", "measure": "decode, batch 1, steps/s",
        "native": "100.0", "p2p": "150.0", "ceiling": "200.0",
        "p2p/native": "1.50", "p2p/nccl": "", "p2p/ceiling": "0.75",
    }  # fmt: skip


def test_a_ratio_of_times_is_turned_round():
    prefill = [{"tokens_per_s": [1000.0], "ttft_ms": [ms]} for ms in (40.0, 20.0)]
    lines = report.speed_table([run("native", prefill_512=prefill[0]), run("p2p", prefill_512=prefill[1])])
    assert find(lines, "first token of 512")[-3] == "2.00"


def test_ratios_are_taken_within_a_round():
    lines = report.speed_table([
        run("native", 1, decode_1=decode(100)), run("p2p", 1, decode_1=decode(200)),
        run("native", 2, decode_1=decode(50)), run("p2p", 2, decode_1=decode(100)),
    ])  # fmt: skip
    cells = find(lines, "steps/s")
    assert cells[3] == "75.0 (50.0..100.0)" and cells[-3] == "2.00"


def test_rounds_that_only_one_backend_has_give_no_ratio():
    lines = report.speed_table([run("native", 1, decode_1=decode(100)), run("p2p", 2, decode_1=decode(200))])
    assert find(lines, "steps/s")[-3:] == ["", "", ""]


def test_memory_rows():
    gpu = {"before": [1e9, 1e9], "backend": [2e9, 2e9], "running": [5e9, 5e9]}
    memory = {"pss_total": 4e9, "shm": {"x_r": {"bytes": 34_000_000, "resident": 1}}, "gpu_used": gpu}
    lines = report.speed_table([run("native", memory=memory)])
    assert find(lines, "PSS")[3] == "4.00" and find(lines, "/dev/shm")[3] == "34.0"
    assert find(lines, "contexts and backend")[3] == "2.00" and find(lines, "in all")[3] == "8.00"


def test_agreement_with_native():
    greedy = {"tokens": [1, 2, 3], "logits_sha1": "a", "repeatable": True, "finite": True}
    other = {**greedy, "tokens": [1, 2, 9], "logits_sha1": "b", "repeatable": False}
    first, second = report.agreement([run("native", greedy=greedy), run("p2p", greedy=other)])
    assert first["tokens_as_native"] == "3 of 3" and first["logits_as_native"]
    assert second["tokens_as_native"] == "2 of 3" and not second["logits_as_native"] and not second["repeatable"]
    cells = find(report.agreement_table([run("native", greedy=greedy)]), "3 of 3")
    assert cells[2:6] == ["native", "1", "yes", "yes"], "a round is a number"
    assert "| NO |" in report.agreement_table([run("native", greedy=greedy), run("p2p", greedy=other)])[-1]


def test_stream_hashes_that_agree():
    text = "noise\n" + "".join(LINE.format(dev, 3, 2, "0123456789ab") for dev in (0, 1))
    text += "".join(
        f"stream-hash dev={dev} pass=1  34 lm_head      {dev:012x} (1, 1, 5) torch.float16\n" for dev in (0, 1)
    )
    assert report.stream_hash(text) == {None: {"ranks": 2, "compared": 1, "agree": True, "first_difference": None}}


def test_stream_hashes_that_differ_name_the_place():
    text = LINE.format(0, 3, 2, "0123456789ab") + LINE.format(1, 3, 2, "ffff456789ab")
    verdict = report.stream_hash(text)[None]
    assert not verdict["agree"] and verdict["first_difference"] == "pass 1, module 3 model.layers.2"


def test_one_rank_alone_proves_nothing():
    assert not report.stream_hash(LINE.format(0, 3, 2, "0123456789ab"))[None]["agree"]


def test_no_stream_hashes():
    assert report.stream_hash("nothing of the kind\n") == {}


def test_stream_hashes_by_backend():
    pair = LINE.format(0, 3, 2, "0123456789ab") + LINE.format(1, 3, 2, "0123456789ab")
    text = f"backend-in-use p2p\n{pair}backend-in-use native\n{pair.replace('dev=1', 'dev=0')}backend-in-use p2p\n"
    verdicts = report.stream_hash(text)
    assert verdicts["p2p"]["agree"] and not verdicts["native"]["agree"] and None not in verdicts


def test_what_went_wrong_is_in_the_report():
    sample = data(run("native", decode_1=decode(100)), {**run("p2p"), "status": "timeout", "result": {}})
    sample["skipped"] = [{**run("nccl"), "reason": "no time"}]
    text = report.markdown(sample)
    assert "8b p2p, round 1, a process of its own: timeout" in text and "nccl, round 1: skipped, no time" in text
    assert "# ExLlamaV3 on NVIDIA H200, NVIDIA H200" in text
