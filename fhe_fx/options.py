"""Every knob of the compiler, in frozen dataclasses that refuse bad values when built."""

from __future__ import annotations

from dataclasses import dataclass

from fhe_fx.errors import OptionsError

__all__ = ["MAX_LOOKUP_BITS", "Options"]

MAX_LOOKUP_BITS = 16
"""The widest look-up that the TFHE parameter sets of the Concrete backend can hold."""


@dataclass(frozen=True)
class Options:
    """How a region is quantized, how its circuit is compiled, and how it is calibrated.

    Raises:
        OptionsError: if a value is outside its domain; the message names both.
    """

    n_bits: int = 4
    """Precision, in bits, of a quantized activation: an operand of a product, a table's result."""
    lookup_extra_bits: int = 2
    """A look-up reads `n_bits + lookup_extra_bits` bits: a sum of two operands needs one more,
    and behind an approximate rounding a second one costs less than the error that it removes."""
    input_bits: int = 8
    """Precision of the client's encrypted input; linear precision is free."""
    weight_bits: int = 8
    """Least precision of a clear weight, sign included."""
    result_bits: int = 10
    """Precision of a result that no look-up reads. It is decrypted exactly, and ten bits are the
    widest that cost nothing beside look-ups of six bits (docs/design.md, "Results")."""
    p_error: float = 0.1
    """Probability that one look-up reads a neighbouring entry of its table. Behind an approximate
    rounding that is one more unbiased rounding, not a fault."""
    n_samples: int = 64
    """How many calibration inputs are sampled from the model when none are given."""
    seed: int = 0
    """Seeds that sampling."""
    refresh_from: int = 16
    """A clear-weight sum of at least this many terms is read through an identity look-up before it
    is returned or multiplied by weights again, instead of carrying its wide accumulator along."""

    def __post_init__(self) -> None:
        _between("n_bits", self.n_bits, 1, MAX_LOOKUP_BITS)
        _between("lookup_extra_bits", self.lookup_extra_bits, 0, 8)
        _between("input_bits", self.input_bits, 2, 16)
        _between("weight_bits", self.weight_bits, 2, 16)
        _between("result_bits", self.result_bits, 2, 24)
        _between("n_samples", self.n_samples, 2, 1_000_000)
        _between("seed", self.seed, 0, 2**63 - 1)
        _between("refresh_from", self.refresh_from, 1, 2**31)
        if self.lookup_bits > MAX_LOOKUP_BITS:
            raise OptionsError(
                f"n_bits={self.n_bits} makes look-ups of {self.lookup_bits} bits "
                f"(n_bits + {self.lookup_extra_bits}); at most {MAX_LOOKUP_BITS} can be compiled. "
                f"Try n_bits={MAX_LOOKUP_BITS - self.lookup_extra_bits} or less."
            )
        is_number = isinstance(self.p_error, (int, float)) and not isinstance(self.p_error, bool)
        if not (is_number and 0.0 < self.p_error < 1.0):
            raise OptionsError(
                f"p_error={self.p_error!r} is not a probability between 0 and 1. Try p_error=0.1."
            )

    @property
    def lookup_bits(self) -> int:
        """Input width of a look-up, in bits."""
        return self.n_bits + self.lookup_extra_bits


def _between(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise OptionsError(f"{name}={value!r} is not an integer. Try {name}={low}.")
    if not low <= value <= high:
        raise OptionsError(f"{name}={value} is outside [{low}, {high}].")
