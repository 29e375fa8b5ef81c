"""D3: a whole masked sum, every site and the coordinator in one process and no transport, ours and flwr's functions, CPU seconds.

Same values, all pairs neighbours, same threshold; the first sites vanish after their shares are dealt. Ours does more: keys and survivors
are signed and checked by every site, boxes are opened before a vector leaves, shares are checked against what was published. flwr's side
follows its SecAgg+ workflow; masks between two vanished sites, which were never added, are not computed twice to be taken back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import process_time
from typing import Any

import numpy as np
from tests.bench._secagg import CLIP, RING, TARGET, Cohort, coder, flwr_mask, flwr_sites, identities, values

from fedpeft.privacy.secagg import Instance, member
from fedpeft.update import Grid

SIZE = 200_000
CASES = ((16, 2, 30), (50, 3, 100))
"""Sites, vanished, goal for the whole."""
SERVER_GOAL = 500


def run(repeats: int = 3) -> list[dict[str, object]]:
    """Rows D3; the peer runs once, ours ``repeats`` times."""
    return [row for case in CASES for row in _case(*case, repeats)]


def _case(sites: int, gone: int, goal: int, repeats: int) -> list[dict[str, object]]:
    deltas = values(SIZE, sites)
    truth = np.mean(deltas[gone:], axis=0)
    runs = [_ours(sites, gone, deltas, truth) for _ in range(repeats)]
    ours = {side: min(run[side] for run in runs) for side in runs[0]}
    peer = _Flwr(sites, gone, deltas).run(truth)
    case, goals = f"{sites} sites x {SIZE / 1e6:.1f}M, {gone} vanish", {"whole": goal, "coordinator": SERVER_GOAL if sites == 50 else 0}
    return [
        {
            "row": "D3",
            "case": f"{case}: {side}",
            "ours": ours[side],
            "peer": peer[side],
            "ratio": peer[side] / ours[side],
            "goal": f"ratio >= {goals[side]}" if goals.get(side) else "",
            "unit": "CPU s",
        }
        for side in ours
    ]


def _ours(sites: int, gone: int, deltas: list[np.ndarray], truth: np.ndarray) -> dict[str, float]:
    encode = coder(SIZE, sites)
    with identities(sites) as known:
        names = list(known)
        lost = dict.fromkeys(names[:gone], "mask")
        cohort = Cohort(Instance("bench/d3", tuple(names)), known, lost)
        if not cohort.instance.shape.complete:
            raise AssertionError("the case wants all pairs to be neighbours")
        with _timed_signatures() as checks:
            cohort.prepare()
            cohort.deliver(lambda name: encode(deltas[names.index(name)]))
            total = cohort.open()
    mean = total * (Grid(sites).step / (0.5 * (sites - gone)))
    _close(mean, truth, 1e-4)
    whole = sum(cohort.spent.values())
    return {**cohort.spent, "whole": whole, "whole, but for checks of signatures": whole - sum(checks)}


@contextmanager
def _timed_signatures() -> Iterator[list[float]]:
    """CPU seconds of every check of a signature while the block lasts; the peer signs nothing."""
    spent: list[float] = []
    real = member.verified

    def timed(data: bytes, signature: bytes, key: str, purpose: str) -> bool:
        began = process_time()
        good = real(data, signature, key, purpose)
        spent.append(process_time() - began)
        return good

    member.verified = timed
    try:
        yield spent
    finally:
        member.verified = real


def _close(found: np.ndarray, truth: np.ndarray, allowed: float) -> None:
    if (worst := float(np.abs(found - truth).max())) > allowed:
        raise AssertionError(f"a sum under masks is {worst} from the mean, {allowed} is allowed")


class _Flwr:
    """flwr's side of the same sum; sites are numbered from 1 and the first ``gone`` vanish."""

    def __init__(self, sites: int, gone: int, deltas: list[np.ndarray]) -> None:
        self.sites, self.gone, self.deltas = sites, gone, deltas
        self.threshold = Instance("bench/d3", tuple(map(str, range(sites)))).shape.threshold
        self.alive = list(range(gone + 1, sites + 1))

    def run(self, truth: np.ndarray) -> dict[str, float]:
        began = process_time()
        states, keys = flwr_sites(self.sites, self.threshold)
        boxes = self._share(states, keys)
        masked = [flwr_mask(states[number], boxes[number], self.deltas[number - 1]) for number in self.alive]
        shares = self._reveal(states)
        turned = process_time()
        mean = self._open(masked, shares, keys)
        ended = process_time()
        _close(mean, truth, 1e-4)
        whole = ended - began
        return {"sites": turned - began, "coordinator": ended - turned, "whole": whole, "whole, but for checks of signatures": whole}

    def _share(self, states: dict[int, Any], keys: dict[int, tuple[bytes, bytes]]) -> dict[int, tuple[list[bytes], list[int]]]:
        from flwr.client.mod.secure_aggregation.secaggplus_mod import _share_keys
        from flwr.common.secure_aggregation.secaggplus_constants import Key

        boxes: dict[int, tuple[list[bytes], list[int]]] = {number: ([], []) for number in states}
        for number, state in states.items():
            dealt = _share_keys(state, {str(other): pair for other, pair in keys.items()})
            for other, box in zip(dealt[Key.DESTINATION_LIST], dealt[Key.CIPHERTEXT_LIST], strict=True):
                boxes[other][0].append(box)
                boxes[other][1].append(number)
        return boxes

    def _reveal(self, states: dict[int, Any]) -> dict[int, list[bytes]]:
        from flwr.client.mod.secure_aggregation.secaggplus_mod import _unmask
        from flwr.common.secure_aggregation.secaggplus_constants import Key

        shares: dict[int, list[bytes]] = {number: [] for number in states}
        asked = {Key.ACTIVE_NODE_ID_LIST: self.alive, Key.DEAD_NODE_ID_LIST: list(range(1, self.gone + 1))}
        for number in self.alive:
            answer = _unmask(states[number], asked)
            for other, share in zip(answer[Key.NODE_ID_LIST], answer[Key.SHARE_LIST], strict=True):
                shares[other].append(share)
        return shares

    def _open(self, masked: list[list[bytes]], shares: dict[int, list[bytes]], keys: dict[int, tuple[bytes, bytes]]) -> np.ndarray:
        from flwr.common import bytes_to_ndarray
        from flwr.common.secure_aggregation import ndarrays_arithmetic as arithmetic
        from flwr.common.secure_aggregation.crypto.shamir import combine_shares
        from flwr.common.secure_aggregation.quantization import dequantize

        total: Any = None
        for vector in masked:
            arrays = [bytes_to_ndarray(array) for array in vector]
            total = arrays if total is None else arithmetic.parameters_addition(total, arrays)
        total = arithmetic.parameters_mod(total, RING)
        for number, found in shares.items():
            total = self._unmask(total, number, combine_shares(found), keys)
        factor, total = arithmetic.factor_extract(arithmetic.parameters_mod(total, RING))
        mean = dequantize(total, CLIP, TARGET)[0] - (len(self.alive) - 1) * CLIP
        return np.asarray(mean * (TARGET / factor))

    def _unmask(self, total: Any, number: int, secret: bytes, keys: dict[int, tuple[bytes, bytes]]) -> Any:
        """Take off the own mask of a survivor, or a vanished site's masks with the survivors."""
        from flwr.common.secure_aggregation import ndarrays_arithmetic as arithmetic
        from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
        from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
        from flwr.supercore.primitives.asymmetric import bytes_to_private_key, bytes_to_public_key

        shapes = arithmetic.get_parameters_shape(total)
        if number in self.alive:
            return arithmetic.parameters_subtraction(total, pseudo_rand_gen(secret, RING, shapes))
        for other in self.alive:
            key = generate_shared_key(bytes_to_private_key(secret), bytes_to_public_key(keys[other][0]))
            move = arithmetic.parameters_addition if number > other else arithmetic.parameters_subtraction
            total = move(total, pseudo_rand_gen(key, RING, shapes))
        return total


if __name__ == "__main__":
    for row in run():
        print(row)
