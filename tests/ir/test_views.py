"""Typed views: each reads back what the builder wrote."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from fhe_fx.ir import Builder, views
from tests.conftest import float_program

X = torch.zeros(2, 3, 4)
ROWS, COLUMNS = torch.tensor([0, 2]), torch.tensor([1, 3])
LIVE = torch.ones(4, dtype=torch.bool)
TABLES, WHICH = torch.arange(8).view(2, 4), torch.zeros(2, 3, 4, dtype=torch.int64)


def _written(build: object) -> fx.Node:
    return float_program(build, [X]).results[0]  # type: ignore[arg-type]


def test_views_name_the_arguments() -> None:
    total = views.Sum.of(_written(lambda b, x: b.sum(x, [0, -1], keepdim=True)))
    assert (total.dims, total.keepdim) == ([0, 2], True)
    select = views.IndexSelect.of(_written(lambda b, x: b.index_select(x, -1, COLUMNS)))
    assert (select.dim, select.index.tolist()) == (2, [1, 3])
    assert views.Permute.of(_written(lambda b, x: b.permute(x, [2, 0, 1]))).dims == [2, 0, 1]
    cat = views.Cat.of(_written(lambda b, x: b.cat([x, x], 1)))
    assert (len(cat.parts), cat.dim) == (2, 1)
    softmax = views.MaskedSoftmax.of(_written(lambda b, x: b.masked_softmax(x, LIVE, True)))
    assert softmax.is_log
    assert torch.equal(softmax.live, LIVE)

    def scattered(b: Builder, x: fx.Node) -> fx.Node:
        return b.put_pairs(b.take_pairs(x, ROWS, COLUMNS), ROWS, COLUMNS, 3, 5)

    put = views.PutPairs.of(_written(scattered))
    assert (put.rows.tolist(), put.columns.tolist()) == ([0, 2], [1, 3])
    assert (put.n_rows, put.n_columns) == (3, 5)
    assert views.TakePairs.of(put.x).columns.tolist() == [1, 3]


def test_a_view_of_another_operator_is_refused() -> None:
    node = _written(lambda b, x: b.sum(x, [0]))
    with pytest.raises(TypeError) as error:
        views.Lookup.of(node)
    assert str(error.value) == f"{node.name} calls aten.sum.dim_IntList, not fhe_fx.lookup.default."


def test_a_look_up_has_bits_and_tables() -> None:
    module = fx.GraphModule(torch.nn.Module(), fx.Graph())
    end = module.graph.output(())
    with module.graph.inserting_before(end):
        x = module.graph.placeholder("x")
    x.meta["val"] = torch.empty(X.shape, dtype=torch.int64, device="meta")
    view = views.Lookup.of(Builder(module, end).lookup(x, TABLES, WHICH, 2, 5))
    assert (view.x, view.bits, view.lsbs) == (x, 2, 5)
    assert torch.equal(view.tables, TABLES)
    assert torch.equal(view.which, WHICH)
