"""Laws of layouts and tensors, against float64 arithmetic by name."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedpeft.errors import AdapterError
from fedpeft.tensors import Entry, Layout, Tensors

ROLES = ("A", "B", "M", "bias", "head", "scale")
SHAPES = st.lists(st.integers(1, 4), min_size=0, max_size=3).map(tuple)
LAYOUTS = st.lists(st.tuples(st.sampled_from(ROLES), SHAPES), min_size=0, max_size=7).map(
    lambda rows: Layout.of([Entry(role, f"base_model.model.{place}.weight", shape) for place, (role, shape) in enumerate(rows)])
)
VALUES = st.floats(-1e3, 1e3, width=32)


@st.composite
def tensors(draw, count=1):
    layout = draw(LAYOUTS)
    return [Tensors(layout, draw(hnp.arrays(np.float32, layout.size, elements=VALUES))) for _ in range(count)]


@given(LAYOUTS, st.randoms())
def test_a_layout_does_not_depend_on_the_order_of_its_entries(layout, shuffle):
    entries = list(layout.entries)
    shuffle.shuffle(entries)
    assert Layout.of(entries) == layout
    assert Layout.of(entries).fingerprint == layout.fingerprint
    assert Layout.from_json(layout.to_json()) == layout


@given(LAYOUTS)
def test_spans_tile_the_vector_and_roles_are_contiguous(layout):
    covered = [place for span in layout.spans.values() for place in range(span.start, span.stop)]
    assert covered == list(range(layout.size))
    for role, span in layout.role_spans.items():
        inside = [layout.spans[entry.name] for entry in layout.entries if entry.role == role]
        assert (inside[0].start, inside[-1].stop) == (span.start, span.stop)
        assert sum(part.stop - part.start for part in inside) == span.stop - span.start


@given(LAYOUTS, LAYOUTS)
def test_fingerprints_are_equal_exactly_for_equal_layouts(left, right):
    assert (left.fingerprint == right.fingerprint) == (left == right)


@given(tensors(2))
def test_sums_and_differences_are_those_of_float64_up_to_one_rounding(pair):
    a, b = pair
    exact = a.flat.astype(np.float64) + b.flat.astype(np.float64)
    assert np.array_equal((a + b).flat, exact.astype(np.float32))
    assert np.array_equal((a + b).flat, (b + a).flat)
    scale = np.maximum(np.abs(a.flat), np.abs(b.flat)).astype(np.float64) + 1e-30
    assert (np.abs(((a + b) - b).flat.astype(np.float64) - a.flat) <= 4 * np.finfo(np.float32).eps * scale).all()
    assert a.norm() == pytest.approx(float(np.sqrt((a.flat.astype(np.float64) ** 2).sum())), rel=1e-12)


@given(tensors(2), st.sets(st.sampled_from(ROLES)))
def test_pick_and_patch(pair, roles):
    a, b = pair
    assert np.array_equal(a.patch(a.pick(roles)).flat, a.flat)
    mixed = a.patch(b.pick(roles)).named()
    for entry in a.layout.entries:
        source = b if entry.role in roles else a
        assert np.array_equal(mixed[entry.name], source.named()[entry.name])
    assert a.pick(roles).layout == a.layout.subset(roles)


@given(tensors())
def test_named_values_are_views_and_come_back(one):
    (a,) = one
    again = Tensors.from_named(a.layout, {name: np.array(value) for name, value in a.named().items()})
    assert np.array_equal(again.flat, a.flat)
    assert again.digest == a.digest
    assert all(np.shares_memory(view, a.flat) for view in a.named().values() if view.size)
    assert a.flat.tobytes() == np.concatenate([v.ravel() for v in a.named().values()] or [np.zeros(0, np.float32)]).tobytes()


@given(tensors(), st.data())
def test_the_digest_sees_every_bit(one, data):
    (a,) = one
    if not a.layout.size:
        return
    place = data.draw(st.integers(0, a.layout.size - 1))
    bits = a.flat.copy()
    bits.view(np.uint32)[place] ^= np.uint32(1 << data.draw(st.integers(0, 31)))
    assert Tensors(a.layout, bits).digest != a.digest


@pytest.fixture
def layout():
    return Layout.of([Entry("A", "q.lora_A.weight", (2, 3)), Entry("B", "q.lora_B.weight", (3, 2))])


def test_faults_name_what_is_wrong(layout):
    with pytest.raises(AdapterError, match=r"\['x'\] appear twice"):
        Layout.of([Entry("A", "x", (1,)), Entry("B", "x", (2,))])
    with pytest.raises(AdapterError, match=r"float64\[12\].*float32\[12\]"):
        Tensors(layout, np.zeros(12))
    with pytest.raises(AdapterError, match=r"missing \['q.lora_B.weight'\], unexpected \['v'\]"):
        Tensors.from_named(layout, {"q.lora_A.weight": np.zeros((2, 3)), "v": np.zeros(1)})
    with pytest.raises(AdapterError, match=r"q.lora_A.weight has shape \[3, 2\], the layout needs \[2, 3\]"):
        Tensors.from_named(layout, {"q.lora_A.weight": np.zeros((3, 2)), "q.lora_B.weight": np.zeros((3, 2))})
    other = Layout.of([Entry("A", "q.lora_A.weight", (2, 4))])
    with pytest.raises(AdapterError, match="not a subset"):
        Tensors.zeros(layout).patch(Tensors.zeros(other))
    with pytest.raises(AdapterError, match="different layouts"):
        Tensors.zeros(layout) + Tensors.zeros(other)


def test_finite_sees_nan_and_infinity(layout):
    for bad in (np.nan, np.inf, -np.inf):
        flat = np.zeros(layout.size, np.float32)
        flat[5] = bad
        assert not Tensors(layout, flat).finite
    assert Tensors.zeros(layout).finite
