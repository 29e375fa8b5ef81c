"""Registry: immutable, signed, content-addressed versions of adapters, and each task's history of them, in plain files by default.

::

    objects/<digest>/   adapter_config.json adapter_model.safetensors fedpeft.json router.safetensors manifest.json manifest.sig
    refs/<task>/log     one line per event, hash-chained (`fedpeft.registry.log`)
    refs/<task>/aliases one line per move of an alias, hash-chained and signed (`fedpeft.registry.aliases`)
    keys/               signing.key (0600) signing.pub trusted/*.pub

Readers take no lock: an object appears at once, an event by one line. Writers compare and swap.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fedpeft.adapters import Adapter
from fedpeft.adapters.folder import contents, digest_in, parse, write_folder
from fedpeft.errors import AdapterError, StorageError
from fedpeft.registry import aliases, log
from fedpeft.registry.aliases import Move
from fedpeft.registry.histories import FileHistories, Histories
from fedpeft.registry.judging import Offered, judge, taken
from fedpeft.registry.log import DIGEST, Action, Entry
from fedpeft.registry.manifest import NAME, SIGNATURE, Manifest, complete
from fedpeft.registry.objects import Objects
from fedpeft.registry.router_cards import derived, router_card
from fedpeft.registry.store import FolderStore, Store
from fedpeft.registry.version import Head, Source, Version, log_name, moves_name
from fedpeft.routing import FILE, RouterCard
from fedpeft.signing import Keys


@dataclass(frozen=True)
class Registry:
    """The registry in folder ``root``, which is made at the first publication; its versions and histories may lie elsewhere.

    A reference is ``task`` or ``task@latest`` (its latest event), ``task@3``, ``task@ALIAS``, ``sha256:<prefix>`` of a version or
    of an adapter, or a whole digest.
    """

    root: Path
    store: Store | None = None
    lists: Histories | None = None

    @cached_property
    def objects(self) -> Objects:
        """The stored versions."""
        return Objects(self.store or FolderStore(self.root / "objects"), Keys(self.root / "keys", "manifest v1"))

    @cached_property
    def histories(self) -> Histories:
        """Events and moves of aliases."""
        return self.lists or FileHistories(self.root)

    def publish(self, adapter: Adapter, manifest: Manifest, origin: str = "", router: RouterCard | None = None) -> Version:
        """Store ``adapter`` with its lineage and its router card and make it its task's latest version.

        ``router`` is the card where sites added to it (gates); what follows from the adapter alone is derived. ``origin`` names
        the act (say ``run/round/task``): publishing it again gives the version of the first time. Without one, equal content counts as
        the same act.

        Raises:
            AdapterError: a value is not finite, the task's name cannot be stored, or ``origin`` published other content before.
            StorageError: no space or permission; the registry is as it was.
        """
        files = contents(adapter)
        files[FILE] = (router or derived(adapter, manifest)).to_bytes()
        whole = complete(manifest, adapter, files, digest_in(files))
        log_name(whole.task)
        return self._record(whole.task, "publish", self.objects.put(whole, files), origin)

    def pull(self, source: Source, ref: str) -> Version:
        """Copy a version of ``source`` after verifying it, and trust its signer from now on.

        Raises:
            AdapterError: no such version there.
            StorageError: it is damaged or unsigned there, or cannot be written here.
        """
        found = source.get(ref)
        log_name(found.task)
        files = dict(source.files(found.digest))
        signature = files.pop(SIGNATURE)
        files.pop(NAME)
        self.objects.keys.trust(Keys.signer(signature))
        self.objects.put(found.manifest, files, signature)
        return self._record(found.task, "pull", found.digest, f"pull/{found.digest}")

    def accept(self, manifest: Manifest, files: Mapping[str, Offered], signature: bytes, origin: str, base: str = "") -> Version:
        """Publish what somebody else made and signed, once everything about it holds; files given as paths are taken over.

        ``origin`` names the act, as in `publish`; ``base`` is the identity of the base that it must be for; empty: that of `base`.

        Raises:
            PolicyError: nobody trusted signed it.
            BaseError: it is for another base.
            AdapterError, StorageError: files, checksums and manifest do not belong together. Nothing is published.
        """
        log_name(manifest.task)
        judge(manifest, files, signature, self.objects.keys, base or self.base())
        self.objects.put(manifest, {name: taken(content) for name, content in files.items()}, signature)
        return self._record(manifest.task, "push", manifest.digest, origin)

    def base(self) -> str:
        """Identity of the base that this registry's versions are for; empty where there are none."""
        return next((self.objects.manifest(self.events(task)[-1].digest).base for task in self.tasks()), "")

    def files(self, digest: str) -> dict[str, bytes]:
        """All files of version ``digest``, by name. Raises `StorageError` when it is not intact."""
        return self.objects.files(digest)

    def rollback(self, task: str, ref: str) -> Version:
        """Make an earlier version of ``task`` its latest again by a new event; nothing is deleted.

        Raises:
            AdapterError: ``ref`` is no version of ``task``.
            StorageError: that version is damaged, or the event cannot be written.
        """
        target = self._own(task, ref)
        self.objects.check(target.digest)
        while True:
            entries = self.events(task)
            entry = log.follow(entries, "rollback", target.digest, "")
            if self.histories.append(log_name(task), len(entries), entry.to_line()):
                return self.at(task, entry)

    def alias(self, task: str, name: str, ref: str, by: str = "") -> Move:
        """Point alias ``name`` of ``task`` at a version of it: a signed move, nothing is deleted; where it points already, no move.

        Raises:
            AdapterError: ``ref`` is no version of ``task``, or ``name`` cannot be an alias.
            StorageError: that version is damaged, or the move cannot be written.
        """
        aliases.check_name(name)
        target = self._own(task, ref)
        self.objects.check(target.digest)
        while True:
            moves = self.moves(task)
            last = next((move for move in reversed(moves) if move.alias == name), None)
            if last is not None and last.digest == target.digest:
                return last
            move = aliases.follow(moves, (task, name, target.digest, by), self._alias_keys)
            if self.histories.append(moves_name(task), len(moves), move.to_line()):
                return move

    def aliases(self, task: str) -> dict[str, str]:
        """Digest by alias of ``task``, signatures checked. Raises `StorageError` when one does not hold."""
        last = {move.alias: move for move in self.moves(task)}
        for name, move in last.items():
            fault = self._alias_keys.fault(move.body, move.signature.encode())
            if fault:
                raise StorageError(f"{self.histories.where(moves_name(task))}: alias {name!r}: {fault}; set it again")
        return {name: move.digest for name, move in sorted(last.items())}

    def moves(self, task: str) -> tuple[Move, ...]:
        """All moves of aliases of ``task``, oldest first. Raises `StorageError` when the chain is broken."""
        return aliases.parse(self.histories.lines(moves_name(task)), task, self.histories.where(moves_name(task)))

    def resolve(self, ref: str) -> str:
        """The digest that ``ref`` names. Raises `AdapterError` when it names none, or several."""
        return self.get(ref).digest

    def get(self, ref: str) -> Version:
        """The version that ``ref`` names. Raises `AdapterError` when it names none or several, `StorageError` on a torn manifest."""
        if ref.startswith("sha256:") or DIGEST.fullmatch(ref):
            return self._by_digest(ref.removeprefix("sha256:"))
        task, at, place = ref.rpartition("@")
        entries = self.events(task if at else ref)
        if not at or place == aliases.LATEST:
            return self.at(task or ref, entries[-1])
        if place.isdecimal() and 1 <= int(place[:20]) <= len(entries):
            return self.at(task, entries[int(place) - 1])
        named = self.aliases(task)
        same = [entry for entry in entries if entry.digest == named.get(place)]
        if not same:
            raise AdapterError(f"{ref}: no such version; task {task!r} has versions 1 to {len(entries)} and aliases {list(named)}")
        return self.at(task, same[-1])

    def load(self, ref: str) -> Adapter:
        """The adapter that ``ref`` names, every file and the signature verified.

        Raises:
            AdapterError: no such version.
            StorageError: a file, the manifest or the signature is missing or was changed.
        """
        version = self.get(ref)
        files, where = self.files(version.digest), self.objects.store.where(version.digest)
        adapter, seen = parse(files, where), digest_in(files)
        if seen != version.manifest.adapter:
            raise StorageError(f"{where}: holds adapter {seen[:12]}, its manifest says {version.manifest.adapter[:12]}")
        return adapter

    def tasks(self) -> tuple[str, ...]:
        """Tasks with at least one event."""
        logs = [name for name in self.histories.names() if name.endswith("/log")]
        return tuple(sorted(name.split("/")[1] for name in logs if self.histories.lines(name)))

    def heads(self) -> dict[str, Head]:
        """Number and digest of each task's current version; no manifest is read. Raises `StorageError` when a history is broken."""
        last = {task: self.events(task)[-1] for task in self.tasks()}
        return {task: (entry.number, entry.digest) for task, entry in last.items()}

    def served(self) -> dict[str, tuple[Version, RouterCard]]:
        """Each task's current version and its router card. Raises `StorageError` when one is damaged."""
        return {task: (self.get(task), router_card(self, task)) for task in self.tasks()}

    def list(self, task: str | None = None) -> tuple[Version, ...]:
        """Every published or pulled version of ``task``, or of all tasks, oldest first; roll-backs are in `history`."""
        chosen = self.tasks() if task is None else (task,)
        return tuple(self.at(name, entry) for name in chosen for entry in self.events(name) if entry.action != "rollback")

    def history(self, task: str) -> tuple[dict[str, Any], ...]:
        """All events of ``task``, oldest first, JSON-ready. Raises `AdapterError` when there are none."""
        return tuple(entry.to_json() for entry in self.events(task))

    def find(self, task: str, origin: str) -> Version | None:
        """The version that ``origin`` published for ``task``, or None."""
        same = [entry for entry in self._log_of(task) if entry.origin == origin]
        return self.at(task, same[-1]) if same else None

    def export(self, ref: str, folder: Path) -> None:
        """Copy a verified version into the new ``folder``: a Hugging Face PEFT folder plus manifest and signature.

        Raises:
            AdapterError: no such version.
            StorageError: the version is damaged, or ``folder`` exists or cannot be written.
        """
        write_folder(Path(folder), dict(self.files(self.resolve(ref))))

    def verify(self, ref: str | None = None) -> tuple[str, ...]:
        """Every fault of one version, or of all versions, histories and keys; one line each, none when all holds."""
        if ref is not None:
            return tuple(self.objects.faults(self.resolve(ref)))
        exposed = self.objects.keys.exposed()
        faults, digests = [exposed] if exposed else [], set[str]()
        for task in sorted({name.split("/")[1] for name in self.histories.names()}):
            try:
                digests |= {entry.digest for entry in self._log_of(task)} | set(self.aliases(task).values())
            except StorageError as fault:
                faults.append(str(fault))
        return (*faults, *(fault for digest in sorted(digests) for fault in self.objects.faults(digest)))

    def _record(self, task: str, action: Action, digest: str, origin: str) -> Version:
        """The event of this act: the one that is there already, or a new one."""
        while True:
            entries = self._log_of(task)
            same = [e for e in entries if e.action != "rollback" and (e.origin == origin if origin else e.digest == digest)]
            if same and same[-1].digest != digest:
                raise AdapterError(
                    f"registry: {origin!r} published {same[-1].digest[:12]} as {task}@{same[-1].number}, now it gives {digest[:12]}; "
                    "the run was resumed with other data or settings, start it under another name"
                )
            entry = same[-1] if same else log.follow(entries, action, digest, origin)
            if same or self.histories.append(log_name(task), len(entries), entry.to_line()):
                return self.at(task, entry)

    def _own(self, task: str, ref: str) -> Version:
        """A version of ``task``; a bare number or alias will do."""
        bare = ref.isdecimal() or (aliases.ALIAS.fullmatch(ref) and ref in self.aliases(task))
        target = self.get(f"{task}@{ref}" if bare else ref)
        if target.task != task:
            raise AdapterError(f"{ref} is a version of task {target.task!r}, not of {task!r}; see `fedpeft adapters list {task}`")
        return target

    def _by_digest(self, prefix: str) -> Version:
        whole = [(task, entry) for task in self.tasks() for entry in self.events(task) if entry.digest == prefix]
        if whole:
            return self.at(*whole[-1])
        every = (self.at(task, entry) for task in self.tasks() for entry in self.events(task))
        found = {version.digest: version for version in every if version.begins(prefix)}
        if len(found) == 1:
            return next(iter(found.values()))
        if not found or not prefix:
            raise AdapterError(f"sha256:{prefix}: no such version in {self.root}; see `fedpeft adapters list`")
        names = [f"{version.task}@{version.number} sha256:{version.digest[:16]}" for version in found.values()]
        raise AdapterError(f"sha256:{prefix} is the beginning of {len(found)} versions, give more digits: {', '.join(names[:8])}")

    def events(self, task: str) -> tuple[Entry, ...]:
        """All events of ``task``, oldest first. Raises `AdapterError` when there are none."""
        entries = self._log_of(task)
        if not entries:
            raise AdapterError(f"task {task!r} has no version in {self.root}; tasks are {list(self.tasks())}")
        return entries

    def _log_of(self, task: str) -> tuple[Entry, ...]:
        return log.parse(self.histories.lines(log_name(task)), self.histories.where(log_name(task)))

    def at(self, task: str, entry: Entry) -> Version:
        """What ``entry`` of ``task`` made current. Raises `StorageError` on a torn manifest."""
        manifest, path = self.objects.manifest(entry.digest), self.objects.path(entry.digest)
        return Version(task, entry.number, entry.digest, manifest, path, entry.action, entry.origin, entry.created)

    @cached_property
    def _alias_keys(self) -> Keys:
        return Keys(self.root / "keys", "alias v1")
