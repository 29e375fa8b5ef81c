"""Soft prompts: trained vectors before the input, or before the keys and values of every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedpeft.methods import values
from fedpeft.tensors import Entry, Layout

if TYPE_CHECKING:
    from torch import nn

    from fedpeft.bases.spec import HeadSpec
    from fedpeft.methods.protocol import Entries

NAME = "prompt_embeddings"


@dataclass(frozen=True)
class PromptTuning:
    """``tokens`` trained embeddings before the input's (Lester et al. 2021, arXiv 2104.08691).

    An encoder's classifier then pools the first of them, as in peft, so the model is not the base's at start.
    """

    kind: ClassVar[str] = "prompt"

    tokens: Annotated[int, Field(ge=1)] = 16

    @property
    def needs_weights(self) -> bool:
        """Fresh tensors only."""
        return False

    def attach(self, model: nn.Module, head: HeadSpec) -> nn.Module:
        """Return a module around ``model`` that puts the prompt before its input.

        Raises:
            AdapterError: an encoder-decoder, a model of images, or a classifier that pools the last token: peft would pool padding.
        """
        from peft import PromptTuningConfig

        from fedpeft.errors import AdapterError
        from fedpeft.methods.prompted import prompted
        from fedpeft.methods.targets import token_table

        if head.kind == "classification" and hasattr(model, "score"):
            raise AdapterError(
                f"prompt: {type(model).__name__} classifies by the last token, which peft cannot find behind a prompt in a padded batch; "
                "use prefix, lora, ia3, bottleneck or bitfit"
            )
        width = int(token_table(model, self.kind).weight.shape[1])
        return prompted(model, PromptTuningConfig(**self._settings(width)), self.kind, head)

    def entries(self, model: nn.Module) -> Entries:
        """Roles prompt and head."""
        return _entries(model, "prompt")

    def initial(self, entry: Entry, rng: np.random.Generator, config: Any) -> NDArray[np.float32] | None:
        """Normal with the deviation of the base's own embeddings at its birth."""
        return _initial(entry, rng, config)

    def lr_scale(self, role: str) -> float:
        """Nothing is folded."""
        return 1.0

    def peft_config(self, base_model: str, head: HeadSpec, layout: Layout) -> dict[str, Any]:
        """PROMPT_TUNING."""
        return values.common(base_model, head, layout) | {
            "peft_type": "PROMPT_TUNING",
            "prompt_tuning_init": "RANDOM",
            "modules_to_save": values.head_modules(layout),
            **self._settings(next(entry.shape[1] for entry in layout.entries if entry.name == NAME)),
        }

    def _settings(self, width: int) -> dict[str, int]:
        """Sizes that peft would else look for under names that not every config has; layers and heads play no part."""
        return {"num_virtual_tokens": self.tokens, "token_dim": width, "num_layers": 1, "num_attention_heads": 1}

    def detach(self, model: nn.Module) -> None:
        """Let go of the shell, which was never changed."""
        from fedpeft.methods.prompted import release

        release(model)


@dataclass(frozen=True)
class PrefixTuning:
    """``tokens`` trained keys and values before those of every layer (Li and Liang 2021, arXiv 2101.00190), unprojected."""

    kind: ClassVar[str] = "prefix"

    tokens: Annotated[int, Field(ge=1)] = 16

    @property
    def needs_weights(self) -> bool:
        """Fresh tensors only."""
        return False

    def attach(self, model: nn.Module, head: HeadSpec) -> nn.Module:
        """Return a module around ``model`` that gives it the prefix as a cache.

        Raises:
            AdapterError: an encoder-decoder, or a trunk that takes no cache.
        """
        from peft import PrefixTuningConfig

        from fedpeft.methods.prompted import prompted, require_cache

        require_cache(model)
        return prompted(model, PrefixTuningConfig(num_virtual_tokens=self.tokens), self.kind, head)

    def entries(self, model: nn.Module) -> Entries:
        """Roles prefix and head."""
        return _entries(model, "prefix")

    def initial(self, entry: Entry, rng: np.random.Generator, config: Any) -> NDArray[np.float32] | None:
        """Small normal values, head fresh."""
        return _initial(entry, rng, config)

    def lr_scale(self, role: str) -> float:
        """Nothing is folded."""
        return 1.0

    def peft_config(self, base_model: str, head: HeadSpec, layout: Layout) -> dict[str, Any]:
        """PREFIX_TUNING without projection."""
        return values.common(base_model, head, layout) | {
            "peft_type": "PREFIX_TUNING",
            "num_virtual_tokens": self.tokens,
            "prefix_projection": False,
            "modules_to_save": values.head_modules(layout),
        }

    def detach(self, model: nn.Module) -> None:
        """Let go of the shell, which was never changed."""
        from fedpeft.methods.prompted import release

        release(model)


def _entries(model: nn.Module, role: str) -> Entries:
    from fedpeft.methods.attached import attached_to, head_entries

    return {NAME: (role, attached_to(model).own[NAME])} | head_entries(model, "base_model.")


def _initial(entry: Entry, rng: np.random.Generator, config: Any) -> NDArray[np.float32]:
    if entry.role == "head":
        return values.head(entry, rng, config)
    return values.normal(entry, rng, float(getattr(config, "initializer_range", None) or 0.02))
