"""A loaded (or meta) base: one frozen trunk, of which every task gets a shell with its own head."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.bases.spec import BaseSpec, Family, Fingerprint, HeadSpec
from fedpeft.errors import BaseError

if TYPE_CHECKING:
    from torch import nn

    from fedpeft.bases.images import Processor

OWN = "base"
"""Stands for the model's name where a base embeds for itself."""


@dataclass(eq=False)
class Base:
    """The frozen model in memory.

    ``model`` is what was loaded (a language model, or an encoder's classification form, whose head is not used), ``trunk`` the part that
    all shells share, ``device`` ``cpu``, ``cuda`` or ``meta``. At most one adapter is attached at a time; ``holder`` names its task.
    A vision encoder has a ``processor`` and no tokenizer; where it is asked with a text, that names or holds an image.
    """

    spec: BaseSpec
    fingerprint: Fingerprint
    family: Family
    tokenizer: Any = field(repr=False)
    config: Any = field(repr=False)
    device: str
    model: nn.Module = field(repr=False)
    trunk: nn.Module = field(repr=False)
    holder: str | None = None
    processor: Processor | None = field(default=None, repr=False)

    def shell(self, head: HeadSpec) -> nn.Module:
        """A transformers model with ``head`` on the shared trunk; the head's values are fixed, an adapter overwrites them.

        Classification gives the architecture's form for it, of sequences or images, with ``len(head.labels)`` labels, ``lm`` the language
        model.

        Raises:
            BaseError: this family has no such head, or an adapter is attached.
        """
        from fedpeft.bases.shell import shell

        self.require_free("shell")
        return shell(self, head)

    def before(self, labels: Sequence[int]) -> int:
        """What the decoder of an encoder-decoder reads before it says ``labels``, as transformers shifts them.

        Raises:
            BaseError: the model's config does not say.
        """
        import torch

        model: Any = self.model
        try:
            return int(model.prepare_decoder_input_ids_from_labels(torch.tensor([list(labels)]))[0, 0])
        except (AttributeError, ValueError, TypeError):
            start = getattr(self.config, "decoder_start_token_id", None)
        if start is None:
            raise BaseError(f"base {self.spec.model}: its config.json names no decoder_start_token_id; set it (T5: the padding token's)")
        return int(start)

    @property
    def reader(self) -> nn.Module:
        """The part of the trunk that reads a text: all of it, or an encoder-decoder's encoder."""
        return self.trunk.get_encoder() if self.family == "seq2seq" else self.trunk  # type: ignore[operator]

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embeddings (N, D): last hidden state of what reads, mean over the mask, L2-normalised; the bare base, without adapter.

        Raises:
            BaseError: an adapter is attached (embeddings must not depend on it), or this is a meta base.
        """
        from fedpeft.bases.embed import embed

        self.require_free("embed")
        return embed(self, texts)

    def watch(self, text: str, modules: Collection[str]) -> dict[str, NDArray[np.float32]]:
        """What ``modules`` of the bare base read for the N tokens of ``text``: (N, n) each; of `spec.LAST` what its trunk says.

        Raises:
            BaseError: an adapter is attached.
            AdapterError: the base has no such module.
        """
        from fedpeft.bases.watch import watch

        return watch(self, text, modules)

    @property
    def encoder(self) -> str:
        """What router cards call this base where it embeds its own texts."""
        return f"{OWN}@{self.fingerprint.identity}"

    @property
    def width(self) -> int:
        """Values of an embedding."""
        return int(self.config.get_text_config().hidden_size) if self.processor is None else self.processor.width

    def require_processor(self, what: str) -> Processor:
        """What makes its images. Raises `BaseError` when it reads text."""
        if self.processor is None:
            raise BaseError(f"{what}: base {self.spec.model} reads text; use a vision base, such as a ViT")
        return self.processor

    def require_free(self, what: str) -> None:
        """Raise `BaseError` when an adapter is attached."""
        if self.holder is not None:
            raise BaseError(f"{what}: base {self.spec.model} carries the adapter of task {self.holder!r}; leave its `with` block first")
