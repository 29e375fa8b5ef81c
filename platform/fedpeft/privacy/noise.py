"""Where noise comes from: a keystream that nobody can predict, and nothing else."""

from __future__ import annotations

import os
from typing import Any, NoReturn

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from fedpeft.errors import PrivacyError
from fedpeft.privacy import gaussians
from fedpeft.privacy.gaussians import Integers

BLOCK = 1 << 15
"""Words made at once: 256 KiB stay in the cache."""
FINE = 2.0**26
"""Steps in one standard deviation of `SecureNoise.gaussian`."""
_ZEROS = bytes(8 * BLOCK)


class SecureNoise:
    """Noise from an AES-256-CTR keystream whose key is the operating system's entropy, drawn anew in every process.

    There is no seed: what it gave cannot be repeated, copied or stored. It is no thread's to share.
    """

    def __init__(self) -> None:
        self._process = -1
        self._fill()

    def words(self, size: int) -> NDArray[np.uint64]:
        """Uniform 64-bit words (size,)."""
        if self._process != os.getpid():
            self._fill()
        out = np.empty(size, np.uint64)
        view = memoryview(out.view(np.uint8))  # type: ignore[arg-type]
        for start in range(0, 8 * size, 8 * BLOCK):
            self._stream.update_into(_ZEROS[: min(8 * BLOCK, 8 * size - start)], view[start:])
        return out

    def discrete(self, size: int, sigma: float) -> Integers:
        """Discrete Gaussian integers (size,), exact (see `gaussians`). Raises `PrivacyError` on an impossible sigma."""
        return gaussians.discrete(self.words, size, sigma)

    def rounded(self, size: int, sigma: float) -> Integers:
        """Integers (size,): N(0, sigma^2) rounded to the nearest, exact. Raises `PrivacyError` on an impossible sigma."""
        return gaussians.rounded(self.words, size, sigma)

    def gaussian(self, size: int, sigma: float = 1.0) -> NDArray[np.float64]:
        """Values (size,) of N(0, sigma^2) in float64, rounded to sigma / 2^26."""
        return np.multiply(self.rounded(size, FINE), sigma / FINE, dtype=np.float64)

    def chosen(self, size: int, rate: float) -> NDArray[np.bool_]:
        """Which of ``size`` take part when each does by itself with probability ``rate`` (Poisson sampling)."""
        return self.words(size) < np.uint64(min(int(rate * 2.0**64), 2**64 - 1)) if rate < 1.0 else np.ones(size, bool)

    def _fill(self) -> None:
        self._process = os.getpid()
        self._stream = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(os.urandom(16))).encryptor()

    def __reduce__(self) -> NoReturn:
        raise PrivacyError("noise: a source of noise cannot be copied or stored; make a new one")


def check_secure(source: Any) -> SecureNoise:
    """``source`` itself. Raises `PrivacyError` unless it is a `SecureNoise`, and no kind of one."""
    if type(source) is not SecureNoise:
        raise PrivacyError(f"noise: drawn from {type(source).__name__}; what is released takes SecureNoise, which has no seed")
    return source
