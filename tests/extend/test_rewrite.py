"""Rewrites by pattern: a match, near misses, constraints, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 -- PyTorch's own habit
from torch import Tensor, nn

import fhe_fx
from fhe_fx.errors import PassError
from fhe_fx.extend import Match, Rewrite
from fhe_fx.ir import Program
from fhe_fx.passes import Pipeline, base, default_pipeline, register, registered
from fhe_fx.passes.normalize import Normalize
from fhe_fx.testing import (
    assert_law,
    laws_at_registration,
    program_from,
    seeded,
    statements,
)
from tests.models import Mlp, mlp_inputs


@dataclass(frozen=True)
class SigmoidGelu(Rewrite):
    name: ClassVar[str] = "sigmoid-gelu"
    is_exact: ClassVar[bool] = False
    law_error: ClassVar[float] = 0.01

    slope: float = 1.702

    def before(self, x: Tensor) -> Tensor:
        return F.gelu(x)

    def after(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.slope * x)


@dataclass(frozen=True)
class SquareOfDifference(Rewrite):
    """(x - y)^2 is x^2 - 2xy + y^2 written with one look-up an element."""

    name: ClassVar[str] = "square-of-difference"

    def before(self, x: Tensor, y: Tensor) -> Tensor:
        return x * x + y * y - 2 * (x * y)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return (x - y).pow(2)

    def where(self, match: Match) -> str | None:
        rows = match.result.meta["val"].shape[-2]
        return f"{rows} rows, 5 are too many" if rows >= 5 else None


@dataclass(frozen=True)
class CentredMean(Rewrite):
    """The mean of centred rows is nothing: it has constants that depend on the shape."""

    name: ClassVar[str] = "centred-mean"

    def before(self, x: Tensor) -> Tensor:
        y = x - x.mean(-1, keepdim=True)
        return y - y.mean(-1, keepdim=True)

    def after(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True)


def rewritten(
    rewrite: Rewrite, function: Callable[..., Tensor], *shapes: tuple[int, ...]
) -> tuple[Program, bool]:
    samples = list(zip(*[seeded(s, seed=i) for i, s in enumerate(shapes)], strict=True))
    program = program_from(function, samples)
    _, record = Pipeline((Normalize(), rewrite)).run(program)
    return program, record.has_changed


def test_a_match_at_another_shape() -> None:
    program, has_changed = rewritten(SigmoidGelu(), lambda x: F.gelu(x) + 1, (2, 5, 7))
    assert has_changed
    assert "gelu" not in statements(program)
    assert "sigmoid" in statements(program)
    (x,) = program.samples[3]
    torch.testing.assert_close(program(x)[0], x * torch.sigmoid(1.702 * x) + 1)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.gelu(x, approximate="tanh"),
        torch.tanh,
        lambda x: x,
    ],
)
def test_near_misses(function: Callable[[Tensor], Tensor]) -> None:
    given, _ = rewritten(SigmoidGelu(), lambda x: torch.tanh(function(x)), (1, 2, 3))
    assert "sigmoid" not in statements(given)
    assert given.notes == []


def test_two_inputs_in_either_order_and_every_place() -> None:
    def both(x: Tensor, y: Tensor) -> Tensor:
        first = y * y + x * x - 2 * (y * x)
        z = torch.tanh(x)
        return first + (z * z + y * y - 2 * (z * y))

    program, has_changed = rewritten(SquareOfDifference(), both, (1, 2, 3), (1, 2, 3))
    assert has_changed
    assert "mul" not in statements(program)
    x, y = program.samples[1]
    torch.testing.assert_close(program(x, y)[0], (x - y) ** 2 + (torch.tanh(x) - y) ** 2)


def test_other_constants_do_not_match() -> None:
    program, has_changed = rewritten(
        SquareOfDifference(), lambda x, y: x * x + y * y - 3 * (x * y), (1, 2, 3), (1, 2, 3)
    )
    assert not has_changed
    assert program.notes == []


def test_constants_that_depend_on_the_shape_match_at_every_shape() -> None:
    def twice(x: Tensor) -> Tensor:
        y = x - x.mean(-1, keepdim=True)
        return torch.tanh(y - y.mean(-1, keepdim=True))

    for shape in ((1, 3, 4), (2, 2, 6)):
        program, has_changed = rewritten(CentredMean(), twice, shape)
        assert has_changed
        assert len(program.calls(torch.ops.aten.sum.dim_IntList)) == 1


def test_a_value_that_is_read_elsewhere_is_noted() -> None:
    def shared(x: Tensor, y: Tensor) -> Tensor:
        square = x * x
        return (square + y * y - 2 * (x * y)) + torch.tanh(square)

    program, has_changed = rewritten(SquareOfDifference(), shared, (1, 2, 3), (1, 2, 3))
    assert not has_changed
    assert [n.reason.split(", ")[1] for n in program.notes] == ["inside the pattern"]


def test_a_constraint_is_noted() -> None:
    program, has_changed = rewritten(
        SquareOfDifference(),
        lambda x, y: x * x + y * y - 2 * (x * y),
        (1, 5, 3),
        (1, 5, 3),
    )
    assert not has_changed
    assert [n.reason for n in program.notes] == ["5 rows, 5 are too many"]


@dataclass(frozen=True)
class Wrong(SigmoidGelu):
    name: ClassVar[str] = "wrong"
    is_exact: ClassVar[bool] = True
    law_error: ClassVar[float] = 0.001


@dataclass(frozen=True)
class Misshapen(SigmoidGelu):
    name: ClassVar[str] = "misshapen"

    def after(self, x: Tensor) -> Tensor:
        return torch.tanh(x).sum(-1)


def test_a_law_that_does_not_hold() -> None:
    assert_law(SquareOfDifference(), (1, 3, 4), (1, 3, 4))
    assert_law(SigmoidGelu())
    with pytest.raises(AssertionError, match=r"^sigmoid-gelu: after\(\) differs from before"):
        assert_law(SigmoidGelu(), (1, 3, 4), error=0.001)
    with pytest.raises(PassError, match=r"Pass wrong\(slope=1.702\) failed: the graph no longer"):
        rewritten(Wrong(), F.gelu, (1, 3, 4))


def test_a_law_is_checked_when_a_rewrite_is_registered() -> None:
    """All tests run inside `laws_at_registration` (conftest.py)."""

    @dataclass(frozen=True)
    class Halved(SigmoidGelu):
        name: ClassVar[str] = "halved"
        law_error: ClassVar[float] = 0.005

    with pytest.raises(AssertionError, match=r"^halved: after\(\) differs from before\(\) by 0.0"):
        register(Halved)
    assert "halved" not in registered()
    try:
        assert register(SigmoidGelu) is SigmoidGelu
        assert "sigmoid-gelu" in registered()
    finally:
        base._REGISTRY.pop("sigmoid-gelu", None)


def test_those_registered_before_are_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(base._REGISTRY, "wrong", Wrong)
    with pytest.raises(AssertionError, match=r"^wrong: "), laws_at_registration():
        raise NotImplementedError
    assert len(base.REGISTRATION_CHECKS) == 1  # that of all tests


def test_another_shape_is_refused() -> None:
    with pytest.raises(PassError) as error:
        rewritten(Misshapen(), F.gelu, (1, 3, 4))
    assert "after() gives the shape [1, 3] for inputs of [[1, 3, 4]]; before() gives [1, 3, 4]" in (
        str(error.value)
    )


def test_in_a_whole_lowering() -> None:
    model: Any = Mlp()
    pipeline = default_pipeline().insert_after("normalize", SigmoidGelu())
    encrypted: nn.Module = fhe_fx.encrypt_submodule(
        model, "inner", calibration=mlp_inputs(), n_bits=6, passes=pipeline
    )
    fhe_fx.set_mode(encrypted, "clear")
    model.inner[1] = nn.Module()
    model.inner[1].forward = lambda x: x * torch.sigmoid(1.702 * x)
    with torch.no_grad():
        unseen = mlp_inputs(32)[16:]  # calibration has the first sixteen
        expected = torch.cat([model(x) for x in unseen])
        found = torch.cat([encrypted(x) for x in unseen])
    assert float((found - expected).norm() / expected.norm()) < 0.1  # of quantization


def _of(before: Any, after: Any) -> Rewrite:
    content = {"name": "mine", "before": before, "after": after}
    made: Any = dataclass(frozen=True)(type("Mine", (Rewrite,), content))
    return made()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("before", "message"),
    [
        (lambda self, x: x, "before() returns an argument as it is; there has to be an operator"),
        (lambda self, x, y: F.gelu(x), "before() does not read its argument y, so nothing says"),
        (lambda self, x: 1 / 0, "torch.export cannot capture <lambda>: division by zero"),
    ],
)
def test_a_pattern_that_finds_nothing_or_all(before: Any, message: str) -> None:
    program = program_from(F.gelu, [(x,) for x in seeded((1, 3, 4))])
    with pytest.raises(PassError) as error:
        Pipeline((Normalize(), _of(before, lambda self, *x: x[0]))).run(program)
    assert message in str(error.value)
    assert str(error.value).startswith("Pass mine() failed: ")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            lambda self, x: F.gelu(x),
            lambda self, x, y: x,
            r"^mine: after\(\) fails on inputs of shape \[1, 3, 4\]: TypeError: .*missing 1",
        ),
        (
            lambda self, x: (x, x),
            lambda self, x: x,
            r"^mine: before\(\) returns a tuple; one tensor is expected\.$",
        ),
        (
            lambda self: torch.ones(3),
            lambda self: torch.ones(3),
            r"^mine: before\(\) takes no argument, so it finds nothing\.$",
        ),
    ],
)
def test_a_law_of_what_is_no_function_of_tensors(before: Any, after: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_law(_of(before, after))
