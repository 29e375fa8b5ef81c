"""Products of two factors, kept as factors: pairs of a layout's roles, the arithmetic of product space, truncation. No torch."""

from fedpeft.factors.pairs import Pair, pairs, products
from fedpeft.factors.products import Factor, Matrix, Product, difference, gram, inner, norm, scaled, stack
from fedpeft.factors.truncation import Truncated, share_lost, truncate

__all__ = [
    "Factor",
    "Matrix",
    "Pair",
    "Product",
    "Truncated",
    "difference",
    "gram",
    "inner",
    "norm",
    "pairs",
    "products",
    "scaled",
    "share_lost",
    "stack",
    "truncate",
]
