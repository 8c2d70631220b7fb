"""Regions between nodes of a graph: what is cut out, what the rest becomes, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fhe_fx
from fhe_fx.api import encrypted_modules
from fhe_fx.capture import submodule_between
from fhe_fx.errors import CaptureError, TargetError
from fhe_fx.ir import dialect as d
from tests.models import FEW, Mlp, mlp_inputs, tiny_gpt2, tiny_llama, token_inputs


class Forked(nn.Module):
    """Two branches that meet, with a value in each that is read later."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("table", torch.tensor([1.0, 2.0, 3.0, 4.0]))

    table: Tensor

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        a = self.left(x)
        b = torch.relu(a) * self.table
        c = self.right(y)
        d = b + c
        return torch.tanh(d), {"middle": b}


def forked() -> fx.GraphModule:
    return fx.symbolic_trace(Forked().eval())


def calls(module: nn.Module) -> list[str]:
    assert isinstance(module.nodes, fx.GraphModule)
    return [n.name for n in module.nodes.graph.nodes if n.op.startswith("call_")]


def arguments(module: nn.Module) -> list[str]:
    assert isinstance(module.nodes, fx.GraphModule)
    return [n.name for n in module.nodes.graph.nodes if n.op == "placeholder"]


def look_ups(model: nn.Module) -> int:
    return fhe_fx.report(model).regions[0].look_ups


@pytest.mark.parametrize(
    ("start", "end", "inside", "taken"),
    [
        ("relu", "mul", ["relu", "mul"], ["left"]),
        ("left", "mul", ["left", "relu", "mul"], ["x"]),
        ("x", "add", ["left", "relu", "mul", "add"], ["x", "right"]),
        (["x", "y"], "add", ["left", "relu", "mul", "right", "add"], ["x", "y"]),
        ("relu", ["mul", "tanh"], ["relu", "mul", "add", "tanh"], ["left", "right"]),
        ("right", "right", ["right"], ["y"]),
    ],
)
def test_what_is_cut_out(start: Any, end: Any, inside: list[str], taken: list[str]) -> None:
    whole = forked()
    printed = str(whole.graph)
    cut, name = submodule_between(whole, start, end)
    assert name == "between"
    assert calls(cut.between) == inside  # type: ignore[arg-type]
    assert arguments(cut.between) == taken  # type: ignore[arg-type]
    assert str(whole.graph) == printed
    x, y = torch.randn(2, 4), torch.randn(2, 4)
    ours, theirs = cut(x, y), whole(x, y)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1]["middle"], theirs[1]["middle"])


def test_arguments_are_known_by_the_input_that_they_are_made_of() -> None:
    cut, _ = submodule_between(forked(), ["mul", "right"], "tanh")
    assert cut.between.argument_names == ("x", "y")  # type: ignore[union-attr]
    cut, _ = submodule_between(forked(), "tanh", "tanh")
    assert cut.between.argument_names == ("add",)  # type: ignore[union-attr]


def test_all_of_a_graph_is_a_part_too() -> None:
    whole, inputs = forked(), [(torch.randn(2, 4), torch.randn(2, 4)) for _ in range(8)]
    encrypted = fhe_fx.encrypt_submodule(whole, "", calibration=inputs, options=FEW)
    (part,) = encrypted_modules(encrypted)
    assert part.region.name == "whole"
    fhe_fx.set_mode(encrypted, "clear")
    for ours, theirs in ((encrypted(*x), whole(*x)) for x in inputs):
        torch.testing.assert_close(ours[0], theirs[0], rtol=0.1, atol=0.1)
        torch.testing.assert_close(ours[1]["middle"], theirs[1]["middle"], rtol=0.1, atol=0.1)


def test_weights_go_with_the_nodes_that_read_them() -> None:
    whole = forked()
    cut, _ = submodule_between(whole, "left", "mul")
    assert sorted(k for k in cut.state_dict()) == [
        "between.nodes.left.bias",
        "between.nodes.left.weight",
        "between.nodes.table",
        "right.bias",
        "right.weight",
    ]
    assert cut.get_parameter("between.nodes.left.weight") is whole.get_parameter("left.weight")


def test_a_graph_can_be_cut_again() -> None:
    cut, _ = submodule_between(forked(), "left", "left")
    again, name = submodule_between(cut, "right", "add")
    assert name == "between_1"
    x, y = torch.randn(2, 4), torch.randn(2, 4)
    assert torch.equal(again(x, y)[0], forked()(x, y)[0])


def test_a_region_may_begin_and_end_at_submodules() -> None:
    """Attention and MLP of a block, without the norm before them, in one circuit."""
    graph = fhe_fx.trace(tiny_gpt2(), token_inputs(1, 3)[0])
    cut, name = submodule_between(graph, "h.0.attn.c_attn", "h.0.mlp.c_proj")
    inside = [n.meta.get("stack_trace") or "" for n in cut.get_submodule(name).nodes.graph.nodes]  # type: ignore[union-attr]
    assert any("self.attn" in s or "c_attn" in s for s in inside)
    x = token_inputs(1, 3)[0]
    torch.testing.assert_close(cut(x)[0], graph(x)[0])
    with pytest.raises(TargetError, match=r"'h.0.attn.c_atn'\. Did you mean 'transformer\.h\.0"):
        submodule_between(graph, "h.0.attn.c_atn", "h.0.mlp.c_proj")


@pytest.mark.parametrize(
    ("start", "end", "message"),
    [
        (
            "lefd",
            "mul",
            (
                "from_nodes: the graph has 9 nodes, and 1 of the names are none of theirs:\n"
                "  'lefd'. Did you mean 'left'?\nprint(graph_module.graph) lists them."
            ),
        ),
        ([], "mul", "from_nodes=[] is not a list of names of nodes."),
        ("left", [3], "to_nodes=[3] is not a list of names of nodes."),
        ("left", "y", "to_nodes: y is an input of the graph; nothing computes it."),
        ("x", "table", "to_nodes: table is a constant of the graph; nothing computes it."),
    ],
)
def test_refuses_names(start: Any, end: Any, message: str) -> None:
    with pytest.raises(TargetError) as caught:
        submodule_between(forked(), start, end)
    assert str(caught.value) == message


def test_refuses_ends_that_do_not_depend_on_starts() -> None:
    with pytest.raises(CaptureError) as caught:
        submodule_between(forked(), ["left", "tanh"], ["right", "add"])
    assert str(caught.value) == (
        "There is no region from left, tanh to right, add: right does not depend on left or tanh; "
        "tanh leads to none of right, add. "
        "Choose nodes of which each end depends on a start, and each start leads to an end."
    )


# Encrypted ------------------------------------------------------------------------------------


def test_a_region_of_modules_runs_in_integers() -> None:
    inputs = mlp_inputs()
    graph = fx.symbolic_trace(Mlp().eval())
    encrypted = fhe_fx.encrypt_submodule(
        graph, from_nodes="inner_0", to_nodes="add", n_bits=6, calibration=inputs, options=FEW
    )
    whole = fhe_fx.encrypt_submodule(Mlp(), "inner", n_bits=6, calibration=inputs, options=FEW)
    fhe_fx.set_mode(encrypted, "clear")
    fhe_fx.set_mode(whole, "clear")
    (part,) = fhe_fx.api.encrypted_modules(encrypted)
    assert look_ups(encrypted) == look_ups(whole) == 8  # GELU
    x = inputs[0]
    with torch.no_grad():
        difference = (encrypted(x) - graph(x)).norm() / graph(x).norm()
    assert 0 < float(difference) < 0.05
    assert part.region.name == "between"


def test_a_traced_transformer_between_its_projections_and_its_output() -> None:
    model, ids = tiny_llama(), token_inputs()
    graph = fhe_fx.trace(model, ids[0])
    assert torch.equal(
        graph(ids[1]).last_hidden_state, model(ids[1], use_cache=False).last_hidden_state
    )
    encrypted = fhe_fx.encrypt_submodule(
        graph,
        from_nodes=["linear", "linear_1", "linear_2"],
        to_nodes="linear_3",
        calibration=ids,
        options=FEW,
    )
    attention = fhe_fx.encrypt_submodule(model, "layers.0.self_attn", calibration=ids, options=FEW)
    assert look_ups(encrypted) == look_ups(attention)
    assert "modeling_llama.py" in str(fhe_fx.report(encrypted))
    outputs = []
    for one in (encrypted, attention):
        fhe_fx.set_mode(one, "clear")
        with torch.no_grad():
            outputs.append(one(ids[0]).last_hidden_state)
    assert torch.equal(*outputs)  # the same nodes, so the same integers


def test_what_is_made_outside_is_encrypted_too() -> None:
    graph = fhe_fx.trace(tiny_gpt2(is_base=True), token_inputs()[0])
    names = [n.name for n in graph.graph.nodes]
    end = next(n for n in names if n.startswith("scaled_dot"))
    encrypted = fhe_fx.encrypt_submodule(
        graph, from_nodes=end, to_nodes=end, calibration=token_inputs(), options=FEW
    )
    (part,) = fhe_fx.api.encrypted_modules(encrypted)
    assert len(part.signature.encrypted) == 3  # queries, keys, values; the mask is a constant


def test_a_region_that_begins_at_token_numbers_begins_behind_their_embedding() -> None:
    graph = fhe_fx.trace(tiny_gpt2(is_base=True), token_inputs()[0])
    encrypted = fhe_fx.encrypt_submodule(
        graph,
        from_nodes="embedding",
        to_nodes="layer_norm",
        calibration=token_inputs(),
        options=FEW,
    )
    (part,) = fhe_fx.api.encrypted_modules(encrypted)
    assert any(d.is_call(n, d.EMBED) for n in part.region.target.graph.nodes)
    assert not any(d.is_call(n, d.EMBED) for n in part.region.captured.graph.nodes)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "No target is given. Name a submodule, such as 'h.0.attn'."),
        (
            {"from_nodes": "add"},
            "to_nodes is not given. A region has a beginning and an end.",
        ),
        (
            {"target": "inner", "from_nodes": "add", "to_nodes": "add"},
            "target='inner' and nodes are both given. Give a target, or from_nodes and to_nodes.",
        ),
        (
            {"from_nodes": "add", "to_nodes": "add"},
            (
                "from_nodes and to_nodes name nodes of a graph, and the model is a Mlp. Give "
                "fhe_fx.trace(model, example), whose .graph lists them."
            ),
        ),
    ],
)
def test_refuses_half_a_choice(given: dict[str, Any], message: str) -> None:
    with pytest.raises(TargetError) as caught:
        fhe_fx.encrypt_submodule(Mlp(), **given, calibration=mlp_inputs())
    assert str(caught.value) == message


def test_submodules_of_an_exported_program(tmp_path: Path) -> None:
    model, ids = tiny_gpt2(is_base=True), token_inputs()
    model.config.use_cache = False
    torch.export.save(torch.export.export(model, (ids[0],), strict=False), tmp_path / "m.pt2")
    graph = fhe_fx.trace(tmp_path / "m.pt2")
    outputs = []
    for one in (graph, model):
        encrypted = fhe_fx.encrypt_submodule(one, "h.0.attn", calibration=ids, options=FEW)
        fhe_fx.set_mode(encrypted, "clear")
        with torch.no_grad():
            outputs.append(encrypted(ids[1])[0])
    assert torch.equal(*outputs)  # the same nodes, so the same integers
    with pytest.raises(TargetError, match=r"has no submodule 'h.0.atn'. Did you mean 'h.0.attn'"):
        fhe_fx.encrypt_submodule(graph, "h.0.atn", calibration=ids)
    with pytest.raises(CaptureError, match=r"give its graph, fhe_fx\.trace"):
        fhe_fx.encrypt_submodule(
            torch.export.load(tmp_path / "m.pt2"),  # type: ignore[type-var]
            "h.0.attn",
        )
    with pytest.raises(CaptureError, match="traced on an input"):
        fhe_fx.trace(model)
