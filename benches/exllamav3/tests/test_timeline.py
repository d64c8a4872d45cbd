"""The split of a pass into computing, reducing and waiting."""

from timeline import split, summary

# Two calls. Rank 1 comes 5 us late to the first and 2 us early to the second.
FIRST = [(0.0, 15.0), (100.0, 108.0)]
SECOND = [(0.0, 10.0), (93.0, 103.0)]


def test_the_shortest_time_of_a_call_is_the_operation() -> None:
    found = split([FIRST, SECOND])
    assert found["calls"] == 2 and found["reducing"] == 18.0
    assert found["waiting"] == [5.0, 2.0] and found["first"] == [5.0, 0.0]
    assert found["computing"] == found["longest"] == [85.0, 83.0]


def test_a_summary_takes_the_middle_rank_by_rank() -> None:
    one, other = split([FIRST, SECOND]), split([SECOND, FIRST])
    assert summary("decode 1", [one, other, one])["waiting"] == [5, 2]
