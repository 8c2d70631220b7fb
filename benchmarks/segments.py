"""Two blocks of a model as two functions of one Concrete module, wired one to the other.

What would it cost to cut a deep circuit into segments whose ciphertexts stay with the server?
`python benchmarks/segments.py` compiles the two blocks of the small language model of
`examples/whole_model` at one token: apart, as functions of a module under each of Concrete's rules
of composition, and as one circuit. Nothing is executed. Each rule runs in a process of its own,
since Concrete may end the process that compiles.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from concrete import fhe  # noqa: TID251  (an experiment with Concrete itself)
from concrete.fhe.compilation.module_compiler import FunctionDef, ModuleCompiler  # noqa: TID251
from transformers import AutoModelForCausalLM

import fhe_fx
from fhe_fx.api import encrypted_modules
from fhe_fx.backends.concrete.circuit import _signature
from fhe_fx.backends.concrete.emit import as_declared, emit_function
from fhe_fx.ir import dialect as d
from fhe_fx.ir.program import Program

MODEL = Path(__file__).parents[1] / "examples" / "whole_model" / "model"
RULES = ("apart", "not composable", "wired", "all composable", "one circuit")


def lowered(*targets: str) -> list[Any]:
    """Return regions of the model at one token."""
    model = AutoModelForCausalLM.from_pretrained(MODEL).eval()
    found = fhe_fx.encrypt_submodule(model, list(targets), max_tokens=1)
    return [part.region for part in encrypted_modules(found)]


def module_of(programs: list[Program], rule: str) -> Any:
    """Compile programs as functions of one module, each fed by the one before."""
    functions = []
    for number, program in enumerate(programs):
        names = [n.name for n in program.placeholders]
        function = emit_function(program)
        function.__signature__ = _signature(names)  # type: ignore[attr-defined]
        function.__name__ = f"segment_{number}"
        functions.append(FunctionDef(function, dict.fromkeys(names, "encrypted")))
    wires = [
        fhe.Wire(fhe.Output(before, 0), fhe.Input(after, number))
        for before, after, program in zip(functions, functions[1:], programs[1:], strict=False)
        for number in range(len(program.placeholders))
    ]
    policies = {
        "not composable": fhe.NotComposable(),
        "wired": fhe.Wired(wires),
        "all composable": fhe.AllComposable(),
    }
    zeros = [
        tuple(np.zeros(d.shape_of(n), dtype=np.int64) for n in p.placeholders) for p in programs
    ]
    samples = {f"segment_{number}": [z if len(z) > 1 else z[0]] for number, z in enumerate(zeros)}
    options = fhe.Configuration(p_error=max(p.options.chosen_p_error for p in programs))
    with as_declared():
        return ModuleCompiler(functions, policies[rule]).compile(samples, options)


def measured(rule: str) -> str:
    """Compile under one rule, and say what it costs."""
    if rule in {"apart", "one circuit"}:
        regions = lowered("h.0", "h.1") if rule == "apart" else lowered("transformer")
        facts = [region.compiled().facts for region in regions]
        costs = " + ".join(f"{f.complexity:.3g}" for f in facts)
        return f"complexity {costs}, look-ups {' + '.join(str(f.look_ups) for f in facts)}"
    programs = [region.program for region in lowered("h.0", "h.1")]
    first, second = programs
    types = [
        str(first.results[0].meta["type"]),
        *(str(n.meta["type"]) for n in second.placeholders),
    ]
    return f"complexity {module_of(programs, rule).complexity:.3g}, wire {types[0]} to {types[1:]}"


def main() -> None:
    """Print a line for each rule."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rule", choices=RULES, help="in this process")
    rule = parser.parse_args().rule
    if rule is not None:
        print(measured(rule))
        return
    for name in RULES:
        run = subprocess.run(
            [sys.executable, "-W", "ignore", __file__, "--rule", name],
            capture_output=True,
            text=True,
        )
        last = run.stdout.strip().splitlines()[-1:] if run.returncode == 0 else []
        print(
            f"{name}: {last[0] if last else f'the process ended with {run.returncode}'}", flush=True
        )


if __name__ == "__main__":
    main()
