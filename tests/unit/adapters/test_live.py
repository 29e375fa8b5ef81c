from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.adapters import Adapter, AdapterSpec, attach, initial, make_spec
from fedpeft.bases import Base, HeadSpec, meta_base
from fedpeft.errors import AdapterError, BaseError
from fedpeft.methods import Lora
from fedpeft.methods.protocol import Method
from fedpeft.tensors import Tensors

Warm = Callable[..., Base]
Shaken = Callable[..., Adapter]
LABELS = HeadSpec("classification", ("a", "b", "c"))
Placed = tuple[Method, str, HeadSpec]


def photo(base: Base) -> dict[str, Any]:
    """Every bit of the base, its structure and its flags."""
    state: dict[str, Any] = {}
    for name, value in base.model.state_dict().items():
        plain = value.dequantize() if type(value) is not torch.Tensor and hasattr(value, "dequantize") else value
        state[name] = plain.clone()
    state["places"] = [(name, p.data_ptr()) for name, p in base.model.named_parameters() if type(p.data) is torch.Tensor]
    state["modules"] = [(name, id(module), module.training, len(module._forward_hooks)) for name, module in base.model.named_modules()]
    state["grads"] = [(name, p.requires_grad, p.grad) for name, p in base.model.named_parameters()]
    state["attributes"] = sorted(vars(base.model))
    return state


def same(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert list(one) == list(two)
    for key, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, two[key]), key
        else:
            assert value == two[key], key


def steps(live: Any, inputs: dict[str, Any], head: HeadSpec, count: int = 2) -> list[float]:
    """A few steps of plain gradient descent on the flat buffer."""
    labels = inputs["input_ids"] if head.kind == "lm" else torch.tensor([0, 2])
    losses = []
    live.model.train()
    for step in range(count):
        torch.manual_seed(step)
        loss = live.model(**inputs, labels=labels).loss
        live.grad.zero_()
        loss.backward()
        live.flat.add_(live.grad, alpha=-0.1)
        losses.append(loss.item())
    return losses


def test_attach_train_detach_leaves_the_base_bit_identical(warm: Warm, placed: Placed, inputs: dict[str, Any]) -> None:
    method, name, head = placed
    base = warm(name)
    before = photo(base)
    spec = make_spec("t", base, method, head)
    start = initial(base, spec, 1)
    with attach(base, spec) as live:
        live.load(start.tensors)
        steps(live, inputs, head)
        assert (live.read().flat != start.tensors.flat).any()
    same(before, photo(base))


def test_adapters_one_after_the_other_do_not_touch_each_other(warm: Warm, inputs: dict[str, Any]) -> None:
    """Interleaved training on one warm base equals training each alone."""
    from fedpeft.methods import METHODS

    base = warm("encoder")
    kinds = ("lora", "core", "ia3", "bitfit", "prompt", "prefix", "bottleneck")
    specs = {kind: make_spec(kind, base, METHODS[kind](), LABELS) for kind in kinds} | {"big": make_spec("big", base, Lora(r=16), LABELS)}
    held = {kind: initial(base, spec, 1).tensors for kind, spec in specs.items()}
    alone = {}
    for kind, spec in specs.items():
        with attach(base, spec) as live:
            live.load(held[kind])
            steps(live, inputs, LABELS, 1)
            steps(live, inputs, LABELS, 1)
            alone[kind] = live.read()
    for _ in range(2):
        for kind, spec in specs.items():
            with attach(base, spec) as live:
                live.load(held[kind])
                steps(live, inputs, LABELS, 1)
                held[kind] = live.read()
    for kind in specs:
        assert held[kind].flat.tobytes() == alone[kind].flat.tobytes(), kind


KINDS = ("bitfit", "bottleneck", "core", "dora", "ia3", "lora", "prefix", "prompt", "rslora")


def is_quick(kind: str, place: str, quantization: str) -> bool:
    """One causal head beside the encoder's in nf4, encoders in the 8-bit forms, and LoRA everywhere.

    bf16 and fp16 hold no state of their own: that each method trains on them is in the catalogue's tests.
    """
    if quantization in ("bf16", "fp16"):
        return False
    return place == "encoder" or kind == "lora" or (quantization == "nf4" and place == "causal-lm")


QUANTIZED = [
    pytest.param(f"{kind}:{place}", quantization, marks=() if is_quick(kind, place, quantization) else pytest.mark.slow)
    for kind in KINDS
    for place in ("encoder", "causal-classes", "causal-lm")
    for quantization in ("nf4", "int8", "ao-int8", "bf16", "fp16")
    if (kind, place) != ("prompt", "causal-classes")
]


@pytest.mark.parametrize(("placed", "quantization"), QUANTIZED, indirect=["placed"])
def test_quantized_bases_train_every_tensor_and_stay_as_they_were(
    warm: Warm, placed: Placed, inputs: dict[str, Any], quantization: str
) -> None:
    method, name, head = placed
    base = warm(name, quantization)
    with torch.no_grad():
        base.trunk(**inputs)  # int8 settles its state at the first forward
    before = photo(base)
    spec = make_spec("t", base, method, head)
    start = initial(base, spec, 1)
    with attach(base, spec) as live:
        live.load(start.tensors)
        with torch.no_grad():
            live.model.eval()(**inputs)
        losses = steps(live, inputs, head, 3)
        silent = [entry.name for entry in spec.layout.entries if not live.grad[spec.layout.spans[entry.name]].any()]
    assert np.isfinite(losses).all()
    assert silent == []
    same(before, photo(base))


def test_everything_is_a_view_of_two_buffers(warm: Warm, method: Method, inputs: dict[str, Any], shaken: Shaken) -> None:
    base = warm("encoder")
    spec = make_spec("t", base, method, LABELS)
    with attach(base, spec) as live:
        live.load(shaken(spec).tensors)
        live.model(**inputs, labels=torch.tensor([0, 1])).loss.backward()
        for entry in spec.layout.entries:
            span, parameter = spec.layout.spans[entry.name], live.parameters[entry.name]
            assert parameter.data_ptr() == live.flat[span].data_ptr()
            assert parameter.grad is not None
            assert parameter.grad.data_ptr() == live.grad[span].data_ptr()
            assert tuple(parameter.shape) == entry.shape
        trained = {id(p) for p in live.model.parameters() if p.requires_grad}
        assert trained == {id(p) for p in live.parameters.values()}
        once = live.grad.clone()
        live.model(**inputs, labels=torch.tensor([0, 1])).loss.backward()
        torch.testing.assert_close(live.grad, 2 * once, rtol=1e-4, atol=1e-6)


def test_gradients_are_those_of_finite_differences(warm: Warm, lora: Method, inputs: dict[str, Any], shaken: Shaken) -> None:
    base = warm("encoder")
    spec = make_spec("t", base, lora, LABELS)
    with attach(base, spec) as live:
        start = shaken(spec).tensors
        live.load(start)

        def loss() -> torch.Tensor:
            return torch.nn.functional.cross_entropy(live.model(**inputs).logits.double(), torch.tensor([0, 1]))

        loss().backward()
        direction = torch.randn(live.flat.shape, generator=torch.Generator().manual_seed(0))
        direction /= direction.norm()
        with torch.no_grad():
            live.flat.add_(direction, alpha=1e-2)
            up = loss()
            live.flat.add_(direction, alpha=-2e-2)
            slope = (up - loss()) / 2e-2
    assert slope.item() == pytest.approx((live.grad @ direction).item(), rel=2e-2, abs=1e-4)


def test_read_gives_back_every_bit_that_was_loaded(warm: Warm, lora: Method) -> None:
    base = warm("encoder")
    spec = make_spec("t", base, dataclasses.replace(lora, r=1, targets=("query",)), HeadSpec("classification", ("a", "b")))  # type: ignore[type-var]
    size = 4 * spec.layout.size
    with attach(base, spec) as live:

        @given(st.binary(min_size=size, max_size=size))
        def holds(bits: bytes) -> None:
            live.load(Tensors(spec.layout, np.frombuffer(bits, np.float32)))
            found = live.read()
            live.flat.zero_()
            assert found.flat.tobytes() == bits

        holds()


def test_only_the_named_roles_get_gradients(warm: Warm, lora: Method, inputs: dict[str, Any], shaken: Shaken) -> None:
    base = warm("encoder")
    spec = make_spec("t", base, lora, LABELS)
    with attach(base, spec) as live:
        live.load(shaken(spec).tensors)
        for roles in ({"A"}, {"B", "head"}, set(spec.layout.roles)):
            live.model(**inputs, labels=torch.tensor([0, 1])).loss.backward()
            live.train_roles(roles)
            assert not live.grad.any()
            live.model(**inputs, labels=torch.tensor([0, 1])).loss.backward()
            moved = {role for role, span in spec.layout.role_spans.items() if live.grad[span].any()}
            assert moved == roles
        with pytest.raises(AdapterError, match=r"no roles \['core'\]; its roles are"):
            live.train_roles({"core"})


def test_one_adapter_at_a_time(warm: Warm, lora: Method) -> None:
    base = warm("encoder")
    spec = make_spec("mail", base, lora, LABELS)
    with attach(base, spec):
        for work in (lambda: attach(base, spec), lambda: base.embed(["w1"]), lambda: base.shell(LABELS)):
            with pytest.raises(BaseError, match="carries the adapter of task 'mail'"):
                work()
    assert base.embed(["w1"]).shape == (1, 64)


def test_embeddings_are_the_same_before_and_after(warm: Warm, method: Method, inputs: dict[str, Any], shaken: Shaken) -> None:
    base = warm("encoder")
    before = base.embed(["w1 w2 w3", "w4"])
    spec = make_spec("t", base, method, LABELS)
    with attach(base, spec) as live:
        live.load(shaken(spec).tensors)
        steps(live, inputs, LABELS)
    assert np.array_equal(base.embed(["w1 w2 w3", "w4"]), before)


def test_a_fault_inside_the_block_detaches_too(warm: Warm, lora: Method) -> None:
    base = warm("encoder")
    before = photo(base)
    spec = make_spec("t", base, lora, LABELS)
    live = attach(base, spec)
    with pytest.raises(ZeroDivisionError), live:
        1 / (live.model.train() is None)
    live.detach()
    same(before, photo(base))


def test_a_spec_that_does_not_fit_is_refused_and_nothing_stays(warm: Warm, lora: Method) -> None:
    base = warm("encoder")
    before = photo(base)
    spec = make_spec("t", base, lora, LABELS)
    wrong: list[tuple[AdapterSpec, str]] = [
        (dataclasses.replace(spec, base="0" * 64), "load the base that the adapter names"),
        (dataclasses.replace(spec, method=Lora(r=5, targets=("all",))), "shapes or roles differ"),
        (dataclasses.replace(spec, method=Lora(r=4, targets=("mlp",))), "that the model lacks"),
        (dataclasses.replace(spec, method=Lora(r=4, targets=("nowhere",))), "selects no linear layer"),
    ]
    for bad, says in wrong:
        with pytest.raises(AdapterError, match=says):
            attach(base, bad)
    same(before, photo(base))


def test_a_meta_base_and_foreign_tensors_are_refused(warm: Warm, lora: Method) -> None:
    base = warm("encoder")
    spec = make_spec("t", base, lora, LABELS)
    with pytest.raises(AdapterError, match="without weights"):
        attach(meta_base(base.spec), spec)
    with attach(base, spec) as live, pytest.raises(AdapterError, match="another layout"):
        live.load(Tensors.zeros(spec.layout.subset({"A"})))
