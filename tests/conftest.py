"""Fixtures that many tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Protocol

import pytest
from torch import Tensor

from fhe_fx import testing
from fhe_fx.ir import Program
from fhe_fx.passes import Pass
from fhe_fx.testing import Build, float_program, laws_at_registration, statements

__all__ = ["Build", "CheckPass", "float_program", "statements"]


os.environ["FHE_FX_CACHE"] = "off"  # commands lower anew, also in processes of their own


@pytest.fixture(autouse=True, scope="session")
def laws() -> Iterator[None]:
    """Check the law of every rewrite by pattern that a test registers."""
    with laws_at_registration():
        yield


class CheckPass(Protocol):
    """Runs a pass on a small program and compares what it was and what it became."""

    def __call__(
        self,
        rewrite: Pass,
        build: Build,
        *,
        inputs: Sequence[Tensor],
        before: str,
        after: str | None = None,
        notes: Sequence[str] = (),
    ) -> Program: ...


@pytest.fixture
def check_pass() -> CheckPass:
    """Compare text before and after, the flag, the outputs, and that a second run does nothing."""
    return testing.check_pass
