"""`fhe-fx generate`, `evaluate` and `inspect`: a language model with a part on integers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from fhe_fx.cli.command import app
from fhe_fx.cli.lowering import encrypted_model, language_model, only_part
from fhe_fx.cli.options import (
    AsJson,
    Calibration,
    ClearInputs,
    Heads,
    MaxCost,
    MaxError,
    Model,
    NBits,
    PError,
    Rules,
    Seed,
    Submodules,
    TargetAgreement,
    budget_of,
    check_places,
    head_numbers,
    lengths_of,
    options_of,
    parts_of,
)
from fhe_fx.cli.talk import interruptibly, print_json, print_text, progress, say
from fhe_fx.errors import OptionsError

if TYPE_CHECKING:
    from fhe_fx.inspection.results import Inspection

__all__ = ["evaluate", "generate", "inspect"]

T = TypeVar("T")


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to go on from.")],
    submodule: Submodules = None,
    n_bits: NBits = 4,
    tokens: Annotated[
        str | None,
        typer.Option(
            help="Lengths of circuits, as in 4,8,16; by default as the text needs, to 16."
        ),
    ] = None,
    heads: Heads = None,
    clear_input: ClearInputs = None,
    mode: Annotated[str, typer.Option(help="clear, simulate or execute.")] = "clear",
    max_new_tokens: Annotated[int, typer.Option(help="How many tokens to write at most.")] = 5,
    temperature: Annotated[
        float, typer.Option(help="Draw tokens; 0 takes the most likely one.")
    ] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from the k most likely; 0 from all.")] = 0,
    outgrown: Annotated[
        str,
        typer.Option(help="A text longer than the longest circuit: error, or slide a window."),
    ] = "error",
    calibration: Calibration = None,
    p_error: PError = None,
    max_error: MaxError = None,
    max_cost: MaxCost = None,
    target_agreement: TargetAgreement = None,
    rule: Rules = None,
    seed: Annotated[int, typer.Option(help="Of draws, random weights, sampled calibration.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Let a model write while a part of it runs on integers, with noise, or encrypted.

    Tokens go to standard output as they come. What will run is said before, with its cost.
    """
    import fhe_fx
    from fhe_fx.api import encrypted_modules
    from fhe_fx.errors import did_you_mean
    from fhe_fx.runtime.generate import Sampling, lengths_for, plan_generation, rows_read
    from fhe_fx.runtime.ranges import range_warnings

    budget = budget_of(p_error, max_error, max_cost, target_agreement, rule)
    parts = parts_of(submodule)
    modes = ("clear", "simulate", "execute")
    if mode not in modes:
        raise OptionsError(
            f"--mode {mode!r} is not one of {', '.join(modes)}.{did_you_mean(mode, list(modes))}"
        )
    Sampling(temperature, top_k, seed)
    with progress("loading the model") as show:
        named = language_model(model, seed, clear_input)
        tokenizer = named.tokenizer()
        ids = tokenizer(prompt)["input_ids"]
        lengths = lengths_of(tokens) if tokens else lengths_for(len(ids), max_new_tokens)
        rows_read(len(ids), max_new_tokens, max(lengths), outgrown)
        show("lowering the model")
        encrypted = encrypted_model(
            named, parts, n_bits, lengths, heads, calibration, budget, seed, clear_input
        )
        if mode != "clear":
            show("compiling")
            fhe_fx.compile(encrypted)
    fhe_fx.set_mode(encrypted, mode)
    watches = [part.region.watched() for part in encrypted_modules(encrypted)]
    plan = plan_generation(encrypted, len(ids), max_new_tokens, outgrown)
    say(str(plan) + _time_of(plan.complexity if mode == "execute" else None))
    stream = fhe_fx.generate(
        encrypted,
        ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        outgrown=outgrown,
    )
    steps = _interruptible_steps(stream) if mode == "execute" else stream
    written = []
    text = _Written(tokenizer, ids, is_shown=not as_json)
    for token in steps:
        written.append(token)
        text.add(token.id)
    text.end()
    for warning in range_warnings(use for watch in watches for use in watch.uses.values()):
        say(f"warning: {warning}")
    if as_json:
        print_json(
            {
                "prompt": prompt,
                "text": text.new,
                "mode": mode,
                "tokens": [
                    {**vars(token), "text": tokenizer.decode([token.id])} for token in written
                ],
                "report": fhe_fx.report(encrypted).as_dict(),
            }
        )


def _time_of(complexity: float | None) -> str:
    from fhe_fx.report.machine import machine_rates

    if complexity is None:
        return ""
    return f"; about {complexity / machine_rates().complexity_per_second:.0f} s here"


def _interruptible_steps(stream: Iterator[T]) -> Iterator[T]:
    end = object()
    while (step := interruptibly(lambda: next(stream, end))) is not end:
        yield step  # type: ignore[misc]


class _Written:
    """Text as it is written; a character that takes several tokens is shown when it is whole."""

    def __init__(self, tokenizer: Any, prompt: list[int], *, is_shown: bool) -> None:
        self.tokenizer, self.ids, self.is_shown = tokenizer, list(prompt), is_shown
        self.start = self.shown = self._decoded()
        self._show(self.shown)

    def _decoded(self) -> str:
        return str(self.tokenizer.decode(self.ids, skip_special_tokens=True))

    def _show(self, text: str) -> None:
        if self.is_shown:
            sys.stdout.write(text)
            sys.stdout.flush()

    def add(self, token: int) -> None:
        self.ids.append(token)
        text = self._decoded()
        if not text.endswith("\ufffd"):
            self._show(text[len(self.shown) :])
            self.shown = text

    def end(self) -> None:
        text = self._decoded()
        self._show(text[len(self.shown) :] + "\n")
        self.shown = text

    @property
    def new(self) -> str:
        return self._decoded()[len(self.start) :]


@app.command()
def evaluate(
    model: Model,
    out: Annotated[Path, typer.Option(help="Directory of results; what it holds is not redone.")],
    submodule: Submodules = None,
    n_bits: Annotated[str, typer.Option(help="Settings, as in 4, 2,4,6 or 2..8.")] = "4",
    tokens: Annotated[int, typer.Option(help="Rows of the circuit.")] = 8,
    heads: Heads = None,
    clear_input: ClearInputs = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Sentences, one a line; else the model writes its own."),
    ] = None,
    long: Annotated[
        str, typer.Option(help="What to do with longer lines: cut, split or error.")
    ] = "cut",
    sentences: Annotated[int, typer.Option(help="How many sentences the model writes.")] = 80,
    modes: Annotated[
        str, typer.Option(help="Some of fake (rounded floats), clear and simulate.")
    ] = "fake,clear,simulate",
    calibration: Calibration = None,
    p_error: PError = None,
    max_error: MaxError = None,
    max_cost: MaxCost = None,
    target_agreement: TargetAgreement = None,
    rule: Rules = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Measure how well a model predicts when a part of it runs on integers, without and with noise.

    Writes evaluation.json and evaluation.csv; where matplotlib is installed, a plot besides.
    """
    from fhe_fx.capture import resolve_targets
    from fhe_fx.evaluate import evaluate_submodule, read_texts
    from fhe_fx.evaluate.arguments import parse_bits, parse_modes
    from fhe_fx.evaluate.plot import can_plot, plot_accuracy
    from fhe_fx.export.models import load_calibration

    bits, stages, chosen = parse_bits(n_bits), parse_modes(modes), head_numbers(heads)
    parts = parts_of(submodule)
    options = options_of(
        bits[0], seed, budget_of(p_error, max_error, max_cost, target_agreement, rule)
    )
    with progress("loading the model") as show:
        named = language_model(model, seed, clear_input)
        assert named.module is not None
        resolve_targets(named.module, parts)
        found = evaluate_submodule(
            named.module,
            parts,
            n_bits=bits,
            tokens=tokens,
            heads=chosen,
            clear_inputs=clear_input or (),
            data=read_texts(data, named.tokenizer(), tokens, long) if data else None,
            sentences=sentences,
            calibration=load_calibration(calibration, named) if calibration else None,
            stages=stages,
            options=options,
            out=out,
            name=model,
            on_progress=show,
        )
        show("writing results")
        files = found.write(out)
        if can_plot():
            files += plot_accuracy(found, out)
    for note in found.notes:
        say(f"note: {note}")
    for warning in found.all_warnings():
        say(f"warning: {warning}")
    if as_json:
        print_json(found.as_dict())
    else:
        print_text(found.table())
    say(f"wrote {', '.join(str(f) for f in files)}")
    if not can_plot():
        say("note: no plot was made; matplotlib is missing: pip install 'fhe_fx[plots]'")


@app.command()
def inspect(
    model: Model,
    submodule: Submodules = None,
    n_bits: NBits = 4,
    tokens: Annotated[int, typer.Option(help="Rows of the circuit.")] = 8,
    heads: Heads = None,
    clear_input: ClearInputs = None,
    data: Annotated[
        Path | None, typer.Option(help="Sentences, one a line; else the model writes its own.")
    ] = None,
    sentences: Annotated[int, typer.Option(min=1, help="How many the model writes.")] = 40,
    mode: Annotated[
        str, typer.Option(help="clear, or simulate: with the noise of encryption.")
    ] = "clear",
    threshold: Annotated[
        float, typer.Option(help="Relative error from which a node is pointed out.")
    ] = 0.1,
    html: Annotated[Path | None, typer.Option(help="A page to write, with the graph.")] = None,
    graph: Annotated[
        Path | None, typer.Option(help="A page as of `fhe-fx graph`, coloured by error.")
    ] = None,
    calibration: Calibration = None,
    p_error: PError = None,
    max_error: MaxError = None,
    max_cost: MaxCost = None,
    target_agreement: TargetAgreement = None,
    rule: Rules = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Show float beside integer at every node: where the error comes from, and the cost."""
    import fhe_fx
    from fhe_fx.capture import resolve_targets
    from fhe_fx.errors import did_you_mean
    from fhe_fx.evaluate.texts import read_texts, sample_texts
    from fhe_fx.inspection.inspect import MODES

    budget = budget_of(p_error, max_error, max_cost, target_agreement, rule)
    parts = parts_of(submodule)
    if mode not in MODES:
        raise OptionsError(
            f"--mode {mode!r} is not one of {', '.join(MODES)}.{did_you_mean(mode, MODES)}"
        )
    check_places(html=html, graph=graph)
    with progress("loading the model") as show:
        named = language_model(model, seed, clear_input)
        assert named.module is not None
        paths = resolve_targets(named.module, parts)
        if graph is not None:
            only_part(paths)
        rows = (
            list(read_texts(data, named.tokenizer(), tokens).rows)
            if data
            else sample_texts(named.module, sentences, tokens, seed + 1, on_progress=show)
        )
        show("lowering the model")
        encrypted = encrypted_model(
            named, parts, n_bits, (tokens,), heads, calibration, budget, seed, clear_input
        )
        inputs = [{"input_ids": row[None]} for row in rows]
        found = fhe_fx.inspect(encrypted, inputs, mode=mode, threshold=threshold, on_progress=show)
    for warning in found.warnings:
        say(f"warning: {warning}")
    if as_json:
        print_json(found.as_dict())
    else:
        print_text(str(found))
    if html is not None:
        say(f"wrote {found.save_html(html)}")
    if graph is not None:
        graph.write_text(_graph_of(encrypted, found), encoding="utf-8")
        say(f"wrote {graph}")


def _graph_of(encrypted: Any, found: Inspection) -> str:
    """Return the page of a part's graph, with the errors and the outliers of an inspection."""
    from fhe_fx.api import encrypted_modules
    from fhe_fx.ir.snapshot import snapshot
    from fhe_fx.report.page import Measure, to_page

    (module,), (region,) = encrypted_modules(encrypted), found.regions
    errors = {n.node: n.relative_error for n in region.nodes if isfinite(n.relative_error)}
    outside = {n.node: 100 * n.outside_share for n in region.nodes}
    measures = [Measure("relative error", errors), Measure("out of range", outside, " %")]
    last = {"pass": list(module.region.pipeline)[-1].text()}
    shot = {**last, **snapshot(module.region.program)}
    return to_page([shot], title=region.name, measures=measures)
