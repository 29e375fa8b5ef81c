"""A base with many adapters attached at once; `Bank.use` says which of them act on what."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from fedpeft.adapters.making import check_base
from fedpeft.adapters.spec import Adapter, AdapterSpec
from fedpeft.bases.base import Base
from fedpeft.bases.spec import HeadSpec
from fedpeft.errors import AdapterError
from fedpeft.mixtures.choice import Choices, check_way
from fedpeft.mixtures.compile import check_gates, compiled, everyone, heads_of
from fedpeft.mixtures.dense import Own
from fedpeft.mixtures.gates import Gates
from fedpeft.mixtures.heads import HeadHost, head_entries
from fedpeft.mixtures.hosts import Family, Host, families_of
from fedpeft.mixtures.lanes import Lanes
from fedpeft.mixtures.parts import parts_of
from fedpeft.mixtures.plans import Share
from fedpeft.mixtures.slabs import Slab, Store
from fedpeft.mixtures.soft import NAME, SoftHost, kind_of
from fedpeft.mixtures.state import State
from fedpeft.tensors import Tensors

SHARED = "(shared)"
"""The name under which the shared adapter lies in a bank."""


class Bank:
    """The model with all adapters attached; leaving the ``with`` block takes them off again.

    ``model`` is called as any task's model. Gates stay set until they are changed, so that backward passes and recomputed
    checkpoints see what the forward pass saw. The shared adapter acts on every row and goes by the name ``(shared)``.
    """

    def __init__(self, base: Base, head: HeadSpec, way: str, dense: bool) -> None:
        self.base, self.head = base, head
        self.model: nn.Module = base.shell(head)
        self.store = Store(base.device)
        self.state = State(self.store, check_way(way, base.device), dense)
        self.gates = Gates()
        self._own: dict[str, Own] = {}
        self._soft: SoftHost | None = None
        self._attached = False
        self._lanes: Lanes | None = None
        self._hosts: dict[str, Host] = {}
        self._heads: dict[str, HeadHost] = {}
        self._families = families_of(self.model) if base.device != "meta" else {}

    @staticmethod
    def attach(
        base: Base,
        head: HeadSpec,
        adapters: Mapping[str, Adapter],
        shared: Adapter | None = None,
        *,
        way: str = "auto",
        dense: bool = False,
    ) -> Bank:
        """Put ``adapters`` on ``base``: one copy of each one's values; ``shared`` acts on every row beside the row's own.

        ``way`` names how products are computed (`choice.WAYS`); ``auto`` takes what is fastest for the shapes. ``dense`` is for engines
        that own parameters, such as DeepSpeed: every adapter has its own (`parameters`), registered in the model, and all of them
        take part in every backward.

        Raises:
            AdapterError: an adapter is of another base or kind of head, or its method cannot be mixed.
            BaseError: another adapter is attached, or this is a meta base.
            ConfigError: ``way`` is unknown.
        """
        if base.device == "meta":
            raise AdapterError(f"mixture: base {base.spec.model} was built without weights; use load_base")
        bank = Bank(base, head, way, dense)
        try:
            every = dict(adapters) | ({SHARED: shared} if shared is not None else {})
            bank._put(list(every.items()))
            bank.use(Gates())
        except BaseException:
            bank._release()
            raise
        base.holder, bank._attached = f"a mixture of {len(every)} adapters", True
        return bank

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that gates may name."""
        return tuple(self.store.place)

    @property
    def choices(self) -> Choices:
        """Which ways were taken; settle them where another process must go on bit for bit."""
        return self.state.choices

    def spec(self, name: str) -> AdapterSpec:
        """The spec of one adapter. Raises `AdapterError` when it is not here."""
        slab, row = self._find(name)
        found = slab.specs[row]
        assert found is not None
        return found

    def use(self, gates: Gates, heads: Sequence[str | None] | None = None, lanes: Sequence[int] | None = None) -> None:
        """Let ``gates`` decide from now on, and each row answer through the head of the adapter that ``heads`` names for it.

        Without ``heads`` a row's head is that of its own adapter (`Gates.rows`), or of the one with the largest weight
        (`Gates.weights`); for tokens and routers it must be said where the base classifies. None: the shared adapter's, or the shell's own.
        ``lanes`` says through which lane of the shared adapter each row or token goes, after `split`.

        Raises:
            AdapterError: an adapter is unknown, terms differ in their number of rows, `check_gates` refuses, or there are no lanes.
        """
        check_gates(gates, self.model)
        for name in gates.names | frozenset(name for name in heads or () if name is not None):
            self._find(name)
        shared = SHARED if SHARED in self.store.place else None
        self.state.fixed, self.state.routed = compiled(gates, self.store, self._everywhere(shared, lanes))
        found = heads_of(gates) if heads is None else tuple(heads)
        self.state.heads = None if found is None else tuple(shared if name is None else name for name in found)
        self.state.version += 1
        self.gates = gates

    def split(self, lanes: int) -> Tensor:
        """The gradients of the shared adapter by lane (lanes, P), to which every backward pass adds; its own stays their sum.

        Raises:
            AdapterError: there is no shared adapter, or the bank is not dense.
        """
        slab, row = self._find(SHARED)
        if not self.state.dense:
            raise AdapterError("mixture: gradients lie apart by lane in a dense bank only; attach with dense=True")
        self._lanes = Lanes.of(slab, row, lanes)
        return self._lanes.grads

    def put(self, name: str, adapter: Adapter) -> None:
        """Add an adapter, or replace the one of that name; nothing else is touched. Raises `AdapterError` as `attach`."""
        if name in self.store.place:
            slab, row = self.store.place[name]
            if slab.specs[row] == adapter.spec:
                slab.write(row, name, adapter)
                return
        self._check(adapter.spec)
        parts_of(adapter.spec)
        if name in self.store.place:
            self._drop(name)
        self._put([(name, adapter)])
        if name in self.gates.names:
            self.use(Gates())

    def remove(self, name: str) -> None:
        """Take one adapter away; gates that named it are replaced by none. Raises `AdapterError` when it is not here."""
        self._find(name)
        self._drop(name)
        if name in self.gates.names or name == SHARED:
            self.use(Gates())

    def flat(self, name: str) -> Tensor:
        """The values of one adapter, float32 (P,) in its layout order: a view."""
        slab, row = self._find(name)
        return slab.flat(row)

    def grad(self, name: str) -> Tensor:
        """The gradients of one adapter, float32 (P,): a view, to which every backward pass adds."""
        slab, row = self._find(name)
        return slab.grad(row)

    def read(self, name: str) -> Tensors:
        """A copy of the values of one adapter."""
        slab, row = self._find(name)
        if not self.state.dense:
            return slab.read(row)
        return Tensors.from_named(self.spec(name).layout, {key: p.detach().float().cpu().numpy() for key, p in self._own[name].items()})

    def logits(self, logits: Tensor, name: str) -> Tensor:
        """Rows of ``logits`` (B, K) that the head of ``name`` answered, cut to its labels. Raises `AdapterError` when it is not here."""
        labels = len(self.spec(name).head.labels)
        rows = [row for row, head in enumerate(self.state.heads or ()) if head == name]
        return logits[rows, :labels]

    def parameters(self, name: str) -> Mapping[str, nn.Parameter]:
        """The parameters of one adapter by tensor name. Raises `AdapterError` when it is not here, or the bank is not dense."""
        self._find(name)
        if not self.state.dense:
            raise AdapterError("mixture: adapters have parameters of their own in a dense bank only; attach with dense=True")
        return self._own[name]

    def zero_grad(self) -> None:
        """Set all gradients to zero."""
        for slab in self.store.slabs:
            slab.grads.zero_()

    def train(self, names: Collection[str]) -> None:
        """Only slabs that hold one of ``names`` compute gradients from now on. Raises `AdapterError` when one is not here."""
        wanted = {id(self._find(name)[0]) for name in names}
        for slab in self.store.slabs:
            slab.train(id(slab) in wanted)
        for name, own in self._own.items():
            for parameter in own.values():
                parameter.requires_grad_(name in names)

    def detach(self) -> None:
        """Take everything off: the base is as before `attach`, bit for bit. Doing it twice does nothing."""
        if self._attached:
            self._release()
            self.base.holder, self._attached = None, False

    def __enter__(self) -> Bank:
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None) -> None:
        self.detach()

    def _find(self, name: str) -> tuple[Slab, int]:
        if name not in self.store.place:
            known = sorted(self.store.place)
            raise AdapterError(f"mixture: no adapter {name!r} is attached; attached are {known[:12]}{'...' if len(known) > 12 else ''}")
        return self.store.place[name]

    def _everywhere(self, shared: str | None, lanes: Sequence[int] | None) -> Share | None:
        """What acts on every row."""
        if lanes is None:
            return None if shared is None else everyone(self.store, shared)
        if self._lanes is None:
            raise AdapterError("mixture: the shared adapter has no lanes; call split first")
        return self._lanes.share(lanes)

    def _check(self, spec: AdapterSpec) -> None:
        check_base(self.base, spec)
        if spec.head.kind != self.head.kind:
            raise AdapterError(
                f"adapter {spec.task}: has a {spec.head.kind} head, this mixture a {self.head.kind} one; attach it to a mixture of its kind"
            )

    def _put(self, adapters: list[tuple[str, Adapter]]) -> None:
        for _, adapter in adapters:
            self._check(adapter.spec)
        for slab in self.store.put(adapters):
            self._host(slab)
            if kind_of(slab) and self._soft is None:
                self._soft = SoftHost(self.base.trunk, self.state, self.head.kind)
        for name, _ in adapters:
            self._own[name] = self._parameters(*self.store.place[name])

    def _parameters(self, slab: Slab, row: int) -> Own:
        """Parameters of a head, and in a dense bank of all that the adapter has."""
        own: Own = {}
        for module, part in slab.parts.items() if self.state.dense else ():
            holder = self._hosts[module].holder
            assert holder is not None
            own |= holder.put(slab, row, part.names)
        if self._soft is not None and self._soft.holder is not None and kind_of(slab):
            own |= self._soft.holder.put(slab, row, [NAME])
        for module, entries in head_entries(slab, row).items():
            if module not in self._heads:
                self._heads[module] = HeadHost(module, self._module(module), self.state)
            own |= self._heads[module].heads.put(slab, row, entries)
        return own

    def _host(self, slab: Slab) -> None:
        """Make hosts of the modules that the slab's adapters act on."""
        for name in slab.parts:
            if name not in self._hosts:
                family = self._families.setdefault(name, Family())
                self._hosts[name] = Host(name, self._module(name), self.state, family)

    def _module(self, name: str) -> Any:
        try:
            return self.model.get_submodule(name)
        except AttributeError:
            raise AdapterError(
                f"mixture: {type(self.model).__name__} has no module {name}; was the adapter made for another base?"
            ) from None

    def _drop(self, name: str) -> None:
        del self._own[name]
        slab, row = self.store.place[name]
        for module in slab.parts if self.state.dense else ():
            holder = self._hosts[module].holder
            assert holder is not None
            holder.drop(slab, row)
        if self._soft is not None and self._soft.holder is not None:
            self._soft.holder.drop(slab, row)
        for head in self._heads.values():
            head.heads.drop(slab, row)
        self.store.remove(name)

    def _release(self) -> None:
        for host in self._hosts.values():
            host.release()
        for head in self._heads.values():
            head.release()
        if self._soft is not None:
            self._soft.release()
        self._hosts, self._heads, self._soft = {}, {}, None
        self.model.requires_grad_(False)
        self.base.model.requires_grad_(False).eval()
