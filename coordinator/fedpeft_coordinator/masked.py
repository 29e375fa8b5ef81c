"""The masked sums of one exchange: a machine for each task, what its sites said, and why a sum was given up."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from fedpeft.errors import PrivacyError, UpdateError
from fedpeft.privacy.packing import Schema, unpack
from fedpeft.privacy.secagg import PURPOSE, Collector, agreed, signer
from fedpeft.signing import verified
from fedpeft.update import Update
from fedpeft.wire import Envelope, masking
from fedpeft.wire.v1.federation_pb2 import Masking, TaskResult
from fedpeft_coordinator.collecting import Accept, line
from fedpeft_coordinator.exchange import Drops


@dataclass
class Sums:
    """Collectors by task; ``identities`` are sites' public keys, to which those that were never seen are added.

    What a site sends is refused by `PrivacyError`, which makes it a drop-out; a task of which too little is left is ``lost``.
    """

    collectors: dict[str, Collector]
    identities: MutableMapping[str, str]
    schemas: dict[str, Schema] = field(default_factory=dict)
    counters: dict[str, dict[str, int]] = field(default_factory=lambda: defaultdict(dict))
    drops: Drops = field(default_factory=lambda: defaultdict(dict))
    lost: dict[str, str] = field(default_factory=dict)

    @property
    def open(self) -> list[str]:
        """Tasks that go on."""
        return [name for name in self.collectors if name not in self.lost]

    def asked(self, sites: Callable[[Collector], Iterable[str]]) -> dict[str, tuple[str, ...]]:
        """The sites of each task that goes on; a task is lost where there are too few."""
        found = {}
        for name in self.open:
            with self._losing(name):
                found[name] = tuple(sorted(sites(self.collectors[name])))
        return {name: names for name, names in found.items() if name not in self.lost}

    def require(self, count: Callable[[Collector], int], what: str) -> None:
        """Give up the tasks of which too few sites are left."""
        for name in self.open:
            with self._losing(name):
                self.collectors[name].instance.require(count(self.collectors[name]), what)

    def note(self, drops: Drops) -> None:
        """Remember who dropped out; the first reason counts."""
        for task, sites in drops.items():
            for site, why in sites.items():
                self.drops[task].setdefault(site, why)

    def results(self) -> dict[str, Update]:
        """The sums of the tasks that could be opened. The others are lost by name."""
        found = {}
        for name in self.open:
            with self._losing(name):
                collector = self.collectors[name]
                found[name] = unpack(collector.result(), self.schemas[name], len(collector.survivors))
        return found

    def say(self, step: str, site: str, task: str) -> Masking:
        """What a step tells ``site``."""
        tellers = {"keys": self._keys, "shares": self._shares, "vector": self._vector, "agree": self._agree, "reveal": self._reveal}
        told = tellers[step](site, self.collectors[task])
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
        bundle, collector = masking.bundle_of(result.masked.bundle), self.collectors[result.task]
        key = signer(bundle, collector.instance) if bundle.site == site else None
        if key is None or self.identities.get(site, key) != key:
            raise PrivacyError(
                f"secure aggregation: keys of {site!r} are not signed by the identity it is known by; where it was set up anew, put its "
                "public key under [secure_aggregation.identities] and tell the other sites"
            )
        if result.task not in self.schemas:
            self._take_counters(result)
        collector.add_bundle(bundle)
        self.identities[site] = key

    def _take_shares(self, site: str, result: TaskResult, _envelope: Envelope) -> None:
        self.collectors[result.task].add_boxes(site, masking.boxes_of(result.masked.boxes))

    def _take_vector(self, site: str, result: TaskResult, envelope: Envelope) -> None:
        schema = self.schemas[result.task]
        vector = envelope.array(result.task, schema.layout.fingerprint)
        if vector.shape != (schema.size,):
            raise UpdateError(f"{vector.size} masked values, the plan needs {schema.size}; do both sides run one version?")
        self.collectors[result.task].add_vector(site, vector)

    def _take_agreement(self, site: str, result: TaskResult, _envelope: Envelope) -> None:
        collector, signature = self.collectors[result.task], masking.signature_of(result.masked.signature)
        what = agreed(collector.instance, collector.survivors, self.schemas[result.task].digest)
        if not verified(what, signature, self.identities.get(site, ""), PURPOSE):
            raise PrivacyError(f"secure aggregation: the signature of {site!r} on the survivors does not hold")
        collector.add_agreement(site, signature)

    def _take_reveal(self, site: str, result: TaskResult, _envelope: Envelope) -> None:
        self.collectors[result.task].add_reveal(masking.reveal_of(site, result.masked.reveal))

    def _take_counters(self, result: TaskResult) -> None:
        """Names and lengths of an evaluation's counters: the vector holds all that any site has."""
        known = self.counters[result.task]
        given = masking.counters_of(result.masked.counters)
        clash = sorted(name for name, length in given.items() if known.get(name, length) != length)
        if clash:
            raise PrivacyError(f"secure aggregation: counters {clash} have other lengths than those of other sites")
        self.counters[result.task] = masking.counters_of({**known, **given})

    @contextmanager
    def _losing(self, name: str) -> Iterator[None]:
        """What cannot be opened is lost by name; the other tasks go on."""
        try:
            yield
        except PrivacyError as fault:
            self.lost[name] = line(fault)
