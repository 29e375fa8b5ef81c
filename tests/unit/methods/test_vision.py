"""Methods on models of images: those of tokens say so, and what does not run on a model is named when it is put on."""

from __future__ import annotations

import pytest

from fedpeft.adapters import attach, make_spec
from fedpeft.bases import BaseSpec, HeadSpec, load_base
from fedpeft.config import build
from fedpeft.errors import AdapterError
from fedpeft.methods import METHODS

HEAD = HeadSpec("classification", ("a", "b", "c"))
TOKENS = ("prompt", "p-tuning", "mpt", "attempt", "multitask-prompt", "cpt", "trainable-tokens")


@pytest.mark.parametrize("kind", [*TOKENS, "prefix", "cartridge", "llama-adapter"])
def test_methods_of_tokens_are_refused_by_name(make, kind):
    method = build(METHODS, {"kind": kind}, "method")
    says = "reads images, and this method works on tokens; use vpt" if kind in TOKENS else "takes no past_key_values|not for vit"
    with pytest.raises(AdapterError, match=says) as caught:
        method.attach(make("vit"), HEAD)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "model", "says"),
    [
        ("vpt", "Beit", "vpt: does not run on BeitForImageClassification"),
        ("vpt", "Swin", "vpt: SwinForImageClassification works in stages, where tokens have places"),
        ("unipelt", "Swin", r"has stages with \[2, 4\] heads"),
        ("xlora", "Swin", "xlora: does not run on SwinForImageClassification"),
        ("xlora", "ConvNext", "has no one hidden size"),
        ("reft", "ConvNext", "reft: does not run on ConvNextForImageClassification"),
    ],
)
def test_what_does_not_run_on_windows_and_maps_is_named(vision_folder, kind, model, says):
    base = load_base(BaseSpec(str(vision_folder(model))), "cpu")
    table = {"kind": kind} | ({"targets": ["all"]} if kind == "xlora" else {})
    with pytest.raises(AdapterError, match=says):
        attach(base, make_spec("t", base, build(METHODS, table, "method"), HEAD))
    base.shell(HEAD)  # nothing is left on it
    attach(base, make_spec("t", base, METHODS["bottleneck"](), HEAD))
