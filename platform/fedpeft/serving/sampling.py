"""The next token of a row from its logits: greedy, or drawn by temperature and nucleus from the row's own generator.

A row's draw depends on its logits, its settings and its own generator alone, never on the rows beside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedpeft.serving.requests import Sampling, Token

Row = NDArray[np.float32]
Wide = NDArray[np.float64]


class Sampler:
    """Chooses one request's tokens and remembers what it chose."""

    def __init__(self, settings: Sampling) -> None:
        self.settings = settings
        self.counts: Counter[int] = Counter()
        self._generator = np.random.default_rng(settings.seed)

    def choose(self, logits: Row, likeliest: int) -> Token:
        """The next token from ``logits`` (V,), whose largest entry is at ``likeliest``."""
        settings = self.settings
        if settings.plain:
            return Token(likeliest)
        values = adjusted(logits, settings, self.counts)
        chosen = int(values.argmax()) if settings.temperature == 0.0 else self._draw(values)
        self.counts[chosen] += 1
        return Token(chosen) if settings.top_logprobs is None else _reported(values, chosen, settings.top_logprobs)

    def _draw(self, values: Wide) -> int:
        shares = nucleus(values / self.settings.temperature, self.settings.top_p)
        place = int(np.searchsorted(shares.cumsum(), self._generator.random(), side="right"))
        return min(place, int(np.flatnonzero(shares)[-1]))


def adjusted(logits: Row, settings: Sampling, counts: Mapping[int, int]) -> Wide:
    """Logits in float64 after bias and penalties, as the OpenAI API defines them: minus count x frequency, minus presence once."""
    values = logits.astype(np.float64)
    for token, bias in settings.logit_bias.items():
        values[token] += bias
    for token, count in counts.items():
        values[token] -= count * settings.frequency_penalty + settings.presence_penalty
    return values


def nucleus(values: Wide, top_p: float) -> Wide:
    """Probabilities (V,) of the smallest set of likeliest tokens that holds ``top_p`` of the mass (Holtzman et al. 2020), renormalised."""
    shares = np.exp(values - values.max())
    shares /= shares.sum()
    if top_p >= 1.0:
        return np.asarray(shares)
    order = np.argsort(-shares, kind="stable")
    before = shares[order].cumsum() - shares[order]
    shares[order[(before >= top_p) & (np.arange(len(order)) > 0)]] = 0.0
    kept: Wide = shares / shares.sum()
    return kept


def _reported(values: Wide, chosen: int, top: int) -> Token:
    logs = values - values.max()
    logs -= np.log(np.exp(logs).sum())
    best = np.argsort(-logs, kind="stable")[:top].tolist()
    return Token(chosen, float(logs[chosen]), tuple((int(place), float(logs[place])) for place in best))
