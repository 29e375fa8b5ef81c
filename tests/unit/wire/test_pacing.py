"""How often one side asks the other."""

from __future__ import annotations

from fedpeft.wire.pacing import LATE, LONGEST_SECONDS, pause


def asked(silence: float, shortest: float) -> list[float]:
    """When questions are asked until the first that finds what came after ``silence`` seconds."""
    times = [0.0]
    while times[-1] < silence:
        times.append(times[-1] + pause(times[-1], shortest))
    return times


def test_news_is_never_late_by_more_than_a_share_of_the_silence_and_long_silences_cost_few_questions():
    for silence in (0.01, 0.5, 1.9, 7.0, 33.3, 400.0):
        times = asked(silence, 0.1)
        assert times[-1] - silence <= min(max(LATE * silence, 0.1), LONGEST_SECONDS)
    assert len(asked(60, 0.1)) < 60 / 0.1 / 5
    assert len(asked(600, 0.1)) < 600 / 0.1 / 9
