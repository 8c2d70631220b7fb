"""The integer graph in ONNX Runtime equals the reference bit for bit, wrapped values included.

`tests.programs.run_integers` makes the same comparison for every other test that lowers a graph.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from onnx import numpy_helper
from torch import Tensor, fx

from fhe_fx.backends.reference import ReferenceBackend
from fhe_fx.errors import BackendError
from fhe_fx.export.onnx import ENCODINGS, integer_model
from fhe_fx.ir import Builder, Program, verify
from fhe_fx.ir import dialect as d
from fhe_fx.ir.ops import LOOKUP
from fhe_fx.ir.types import ValueType
from fhe_fx.runtime.codec import Codec
from fhe_fx.testing.strategies import Recipe, recipes
from tests.passes.test_random_graphs import QUICK
from tests.programs import encode, lower, onnx_results, program_from, seeded

Build = Callable[..., "fx.Node | tuple[fx.Node, ...]"]


def integer_program(
    build: Build, *shapes: Sequence[int], low: int = -2048, high: int = 2047
) -> Program:
    """Return the integer program that `build(builder, *placeholders)` writes."""
    module = fx.GraphModule(torch.nn.Module(), fx.Graph())
    end = module.graph.output(())
    places = []
    for i, shape in enumerate(shapes):
        with module.graph.inserting_before(end):
            place = module.graph.placeholder(f"x{i}")
        place.meta["val"] = torch.empty(tuple(shape), device="meta", dtype=torch.int64)
        places.append(place)
    results = build(Builder(module, end), *places)
    end.args = (results if isinstance(results, tuple) else (results,),)
    one, zero = torch.ones(()).double(), torch.zeros(()).double()
    program = Program(module, properties={"integer"})
    for node in program.encrypted():
        node.meta["type"] = ValueType(one, zero, low, high)
    program.clean()
    verify(program)
    return program


def check(program: Program, *inputs: Tensor) -> onnx.ModelProto:
    """Run both on integers and compare every bit."""
    encoded = [x.numpy() for x in inputs]
    expected = ReferenceBackend().compile(program).clear(encoded)
    for ours, theirs in zip(expected, onnx_results(program, encoded), strict=True):
        assert theirs.dtype == np.int64
        np.testing.assert_array_equal(ours, theirs)
    return integer_model(program)


def whole_numbers(*shape: int, seed: int = 0, size: int = 2000) -> Tensor:
    return torch.randint(-size, size, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("lsbs", [0, 1, 4])
def test_a_lookup_on_five_periods(lsbs: int) -> None:
    """Every value of five periods on each side: anti-periodic, whatever is beyond the ends."""
    bits = 3
    period = 2 << bits + lsbs
    x = torch.arange(-5 * period - 3, 5 * period + 4)[None]
    table = whole_numbers(1, 1 << bits)
    source_bits = bits + lsbs
    program = integer_program(
        lambda b, x: b.lookup(x, table, torch.zeros((), dtype=torch.int64), bits, lsbs),
        x.shape,
        low=-(1 << source_bits - 1),
        high=(1 << source_bits - 1) - 1,
    )
    check(program, x)
    (found,) = onnx_results(program, [x.numpy()])
    half = period // 2  # of the doubled table: one period of the values
    np.testing.assert_array_equal(found[:, half:], -found[:, :-half])


def test_each_element_reads_its_own_table() -> None:
    tables, which = whole_numbers(3, 16), torch.tensor([[2], [0], [1]])
    program = integer_program(
        lambda b, x: b.lookup(x, tables, which, 4, 8), (2, 3, 5), low=-2048, high=2047
    )
    check(program, whole_numbers(2, 3, 5, size=20_000))


def _everything(b: Builder, x: fx.Node, y: fx.Node, clear: fx.Node) -> tuple[fx.Node, ...]:
    both = b.gate(b.add(x, b.expand(y, (2, 3, 4))), clear)
    moved = b.permute(b.view(b.sub(both, x), (3, 2, 4)), (2, 0, 1))
    chosen = b.index_select(moved, 1, torch.tensor([2, 0, 0, 1]))
    joined = b.cat([moved, chosen], 1)
    weighed = b.linear(joined, whole_numbers(2, 3, seed=1))
    scaled = b.shift(b.scale(weighed, torch.tensor([3, -2, 70_000])), torch.tensor([[5]]))
    summed = b.sum(scaled, [0, 2]), b.sum(scaled, [-1], keepdim=True)
    return scaled, *summed, scaled, x, b.round(scaled, 9, 3), b.round(x, 12, 0)


def test_every_affine_operator_and_results_that_occur_twice() -> None:
    program = integer_program(_everything, (2, 3, 4), (1, 4), (2, 3, 4))
    covered = {n.target for n in program.graph.nodes if n.op == "call_function"}
    assert covered == d.INTEGER_OPS - {LOOKUP}
    clear = whole_numbers(2, 3, 4, seed=4, size=2)
    check(program, whole_numbers(2, 3, 4), whole_numbers(1, 4, seed=3), clear)


def test_results_without_dimensions() -> None:
    program = integer_program(
        lambda b, x: b.shift(b.scale(b.view(b.sum(x, [0], keepdim=True), ()), 3), -7), (5,)
    )
    assert d.shape_of(program.results[0]) == ()
    check(program, whole_numbers(5))


def test_products_beyond_double_precision_stay_exact() -> None:
    """Weights and values near 2**31: their products do not fit a double's 53 bits."""
    weight = whole_numbers(4, 2, size=1 << 31)
    program = integer_program(lambda b, x: b.linear(x, weight), (3, 4))
    check(program, whole_numbers(3, 4, seed=5, size=1 << 28))


@settings(QUICK, max_examples=10)
@given(recipes())
def test_random_graphs_in_range_and_wrapped(recipe: Recipe) -> None:
    program = program_from(recipe, recipe.samples(), n_bits=4)
    lower(program)
    for gain in (1.0, 8.0):
        encoded = [torch.from_numpy(x) for x in encode(program, program.samples[0], gain)]
        check(program, *encoded)
        check(program, *[x * int(gain) ** 3 for x in encoded])  # far beyond the encoding


def test_shapes_are_inferred_and_equal_those_of_the_program() -> None:
    samples = [(x,) for x in seeded((1, 3, 4))]
    program = program_from(lambda x: torch.softmax(x @ x.mT, -1) @ x, samples, n_bits=4)
    lower(program)
    model = integer_model(program)
    onnx.checker.check_model(model, full_check=True)
    shapes = {
        v.name: tuple(dim.dim_value for dim in v.type.tensor_type.shape.dim)
        for v in (*model.graph.value_info, *model.graph.input, *model.graph.output)
    }
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    assert {n.name: shapes[n.name] for n in calls} == {n.name: d.shape_of(n) for n in calls}


def test_metadata_hold_the_encodings_bit_for_bit_and_where_nodes_come_from() -> None:
    program = program_from(
        lambda x: torch.tanh(x) * torch.arange(1.0, 5.0), [(x,) for x in seeded((1, 3, 4))]
    )
    lower(program)
    model = integer_model(program)
    held = json.loads({p.key: p.value for p in model.metadata_props}[ENCODINGS])
    codec = Codec.of(program)
    for group, ports in (("inputs", codec.inputs), ("results", codec.results)):
        for told, port in zip(held[group], ports, strict=True):
            assert (told["low"], told["high"]) == (port.type.low, port.type.high)
            for part in ("scale", "offset"):
                values = torch.tensor(told[part], dtype=torch.float64)
                assert torch.equal(
                    values.expand(port.shape), getattr(port.type, part).expand(port.shape)
                )
    assert [i.name for i in model.graph.input] == [e["name"] for e in held["inputs"]]
    assert [o.name for o in model.graph.output] == [e["name"] for e in held["results"]]
    gather = next(n for n in model.graph.node if n.op_type == "Gather")
    (lookup,) = program.calls(LOOKUP)
    told = {p.key: p.value for p in gather.metadata_props}
    assert gather.output[0] == lookup.name
    assert told["source"] == lookup.meta["source"]
    assert told["made_by"] == "lower-to-integers"


def test_weights_are_stored_in_the_narrowest_type() -> None:
    weight = whole_numbers(64, 64, size=100)
    model = integer_model(integer_program(lambda b, x: b.linear(x, weight), (1, 64)))
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    assert [a.dtype for a in stored.values()] == [np.int8]
    assert model.ByteSize() < 64 * 64 + 1500


def test_a_program_of_floats_is_refused() -> None:
    program = program_from(torch.tanh, [(x,) for x in seeded((1, 2, 2))])
    with pytest.raises(BackendError) as caught:
        integer_model(program)
    assert str(caught.value) == "region is not lowered to integers; run the pipeline first."
