"""Keep the libraries' chatter off the user's terminal and their compilers out of the start of every process."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# On import torchao and bitsandbytes list the GPU kernels they lack; bitsandbytes' int8 notes every call's cast to fp16.
NOISY = ("torchao", "bitsandbytes", "torch.utils._pytree")

# transformers imports DeepSpeed where it is installed; that sets its own logger's level, and warns where there is no GPU.
DEEPSPEED = "DeepSpeed"


def hush() -> None:
    """Let the noisy libraries report errors only, and import bitsandbytes without a compiler; call it before they are imported.

    peft imports bitsandbytes whatever the base, and that decorates four functions with `torch.compile` on import: a second of every
    start, in which all of inductor is loaded for kernels that CPU and CUDA have in a library. They are compiled when they are called.
    """
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger(DEEPSPEED).addFilter(_errors)
    if "bitsandbytes" not in sys.modules:
        import torch

        now, torch.compile = torch.compile, later  # type: ignore[assignment]
        try:
            import bitsandbytes  # noqa: F401
        finally:
            torch.compile = now


def _errors(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def later(function: Callable[..., Any] | None = None, **settings: Any) -> Callable[..., Any]:
    """`torch.compile`, which this stands in for, on the first call."""
    import torch

    if function is None:
        return functools.partial(later, **settings)
    compiled = functools.cache(lambda: torch.compile(function, **settings))

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        return compiled()(*arguments, **named)

    return call


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
