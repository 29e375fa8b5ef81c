"""The live half of the tuners: peft's model around a shell, what it trains, and the shell as it was."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from fedpeft.errors import AdapterError
from fedpeft.methods.attached import ADAPTER, begin, end
from fedpeft.methods.targets import resolve, token_table, trunk_name
from fedpeft.methods.tuners.row import FROZEN, Place, Row
from fedpeft.methods.tuners.tree import Tree
from fedpeft.methods.tuners.widen import own_outputs, widen

if TYPE_CHECKING:
    from fedpeft.bases.spec import HeadSpec

SEED = 20240101
"""What frozen random parts are drawn from where a tuner takes them from torch's global generator: the same at every site."""


def put_on(model: nn.Module, head: HeadSpec, kind: str, row: Row, arguments: dict[str, Any]) -> nn.Module:
    """Put the tuner of ``row`` on ``model`` and return it.

    Raises:
        AdapterError: nothing in the model matches, or peft cannot; the model is then as before.
    """
    arguments = arguments | _where(model, kind, row.place, arguments)
    tree = Tree.of(model)
    attached = begin(model, kind, head)
    attached.undo.append(tree.restore)
    try:
        tuned = _tuned(model, row.peft, arguments)
    except (ValueError, TypeError, NotImplementedError, KeyError, AttributeError, RuntimeError) as fault:
        end(model)
        if next(model.parameters()).device.type == "meta":
            raise AdapterError(f"{kind}: peft reads the base's weights to put it on; use load_base, not meta_base") from fault
        raise AdapterError(
            f"{kind}: peft cannot put it on {type(model).__name__}: {fault}; choose other settings or targets, or use lora"
        ) from fault
    model.train(model.training)  # new layers are born in training mode
    attached.undo.append(lambda: tuned.requires_grad_(False))  # and keeps peft's model alive
    widen(tuned, row.reads)
    if row.in_place:
        own_outputs(tuned)
    if row.peft == "SHADOW":
        _take_in(model, tuned)
    if row.peft == "POLY":
        _answer_one_task(tuned)
    attached.own |= _trained(tuned, row, {id(parameter) for parameter in attached.head.values()})
    if not attached.own:
        end(model)
        raise AdapterError(f"{kind}: peft found nothing to train in {type(model).__name__}; use lora, whose layers it has")
    for parameter in attached.head.values():
        parameter.requires_grad_(True)
    return model


@contextmanager
def seeded() -> Iterator[None]:
    """Draw from `SEED` inside, on every generator that a tuner may use; outside none of them has moved."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what peft guesses is set here
        try:
            random.seed(SEED)
            np.random.seed(SEED)
            torch.manual_seed(SEED)
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _tuned(model: nn.Module, kind: str, arguments: dict[str, Any]) -> Any:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils import PeftType

    peft_type = PeftType(kind)
    for name, flag in (("Linear4bit", "is_loaded_in_4bit"), ("Linear8bitLt", "is_loaded_in_8bit")):
        if any(type(module).__name__ == name for module in model.modules()):
            object.__setattr__(model, flag, True)  # peft asks the model, not its layers; a shell of a loaded trunk has no such mark
    with seeded():
        config = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type](**arguments)
        return PEFT_TYPE_TO_TUNER_MAPPING[peft_type](model, {ADAPTER: config}, ADAPTER)


def _trained(tuned: nn.Module, row: Row, heads: set[int]) -> dict[str, nn.Parameter]:
    """What trains besides the head, in float32, each under the shortest of its names: shared tensors have several."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, parameter in tuned.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad or id(parameter) in heads:
            continue
        key = f"base_model.{name}".replace(f".{ADAPTER}", "", 1)
        if row.role(key)[0] == FROZEN:
            parameter.requires_grad_(False)
            continue
        if id(parameter) not in found or len(key) < len(found[id(parameter)][0]):
            found[id(parameter)] = key, parameter
    for _, parameter in found.values():
        parameter.data = parameter.data.float()
    return dict(found.values())


def _where(model: nn.Module, kind: str, place: Place, arguments: dict[str, Any]) -> dict[str, Any]:
    """What peft's config says of the modules it is put on."""
    if place == "linear":
        return {"target_modules": resolve(model, arguments["target_modules"]), **_turned(model, arguments)}
    if place == "norms":
        return {"target_modules": _norms(model, kind)}
    if place == "embeddings":
        return {"target_modules": [_embedding(model, kind)]}
    if place == "attention":
        return _attention(model, kind, arguments)
    if place == "blocks" and getattr(model.config, "is_encoder_decoder", False):
        raise AdapterError(f"{kind}: {type(model).__name__} has two stacks of blocks, and the network beside them follows one; use lora")
    return {}


def _turned(model: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    from transformers.pytorch_utils import Conv1D

    if "fan_in_fan_out" not in arguments:
        return {}
    return {"fan_in_fan_out": isinstance(model.get_submodule(resolve(model, arguments["target_modules"])[0]), Conv1D)}


def _norms(model: nn.Module, kind: str) -> list[str]:
    prefix = f"{trunk_name(model)}." if trunk_name(model) else ""
    names = [name for name, module in model.named_modules() if name.startswith(prefix) and type(module).__name__.endswith("Norm")]
    if not names:
        raise AdapterError(f"{kind}: {type(model).__name__} has no norms in its trunk; use lora")
    return names


def _embedding(model: nn.Module, kind: str) -> str:
    table = token_table(model, kind)
    return next(str(name) for name, module in model.named_modules() if module is table)


def _attention(model: Any, kind: str, arguments: dict[str, Any]) -> dict[str, Any]:
    from peft.tuners.adaption_prompt.config import TRANSFORMERS_MODEL_CONFIG

    known = TRANSFORMERS_MODEL_CONFIG.get(model.config.model_type)
    if known is None:
        raise AdapterError(
            f"{kind}: peft has it for {sorted(TRANSFORMERS_MODEL_CONFIG)}, not for {model.config.model_type}; use prefix or lora"
        )
    depth = int(model.config.num_hidden_layers)
    return {"target_modules": known.target_modules, "adapter_layers": min(arguments["adapter_layers"] or depth, depth)}


def _answer_one_task(tuned: nn.Module) -> None:
    """Every row is of task 0: an adapter of ours belongs to one task."""
    from peft.tuners.poly.layer import PolyLayer

    def first(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return inputs, named | {"task_ids": torch.zeros(len(inputs[0]), dtype=torch.long)}

    for layer in tuned.modules():
        if isinstance(layer, PolyLayer):
            layer.register_forward_pre_hook(first, with_kwargs=True)


def _take_in(model: nn.Module, tuned: Any) -> None:
    """Let ``model`` hold the shadow network, which peft keeps outside it; what follows the last block is read by nobody."""
    from peft.tuners.shadow.layers import ShadowLayer

    for name in ("shadow_backbone", "shadow_projection"):
        model.add_module(name, getattr(tuned, name))
    for backbone in tuned.shadow_backbone.values():
        if getattr(backbone, "wte", None) is not None:
            backbone.wte.requires_grad_(False)  # it reads the base's embeddings
    last = [layer for layer in model.modules() if isinstance(layer, ShadowLayer)][-1]
    for name, parameter in last.named_parameters():
        if name.startswith("shadow_update"):
            parameter.requires_grad_(False)
