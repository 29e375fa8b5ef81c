"""The masked sums of one exchange: a machine for each group of a task's sites, what they said, and why a sum was given up."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from fedpeft.errors import PrivacyError
from fedpeft.privacy.secagg import PURPOSE, Collector, agreed, signer
from fedpeft.signing import verified
from fedpeft.update import Update
from fedpeft.wire import Envelope, masking
from fedpeft.wire.v1.federation_pb2 import Masking, TaskResult
from fedpeft.wire.vector import Vector
from fedpeft_coordinator.collecting import Accept, line, require_lengths
from fedpeft_coordinator.exchange import Drops

Group = tuple[str, int]
"""A task, and the place of a group of its sites; most tasks have one group."""


@dataclass
class Sums:
    """Collectors by group; ``identities`` are sites' public keys, to which those that were never seen are added.

    What a site sends is refused by `PrivacyError`, which makes it a drop-out; a group of which too little is left is ``given_up``.
    ``lengths`` are those of the counters that an evaluation of each task may give.
    """

    collectors: dict[Group, Collector]
    identities: MutableMapping[str, str]
    lengths: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    vectors: dict[str, Vector] = field(default_factory=dict)
    counters: dict[str, dict[str, int]] = field(default_factory=lambda: defaultdict(dict))
    drops: Drops = field(default_factory=lambda: defaultdict(dict))
    given_up: dict[Group, str] = field(default_factory=dict)

    @property
    def open(self) -> list[Group]:
        """Groups that go on."""
        return [group for group in self.collectors if group not in self.given_up]

    @property
    def lost(self) -> dict[str, str]:
        """Tasks of which no group goes on, and why."""
        alive = {task for task, _ in self.open}
        return {task: why for (task, _), why in self.given_up.items() if task not in alive}

    def of(self, task: str) -> dict[Group, Collector]:
        """The groups of ``task`` that go on."""
        return {group: self.collectors[group] for group in self.open if group[0] == task}

    def left_out(self, task: str) -> dict[str, str]:
        """The sites of the groups of ``task`` that were given up, and why."""
        groups = [group for group in self.given_up if group[0] == task]
        return {site: self.given_up[group] for group in groups for site in self.collectors[group].instance.members}

    def asked(self, sites: Callable[[Collector], Iterable[str]]) -> dict[str, tuple[str, ...]]:
        """The sites of each task that goes on; a group is given up where there are too few."""
        found: dict[str, list[str]] = defaultdict(list)
        for group in self.open:
            with self._losing(group):
                names = sites(self.collectors[group])
                found[group[0]].extend(names)
        return {task: tuple(sorted(names)) for task, names in found.items()}

    def require(self, count: Callable[[Collector], int], what: str) -> None:
        """Give up the groups of which too few sites are left."""
        for group in self.open:
            with self._losing(group):
                self.collectors[group].instance.require(count(self.collectors[group]), what)

    def note(self, drops: Drops) -> None:
        """Remember who dropped out; the first reason counts."""
        for task, sites in drops.items():
            for site, why in sites.items():
                self.drops[task].setdefault(site, why)

    def results(self) -> dict[str, list[Update]]:
        """The sums of each task's groups that could be opened. The others are given up by name."""
        found: dict[str, list[Update]] = defaultdict(list)
        for group in self.open:
            with self._losing(group):
                collector = self.collectors[group]
                total = self.vectors[group[0]].open(collector.result(self.vectors[group[0]].schema.digest), len(collector.survivors))
                found[group[0]].append(total)
        return dict(found)

    def say(self, step: str, site: str, task: str) -> Masking:
        """What a step tells ``site``."""
        tellers = {"keys": self._keys, "shares": self._shares, "vector": self._vector, "agree": self._agree, "reveal": self._reveal}
        told = tellers[step](site, self._at(site, task))
        if step == "vector":
            told.counters.update(self.counters.get(task, {}))
        return told

    @property
    def takers(self) -> dict[str, Accept]:
        """What takes the answers to each step."""
        return {
            "keys": self._take_keys,
            "shares": self._take_shares,
            "vector": self._take_vector,
            "agree": self._take_agreement,
            "reveal": self._take_reveal,
        }

    # what sites are told --------------------------------------------------------------------------------------------------

    def _keys(self, _site: str, collector: Collector) -> Masking:
        instance = collector.instance
        return Masking(step=Masking.STEP_KEYS, name=instance.name, instance=masking.instance_message(instance))

    def _shares(self, site: str, collector: Collector) -> Masking:
        bundles = map(masking.bundle_message, collector.bundles_for(site))
        return Masking(step=Masking.STEP_SHARES, name=collector.instance.name, bundles=bundles)

    def _vector(self, site: str, collector: Collector) -> Masking:
        return Masking(
            step=Masking.STEP_VECTOR,
            name=collector.instance.name,
            boxes=map(masking.box_message, collector.boxes_for(site)),
            dealers=collector.dealers,
        )

    def _agree(self, _site: str, collector: Collector) -> Masking:
        return Masking(step=Masking.STEP_AGREE, name=collector.instance.name, survivors=collector.survivors)

    def _reveal(self, site: str, collector: Collector) -> Masking:
        return Masking(step=Masking.STEP_REVEAL, name=collector.instance.name, signatures=collector.signatures_for(site))

    # what sites answer ----------------------------------------------------------------------------------------------------

    def _take_keys(self, site: str, result: TaskResult, _envelope: Envelope) -> None:
        bundle, collector = masking.bundle_of(result.masked.bundle), self._at(site, result.task)
        key = signer(bundle, collector.instance) if bundle.site == site else None
        if key is None or self.identities.get(site, key) != key:
            raise PrivacyError(
                f"secure aggregation: keys of {site!r} are not signed by the identity it is known by; where it was set up anew, put its "
                "public key under [secure_aggregation.identities] and tell the other sites"
            )
        if result.task not in self.vectors:
            self._take_counters(result)
        collector.add_bundle(bundle)
        self.identities[site] = key

    def _take_shares(self, site: str, result: TaskResult, _envelope: Envelope) -> None:
        self._at(site, result.task).add_boxes(site, masking.boxes_of(result.masked.boxes))

    def _take_vector(self, site: str, result: TaskResult, envelope: Envelope) -> None:
        vector = self.vectors[result.task]
        self._at(site, result.task).add_vector(site, vector.read(envelope.array(result.task, vector.schema.layout.fingerprint)))

    def _take_agreement(self, site: str, result: TaskResult, _envelope: Envelope) -> None:
        collector, signature = self._at(site, result.task), masking.signature_of(result.masked.signature)
        what = agreed(collector.instance, collector.survivors, self.vectors[result.task].schema.digest)
        if not verified(what, signature, self.identities.get(site, ""), PURPOSE):
            raise PrivacyError(f"secure aggregation: the signature of {site!r} on the survivors does not hold")
        collector.add_agreement(site, signature)

    def _take_reveal(self, site: str, result: TaskResult, _envelope: Envelope) -> None:
        self._at(site, result.task).add_reveal(masking.reveal_of(site, result.masked.reveal))

    def _take_counters(self, result: TaskResult) -> None:
        """Names and lengths of an evaluation's counters: the vector holds all that any site has."""
        known = self.counters[result.task]
        given = masking.counters_of(result.masked.counters)
        require_lengths(self.lengths.get(result.task, {}), given)
        clash = sorted(name for name, length in given.items() if known.get(name, length) != length)
        if clash:
            raise PrivacyError(f"secure aggregation: counters {clash} have other lengths than those of other sites")
        self.counters[result.task] = masking.counters_of({**known, **given})

    def _at(self, site: str, task: str) -> Collector:
        """The machine of the group of ``task`` that ``site`` is in."""
        return next(one for (name, _), one in self.collectors.items() if name == task and site in one.instance.graph)

    @contextmanager
    def _losing(self, group: Group) -> Iterator[None]:
        """What cannot be opened is given up by name; the other groups go on."""
        try:
            yield
        except PrivacyError as fault:
            self.given_up[group] = line(str(fault).replace(f" {self.collectors[group].instance.name}", ""))
