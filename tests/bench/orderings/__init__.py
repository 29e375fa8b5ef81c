"""Orderings of published tables, repeated in small on real data (see README.md)."""
