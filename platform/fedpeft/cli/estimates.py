"""What `fedpeft central estimate` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedpeft.cli.output import emit, size, table

if TYPE_CHECKING:
    from fedpeft.central.estimate import Advice, Estimate, Plan, Room
    from fedpeft.training.config import CentralConfig


def show(config: CentralConfig, ranks: int, room: Room, as_json: bool) -> int:
    """Print all plans of ``config`` on ``ranks`` ranks and which to take; 1 when none fits. Raises `FedpeftError` as `estimated`."""
    from fedpeft.central.estimate import advise, estimated, plan_of, plans
    from fedpeft.central.zero import zero_of

    estimate = estimated(config, ranks)
    own = plan_of(estimate, zero_of(config, ranks))
    advice, found = advise(estimate, room), plans(estimate)
    if as_json:
        emit({"ranks": ranks, "job": _row(own, room), "plans": [_row(plan, room) for plan in found], "advice": _said(advice)})
    else:
        _print(estimate, own, found, room)
        if room.gpu is None:
            print("how much memory a GPU has is not known here, so it was not asked what fits; give --gpu-memory")
        print(_sentence(advice))
    return 0 if advice.plan else 1


def _print(estimate: Estimate, own: Plan, found: list[Plan], room: Room) -> None:
    title = f"one of {estimate.ranks} ranks, {estimate.tokens} tokens at most in a micro-batch, GiB"
    rows = [(f"this job: {own.name}", own), *((plan.name, plan) for plan in found)]
    table(title, ["plan", "GPU", "host", "disk", "fits"], [(name, *_cells(plan), _fits(plan, room)) for name, plan in rows])
    print("of this job's GPU memory: " + ", ".join(f"{name} {size(count)}" for name, count in own.device.items() if count))


def _fits(plan: Plan, room: Room) -> str | None:
    if room.holds(plan):
        return None if room.gpu is None else "yes"
    return "no"


def _cells(plan: Plan) -> tuple[float, float, float]:
    return plan.gpu / 2**30, plan.cpu / 2**30, plan.files / 2**30


def _row(plan: Plan, room: Room) -> dict[str, Any]:
    parts = {"device": plan.device, "host": plan.host, "disk": plan.disk}
    return {"plan": plan.name, "gpu": plan.gpu, "cpu": plan.cpu, "files": plan.files, "fits": room.holds(plan), **parts}


def _said(advice: Advice) -> dict[str, Any]:
    return {"plan": advice.plan and advice.plan.name, "settings": advice.settings, "reason": advice.reason}


def _sentence(advice: Advice) -> str:
    if advice.plan is None:
        return f"nothing fits: {advice.reason}"
    return "take " + ", ".join(f"{name} = {_toml(value)}" for name, value in advice.settings.items())


def _toml(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower()
