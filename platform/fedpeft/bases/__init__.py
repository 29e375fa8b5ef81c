"""The frozen model: found, fingerprinted, loaded once, quantized, shared by every task head. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedpeft.bases.base import Base
from fedpeft.bases.encoders import Encoder, make_encoder, named_encoder
from fedpeft.bases.fingerprint import fingerprint
from fedpeft.bases.quiet import hush
from fedpeft.bases.resolve import resolve_model
from fedpeft.bases.spec import BaseSpec, Family, Fingerprint, HeadSpec, Quantization

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "LOADS",
    "Base",
    "BaseSpec",
    "Encoder",
    "Family",
    "Fingerprint",
    "HeadSpec",
    "Quantization",
    "fingerprint",
    "load_base",
    "load_encoder",
    "meta_base",
    "meta_encoder",
    "module_roles",
    "outline_base",
    "resolve_model",
]

LOADS = 0  # how often this process loaded weights; read it as `bases.LOADS`


def load_base(spec: BaseSpec, device: str = "auto", *, zero: Mapping[str, Any] | None = None) -> Base:
    """Load weights once, frozen and in eval mode, on ``device`` (``auto``: CUDA where there is one).

    With DeepSpeed's table of stage 3 in ``zero``, each rank of a process group keeps a part of every weight alone from the moment it is
    read, on the device or where that table offloads parameters to.

    Raises:
        BaseError: the folder is no model we may load, or the quantization does not work on this device or architecture.
    """
    global LOADS
    resolve_model(spec.model, spec.revision)  # a base that is not there is said before torch is loaded, seconds earlier
    hush()
    from fedpeft.bases.loading import load

    base = load(spec, device, zero)
    LOADS += 1
    return base


def load_encoder(named: str, own: Encoder) -> Encoder:
    """What ``named`` (``model@identity``, as router cards say it, several with ``+`` between them) embeds with; ``own`` where it is empty.

    Raises:
        BaseError: that encoder cannot be found, or is another one here.
    """
    return named_encoder(named, own, lambda model: load_base(BaseSpec(model=model)))


def meta_encoder(models: Sequence[str], base: Base) -> Encoder:
    """The encoders ``models`` side by side without weights: enough for their name and width. Raises `BaseError` as `load_base`."""
    return make_encoder(models, base, lambda model: meta_base(BaseSpec(model=model)))


def meta_base(spec: BaseSpec, known: Fingerprint | None = None) -> Base:
    """The architecture alone, on the meta device: enough for layouts and initial tensors; its fingerprint may be ``known`` already.

    Raises:
        BaseError: as `load_base`.
    """
    hush()
    from fedpeft.bases.loading import blueprint

    return blueprint(spec, known)


def outline_base(spec: BaseSpec) -> Base:
    """As `meta_base`, from ``config.json`` alone: no tokenizer, no fingerprint, so a folder without weights will do. Raises `BaseError`."""
    hush()
    from fedpeft.bases.loading import outline

    return outline(spec)


def module_roles(model: nn.Module) -> dict[str, list[str]]:
    """Module names by role (attention, mlp, outside, head) of a shell without adapter."""
    hush()
    from fedpeft.bases.roles import module_roles as find

    return find(model)
