"""A site in secure aggregation: a state machine without I/O, of plain values that survive a restart."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fedpeft.checksum import checksum
from fedpeft.errors import PrivacyError, StorageError
from fedpeft.privacy.secagg import shamir
from fedpeft.privacy.secagg.agreement import agree, derive, fresh, public, seal, unseal
from fedpeft.privacy.secagg.masks import KEY_SIZE, Codes, apply_masks
from fedpeft.privacy.secagg.messages import Box, Bundle, Instance, Reveal, agreed, context, seed_check
from fedpeft.signing import Keys, verified

Pins = Mapping[str, str]
"""Site -> its public key (hex): the identities that this site believes in."""


@dataclass
class Member:
    """One site in one instance.

    `bundle`, `deal`, `mask`, `agree` and `reveal` come in this order; each may be repeated with the same input and then gives the
    same effect, and refuses any other. ``commits`` is the secret key of ``vector``, the commitment to what was masked: it must never leave,
    and those of one key can be compared. Keep `to_bytes` (it holds secrets: mode 0600) after each call, before its answer leaves.
    """

    instance: Instance
    site: str
    mask_private: bytes = field(default_factory=fresh)
    box_private: bytes = field(default_factory=fresh)
    seed: bytes = field(default_factory=fresh)
    dealing: bytes = field(default_factory=fresh)
    commits: bytes = field(default_factory=lambda: fresh()[:KEY_SIZE])
    bundles: dict[str, tuple[bytes, bytes]] = field(default_factory=dict)
    boxes: dict[str, bytes] = field(default_factory=dict)
    dealers: tuple[str, ...] = ()
    vector: str = ""
    schema: str = ""
    survivors: tuple[str, ...] = ()
    _box_keys: dict[bytes, bytes] = field(default_factory=dict, init=False, repr=False, compare=False)

    def bundle(self, keys: Keys) -> Bundle:
        """The public keys, signed by the site's identity. Raises `PrivacyError` when the site is no member or members are too few."""
        if self.site not in self.instance.graph:
            raise self._fault("this site is not among its members")
        bare = Bundle(self.site, public(self.mask_private), public(self.box_private), seed_check(self.seed))
        return Bundle(bare.site, bare.mask_key, bare.box_key, bare.seed_check, keys.sign(bare.signed(self.instance)))

    def deal(self, bundles: Sequence[Bundle], pins: Pins) -> list[Box]:
        """Shares of the seed and of the mask key for every neighbour that published keys.

        Raises:
            PrivacyError: a bundle is not signed by the site that it names, the keys differ from those seen before, or too few came.
        """
        mine = self.instance.graph[self.site]
        found = {}
        for bundle in bundles:
            if bundle.site in mine:
                self._verify(bundle.signed(self.instance), bundle.signature, bundle.site, pins)
                found[bundle.site] = (bundle.mask_key, bundle.box_key)
        if self.bundles and found != self.bundles:
            raise self._fault("other keys of the neighbours came than before")
        if self.instance.shape.complete:
            self.instance.require(len(bundles), "published keys")
        if len(found) < self.instance.shape.threshold:
            raise self._fault(f"{len(found)} neighbours published keys, {self.instance.shape.threshold} are needed to open a secret")
        self.bundles = found
        return self._boxes()

    def mask(self, vector: Codes, boxes: Sequence[Box], dealers: Sequence[str], schema: str = "") -> Codes:
        """``vector`` under the self-mask and the pairwise masks with the neighbours among ``dealers``; a copy.

        Nothing is opened unless a quorum masked vectors of the same ``schema``, and masks of a site with another one do not cancel.

        Raises:
            PrivacyError: other boxes, dealers, values or schema than before (two vectors under one mask would show their difference), a
                neighbour's box is missing, or too few sites dealt.
        """
        self._receive(boxes, dealers)
        digest = checksum(vector.data, key=self.commits).hex()
        if self.vector not in ("", digest) or (self.vector and self.schema != schema):
            raise self._fault("another vector was masked before; one mask hides one vector only")
        self.vector, self.schema = digest, schema
        masked = vector.copy()
        keys = pair_keys(self.mask_private, {name: self.bundles[name][0] for name in self.boxes}, self.instance, schema)
        added = [key for name, key in keys.items() if self.site < name]
        apply_masks(masked, [*added, self_key(self.seed)], [key for name, key in keys.items() if self.site > name])
        return masked

    def agree(self, survivors: Sequence[str], keys: Keys) -> bytes:
        """A signature on who survived; given for one set only, for ever.

        Raises:
            PrivacyError: another set than before, one without this site, with strangers, or too small.
        """
        found = tuple(sorted(survivors))
        if self.survivors not in ((), found):
            raise self._fault("another set of survivors was signed before")
        if not self.vector or self.site not in found or not set(found) <= set(self.dealers):
            raise self._fault("the survivors are not dealers, or this site, whose vector was sent, is not among them")
        self.instance.require(len(found), "survived")
        self.survivors = found
        return keys.sign(agreed(self.instance, found, self.schema))

    def reveal(self, signatures: Mapping[str, bytes], pins: Pins) -> Reveal:
        """Shares of the survivors' seeds and of the others' mask keys, once a quorum has signed the same survivors.

        Raises:
            PrivacyError: nothing was agreed, too few signatures, or one that does not hold.
        """
        if not self.survivors:
            raise self._fault("no survivors were agreed on; nothing is revealed")
        shape, near = self.instance.shape, {self.site, *self.instance.graph[self.site]}
        counted = [name for name in sorted(signatures) if name in self.survivors and (shape.complete or name in near)]
        signed, needed = agreed(self.instance, self.survivors, self.schema), shape.quorum - 1
        others = [name for name in counted if name != self.site][:needed]  # what comes on top of a quorum proves nothing more
        for name in others:
            self._verify(signed, signatures[name], name, pins)
        if len(others) < needed:
            raise self._fault(f"{len(others) + 1} signatures on the survivors, {shape.quorum} are needed; nothing is revealed")
        shares = {name: self._open(name) for name in self.boxes}
        return Reveal(
            self.site,
            self.seed,
            {name: pair[0] for name, pair in shares.items() if name in self.survivors},
            {name: pair[1] for name, pair in shares.items() if name not in self.survivors},
        )

    def to_bytes(self) -> bytes:
        """The whole state, secrets included."""
        row = {name: value for name, value in vars(self).items() if name != "_box_keys"} | {"instance": asdict(self.instance)}
        return json.dumps(row, default=bytes.hex).encode()

    @staticmethod
    def from_bytes(data: bytes) -> Member:
        """Inverse of `to_bytes`. Raises `PrivacyError` when it is torn."""
        try:
            row: dict[str, Any] = json.loads(data)
            instance = row.pop("instance")
            row["instance"] = Instance(**{**instance, "members": tuple(instance["members"])})
            for name in ("mask_private", "box_private", "seed", "dealing", "commits"):
                row[name] = bytes.fromhex(row[name])
            row["bundles"] = {name: (bytes.fromhex(one), bytes.fromhex(two)) for name, (one, two) in row["bundles"].items()}
            row["boxes"] = {name: bytes.fromhex(box) for name, box in row["boxes"].items()}
            return Member(**{**row, "dealers": tuple(row["dealers"]), "survivors": tuple(row["survivors"])})
        except (ValueError, KeyError, TypeError, AttributeError) as fault:
            raise PrivacyError(f"secure aggregation: this site's state is torn ({type(fault).__name__}); the round is left") from None

    # helpers ---------------------------------------------------------------------------------------------------------------

    def _receive(self, boxes: Sequence[Box], dealers: Sequence[str]) -> None:
        """Keep the neighbours' boxes; every box is opened once here, so that a bad one is found before anything leaves."""
        found = {box.sender: box.payload for box in boxes if box.recipient == self.site}
        wanted = set(self.bundles) & set(dealers)
        if (self.dealers and (tuple(sorted(dealers)) != self.dealers or found != self.boxes)) or set(found) != wanted:
            raise self._fault("the boxes are not those of the dealers among the neighbours, or others than before")
        self.instance.require(len(dealers), "dealt shares")
        if len(wanted) < self.instance.shape.threshold:
            raise self._fault(f"{len(wanted)} neighbours dealt shares, {self.instance.shape.threshold} are needed")
        self.boxes, self.dealers = found, tuple(sorted(dealers))
        for name in found:
            self._open(name)

    def _boxes(self) -> list[Box]:
        names, threshold = sorted(self.bundles), self.instance.shape.threshold
        secrets = (("seed", self.seed), ("mask key", self.mask_private))
        seeds, keys = (shamir.split(one, threshold, len(names), derive(self.dealing, f"shares {name}", 32)) for name, one in secrets)
        return [Box(self.site, name, self._seal(name, one + two)) for name, one, two in zip(names, seeds, keys, strict=True)]

    def _seal(self, name: str, shares: bytes) -> bytes:
        return seal(self._box_key(name), shares, context(self.instance, self.site, name))

    def _open(self, name: str) -> tuple[bytes, bytes]:
        shares = unseal(self._box_key(name), self.boxes[name], context(self.instance, name, self.site))
        if len(shares) != 2 * shamir.SIZE:
            raise self._fault(f"the box of {name} holds {len(shares)} bytes, {2 * shamir.SIZE} were expected")
        return shares[: shamir.SIZE], shares[shamir.SIZE :]

    def _box_key(self, name: str) -> bytes:
        """The key of the boxes to and from a neighbour; all neighbours' are agreed at the first call, and never kept on disk."""
        wanted = self.bundles[name][1]
        if wanted not in self._box_keys:
            publics = [key for _, key in self.bundles.values()]
            self._box_keys = dict(zip(publics, agree(self.box_private, publics, "box", 32), strict=True))
        return self._box_keys[wanted]

    def _verify(self, data: bytes, signature: bytes, name: str, pins: Pins) -> None:
        if name not in pins or not verified(data, signature, pins[name], PURPOSE):
            known = "its signature does not hold" if name in pins else "its public key is not known to this site"
            raise self._fault(f"{name!r} cannot be believed: {known}; check [peers] in the site's file")

    def _fault(self, what: str) -> PrivacyError:
        return PrivacyError(f"secure aggregation {self.instance.name} at {self.site}: {what}")


PURPOSE = "secagg v1"
"""What sites' identity keys sign for here."""


def signer(bundle: Bundle, instance: Instance) -> str | None:
    """The public key (hex) of whoever signed ``bundle``, or None when its signature does not hold."""
    try:
        key = Keys.signer(bundle.signature)
    except StorageError:
        return None
    return key if verified(bundle.signed(instance), bundle.signature, key, PURPOSE) else None


def pair_keys(private: bytes, others: Mapping[str, bytes], instance: Instance, schema: str) -> dict[str, bytes]:
    """The keys of the masks with ``others`` (site -> public key) on vectors of ``schema``; the site with the smaller name adds the mask."""
    return dict(zip(others, agree(private, others.values(), f"pair {instance.digest.hex()} {schema}", KEY_SIZE), strict=True))


def self_key(seed: bytes) -> bytes:
    """The key of a site's own mask."""
    return derive(seed, "self", KEY_SIZE)
