"""Products of two factors, kept as factors: pairs of a layout's roles, and the arithmetic of product space. No torch."""

from fedpeft.factors.pairs import Pair, pairs, products
from fedpeft.factors.products import Factor, Matrix, Product, difference, gram, inner, norm, scaled, stack

__all__ = ["Factor", "Matrix", "Pair", "Product", "difference", "gram", "inner", "norm", "pairs", "products", "scaled", "stack"]
