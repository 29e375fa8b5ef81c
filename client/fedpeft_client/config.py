"""site.toml: who the site is, which rows it holds, on what base, and what a plan may ask of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from fedpeft import config
from fedpeft.bases import BaseSpec, Quantization
from fedpeft.bases.spec import rooted_model
from fedpeft.config import Section
from fedpeft.errors import ConfigError
from fedpeft.tasks import Source
from fedpeft_client.serve.settings import Serve

HOURS = re.compile(r"([01][0-9]|2[0-3]):[0-5][0-9]-([01][0-9]|2[0-3]):[0-5][0-9]")
ADDRESS = re.compile(r"[^\s/]+:[0-9]{1,5}")


def _name(value: str) -> str:
    if not re.fullmatch(config.NAME, value):
        raise ValueError("a name is 1 to 63 of a-z, 0-9, '.', '_', '-' and starts with a letter or digit")
    return value


def _address(value: str) -> str:
    if not ADDRESS.fullmatch(value):
        raise ValueError("an address is host:port without a scheme, for example coordinator.example.org:8000")
    return value


def _hours(value: str) -> str:
    if not HOURS.fullmatch(value):
        raise ValueError("hours are HH:MM-HH:MM of this machine's clock, over midnight too, for example 19:00-07:00")
    return value


Name = Annotated[str, AfterValidator(_name)]
PublicKey = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Address = Annotated[str, AfterValidator(_address)]


class SiteBase(Section):
    """The frozen base as this site holds it. Weights and tokenizer must be the federation's; quantization is the site's own choice."""

    model: str = "minilm"
    quantization: Quantization = "none"
    revision: str | None = None
    max_tokens: int = Field(default=256, ge=1)

    def spec(self) -> BaseSpec:
        """What `fedpeft.bases.load_base` takes."""
        return BaseSpec(self.model, self.quantization, self.revision, self.max_tokens)


class Tls(Section):
    """The certificate authority that signed the coordinator's certificate (PEM); none means an unencrypted link."""

    root_certificates: Path | None = None


class Auth(Section):
    """This site's ECDSA private key (`ssh-keygen -t ecdsa -b 384`), registered with the coordinator; needs TLS."""

    key: Path | None = None


class Policy(Section):
    """What a plan may ask; an empty list or an absent number allows everything that key speaks about.

    ``tasks`` empty means the tasks of ``[data]``. ``bases`` are fingerprint identities or model names. ``encoders`` are what may embed rows
    for routing beside the site's own base, by name; none where it is empty. ``modules`` are patterns of the
    tensors that may leave, as in ``*.attention.*``. ``max_epsilon`` at ``delta`` is what a task may spend at this site, over all runs.
    ``clip`` is the norm to which the site scales down what it trained before anything else is done to it, and ``noise`` the deviation,
    in multiples of ``clip``, of Gaussian noise that it adds by itself, whatever the plan says. ``hours`` (HH:MM-HH:MM, this machine's
    clock) are when it works at all; ``max_upload_mb_per_day`` counts what the audit log says left since midnight UTC.
    """

    bases: tuple[str, ...] = ()
    encoders: tuple[str, ...] = ("minilm",)
    tasks: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    max_rank: int = Field(default=256, ge=1)
    max_upload_mb: float = Field(default=512.0, gt=0)
    min_cohort: int = Field(default=1, ge=1)
    require_secure_aggregation: bool = False
    modules: tuple[str, ...] = ()
    require_task_blind: bool = False
    max_epsilon: float | None = Field(default=None, gt=0)
    delta: float = Field(default=1e-5, gt=0, lt=1)
    clip: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    noise: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    max_steps: int = Field(default=10_000, ge=1)
    hours: Annotated[str, AfterValidator(_hours)] | None = None
    max_upload_mb_per_day: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _bounded(self) -> Policy:
        if self.noise and self.clip is None:
            raise ValueError(f"policy.noise = {self.noise:g} and no policy.clip: noise hides what is bounded only; set policy.clip as well")
        return self


class SiteConfig(Section):
    """One site of a federation.

    ``peers`` are the public keys of all its sites (`fedpeft client identity` prints one); without them keys are believed as they are
    first seen. ``gpu_share`` is the share of the GPU's memory that the worker may take.
    """

    name: Name
    coordinator: Address = "127.0.0.1:8000"
    state: Path = Path("state")
    base: SiteBase = SiteBase()
    device: str = "auto"
    threads: int = Field(default=0, ge=0)
    gpu_share: float = Field(default=1.0, gt=0, le=1)
    supernode_port: int = Field(default=0, ge=0, le=65535)
    watchdog_seconds: float = Field(default=1800.0, gt=0)
    tls: Tls = Tls()
    auth: Auth = Auth()
    policy: Policy = Policy()
    serve: Serve = Serve()
    peers: dict[Name, PublicKey] = Field(default_factory=dict)
    data: dict[str, Source] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> SiteConfig:
        if self.auth.key is not None and self.tls.root_certificates is None:
            raise ValueError("auth.key needs tls.root_certificates: a key proves nothing over an unencrypted link; set both or neither")
        strangers = sorted(set(self.policy.tasks) - set(self.data))
        if strangers:
            raise ValueError(f"policy.tasks {strangers} have no rows; tasks of [data] are {sorted(self.data)}")
        return self

    @property
    def allowed_tasks(self) -> frozenset[str]:
        """The tasks that a plan may name."""
        return frozenset(self.policy.tasks or self.data)


def load_site(path: Path | str, overrides: Mapping[str, str] | None = None) -> SiteConfig:
    """Read a site.toml; relative paths in it are relative to the file.

    Raises:
        ConfigError: the file is missing or has faults (all are named), or a certificate or key file does not exist.
    """
    path = Path(path)
    site = config.load(path, SiteConfig, overrides)
    site = _rooted(site, path.resolve().parent)
    for key, file in (("tls.root_certificates", site.tls.root_certificates), ("auth.key", site.auth.key)):
        if file is not None and not file.is_file():
            raise ConfigError(f"{path}: {key}: {file} does not exist; give the path of a PEM file, relative to {path.name} or absolute")
    return site


def _rooted(site: SiteConfig, folder: Path) -> SiteConfig:
    return site.model_copy(
        update={
            "state": folder / site.state.expanduser(),
            "base": site.base.model_copy(update={"model": rooted_model(folder, site.base.model)}),
            "tls": Tls(root_certificates=_at(folder, site.tls.root_certificates)),
            "serve": site.serve.rooted(folder),
            "auth": Auth(key=_at(folder, site.auth.key)),
            "data": {task: source.rooted(folder) for task, source in site.data.items()},
        }
    )


def _at(folder: Path, path: Path | None) -> Path | None:
    return None if path is None else folder / path.expanduser()
