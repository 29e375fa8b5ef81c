"""The messages of a round: one per site, all its tasks, and of each adapter only what the site does not have."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from fedpeft.config import describe
from fedpeft.privacy import promise
from fedpeft.privacy.settings import Client, Example
from fedpeft.schemes import Controls, State
from fedpeft.tensors import Tensors
from fedpeft.wire import Envelope, flat
from fedpeft.wire.envelope import control_key
from fedpeft.wire.masking import purpose
from fedpeft.wire.v1.federation_pb2 import Centroid, Gates, Masking, RoundPlan, Spread, TaskPlan
from fedpeft_coordinator.planning import Load, changed_since, codec_of, counted, expected, grid_of, mechanism_of, phase_of
from fedpeft_coordinator.setup import Setup, TaskSetup
from fedpeft_coordinator.state import Round, Site, TaskRound
from fedpeft_coordinator.telling import step_of
from fedpeft_coordinator.updates import up_layout

Centroids = Mapping[str, tuple[float, ...]]


@dataclass
class Writer:
    """Writes the requests of one exchange; each distinct array is packed once, however many sites get it.

    ``masking`` is what a site (first) is told of a task's masked sum, where the answers go into one. With ``gates`` an evaluation trains
    gates instead of scoring; ``spreads`` are what closeness is measured by, where it is asked.
    """

    setup: Setup
    run: str
    history: Sequence[Round]
    load: Load
    state: Callable[[TaskRound], State]
    told: Callable[[TaskRound], NDArray[np.uint8]]
    scales: Callable[[TaskRound], bytes] = lambda _row: b""
    centroids: Centroids = field(default_factory=dict)
    masking: Callable[[str, str], Masking | None] = lambda _site, _task: None
    gates: Gates | None = None
    spreads: Mapping[str, tuple[Spread, Spread]] = field(default_factory=dict)
    _packed: dict[tuple[str, str, tuple[str, ...]], bytes] = field(default_factory=dict)
    _controls: dict[str, tuple[str, bytes]] = field(default_factory=dict)

    def train(self, plan: Round, site: Site, tasks: Iterable[str], whole: bool = False) -> Envelope:
        """The request to train ``tasks`` of ``plan``; ``whole`` sends the adapters complete, whatever the site has."""
        return self._request("train", plan, {name: plan.tasks[name].before for name in tasks}, _holding(site, whole))

    def evaluate(self, plan: Round, site: Site, tasks: Iterable[str], whole: bool = False) -> Envelope:
        """The request to score ``tasks`` as they are after ``plan``."""
        return self._request("evaluate", plan, {name: plan.tasks[name].current for name in tasks}, _holding(site, whole))

    def choose(self, plan: Round, site: Site, tasks: Iterable[str], whole: bool = False) -> Envelope:
        """The request to take one of ``tasks``, clusters of one set of rows, by their adapters before ``plan``."""
        return self._request("choose", plan, {name: plan.tasks[name].before for name in tasks}, _holding(site, whole))

    def purpose(self, kind: str, plan: Round, name: str) -> str:
        """What the masked sum of one task is for, with the digest of what all its sites are told."""
        row = plan.tasks[name]
        message = self._task(kind, row, row.before if kind == "train" else row.current)
        if kind == "train":
            self._control(message, row)
        return purpose(self.run, plan.number, kind, message)

    def _request(self, kind: str, plan: Round, digests: Mapping[str, str], site: Site) -> Envelope:
        message = RoundPlan(federation=self.setup.name, run=self.run, round=plan.number)
        arrays = {}
        for name, digest in sorted(digests.items()):
            task = self._task(kind, plan.tasks[name], digest)
            task.counted_round = counted(name, site.name, self.history)
            arrays[name] = self._down(task, site.have.get(name, ""))
            if kind == "train":
                arrays |= self._control(task, plan.tasks[name])
            masking = self.masking(site.name, name)
            if masking is not None:
                task.masking.CopyFrom(masking)
            message.tasks.append(task)
        return Envelope.of(kind, message, arrays)

    def _task(self, kind: str, plan: TaskRound, digest: str) -> TaskPlan:
        task, grid = self.setup.tasks[plan.task], grid_of(plan, self.setup.limits)
        message = TaskPlan(
            task=task.name,
            task_json=task.task_json,
            spec_json=task.spec_json,
            scheme_json=self.setup.scheme_json,
            phase=plan.phase,
            roles=plan.roles,
            adapter_digest=digest,
            settings_json=task.settings_json,
            seed=plan.seed if kind == "train" else task.seed,
            weight_cap=plan.weight_cap,
            grid_sites=grid.sites,
            grid_reach=grid.reach,
            cohort=expected(plan),
            task_round=plan.number,
            secure_aggregation=self.setup.secure is not None,
            task_blind=self.setup.task_blind,
        )
        if self.setup.privacy is not None:
            message.privacy_json = promise.dumps(self._promise(plan, self.setup.privacy))
        if kind == "evaluate" and self.gates is not None:
            message.gates.CopyFrom(self.gates)
        elif kind == "evaluate":
            self._want_card(message)
        else:
            self._want_codec(message, plan)
        return message

    def _want_codec(self, message: TaskPlan, plan: TaskRound) -> None:
        """Say how the site writes what travels up: a ring on public scales, or scales of its own; nothing for codes of the grid."""
        if plan.ring is not None:
            message.codec_json, message.scales = json.dumps(dict(plan.ring)), self.scales(plan)
            return
        codec = None if plan.privacy else codec_of(up_layout(self.setup, plan).size, message.grid_sites, self.setup.limits)
        if codec is not None:
            message.codec_json = json.dumps(describe(codec))

    def _promise(self, plan: TaskRound, settings: Client | Example) -> promise.Promise:
        if isinstance(settings, Example):
            return promise.single(settings, self.setup.rounds)
        return promise.whole(settings, mechanism_of(plan))

    def _control(self, message: TaskPlan, plan: TaskRound) -> dict[str, bytes]:
        """The scheme's global control as a second array beside the plan, where it has one."""
        scheme = self.setup.scheme
        if not isinstance(scheme, Controls):
            return {}
        if plan.task not in self._controls:
            control = scheme.control(self.setup.tasks[plan.task].layout, phase_of(plan), self.state(plan))
            self._controls[plan.task] = control.digest, flat.pack(control.layout.fingerprint, control.flat)
        message.control_digest, packed = self._controls[plan.task]
        return {control_key(plan.task): packed}

    def _want_card(self, message: TaskPlan) -> None:
        """Ask for sums of embeddings until the task's centroid is known; then for the cosines to it, and for closeness."""
        centroid = self.centroids.get(message.task)
        message.encoder = "" if self.setup.own_encoder else self.setup.encoder
        message.want_embedding = centroid is None
        message.want_moments = centroid is None and self.setup.moments
        message.want_ngrams = message.want_moments and self.setup.routing.ngrams
        if message.task in self.spreads:
            own, pool = self.spreads[message.task]
            message.own.CopyFrom(own)
            message.pool.CopyFrom(pool)
        if centroid is not None:
            message.centroids.append(Centroid(task=message.task, values=centroid))

    def _down(self, message: TaskPlan, have: str) -> bytes:
        """Set what the array beside ``message`` patches, and return the array."""
        task = self.setup.tasks[message.task]
        step = step_of(task.name, have, message.adapter_digest, self.history)
        if step is not None:
            return self._pack_step(message, task, step)
        roles = changed_since(task.name, have, self.history, message.adapter_digest) if have else None
        if roles is None or roles >= task.layout.roles:
            return self._pack(task, message.adapter_digest, ())
        # A site that is up to date still gets its smallest role: if it lost its copy it then says so instead of failing.
        patch = tuple(sorted(roles or {smallest(task)}))
        message.previous_digest = have
        message.down_roles.extend(patch)
        return self._pack(task, message.adapter_digest, patch)

    def _pack_step(self, message: TaskPlan, task: TaskSetup, step: TaskRound) -> bytes:
        layout = task.layout.subset(step.moves)
        message.previous_digest, message.down_codec_json = step.before, json.dumps(describe(self.setup.limits.down))
        message.down_roles.extend(sorted(layout.roles))
        key = (task.name, step.told, ())
        if key not in self._packed:
            self._packed[key] = flat.pack(layout.fingerprint, self.told(step))
        return self._packed[key]

    def _pack(self, task: TaskSetup, digest: str, roles: tuple[str, ...]) -> bytes:
        key = (task.name, digest, roles)
        if key not in self._packed:
            whole = self.load(task, digest)
            part: Tensors = whole.pick(roles) if roles else whole
            self._packed[key] = flat.pack(part.layout.fingerprint, part.flat)
        return self._packed[key]


def _holding(site: Site, whole: bool) -> Site:
    """``site``, taken to hold nothing where the adapters go down ``whole``."""
    return replace(site, have={}) if whole else site


def smallest(task: TaskSetup) -> str:
    """The role of ``task`` with the fewest values."""
    spans = task.layout.role_spans
    return min(sorted(spans), key=lambda role: spans[role].stop - spans[role].start)
