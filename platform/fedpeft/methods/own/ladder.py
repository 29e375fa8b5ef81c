"""Ladder side tuning (Sung et al. 2022, arXiv 2206.06522): a small network beside the base, and no backward pass through it."""

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
class Lst:
    """A side network of width ``hidden / reduction`` that reads every block's detached hidden states and adds to the last one's.

    Rung i: ``z = m s_{i-1} + (1 - m) D_i norm(h_i)``, ``s_i = z + V_i gelu(z)``, m a trained gate; the last block puts out
    ``h_L + U s_L``, U zero at start. Training keeps no activation of the base but what the ladders read. The paper's rungs are whole
    transformer layers cut from the base; ours have no attention of their own, since what they read is already mixed over the
    tokens, and so need no mask and no cache. In an encoder-decoder only the decoder has a ladder.
    """

    kind: ClassVar[str] = "lst"
    needs_weights: ClassVar[bool] = False

    reduction: Annotated[int, Field(ge=1)] = 8

    entries = shared.entries
    lr_scale = shared.unscaled
    peft_config = shared.peft_config
    detach = shared.detach

    def attach(self, model: nn.Module, head: HeadSpec) -> nn.Module:
        """Hook the blocks in place and return ``model``. Raises `AdapterError` when there is none, or the side would have no width."""
        from fedpeft.methods.own.rungs import add_ladder

        add_ladder(model, head, self.reduction)
        return model

    def initial(self, entry: Entry, rng: np.random.Generator, config: Any) -> NDArray[np.float32] | None:
        """Ladders and rungs uniform over their fan-in, gates half open, the top zero, head fresh."""
        if entry.role == "head":
            return values.head(entry, rng, config)
        return values.uniform_fan_in(entry, rng) if entry.role in ("ladder", "rung") else values.zeros(entry)
