"""Small programs: captured from a function, or written node by node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fhe_fx.capture import capture
from fhe_fx.ir import Builder, Program, verify
from fhe_fx.ir.printer import format_node
from fhe_fx.options import Options

__all__ = ["Build", "Sample", "float_program", "program_from", "seeded", "statements"]

Build = Callable[..., fx.Node]
"""Writes a program with a `Builder`: `build(builder, *placeholders)` returns the result."""
Sample = tuple[Tensor, ...]
"""A value for each input."""


class _Call(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> object:
        return self.function(*inputs)


def program_from(
    model: nn.Module | Callable[..., object],
    samples: Sequence[Sample],
    n_bits: int = 6,
    **options: Any,
) -> Program:
    """Capture a module, or a function of tensors, with its calibration samples.

    The program is as captured: run `fhe_fx.passes.default_pipeline()` on it, or a part of it.

    Args:
        model: what to capture.
        samples: values of its inputs; the first gives the shapes.
        n_bits: bits of a quantized activation.
        options: other fields of `fhe_fx.Options`.
    """
    module = model if isinstance(model, nn.Module) else _Call(model)
    program = capture(module.eval(), samples[0], {}, [])
    program.name = "region"
    program.samples = list(samples)
    program.options = Options(n_bits=n_bits, **options)
    return program


def float_program(build: Build, inputs: Sequence[Tensor]) -> Program:
    """Return the program that `build(builder, *placeholders)` writes, in the float stage.

    Args:
        build: writes it.
        inputs: the only calibration sample, which gives the shapes.
    """
    module = fx.GraphModule(torch.nn.Module(), fx.Graph())
    end = module.graph.output(())
    places = []
    for i, x in enumerate(inputs):
        with module.graph.inserting_before(end):
            place = module.graph.placeholder(f"x{i}")
        place.meta["val"] = torch.empty(x.shape, device="meta")
        places.append(place)
    result = build(Builder(module, end), *places)
    end.args = ((result,),)
    program = Program(module, samples=[tuple(inputs)], properties={"captured", "normal"})
    program.clean()
    verify(program)
    return program


def statements(program: Program) -> str:
    """Return the first printed column of every node, a line each."""
    nodes = [n for n in program.graph.nodes if n.op != "get_attr"]
    return "\n".join(format_node(n)[0] for n in nodes)


def seeded(
    shape: Sequence[int], n: int = 16, seed: int = 0, positive: bool = False
) -> list[Tensor]:
    """Return n values of one input, always the same, between -2.5 and 2.5.

    Args:
        shape: of one value.
        n: how many.
        seed: another seed gives other values.
        positive: between 0.5 and 3 instead.
    """
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn((n, *shape), generator=generator).clamp(-2.5, 2.5)
    return list(values.abs() + 0.5 if positive else values)
