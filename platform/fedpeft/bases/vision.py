"""What a vision encoder must be: a trunk with linear layers in its blocks, that reads what its own image processor makes."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

from fedpeft.bases.base import Base
from fedpeft.bases.faults import FAULTS, one_line
from fedpeft.bases.fingerprint import PROCESSOR
from fedpeft.bases.images import Processor, resized
from fedpeft.bases.quiet import quiet_transformers
from fedpeft.bases.roles import module_roles
from fedpeft.bases.spec import BaseSpec
from fedpeft.errors import AdapterError, BaseError

ROWS = 16
"""Images of one forward that embeds."""
CLOSE = 1e-5
"""How far our numbers may be from the processor's own, whose order of operations differs."""
SHAPES = ((40, 56), (72, 48))
"""Sizes (H, W) of the images that a processor is tried on."""


def sees(config: Any) -> bool:
    """Whether transformers has an image-classification form for ``config``."""
    return type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING


def require_blocks(spec: BaseSpec, model: nn.Module) -> None:
    """Raise `BaseError` when ``model`` has no linear layer in its blocks, as convolutional networks have none."""
    roles = module_roles(model)
    if not (roles["attention"] or roles["mlp"]):
        raise BaseError(
            f"base {spec.model}: {type(model).__name__} has no linear layer in its blocks, which methods train at; "
            "use a vision transformer (ViT, DeiT, BEiT, DINOv2, Swin) or ConvNeXt"
        )


def read_processor(base: Base, folder: Path) -> Processor:
    """The image processor in ``folder``, tried on two images and on the trunk of ``base``, which is a meta base.

    Raises:
        BaseError: Pillow is missing, the file is missing or names code, it does more than resize, crop and scale, or the trunk does not
            take what it gives.
    """
    inner = _processor(base.spec, folder)
    shape, scale, shift = _tried(base.spec, inner)
    tokens, width = _measured(base, shape)
    return Processor(inner, (shape[1], shape[2]), scale, shift, tokens, width)


def require_forward(base: Base, kind: str, model: nn.Module) -> None:
    """Raise `AdapterError` when ``model`` of a vision ``base`` does not run with the method ``kind`` on it.

    Windows, maps and biases by place are not what every method takes, and none says so before it is called.
    """
    if base.processor is None:
        return
    try:
        with torch.no_grad():
            model(pixel_values=torch.zeros(2, 3, *base.processor.size, device=base.device))
    except FAULTS as fault:
        raise AdapterError(
            f"{kind}: does not run on {type(base.model).__name__}: {one_line(fault)}; use lora, ia3 or bottleneck, or a ViT base"
        ) from None


def embed_images(base: Base, images: Sequence[str]) -> NDArray[np.float32]:
    """Mean of the last hidden state over each image's tokens, L2-normalised: (N, D) float32."""
    out = np.zeros((len(images), base.width), np.float32)
    for start in range(0, len(images), ROWS):
        pixels = base.require_processor("embed").stack(images[start : start + ROWS]).to(base.device)
        mean = tokens_of(base.trunk(pixel_values=pixels)[0]).float().mean(1)
        out[start : start + ROWS] = nn.functional.normalize(mean).cpu().numpy()
    return out


def tokens_of(states: Tensor) -> Tensor:
    """A trunk's last states as (N, T, D); convolutional ones give (N, D, H, W)."""
    return states.flatten(2).transpose(1, 2) if states.dim() == 4 else states


def _processor(spec: BaseSpec, folder: Path) -> Any:
    if importlib.util.find_spec("PIL") is None:
        raise BaseError(f"base {spec.model}: reads images, which needs Pillow; run pip install 'fedpeft[vision]'")
    if not (folder / PROCESSOR).is_file():
        raise BaseError(f"base {spec.model}: {folder} has no {PROCESSOR}, which says how images are made; copy it from the model's origin")
    from transformers import AutoImageProcessor

    try:
        with quiet_transformers():
            inner = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False, local_files_only=True)
    except FAULTS as fault:
        raise BaseError(
            f"base {spec.model}: {folder / PROCESSOR} cannot be used: {one_line(fault)}; fetch it from the model's origin"
        ) from None
    if getattr(inner, "backend", "") != "pil":
        raise BaseError(f"base {spec.model}: {type(inner).__name__} has no form that computes with Pillow; use another model")
    return inner


@np.errstate(all="ignore")  # deviations of 0 are refused, not warned of
def _tried(spec: BaseSpec, inner: Any) -> tuple[tuple[int, ...], tuple[float, ...], tuple[float, ...]]:
    """The shape of what ``inner`` gives, and scale and shift; what else it does to an image would show as a difference."""
    from PIL import Image

    factor = float(inner.rescale_factor) if inner.do_rescale else 1.0
    mean, std = (inner.image_mean, inner.image_std) if inner.do_normalize else (0.0, 1.0)
    scale, shift = factor / np.broadcast_to(std, 3), -np.broadcast_to(mean, 3) / np.broadcast_to(std, 3)
    seen = set()
    for height, width in SHAPES:
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))
        try:
            pixels, wanted = resized(inner, image), inner(images=image, return_tensors="np")["pixel_values"][0]
        except FAULTS as fault:
            raise BaseError(f"base {spec.model}: its {PROCESSOR} cannot be applied: {one_line(fault)}; use another model") from None
        seen.add(pixels.shape)
        if pixels.dtype != np.uint8 or not _agree(pixels * scale[:, None, None] + shift[:, None, None], wanted):
            raise BaseError(
                f"base {spec.model}: its {PROCESSOR} ({type(inner).__name__}) does more than resize, crop, rescale and normalize; "
                "use another model"
            )
    if len(seen) > 1:
        raise BaseError(
            f"base {spec.model}: its {PROCESSOR} gives images of different sizes {sorted(seen)}; "
            'set size to {"height": ..., "width": ...} there, or use another model'
        )
    return seen.pop(), tuple(map(float, scale)), tuple(map(float, shift))


def _agree(ours: NDArray[Any], theirs: NDArray[Any]) -> bool:
    return ours.shape == theirs.shape and bool(np.isfinite(ours).all()) and np.allclose(ours, theirs, rtol=CLOSE, atol=CLOSE)


def _measured(base: Base, shape: tuple[int, ...]) -> tuple[int, int]:
    """How many states of what width the trunk gives for one image of ``shape``."""
    try:
        with torch.no_grad():
            states = base.trunk(pixel_values=torch.empty(1, *shape, device="meta"))[0]
    except FAULTS as fault:
        raise BaseError(
            f"base {base.spec.model}: {type(base.model).__name__} does not take what its {PROCESSOR} gives, "
            f"{list(shape)}: {one_line(fault)}; make their sizes agree"
        ) from None
    if states.dim() == 4 and base.spec.quantization in ("int8", "ao-int8"):
        raise BaseError(
            f"base {base.spec.model}: {base.spec.quantization!r} takes rows of tokens, and {type(base.model).__name__} keeps maps; "
            "use 'nf4', 'bf16' or 'none'"
        )
    _, tokens, width = tokens_of(states).shape
    return tokens, width
