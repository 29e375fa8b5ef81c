"""The live half of soft prompts: peft's model inside a thin module that answers for the caller's own tokens only.

peft's prompt model returns logits for the virtual tokens too, and neither of its models knows packed rows. Here logits
line up with ``input_ids``, and a packed row (position ids that restart, no mask) is run as a padded batch of its parts.

Shape legend: B rows, T tokens, V vocabulary, D documents in a packed row.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fedpeft.errors import AdapterError
from fedpeft.methods.attached import ADAPTER, MARK, begin, end, head_parameters
from fedpeft.methods.targets import trunk_name

if TYPE_CHECKING:
    from fedpeft.bases.spec import HeadSpec

OTHERS = "use lora, ia3, bottleneck or bitfit"
NAMES = {"embedding.weight": "prompt_embeddings", "trainable_embedding": "prompt_embeddings"}
"""As peft saves them."""

CACHED = frozenset({"prefix", "cartridge"})
"""Kinds whose virtual tokens are keys and values, handed over as a cache."""


class Prompted(nn.Module):
    """A shell with a soft prompt, called as the shell is."""

    def __init__(self, inner: Any, kind: str, head: HeadSpec) -> None:
        super().__init__()
        self.inner, self.kind, self.config = inner, kind, inner.config
        self.lengthens = inner.active_peft_config.num_virtual_tokens if kind not in CACHED and head.kind == "lm" else 0

    @property
    def shell(self) -> nn.Module:
        """The module that the method was attached to."""
        shell: nn.Module = self.inner.base_model
        return shell

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, **rest: Any) -> Any:
        """``input_ids`` (B, T) -> the shell's output; logits (B, labels), or (B, T, V) whatever the prompt's length."""
        if position_ids is not None and attention_mask is None and int((position_ids == 0).sum()) > len(input_ids):
            return self._packed(input_ids, position_ids, **rest)
        if position_ids is not None and self.kind in CACHED:
            rest["position_ids"] = position_ids
        keep = rest.get("logits_to_keep")
        if isinstance(keep, Tensor):
            rest["logits_to_keep"] = keep + self.lengthens
        out = self.inner(input_ids=input_ids, attention_mask=attention_mask, **rest)
        if self.lengthens and keep is None:
            out.logits = out.logits[:, self.lengthens :]
        return out

    def generate(self, **inputs: Any) -> Tensor:
        """Token ids (B, T), as ``transformers`` generates them behind the prompt."""
        found: Tensor = self.inner.generate(**inputs)
        return found

    def activation_checkpointing_enable(self, *settings: Any) -> None:
        """Checkpoint the shell. Raises `AdapterError` for a prefix, which the shell would drop without a word."""
        if self.kind in CACHED:
            raise AdapterError(
                f"{self.kind}: checkpointing drops the cache that holds the prefix; set checkpoint_activations = false or {OTHERS}"
            )
        self.shell.activation_checkpointing_enable(*settings)  # type: ignore[operator]

    gradient_checkpointing_enable = activation_checkpointing_enable

    def _packed(self, input_ids: Tensor, position_ids: Tensor, **rest: Any) -> Any:
        starts = (position_ids.flatten() == 0).nonzero().flatten().tolist()
        lengths = [end - start for start, end in zip(starts, [*starts[1:], input_ids.numel()], strict=True)]
        rows = pad_sequence(list(torch.split(input_ids.flatten(), lengths)), batch_first=True)
        mask = (torch.arange(rows.shape[1])[None] < torch.tensor(lengths)[:, None]).to(rows.device)
        keep = rest.pop("logits_to_keep", None)
        out = self(rows, mask.long(), **rest)
        logits = out.logits[mask].view(*input_ids.shape, -1)
        out.logits = logits if keep is None else logits[:, keep if isinstance(keep, Tensor) else slice(-keep, None)]
        return out


def prompted(model: nn.Module, config: Any, kind: str, head: HeadSpec, settle: Callable[[Any], None] | None = None) -> nn.Module:
    """Wrap ``model``; ``settle`` may change peft's prompt model before its tensors are counted.

    Raises:
        AdapterError: an encoder-decoder, or peft cannot read the model's sizes.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise AdapterError(f"{kind}: {type(model).__name__} is an encoder-decoder, where the prompt's place is not settled; {OTHERS}")
    attached = begin(model, kind, head)
    config.task_type = "SEQ_CLS" if head.kind == "classification" else "CAUSAL_LM"
    config.modules_to_save = sorted({name.partition(".")[0] for name in attached.head}) or None
    try:
        inner = _peft_model(model, config)
    except ValueError as fault:
        end(model)
        raise AdapterError(f"{kind}: peft cannot wrap {type(model).__name__}: {fault}; {OTHERS}") from fault
    for parameter in attached.head.values():
        parameter.requires_grad_(True)
    if settle is not None:
        settle(inner)
    encoder = inner.prompt_encoder[ADAPTER].named_parameters()
    attached.own |= {NAMES.get(name, name): parameter for name, parameter in encoder if parameter.requires_grad}
    outer = Prompted(inner, kind, head).train(model.training)
    object.__setattr__(outer, MARK, attached)
    return outer


def _peft_model(model: nn.Module, config: Any) -> Any:
    from peft import get_peft_model

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(0)  # a tuner's frozen parts are the same at every site
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for a property under its old name
        try:
            return get_peft_model(model, config, adapter_name=ADAPTER)
        finally:
            _unwrap_head(model)


def release(model: nn.Module) -> None:
    """Unmark the shell inside ``model``, which was not changed otherwise."""
    if not isinstance(model, Prompted):
        raise AdapterError(f"{type(model).__name__} carries no prompt; pass the module that attach returned")
    end(model.shell)
    object.__delattr__(model, MARK)


def require_cache(model: nn.Module) -> None:
    """Raises `AdapterError` unless peft can hand the trunk a cache and the head sits directly on what comes back."""
    trunk = getattr(model, trunk_name(model)) if trunk_name(model) else model
    if not _takes_cache(trunk):
        raise AdapterError(f"prefix: {type(trunk).__name__} takes no past_key_values, which carry a prefix; use prompt, or {OTHERS}")
    if not _takes_cache(model) and len({name.partition(".")[0] for name in head_parameters(model)}) > 1:
        raise AdapterError(f"prefix: peft would skip a part of the head of {type(model).__name__}; use prompt, or {OTHERS}")


def _takes_cache(model: nn.Module) -> bool:
    return "past_key_values" in inspect.signature(model.forward).parameters


def _unwrap_head(model: nn.Module) -> None:
    """Put the shell's own head back: peft has made a copy to train, and we train the head itself."""
    from peft.utils import ModulesToSaveWrapper

    for name, module in [(name, module) for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)]:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module.original_module)
