"""Which modules of a model play which role, found by structure so that a new architecture needs no table."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D


def module_roles(model: nn.Module) -> dict[str, list[str]]:
    """Module names by role, in registration order; call it on a shell that carries no adapter.

    ``attention`` and ``mlp`` are the linear layers of the repeated blocks, ``outside`` the linear layers of the trunk that
    are in no block (poolers, embedding projections), ``head`` the modules beside the trunk that hold parameters.
    """
    roles: dict[str, list[str]] = {"attention": [], "mlp": [], "outside": [], "head": head_modules(model)}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and name.split(".")[0] not in roles["head"]:
            roles[_role(model, name)].append(name)
    return roles


def head_modules(model: nn.Module) -> list[str]:
    """Names of the direct children beside the trunk that hold parameters; of a model that is its own trunk, the output layer."""
    trunk = getattr(model, "base_model_prefix", "")
    if not isinstance(getattr(model, trunk, None), nn.Module) and hasattr(model, "get_output_embeddings"):
        head = model.get_output_embeddings()  # type: ignore[operator]
        return [name for name, child in model.named_children() if head is not None and child is head]
    return [name for name, child in model.named_children() if name != trunk and next(child.parameters(), None) is not None]


def _role(model: nn.Module, name: str) -> str:
    parts = name.split(".")
    path = [(part, model.get_submodule(".".join(parts[: depth + 1]))) for depth, part in enumerate(parts)]
    if not any(isinstance(ancestor, nn.ModuleList) for _, ancestor in path):
        return "outside"
    return "attention" if any(_is_attention(part, ancestor) for part, ancestor in path[:-1]) else "mlp"


def _is_attention(part: str, module: nn.Module) -> bool:
    return "attn" in part.lower() or "attention" in f"{part} {type(module).__name__}".lower()
