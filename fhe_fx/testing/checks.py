"""What a pass is to be held to: texts, meaning, cost."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Sequence
from textwrap import dedent

import torch
from torch import Tensor

from fhe_fx.extend import Rewrite
from fhe_fx.ir import Program, verify
from fhe_fx.ir.equivalence import first_difference
from fhe_fx.passes import Pass, base, registered
from fhe_fx.report import report_on
from fhe_fx.testing.programs import Build, Sample, float_program, seeded, statements

__all__ = [
    "assert_cost",
    "assert_equivalent",
    "assert_law",
    "check_pass",
    "laws_at_registration",
]


def check_pass(
    rewrite: Pass,
    build: Build,
    *,
    inputs: Sequence[Tensor],
    before: str,
    after: str | None = None,
    notes: Sequence[str] = (),
) -> Program:
    """Run a pass on a small float program and compare all that it promises.

    The printed statements before and after, what `run` returned, the rules of the dialect, the
    results, that a second run changes nothing, and the reasons noted for what was declined.

    Args:
        rewrite: the pass.
        build: writes the program: `build(builder, *placeholders)` returns its result.
        inputs: a value of each input.
        before: the printed statements of the program.
        after: those after the pass; None where it is to change nothing.
        notes: the reasons noted.

    Returns:
        The program after the pass.

    Raises:
        AssertionError: says which of these is not so.
    """
    program = float_program(build, inputs)
    _assert_text("the program before", statements(program), dedent(before).strip())
    given = float_program(build, inputs)
    for run, has_changed in (("run", after is not None), ("second run", False)):
        said = rewrite.run(program)
        program.clean()
        verify(program)
        _assert_text(
            f"{rewrite.name}, {run},", statements(program), dedent(after or before).strip()
        )
        if said is not has_changed:
            raise AssertionError(f"{rewrite.name}, {run}, returned {said}, not {has_changed}.")
        if rewrite.is_exact:
            assert_equivalent(given, program, [tuple(inputs)])
    found = [note.reason for note in program.notes]
    if found != list(notes):
        raise AssertionError(f"{rewrite.name} noted {found}, not {list(notes)}.")
    return program


def _assert_text(what: str, found: str, expected: str) -> None:
    if found != expected:
        lines = difflib.unified_diff(
            expected.splitlines(), found.splitlines(), "expected", "found", lineterm=""
        )
        raise AssertionError("\n".join([f"{what} is another:", *lines]))


def assert_equivalent(
    before: Program,
    after: Program,
    samples: Sequence[Sample] | None = None,
    tolerance: float | None = None,
) -> None:
    """Check that two programs of one stage compute the same, and name the node where they part.

    Args:
        before: the program as it should be.
        after: the other one.
        samples: values of the original inputs; by default the calibration samples of `before`.
        tolerance: of the largest value; by default float rounding, or next to nothing for integers.

    Raises:
        AssertionError: names the first node that differs, by how much, and its printed lines.
        ValueError: if one is in integers and the other is not, or there are no samples.
    """
    stages = ["integer" if "integer" in p.properties else "float" for p in (before, after)]
    if stages[0] != stages[1]:
        raise ValueError(f"The programs are of the stages {stages[0]} and {stages[1]}.")
    samples = before.samples if samples is None else samples
    if not samples:
        raise ValueError("There are no samples to compare on.")
    if (found := first_difference(before, after, samples, tolerance)) is not None:
        raise AssertionError(f"The programs do not compute the same: {found}")


def assert_law(
    rewrite: Rewrite, *shapes: Sequence[int], error: float | None = None, n: int = 64
) -> None:
    """Check the law of a rewrite by pattern on random inputs.

    Args:
        rewrite: whose `before` and `after` are compared.
        shapes: of each argument; by default those with which the rewrite looks for candidates.
        error: largest difference, in parts of the largest value; by default its `law_error`.
        n: how many random inputs.

    Raises:
        AssertionError: if they differ by more, or in shape, or one fails.
    """
    error = rewrite.law_error if error is None else error
    shapes = shapes or rewrite.shapes()
    if not shapes:
        raise AssertionError(f"{rewrite.name}: before() takes no argument, so it finds nothing.")
    samples = list(zip(*[seeded(s, n, seed=i) for i, s in enumerate(shapes)], strict=True))
    expected = _computed(rewrite, "before", samples)
    found = _computed(rewrite, "after", samples)
    if expected[0].shape != found[0].shape:
        raise AssertionError(
            f"{rewrite.name}: before() has the shape {list(expected[0].shape)}, after() "
            f"{list(found[0].shape)}."
        )
    a, b = torch.stack(expected), torch.stack(found)
    relative = float((a - b).abs().max() / a.abs().max().clamp_min(1e-12))
    if not relative <= error:
        raise AssertionError(
            f"{rewrite.name}: after() differs from before() by {relative:.3g} of the largest value "
            f"on {n} random inputs; {error:g} is allowed."
        )


def _computed(rewrite: Rewrite, name: str, samples: Sequence[Sample]) -> list[Tensor]:
    """Return what one function of a rewrite gives, which has to be a tensor."""
    given = ", ".join(str(list(x.shape)) for x in samples[0])
    try:
        found = [getattr(rewrite, name)(*sample) for sample in samples]
    except Exception as error:  # of a function that may be anybody's
        raise AssertionError(
            f"{rewrite.name}: {name}() fails on inputs of shape {given}: "
            f"{type(error).__name__}: {error}"
        ) from error
    kind = type(found[0])
    if not issubclass(kind, Tensor):
        raise AssertionError(  # noqa: TRY004 -- a law that does not hold
            f"{rewrite.name}: {name}() returns a {kind.__name__}; one tensor is expected."
        )
    return found


@contextlib.contextmanager
def laws_at_registration() -> Iterator[None]:
    """Check the law of every rewrite by pattern when it is registered, and of those that are.

    Put it around all tests, in `conftest.py`:

        @pytest.fixture(autouse=True, scope="session")
        def laws():
            with laws_at_registration():
                yield

    Raises:
        AssertionError: from `register`, if `after` differs from `before` by more than `law_error`
            on random inputs.
    """

    def check(cls: type[Pass]) -> None:
        if issubclass(cls, Rewrite):
            assert_law(cls())

    for known in registered().values():
        check(known)
    base.REGISTRATION_CHECKS.append(check)
    try:
        yield
    finally:
        base.REGISTRATION_CHECKS.remove(check)


def assert_cost(program: Program, *, look_ups: int, bits: int | None = None) -> None:
    """Check what an integer program costs at most.

    Args:
        program: lowered to integers.
        look_ups: bootstraps of one run, at most.
        bits: input bits of the widest look-up, at most.

    Raises:
        AssertionError: names what costs more, with the table of all look-ups.
    """
    report = report_on([(program, None)])
    cost = report.regions[0]
    if cost.look_ups > look_ups:
        raise AssertionError(f"{cost.look_ups} look-ups, {look_ups} are allowed.\n{report}")
    if bits is not None and cost.max_lookup_bits > bits:
        raise AssertionError(
            f"a look-up reads {cost.max_lookup_bits} bits, {bits} are allowed.\n{report}"
        )
