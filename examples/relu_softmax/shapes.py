"""Accuracy against cost of attention with softmax and with one function of each score.

python examples/relu_softmax/shapes.py examples/gpt2/model --out out/relu_softmax
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fhe_fx
from fhe_fx.passes import Pipeline, default_pipeline
from fhe_fx.report.machine import machine_name

sys.path.insert(0, str(Path(__file__).parent))
from relu_softmax import ReluSoftmax

STYLES = {  # label, colour, marker
    "softmax": ("softmax (default)", "#1f6fb2", "o"),
    "exp": ("exponential", "#3f7d20", "D"),
    "square": ("squared ReLU", "#7a4fa3", "^"),
    "relu": ("ReLU", "#c2410c", "s"),
}


def pipeline(shape: str) -> Pipeline:
    """Return the default, or one with the pass."""
    passes = default_pipeline()
    return (
        passes if shape == "softmax" else passes.insert_before("lower-softmax", ReluSoftmax(shape))
    )


def windows(model: Path, name: str, tokens: int, n: int) -> list[dict[str, Tensor]]:
    """Return the first tokens of n sentences."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    lines = (model / name).read_text().splitlines()
    rows = [tokenizer(s, return_tensors="pt")["input_ids"] for s in lines]
    return [{"input_ids": row[:, :tokens]} for row in rows if row.shape[1] >= tokens][:n]


def measure(a: argparse.Namespace, shape: str, n_bits: int, data: Any) -> dict[str, Any]:
    """Lower, compile and run one setting."""
    model, calibration, held_out = data
    encrypted = fhe_fx.encrypt_submodule(
        model,
        a.submodule,
        n_bits=n_bits,
        max_tokens=a.tokens,
        calibration=calibration,
        passes=pipeline(shape),
        cache=fhe_fx.Cache() if a.cache else None,
    )
    cost = fhe_fx.compile(encrypted, verbose=False).regions[0]
    ids = torch.cat([i["input_ids"] for i in held_out])
    found: dict[str, Any] = {"shape": shape, "n_bits": n_bits, "look_ups": cost.look_ups}
    found["complexity"] = cost.complexity
    expected = _outputs(model, a.submodule, ids)
    fhe_fx.set_mode(encrypted, "clear")
    with torch.no_grad():
        logits = [m(ids, use_cache=False).logits for m in (model, encrypted)]
    part = _outputs(encrypted, a.submodule, ids)
    found["error"] = float((part - expected).norm() / expected.norm())
    found["same_token"] = float((logits[0].argmax(-1) == logits[1].argmax(-1)).float().mean())
    return found


def _outputs(model: Any, submodule: str, ids: Tensor) -> Tensor:
    """Return what the submodule gives, `[sentences, tokens, channels]`."""
    (path,) = [n for n, _ in model.named_modules() if n.endswith(submodule)]
    kept: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_hook(
        lambda m, a, out: kept.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        model(ids, use_cache=False)
    handle.remove()
    return kept[0]


def plot(rows: list[dict[str, Any]], title: str, directory: Path) -> None:
    """Draw error against cost as `cost.png` and `cost.svg`: nearer the lower left is better."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    settings: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with mpl.rc_context({**settings, "svg.fonttype": "none", "svg.hashsalt": "fhe_fx"}):
        figure = Figure(figsize=(6.3, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for shape, (label, colour, marker) in STYLES.items():
            own = sorted((r for r in rows if r["shape"] == shape), key=lambda r: int(r["n_bits"]))
            x, y = [r["complexity"] for r in own], [r["error"] for r in own]
            axes.plot(x, y, color=colour, marker=marker, label=label, linewidth=1.2, markersize=5)
            if shape == "softmax":
                for r in own:
                    at = (r["complexity"], r["error"])
                    axes.annotate(f"{r['n_bits']} bits", at, (-7, -10), textcoords="offset points",
                                  ha="right", fontsize=8, color=colour)  # fmt: skip
        axes.set(xscale="log", yscale="log", title=title)
        axes.set(xlabel="cost of one run (Concrete's complexity)", ylabel="relative error")
        axes.margins(0.12)
        axes.grid(True, which="both", color="#e6e6e6", linewidth=0.6)
        axes.legend(frameon=False)
        for name in ("cost.png", "cost.svg"):
            metadata = {"Date": None} if name.endswith("svg") else None
            figure.savefig(directory / name, dpi=150, metadata=metadata)


def main() -> None:
    """Print the table and write the plot."""
    parser = argparse.ArgumentParser(description="Softmax, and functions in its place.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--submodule", default="h.0.attn")
    parser.add_argument("--tokens", type=int, default=6)
    parser.add_argument("--n-bits", type=int, nargs="+", default=[2, 3, 4, 5, 6])
    parser.add_argument("--shapes", nargs="+", choices=list(STYLES), default=list(STYLES))
    parser.add_argument("--sentences", type=int, default=100)
    parser.add_argument("--calibration", type=int, default=128, help="sentences")
    parser.add_argument("--cache", action="store_true", help="keep what was lowered")
    parser.add_argument("--out", type=Path, required=True, help="directory of the plot")
    a = parser.parse_args()
    from transformers import AutoModelForCausalLM

    data = (
        AutoModelForCausalLM.from_pretrained(a.model).eval(),
        windows(a.model, "calibration.txt", a.tokens, a.calibration),
        windows(a.model, "heldout.txt", a.tokens, a.sentences),
    )
    print(f"{machine_name()}: {a.submodule} of {a.model}, {a.tokens} tokens, "
          f"{len(data[2])} held-out sentences, integers in the clear")  # fmt: skip
    print(f"{'weights':8} {'bits':>4} {'look-ups':>9} {'complexity':>11} {'error':>7} {'token':>7}")
    rows = []
    for shape in a.shapes:
        for n_bits in a.n_bits:
            rows.append(r := measure(a, shape, n_bits, data))
            print(f"{shape:8} {n_bits:4} {r['look_ups']:9,} {r['complexity']:11.2g} "
                  f"{r['error']:7.3f} {r['same_token']:7.1%}", flush=True)  # fmt: skip
    a.out.mkdir(parents=True, exist_ok=True)
    (a.out / "cost.json").write_text(json.dumps(rows, indent=1) + "\n")
    plot(rows, f"{a.submodule}, {a.tokens} tokens", a.out)
    print(f"wrote {a.out / 'cost.png'} and {a.out / 'cost.svg'}")


if __name__ == "__main__":
    main()
