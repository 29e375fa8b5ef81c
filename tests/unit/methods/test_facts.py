"""What the facts of a method promise of a scheme, the scheme claims of that method's layout."""

from __future__ import annotations

import pytest

from fedpeft.methods import METHODS, SPECS, Lora
from fedpeft.schemes import SCHEMES
from fedpeft.tensors import Entry, Layout

EXACT = [(kind, scheme) for kind, spec in SPECS.items() for scheme in spec.exact_with]


@pytest.mark.parametrize(("kind", "scheme"), EXACT)
def test_a_scheme_named_exact_claims_it_for_the_layout(kind, scheme, make):
    method = Lora(r=2, extra=2) if scheme == "feddpa" else METHODS[kind]()
    model = make("bert").to("meta")
    live = method.attach(model, _head())
    layout = Layout.of([Entry(role, name, tuple(p.shape)) for name, (role, p) in method.entries(live).items()])
    rule = SCHEMES[scheme]()
    rule.check(layout)
    assert rule.exact(layout)


def _head():
    from fedpeft.bases.spec import HeadSpec

    return HeadSpec("classification", ("a", "b", "c"))
