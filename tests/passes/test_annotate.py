"""`annotate`: the nodes of one submodule, if they are one region (more in tests/capture)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fhe_fx.capture import capture
from fhe_fx.errors import CaptureError
from fhe_fx.passes.annotate import Annotate


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part, self.other = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.part(self.other(self.part(x)))
        return result


class _Once(_Twice):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.other(self.part(x))
        return result


def test_only_the_nodes_of_the_submodule_are_marked() -> None:
    program = capture(_Once().eval(), (torch.ones(1, 3),), {}, ["part"])
    assert Annotate("part").run(program) is False
    marked = {n.meta["module_path"] for n in program.graph.nodes if n.meta.get("encrypted")}
    assert marked == {"part"}


def test_refuses_a_submodule_that_is_called_twice() -> None:
    program = capture(_Twice().eval(), (torch.ones(1, 3),), {}, ["part"])
    with pytest.raises(CaptureError) as error:
        Annotate("part").run(program)
    assert str(error.value) == (
        "part is called 2 times in one forward pass; a circuit holds one call. "
        "Encrypt a part that is called once."
    )


def test_refuses_a_submodule_that_is_not_in_the_graph() -> None:
    program = capture(_Once().eval(), (torch.ones(1, 3),), {}, ["part"])
    with pytest.raises(CaptureError, match="nothing of this submodule is in the captured graph"):
        Annotate("nowhere").run(program)
