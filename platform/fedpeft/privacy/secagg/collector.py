"""The coordinator in secure aggregation: a state machine without I/O that learns the sum and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from fedpeft.errors import PrivacyError
from fedpeft.privacy.secagg import shamir
from fedpeft.privacy.secagg.agreement import SIZE, public
from fedpeft.privacy.secagg.masks import Codes, apply_masks
from fedpeft.privacy.secagg.member import pair_keys, self_key
from fedpeft.privacy.secagg.messages import Box, Bundle, Instance, Reveal, seed_check


@dataclass
class Collector:
    """One masked sum of n sites. Memory: one vector, and n times the degree of small boxes; each call works on one site's neighbours.

    ``add_*`` take what sites send and raise `PrivacyError`, naming the site, for what does not fit; such a site has then dropped out.
    """

    instance: Instance
    bundles: dict[str, Bundle] = field(default_factory=dict)
    boxes: dict[str, dict[str, Box]] = field(default_factory=dict)
    total: Codes | None = None
    delivered: dict[str, None] = field(default_factory=dict)
    signatures: dict[str, bytes] = field(default_factory=dict)
    reveals: dict[str, Reveal] = field(default_factory=dict)

    def add_bundle(self, bundle: Bundle) -> None:
        """Take a site's public keys."""
        if bundle.site not in self.instance.graph or len(bundle.mask_key) != SIZE or len(bundle.box_key) != SIZE:
            raise self._fault(bundle.site, "is no member, or its keys have another size")
        self.bundles[bundle.site] = bundle

    def bundles_for(self, site: str) -> list[Bundle]:
        """What ``site`` needs to deal: its neighbours' bundles and its own. Raises `PrivacyError` when too few came."""
        self.instance.require(len(self.bundles), "published keys")
        return [self.bundles[name] for name in sorted({site, *self.instance.graph[site]}) if name in self.bundles]

    def add_boxes(self, site: str, boxes: Sequence[Box]) -> None:
        """Take a site's shares, one box for each neighbour with keys."""
        if site not in self.bundles:
            raise self._fault(site, "deals shares without having published keys")
        wanted = {name for name in self.instance.graph[site] if name in self.bundles}
        found = {box.recipient: box for box in boxes if box.sender == site}
        if set(found) != wanted or len(found) != len(boxes):
            raise self._fault(site, "dealt to others than its neighbours")
        self.boxes[site] = found

    @property
    def dealers(self) -> tuple[str, ...]:
        """Sites that dealt shares: those who may deliver."""
        return tuple(sorted(self.boxes))

    def boxes_for(self, site: str) -> list[Box]:
        """The boxes for ``site``, one from each neighbour that dealt. Raises `PrivacyError` when too few sites dealt."""
        self.instance.require(len(self.boxes), "dealt shares")
        return [self.boxes[name][site] for name in self._dealers_near(site)]

    def add_vector(self, site: str, vector: Codes) -> None:
        """Add a masked vector; it is not kept."""
        if site not in self.boxes or site in self.delivered or self.signatures:
            raise self._fault(site, "delivers twice, too late, or without having dealt shares")
        if vector.dtype != np.int32 or (self.total is not None and vector.shape != self.total.shape):
            raise self._fault(site, f"delivers {vector.dtype}{list(vector.shape)}, others another size")
        total = np.zeros(vector.shape, np.int32) if self.total is None else self.total
        np.add(total.view(np.uint32), vector.view(np.uint32), out=total.view(np.uint32))
        self.total = total
        self.delivered[site] = None

    @property
    def survivors(self) -> tuple[str, ...]:
        """Sites whose vector is in the sum. Raises `PrivacyError` when they are too few to open it."""
        self.instance.require(len(self.delivered), "delivered")
        return tuple(sorted(self.delivered))

    def add_agreement(self, site: str, signature: bytes) -> None:
        """Take a survivor's signature on the survivors; sites check one another's."""
        self.instance.require(len(self.delivered), "delivered")
        if site not in self.delivered:
            raise self._fault(site, "signs without having delivered")
        self.signatures[site] = signature

    def signatures_for(self, site: str) -> Mapping[str, bytes]:
        """The signatures that ``site`` has to see."""
        return {name: self.signatures[name] for name in sorted({site, *self.instance.graph[site]}) if name in self.signatures}

    def add_reveal(self, reveal: Reveal) -> None:
        """Take a survivor's seed and shares; both shares of one site are never in it."""
        self.instance.require(len(self.delivered), "delivered")
        if reveal.site not in self.delivered or seed_check(reveal.seed) != self.bundles[reveal.site].seed_check:
            raise self._fault(reveal.site, "reveals a seed that is not the one it published a check of")
        if (set(reveal.seeds) | set(reveal.keys)) - set(self._dealers_near(reveal.site)):
            raise self._fault(reveal.site, "reveals shares that nobody dealt to it")
        if set(reveal.seeds) - self.delivered.keys() or set(reveal.keys) & self.delivered.keys():
            raise self._fault(reveal.site, "reveals a mask key of a survivor, or a seed of a site that vanished")
        self.reveals[reveal.site] = reveal

    def result(self, schema: str = "") -> Codes:
        """The sum of the survivors' vectors of ``schema``, in the ring of 2^32.

        Raises:
            PrivacyError: a secret cannot be opened, or shares were tampered with; nothing is released.
        """
        survivors = self.survivors
        assert self.total is not None
        taken = [self_key(self._seed(site)) for site in survivors]
        added: list[bytes] = []
        for gone in (name for name in self.dealers if name not in self.delivered):
            publics = {name: self.bundles[name].mask_key for name in self.instance.graph[gone] if name in self.delivered}
            for site, key in pair_keys(self._mask_key(gone), publics, self.instance, schema).items():
                (taken if site < gone else added).append(key)
        total = self.total.copy()
        apply_masks(total, added, taken)
        return total

    def to_bytes(self) -> bytes:
        """What is needed to open the sum once all vectors are in, but for the sum itself; nothing of it is secret."""
        bundles = {name: [part.hex() for part in (one.mask_key, one.box_key, one.seed_check)] for name, one in self.bundles.items()}
        dealt = {name: sorted(boxes) for name, boxes in self.boxes.items()}
        row = {"instance": asdict(self.instance), "bundles": bundles, "dealt": dealt, "delivered": list(self.delivered)}
        return json.dumps(row, sort_keys=True).encode()

    @staticmethod
    def from_bytes(data: bytes, total: Codes) -> Collector:
        """Inverse of `to_bytes`, with the sum of the masked vectors. Raises `PrivacyError` when it is torn."""
        try:
            row = json.loads(data)
            instance = Instance(**{**row["instance"], "members": tuple(row["instance"]["members"])})
            bundles = {name: Bundle(name, *map(bytes.fromhex, parts)) for name, parts in row["bundles"].items()}
            boxes = {name: {other: Box(name, other, b"") for other in others} for name, others in row["dealt"].items()}
            return Collector(instance, bundles, boxes, total, dict.fromkeys(row["delivered"]))
        except (ValueError, KeyError, TypeError, AttributeError) as fault:
            raise PrivacyError(f"secure aggregation: the sum's state is torn ({type(fault).__name__}); nothing is opened") from None

    def _seed(self, site: str) -> bytes:
        if site in self.reveals:
            return self.reveals[site].seed
        seed = self._combine(site, {name: reveal.seeds[site] for name, reveal in self._reveals_near(site) if site in reveal.seeds})
        if seed_check(seed) != self.bundles[site].seed_check:
            raise self._fault(site, "its seed does not fit the published check; a share was tampered with")
        return seed

    def _mask_key(self, site: str) -> bytes:
        private = self._combine(site, {name: reveal.keys[site] for name, reveal in self._reveals_near(site) if site in reveal.keys})
        if public(private) != self.bundles[site].mask_key:
            raise self._fault(site, "its mask key does not fit the published key; a share was tampered with")
        return private

    def _dealers_near(self, site: str) -> list[str]:
        """Neighbours of ``site`` that dealt a share to it."""
        return [name for name in self.instance.graph.get(site, ()) if site in self.boxes.get(name, ())]

    def _reveals_near(self, site: str) -> list[tuple[str, Reveal]]:
        return [(name, self.reveals[name]) for name in self.instance.graph[site] if name in self.reveals]

    def _combine(self, site: str, shares: Mapping[str, bytes]) -> bytes:
        """A secret of ``site``; its neighbours hold shares at their places among the neighbours with keys."""
        places = {name: place for place, name in enumerate(sorted(self.boxes[site]), 1)}
        threshold = self.instance.shape.threshold
        if len(shares) < threshold:
            raise self._fault(
                site, f"{len(shares)} shares of its secret came, {self.instance.shape.threshold} are needed; nothing is released"
            )
        return shamir.combine({places[name]: share for name, share in shares.items()}, self.instance.shape.threshold)

    def _fault(self, site: str, what: str) -> PrivacyError:
        return PrivacyError(f"secure aggregation {self.instance.name}: {site!r} {what}")
