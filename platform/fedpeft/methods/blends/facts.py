"""The facts of this room's methods."""

from __future__ import annotations

from dataclasses import replace

from fedpeft.methods.blends.compose import merged
from fedpeft.methods.facts import CORE_SPECS
from fedpeft.methods.spec import MethodSpec

BLEND_SPECS: dict[str, MethodSpec] = {
    "compose": replace(
        merged({kind: CORE_SPECS[kind] for kind in ("lora", "bottleneck")}),
        summary="any methods at once: MAM is prefix + parallel, RoSA is lora + sparse-magnitude",
        note='facts are those of the default parts, lora + bottleneck; method = ["prefix", "parallel"] is the short form',
    ),
    "unipelt": MethodSpec(
        family="hybrid",
        acts_on="attention and outputs of the MLP",
        summary="LoRA, a prefix with a softmax of its own, and bottlenecks, each behind a gate per token",
        paper="Mao et al. 2022, arXiv 2110.07577",
        tensors=dict.fromkeys(("A", "B", "keys", "values", "down", "up", "gate"), "trained"),
        average="hidden",
        note="gates multiply what they open; a fused query layer (Falcon) needs tokens = 0",
    ),
    "adapterfusion": MethodSpec(
        family="multi-task",
        acts_on="outputs of attention and MLP",
        summary="attention over the frozen bottlenecks of other tasks",
        paper="Pfeiffer et al. 2021, arXiv 2005.00247",
        tensors={"query": "trained", "key": "trained", "value": "trained", "expert": "given"},
        average="router",
        learning_rate=5e-4,
        note="three square matrices per place; experts come from trained adapters and never move",
    ),
    "hydralora": MethodSpec(
        family="multi-task",
        acts_on="linear weights",
        summary="one shared A, several B's and a softmax router per layer",
        paper="Tian et al. 2024, arXiv 2404.19245",
        tensors={"A": "trained", "B": "trained", "router": "trained"},
        average="router",
        mixed_batch=True,
        note="linear in every B while A and the router stand still; its router is saved with it",
    ),
    "molora": MethodSpec(
        family="multi-task",
        acts_on="linear weights",
        summary="LoRA experts, of which a router picks the best few per token",
        paper="Li et al. 2024 (MixLoRA), arXiv 2404.15159; Zadouri et al. 2023 (MoLoRA), arXiv 2309.05444",
        tensors={"A": "trained", "B": "trained", "router": "trained"},
        average="router",
        mixed_batch=True,
        note="its router is saved with it; balance weighs the load-balancing loss",
    ),
    "xlora": MethodSpec(
        family="multi-task",
        acts_on="linear weights",
        summary="frozen LoRA experts, weighed per layer and token by a router on the last hidden state of a first pass",
        paper="Buehler & Buehler 2024, arXiv 2402.07148",
        tensors={"router": "trained", "expert": "given"},
        average="router",
        identity=False,
        note="a forward costs two; experts come from trained adapters and never move; its router is saved with it",
    ),
    "mpt": MethodSpec(
        family="prompt",
        acts_on="input embeddings",
        summary="a shared prompt, rescaled by a task's rank-one matrix",
        paper="Wang et al. 2023, arXiv 2303.02861",
        tensors={"prompt": "trained", "row": "trained", "column": "trained"},
        average="prompt",
        identity=False,
        learning_rate=3e-2,
        note="linear in any one of its three tensors while the other two stand still",
    ),
    "attempt": MethodSpec(
        family="prompt",
        acts_on="input embeddings",
        summary="a prompt and an attention mixture, chosen by the input, over frozen prompts of other tasks",
        paper="Asai et al. 2022, arXiv 2205.11961",
        tensors={"prompt": "trained", "down": "trained", "up": "trained", "norm": "trained", "expert": "given"},
        average="router",
        identity=False,
        learning_rate=1e-2,
        note="encoders that classify alone; sources come from trained adapters and never move",
    ),
}
