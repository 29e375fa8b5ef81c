"""Server optimizers against torch.optim where it has them, and against a float64 loop of the paper's formulas."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.errors import StorageError, UpdateError
from fedpeft.schemes import SERVER_OPTIMIZERS, SGD, Adagrad, Adam, Alternating, Momentum, Yogi, pack_state, unpack_state
from fedpeft.tensors import Tensors

ALL = [made() for made in SERVER_OPTIMIZERS.values()]


def oracle(optimizer, deltas):
    """The paper's algorithm 2 in float64, one coordinate vector; the steps."""
    m, v, steps = 0.0, None, []
    for d in deltas:
        d = d.astype(np.float64)
        if isinstance(optimizer, SGD):
            steps.append(optimizer.lr * d)
            continue
        if isinstance(optimizer, Momentum):
            m = optimizer.beta * m + d
            steps.append(optimizer.lr * m)
            continue
        v = np.full_like(d, optimizer.tau**2) if v is None else v
        m = optimizer.beta1 * m + (1 - optimizer.beta1) * d
        if isinstance(optimizer, Adam):
            v = optimizer.beta2 * v + (1 - optimizer.beta2) * d**2
        elif isinstance(optimizer, Yogi):
            v = v - (1 - optimizer.beta2) * d**2 * np.sign(v - d**2)
        else:
            v = v + d**2
        steps.append(optimizer.lr * m / (np.sqrt(v) + optimizer.tau))
    return steps


@pytest.mark.parametrize("optimizer", ALL, ids=lambda one: one.kind)
@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(1e-4, 10.0), rounds=st.integers(1, 12))
def test_steps_are_those_of_the_paper(optimizer, layouts, draw, seed, scale, rounds):
    rng, state = np.random.default_rng(seed), {}
    deltas = [draw(layouts["lora"], rng, scale) for _ in range(rounds)]
    for delta, wanted in zip(deltas, oracle(optimizer, [d.flat for d in deltas]), strict=True):
        step, state = optimizer.step(delta, state)
        np.testing.assert_allclose(step.flat, wanted, rtol=2e-4, atol=1e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("rounds", [1, 7])
def test_sgd_momentum_and_adagrad_are_torchs(layouts, draw, rounds):
    import torch

    rng = np.random.default_rng(3)
    deltas = [draw(layouts["lora"], rng, 0.1) for _ in range(rounds)]
    tau = 1e-3
    peers = {
        SGD(0.5): lambda p: torch.optim.SGD(p, lr=0.5),
        Momentum(0.5, 0.8): lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.8),
        Adagrad(0.05, 0.0, tau): lambda p: torch.optim.Adagrad(p, lr=0.05, eps=tau, initial_accumulator_value=tau**2),
    }
    for ours, make in peers.items():
        parameter = torch.nn.Parameter(torch.zeros(layouts["lora"].size))
        peer, current, state = make([parameter]), Tensors.zeros(layouts["lora"]), {}
        for delta in deltas:
            step, state = ours.step(delta, state)
            current = current + step
            parameter.grad = torch.from_numpy(-delta.flat)
            peer.step()
        np.testing.assert_allclose(current.flat, parameter.detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", ALL, ids=lambda one: one.kind)
def test_moments_move_only_in_their_roles_rounds(optimizer, layouts, draw):
    rng, scheme, layout = np.random.default_rng(0), Alternating(), layouts["lora"]
    current, state, seen = draw(layout, rng), {}, {}
    for round in range(1, 7):
        phase = scheme.phase(round, layout)
        before = {key: value.tobytes() for key, value in state.items()}
        mean = draw(layout.subset(phase.roles), rng, 0.01)
        current, state = scheme.advance(current, mean, phase, optimizer, state)
        for key, value in before.items():
            moved = state[key].tobytes() != value
            assert moved == (key.split(".")[0] in phase.roles)
        for role in phase.roles:
            seen.setdefault(role, []).append(mean.pick({role}).flat)
    for role, deltas in seen.items():
        alone = {}
        for delta in deltas:
            _, alone = optimizer.step(Tensors(layout.subset({role}), delta), alone)
        assert all(alone[key].tobytes() == state[key].tobytes() for key in alone)


@pytest.mark.parametrize("optimizer", ALL, ids=lambda one: one.kind)
def test_state_survives_a_restart_bit_for_bit(optimizer, layouts, draw):
    rng = np.random.default_rng(0)
    deltas = [draw(layouts["lora"], rng, 0.01) for _ in range(6)]
    straight: dict = {}
    resumed: dict = {}
    for delta in deltas:
        one, straight = optimizer.step(delta, straight)
        two, resumed = optimizer.step(delta, unpack_state(pack_state(resumed)))
        assert one.digest == two.digest
    assert pack_state(straight) == pack_state(dict(reversed(resumed.items())))


def test_inputs_are_not_mutated_and_foreign_state_is_refused(layouts, draw):
    delta = draw(layouts["lora"], np.random.default_rng(0))
    for optimizer in ALL:
        _, state = optimizer.step(delta, {})
        prints = delta.digest, pack_state(state)
        optimizer.step(delta, state)
        assert prints == (delta.digest, pack_state(state))
    with pytest.raises(UpdateError, match=r"optimizer state B.m: 3 values, this adapter has 25"):
        Adam().step(delta, {"B.m": np.zeros(3, np.float32)})
    with pytest.raises(StorageError, match="resume from an earlier round"):
        unpack_state(pack_state({"B.m": delta.flat})[:-7])


def test_sgd_with_lr_one_is_plain_averaging(layouts, draw):
    delta = draw(layouts["lora"], np.random.default_rng(0))
    assert SGD().step(delta, {})[0].digest == delta.digest
