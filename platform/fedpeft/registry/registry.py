"""Registry: immutable, signed, content-addressed versions of adapters, and each task's history of them, in plain files.

::

    objects/<digest>/   adapter_config.json adapter_model.safetensors fedpeft.json manifest.json manifest.sig
    refs/<task>/log     one line per event, hash-chained (`fedpeft.registry.log`)
    keys/               signing.key (0600) signing.pub trusted/*.pub

Readers take no lock: an object appears by one rename, an event by one line. Writers take turns.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fedpeft import adapters
from fedpeft.adapters import Adapter
from fedpeft.adapters.folder import contents, write_folder
from fedpeft.errors import AdapterError, StorageError
from fedpeft.registry import disk, log
from fedpeft.registry.log import Action, Entry
from fedpeft.registry.manifest import NAME, SIGNATURE, Manifest, complete
from fedpeft.registry.objects import Objects
from fedpeft.signing import Keys

TASK = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_. +-]{0,99}")
DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Version:
    """One event of a task's history and what it made current; ``digest`` names content, ``number`` counts the task's events."""

    task: str
    number: int
    digest: str
    manifest: Manifest
    path: Path
    action: Action
    origin: str
    created: str


@dataclass(frozen=True)
class Registry:
    """The registry in folder ``root``, which is made at the first publication.

    A reference is ``task`` (its latest event), ``task@3``, ``sha256:<prefix>`` of a version or of an adapter, or a whole digest.
    """

    root: Path

    @cached_property
    def objects(self) -> Objects:
        """The stored versions."""
        return Objects(self.root / "objects", Keys(self.root / "keys", "manifest v1"))

    def publish(self, adapter: Adapter, manifest: Manifest, origin: str = "") -> Version:
        """Store ``adapter`` with its lineage and make it its task's latest version.

        ``origin`` names the act (say ``run/round/task``): publishing it again gives the version of the first time. Without one,
        equal content counts as the same act.

        Raises:
            AdapterError: a value is not finite, the task's name cannot be stored, or ``origin`` published other content before.
            StorageError: no space or permission; the registry is as it was.
        """
        files = contents(adapter)
        whole = complete(manifest, adapter, files)
        self._log(whole.task)
        with disk.writing(self.root):
            return self._record(whole.task, "publish", self.objects.put(whole, files), origin)

    def pull(self, source: Registry, ref: str) -> Version:
        """Copy a version of ``source`` after verifying it, and trust its signer from now on.

        Raises:
            AdapterError: no such version there.
            StorageError: it is damaged or unsigned there, or cannot be written here.
        """
        found = source.get(ref)
        files = source.objects.files(found.digest)
        signature = files.pop(SIGNATURE)
        files.pop(NAME)
        with disk.writing(self.root):
            self.objects.keys.trust(Keys.signer(signature))
            self.objects.put(found.manifest, files, signature)
            return self._record(found.task, "pull", found.digest, f"pull/{found.digest}")

    def rollback(self, task: str, ref: str) -> Version:
        """Make an earlier version of ``task`` its latest again by a new event; nothing is deleted.

        Raises:
            AdapterError: ``ref`` is no version of ``task``.
            StorageError: that version is damaged, or the event cannot be written.
        """
        target = self.get(ref if not ref.isdigit() else f"{task}@{ref}")
        if target.task != task:
            raise AdapterError(f"{ref} is a version of task {target.task!r}, not of {task!r}; see `fedpeft adapters list {task}`")
        self.objects.check(target.digest)
        with disk.writing(self.root):
            entries = log.read(self._log(task))
            return self._version(task, log.append(self._log(task), entries, "rollback", target.digest, ""))

    def resolve(self, ref: str) -> str:
        """The digest that ``ref`` names. Raises `AdapterError` when it names none, or several."""
        return self.get(ref).digest

    def get(self, ref: str) -> Version:
        """The version that ``ref`` names. Raises `AdapterError` when it names none or several, `StorageError` on a torn manifest."""
        if ref.startswith("sha256:") or DIGEST.fullmatch(ref):
            return self._by_digest(ref.removeprefix("sha256:"))
        task, at, number = ref.rpartition("@")
        entries = self._entries(task if at else ref)
        if not at:
            return self._version(ref, entries[-1])
        if not number.isdigit() or not 1 <= int(number) <= len(entries):
            raise AdapterError(f"{ref}: no such version; task {task!r} has versions 1 to {len(entries)}")
        return self._version(task, entries[int(number) - 1])

    def load(self, ref: str) -> Adapter:
        """The adapter that ``ref`` names, every file and the signature verified.

        Raises:
            AdapterError: no such version.
            StorageError: a file, the manifest or the signature is missing or was changed.
        """
        version = self.get(ref)
        self.objects.check(version.digest)
        adapter = adapters.load(version.path)
        if adapter.digest != version.manifest.adapter:
            raise StorageError(f"{version.path}: holds adapter {adapter.digest[:12]}, its manifest says {version.manifest.adapter[:12]}")
        return adapter

    def tasks(self) -> tuple[str, ...]:
        """Tasks with at least one event."""
        return tuple(sorted(path.parent.name for path in self.root.glob("refs/*/log") if log.read(path)))

    def list(self, task: str | None = None) -> tuple[Version, ...]:
        """Every published or pulled version of ``task``, or of all tasks, oldest first; roll-backs are in `history`."""
        chosen = self.tasks() if task is None else (task,)
        return tuple(self._version(name, entry) for name in chosen for entry in self._entries(name) if entry.action != "rollback")

    def history(self, task: str) -> tuple[dict[str, Any], ...]:
        """All events of ``task``, oldest first, JSON-ready. Raises `AdapterError` when there are none."""
        return tuple(entry.to_json() for entry in self._entries(task))

    def find(self, task: str, origin: str) -> Version | None:
        """The version that ``origin`` published for ``task``, or None."""
        same = [entry for entry in log.read(self._log(task)) if entry.origin == origin]
        return self._version(task, same[-1]) if same else None

    def export(self, ref: str, folder: Path) -> None:
        """Copy a verified version into the new ``folder``: a Hugging Face PEFT folder plus manifest and signature.

        Raises:
            AdapterError: no such version.
            StorageError: the version is damaged, or ``folder`` exists or cannot be written.
        """
        write_folder(Path(folder), self.objects.files(self.resolve(ref)))

    def verify(self, ref: str | None = None) -> tuple[str, ...]:
        """Every fault of one version, or of all versions, histories and keys; one line each, none when all holds."""
        if ref is not None:
            return tuple(self.objects.faults(self.resolve(ref)))
        exposed = self.objects.keys.exposed()
        faults, digests = [exposed] if exposed else [], set[str]()
        for path in sorted(self.root.glob("refs/*/log")):
            try:
                digests |= {entry.digest for entry in log.read(path)}
            except StorageError as fault:
                faults.append(str(fault))
        return (*faults, *(fault for digest in sorted(digests) for fault in self.objects.faults(digest)))

    def _record(self, task: str, action: Action, digest: str, origin: str) -> Version:
        """The event of this act: the one that is there already, or a new one."""
        entries = log.read(self._log(task))
        same = [e for e in entries if e.action != "rollback" and (e.origin == origin if origin else e.digest == digest)]
        if same and same[-1].digest != digest:
            raise AdapterError(
                f"registry: {origin!r} published {same[-1].digest[:12]} as {task}@{same[-1].number}, now it gives {digest[:12]}; "
                "the run was resumed with other data or settings, start it under another name"
            )
        return self._version(task, same[-1] if same else log.append(self._log(task), entries, action, digest, origin))

    def _by_digest(self, prefix: str) -> Version:
        found = {version.digest: version for version in self._all() if _names(version, prefix)}
        if len(found) == 1:
            return next(iter(found.values()))
        if not found or not prefix:
            raise AdapterError(f"sha256:{prefix}: no such version in {self.root}; see `fedpeft adapters list`")
        names = [f"{version.task}@{version.number} sha256:{version.digest[:16]}" for version in found.values()]
        raise AdapterError(f"sha256:{prefix} is the beginning of {len(found)} versions, give more digits: {', '.join(names[:8])}")

    def _all(self) -> Iterable[Version]:
        return (self._version(task, entry) for task in self.tasks() for entry in self._entries(task))

    def _entries(self, task: str) -> tuple[Entry, ...]:
        entries = log.read(self._log(task))
        if not entries:
            raise AdapterError(f"task {task!r} has no version in {self.root}; tasks are {list(self.tasks())}")
        return entries

    def _version(self, task: str, entry: Entry) -> Version:
        manifest, path = self.objects.manifest(entry.digest), self.objects.path(entry.digest)
        return Version(task, entry.number, entry.digest, manifest, path, entry.action, entry.origin, entry.created)

    def _log(self, task: str) -> Path:
        if not TASK.fullmatch(task):
            raise AdapterError(f"task {task!r} cannot be stored; a name has 1 to 100 letters, digits, spaces or any of _ . + -")
        return self.root / "refs" / task / "log"


def _names(version: Version, prefix: str) -> bool:
    return version.digest.startswith(prefix) or version.manifest.adapter.startswith(prefix)
