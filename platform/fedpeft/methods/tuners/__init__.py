"""Methods that peft has: one table row each (see README.md)."""

from fedpeft.methods.protocol import Method
from fedpeft.methods.spec import MethodSpec
from fedpeft.methods.tuners.additive import ADDITIVE
from fedpeft.methods.tuners.kind import tuner
from fedpeft.methods.tuners.lowrank import LOW_RANK
from fedpeft.methods.tuners.row import Row
from fedpeft.methods.tuners.structured import STRUCTURED
from fedpeft.methods.tuners.vectors import VECTORS

ROWS: dict[str, Row] = {**LOW_RANK, **VECTORS, **STRUCTURED, **ADDITIVE}
TUNERS: dict[str, type[Method]] = {kind: tuner(kind, row) for kind, row in ROWS.items()}
TUNER_SPECS: dict[str, MethodSpec] = {kind: row.spec for kind, row in ROWS.items()}

REFUSED: dict[str, str] = {
    "monteclora": "peft makes it a plain LoRA on a quantized base, and its loss has a term that the loop does not add; use lora",
    "kasa": "it rewrites the base at start, so that sites would no longer share one; use lora with start = 'pissa'",
    "bd-lora": "its blocks exist for one way of serving and it is a plain LoRA on a quantized base; use lora",
    "qa-lora": "it is a plain LoRA on every base but GPTQ, which is not offered; use lora",
    "alora": "it needs the positions of invocation tokens in every call, which training does not give; use lora",
}
"""What peft has and is not offered here, by name, with the reason and what to use."""

__all__ = ["REFUSED", "ROWS", "TUNERS", "TUNER_SPECS"]
