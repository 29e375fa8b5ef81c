"""Masked sums on the wire: their messages as the privacy room's values, sizes in bounds, and how an instance is named."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

from fedpeft.errors import PrivacyError
from fedpeft.privacy.secagg import Box, Bundle, Instance, Reveal
from fedpeft.wire.v1 import federation_pb2 as pb

MAX_MEMBERS = 1 << 15
MAX_EDGES = 1 << 24
"""Pairs of neighbours, counted from both sides: what a site must hold in memory to know the graph."""
MAX_NAME = 512
MAX_KEY, MAX_SIGNATURE, MAX_BOX = 32, 512, 256
"""Bytes of a key, a seed or a share, of a signature, and of a box."""
MAX_COUNTERS, MAX_VALUES = 1024, 1 << 21
"""Names of counters in one vector, and their values in all."""
KINDS = ("train", "evaluate")
OWN_FIELDS = ("previous_digest", "down_roles", "down_codec_json", "cohort", "counted_round", "masking")
"""Fields of a task's plan that differ between sites, or when it is sent again, although the same work is meant."""


def common(plan: pb.TaskPlan) -> str:
    """SHA-256 over what all sites are told alike.

    It is part of an instance's name, which every site signs, so that no site can be told to do other work than the rest.
    """
    shared = pb.TaskPlan()
    shared.CopyFrom(plan)
    for field in OWN_FIELDS:
        shared.ClearField(field)
    return hashlib.sha256(shared.SerializeToString(deterministic=True)).hexdigest()


def purpose(run: str, number: int, kind: str, plan: pb.TaskPlan) -> str:
    """What an instance is for; its name is this, ``#`` and a nonce."""
    return f"{_work(run, number, kind, plan)}/{common(plan)}"


def work_of(name: str, run: str, number: int, task: str) -> str:
    """Run, round, task and kind of the instance ``name``. Raises `PrivacyError` when it is of another round or task."""
    for kind in KINDS:
        work = f"{run}/{number}/{task}/{kind}"
        if name.startswith(f"{work}/"):
            return work
    raise PrivacyError(f"secure aggregation: instance {name[:80]!r} is not of round {number} and task {task!r} of this run")


def _work(run: str, number: int, kind: str, plan: pb.TaskPlan) -> str:
    return f"{run}/{number}/{plan.task}/{kind}"


def instance_message(instance: Instance) -> pb.Instance:
    """``instance`` as it travels."""
    return pb.Instance(
        name=instance.name, members=instance.members, colluding=instance.colluding, dropping=instance.dropping, least=instance.least
    )


def instance_of(message: pb.Instance) -> Instance:
    """Inverse of `instance_message`. Raises `PrivacyError` when it can be none."""
    names = [message.name, *message.members]
    if len(message.members) > MAX_MEMBERS or any(len(name) > MAX_NAME for name in names) or message.least > MAX_MEMBERS:
        raise PrivacyError(f"secure aggregation: an instance of {len(message.members)} members is beyond {MAX_MEMBERS}, or a name too long")
    if not (0.0 <= message.colluding < 1.0 and 0.0 <= message.dropping < 1.0):
        raise PrivacyError(f"secure aggregation: colluding = {message.colluding:g} and dropping = {message.dropping:g} must be in [0, 1)")
    made = Instance(message.name, tuple(message.members), message.colluding, message.dropping, message.least)
    if made.shape.sites * made.shape.degree > MAX_EDGES:
        raise PrivacyError(
            f"secure aggregation: {made.shape.sites} members with {made.shape.degree} neighbours each are beyond {MAX_EDGES} pairs in all; "
            "lower secure_aggregation.colluding or dropping"
        )
    return made


def bundle_message(bundle: Bundle) -> pb.Bundle:
    """``bundle`` as it travels."""
    return pb.Bundle(**vars(bundle))


def bundle_of(message: pb.Bundle) -> Bundle:
    """Inverse of `bundle_message`. Raises `PrivacyError` when a key has another size."""
    keys = (message.mask_key, message.box_key, message.seed_check)
    if any(len(key) != MAX_KEY for key in keys) or len(message.signature) > MAX_SIGNATURE:
        raise PrivacyError(
            f"secure aggregation: keys of {message.site[:63]!r} have {[len(key) for key in keys]} bytes, {MAX_KEY} each needed"
        )
    return Bundle(message.site, *keys, message.signature)


def bundles_of(messages: Iterable[pb.Bundle]) -> list[Bundle]:
    """Bundles of different sites. Raises `PrivacyError` when one site has two."""
    found = [bundle_of(message) for message in messages]
    if len({bundle.site for bundle in found}) < len(found):
        raise PrivacyError("secure aggregation: two bundles of keys for one site")
    return found


def box_message(box: Box) -> pb.Box:
    """``box`` as it travels."""
    return pb.Box(sender=box.sender, recipient=box.recipient, payload=box.payload)


def boxes_of(messages: Iterable[pb.Box]) -> list[Box]:
    """Inverse of `box_message`. Raises `PrivacyError` when a box is too large."""
    found = [Box(message.sender, message.recipient, message.payload) for message in messages]
    if any(len(box.payload) > MAX_BOX for box in found):
        raise PrivacyError(f"secure aggregation: a box is larger than {MAX_BOX} bytes")
    return found


def signature_of(signature: bytes) -> bytes:
    """``signature`` itself. Raises `PrivacyError` when it is too large."""
    if len(signature) > MAX_SIGNATURE:
        raise PrivacyError(f"secure aggregation: a signature of {len(signature)} bytes, at most {MAX_SIGNATURE} are taken")
    return signature


def reveal_message(reveal: Reveal) -> pb.Reveal:
    """``reveal`` as it travels."""
    return pb.Reveal(seed=reveal.seed, seeds=dict(reveal.seeds), keys=dict(reveal.keys))


def reveal_of(site: str, message: pb.Reveal) -> Reveal:
    """Inverse of `reveal_message`. Raises `PrivacyError` when a secret or a share has another size."""
    secrets = [message.seed, *message.seeds.values(), *message.keys.values()]
    if any(len(secret) != MAX_KEY for secret in secrets):
        raise PrivacyError(f"secure aggregation: {site!r} reveals something that has not {MAX_KEY} bytes")
    return Reveal(site, message.seed, dict(message.seeds), dict(message.keys))


def counters_of(lengths: Mapping[str, int]) -> dict[str, int]:
    """Lengths of counters by name. Raises `PrivacyError` when there are too many."""
    if len(lengths) > MAX_COUNTERS or sum(lengths.values()) > MAX_VALUES:
        raise PrivacyError(f"secure aggregation: {len(lengths)} counters; at most {MAX_COUNTERS} of {MAX_VALUES} values in all are taken")
    return dict(sorted(lengths.items()))
