"""Choose the scale of every class of elements, and the width of every encoding.

Exact in float: the graph is not changed; `node.meta["scale"]` (one a element) and
`node.meta["width"]` are set. A class that a look-up reads is scaled so that its range fills the
encoding; the accumulator is `guard_bits` wider than the look-up at least, and wide enough that
clear weights keep their bits. Linear precision is free behind an approximate rounding, but not
behind a look-up, whose noise weights multiply: sums of answers have `answer_weight_bits`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from fhe_fx.errors import BitWidthError
from fhe_fx.ir import dialect as d
from fhe_fx.ir.ops import LINEAR, SCALE
from fhe_fx.ir.printer import format_program
from fhe_fx.ir.program import Program
from fhe_fx.passes.base import Pass, register
from fhe_fx.quant.classes import (
    Classes,
    absorbed_scales,
    encodings,
    find_classes,
    is_exact_scale,
)
from fhe_fx.quant.filling import Filling, Reads
from fhe_fx.quant.lookup_cost import cost_table, lookup_cost
from fhe_fx.quant.noise_level import (
    NoiseLevel,
    behind_look_ups,
    bits_to_spare,
    greatest_weight,
    squared_norms,
)
from fhe_fx.quant.ranges import class_ends

__all__ = ["AssignScales"]

_BELOW_A_STEP = 0.25
"""Bits by which noise is left short of the next norm of the table: prices rise in steps there."""
MAX_WIDTH = 40
"""Wider accumulators would leave no room for noise in a 64-bit ciphertext."""


@register
@dataclass(frozen=True)
class AssignScales(Pass):
    """Set scales and widths from the observed ranges."""

    name: ClassVar[str] = "assign-scales"
    requires: ClassVar[frozenset[str]] = frozenset(
        {
            "bits",
            "calibrated",
            "fused",
            "inputs-split",
            "no-pairs",
            "no-products",
            "no-softmax",
            "ranges",
        }
    )
    gives: ClassVar[frozenset[str]] = frozenset({"scales"})

    guard_bits: int = 6
    """Bits of an accumulator below what its look-up reads: the sum of the roundings of many table
    results stays far below one slot."""
    room_bits: int = 3
    """By how many bits the values of a class may be left short of their encoding where one look-up
    reads them in a narrower range than another. A look-up multiplies what it reads by a whole
    number, to fill the encoding: by one or two it may leave half of it empty, by eight a ninth."""
    exchange: float = 1.5
    """By how many per cent of itself the squared error must fall for a per cent of cost, for noise
    to be multiplied more than it is anyway."""
    input_margin: float = 0.25
    """Room beyond the calibrated range of an input that only weights read, as a part of it. The
    client clips there: linear precision is free."""

    def run(self, program: Program) -> bool:
        """Find ranges, then widths, then scales.

        Raises:
            BitWidthError: if an accumulator would be wider than a ciphertext can hold.
        """
        state = _State(program, self)
        state.read_ranges()
        state.widen_for_weights()
        widths = state.encoding_widths()
        self._check(program, state, widths)
        state.fill_encodings(widths)
        state.narrow_weights_of_answers()
        state.leave_room(widths)
        scale = state.scales()
        for node in program.encrypted():
            node.meta["classes"] = state.classes.of[node]
            node.meta["scale"] = scale[state.classes.of[node]]
            node.meta["width"] = widths[state.encoding[node]]
        for node, holder in state.absorbed.items():
            factor = d.constant(d.input_node(node, 1)).double()
            sign = -1 if holder.op == "placeholder" else 1
            holder.meta["scale"] = holder.meta["scale"] * factor.expand(d.shape_of(holder)) ** sign
            node.meta["absorbed"] = True
        return False

    def _check(self, program: Program, state: _State, widths: dict[int, int]) -> None:
        wide = [n for n in program.encrypted() if widths[state.encoding[n]] > MAX_WIDTH]
        if wide:
            raise BitWidthError(
                f"{program.name}: an accumulator needs {widths[state.encoding[wide[0]]]} bits; "
                f"a ciphertext holds {MAX_WIDTH}.\n{format_program(program, {wide[0]})}\n"
                f"Try weight_bits={program.options.weight_bits - 2}, or a smaller n_bits."
            )


class _State:
    """Ranges and widths by class, while they are being found."""

    def __init__(self, program: Program, settings: AssignScales) -> None:
        self.program, self.settings = program, settings
        self.classes: Classes = find_classes(program)
        self.encoding = encodings(program)
        self.absorbed = absorbed_scales(program)
        self.behind = behind_look_ups(program)
        n = self.classes.n_classes
        self.range = torch.zeros(n, dtype=torch.float64)
        self.width = torch.zeros(n, dtype=torch.int64)
        self.is_looked_up = torch.zeros(n, dtype=torch.bool)
        self.is_result = torch.zeros(n, dtype=torch.bool)
        self.is_weighted = torch.zeros(n, dtype=torch.bool)

    def _weighted(self) -> list[fx.Node]:
        return [
            n
            for n in self.program.calls(LINEAR, SCALE)
            if n not in self.absorbed and not is_exact_scale(n)
        ]

    def _read(self, node: fx.Node, room: float) -> Tensor:
        """Raise the range of the classes of `node` to what was observed there."""
        classes = self.classes
        low, high = class_ends(self.program, node, classes.of.__getitem__, classes.n_classes)
        present = high >= low
        self.range[present] = torch.maximum(self.range, (high - low) * room)[present]
        return present

    def _read_chosen(self, node: fx.Node) -> Tensor:
        """Raise the range of the classes of `node` to what was chosen for its look-ups."""
        low, high = node.meta["range"]
        index = self.classes.of[node].reshape(-1)
        self.range.scatter_reduce_(0, index, (high - low).reshape(-1), "amax")
        present = torch.zeros_like(self.is_looked_up)
        present[index] = True
        return present

    def read_ranges(self) -> None:
        """Read ranges where values are looked up, returned, or multiplied by weights."""
        options = self.program.options
        for node in self.program.maps():
            present = self._read_chosen(d.input_node(node))
            bits = int(node.meta["lookup_bits"]) + self.settings.guard_bits
            self.width[present] = self.width[present].clamp_min(bits)
            self.is_looked_up |= present
        for node in self.program.results:
            node = d.input_node(node) if self.absorbed.get(node) is node else node
            self.is_result |= self._read(node, 1.0)
        bits = options.chosen_result_bits + self.settings.guard_bits
        self.width[self.is_result] = self.width[self.is_result].clamp_min(bits)
        for node in self._weighted():
            source = d.input_node(node)
            index = torch.unique(self.classes.of[source])
            index = index[~(self.is_looked_up | self.is_result)[index]]
            before = self.range.clone()
            margin = self.settings.input_margin if _is_input(source) else 0.0
            present = self._read(source, 1 + margin)
            keep = torch.ones_like(present)
            keep[index] = False
            self.range[keep] = before[keep]
            self.width[index] = self.width[index].clamp_min(options.input_bits)
            self.is_weighted |= present
        # What never varies is carried by the offset: any scale will do, but a tiny one would make
        # the weights that read it, and so the accumulators, needlessly wide.
        varies = self.range > 0
        usual = float(self.range[varies].median()) if bool(varies.any()) else 1.0
        self.range[~varies] = usual
        self.range.clamp_min_(1e-4 * usual)
        self.width[self.width == 0] = options.input_bits

    def scales(self) -> Tensor:
        """Return the scale of each class."""
        return self.range / torch.pow(2.0, self.width.double())

    def widen_for_weights(self) -> None:
        """Widen classes that clear weights make, until the weights keep their bits."""
        for node in self._weighted():
            is_answer = node.target == LINEAR and d.input_node(node) in self.behind
            least = greatest_weight(self.program, node, self.behind)
            scale = self.scales()
            x, weight = d.input_node(node), d.constant(d.input_node(node, 1)).double()
            s_in, out = scale[self.classes.of[x]], self.classes.of[node]
            if node.target == SCALE:
                unit = (weight * s_in).abs()
            else:
                unit = (weight.abs() * s_in[..., :1, :].transpose(-2, -1)).amax(-2, keepdim=True)
                unit = unit.expand(d.shape_of(node))
            # Where channels share a scale, the largest weight among them counts: the others are
            # added to it, and their rounding is as small beside the sum.
            largest = torch.zeros_like(self.range)
            largest.scatter_reduce_(0, out.reshape(-1), unit.reshape(-1), "amax")
            present = largest > 0
            if not bool(present.any()):
                continue
            need = (self.range[present] * least / largest[present]).log2()
            # Of answers a bit too many costs a larger norm, and parameters go by that in steps.
            need = need.round() if is_answer else need.ceil()
            usual = float(need.quantile(0.75))
            self.width[present] = torch.maximum(self.width[present], need.clamp(max=usual).long())

    def encoding_widths(self) -> dict[int, int]:
        """Return the width of each encoding: the widest of its classes."""
        widths: dict[int, int] = {}
        for node, number in self.encoding.items():
            index = self.classes.of[node]
            if index.numel():
                widths[number] = max(widths.get(number, 0), int(self.width[index].max()))
        return widths

    def fill_encodings(self, widths: dict[int, int]) -> None:
        """Let every class that no weight multiplies use all the bits of its encoding."""
        for node, number in self.encoding.items():
            index = torch.unique(self.classes.of[node])
            index = index[(self.is_looked_up | self.is_result)[index] & ~self.is_weighted[index]]
            self.width[index] = self.width[index].clamp_min(widths[number])

    def narrow_weights_of_answers(self) -> None:
        """Let answers that weights multiply have the bits that their sums do not need.

        Where something else widens the encoding of a sum, finer answers are as good as larger
        weights, and weights multiply noise. All weights that read them become smaller at once, as
        far as their rounding together errs no more than was allotted to them.
        """
        read = {n: self.classes.of[d.input_node(n)].unique() for n in self._weighted()}
        readers: dict[int, list[fx.Node]] = defaultdict(list)
        for node, index in read.items():
            for number in index.tolist():
                readers[number].append(node)
        is_done = torch.zeros_like(self.is_looked_up)
        for index in reversed(read.values()):
            if bool(is_done[index].all()):
                continue
            is_done[index] = True
            if bool((self.is_looked_up | self.is_result)[index].any()):
                continue
            together = {n for number in index.tolist() for n in readers[number]}
            if all(d.input_node(n) in self.behind for n in together):
                self.range[index] /= 2.0 ** self._bits_to_spare(together)

    def _bits_to_spare(self, products: Collection[fx.Node]) -> float:
        """Return by how many bits the weights of products are larger than they have to be."""
        scale = self.scales()
        spare = bits_to_spare(
            self.program,
            self.behind,
            {n: max(1.0, float(self._whole_weight(n, scale).abs().max())) for n in products},
        )
        return max(0.0, spare)

    def leave_room(self, widths: dict[int, int]) -> None:
        """Stretch scales, and widen encodings, so that look-ups fill their slots better.

        Noise that arrives is multiplied before it is read: it may become as large as it is
        elsewhere, and larger where what look-ups then err less is worth the price.
        """
        if not self.program.maps():
            return
        reads, results, has_noise = self._reads(widths)
        classes_of = {e: torch.zeros_like(self.is_looked_up) for e in widths}
        for node, number in self.encoding.items():
            if number in widths:
                classes_of[number][self.classes.of[node].reshape(-1)] = True
        held = self.is_weighted | self.is_result
        bound, most = held.clone(), {}
        for number, own in classes_of.items():
            most[number] = min(self.settings.room_bits, MAX_WIDTH - widths[number])
            if bool(self.is_result[own].any()):
                most[number] = 0
            # Weighed answers that keep their scale are multiplied more in all that is made of them.
            if bool((self.is_weighted & has_noise)[own].any()):
                bound |= own
        looked = {e: own & self.is_looked_up for e, own in classes_of.items()}
        options = self.program.options
        # Every result is said what rounding adds to all of them together.
        rounding = [float(n.meta.get("error_variance", 0)) for n in self.program.results]
        others = max(rounding, default=0.0)

        def found(norm: float) -> tuple[float, Filling]:
            filling = Filling.best(reads, looked, held, bound, most, norm)
            price = self._price(0.5 * math.log2(max(norm, 1.0)), results)
            error = max(filling.error + others, 1e-30)
            return self.settings.exchange * math.log(max(price, 1.0)) + math.log(error), filling

        greatest = float(reads.stretched(1.0, len(held))[1].max())
        norms = [greatest]
        if options.max_cost is None:
            ends = [n - _BELOW_A_STEP for n in cost_table().log_norms]
            norms += [
                4.0**n
                for n in ends
                if 4.0**n > greatest and NoiseLevel(n, results).is_known(options.chosen_p_error)
            ]
        filling = min(map(found, norms), key=lambda pair: pair[0])[1]
        for number, own in looked.items():
            widths[number] += filling.wider[number]
            self.width[own & ~held] += filling.wider[number]
        self.range[~held] *= filling.stretch[~held]

    def _reads(self, widths: dict[int, int]) -> tuple[Reads, float, Tensor]:
        """Return what look-ups read, log2 of the greatest norm of results, what has noise."""
        scale = self.scales()
        norms = squared_norms(self.program, lambda n: self._whole_weight(n, scale))
        has_noise = torch.zeros_like(self.is_result)
        for node, norm in norms.items():
            has_noise[self.classes.of[node][norm > 0]] = True
        found = []
        for reader in self.program.maps():
            source = d.input_node(reader)
            index = self.classes.of[source].reshape(-1)
            low, high = (end.reshape(-1) for end in source.meta["range"])
            room = scale[index] * 2.0 ** widths[self.encoding[source]]
            error = float(reader.meta.get("error_variance", 1)) / max(1, len(room))
            each = torch.full_like(room, error / int(reader.meta.get("readings", 1)))
            full = room / (high - low).clamp_min(1e-300)
            found.append((index, full, norms[source].reshape(-1), each))
        results = max([1.0, *(float(norms[n].max()) for n in self.program.results)])
        reads = Reads(*map(torch.cat, zip(*found, strict=True)))
        return reads, 0.5 * math.log2(results), has_noise

    def _price(self, look_ups: float, results: float) -> float:
        """Return the predicted cost of all look-ups at such a noise of sums."""
        options, noise = self.program.options, NoiseLevel(look_ups, results)
        p_error, result_bits = options.chosen_p_error, options.chosen_result_bits
        total = 0.0
        for n in self.program.maps():
            bits = int(n.meta["lookup_bits"])
            price = lookup_cost(bits, p_error, noise.at(bits, p_error, result_bits))
            total += price * math.prod(d.shape_of(n)) * int(n.meta.get("readings", 1))
        return total

    def _whole_weight(self, node: fx.Node, scale: Tensor) -> Tensor:
        """Return the integers that a weight becomes, before they are rounded."""
        weight = d.constant(d.input_node(node, 1)).double()
        if node in self.absorbed:
            return torch.ones((), dtype=torch.float64)
        before, after = (scale[self.classes.of[n]] for n in (d.input_node(node), node))
        if node.target == SCALE:
            return weight if is_exact_scale(node) else weight * before / after
        return weight * before[..., :1, :].transpose(-2, -1) / after[..., :1, :]


def _is_input(node: fx.Node) -> bool:
    """Say whether a node is an input, moved."""
    return d.before_moves(node).op == "placeholder"
