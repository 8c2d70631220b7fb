"""For tests of passes: small programs, random programs, and checks that say what is wrong.

Random programs are in `fhe_fx.testing.strategies`, which needs Hypothesis.
"""

from fhe_fx.testing.checks import (
    assert_cost,
    assert_equivalent,
    assert_law,
    check_pass,
    laws_at_registration,
)
from fhe_fx.testing.programs import Build, Sample, float_program, program_from, seeded, statements

__all__ = [
    "Build",
    "Sample",
    "assert_cost",
    "assert_equivalent",
    "assert_law",
    "check_pass",
    "float_program",
    "laws_at_registration",
    "program_from",
    "seeded",
    "statements",
]
