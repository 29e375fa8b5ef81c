from __future__ import annotations

import subprocess
import sys

import pytest

from fedpeft.bases import BaseSpec, Fingerprint, HeadSpec
from fedpeft.errors import BaseError


def test_importing_bases_and_adapters_imports_no_torch() -> None:
    code = "import sys, fedpeft.bases, fedpeft.adapters; assert not {'torch', 'transformers', 'peft'} & set(sys.modules), 'heavy'"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: BaseSpec("m", "int4"), "int4"),  # type: ignore[arg-type]
        (lambda: BaseSpec("m", max_tokens=0), "max_tokens is 0"),
        (lambda: HeadSpec("regression"), "regression"),  # type: ignore[arg-type]
        (lambda: HeadSpec("classification", ("only",)), "two or more"),
        (lambda: HeadSpec("classification", ("a", "a")), "different"),
        (lambda: HeadSpec("lm", ("a",)), "no labels"),
    ],
)
def test_impossible_specs_are_refused(make: object, says: str) -> None:
    with pytest.raises(BaseError, match=says):
        make()  # type: ignore[operator]


def test_identity_leaves_quantization_out() -> None:
    full, small = Fingerprint("w", "t", "c", "none"), Fingerprint("w", "t", "c", "nf4")
    assert full.identity == small.identity
    assert len({full.identity, *(Fingerprint(*parts, "none").identity for parts in ("xtc", "wxc", "wtx"))}) == 4
