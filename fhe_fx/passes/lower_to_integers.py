"""Lower to integers: affine operators with integer constants, and one look-up for each map.

Equal to the float program within the quantization of `assign-scales`: weights to their bits, each
look-up to half a slot of its input and half a unit of its output. From here on equality is exact:
every backend gives the integers that this program gives.

An integer q of a node means `scale * q + offset`. Offsets travel through affine operators in
float, at compile time, so biases cost nothing; they end in the tables and at the client.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, fx

from fhe_fx.ir import dialect as d
from fhe_fx.ir.build import Builder
from fhe_fx.ir.integer import Integer
from fhe_fx.ir.ops import GATE, LINEAR, SCALE, SHIFT
from fhe_fx.ir.printer import operator_name
from fhe_fx.ir.program import Program
from fhe_fx.ir.types import ValueType
from fhe_fx.passes.base import Pass, register
from fhe_fx.passes.masks import behind_other_masks, encrypted_zeros, stays_inside
from fhe_fx.quant.noise import noise_in_slots
from fhe_fx.quant.overflow_estimate import estimate_overflow
from fhe_fx.quant.ranges import class_ends, times_to_fill
from fhe_fx.quant.tables import ROOM, build_tables
from fhe_fx.quant.weight_rounding import round_weights, rows_of

__all__ = ["LowerToIntegers"]


@register
@dataclass(frozen=True)
class LowerToIntegers(Pass):
    """Emit the integer program and attach a value type to each of its nodes."""

    name: ClassVar[str] = "lower-to-integers"
    requires: ClassVar[frozenset[str]] = frozenset({"scales", "calibrated", "ranges"})
    gives: ClassVar[frozenset[str]] = frozenset({"integer"})
    breaks: ClassVar[frozenset[str]] = frozenset({"normal", "calibrated", "scales", "fused"})

    corrects_sums: bool = True
    """Whether weights are rounded for the error of their sums; else each is by itself."""
    averages_slots: bool = True
    """Whether a table answers with the mean over a slot; else with the value in its middle."""

    estimates_overflow: bool = True
    """Whether to estimate, for the report, how often values will lie outside their ranges."""

    def run(self, program: Program) -> bool:
        """Translate node by node."""
        module = fx.GraphModule(torch.nn.Module(), fx.Graph())
        end = module.graph.output(())
        lowering = _Lowering(self, program, module, end)
        for node in program.encrypted():
            lowering.values[node] = lowering.lower(node)
        end.args = (tuple(lowering.result(n) for n in program.results),)
        exact = dataclasses.replace(program)
        program.module = module
        program.observed = {}
        if self.estimates_overflow:
            lowering.note_overflow(exact)
        return True


class _Lowering:
    def __init__(
        self, settings: LowerToIntegers, program: Program, module: fx.GraphModule, end: fx.Node
    ) -> None:
        self.settings = settings
        self.program, self.module, self.end = program, module, end
        self.values: dict[fx.Node, Integer] = {}
        self.maps: dict[fx.Node, fx.Node] = {}
        """The map that each look-up stands for."""

    def lower(self, node: fx.Node) -> Integer:
        """Translate one node."""
        scale, width = node.meta["scale"], node.meta["width"]
        if d.is_clear(node):
            return self._clear_input(node)
        if node.op == "placeholder":
            return self._input(node, scale)
        builder = Builder(self.module, self.end, node, LowerToIntegers.name)
        if d.is_map(node):
            return self._lookup(builder, node, scale, width)
        inputs = [self.values[n] for n in d.operands(node)]
        offset = d.evaluate(node, *(i.offset for i in inputs))
        if d.is_call(node, SHIFT) or node.meta.get("absorbed"):
            return Integer(inputs[0].node, scale, offset)
        if d.is_call(node, GATE):
            x, by = inputs
            # What is multiplied must be zero at integer zero, up to half a unit.
            steps = (x.offset / x.scale).round().long()
            if bool((steps != 0).any()):
                shifted = builder.shift(x.node, steps)
                x = Integer.typed(shifted, x.scale, x.offset - steps * x.scale, width)
            gated = builder.gate(x.node, by.node)
            return Integer.typed(gated, scale, torch.zeros_like(scale), width)
        if d.is_call(node, SCALE):
            factor = d.constant(d.input_node(node, 1)).double()
            whole = (factor * inputs[0].scale / scale).round().long()
            if whole.unique().numel() == 1:
                whole = whole.reshape(-1)[0]
            return Integer.typed(builder.scale(inputs[0].node, whole), scale, offset, width)
        if d.is_call(node, LINEAR):
            return self._linear(builder, node, inputs[0])
        moved = [i.node for i in inputs]
        given = dict(zip(d.operands(node), moved, strict=True))
        args = fx.node.map_arg(
            node.args, lambda n: given[n] if n in given else builder.constant(d.constant(n))
        )
        return Integer.typed(builder.call(node.target, *args), scale, offset, width)

    def _linear(self, builder: Builder, node: fx.Node, x: Integer) -> Integer:
        """Round weights for their sums, whose mean error goes into the offset."""
        weight, scale = d.constant(d.input_node(node, 1)).double(), node.meta["scale"]
        exact = weight * x.scale[..., :1, :].transpose(-2, -1) / scale[..., :1, :]
        while exact.dim() > weight.dim() and exact.shape[0] == 1:
            exact = exact[0]
        whole, offset = exact.round().long(), torch.matmul(x.offset, weight)
        if self.settings.corrects_sums:
            observed = self.program.observed[d.input_node(node).name].double()
            values = (observed - x.offset) / x.scale
            mean = values.mean(0)
            whole = round_weights(exact, rows_of(values - mean, exact))
            offset = offset + torch.matmul(mean, exact - whole) * scale
        new = builder.linear(x.node, whole)
        return Integer.typed(new, scale, offset, int(node.meta["width"]))

    def _placeholder(self, node: fx.Node) -> fx.Node:
        with self.module.graph.inserting_before(self.end):
            new = self.module.graph.placeholder(node.name)
        new.meta.update(node.meta, val=node.meta["val"].to(torch.int64))
        for key in ("bounds", "ends_without"):
            new.meta.pop(key, None)
        return new

    def _clear_input(self, node: fx.Node) -> Integer:
        """Take integers as they are; a mask may hold zeros and ones, whatever calibration saw."""
        new = self._placeholder(node)
        seen = self.program.observed[node.name]
        high = max(1, int(seen.abs().max().ceil()))
        low = -high if bool((seen < 0).any()) else 0
        one = torch.ones((), dtype=torch.float64).expand(d.shape_of(node))
        new.meta["type"] = ValueType(one, torch.zeros_like(one), low, high)
        return Integer(new, one, torch.zeros_like(one))

    def _input(self, node: fx.Node, scale: Tensor) -> Integer:
        new = self._placeholder(node)
        if "range" in node.meta:
            low, high = node.meta["range"]
        else:
            values = self.program.observed[node.name].double()
            low, high = (
                _over_rows(values.amin(0), torch.amin),
                _over_rows(values.amax(0), torch.amax),
            )
        offset = ((low + high) / 2).expand(scale.shape)
        span = float(((high - low) / scale.abs()).max())
        bits = max(2, int(torch.tensor(max(span, 2.0)).log2().ceil()))
        return Integer.typed(new, scale, offset, bits)

    def _centre(
        self, builder: Builder, x: Integer, low: Tensor, high: Tensor, width: int
    ) -> Integer:
        """Shift so that the middle of the range is at integer zero."""
        middle = (low + high) / 2
        steps = ((x.offset - middle) / x.scale).round()
        if not bool((steps != 0).any()):
            return x
        node = builder.shift(x.node, steps.long())
        return Integer.typed(node, x.scale, x.offset - steps * x.scale, width)

    def _lookup(self, builder: Builder, node: fx.Node, scale: Tensor, width: int) -> Integer:
        """Look up as often as the map is to be read, and add up to the mean."""
        x = self._filling(builder, node)
        others, zeros = self._behind_other_masks(builder, node, x)
        read = [x, *others]
        answers = [self._reading(builder, node, again, scale * len(read), width) for again in read]
        first = answers[0].node
        self.maps[first] = node
        for answer in answers:
            answer.node.meta["function"] = operator_name(node)
            if "error_variance" in node.meta:
                variance = float(node.meta["error_variance"]) / len(read) ** 2
                answer.node.meta["error_variance"] = f"{variance:.4g}"
        for again in (*zeros, *(a.node for a in answers[1:])):
            again.meta["reading_of"] = first.name
        result = self._mean(builder, answers, width)
        # Centre the result, so that sums of many stay inside their encoding.
        mean = self.program.observed[node.name].double().mean(0)
        steps = ((result.offset - mean) / result.scale).round()
        if not bool((steps != 0).any()):
            return result
        moved = builder.shift(result.node, steps.long())
        return Integer.typed(moved, scale, result.offset - steps * scale, width)

    def _filling(self, builder: Builder, node: fx.Node) -> Integer:
        """Multiply and centre what a map reads, so that its range fills the encoding."""
        source = d.input_node(node)
        x, width = self.values[source], int(source.meta["width"])
        x = self._multiplied(builder, x, times_to_fill(source).long(), width)
        low, high = source.meta["range"]
        return self._centre(builder, x, low, high, width)

    @staticmethod
    def _multiplied(builder: Builder, x: Integer, times: Tensor, width: int) -> Integer:
        """Multiply by whole numbers, which changes what a unit means and nothing else."""
        if not bool((times > 1).any()):
            return x
        return Integer.typed(builder.scale(x.node, times), x.scale / times, x.offset, width)

    def _behind_other_masks(
        self, builder: Builder, node: fx.Node, x: Integer
    ) -> tuple[list[Integer], list[fx.Node]]:
        """Return what a map reads as all its readings but the first read it.

        And the look-ups that encrypt the zeros for that.
        """
        readings = int(node.meta.get("readings", 1))
        if readings == 1:
            return [], []
        bits, width = int(node.meta["lookup_bits"]), int(d.input_node(node).meta["width"])
        source = self._source_of_zeros(bits)
        if source is None:
            reason = "read once: no input stays so far from the ends of its encoding"
            self.program.note(self.settings, node, reason)
            return [], []
        first = Builder(self.module, self.end, node, LowerToIntegers.name)
        first.provenance["is_zero"] = True
        read, read_width = self.values[source], int(source.meta["width"])
        zeros, made_by = encrypted_zeros(first, read, read_width, bits, x, width)
        return behind_other_masks(builder, x, zeros, readings - 1), [made_by]

    def _source_of_zeros(self, bits: int) -> fx.Node | None:
        """Find an input that is never read beyond the ends of a table."""
        deviation = noise_in_slots(self.program.options.chosen_p_error)
        for source in filter(d.is_encrypted, self.program.placeholders):
            if stays_inside(self.values[source], int(source.meta["width"]), bits, deviation):
                return source
        return None

    def _reading(
        self, builder: Builder, node: fx.Node, x: Integer, scale: Tensor, width: int
    ) -> Integer:
        """Look a map up."""
        source, bits = d.input_node(node), int(node.meta["lookup_bits"])
        accumulator = int(source.meta["width"])
        least, greatest = _class_range(self.program, node)
        room = (greatest - least) * ROOM
        tables = build_tables(
            d.map_of(node),
            x.offset,
            x.scale * (1 << (accumulator - bits)),
            scale,
            bits,
            (least - room, greatest + room),
            averages=self.settings.averages_slots,
        )
        read = builder.lookup(x.node, tables.entries, tables.which, bits, accumulator - bits)
        return Integer.typed(read, scale, tables.offset, width)

    def _mean(self, builder: Builder, answers: list[Integer], width: int) -> Integer:
        """Add answers: the sum of the first k is their mean, in units of a k-th."""
        total = answers[0]
        for k, answer in enumerate(answers[1:], 2):
            node = builder.add(total.node, answer.node)
            offset = torch.stack([a.offset for a in answers[:k]]).mean(0)
            total = Integer.typed(node, answer.scale / k, offset, width)
        return total

    def note_overflow(self, exact: Program) -> None:
        """Let each input, look-up and result say what of it will overflow."""
        places, results = estimate_overflow(exact, self.program, self.maps)
        for node, overflow in places.items():
            node.meta["overflow"] = overflow.to_json()
        for node, overflow in zip(self.program.results, results, strict=True):
            node.meta["result_overflow"] = overflow.to_json()

    def result(self, node: fx.Node) -> fx.Node:
        """Fill the encoding with a result, and round it to the bits that the client reads."""
        builder = Builder(self.module, self.end, node, LowerToIntegers.name)
        if node.meta.get("absorbed"):
            # Each element has a factor of its own; their class ends in front of it.
            factor = d.constant(d.input_node(node, 1)).double()
            ends = [end * factor for end in _class_range(self.program, d.input_node(node))]
            low, high = torch.minimum(*ends), torch.maximum(*ends)
        else:
            low, high = _class_range(self.program, node)
        width, bits = int(node.meta["width"]), self.program.options.chosen_result_bits
        value = self.values[node]
        room = value.scale.abs() * 2.0**width
        times = (room / (high - low).clamp_min(1e-300)).floor().clamp(1, 2.0**width)
        value = self._multiplied(builder, value, times.long(), width)
        value = self._centre(builder, value, low, high, width)
        rounded = builder.round(value.node, bits, width - bits)
        scale = value.scale * (1 << width - bits)
        if "error_variance" in node.meta:
            rounded.meta["error_variance"] = node.meta["error_variance"]
        return Integer.typed(rounded, scale, value.offset, bits).node


def _over_rows(x: Tensor, reduce: object) -> Tensor:
    """Reduce over all dimensions but the last."""
    dims = list(range(x.dim() - 1))
    return cast(Tensor, reduce(x, dims, keepdim=True)) if dims else x  # type: ignore[operator]


def _class_range(program: Program, node: fx.Node) -> tuple[Tensor, Tensor]:
    """Return the observed ends of each element's class, of the node's shape."""
    index: Tensor = node.meta["classes"]
    n_classes = 1 + max(
        int(n.meta["classes"].max()) for n in program.encrypted() if n.meta["classes"].numel()
    )
    low, high = class_ends(program, node, lambda n: n.meta["classes"], n_classes)
    return low[index], high[index]
