"""G3: the boundary of a round on a site: take the trained adapter off the model, put the next global adapter on, 448 tensors.

Peer: ``get_peft_model_state_dict`` and flwr's ``ArrayRecord`` up, its ``to_torch_state_dict`` and ``set_peft_model_state_dict``
down. Ours: one copy out of the flat buffer and one into it. An ``ArrayRecord`` holds serialised bytes, so a second line packs and
unpacks on our side too; that line also checks every byte both ways (AES-GMAC), which the peer's record does not. Both sides carry
the same values and end with the same model (checked before timing).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import process_time
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedpeft.adapters import attach, make_spec
from fedpeft.adapters.live import Live
from fedpeft.bases import BaseSpec, Fingerprint, HeadSpec
from fedpeft.bases.base import Base
from fedpeft.methods import Lora
from fedpeft.tensors import Tensors
from fedpeft.wire import flat

LAYERS, HIDDEN, GOAL = 32, 192, 50.0
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANKS = (8, 32)
"""Ranks that give 0.9 M and 3.8 M values in 448 tensors."""

Swap = Callable[[], None]


def run(repeats: int = 5) -> list[dict[str, object]]:
    """Rows of CPU milliseconds per boundary, the least of ``repeats`` interleaved rounds; ``ratio`` is the peer's over ours."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [row for rank in RANKS for row in _rows(rank, repeats)]
    finally:
        torch.set_num_threads(threads)


def _rows(rank: int, repeats: int) -> list[dict[str, object]]:
    ours, peer = Ours(rank), Peer(rank)
    _check(ours, peer)
    swaps: dict[str, Swap] = {"floor": _two_copies(ours), "in memory": ours.swap, "packed and checked": ours.swap_packed, "peer": peer.swap}
    least = _least(swaps, repeats)
    return [_row(name, rank, ours.live.flat.numel(), least) for name in ("in memory", "packed and checked")]


def _row(name: str, rank: int, size: int, least: dict[str, float]) -> dict[str, object]:
    ratio = least["peer"] / least[name]
    return {
        "row": "G3",
        "case": f"adapter_swap {name} 448 tensors {size / 1e6:.1f} M values r={rank}",
        "ours": least[name] * 1e3,
        "peer": least["peer"] * 1e3,
        "ratio": ratio,
        "goal": f"ratio >= {GOAL:.0f}",
        "held": ratio >= GOAL,
        "unit": "CPU ms",
        "floor_share": least["floor"] / least[name],
    }


def _least(swaps: dict[str, Swap], repeats: int, inner: int = 3) -> dict[str, float]:
    """Least mean CPU seconds of ``inner`` swaps, each time after one that warms the caches."""
    least = dict.fromkeys(swaps, float("inf"))
    for _ in range(repeats):
        for name, swap in swaps.items():
            swap()
            began = process_time()
            for _ in range(inner):
                swap()
            least[name] = min(least[name], (process_time() - began) / inner)
    return least


def _model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = LlamaConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        vocab_size=256,
        intermediate_size=HIDDEN * 11 // 4,
        num_attention_heads=4,
        num_key_value_heads=4,
        use_cache=False,
    )
    return LlamaForCausalLM(shape).requires_grad_(False).eval()


@dataclass
class Ours:
    """A live adapter whose parameters are views of one buffer; ``incoming`` is the next global adapter."""

    rank: int

    def __post_init__(self) -> None:
        model = _model()
        base = Base(BaseSpec("random"), Fingerprint("w", "t", "", "none"), "causal", None, model.config, "cpu", model, model.model)
        spec = make_spec("bench", base, Lora(r=self.rank, alpha=self.rank, targets=("all",)), HeadSpec("lm"))
        self.live: Live = attach(base, spec)
        self.incoming = Tensors(spec.layout, np.random.default_rng(0).normal(size=spec.layout.size).astype(np.float32))
        self.message = flat.pack(spec.layout.fingerprint, self.incoming.flat)

    def swap(self) -> None:
        """Read the trained values, load the global ones."""
        self.live.read()
        self.live.load(self.incoming)

    def swap_packed(self) -> None:
        """The same from and to bytes that travel."""
        layout = self.live.spec.layout
        flat.pack(layout.fingerprint, self.live.read().flat)
        _, values = flat.unpack(self.message)
        self.live.load(Tensors(layout, values))


@dataclass
class Peer:
    """peft's state dict and flwr's record of it."""

    rank: int

    def __post_init__(self) -> None:
        from flwr.common import ArrayRecord
        from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

        config = LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=LINEARS, task_type="CAUSAL_LM")
        self.model: Any = get_peft_model(_model(), config)
        self.incoming = ArrayRecord(get_peft_model_state_dict(self.model))

    def take(self, values: dict[str, torch.Tensor]) -> None:
        """Make ``values`` the incoming global adapter."""
        from flwr.common import ArrayRecord

        self.incoming = ArrayRecord(values)

    def swap(self) -> None:
        """Read the trained values into a record, load the global ones from one."""
        from flwr.common import ArrayRecord
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        ArrayRecord(get_peft_model_state_dict(self.model))
        set_peft_model_state_dict(self.model, self.incoming.to_torch_state_dict())


def _check(ours: Ours, peer: Peer) -> None:
    """Both sides hold the same values under the same names after a swap."""
    from peft import get_peft_model_state_dict

    peer.take({name: torch.from_numpy(values) for name, values in ours.incoming.named().items()})
    ours.swap_packed()
    peer.swap()
    theirs, mine = get_peft_model_state_dict(peer.model), ours.live.read().named()
    if sorted(theirs) != sorted(mine) or any(not np.array_equal(mine[name], theirs[name].numpy()) for name in mine):
        raise AssertionError("the two sides hold different adapters after a swap")


def _two_copies(ours: Ours) -> Swap:
    """The floor: the bytes copied out and in."""
    source, inside, outside = ours.incoming.flat, ours.live.flat.numpy(), np.empty_like(ours.incoming.flat)

    def copies() -> None:
        np.copyto(outside, inside)
        np.copyto(inside, source)

    return copies


if __name__ == "__main__":
    for row in run():
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
