"""Regions out of exported programs, which have no module to put back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fhe_fx.errors import CalibrationError, CaptureError, TargetError
from fhe_fx.export.exported import exported_region, exported_targets, open_exported
from fhe_fx.ir.program import Program
from fhe_fx.options import Options
from fhe_fx.passes import default_pipeline
from tests.export.conftest import make_inputs, make_net, make_region


class Words(nn.Module):
    """A language model of 13 words, two tokens of context and one block."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 4)
        self.body = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))
        self.head = nn.Linear(4, 13)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(self.embed(ids)))
        return y


def saved(model: nn.Module, example: Tensor, path: Path) -> Program:
    torch.export.save(torch.export.export(model.eval(), (example,)), path)
    return open_exported(torch.export.load(path))


@pytest.fixture
def net(tmp_path: Path) -> Program:
    return saved(make_net(), make_inputs()[0], tmp_path / "net.pt2")


@pytest.fixture
def words(tmp_path: Path) -> Program:
    torch.manual_seed(0)
    return saved(Words(), torch.zeros(1, 3, dtype=torch.int64), tmp_path / "words.pt2")


def test_region_equals_that_of_the_module(net: Program) -> None:
    rows = [x[0] for x in make_inputs()]
    region = exported_region(net, "body", None, rows, default_pipeline(), Options())
    expected = make_region()
    for sample in expected.captured.samples:
        ours, theirs = (r.run(sample, "clear")[0] for r in (region, expected))
        assert torch.equal(ours, theirs)


def test_language_model_writes_its_own_calibration(words: Program) -> None:
    options = Options(n_samples=5)
    region = exported_region(words, "body", None, None, default_pipeline(), options)
    again = exported_region(words, "body", None, None, default_pipeline(), options)
    assert len(region.captured.samples) == 5
    for a, b in zip(region.captured.samples, again.captured.samples, strict=True):
        assert torch.equal(a[0], b[0])


def test_targets_are_resolved_on_the_graph(net: Program) -> None:
    assert exported_targets(net, "body") == ["body"]
    assert exported_targets(net, "1") == ["body.1"]
    with pytest.raises(TargetError, match=r"no submodule 'bdy'\. Did you mean 'body'"):
        exported_targets(net, "bdy")


def test_calibration_that_is_missing_or_does_not_fit(net: Program) -> None:
    def build(rows: list[Tensor] | None) -> None:
        exported_region(net, "body", None, rows, default_pipeline(), Options())

    with pytest.raises(CalibrationError, match=r"Give them: --calibration x\.npy"):
        build(None)
    with pytest.raises(CalibrationError, match=r"has shape \[1, 5\]; the exported program takes"):
        build([torch.ones(5)] * 3)
    with pytest.raises(CalibrationError, match="holds nan or inf"):
        build([torch.full((6,), torch.nan)] * 3)
    with pytest.raises(CalibrationError, match="1 calibration input is too few"):
        build([torch.ones(6)])


def test_token_numbers_cannot_be_encrypted(words: Program) -> None:
    with pytest.raises(CaptureError, match="Choose a submodule behind the embedding"):
        exported_region(words, "embed", None, None, default_pipeline(), Options(n_samples=2))


def test_dynamic_shapes_are_refused() -> None:
    shapes = ({0: torch.export.Dim("n", min=2, max=8)},)
    exported = torch.export.export(make_net(), (torch.ones(3, 6),), dynamic_shapes=shapes)
    with pytest.raises(CaptureError, match="a circuit has one shape"):
        open_exported(exported)
