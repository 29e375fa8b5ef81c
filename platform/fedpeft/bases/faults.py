"""What libraries raise for a model's files that they cannot use, and its first line."""

from __future__ import annotations

from safetensors import SafetensorError

FAULTS = (OSError, ValueError, RuntimeError, ImportError, KeyError, AttributeError, TypeError, MemoryError, SafetensorError)


def one_line(fault: BaseException) -> str:
    """The first line of a library's message, at most 200 characters."""
    lines = [line.strip() for line in str(fault).splitlines() if line.strip()]
    return (lines[0] if lines else type(fault).__name__)[:200]
