"""The control plane: a far registry, router and federation over gRPC (see README.md)."""

from __future__ import annotations
