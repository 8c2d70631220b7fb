"""The contract of a pass: what a pipeline checks before, after and around each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from fhe_fx.errors import InvariantError, PassError
from fhe_fx.ir import Program
from fhe_fx.ir import dialect as d
from fhe_fx.ir.ops import SHIFT
from fhe_fx.passes import Pass, Pipeline, default_pipeline, get_pass, register, registered
from fhe_fx.passes.allot_bits import AllotBits
from fhe_fx.passes.expand_matmuls import ExpandMatmuls
from fhe_fx.passes.fuse_maps import FuseMaps
from fhe_fx.passes.hoist_maps import HoistMaps
from tests.conftest import float_program

X = torch.linspace(-1, 1, 6).view(2, 3)


def small() -> Program:
    exp = torch.ops.aten.exp.default
    return float_program(lambda b, x: b.apply(b.expand(b.view(x, (1, 2, 3)), (4, 2, 3)), exp), [X])


@dataclass(frozen=True)
class Lies(Pass):
    name: ClassVar[str] = "lies"

    def run(self, program: Program) -> bool:
        return True


@dataclass(frozen=True)
class Fails(Pass):
    name: ClassVar[str] = "fails"
    limit: int = 3

    def run(self, program: Program) -> bool:
        raise ValueError("no room")


@dataclass(frozen=True)
class Breaks(Pass):
    name: ClassVar[str] = "breaks"

    def run(self, program: Program) -> bool:
        next(iter(program.maps())).meta["val"] = torch.empty(7, device="meta")
        return True


def test_every_registered_pass_has_one_name_four_ways() -> None:
    for name, cls in registered().items():
        file = name.replace("-", "_")
        assert cls.__module__ == f"fhe_fx.passes.{file}"
        assert cls.__name__ == "".join(part.title() for part in name.split("-"))
        assert cls.law()


def test_a_missing_property_names_who_gives_it() -> None:
    with pytest.raises(PassError) as error:
        Pipeline((AllotBits(),)).run(small())
    assert str(error.value) == (
        "Pass 1, allot-bits, requires calibrated, fused, no-products, which no pass before it "
        "gives. Given by: calibrate, fuse-maps, products-to-squares."
    )


def test_a_property_that_a_pass_breaks_is_missing_afterwards() -> None:
    with pytest.raises(PassError, match="assign-scales, requires calibrated"):
        default_pipeline().insert_before("assign-scales", HoistMaps()).check()


def test_a_pass_that_lies_is_told() -> None:
    with pytest.raises(PassError) as error:
        Pipeline((Lies(),)).run(small())
    assert str(error.value) == "lies returned True, but the printed program did not change."


@dataclass(frozen=True)
class Halves(Pass):
    name: ClassVar[str] = "halves"
    is_exact: ClassVar[bool] = False

    def run(self, program: Program) -> bool:
        (node,) = program.calls(SHIFT)
        b = program.before(node, self)
        program.replace(node, b.shift(d.input_node(node), d.constant(d.input_node(node, 1)) / 2))
        return True


def test_a_constant_that_the_print_does_not_show_is_a_change() -> None:
    program = float_program(lambda b, x: b.shift(x, X), [X])
    before = str(program)
    (record,) = Pipeline((Halves(),)).run(program)
    assert record.has_changed
    assert str(program) == before
    assert torch.equal(program(X)[0], 1.5 * X)


def test_a_failure_names_the_pass_its_options_and_those_before() -> None:
    with pytest.raises(PassError) as error:
        Pipeline((HoistMaps(), FuseMaps(), Fails(limit=4))).run(small())
    assert str(error.value) == (
        "Pass fails(limit=4) failed: ValueError: no room\n  passes before it: hoist-maps, fuse-maps"
    )
    assert isinstance(error.value.__cause__, ValueError)


def test_a_pass_that_leaves_a_wrong_graph_is_named() -> None:
    with pytest.raises(PassError, match=re.escape("Pass breaks() failed")) as error:
        Pipeline((Breaks(),)).run(small())
    assert isinstance(error.value.__cause__, InvariantError)


def test_edits_return_new_pipelines() -> None:
    p = Pipeline((HoistMaps(), FuseMaps(), HoistMaps()))

    def names(pipeline: Pipeline) -> list[str]:
        return [one.name for one in pipeline]

    assert names(p.insert_before("hoist-maps", Lies()))[0] == "lies"
    assert names(p.insert_after("hoist-maps", Lies()))[-1] == "lies"
    assert names(p.replace("hoist-maps", Lies())) == ["lies", "fuse-maps", "lies"]
    assert names(p.drop("hoist-maps")) == ["fuse-maps"]
    assert len(p) == 3


def test_an_edit_of_a_pass_that_is_not_there_suggests_one() -> None:
    with pytest.raises(PassError) as error:
        Pipeline((HoistMaps(), FuseMaps())).drop("fuse-map")
    assert str(error.value) == (
        "No pass 'fuse-map' in this pipeline. Did you mean 'fuse-maps' or 'hoist-maps'?"
    )


def test_dumps_what_changed(tmp_path: Path) -> None:
    program = small()
    records = Pipeline((FuseMaps(), HoistMaps(), ExpandMatmuls())).run(program, dump_dir=tmp_path)
    assert [r.has_changed for r in records] == [False, True, False]
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "00-given.json", "00-given.txt", "02-hoist-maps.json", "02-hoist-maps.txt"
    ]  # fmt: skip
    assert (tmp_path / "02-hoist-maps.txt").read_text() == f"{program}\n"


def test_a_pass_that_is_no_dataclass_is_refused() -> None:
    class Plain(Pass):
        name = "plain"

    with pytest.raises(PassError) as error:
        register(Plain)
    assert str(error.value) == "Plain is not a dataclass. Put @dataclass(frozen=True) on it."
    assert "plain" not in registered()


def test_a_name_that_is_taken_is_refused() -> None:
    @dataclass(frozen=True)
    class Other(Pass):
        name: ClassVar[str] = "hoist-maps"

    with pytest.raises(PassError) as error:
        register(Other)
    assert str(error.value) == "A pass named 'hoist-maps' exists: HoistMaps."
    assert get_pass("hoist-maps") is HoistMaps


def test_an_unknown_pass_suggests_one() -> None:
    with pytest.raises(PassError) as error:
        get_pass("hoist-map")
    assert str(error.value).startswith("There is no pass 'hoist-map'. Did you mean 'hoist-maps'")
