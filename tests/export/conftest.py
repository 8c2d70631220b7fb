"""A small region and the artefact that is written from it, made once."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fhe_fx
from fhe_fx.api import encrypted_modules
from fhe_fx.export import export_region
from fhe_fx.runtime.region import Region

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # concrete-python imports pkg_resources, which warns
    import fhe_fx.backends.concrete


class Net(nn.Module):
    """A float layer, and a body to encrypt: two linear layers around a function."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 6)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(self.head(x))
        return y


def make_net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def make_inputs(n: int = 24) -> list[Tensor]:
    """Return smooth inputs, which no check takes for noise."""
    steps = torch.linspace(0, 6, n)[:, None] + torch.arange(6)
    return [row[None] for row in steps.sin() * (1 + 0.1 * torch.arange(6))]


def make_region(n_bits: int = 4) -> Region:
    model = fhe_fx.encrypt_submodule(make_net(), "body", n_bits=n_bits, calibration=make_inputs())
    return encrypted_modules(model)[0].region


@pytest.fixture(scope="session")
def region() -> Region:
    return make_region()


@pytest.fixture(scope="session")
def written(region: Region, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an artefact, to be read only."""
    directory = tmp_path_factory.mktemp("artifact") / "body"
    export_region(region, directory)
    return directory


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    """Return a copy of it, to be damaged."""
    return Path(shutil.copytree(written, tmp_path / "copy"))
