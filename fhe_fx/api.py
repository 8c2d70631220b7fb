"""The public verbs: encrypt a submodule, compile it, choose its mode, report its cost."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fhe_fx.backends import facts_by
from fhe_fx.capture import (
    capture,
    clear_names,
    graph_of,
    graph_of_exported,
    parameter_of,
    resolve_targets,
    submodule_between,
    submodules_of,
)
from fhe_fx.errors import CalibrationError, CaptureError, FheFxError, PassError, TargetError
from fhe_fx.export.cache import Cache
from fhe_fx.export.files import graph_of_file
from fhe_fx.export.model import save_for_two
from fhe_fx.ir import dialect as d
from fhe_fx.ir.ops import ENTER, LEAVE
from fhe_fx.ir.program import Program
from fhe_fx.options import Options
from fhe_fx.passes import Annotate, Partition, Pipeline, default_pipeline
from fhe_fx.passes.normalize import Normalize
from fhe_fx.passes.partition import ENCRYPTED
from fhe_fx.quant.calibration import Call, as_call, check_calibration, sample_from_model
from fhe_fx.report import Report, report_on
from fhe_fx.runtime.agreement import Agreement
from fhe_fx.runtime.generate import generate
from fhe_fx.runtime.keyring import Keyring, LoweredAlike
from fhe_fx.runtime.ladder import Ladder
from fhe_fx.runtime.lower import Lowerer, lower_region, run_pipeline
from fhe_fx.runtime.module import EncryptedModule
from fhe_fx.runtime.region import Region, as_given
from fhe_fx.runtime.signature import Signature, keyed_leaves
from fhe_fx.runtime.standin import StandIn, encrypted_modules, put, stand_ins
from fhe_fx.runtime.whole import Whole, called_as

__all__ = [
    "build_region",
    "compile",
    "encrypt_submodule",
    "encrypted_modules",
    "generate",
    "report",
    "set_mode",
    "trace",
]

M = TypeVar("M", bound=nn.Module)
DEFAULT_TOKENS = 8
MAX_SAMPLES = 512
"""Calibration inputs that are run; more are thinned out evenly."""


class _Default(int):
    """A number that the caller did not write, so that options may hold another."""


_DEFAULT_BITS = _Default(Options.n_bits)
_Lowered = list[tuple[Region, Signature]]
"""The targets of one length."""
_ATTEMPTS, _TIGHTER = 4, 0.75
"""How often a circuit that agrees too seldom is made again, and by what its error is lowered."""


def encrypt_submodule(
    model: M,
    target: str | Sequence[str] | None = None,
    *,
    from_nodes: str | Sequence[str] | None = None,
    to_nodes: str | Sequence[str] | None = None,
    n_bits: int = _DEFAULT_BITS,
    max_tokens: int | Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    clear_inputs: str | Sequence[str] = (),
    calibration: Iterable[Any] | None = None,
    example: Any = None,
    input_bits: int | None = None,
    weight_bits: int | None = None,
    p_error: float | None = None,
    max_error: float | None = None,
    max_cost: float | None = None,
    target_agreement: float | None = None,
    passes: Pipeline | None = None,
    options: Options | None = None,
    dump_dir: str | Path | None = None,
    cache: Cache | None = None,
) -> M:
    """Return a copy of a model in which a submodule can run on encrypted data.

    Args:
        model: any module that `torch.export` captures, or an fx graph (`fhe_fx.trace` makes one of
            an exported program or an ONNX file). It is left as it is.
        target: dotted path of a submodule, a unique suffix, a glob, `"re:..."`, or a list of these;
            "" is the model itself. Of one that is given token numbers the client computes the
            embedding.
            The circuits of several have keys in common; encrypt one after the other for keys apart.
        from_nodes: in place of a target, where the model is an fx graph: names of the nodes, or
            paths of the submodules, at which the encrypted region begins.
        to_nodes: those at which it ends. See `fhe_fx.trace`.
        n_bits: precision of a quantized activation, 4 unless the options say otherwise.
        max_tokens: rows that the circuit takes; shorter prompts are padded where the region is
            causal. By default the usual length of the calibration inputs, or 8. Several lengths,
            as in (4, 8, 16), make a circuit each, with keys in common; a call takes the shortest
            that it fits.
        heads: encrypt these heads of an attention only, with their q, k and v projections.
        clear_inputs: arguments of the targets that the server may see, such as a mask, by the name
            of the parameter: the circuit multiplies by them without a look-up. All others that
            depend on the model's input are encrypted.
        calibration: model inputs, each a tensor, a tuple of tensors or a mapping of keyword
            arguments. Without them a language model writes its own.
        example: one such input, whose shapes the circuit takes; by default the first calibration
            input that is long enough.
        input_bits: precision of the client's encrypted input.
        weight_bits: least precision of a clear weight.
        p_error: probability that one look-up reads a neighbouring entry; by default it is chosen
            with the widths of look-ups, for the least cost at the precision that n_bits asks for.
        max_error: error that look-ups may make instead, in parts of the results' deviation.
        max_cost: complexity that a circuit may have; then the least error is made that it allows.
            Where several circuits share keys, both hold for the first target at the greatest
            length, and the other circuits take its widths.
        target_agreement: how often the model shall predict what it does in float (the largest of
            its first result's numbers, at every position), with the noise of look-ups. The largest
            error at which it does is found on the calibration inputs, and is the budget.
        passes: a pipeline in place of `fhe_fx.passes.default_pipeline()`.
        options: all other choices; the keywords above win over it.
        dump_dir: where a directory for each target is written with its print after every pass that
            changed it, for reading, `fhe-fx graph` and `fhe-fx diff`.
        cache: where what was lowered is kept, and looked for; nothing is kept without one.

    Returns:
        A model of the same class. Each target is a module with `.mode`, at first "disable".

    Raises:
        TargetError: if the target does not exist, is ambiguous, or has no such heads.
        OptionsError: if a number is outside its domain.
        CalibrationError: if calibration inputs are missing, malformed or not finite.
        CaptureError: if the model cannot be captured, or the target is not one region.
        UnsupportedOpError: lists all operators of the target that cannot run encrypted.
        BitWidthError: if an accumulator cannot be held.
        PassError: if max_error, max_cost or target_agreement cannot be kept to; says what can.
    """
    given = {
        "n_bits": None if isinstance(n_bits, _Default) else n_bits,
        "input_bits": input_bits,
        "weight_bits": weight_bits,
        "p_error": p_error,
        "max_error": max_error,
        "max_cost": max_cost,
        "target_agreement": target_agreement,
    }
    known = {k: v for k, v in given.items() if v is not None}
    options = dataclasses.replace(options or Options(), **known)  # type: ignore[arg-type]
    if isinstance(model, torch.export.ExportedProgram):
        raise CaptureError("The model is an ExportedProgram; give its graph, fhe_fx.trace(model).")
    if not isinstance(model, nn.Module):
        raise CaptureError(f"The model is a {type(model).__name__}; give a torch.nn.Module.")
    if heads is not None and not _is_numbers(heads):
        raise TargetError(f"heads={heads!r} is not a list of head numbers. Try heads=[0].")
    if from_nodes is not None or to_nodes is not None:
        model, target = _cut_between(model, target, from_nodes, to_nodes)
    if target is None:
        raise TargetError("No target is given. Name a submodule, such as 'h.0.attn'.")
    if isinstance(model, fx.GraphModule):
        cut, target = submodules_of(model, target)
        model = cast(M, cut)
    paths = resolve_targets(model, target)
    is_whole = paths == [""]
    _refuse_encrypted(model, paths)
    _check_weights(model, paths)
    clear = clear_names(model, paths, clear_inputs)
    pipeline = passes or default_pipeline()
    if dump_dir is not None:
        pipeline = pipeline.dumping(Path(dump_dir))
    pipeline.check()
    copied: nn.Module = _copied(model).eval()
    _without_cache(copied)
    if is_whole:
        copied = Whole(copied).eval()
        paths = [copied.name]
    with _in_float(copied):
        sample = sample_from_model if cache is None else cache.sampled
        lengths = _calibration_calls(
            copied, calibration, example, max_tokens, options, sample, has_masks=bool(clear)
        )
        kept: Lowerer = run_pipeline if cache is None else cache.lowered

        def lowered(options: Options, lower: Lowerer = kept) -> list[_Lowered]:
            if len(paths) * len(lengths) > 1:
                lower = LoweredAlike(lower)
            return [
                _lower(copied, paths, calls, first, heads, pipeline, options, lower, clear)
                for calls, first in reversed(lengths)
            ][::-1]

        if options.target_agreement is None:
            made = lowered(options)
        else:
            made = _lowered_to_agree(copied, paths, lengths[-1][0], options, lowered)
    regions = [region for targets in made for region, _ in targets]
    if len(regions) > 1:
        Keyring(regions)
    found: dict[nn.Module, StandIn] = {}
    for path, *rungs in zip(paths, *made, strict=True):
        original = copied.get_submodule(path)
        parts = [EncryptedModule(original, region, signature) for region, signature in rungs]
        found[original] = parts[0] if len(parts) == 1 else Ladder(original, parts)
    if is_whole:
        ((original, stand_in),) = found.items()
        copied = called_as(original, stand_in)
    else:
        put(copied, found)
    save_for_two(copied)
    return cast(M, copied)


def trace(
    model: nn.Module | torch.export.ExportedProgram | str | Path, example: Any = None
) -> fx.GraphModule:
    """Return a model as a graph of which `encrypt_submodule` takes a part.

    The part is named as a submodule of the model that it was, where the graph records those, or by
    nodes (`from_nodes=`, `to_nodes=`); `print(graph.graph)` lists them.

    Args:
        model: any module that `torch.export` captures, an exported program, or the path of a `.pt2`
            or `.onnx` file. The graph of a module shares its parameters.
        example: for a module, one input of it: a tensor, a tuple of tensors or a mapping of keyword
            arguments. The graph takes inputs of its shapes, as the model does.

    Raises:
        CaptureError: if the model cannot be captured, or its shapes are dynamic.
        UnsupportedOpError: lists all operators of an ONNX file that have no translation.
        ModelError: if a file does not exist or cannot be read.
    """
    if isinstance(model, (str, Path)):
        return graph_of_file(Path(model))
    if isinstance(model, torch.export.ExportedProgram):
        return graph_of_exported(model)
    if not isinstance(model, nn.Module):
        raise CaptureError(f"The model is a {type(model).__name__}; give a torch.nn.Module.")
    if example is None:
        raise CaptureError(
            "A module is traced on an input. Give one: fhe_fx.trace(model, example)."
        )
    call = _plain(model, as_call(example))
    copied = copy.deepcopy(model, {id(p): p for p in (*model.parameters(), *model.buffers())})
    copied.eval()
    _without_cache(copied)
    return graph_of(copied, call.args, call.kwargs)


def _cut_between(
    model: M,
    target: str | Sequence[str] | None,
    from_nodes: str | Sequence[str] | None,
    to_nodes: str | Sequence[str] | None,
) -> tuple[M, str]:
    """Make the region between two sets of nodes a submodule; return its name."""
    if target is not None:
        raise TargetError(
            f"target={target!r} and nodes are both given. "
            f"Give a target, or from_nodes and to_nodes."
        )
    if from_nodes is None or to_nodes is None:
        missing = "from_nodes" if from_nodes is None else "to_nodes"
        raise TargetError(f"{missing} is not given. A region has a beginning and an end.")
    if not isinstance(model, fx.GraphModule):
        raise TargetError(
            f"from_nodes and to_nodes name nodes of a graph, and the model is a "
            f"{type(model).__name__}. Give fhe_fx.trace(model, example), whose .graph lists them."
        )
    cut, name = submodule_between(model, from_nodes, to_nodes)
    return cast(M, cut), name


def _lower(
    model: nn.Module,
    paths: Sequence[str],
    calls: Sequence[Call],
    first: Call,
    heads: Sequence[int] | None,
    pipeline: Pipeline,
    options: Options,
    lower: Lowerer,
    clear: Collection[str] = (),
) -> list[tuple[Region, Signature]]:
    """Capture a model at the length of its example, and lower each target."""

    def is_clear(path: str, leaf: str) -> bool:
        return leaf in clear or parameter_of(model.get_submodule(path), leaf) in clear

    def clear_leaves(path: str, args: Any, kwargs: Any) -> list[int]:
        return [i for i, leaf in enumerate(keyed_leaves(args, kwargs)) if is_clear(path, leaf)]

    whole = capture(model, first.args, first.kwargs, paths, clear_leaves, is_whole=False)
    recorded = _record(model, paths, [first, *calls])
    made = []
    for p in paths:
        seen = [leaf for leaf in recorded[p][0][0] if is_clear(p, leaf)]
        made.append(build_region(whole, p, recorded[p], heads, pipeline, options, lower, seen))
    for region, _ in made:
        region.tokens, region.call = _length(first), first
    return made


def _lowered_to_agree(
    model: nn.Module,
    paths: Sequence[str],
    calls: Sequence[Call],
    options: Options,
    lowered: Callable[..., list[_Lowered]],
) -> list[_Lowered]:
    """Lower with the largest error of look-ups at which predictions agree often enough."""
    target = cast(float, options.target_agreement)
    agreement = Agreement(model, calls, options.seed)

    def parts(made: list[_Lowered]) -> list[EncryptedModule]:
        named = zip(paths, made[-1], strict=True)
        return [EncryptedModule(model.get_submodule(p), *both) for p, both in named]

    plain = dataclasses.replace(options, target_agreement=None)
    in_float = lowered(plain, lambda captured, pipeline: captured)
    error = agreement.error_at(target, parts(in_float))
    tried = []
    for _ in range(_ATTEMPTS):
        made = lowered(dataclasses.replace(plain, max_error=error))
        found = agreement.simulated(parts(made))
        if found >= target:
            return made
        tried.append(f"{found:.3f} at max_error={error:.2g}")
        error *= _TIGHTER
    raise PassError(
        f"{', '.join(paths)}: target_agreement={target:g} is not reached on the calibration "
        f"inputs: {'; '.join(tried)}. Try more n_bits than {options.n_bits}, which are finer where "
        f"look-ups are not what errs, or target_agreement={float(tried[-1].split()[0]):g}."
    )


def compile(model: nn.Module, *, verbose: bool = True) -> Report:
    """Compile every encrypted part that is not compiled yet; nothing else needs Concrete sooner.

    Args:
        model: returned by `encrypt_submodule`.
        verbose: print one line on standard error for each circuit.

    Raises:
        BitWidthError: if no parameters exist for a circuit; says what would compile.
    """
    modules = encrypted_modules(model)
    for number, module in enumerate(modules):
        module.region.circuit()
        if verbose:
            sys.stderr.write(report(model).regions[number].line() + "\n")
    return report(model)


def set_mode(model: nn.Module, mode: str) -> None:
    """Switch every encrypted part to `disable`, `clear`, `simulate`, `execute` or `remote`.

    Raises:
        OptionsError: if there is no such mode, or no server for `remote`.
        TargetError: if the model has no encrypted part.
    """
    encrypted_modules(model)
    for stand_in in stand_ins(model):
        stand_in.mode = mode


def report(model: nn.Module, *, backend: str | None = None) -> Report:
    """Return what the encrypted parts of a model cost.

    Args:
        model: returned by `encrypt_submodule`.
        backend: compile with this one, by name, and return what it says; by default what is known
            of the circuits that `fhe_fx.compile` made.

    Raises:
        TargetError: if the model has no encrypted part.
        BackendError: if there is no such backend, or it fails.
    """
    parts = [(part, len(s.parts) > 1) for s in stand_ins(model) for part in s.parts]
    encrypted_modules(model)
    regions = [part.region for part, _ in parts]
    return report_on(
        [(r.program, facts_by(backend, r.program) if backend else r.facts) for r in regions],
        [part.region.tokens if has_others else None for part, has_others in parts],
    )


# Calibration ----------------------------------------------------------------------------------


def _calibration_calls(
    model: nn.Module,
    calibration: Iterable[Any] | None,
    example: Any,
    max_tokens: int | Sequence[int] | None,
    options: Options,
    sample: Callable[[nn.Module, int, Options], list[Call]],
    *,
    has_masks: bool = False,
) -> list[tuple[list[Call], Call]]:
    """Return calibration calls and an example for each length, from the shortest to the longest."""

    def plain(call: Call) -> Call:
        return call if has_masks else _plain(model, call)

    lengths = _lengths(max_tokens)
    shown = None if example is None else _split_batch(plain(as_call(example)))[0]
    usual = lengths[-1] if lengths else _length(shown) or 0
    if calibration is None:
        usual = usual or DEFAULT_TOKENS
        calls = sample(model, usual, options)
    else:
        given = check_calibration(calibration)
        calls = [row for c in given for row in _split_batch(plain(c))]
        known = sorted(n for c in calls if (n := _length(c)) is not None)
        usual = usual or (known[len(known) // 2] if known else 0)
    return [_calls_of_length(model, calls, shown, n) for n in lengths or [usual]]


def _lengths(max_tokens: int | Sequence[int] | None) -> list[int]:
    """Return the lengths that were asked for, in order; none if that is left open."""
    if max_tokens is None:
        return []
    is_list = isinstance(max_tokens, Sequence) and not isinstance(max_tokens, str)
    given: list[Any] = list(max_tokens) if is_list else [max_tokens]  # type: ignore[arg-type]
    is_number = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in given)
    if not given or not is_number:
        what = "a list of positive integers" if is_list else "a positive integer"
        raise CalibrationError(f"max_tokens={max_tokens!r} is not {what}.")
    return sorted(set(given))


def _calls_of_length(
    model: nn.Module, calls: Sequence[Call], shown: Call | None, length: int
) -> tuple[list[Call], Call]:
    """Return the calibration calls of one length, and the example call."""
    if shown is not None and (cut := _cut(shown, length)) is None:
        raise CalibrationError(
            f"The example has {_length(shown)} tokens, fewer than max_tokens={length}. "
            f"Give a longer one, or leave one of the two out."
        )
    shown = shown and cut
    fitting = _windows(calls, length)
    if shown is None:
        if not fitting:
            raise CalibrationError(
                f"None of the {len(calls)} calibration inputs has {length} tokens or more. "
                f"Give longer ones, or a smaller max_tokens."
            )
        shown = fitting[0]
    shapes = [tuple(t.shape) for t in shown.tensors()]
    fitting = [c for c in fitting if [tuple(t.shape) for t in c.tensors()] == shapes]
    if len(fitting) < 2:
        raise CalibrationError(
            f"{len(fitting)} calibration input(s) have the example's shapes {shapes}; at least 2 "
            f"are needed, and some dozens are wise."
        )
    extra = {"use_cache": False} if _takes_use_cache(model) else {}
    with_flag = [Call(c.args, {**c.kwargs, **extra}) for c in fitting]
    return with_flag, Call(shown.args, {**shown.kwargs, **extra})


def _plain(model: nn.Module, call: Call) -> Call:
    """Drop an attention mask of ones that the model can do without; refuse one with zeros."""
    mask = call.kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and not bool((mask != 0).all()):
        raise CalibrationError(
            "A calibration input has an attention_mask with zeros. Give unpadded inputs, one each."
        )
    parameter = inspect.signature(model.forward).parameters.get("attention_mask")
    needed = parameter is not None and parameter.default is inspect.Parameter.empty
    dropped = {"use_cache"} if needed else {"attention_mask", "use_cache"}
    return Call(call.args, {k: v for k, v in call.kwargs.items() if k not in dropped})


def _length(call: Call | None) -> int | None:
    """Return the number of tokens of a call whose first tensor holds token numbers."""
    tensors = call.tensors() if call else []
    if tensors and not tensors[0].is_floating_point() and tensors[0].dim() == 2:
        return tensors[0].shape[1]
    return None


def _cut(call: Call, length: int, start: int = 0) -> Call | None:
    """Keep `length` tokens from `start` on; None if there are fewer."""
    tokens = _length(call)
    if tokens is None:
        return call
    if tokens < start + length:
        return None

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() >= 2 and value.shape[1] == tokens:
            return value[:, start : start + length]
        return value

    return Call(tuple(cut(v) for v in call.args), {k: cut(v) for k, v in call.kwargs.items()})


def _windows(calls: Sequence[Call], length: int) -> list[Call]:
    """Cut every call into overlapping windows of `length` tokens, and keep `MAX_SAMPLES` at most.

    The first row of a circuit sees the first tokens of sentences only if sentences are only cut at
    their beginning: a handful of words, on which ranges mean little.
    """
    found: list[Call] = []
    for call in calls:
        last = (_length(call) or length) - length
        starts = range(0, max(last, 0) + 1, max(1, length // 2))
        found += [cut for start in starts if (cut := _cut(call, length, start)) is not None]
    kept = torch.linspace(0, len(found) - 1, min(len(found), MAX_SAMPLES)).round().long()
    return [found[i] for i in kept.tolist()]


def _split_batch(call: Call) -> list[Call]:
    """Make one call of each row of a batch."""
    sizes = {t.shape[0] for t in call.tensors() if t.dim() > 1}
    if len(sizes) != 1 or sizes == {1}:
        return [call]
    n = sizes.pop()

    def row(value: Any, i: int) -> Any:
        has_rows = isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == n
        return value[i : i + 1] if has_rows else value

    return [
        Call(tuple(row(v, i) for v in call.args), {k: row(v, i) for k, v in call.kwargs.items()})
        for i in range(n)
    ]


def _takes_use_cache(model: nn.Module) -> bool:
    return "use_cache" in inspect.signature(model.forward).parameters


def _copied(model: M) -> M:
    with warnings.catch_warnings():
        # torch copies the structure of a traced graph's inputs by a way that it deprecates.
        warnings.filterwarnings("ignore", message=".*treespec", category=FutureWarning)
        return copy.deepcopy(model)


def _without_cache(model: nn.Module) -> None:
    """Let the copy recompute its prompt: a circuit has no past."""
    for holder in ("config", "generation_config"):
        if hasattr(getattr(model, holder, None), "use_cache"):
            getattr(model, holder).use_cache = False


def _refuse_encrypted(model: nn.Module, paths: Sequence[str]) -> None:
    known = [name for name, m in model.named_modules() if isinstance(m, StandIn)]
    if (paths == [""] and known) or (stand_ins(model) and not known):
        raise TargetError(
            f"{type(model).__name__} cannot be encrypted: {', '.join(known[:8]) or 'all of it'} is "
            f"already. Start from the float model."
        )
    for path in paths:
        for name in known:
            if f"{path}.".startswith(f"{name}.") or name.startswith(f"{path}."):
                raise TargetError(
                    f"{path} cannot be encrypted: {name} is already. Start from the float model."
                )


def _is_numbers(heads: object) -> bool:
    return isinstance(heads, Sequence) and all(
        isinstance(h, int) and not isinstance(h, bool) for h in heads
    )


@contextlib.contextmanager
def _in_float(model: nn.Module) -> Iterator[None]:
    """Let the parts that are encrypted already compute in float."""
    modes = {stand_in: stand_in.mode for stand_in in stand_ins(model)}
    for module in modes:
        module.mode = "disable"
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.mode = mode


def _check_weights(model: nn.Module, paths: Sequence[str]) -> None:
    for path in paths:
        for name, value in model.get_submodule(path).state_dict().items():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise CalibrationError(
                    f"{path}.{name} holds {int((~torch.isfinite(value)).sum())} values that are "
                    f"nan or inf. Load the weights again."
                )


# Regions --------------------------------------------------------------------------------------


class _EnoughError(Exception):
    """All targets of a call were recorded; the rest of the model need not run."""


def _record(
    model: nn.Module, paths: Sequence[str], calls: Sequence[Call]
) -> dict[str, list[tuple[dict[str, Any], Any]]]:
    """Run the float model and keep every call of each target: its leaves and its output.

    The first call runs to its end; of the others only what comes before the targets is computed,
    since each is called once (the pass annotate refuses others).
    """
    found: dict[str, list[tuple[dict[str, Any], Any]]] = {path: [] for path in paths}

    def keep(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            found[path].append((keyed_leaves(args, kwargs), output))
            if min(map(len, found.values())) == max(map(len, found.values())) > 1:
                raise _EnoughError

        return hook

    handles = [
        model.get_submodule(p).register_forward_hook(keep(p), with_kwargs=True) for p in paths
    ]
    try:
        with torch.no_grad():
            for call in calls:
                with contextlib.suppress(_EnoughError):
                    model(*call.args, **call.kwargs)
    except FheFxError:
        raise
    except Exception as error:
        reason = (str(error).strip() or "no message").splitlines()[0]
        raise CalibrationError(
            f"{type(model).__name__} does not run on one of its calibration inputs: "
            f"{type(error).__name__}: {reason}. Give inputs that the model takes."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    for path in (p for p in paths if not found[p]):
        module = model.get_submodule(path)
        inside = [f"{path}.{name}" for name, _ in module.named_children()]
        raise CaptureError(
            f"{path}, a {type(module).__name__}, is not called when the model runs on its example, "
            f"so it has no arguments and results of its own. Choose a submodule that is called"
            + (f", such as {inside[0]!r}." if inside else ".")
        )
    return found


def build_region(
    whole: Program,
    path: str,
    recorded: Sequence[tuple[Mapping[str, Any], Any]],
    heads: Sequence[int] | None,
    pipeline: Pipeline,
    options: Options,
    lower: Lowerer = run_pipeline,
    clear: Collection[str] = (),
) -> tuple[Region, Signature]:
    """Cut a submodule out of a captured model and lower it to integers.

    Args:
        whole: the captured model; left as it is.
        path: dotted path of the submodule.
        recorded: leaves and output of its calls, the example's first.
        heads: heads to encrypt, or None for all of it.
        pipeline: lowers the region.
        options: how.
        lower: runs the pipeline, or knows what it makes.
        clear: leaves of its calls that the server may see.
    """
    shared = {id(x): x for x in (*whole.module.parameters(), *whole.module.buffers())}
    target = Program(copy.deepcopy(whole.module, shared), name=path, options=options)
    Pipeline((Annotate(path), Partition())).run(target)
    # What is kept has weights of its own.
    target.module = copy.deepcopy(target.module.get_submodule(ENCRYPTED))  # type: ignore[assignment]
    target.properties = {"captured"}
    leaves, _ = recorded[0]
    names = _encrypted_names(target, path, list(leaves))
    for node, name in zip(target.placeholders, names, strict=True):
        node.meta["clear"] = name in clear
    signature = Signature(
        encrypted=tuple(names),
        others={k: _detached(v) for k, v in leaves.items() if k not in names},
        results=_result_leaves(target, path),
        output=_constant_or_none([out for _, out in recorded], _result_leaves(target, path)),
    )
    target.samples = _samples(path, names, [call for call, _ in recorded[1:]])
    least = {
        name: min(float(sample[k].min()) for sample in target.samples)
        for k, name in enumerate(names)
        if name in clear
    }
    if clear and not least:
        raise CalibrationError(
            f"{path}: {', '.join(clear)} does not depend on what calibration gives, so it is a "
            f"constant of the circuit. Give calibration inputs with it, each argument by name, or "
            f"leave clear_inputs out."
        )
    signature = dataclasses.replace(signature, clear=least)
    Pipeline((Normalize(),)).run(target)
    return lower_region(target, heads, pipeline, lower), signature


def _samples(
    path: str, names: Sequence[str], calls: Sequence[Mapping[str, Any]]
) -> list[tuple[Tensor, ...]]:
    """Return the inputs of calls that give all of them: a model may leave out a mask of ones."""
    full = [c for c in calls if all(isinstance(c.get(n), Tensor) for n in names)]
    if len(full) < 2:
        missing = {n for c in calls for n in names if not isinstance(c.get(n), Tensor)}
        raise CalibrationError(
            f"{path}: {len(full)} of {len(calls)} calibration calls give all inputs of the circuit "
            f"as tensors; at least 2 are needed. Missing: {', '.join(sorted(missing))}."
        )
    return [tuple(as_given(call[name]) for name in names) for call in full]


def _detached(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _constant_or_none(outputs: Sequence[Any], results: Sequence[int]) -> Any:
    """Return the output's structure: results and constants as recorded, other tensors as None.

    A tensor that is neither is one that nothing outside reads; the circuit does not compute it.
    """
    first, spec = pytree.tree_flatten(outputs[0])
    others = [pytree.tree_leaves(output) for output in outputs[1:]]

    def is_kept(number: int, leaf: Any) -> bool:
        return number in results or all(
            isinstance(o[number], Tensor) and torch.equal(o[number], leaf) for o in others
        )

    leaves = [
        _detached(leaf) if not isinstance(leaf, Tensor) or is_kept(number, leaf) else None
        for number, leaf in enumerate(first)
    ]
    return pytree.tree_unflatten(leaves, spec)


def _encrypted_names(target: Program, path: str, names: list[str]) -> list[str]:
    """Return the argument that each placeholder of the region is."""
    found: dict[str, str] = {}
    for node in target.calls(ENTER):
        if node.args[1] == path and d.input_node(node).op == "placeholder":
            found[d.input_node(node).name] = names[cast(int, node.args[2])]
    missing = [n for n in target.placeholders if n.name not in found]
    if missing:
        listed = "\n".join(
            f"  {n.name}  {n.meta.get('module_path', '')}  {n.meta.get('source', '')}"
            for n in missing
        )
        raise CaptureError(
            f"{path} reads {len(missing)} value(s) that depend on the model's input but are not "
            f"floating-point arguments of its forward.\n{listed}\n"
            f"Encrypt a submodule that contains these too, or name an argument that the server may "
            f"see, such as a mask: clear_inputs=[...]."
        )
    return [found[n.name] for n in target.placeholders]


def _result_leaves(target: Program, path: str) -> tuple[int, ...]:
    leaves = []
    for node in target.results:
        if not d.is_call(node, LEAVE) or node.args[1] != path:
            raise CaptureError(
                f"{path}: {node.name} ({node.meta.get('source', '')}) is used outside but is not "
                f"among the module's results. Encrypt the submodule that returns it."
            )
        leaves.append(cast(int, node.args[2]))
    return tuple(leaves)
