"""A small federated LoRA run for the codec benchmarks: eight non-IID clients trained side by side, their deltas written by a codec.

The adapters of all clients lie in one matrix, a row a client, so that one forward trains all of them; AdamW works value by value,
hence as it would for each alone. Two tasks: Markov chains on a small Llama pretrained here, and Shakespeare's speakers on stories260k where
``FEDPEFT_SHARED`` names a folder that holds both.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

CLIENTS, ROWS, STEPS, RATE, RANK = 8, 16, 6, 2e-3, 8
VOCAB, LENGTH, MIXED = 64, 32, 0.5

Send = Callable[[int, int, Any], Any]
"""(round, client, delta) -> the delta that arrives; float32 (size,)."""


class Low(nn.Module):
    """A frozen linear layer and one rank-8 product a client; A and B are set before each forward."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.A = self.B = torch.empty(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (clients * rows, tokens, in)."""
        low = torch.bmm(x.reshape(CLIENTS, -1, x.shape[-1]), self.A.transpose(1, 2))
        return self.base(x) + 2.0 * torch.bmm(low, self.B.transpose(1, 2)).reshape(*x.shape[:-1], -1)


@dataclass(eq=False)
class Task:
    """A frozen model and the clients' token rows: ``train`` (clients, steps, rows, tokens), ``test`` (clients, rows, tokens); -1 pads."""

    name: str
    model: nn.Module
    train: torch.Tensor
    test: torch.Tensor

    def __post_init__(self) -> None:
        self.layers = []
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        for module in list(self.model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear) and name.endswith("_proj"):
                    self.layers.append(Low(child))
                    setattr(module, name, self.layers[-1])

    @cached_property
    def shapes(self) -> list[tuple[int, int]]:
        """Of every A, then of every B."""
        sizes = [(layer.base.in_features, layer.base.out_features) for layer in self.layers]
        return [(RANK, inner) for inner, _ in sizes] + [(outer, RANK) for _, outer in sizes]

    def start(self) -> torch.Tensor:
        """One adapter (size,): A as PEFT draws it, B zero."""
        torch.manual_seed(0)
        half = len(self.layers)
        drawn = [(torch.rand(shape) * 2 - 1) / shape[1] ** 0.5 for shape in self.shapes[:half]]
        return torch.cat([part.flatten() for part in drawn + [torch.zeros(shape) for shape in self.shapes[half:]]])

    def losses(self, adapters: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The sum of the clients' mean losses; ``adapters`` (clients, size), ``rows`` (clients, rows, tokens)."""
        parts = adapters.split([a * b for a, b in self.shapes], dim=1)
        views = [part.reshape(CLIENTS, *shape) for part, shape in zip(parts, self.shapes, strict=True)]
        for layer, a, b in zip(self.layers, views[: len(self.layers)], views[len(self.layers) :], strict=True):
            layer.A, layer.B = a, b
        flat = rows.reshape(-1, rows.shape[-1])
        logits = self.model(flat[:, :-1].clamp(min=0), use_cache=False).logits
        each = F.cross_entropy(logits.transpose(1, 2), flat[:, 1:], ignore_index=-1, reduction="none").reshape(CLIENTS, -1)
        counts = (flat[:, 1:] >= 0).reshape(CLIENTS, -1).sum(1)
        return (each.sum(1) / counts).sum()

    def evaluate(self, adapter: torch.Tensor) -> float:
        """Mean test loss over the clients."""
        with torch.no_grad():
            return float(self.losses(adapter.expand(CLIENTS, -1), self.test)) / CLIENTS


def federate(task: Task, rounds: int, send: Send | None, learned: Callable[[Any], None] | None = None) -> float:
    """Test loss after ``rounds`` rounds of FedAvg with equal weights; ``learned`` hears every mean delta."""
    world, step = task.start(), 0
    for place in range(rounds):
        local = world.repeat(CLIENTS, 1).requires_grad_(True)
        optimizer = torch.optim.AdamW([local], RATE, weight_decay=0.0)
        for _ in range(STEPS):
            optimizer.zero_grad()
            task.losses(local, task.train[:, step % task.train.shape[1]]).backward()
            optimizer.step()
            step += 1
        deltas = (local.detach() - world).numpy()
        if send is not None:
            deltas = np.stack([send(place, client, delta) for client, delta in enumerate(deltas)])
        mean = deltas.mean(axis=0, dtype=np.float64).astype(np.float32)
        if learned is not None:
            learned(mean)
        world = world + torch.from_numpy(mean)
    return task.evaluate(world)


def markov(rounds: int, seed: int) -> Task:
    """Each client's chain is half a common one and half its own; the base has learned a third kind of chain."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=VOCAB, max_position_embeddings=LENGTH + 1))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(120):
        rows = _walks(_chain(0), 32, generator)
        optimizer.zero_grad()
        F.cross_entropy(model(rows[:, :-1], use_cache=False).logits.transpose(1, 2), rows[:, 1:]).backward()
        optimizer.step()
    chains = [MIXED * _chain(1) + (1 - MIXED) * _chain(100 + client) for client in range(CLIENTS)]
    drawn = torch.Generator().manual_seed(1000 + seed)
    train = torch.stack([_walks(chain, rounds * STEPS * ROWS, drawn).reshape(rounds * STEPS, ROWS, -1) for chain in chains])
    test = torch.stack([_walks(chain, 128, torch.Generator().manual_seed(9)) for chain in chains])
    return Task("Markov chains, Llama 0.4M", model, train, test)


def speakers(rounds: int, seed: int) -> Task | None:
    """The eight speakers with most lines on stories260k; ``None`` where the folder is absent."""
    folder = Path(os.environ.get("FEDPEFT_SHARED", Path(__file__).parents[3] / "shared"))
    source, data = folder / "models" / "stories260k", folder / "data" / "shakespeare.jsonl"
    if not source.is_dir() or not data.is_file():
        return None
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lines = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    most = [name for name, _ in Counter(line["client"] for line in lines if line["split"] == "train").most_common(CLIENTS)]
    tokenizer = AutoTokenizer.from_pretrained(source)
    chosen = np.random.default_rng(seed)
    train, test = [], []
    for name in most:
        texts = {split: [row["text"] for row in lines if (row["client"], row["split"]) == (name, split)] for split in ("train", "test")}
        own = {split: _tokens(tokenizer, some) for split, some in texts.items()}
        picks = chosen.integers(len(own["train"]), size=(rounds * STEPS, ROWS))
        train.append(own["train"][torch.from_numpy(picks)])
        test.append(own["test"][torch.arange(48) % len(own["test"])])
    return Task("Shakespeare's speakers, stories260k", AutoModelForCausalLM.from_pretrained(source), torch.stack(train), torch.stack(test))


def _chain(seed: int) -> torch.Tensor:
    return torch.softmax(torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2.5, -1)


def _walks(chain: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    rows = [torch.randint(0, VOCAB, (count,), generator=generator)]
    for _ in range(LENGTH):
        rows.append(torch.multinomial(chain[rows[-1]], 1, generator=generator)[:, 0])
    return torch.stack(rows, 1)


def _tokens(tokenizer: Any, texts: list[str], length: int = 48) -> torch.Tensor:
    rows = [tokenizer(text, truncation=True, max_length=length)["input_ids"] for text in texts]
    rows = [row + [-1] * (length - len(row)) for row in rows if len(row) > 3]
    return torch.tensor(rows)
