"""The noise of a bootstrap, as an error of what a look-up reads."""

from __future__ import annotations

from statistics import NormalDist

__all__ = ["lookup_variance", "noise_in_slots", "p_error_of"]


def noise_in_slots(p_error: float) -> float:
    """Return the deviation of a bootstrap's noise in slots: half a slot is passed with p_error.

    The noise is normal, and parameters are chosen so that the noisiest look-up of a circuit just
    keeps to `p_error` (Bergerat et al. 2023, "Parameter optimization and larger precision for
    (T)FHE", section 2.4).
    """
    return 0.5 / NormalDist().inv_cdf(1 - p_error / 2)


def p_error_of(deviation: float) -> float:
    """Return the probability that noise of some deviation, in slots, passes half a slot."""
    return 2 * (1 - NormalDist(sigma=deviation).cdf(0.5))


def lookup_variance(bits: int, p_error: float) -> float:
    """Return the variance of what a look-up reads, rounding and noise, in squared ranges.

    Args:
        bits: input width; a range has 2**bits slots.
        p_error: probability that it reads another slot; 0 for rounding alone.
    """
    noise = noise_in_slots(p_error) if p_error else 0.0
    return (1 / 12 + noise * noise) * 4.0**-bits
