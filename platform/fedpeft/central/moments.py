"""Values and moments of a bank's adapters, whole, out of and into a DeepSpeed engine of any stage.

What is stored is by adapter, in layout order: it fits any number of ranks and any stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedpeft.central.codes import gathered_scales, narrowed, scales_of, widened
from fedpeft.errors import StorageError
from fedpeft.mixtures import Bank

MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


def get_values(bank: Bank) -> dict[str, NDArray[np.float32]]:
    """The values of each adapter; a collective of all ranks in stage 3."""
    return {f"{name}|value": _flat(bank, name, {key: full_value(p) for key, p in bank.parameters(name).items()}) for name in bank.names}


def full_value(parameter: Any) -> Tensor:
    """One parameter, whole. Raises `StorageError` when a part of it did not come."""
    value: Tensor
    if not hasattr(parameter, "ds_id"):
        value = parameter.detach()
        return value
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter]):
        value = parameter.detach().clone()
    if value.numel() != parameter.ds_numel:
        raise StorageError(f"export: a tensor of {parameter.ds_numel} values came as {value.numel()}; nothing is published, run it again")
    return value


def gather_moments(zero: Any, bank: Bank, ranks: int) -> dict[str, NDArray[np.float32]]:
    """What the optimizer remembers of each adapter, in float32, and the scales of what it holds in codes; a collective."""
    inner, found = _inner(zero), dict[str, NDArray[np.float32]]()
    with widened(inner):
        _link(zero)
        for name in bank.names:
            found |= _gathered(zero, bank, name)
    _link(zero)
    return found | gathered_scales(inner, list(_stepped(zero)), ranks)


def _gathered(zero: Any, bank: Bank, name: str) -> dict[str, NDArray[np.float32]]:
    own = bank.parameters(name)
    found: dict[str, NDArray[np.float32]] = {}
    for moment in MOMENTS:
        parts = {key: _moment(zero, parameter, moment) for key, parameter in own.items()}
        if all(part is not None for part in parts.values()):
            found[f"{name}|{moment}"] = _flat(bank, name, parts)
    return found


def set_moments(zero: Any, bank: Bank, arrays: Mapping[str, NDArray[Any]], steps: int, place: tuple[int, int] = (0, 1)) -> None:
    """Give the optimizer what `gather_moments` found, after ``steps`` steps of its own; ``place`` is this rank and the number of ranks."""
    kinds = [moment for moment in MOMENTS if any(key.endswith(f"|{moment}") for key in arrays)]
    _make_room(zero, kinds, steps)
    for name in bank.names:
        for moment in kinds:
            flat = torch.from_numpy(np.array(arrays[f"{name}|{moment}"]))
            spans = bank.spec(name).layout.spans
            for key, parameter in bank.parameters(name).items():
                _set(zero, parameter, flat[spans[key]], moment)
    if hasattr(_inner(zero), "name2qmap"):
        narrowed(_inner(zero), list(_stepped(zero)), steps, scales_of(arrays, *place))
        _link(zero)


def set_gradient(zero: Any, parameter: Any, value: Tensor) -> None:
    """Replace a parameter's gradient, after the last backward of a step and before the engine steps."""
    if hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_set_local_grad

        safe_set_local_grad(parameter, _own_part(parameter, value.reshape(-1)))
    elif parameter.grad is not None:
        parameter.grad.copy_(value)
    else:
        parameter.set_full_hp_grad(value)


def _flat(bank: Bank, name: str, parts: Mapping[str, Any]) -> NDArray[np.float32]:
    layout = bank.spec(name).layout
    return np.concatenate([parts[key].float().cpu().numpy().ravel() for key in layout.names])


def _moment(zero: Any, parameter: nn.Parameter, moment: str) -> Tensor | None:
    from deepspeed.utils import safe_get_full_optimizer_state

    inner = _inner(zero)
    if inner is zero.optimizer:
        found: Tensor | None = inner.state.get(parameter, {}).get(moment)
        return found
    if not any(moment in state for state in inner.state.values()):
        return None
    whole: Tensor = safe_get_full_optimizer_state(parameter, moment)
    return whole


def _set(zero: Any, parameter: Any, value: Tensor, moment: str) -> None:
    if hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_set_local_optimizer_state

        safe_set_local_optimizer_state(parameter, _own_part(parameter, value), moment)
    elif hasattr(parameter, "_hp_mapping"):
        parameter.set_full_hp_param(value.to(parameter.device), moment)
    else:
        zero.optimizer.state[parameter][moment].copy_(value.view(parameter.shape))


def _own_part(parameter: Any, value: Tensor) -> Tensor:
    """This rank's share of a stage-3 parameter, padded as DeepSpeed pads it."""
    size = parameter.partition_numel()
    start = size * parameter.ds_process_group.rank()
    part = torch.zeros(size, device=parameter.device)
    own = value[start : start + size]
    part[: len(own)] = own.to(part.device)
    return part


def _make_room(zero: Any, kinds: list[str], steps: int) -> None:
    """Empty moments for all that the optimizer steps on: it makes them at its first step, which is still to come."""
    inner = _inner(zero)
    for parameter in _stepped(zero):
        state: dict[str, Any] = {moment: torch.zeros_like(parameter) for moment in kinds}
        inner.state[parameter] = state | ({"step": torch.tensor(float(steps))} if "exp_avg" in kinds else {})
    _link(zero)


def _link(zero: Any) -> None:
    """Tell parameters where their moments lie: DeepSpeed does so after the first group's first step, when the others have none yet."""
    if hasattr(zero.optimizer, "_lazy_init_hp_params_optimizer_state"):
        zero.optimizer._hp_optimizer_states_linked = False
        zero.optimizer._lazy_init_hp_params_optimizer_state()


def _inner(zero: Any) -> Any:
    """The optimizer that ZeRO wraps: torch's, or bitsandbytes'."""
    return getattr(zero.optimizer, "optimizer", zero.optimizer)


def _stepped(zero: Any) -> Iterator[Tensor]:
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
        if hasattr(zero.optimizer, name):
            yield from getattr(zero.optimizer, name)
            return
    yield from (parameter for group in zero.optimizer.param_groups for parameter in group["params"])
