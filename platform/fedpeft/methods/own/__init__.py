"""Methods that peft lacks: modules of our own around the frozen layers (see README.md)."""

from fedpeft.methods.own.bottlenecks import Houlsby, Parallel, Pfeiffer
from fedpeft.methods.own.compacter import Compacter
from fedpeft.methods.own.facts import OWN_SPECS
from fedpeft.methods.own.ladder import Lst
from fedpeft.methods.own.reft import Reft
from fedpeft.methods.own.scales import Peqa, Ssf
from fedpeft.methods.own.sparse import SparseFisher, SparseLottery, SparseMagnitude, SparseSeed
from fedpeft.methods.own.visual import Vpt
from fedpeft.methods.protocol import Method

OWN: dict[str, type[Method]] = {
    "houlsby": Houlsby,
    "pfeiffer": Pfeiffer,
    "parallel": Parallel,
    "compacter": Compacter,
    "ssf": Ssf,
    "peqa": Peqa,
    "reft": Reft,
    "sparse-magnitude": SparseMagnitude,
    "sparse-seed": SparseSeed,
    "sparse-fisher": SparseFisher,
    "sparse-lottery": SparseLottery,
    "lst": Lst,
    "vpt": Vpt,
}

__all__ = ["OWN", "OWN_SPECS"]
