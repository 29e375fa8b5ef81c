"""`[privacy]` of federation.toml: what it cannot be combined with is refused by both names, and editors are told what it takes."""

from __future__ import annotations

from typing import Any

import pytest

from fedpeft import config
from fedpeft.config import describe
from fedpeft.errors import ConfigError
from fedpeft.privacy.settings import Central, Distributed, Example
from fedpeft.tensors import Entry, Layout
from fedpeft_coordinator.build import facts, renewed, secure
from fedpeft_coordinator.config import FederationConfig
from fedpeft_coordinator.fitting import check_fit
from fedpeft_coordinator.private_rules import settings_of

MINIMAL = {"name": "f", "tasks": {"t": {"kind": "classification", "labels": ["a", "b"]}}}
CENTRAL, DISTRIBUTED, EXAMPLE = ({"kind": kind, "epsilon": 8.0} for kind in ("central", "distributed", "example"))
MASKED = {"cohort": {"min_sites": 3}}
CLEAR = {**MASKED, "secure_aggregation": {"enabled": False}}
LAYOUT = Layout.of([Entry("A", "x.lora_A", (2, 5)), Entry("B", "x.lora_B", (5, 2)), Entry("head", "head", (3,))])


def load(**changes: Any) -> FederationConfig:
    return config.parse({**MINIMAL, **changes}, FederationConfig, "f.toml")


def test_what_can_hold_loads() -> None:
    assert settings_of(load()) is None
    assert settings_of(load(privacy=CENTRAL)) == Central(8.0)
    assert settings_of(load(privacy=EXAMPLE, scheme="fedavg", combine="median", **CLEAR)) == Example(8.0)
    masked = load(privacy=DISTRIBUTED, **MASKED)
    assert settings_of(masked) == Distributed(8.0, colluding=0.1)
    assert secure(masked).full
    assert secure(masked).fewest(100) == 80
    assert not secure(load(**MASKED)).full
    load(privacy=CENTRAL, wire={"codec": {"kind": "ring", "bits": 16}}, **MASKED)


CLASHES: dict[str, tuple[dict[str, Any], str]] = {
    "rule": ({"privacy": CENTRAL, **CLEAR, "combine": "median"}, r"combine\.kind = 'median' and privacy\.kind = 'central'"),
    "parts": ({"privacy": CENTRAL, "scheme": "fedex", "cohort": {"min_sites": 2}}, r"scheme\.kind = 'fedex' and privacy\.kind = 'central'"),
    "masks": ({"privacy": DISTRIBUTED}, r"privacy\.kind = 'distributed' and secure_aggregation\.enabled = 'auto', cohort\.min_sites = 1"),
    "known": ({"privacy": {**CENTRAL, "rate": 0.5}, **MASKED}, r"privacy\.rate = 0\.5 and secure aggregation"),
    "public": ({"privacy": {**CENTRAL, "rate": 0.5}, "cohort": {"fraction": 0.5}}, r"privacy\.rate = 0\.5 and cohort\.fraction = 0\.5"),
    "scales": ({"privacy": CENTRAL, "wire": {"codec": "nf4"}}, r"wire\.codec = 'nf4'.* and privacy\.kind = 'central'"),
    "budget": ({"privacy": CENTRAL, "wire": {"budget": 10_000}}, r"wire\.budget = 10000 and privacy\.kind"),
    "scores": ({"privacy": CENTRAL, "evaluate_every": 2}, r"evaluate_every = 2 and privacy\.evaluation = 0"),
    "rows": ({"privacy": EXAMPLE, "evaluate_every": 2}, r"evaluate_every = 2 and privacy\.kind = 'example'"),
    "nothing": ({"privacy": {**CENTRAL, "evaluation": 4.0}}, r"privacy\.evaluation = 4 and privacy\.counters = \[\]"),
    "unpaid": ({"privacy": {**CENTRAL, "counters": {"adapter.tp": 9}}}, r"privacy\.counters \['adapter\.tp'\] and privacy\.evaluation = 0"),
    "unknown": ({"privacy": {**CENTRAL, "counters": {"adapter.tq": 9}}}, r"\['adapter\.tq'\] are counters of no task"),
    "gates": ({"privacy": EXAMPLE, "routing": {"gates": True}}, r"routing\.gates = true and privacy\.kind = 'example'"),
    "kind": ({"privacy": {"kind": "local", "epsilon": 1}}, r"unknown kind 'local'; known kinds are \['central', .*'none'\]"),
    "key": ({"privacy": {**DISTRIBUTED, "rate": 0.5}}, r"unknown keys \['rate'\]"),
    "number": ({"privacy": {**CENTRAL, "epsilon": -1}}, r"central\.epsilon"),
}  # fmt: skip


@pytest.mark.parametrize("clash", CLASHES)
def test_a_clash_names_both_settings(clash: str) -> None:
    changes, words = CLASHES[clash]
    with pytest.raises(ConfigError, match=words):
        load(**changes)


@pytest.mark.parametrize("scheme", ["fedavg", "scaffold"])
def test_noise_on_two_factors_or_beside_controls_is_refused(scheme: str) -> None:
    with pytest.raises(ConfigError, match=rf"scheme(\.kind = )?'?.?'?{scheme}"):
        check_fit(load(privacy=CENTRAL, scheme=scheme), LAYOUT)
    check_fit(load(privacy=EXAMPLE, scheme=scheme), LAYOUT)


@pytest.mark.parametrize("scheme", ["alternating", "ffa", "fedsb"])
def test_schemes_of_one_free_factor_may_be_noised(scheme: str) -> None:
    layout = LAYOUT if scheme != "fedsb" else Layout.of([*LAYOUT.entries, Entry("R", "x.lora_R", (2, 2))])
    check_fit(load(privacy=CENTRAL, scheme=scheme), layout)


def test_a_budget_may_be_raised_later_and_nothing_else() -> None:
    tasks = {"t": {"kind": "classification", "labels": ["a", "b"], "name": "t"}}
    known = facts(load(privacy=CENTRAL), "id", tasks)
    assert known == facts(load(privacy={**CENTRAL, "epsilon": 9.0}), "id", tasks)
    assert known["privacy"] == renewed(known)["privacy"]
    assert known != facts(load(privacy={**CENTRAL, "clip": 2.0}), "id", tasks)
    assert "privacy" not in facts(load(), "id", tasks)
    assert renewed({**known, "privacy": {"kind": "central", "epsilon": 1.0}})["privacy"] == describe(Central(1.0))


def test_editors_are_told_every_kind() -> None:
    told = FederationConfig.model_json_schema()["properties"]["privacy"]["oneOf"]
    kinds = {one["properties"]["kind"]["const"]: one for one in told if "properties" in one}
    assert set(kinds) == {"none", "central", "distributed", "example"}
    assert {"epsilon", "clip", "quantile", "rate", "evaluation"} <= set(kinds["central"]["properties"])
    assert kinds["example"]["required"] == ["kind", "epsilon"]
