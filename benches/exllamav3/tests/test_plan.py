"""Order, budget and what is left out."""

from plan import TURNS, TURNS_FACTOR, Budget, Job, jobs, parse_model, turn_takers


def test_rounds_go_back_and_forth():
    order = [(job.round, job.backend) for job in jobs(["1.6.5"], ["8b"], ["native", "p2p", "nccl"], 2, turns=False)]
    assert order == [(1, "native"), (1, "p2p"), (1, "nccl"), (2, "nccl"), (2, "p2p"), (2, "native")]


def test_first_round_of_everything_comes_first():
    order = jobs(["a", "b"], ["1b", "8b"], ["native"], 2, turns=False)
    assert [job.round for job in order] == [1] * 4 + [2] * 4


def test_in_turns_speed_comes_before_memory():
    order = jobs(["a"], ["8b", "70b:4"], ["native", "p2p", "single"], 2, turns=True)
    assert [(job.model, job.backend, job.timed) for job in order] == [
        ("8b", TURNS, True),
        ("8b", "single", True),
        ("70b:4", TURNS, True),
        ("70b:4", "single", True),
        ("8b", "native", False),
        ("8b", "p2p", False),
        ("70b:4", "native", False),
        ("70b:4", "p2p", False),
    ]


def test_native_loads_the_model_that_others_share():
    assert turn_takers(["p2p", "nccl", "native", "single", "ceiling"]) == ["native", "p2p", "nccl", "ceiling"]


def test_models_may_name_their_layers():
    assert parse_model("70b:16") == ("70b", 16) and parse_model("8b") == ("8b", None)


def test_a_job_that_does_not_fit_is_refused_and_a_smaller_one_is_not():
    budget = Budget(total_s=100, limit_s=200)
    assert budget.refusal(Job("a", "8b", "native"), spent_s=0) is None
    assert "left" in budget.refusal(Job("a", "8b", "native"), spent_s=40)
    assert budget.refusal(Job("a", "1b", "native"), spent_s=40) is None


def test_estimates_follow_what_was_seen():
    budget = Budget(total_s=100, limit_s=200)
    job = Job("a", "8b", "native")
    budget.ended(job, "ok", 20)
    assert budget.refusal(Job("a", "8b", "p2p"), spent_s=75) is None
    budget.ended(job, "ok", 30)
    assert budget.refusal(Job("a", "8b", "p2p"), spent_s=75)
    assert budget.estimate(Job("a", "8b", TURNS)) > 30, "several backends in one process take longer"


def test_the_last_job_may_not_outrun_the_budget():
    budget = Budget(total_s=100, limit_s=60)
    assert budget.limit(Job("a", "8b", "p2p"), spent_s=10) == 60
    assert budget.limit(Job("a", "8b", "p2p"), spent_s=70) == 30
    assert Budget(1000, 60).limit(Job("a", "8b", TURNS), 0) == 60 * TURNS_FACTOR


def test_a_backend_that_hung_is_not_tried_again():
    budget = Budget(total_s=1000, limit_s=60)
    budget.ended(Job("a", "8b", "nccl"), "timeout", 60)
    assert "hung" in budget.refusal(Job("a", "1b", "nccl"), 60)
    assert budget.refusal(Job("b", "1b", "nccl"), 60) is None
    assert budget.refusal(Job("a", "1b", "native"), 60) is None


def test_a_backend_that_failed_is_tried_on_other_models_only():
    budget = Budget(total_s=1000, limit_s=60)
    budget.ended(Job("a", "8b", "p2p"), "failed", 5)
    assert "failed" in budget.refusal(Job("a", "8b", "p2p", 2), 5)
    assert budget.refusal(Job("a", "1b", "p2p"), 5) is None
