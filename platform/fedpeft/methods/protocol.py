"""What a PEFT method must answer; no torch at import, so that config files can name methods cheaply."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from fedpeft.tensors import Entry, Layout

if TYPE_CHECKING:
    from torch import nn

    from fedpeft.bases.spec import HeadSpec

    Entries = dict[str, tuple[str, nn.Parameter]]


class Method(Protocol):
    """One PEFT method with its settings: a frozen dataclass, listed in ``METHODS``.

    ``model`` is a task shell of a frozen base: a trunk (named by ``base_model_prefix``) and a head outside it.
    Tensors are named as PEFT saves them, without the adapter's name: ``base_model.model.<module>.lora_A.weight``.
    """

    kind: ClassVar[str]

    @property
    def needs_weights(self) -> bool:
        """Whether round-0 values depend on the base's weights, so that a base without weights cannot give them."""
        ...

    def attach(self, model: nn.Module, head: HeadSpec) -> nn.Module:
        """Put the method on ``model`` and return the module to call.

        Only the method's tensors and a classification head require gradients afterwards. Values are not the round-0
        values of `initial`, but the model answers as the base does (prompts and prefixes excepted).

        Raises:
            AdapterError: nothing in the model matches, or another adapter is still attached.
        """
        ...

    def entries(self, model: nn.Module) -> Entries:
        """Name -> (role, parameter) of all that is trained, for the module that `attach` returned."""
        ...

    def initial(self, entry: Entry, rng: np.random.Generator, config: Any) -> NDArray[np.float32] | None:
        """Round-0 values of one tensor from a seed; ``None``: the values found after `attach` on a base with weights.

        ``config`` is the base's transformers config.
        """
        ...

    def lr_scale(self, role: str) -> float:
        """Factor on the learning rate of a role under Adam-like optimizers (1 but for a folded LoRA scale)."""
        ...

    def peft_config(self, base_model: str, head: HeadSpec, layout: Layout) -> dict[str, Any]:
        """The ``adapter_config.json`` that ``peft.PeftModel.from_pretrained`` reads; targets come from ``layout``."""
        ...

    def detach(self, model: nn.Module) -> None:
        """Take the method off the module that `attach` returned; the trunk has its own modules and values again."""
        ...
