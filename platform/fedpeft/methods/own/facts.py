"""The facts of this room's methods."""

from __future__ import annotations

from fedpeft.methods.spec import MethodSpec

OWN_SPECS: dict[str, MethodSpec] = {
    "houlsby": MethodSpec(
        family="adapter",
        acts_on="outputs of attention and MLP",
        summary="serial bottlenecks after attention and MLP: down, GELU, up",
        paper="Houlsby et al. 2019, arXiv 1902.00751",
        tensors={"down": "trained", "up": "trained"},
        average="hidden",
        note="stacking hidden units is exact; bottleneck is the same method under its older name",
    ),
    "pfeiffer": MethodSpec(
        family="adapter",
        acts_on="outputs of the MLP",
        summary="serial bottlenecks after each MLP alone, half of Houlsby's tensors",
        paper="Pfeiffer et al. 2020, arXiv 2005.00247",
        tensors={"down": "trained", "up": "trained"},
        average="hidden",
        note="stacking hidden units is exact",
    ),
    "parallel": MethodSpec(
        family="adapter",
        acts_on="the MLP, from its input to its output",
        summary="a scaled bottleneck beside each MLP",
        paper="He et al. 2021, arXiv 2110.04366",
        tensors={"down": "trained", "up": "trained"},
        average="hidden",
        note="stacking hidden units is exact; the paper's scale is part of up",
    ),
    "compacter": MethodSpec(
        family="adapter",
        acts_on="outputs of attention and MLP",
        summary="Houlsby's bottlenecks as sums of Kronecker products, their small factors shared by all layers",
        paper="Karimi Mahabadi et al. 2021, arXiv 2106.04647",
        tensors={"slow": "trained", "fast_down": "trained", "fast_up": "trained"},
        average="hidden",
        learning_rate=3e-3,
    ),
    "ssf": MethodSpec(
        family="scale-shift",
        acts_on="outputs of linear layers and norms",
        summary="one trained factor and one shift per channel",
        paper="Lian et al. 2022, arXiv 2210.08823",
        tensors={"scale": "trained", "shift": "trained"},
        average="linear",
        mergeable=True,
        learning_rate=5e-3,
        privacy="good",
    ),
    "peqa": MethodSpec(
        family="quantized",
        acts_on="scales of linear weights",
        summary="one trained factor per row of a frozen, usually quantized, weight",
        paper="Kim et al. 2023, arXiv 2305.14152",
        tensors={"scale": "trained"},
        average="linear",
        mergeable=True,
        learning_rate=5e-3,
        privacy="good",
        note="per channel; finer tables of a per-group quantizer stay frozen",
    ),
    "reft": MethodSpec(
        family="scale-shift",
        acts_on="hidden states between blocks",
        summary="LoReFT: the hidden states are edited inside a trained low-rank subspace",
        paper="Wu et al. 2024, arXiv 2404.03592",
        tensors={"rotation": "trained", "source": "trained"},
        average="group",
        note="linear while the rotation stands still; edits every token",
    ),
}
