"""Every knob of the compiler, in frozen dataclasses that refuse bad values when built."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any

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
    input_bits: int = 12
    """Precision of the client's encrypted input; linear precision is free."""
    weight_bits: int = 8
    """Least precision of a clear weight, sign included."""
    answer_weight_bits: int | None = None
    """The same of sums of what look-ups answered: each bit more doubles the noise that arrives at
    the next look-up. Without it `lookup_bits`, at most `weight_bits`."""
    result_bits: int | None = None
    """Precision of a result: it is decrypted without the bits below. Each bit more halves the noise
    that answers may have. Chosen with the widths of look-ups if it is not given."""
    p_error: float | None = None
    """Probability that one look-up reads a neighbouring entry of its table. Behind an approximate
    rounding that is one more unbiased rounding, not a fault. Chosen with the widths of look-ups if
    it is not given; if it is, every look-up reads `lookup_bits`."""
    max_error: float | None = None
    """Error that look-ups and the rounding of results may make, root mean square, in parts of the
    results' deviation; rounded weights come besides. Without it look-ups may err about as much as
    rounding to `lookup_bits` would."""
    max_cost: float | None = None
    """Complexity that the look-ups of a circuit may have; the least error at that is taken."""
    target_agreement: float | None = None
    """How often the model shall predict what it does in float, from 0 to 1; the largest error of
    look-ups at which it does is found on the calibration inputs."""
    most_widths: int = 2
    """How many widths of look-ups a circuit may have, 1 or 2. Each has keys of its own, so circuits
    that share keys have one."""
    rules: tuple[tuple[str, int], ...] = ()
    """Input bits of single look-ups: a pattern and a width each. A pattern is a module path, the
    name of a function, or `path:function`; after `re:`, a regular expression for one of these. An
    exact pattern wins over expressions, and of those the first."""
    n_samples: int = 256
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
        if self.answer_weight_bits is not None:
            _between("answer_weight_bits", self.answer_weight_bits, 2, 16)
        if self.result_bits is not None:
            _between("result_bits", self.result_bits, 2, 24)
        _between("most_widths", self.most_widths, 1, 2)
        _between("n_samples", self.n_samples, 2, 1_000_000)
        _between("seed", self.seed, 0, 2**63 - 1)
        _between("refresh_from", self.refresh_from, 1, 2**31)
        if self.lookup_bits > MAX_LOOKUP_BITS:
            raise OptionsError(
                f"n_bits={self.n_bits} makes look-ups of {self.lookup_bits} bits "
                f"(n_bits + {self.lookup_extra_bits}); at most {MAX_LOOKUP_BITS} can be compiled. "
                f"Try n_bits={MAX_LOOKUP_BITS - self.lookup_extra_bits} or less."
            )
        if self.p_error is not None and not (_is_number(self.p_error) and 0 < self.p_error < 1):
            raise OptionsError(
                f"p_error={self.p_error!r} is not a probability between 0 and 1. Try p_error=0.1."
            )
        for name, example in (("max_error", 0.1), ("max_cost", 1e11)):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 < value < math.inf):
                raise OptionsError(
                    f"{name}={value!r} is not a positive number. Try {name}={example:g}."
                )
        target = self.target_agreement
        if target is not None and not (_is_number(target) and 0 < target < 1):
            raise OptionsError(
                f"target_agreement={target!r} is not a part between 0 and 1. "
                f"Try target_agreement=0.97."
            )
        budgets = ("max_error", "max_cost", "target_agreement")
        given = [name for name in budgets if getattr(self, name) is not None]
        if len(given) > 1:
            raise OptionsError(
                f"Give {' or '.join(given)}, not {'both' if len(given) == 2 else 'all'}: one is "
                f"what the other costs."
            )
        for rule in self.rules:
            _check_rule(rule)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON holds them."""
        return {**dataclasses.asdict(self), "rules": [list(rule) for rule in self.rules]}

    @property
    def lookup_bits(self) -> int:
        """Input width of a look-up, in bits, where widths are not allotted."""
        return self.n_bits + self.lookup_extra_bits

    @property
    def bits_of_answers_weights(self) -> int:
        """Precision of weights of sums of what look-ups answered, given or chosen."""
        if self.answer_weight_bits is not None:
            return self.answer_weight_bits
        return max(2, min(self.lookup_bits, self.weight_bits))

    @property
    def is_uniform(self) -> bool:
        """Whether every look-up that no rule names reads `lookup_bits`."""
        budgets = (self.max_error, self.max_cost, self.target_agreement)
        return self.p_error is not None and all(budget is None for budget in budgets)

    @property
    def chosen_p_error(self) -> float:
        """The `p_error` that was given or chosen; a usual one before it is chosen."""
        return 0.1 if self.p_error is None else self.p_error

    @property
    def chosen_result_bits(self) -> int:
        """The `result_bits` that were given or chosen; usual ones before they are chosen."""
        return 9 if self.result_bits is None else self.result_bits

    def rule_for(self, path: str, function: str) -> int | None:
        """Return the width that a rule gives to the look-ups of a function in a module.

        Args:
            path: of the module.
            function: name of what the look-up computes, as reports print it.
        """
        names = (f"{path}:{function}", path, function)
        exact = [bits for name in names for pattern, bits in self.rules if pattern == name]
        matching = [
            bits
            for pattern, bits in self.rules
            if pattern.startswith("re:") and any(re.fullmatch(pattern[3:], n) for n in names)
        ]
        return next(iter([*exact, *matching]), None)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_rule(rule: object) -> None:
    if not (isinstance(rule, tuple) and len(rule) == 2 and isinstance(rule[0], str)):
        raise OptionsError(f"rules: {rule!r} is not a pattern and a width. Try ('exp', 8).")
    pattern, bits = rule
    _between(f"rules: {pattern!r}", bits, 1, MAX_LOOKUP_BITS)
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise OptionsError(f"rules: {pattern!r} is no regular expression: {error}.") from error


def _between(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise OptionsError(f"{name}={value!r} is not an integer. Try {name}={low}.")
    if not low <= value <= high:
        raise OptionsError(f"{name}={value} is outside [{low}, {high}].")
