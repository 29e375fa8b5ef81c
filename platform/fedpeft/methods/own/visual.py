"""Visual prompt tuning (Jia et al. 2022, arXiv 2203.12119): trained tokens beside an image's patches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedpeft.methods import values
from fedpeft.methods.own import shared
from fedpeft.tensors import Entry

if TYPE_CHECKING:
    from torch import nn

    from fedpeft.bases.spec import HeadSpec


@dataclass(frozen=True)
class Vpt:
    """``tokens`` trained vectors after the class token: at the first block only, or (``deep``) fresh ones at every block.

    They leave the sequence after the last block, so that what follows sees the image's own tokens. Vision transformers alone: one
    stack of blocks over (rows, tokens, width) without a mask.
    """

    kind: ClassVar[str] = "vpt"
    needs_weights: ClassVar[bool] = False

    tokens: Annotated[int, Field(ge=1)] = 10
    deep: bool = True

    entries = shared.entries
    lr_scale = shared.unscaled
    peft_config = shared.peft_config
    detach = shared.detach

    def attach(self, model: nn.Module, head: HeadSpec) -> nn.Module:
        """Hook the blocks in place and return ``model``. Raises `AdapterError` for a model that takes no images."""
        from fedpeft.methods.own.patches import add_tokens

        add_tokens(model, head, self.tokens, self.deep)
        return model

    def initial(self, entry: Entry, rng: np.random.Generator, config: Any) -> NDArray[np.float32] | None:
        """Prompts uniform as the paper's, within ``sqrt(6 / (3 patch^2 + width))``; head fresh."""
        if entry.role == "head":
            return values.head(entry, rng, config)
        bound = (6.0 / (3 * int(getattr(config, "patch_size", 16)) ** 2 + entry.shape[-1])) ** 0.5
        return rng.uniform(-bound, bound, entry.shape).astype(np.float32)
