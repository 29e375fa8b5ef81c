"""D2: shares of one site's mask key among 100 neighbours, any 66 of which open it; ours and flwr's, both create and combine.

flwr shares its P-384 private key as a PEM file of 306 bytes, ours is an X25519 key of 32 bytes: the row is what a site does, not equal
bytes. The second row gives both sides 32 bytes.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable

from tests.bench._common import least

from fedpeft.privacy.secagg import shamir
from fedpeft.privacy.secagg.agreement import fresh

COUNT, THRESHOLD = 100, 66


def run(repeats: int = 3) -> list[dict[str, object]]:
    """Rows D2, CPU seconds."""
    from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
    from flwr.supercore.primitives.asymmetric import generate_key_pairs, private_key_to_bytes

    key, secret = private_key_to_bytes(generate_key_pairs()[0]), fresh()
    ours, theirs = shamir.split(secret, THRESHOLD, COUNT, secrets.token_bytes(32)), create_shares(key, THRESHOLD, COUNT)
    picked = {place + 1: ours[place] for place in range(THRESHOLD)}
    if shamir.combine(picked, THRESHOLD) != secret or combine_shares(theirs[:THRESHOLD]) != key:
        raise AssertionError("a secret did not come back from its shares")
    pairs = {
        "create, a site's mask key": (
            lambda: shamir.split(secret, THRESHOLD, COUNT, secret),
            lambda: create_shares(key, THRESHOLD, COUNT),
            1000,
        ),
        "create, 32 bytes": (lambda: shamir.split(secret, THRESHOLD, COUNT, secret), lambda: create_shares(secret, THRESHOLD, COUNT), 0),
        "combine, a site's mask key": (lambda: _combine(picked), lambda: combine_shares(theirs[:THRESHOLD]), 0),
    }
    return [_row(case, mine, peer, goal, repeats) for case, (mine, peer, goal) in pairs.items()]


def _combine(picked: dict[int, bytes]) -> bytes:
    """With nothing remembered of earlier sets of survivors."""
    shamir._lagrange.cache_clear()
    shamir._barycentric.cache_clear()
    return shamir.combine(picked, THRESHOLD)


def _row(case: str, ours: Callable[[], bytes], peer: Callable[[], bytes], goal: int, repeats: int) -> dict[str, object]:
    seconds = least({"ours": ours, "peer": peer}, repeats)
    ratio = seconds["peer"] / seconds["ours"]
    aim = f"ratio >= {goal}" if goal else ""
    return {"row": "D2", "case": f"{THRESHOLD} of {COUNT}: {case}", **seconds, "ratio": ratio, "goal": aim, "unit": "CPU s"}


if __name__ == "__main__":
    for row in run():
        print(row)
