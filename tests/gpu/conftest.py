"""A rehearsal without a card computes as one does (`card`)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.gpu.card import REHEARSED, as_a_card
from tests.unit.mixtures.crowd import INTERPRETED, bf16_products_of_values

if REHEARSED:

    @pytest.fixture(scope="session", autouse=True)
    def _rehearsal() -> Iterator[None]:
        if INTERPRETED:
            bf16_products_of_values()
        with as_a_card():
            yield
