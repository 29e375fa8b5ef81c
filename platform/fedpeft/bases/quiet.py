"""Keep the libraries' chatter off the user's terminal: load reports, progress bars, notes on kernels nobody asked for."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

# On import torchao and bitsandbytes list the GPU kernels they lack; bitsandbytes' int8 notes every call's cast to fp16.
NOISY = ("torchao", "bitsandbytes", "torch.utils._pytree")


def hush() -> None:
    """Let the noisy libraries report errors only; call it before they are imported."""
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No load report and no progress bar inside the block; errors still show."""
    from transformers.utils import logging as library

    level, bars = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity_error()
    library.disable_progress_bar()
    try:
        yield
    finally:
        library.set_verbosity(level)
        if bars:
            library.enable_progress_bar()
