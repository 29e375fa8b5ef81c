"""Which modules of a model play which role, found by structure so that a new architecture needs no table."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

# Every architecture of transformers names the three projections by one of these leaves, or fuses them.
PROJECTIONS: dict[str, frozenset[str]] = {
    "query": frozenset({"query", "q_proj", "q_lin", "q", "wq", "query_proj", "in_proj_q"}),
    "key": frozenset({"key", "k_proj", "k_lin", "k", "wk", "key_proj", "in_proj_k"}),
    "value": frozenset({"value", "v_proj", "v_lin", "v", "wv", "value_proj", "in_proj_v"}),
}


def module_roles(model: nn.Module) -> dict[str, list[str]]:
    """Module names by role, in registration order; call it on a shell that carries no adapter.

    ``attention`` and ``mlp`` are the linear layers of the repeated blocks; ``query``, ``key``, ``value`` are the part of
    ``attention`` that is not fused; ``mlp_out`` is the part of ``mlp`` that writes the hidden state; ``head`` are the modules
    beside the trunk that hold parameters (classifier, score, lm_head); ``outside`` are the other linear layers (poolers).
    """
    roles: dict[str, list[str]] = {role: [] for role in ("attention", "query", "key", "value", "mlp", "mlp_out", "head", "outside")}
    roles["head"] = head_modules(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and name.split(".")[0] not in roles["head"]:
            for role in _roles_of(model, name, module):
                roles[role].append(name)
    return roles


def head_modules(model: nn.Module) -> list[str]:
    """Names of the direct children beside the trunk that hold parameters."""
    trunk = getattr(model, "base_model_prefix", "")
    return [name for name, child in model.named_children() if name != trunk and next(child.parameters(), None) is not None]


def _roles_of(model: nn.Module, name: str, module: nn.Linear | Conv1D) -> list[str]:
    path = [(part, model.get_submodule(".".join(name.split(".")[: depth + 1]))) for depth, part in enumerate(name.split("."))]
    if not any(isinstance(ancestor, nn.ModuleList) for _, ancestor in path):
        return ["outside"]
    if any(_is_attention(part, ancestor) for part, ancestor in path[:-1]):
        return ["attention", *(role for role, leaves in PROJECTIONS.items() if path[-1][0] in leaves)]
    return ["mlp", "mlp_out"] if _shape(module)[0] == _hidden(model) != _shape(module)[1] else ["mlp"]


def _is_attention(part: str, module: nn.Module) -> bool:
    return "attn" in part.lower() or "attention" in part.lower() or "attention" in type(module).__name__.lower()


def _shape(module: nn.Linear | Conv1D) -> tuple[int, int]:
    """(out, in) features."""
    return (module.nf, module.nx) if isinstance(module, Conv1D) else (module.out_features, module.in_features)


def _hidden(model: nn.Module) -> int:
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config  # type: ignore[union-attr, operator]
    return int(config.hidden_size)
