"""How often one side asks the other whether there is news."""

from __future__ import annotations

LATE = 0.05
"""By what share of a silence its end may be noticed late."""
LONGEST_SECONDS = 1.0


def pause(quiet: float, shortest: float) -> float:
    """Seconds until the next question after ``quiet`` seconds without news: a twentieth of them, between ``shortest`` and a second.

    An exchange of a second is asked after as often as ever; while sites train for minutes, nobody answers ten questions a second.
    """
    return min(max(LATE * quiet, shortest), LONGEST_SECONDS)
