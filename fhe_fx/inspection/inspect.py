"""Runs an encrypted part in float and in integers side by side, and compares every node."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fhe_fx.backends.reference.batch import run_batch
from fhe_fx.errors import InputError, OptionsError, TargetError, did_you_mean
from fhe_fx.inspection.results import Inspection, NodeErrors, RegionErrors
from fhe_fx.inspection.twin import Twins, twins_of
from fhe_fx.ir import dialect as d
from fhe_fx.ir.ops import LOOKUP, ROUND, SHIFT
from fhe_fx.ir.printer import operator_name
from fhe_fx.ir.program import Program
from fhe_fx.ir.types import ValueType
from fhe_fx.ir.views import Lookup, Round
from fhe_fx.quant.calibration import as_call
from fhe_fx.quant.lookup_noise import LookupNoise
from fhe_fx.report import report_on
from fhe_fx.report.overflow import expected_outside
from fhe_fx.runtime.codec import Codec
from fhe_fx.runtime.lower import inputs_of_region
from fhe_fx.runtime.ranges import RangeWatch, clips, range_warnings, wraps
from fhe_fx.runtime.region import Region, as_given
from fhe_fx.runtime.standin import StandIn, stand_ins

__all__ = ["MODES", "THRESHOLD", "inspect"]

THRESHOLD = 0.1
"""Relative error from which a node is pointed out, unless another is given."""
MODES = ["clear", "simulate"]
"""How the integers are run."""
MAX_SAMPLES = 64
"""Inputs that are compared; more are thinned out evenly."""


def inspect(
    model: nn.Module,
    inputs: Any,
    *,
    mode: str = "clear",
    threshold: float = THRESHOLD,
    on_progress: Callable[[str], None] = lambda text: None,
) -> Inspection:
    """Show float beside integer at every node of the encrypted parts of a model.

    The model runs in float on the inputs. What then enters each part is run through its integers,
    in the clear or with the noise of encryption, and through its float program as the passes left
    it: so every node has a float value to be compared with.

    Args:
        model: returned by `encrypt_submodule`; its modes are left as they are.
        inputs: one model input, or an iterable of them: a tensor, a tuple of tensors or a mapping.
            Other ones than calibration saw, or the figures flatter. Best as long as the circuit:
            the rows with which a shorter one is padded are compared, too.
        mode: "clear"; or "simulate", in which what each look-up reads is disturbed as encryption
            would. Values are counted as outside before that, so the counts are of what sums carry.
        threshold: relative error from which a node is pointed out.
        on_progress: is told what is being done.

    Raises:
        TargetError: if the model has no encrypted part.
        InputError: if there is no input, or none reaches an encrypted part.
        OptionsError: if the threshold is not positive, or there is no such mode.
    """
    if mode not in MODES:
        raise OptionsError(
            f"mode={mode!r} is not one of {', '.join(MODES)}.{did_you_mean(str(mode), MODES)}"
        )
    if not isinstance(threshold, (int, float)) or not threshold > 0:
        raise OptionsError(f"threshold={threshold!r} is not a positive number. Try 0.1.")
    if not stand_ins(model):
        raise TargetError(
            f"{type(model).__name__} has no encrypted part. Use the model that "
            f"fhe_fx.encrypt_submodule returned."
        )
    on_progress("running the model in float")
    regions = []
    for region, samples in _recorded(model, _listed(inputs)):
        kept = torch.linspace(0, len(samples) - 1, min(len(samples), MAX_SAMPLES)).round().long()
        on_progress(f"lowering {region.name} again, to have its float program")
        twins = twins_of(region)
        on_progress(f"comparing {region.name}")
        chosen = [samples[i] for i in kept.tolist()]
        regions.append(_compare(region, twins, chosen, mode, threshold))
    return Inspection(tuple(regions))


def _listed(inputs: Any) -> list[Any]:
    """Return model inputs, of which one may have been given alone."""
    is_one = isinstance(inputs, Tensor) or hasattr(inputs, "keys")
    is_arguments = isinstance(inputs, tuple) and all(isinstance(x, Tensor) for x in inputs)
    if is_one or is_arguments:
        return [inputs]
    if isinstance(inputs, str) or not isinstance(inputs, Iterable):
        raise InputError(f"The inputs are a {type(inputs).__name__}; give a list of model inputs.")
    found = list(inputs)
    if not found:
        raise InputError("There is no input to inspect the model with. Give some.")
    return found


def _recorded(model: nn.Module, inputs: Sequence[Any]) -> list[tuple[Region, list[list[Tensor]]]]:
    """Run the model in float, and return what entered each region that was called."""
    found: dict[int, tuple[Region, list[list[Tensor]]]] = {}

    def record(module: StandIn, args: Any, kwargs: dict[str, Any]) -> None:
        part = module.part_for(args, kwargs)
        samples = found.setdefault(id(part.region), (part.region, []))[1]
        samples += [[as_given(x).cpu() for x in s] for s in part.samples_of(*args, **kwargs)]

    parts = stand_ins(model)
    modes = [part.mode for part in parts]
    handles = [p.register_forward_pre_hook(record, with_kwargs=True) for p in parts]
    try:
        with torch.no_grad():
            for part in parts:
                part.mode = "disable"
            for given in inputs:
                call = as_call(given)
                model(*call.args, **call.kwargs)
    finally:
        for handle in handles:
            handle.remove()
        for part, mode in zip(parts, modes, strict=True):
            part.mode = mode
    if not found:
        raise InputError("No encrypted part was called on these inputs.")
    return list(found.values())


def _compare(
    region: Region,
    twins: Twins,
    samples: Sequence[Sequence[Tensor]],
    mode: str,
    threshold: float,
) -> RegionErrors:
    given = inputs_of_region(region.composed, samples)
    exact = twins.exact.values(given)
    codec = Codec.of(twins.integers)
    encoded = [[torch.from_numpy(q) for q in codec.encode(inputs)] for inputs in given]
    # Each placeholder has an encoding of its own from here on.
    twins.integers.sources = {n.name: k for k, n in enumerate(twins.integers.placeholders)}
    values = _integer_values(twins.integers, encoded, mode)
    costs = {n.node: n for n in report_on([(twins.integers, None)]).regions[0].nodes}
    rows = []
    for node in twins.integers.encrypted():
        name = twins.counterpart.get(node.name)
        if name is None or values[node.name].numel() == 0:
            continue
        errors = _errors(node, values[node.name], exact[name].double())
        cost = costs.get(node.name)
        rows.append(
            NodeErrors(
                node=node.name,
                operator=_operator(node),
                reads=tuple(n.name for n in d.operands(node)),
                module_path=str(node.meta.get("module_path", "")),
                source=str(node.meta.get("source", "")),
                shape=d.shape_of(node),
                bits=node.meta["type"].bits,
                lookup_bits=Lookup.of(node).bits if d.is_call(node, LOOKUP) else None,
                is_minor=_is_minor(node),
                outside=_outside(node, values, exact[name]),
                values=values[node.name].numel(),
                look_ups=cost.look_ups if cost else 0,
                cost=cost.share if cost else 0.0,
                expected_outside=expected_outside(node),
                **errors,
            )
        )
    return RegionErrors(
        name=region.program.name,
        tokens=region.tokens,
        n_samples=len(samples),
        nodes=tuple(rows),
        result_errors=_result_errors(region, twins, given, values, codec),
        threshold=threshold,
        mode=mode,
        warnings=(*_range_warnings(region, given), *_overlap_warnings(region, given)),
    )


def _integer_values(
    program: Program, encoded: Sequence[Sequence[Tensor]], mode: str
) -> dict[str, Tensor]:
    """Return the value of each encrypted node, `[n_samples, *shape]`."""
    options = program.options
    noise = LookupNoise.of(options.chosen_p_error, options.seed) if mode == "simulate" else None
    found: dict[str, list[Tensor]] = {}
    run_batch(
        program,
        program.stacked(encoded),
        noise=noise,
        record=lambda node, value: found.setdefault(node.name, []).append(value),
    )
    return {name: torch.cat(parts) for name, parts in found.items()}


def _range_warnings(region: Region, given: Sequence[Sequence[Tensor]]) -> list[str]:
    watch = RangeWatch(region.program)
    watch.run(given)
    return range_warnings(watch.uses.values())


def _overlap_warnings(region: Region, given: Sequence[Sequence[Tensor]]) -> list[str]:
    """Warn of inputs that calibration saw: on them, ranges fit best."""
    known = torch.stack([sample[0].flatten() for sample in region.captured.samples]).double()
    ours = torch.stack([sample[0].flatten() for sample in given]).double()
    # The same input may differ in its last digits: it was computed in another batch.
    nearest = torch.cdist(ours, known).amin(1)
    shared = int((nearest <= 1e-5 * ours.norm(dim=1).clamp_min(1e-12)).sum())
    if not shared:
        return []
    said = (
        f"{shared} of the {len(given)} inputs are calibration inputs, for which ranges were made."
    )
    return [f"{said} Use other ones."]


def _operator(node: fx.Node) -> str:
    if node.op == "placeholder":
        return "input"
    name = str(node.meta["function"]) if d.is_call(node, LOOKUP) else operator_name(node)
    return "identity" if name == "map[]" else name


def _is_minor(node: fx.Node) -> bool:
    is_last = any(user.op == "output" for user in node.users)
    moves = d.is_call(node, *d.STRUCTURAL) and not d.is_call(node, d.CAT)
    return not is_last and (moves or (d.is_call(node, SHIFT) and _slot(node) is None))


def _errors(node: fx.Node, integers: Tensor, exact: Tensor) -> dict[str, Any]:
    """Return the float figures of a node.

    Args:
        node: of the integer program.
        integers: its values, `[n_samples, *shape]`.
        exact: what they stand for, likewise, float64.
    """
    t: ValueType = node.meta["type"]
    slot = _slot(node)
    wrong = integers * t.scale + t.offset - exact
    error = _rms(wrong)
    return {
        "low": float((t.low * t.scale + t.offset).min()),
        "high": float((t.high * t.scale + t.offset).max()),
        "float_low": float(exact.min()),
        "float_high": float(exact.max()),
        "error": error,
        "relative_error": error / max(_rms(exact), 1e-30),
        "slot": None if slot is None else float(slot.mean()),
        "slots": None if slot is None else _rms(wrong / slot),
    }


def _slot(node: fx.Node) -> Tensor | None:
    """Return the real width of what a look-up that reads a node tells apart; None if none does."""
    hidden = [Lookup.of(user).lsbs for user in node.users if d.is_call(user, LOOKUP)]
    scale: Tensor = node.meta["type"].scale
    return scale.abs() * (1 << min(hidden)) if hidden else None


def _outside(node: fx.Node, values: dict[str, Tensor], exact: Tensor) -> int:
    """Count the values beyond the range of a node."""
    t: ValueType = node.meta["type"]
    found = values[node.name]
    if node.op == "placeholder":
        is_outside = clips(node, exact)
    elif d.is_call(node, LOOKUP):
        view = Lookup.of(node)
        is_outside = wraps(view, values[view.x.name])
    elif d.is_call(node, ROUND):
        result = Round.of(node)
        whole, end = values[result.x.name] / (1 << result.lsbs), float(1 << result.bits)
        is_outside = (whole < -end - 0.5) | (whole >= end - 0.5)
    elif any(user.op == "output" for user in node.users):
        is_outside = (found < t.low) | (found > t.high)
    else:
        return 0  # sums wrap and come back; only what is read, sent or decrypted must fit
    return int(is_outside.sum())


def _result_errors(
    region: Region,
    twins: Twins,
    given: Sequence[Sequence[Tensor]],
    values: dict[str, Tensor],
    codec: Codec,
) -> tuple[float, ...]:
    """Compare decoded results with those of the part in float, before any pass."""
    expected = [region.captured(*inputs) for inputs in given]
    errors = []
    for k, (node, port) in enumerate(zip(twins.integers.results, codec.results, strict=True)):
        exact = torch.stack([results[k] for results in expected]).double()
        ours = values[node.name] * port.type.scale + port.type.offset
        errors.append(_rms(ours - exact) / max(_rms(exact), 1e-30))
    return tuple(errors)


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())
