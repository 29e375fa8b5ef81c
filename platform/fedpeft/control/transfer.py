"""Versions over the wire: pulled into a cache, pushed from a registry, both from any byte on; and router cards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fedpeft.control import bounds, files
from fedpeft.control.cache import Cache
from fedpeft.control.link import STREAM, Link, Tries
from fedpeft.control.staging import Landing
from fedpeft.errors import LinkError, StorageError
from fedpeft.registry import Manifest, Version
from fedpeft.registry.log import DIGEST
from fedpeft.registry.manifest import NAME, SIGNATURE, sha256
from fedpeft.signing import Keys, verified
from fedpeft.v1 import registry_pb2 as pb

if TYPE_CHECKING:
    from fedpeft.routing import RouterCard

MOST = 64 << 30
"""Bytes of a version that a client believes."""
ACTIONS = ("publish", "pull", "push", "rollback")


def version(row: pb.Version) -> Version:
    """A version message, once its manifest is what its digest names and the key that it names signed it. Raises `StorageError`."""
    if not DIGEST.fullmatch(row.digest) or sha256(row.manifest) != row.digest or row.action not in ACTIONS:
        raise StorageError(f"version {row.digest[:12]} of {row.task}: its manifest was changed on the way; ask again")
    manifest = Manifest.from_bytes(row.manifest)
    if manifest.task != row.task or not verified(row.manifest, row.signature, Keys.signer(row.signature), "manifest v1"):
        raise StorageError(f"version {row.digest[:12]} of {row.task}: its signature does not hold; ask its registry's operator")
    return Version(row.task, row.number, row.digest, manifest, None, row.action, row.origin, row.created)  # type: ignore[arg-type]


def pull(link: Link, cache: Cache, digest: str) -> dict[str, bytes]:
    """All files of version ``digest`` from ``cache``, or through it.

    Raises:
        AdapterError: no such version there.
        StorageError: what came is not what the manifest says, twice.
        LinkError: the server cannot be reached for too long; the same call goes on.
    """
    tries, damaged = Tries(), 0
    while True:
        found = cache.files(digest)
        if found is not None:
            return found
        try:
            found = _pull(link, cache, digest, tries)
            cache.evict(digest)
            return found
        except LinkError:
            if not tries.wait():
                raise
        except StorageError:
            damaged += 1
            if damaged > 1:
                raise


def _pull(link: Link, cache: Cache, digest: str, tries: Tries) -> dict[str, bytes]:
    with link.broken(link.stub("Registry").Pull(_ask(cache, digest), timeout=STREAM)) as parts:
        head = next(parts, pb.PullPart()).head
        found = version(head.version)
        sizes = files.from_proto(head.files, MOST)
        if found.digest != digest or set(sizes) != set(found.manifest.files):
            raise StorageError(f"version {digest[:12]}: the server sent {found.digest[:12]} with {sorted(sizes)}; ask again")
        with cache.staging.landing(digest, sizes) as landing:
            _land(landing, parts, head.offset, tries)
            ready = {name: landed.path for name, landed in landing.complete(found.manifest.files).items()}
            held = {name: path.read_bytes() for name, path in ready.items()}
            cache.keep(found.manifest, ready, head.version.signature)
            landing.forget()
            return held | {NAME: head.version.manifest, SIGNATURE: head.version.signature}


def _ask(cache: Cache, digest: str) -> pb.PullRequest:
    """Go on after what lies in the landing; the sizes are not known yet, so its files are taken as they are, the last one open."""
    folder = cache.staging.root / digest
    have = sum(path.stat().st_size for path in folder.glob("[!.]*")) if folder.is_dir() else 0
    return pb.PullRequest(ref=digest, offset=have)


def _land(landing: Landing, parts: Iterable[Any], begins: int, tries: Tries) -> None:
    offset = landing.offset
    if offset != begins:
        landing.forget()
        raise LinkError(f"stream: begins at {begins}, {offset} bytes are here; begun anew")
    for part in parts:
        offset = landing.write(part.chunk, offset)
        tries.again()


def push(link: Link, manifest: bytes, signature: bytes, content: Mapping[str, bytes]) -> Version:
    """Publish; see `RemoteRegistry.push`."""
    tries, digest, before = Tries(), sha256(manifest), -1
    head = pb.PushHead(manifest=manifest, signature=signature, files=files.to_proto({name: len(data) for name, data in content.items()}))
    while True:
        staged = link.unary("Registry", "Staged", pb.StagedRequest(digest=digest, files=head.files))
        if staged.HasField("published"):
            return version(staged.published)
        if staged.offset > before >= 0:
            tries.again()
        before = staged.offset
        try:
            with link.broken(link.stub("Registry").Push.future(_push_parts(head, content, staged.offset), timeout=STREAM)) as call:
                return version(call.result())
        except LinkError:
            if not tries.wait():
                raise


def _push_parts(head: pb.PushHead, content: Mapping[str, bytes], offset: int) -> Iterator[pb.PushPart]:
    yield pb.PushPart(head=head)
    for name, start, end, place in files.spans({name: len(data) for name, data in content.items()}, offset):
        part = pb.PushPart()
        files.fill(part.chunk, content[name][start:end], place)
        yield part


def cards(parts: Iterable[Any]) -> dict[str, tuple[Version, RouterCard]]:
    """Served versions and router cards from a stream of both. Raises `StorageError` when a card is not what its manifest says."""
    found: dict[str, tuple[Version, bytearray]] = {}
    current: tuple[Version, bytearray] | None = None
    for part in parts:
        if part.HasField("version"):
            current = (version(part.version), bytearray())
            found[current[0].task] = current
        elif current is None:
            raise StorageError("cards: a chunk comes before its version; ask again")
        else:
            files.check(part.chunk, len(current[1]), min(len(current[1]) + bounds.CHUNK, MOST))
            current[1].extend(part.chunk.data)
    return {task: (made, _card(made, bytes(data))) for task, (made, data) in found.items()}


def _card(found: Version, data: bytes) -> RouterCard:
    from fedpeft.routing import FILE, Card, RouterCard

    if FILE not in found.manifest.files:
        return RouterCard(None if found.manifest.card is None else Card.from_json(found.manifest.card))
    if sha256(data) != found.manifest.files[FILE]:
        raise StorageError(f"router card of {found.task}: was changed on the way; ask again")
    return RouterCard.from_bytes(data)
