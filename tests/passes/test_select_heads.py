"""`select-heads`: an attention taken apart by heads (in models: tests/test_api.py)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fhe_fx.errors import TargetError
from fhe_fx.passes import Partition, Pipeline
from fhe_fx.passes.normalize import Normalize
from fhe_fx.passes.partition import ENCRYPTED
from fhe_fx.passes.select_heads import SelectHeads
from tests.programs import program_from, seeded

SAMPLES = [(x,) for x in seeded((1, 3, 8))]


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.view(1, 3, 4, 2).transpose(1, 2) for t in self.qkv(x).split(8, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        result: Tensor = self.out(y.transpose(1, 2).reshape(1, 3, 8))
        return result


def test_the_region_holds_the_weights_of_its_heads_alone() -> None:
    program = program_from(_Attention(), SAMPLES)
    expected = program(*SAMPLES[0])[0]
    Pipeline((Normalize(), SelectHeads((2, 0)), Partition())).run(program)
    torch.testing.assert_close(program(*SAMPLES[0])[0], expected)
    region = program.module.get_submodule(ENCRYPTED)
    weights = [tuple(b.shape) for b in region.buffers() if b.dim() == 2 and b.shape[0] == 8]
    assert weights == [(8, 4), (8, 4), (8, 4)]


@pytest.mark.parametrize("heads", [(4,), (-1,), (0, 0), ()])
def test_refuses_heads_that_do_not_exist(heads: tuple[int, ...]) -> None:
    program = program_from(_Attention(), SAMPLES)
    with pytest.raises(TargetError) as error:
        Pipeline((Normalize(), SelectHeads(heads))).run(program)
    assert str(error.value) == (
        f"heads={list(heads)} does not name distinct heads of region, which has 4: 0 to 3."
    )


def test_refuses_a_part_without_attention() -> None:
    program = program_from(torch.nn.Linear(8, 8), SAMPLES)
    with pytest.raises(
        TargetError, match=r"region holds no attention with several heads, so heads"
    ):
        Pipeline((Normalize(), SelectHeads((0,)))).run(program)
