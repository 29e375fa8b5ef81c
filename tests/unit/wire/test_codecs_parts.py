"""What codecs are made of, the byte budget, and codecs by name."""

from __future__ import annotations

import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.config import build, describe
from fedpeft.errors import ConfigError, UpdateError
from fedpeft.wire.codecs import CODECS, Plain, choose, digits, entropy, frames, scales, seed_of
from fedpeft.wire.codecs.budget import FREE, MASKED

few = settings(max_examples=15)


def test_a_deflate_bomb_unpacks_no_further_than_what_is_expected():
    packer = zlib.compressobj(9, zlib.DEFLATED, entropy.RAW)
    bomb = entropy.HUFFMAN + packer.compress(bytes(1 << 24)) + packer.flush()
    tracemalloc.start()
    with pytest.raises(UpdateError, match="do not end"):
        entropy.expand(bomb, 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 18


@given(st.binary(max_size=3000))
@few
def test_squeeze_round_trips_and_never_grows_by_more_than_a_byte(data):
    symbols = np.frombuffer(data, np.uint8)
    packed = entropy.squeeze(symbols)
    assert len(packed) <= symbols.size + 1
    np.testing.assert_array_equal(entropy.expand(packed, symbols.size), symbols)


def test_squeeze_is_within_three_percent_of_the_entropy_of_int4_pairs():
    codes = np.clip(np.rint(np.random.default_rng(0).normal(0, 1.6, 400_000)), -7, 7) + 7
    shares = np.bincount(codes.astype(int), minlength=15) / codes.size
    bound = -np.sum(shares[shares > 0] * np.log2(shares[shares > 0])) * codes.size / 8
    assert len(entropy.squeeze(digits.pack(codes.astype(np.uint8), 15))) < 1.03 * bound


@given(base=st.sampled_from([3, 7, 15, 16, 255]), count=st.integers(0, 300), seed=st.integers(0, 99))
@few
def test_digits_round_trip_and_refuse_what_no_digits_make(base, count, seed):
    values = np.random.default_rng(seed).integers(0, base, count).astype(np.uint8)
    packed = digits.pack(values, base)
    assert packed.size == -(-count // digits.per_byte(base))
    np.testing.assert_array_equal(digits.unpack(packed, base, count), values)
    if count and base ** digits.per_byte(base) < 256:
        with pytest.raises(UpdateError, match="digits"):
            digits.unpack(np.full_like(packed, 255), base, count)


@given(st.lists(st.binary(max_size=20), max_size=4))
@few
def test_frames_round_trip(parts):
    message = frames.join(*parts)
    assert [bytes(part) for part in frames.split(message, len(parts))] == parts
    with pytest.raises(UpdateError):
        frames.split(message, len(parts) + 1)


@pytest.mark.parametrize("top", [float("nan"), float("inf"), -1.0])
def test_scales_that_are_not_sizes_are_refused(top):
    message = frames.join(np.float32(top).tobytes(), entropy.squeeze(np.zeros(3, np.uint8)))
    with pytest.raises(UpdateError, match="finite and not negative"):
        scales.unpack(message, 3)


@given(size=st.integers(1, 10**7), sites=st.integers(1, 2**15), masked=st.booleans(), factor=st.floats(1e-4, 5))
@few
def test_a_budget_gets_the_first_codec_that_surely_fits(size, sites, masked, factor):
    budget = int(size * factor)
    ladder = MASKED if masked else FREE
    fits = [codec for codec in ladder if codec.most(size, sites) <= budget]
    if not fits:
        with pytest.raises(ConfigError, match=ladder[-1].kind):
            choose(budget, size, masked, sites)
        return
    chosen = choose(budget, size, masked, sites)
    assert chosen == fits[0]
    assert chosen.masked or not masked


def test_budgets_by_name():
    size = 1_000_000
    assert [choose(budget, size, False).kind for budget in (4_000_000, 2_100_000, 1_100_000, 600_000, 250_000, 150_000, 60_000)] == [
        "none",
        "bf16",
        "int8",
        "int4",
        "int2",
        "onebit",
        "topk",
    ]
    assert choose(4_000_000, size, True, 10) == Plain()
    assert choose(1_500_000, size, True, 10).most(size, 10) <= 1_500_000
    with pytest.raises(ConfigError, match="secure aggregation off"):
        choose(100, size, True, 10)


def test_ladders_go_from_more_bytes_to_fewer():
    for ladder in (FREE, MASKED):
        sizes = [codec.most(1_000_000, 8) for codec in ladder]
        assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("kind", sorted(CODECS))
def test_every_codec_is_built_from_its_name_and_described(kind):
    codec = build(CODECS, kind, "codec")
    assert codec.kind == kind
    assert build(CODECS, describe(codec), "codec") == codec


@pytest.mark.parametrize(
    "table",
    [{"kind": "int4", "block": 2}, {"kind": "topk", "fraction": 0.0}, {"kind": "ring", "bits": 40}, {"kind": "int4", "bits": 4}],
)
def test_settings_out_of_range_are_refused(table):
    with pytest.raises(ValueError, match=table["kind"]):
        build(CODECS, table, "codec")


def test_seeds_differ_by_every_name_and_repeat():
    names = [("run", 1, "area"), ("run", 1, "are", "a"), ("run1", "area"), ("run", 11, "area"), ("run", 1, "site")]
    assert len({seed_of(*parts) for parts in names}) == len(names)
    assert seed_of(*names[0]) == seed_of(*names[0])
