"""federation.toml: what is trained, by whom, how rounds run, and where the coordinator listens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from fedpeft import config
from fedpeft.bases import BaseSpec, Quantization
from fedpeft.bases.spec import rooted_model
from fedpeft.config import Section
from fedpeft.methods import METHODS, read_method
from fedpeft.privacy.secagg import LEAST
from fedpeft.routing.settings import Routing
from fedpeft.schemes.sharing import Sharing
from fedpeft.training.outline import settings_of
from fedpeft.training.settings import TrainSettings
from fedpeft_coordinator.control.config import Control
from fedpeft_coordinator.listening import Tls, guarded, rooted
from fedpeft_coordinator.private_rules import Privacy
from fedpeft_coordinator.rules import RULES
from fedpeft_coordinator.starting import Start, StartTable
from fedpeft_coordinator.tables import TaskEntry, named

NAME = f"^{config.NAME}$"


def _scheme(value: Any) -> Any:
    from fedpeft.schemes import SCHEMES

    return config.build(SCHEMES, value, "scheme")


def _combine(value: Any) -> Any:
    from fedpeft.schemes.robust import COMBINES

    return None if value in (None, "sum", {"kind": "sum"}) else config.build(COMBINES, value, "combine")


def _codec(value: Any) -> Any:
    from fedpeft.wire.codecs import CODECS

    return config.build(CODECS, value, "codec")


def _server(value: Any) -> Any:
    from fedpeft.schemes import SERVER_OPTIMIZERS

    return config.build(SERVER_OPTIMIZERS, value, "server")


class Base(Section):
    """The frozen base; ``fingerprint`` pins its identity, so that a changed download cannot go unnoticed."""

    model: str = "minilm"
    quantization: Quantization = "none"
    revision: str | None = None
    max_tokens: int = Field(default=256, ge=1)
    fingerprint: str | None = None

    @property
    def spec(self) -> BaseSpec:
        """The platform's noun."""
        return BaseSpec(self.model, self.quantization, self.revision, self.max_tokens)


class Cohort(Section):
    """Who is asked in a round. ``wait_for_sites`` absent means ``min_sites``; ``deadline`` is in seconds.

    ``retries``: how often a site is asked again in a round after its node or worker died, and how often a round is repeated
    that no task got enough answers in. ``root`` is the site whose rows are known to be clean, which `fltrust` measures the
    others by; it is asked in every round.
    """

    min_sites: int = Field(default=1, ge=1)
    wait_for_sites: int | None = Field(default=None, ge=1)
    fraction: float = Field(default=1.0, gt=0.0, le=1.0)
    deadline: float = Field(default=600.0, gt=0.0)
    retries: int = Field(default=3, ge=0)
    root: Annotated[str, Field(pattern=NAME)] | None = None

    @property
    def expected(self) -> int:
        """Sites to wait for before the first round."""
        return self.wait_for_sites or self.min_sites


class SecureAggregation(Section):
    """Whether the coordinator sees sums over sites alone. ``auto`` is on where ``cohort.min_sites`` is 3 or more.

    ``colluding`` and ``dropping`` are the shares of a cohort that may help a curious coordinator, and vanish, while sums stay safe
    and come out. ``least`` absent means ``cohort.min_sites``, and of a group of ``combine.kind = "buckets"`` its size less those
    that may vanish: a sum over fewer sites is never opened. ``deadline`` is in seconds, for exchanges in which nobody trains.
    ``identities`` are public keys of sites (`fedpeft client identity`); others are believed as first seen. ``task_blind`` hides which
    site holds which task: every site is asked for every task, and answers zeros where it holds none.
    """

    enabled: bool | Literal["auto"] = "auto"
    colluding: float = Field(default=0.1, ge=0.0, lt=1.0)
    dropping: float = Field(default=0.2, ge=0.0, lt=0.5)
    least: int | None = Field(default=None, ge=LEAST)
    task_blind: bool = False
    deadline: float = Field(default=120.0, gt=0.0)
    identities: dict[Annotated[str, Field(pattern=NAME)], Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]] = Field(default_factory=dict)


class Wire(Section):
    """``reach``: the largest weighted change of any single value that a site may send.

    ``codec``: how it writes a delta (`fedpeft.wire.codecs`); or ``budget``: bytes that it may send of a task in a round, for which
    the codec that keeps most is taken. Where sums are masked, int8 to int2 are rings of as many bits, on scales of the last mean.
    ``down``: how a step of the adapter is written for sites that hold the one before; what it leaves out is owed to the next step, so
    the adapter lags behind the exact mean by that much.
    """

    reach: float = Field(default=2.0, gt=0.0, allow_inf_nan=False)
    codec: Annotated[Any, BeforeValidator(_codec)] = Field(default="none", validate_default=True)
    budget: int | None = Field(default=None, ge=1)
    down: Annotated[Any, BeforeValidator(_codec)] = Field(default="none", validate_default=True)


class Link(Section):
    """Where sites connect. Beyond loopback ``tls`` is required unless ``insecure = true`` says otherwise.

    With ``node_auth`` only sites whose public key lies in ``node_keys`` as NAME.pub may connect, and only under that name;
    the folder is looked at while rounds run: a new key lets its site in, and whose key is taken away is shut out.
    """

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    tls: Tls | None = None
    insecure: bool = False
    node_auth: bool = False
    node_keys: Path = Path("keys")

    @model_validator(mode="after")
    def _guarded(self) -> Link:
        if self.node_auth and self.tls is None:
            raise ValueError("link.node_auth = true needs [link.tls]: a key proves nothing over an unencrypted link; set both or neither")
        guarded("link", self.host, self.tls, self.insecure)
        return self


class FederationConfig(Section):
    """One federation. Paths are relative to the file once it came through `load_federation`; ``combine`` None is the sum."""

    name: Annotated[str, Field(pattern=NAME)]
    seed: int = Field(default=0, ge=0, lt=1 << 62)
    rounds: int = Field(default=10, ge=1)
    state: Path = Path("state")
    registry: Path | None = None
    database: str | None = None
    base: Base = Base()
    method: Annotated[Any, BeforeValidator(read_method)] = Field(default_factory=METHODS["lora"])
    scheme: Annotated[Any, BeforeValidator(_scheme)] = Field(default="alternating", validate_default=True)
    server: Annotated[Any, BeforeValidator(_server)] = Field(default="sgd", validate_default=True)
    combine: Annotated[Any, BeforeValidator(_combine)] = None
    start: StartTable = None
    training: Annotated[TrainSettings, AfterValidator(lambda value: settings_of(asdict(value)))] = TrainSettings()
    cohort: Cohort = Cohort()
    secure_aggregation: SecureAggregation = SecureAggregation()
    sharing: Sharing | None = None
    routing: Routing = Routing()
    privacy: Privacy = "none"
    wire: Wire = Wire()
    link: Link = Link()
    control: Control | None = None
    evaluate_every: int = Field(default=0, ge=0)
    publish_every: int = Field(default=0, ge=0)
    max_examples: int = Field(default=1_000_000, ge=1)
    tasks: dict[Annotated[str, Field(pattern=NAME)], TaskEntry] = Field(min_length=1)

    @field_validator("tasks", mode="before")
    @classmethod
    def _named(cls, tables: Any) -> Any:
        """A task's name is its key; its own training settings lie beside the task's."""
        return named(tables)

    @model_validator(mode="after")
    def _consistent(self) -> FederationConfig:
        for rule in RULES:
            rule(self)
        return self

    def settings(self, task: str) -> TrainSettings:
        """``[training]`` with what the task changes."""
        return settings_of({**asdict(self.training), **self.tasks[task].training})

    def start_of(self, task: str) -> Start | None:
        """Where the adapter of ``task`` starts."""
        return self.tasks[task].start or self.start

    @property
    def masks(self) -> bool:
        """Whether the coordinator sees masked sums alone."""
        wanted = self.secure_aggregation.enabled
        return self.cohort.min_sites >= LEAST if wanted == "auto" else wanted

    @property
    def registry_folder(self) -> Path:
        """Where versions are published."""
        return self.registry or self.state / "registry"

    @property
    def database_url(self) -> str:
        """SQLAlchemy URL of the journal."""
        return self.database or f"sqlite:///{(self.state / 'journal.sqlite').resolve()}"


def load_federation(path: Path | str, overrides: Mapping[str, str] | None = None) -> FederationConfig:
    """Read a federation.toml; relative paths in it are relative to the file.

    Raises:
        ConfigError: the file is missing or has faults (all are named), or a certificate file does not exist.
    """
    path = Path(path)
    federation = config.load(path, FederationConfig, overrides)
    folder = path.resolve().parent
    link, start = federation.link, federation.start
    tasks = {
        name: entry.model_copy(update={"start": entry.start.rooted(folder)}) if entry.start else entry
        for name, entry in federation.tasks.items()
    }
    tls, control = rooted(link.tls, folder, f"{path}: link.tls"), federation.control
    if control is not None:
        control = control.rooted(folder, f"{path}: control")
    return federation.model_copy(
        update={
            "state": folder / federation.state.expanduser(),
            "base": federation.base.model_copy(update={"model": rooted_model(folder, federation.base.model)}),
            "start": start.rooted(folder) if start else None,
            "tasks": tasks,
            "registry": None if federation.registry is None else folder / federation.registry.expanduser(),
            "control": control,
            "link": link.model_copy(update={"tls": tls, "node_keys": folder / link.node_keys.expanduser()}),
        }
    )
