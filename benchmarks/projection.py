"""What one token of whole language models would cost with every layer encrypted, on paper.

    python benchmarks/projection.py --page docs/projection.md   # some minutes of one core

Attention, MLP and norm of the first layer are lowered at several lengths, with look-ups of the same
widths; what they cost is counted, not estimated, and multiplied by the layers. The price of a
look-up is the optimizer's, and the rate is that of look-ups run here, a second of the processor.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # the rate is that of one core

import numpy as np
import numpy.typing as npt
import torch

import fhe_fx
from fhe_fx.api import encrypted_modules
from fhe_fx.capture.digest import digest_of_code
from fhe_fx.export.models import load_model
from fhe_fx.options import Options
from fhe_fx.report.machine import installed_version, machine_name

LENGTHS = (4, 6, 8, 12)
CONTEXTS = (16, 128, 1024)
CORES = (64, 192)
HEAD = "lm_head.weight"
Row = dict[str, Any]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Model:
    """A model, and where the parts of its first layer stand."""

    title: str
    name: str
    """As the commands take it."""
    attention: str
    mlp: str
    norm: str


MODELS = (
    Model(
        "GPT-2 (124M), random weights", "random:gpt2",
        "transformer.h.0.attn", "transformer.h.0.mlp", "transformer.h.0.ln_1",
    ),
    Model(
        "SmolLM2 (135M), pretrained", "smollm2",
        "model.layers.0.self_attn", "model.layers.0.mlp", "model.layers.0.input_layernorm",
    ),
)  # fmt: skip


def main() -> None:
    """Measure what is not kept, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, help="write it here; else it is printed")
    parser.add_argument("--kept", type=Path, help="keep measurements in this file, and read them")
    parser.add_argument("--n-bits", type=int, default=4)
    given = parser.parse_args()
    found: Row = json.loads(given.kept.read_text()) if given.kept and given.kept.exists() else {}
    for model in (None, *MODELS):
        key = model.name if model else "rate"
        if key not in found:
            found[key] = measured_parts(model, given.n_bits) if model else measured_rate()
            found.setdefault("code", digest_of_code())
            if given.kept:
                given.kept.write_text(json.dumps(found))
    text = page(found, given.n_bits)
    if given.page:
        given.page.write_text(text)
    else:
        print(text)


# Measuring ------------------------------------------------------------------------------------


def measured_rate(look_ups: int = 64, bits: int = 6) -> float:
    """Return complexity units of look-ups a second of one core, the best of three runs."""
    from concrete import fhe  # noqa: TID251 -- it is Concrete's rate that is measured

    table = fhe.LookupTable([(3 * i + 1) % (1 << bits) for i in range(1 << bits)])
    compiler = fhe.Compiler(lambda x: table[x], {"x": "encrypted"})
    ends = [np.full(look_ups, v, np.int64) for v in (0, (1 << bits) - 1)]
    circuit = compiler.compile(ends, p_error=0.1)
    encrypted = circuit.encrypt(np.arange(look_ups) % (1 << bits))
    runs = []
    for _ in range(3):
        start = time.process_time()
        circuit.run(encrypted)
        runs.append(time.process_time() - start)
    return float(circuit.complexity) / min(runs)


def measured_parts(model: Model, n_bits: int) -> Row:
    """Lower the parts at all lengths, compile the norm at the shortest, and count."""
    module = load_model(model.name).module
    assert module is not None
    config: Any = module.config
    encrypted = fhe_fx.encrypt_submodule(
        module,
        [model.attention, model.mlp, model.norm],
        max_tokens=LENGTHS,
        n_bits=n_bits,
        options=Options(n_samples=64),
    )
    rows: Row = {}
    for region in fhe_fx.report(encrypted).regions:
        part = {model.attention: "attention", model.mlp: "mlp", model.norm: "norm"}[region.name]
        rows.setdefault(part, []).append(
            (region.tokens, region.look_ups, region.predicted_complexity, region.p_error)
        )
    norm = next(p for p in encrypted_modules(encrypted) if p.region.name == model.norm)
    facts = norm.region.compiled().facts
    inputs, results = (
        sum(int(np.prod(port.shape)) for port in ports)
        for ports in (norm.region.codec.inputs, norm.region.codec.results)
    )
    with torch.no_grad():
        head = module.get_parameter(HEAD).numel()
        body = sum(p.numel() for p in module.parameters()) - head
    return {
        "parts": rows,
        "layers": config.num_hidden_layers,
        "channels": config.hidden_size,
        "words": config.vocab_size,
        "weights": body + head,
        "key_bytes": facts.key_bytes,
        "input_bytes": facts.input_bytes / inputs,
        "result_bytes": facts.output_bytes / results,
        "compiled": facts.complexity / norm_predicted(rows, norm.region.tokens),
    }


def norm_predicted(rows: Row, tokens: int | None) -> float:
    """Return what the report predicted of the norm at a length."""
    return next(float(c) for t, _, c, _ in rows["norm"] if t == tokens)


# On paper -------------------------------------------------------------------------------------


def curve(points: list[list[float]], column: int) -> FloatArray:
    """Return what a row and what a pair of rows costs, fitted to circuits of several lengths.

    A circuit of n rows costs a n + b n^2; neither is negative. Each length counts alike.
    """
    lengths = np.array([p[0] for p in points], float)
    values = np.array([p[column] for p in points], float)
    terms = np.stack([lengths, lengths**2], axis=1) / values[:, None]
    found = []
    for kept in ([0, 1], [0], [1]):
        costs = np.zeros(2)
        costs[kept] = np.linalg.lstsq(terms[:, kept], np.ones(len(points)), rcond=None)[0]
        if costs.min() >= -1e-6 * costs.max():
            found.append((float(np.linalg.norm(terms @ costs - 1)), costs.clip(min=0)))
    return min(found, key=lambda each: each[0])[1]


def of_circuit(points: list[list[float]], column: int, rows: float) -> float:
    """Return what a circuit of that many rows costs."""
    a, b = curve(points, column)
    return float(a * rows + b * rows**2)


def of_token(points: list[list[float]], column: int, context: int) -> float:
    """Return what the last of `context` rows costs: the difference of circuits."""
    return of_circuit(points, column, context) - of_circuit(points, column, context - 1)


def misfit(points: list[list[float]], column: int) -> float:
    """Return the largest relative distance of a length from the curve."""
    return max(abs(of_circuit(points, column, p[0]) / p[column] - 1) for p in points)


def spread(found: Row, column: int, context: int) -> tuple[float, float]:
    """Return the least and the most that a token costs where any one of the lengths is left out."""
    n = len(found["parts"]["attention"])
    totals = [
        sum(
            token_cost(
                {**found, "parts": {k: p[:i] + p[i + 1 :] for k, p in found["parts"].items()}},
                column,
                context,
            ).values()
        )
        for i in range(n)
    ]
    return min(totals), max(totals)


def token_cost(found: Row, column: int, context: int) -> dict[str, float]:
    """Return what a token costs by part, over all layers and the final norm."""
    each = {part: of_token(p, column, context) for part, p in found["parts"].items()}
    layers = found["layers"]
    return {
        "attention": layers * each["attention"],
        "MLP": layers * each["mlp"],
        "norms": (2 * layers + 1) * each["norm"],
    }


def page(found: Row, n_bits: int) -> str:
    """Write what it comes to."""
    rate = found["rate"]
    lines = [
        "<!-- Written by `python benchmarks/projection.py --page docs/projection.md`. -->",
        "",
        "# What a whole model would cost",
        "",
        (
            "One token of a language model with every layer encrypted: the client embeds the "
            "token and "
            "encrypts, the server computes all layers. Nothing of this page was executed: look-ups "
            "are counted on lowered circuits of one layer and multiplied; the rest follows "
            "from the "
            "assumptions below."
        ),
        "",
        (
            f"Rate: {rate:.1e} complexity units a second of one core ({machine_name()}, "
            f"concrete-python {installed_version('concrete-python')}, 64 look-ups of 6 bits; "
            "`fhe-fx doctor` measures yours on all cores). "
            f"`n_bits={n_bits}`, `python benchmarks/projection.py`."
        ),
    ]
    if found.get("code") != digest_of_code():
        lines += [
            "",
            "The circuits are those of an earlier compiler than the one that wrote this page.",
        ]
    for model in MODELS:
        lines += ["", *_of_model(model, found[model.name], rate)]
    lines += ["", *_assumptions(found)]
    return "\n".join([*lines, ""])


def _of_model(model: Model, found: Row, rate: float) -> list[str]:
    points = found["parts"]["attention"]
    lines = [
        f"## {model.title}",
        "",
        (
            f"{found['layers']} layers of {found['channels']} channels. Lowered, one layer "
            f"(`{model.name}`, look-ups; `p_error` {points[0][3]:g}):"
        ),
        "",
        "| part | "
        + " | ".join(f"{t:.0f} tokens" for t, *_ in points)
        + " | off the curve | complexity off it |",
        "|---|" + "---|" * (len(points) + 2),
    ]
    for part, rows in found["parts"].items():
        counts = " | ".join(f"{n:,.0f}" for _, n, *_ in rows)
        off = " | ".join(f"{100 * misfit(rows, column):.1f} %" for column in (1, 2))
        lines.append(f"| {part} | {counts} | {off} |")
    lines += [
        "",
        "The next token, keys and values of those before it kept by the server:",
        "",
        "| context | look-ups | of which attention | complexity | without one length "
        "| core-hours | " + " | ".join(f"{n} cores" for n in CORES) + " |",
        "|---|---|---|---|---|---|" + "---|" * len(CORES),
    ]
    for context in CONTEXTS:
        look_ups, complexity = (token_cost(found, c, context) for c in (1, 2))
        total, work = sum(look_ups.values()), sum(complexity.values())
        seconds = work / rate
        times = " | ".join(_time(seconds / n) for n in CORES)
        least, most = spread(found, 2, context)
        lines.append(
            f"| {context:,} | {total:,.0f} | {100 * look_ups['attention'] / total:.0f} % | "
            f"{work:.1e} | {least:.1e} to {most:.1e} | {seconds / 3600:,.1f} | {times} |"
        )
    whole = _whole_prompt(found, 2, CONTEXTS[0])
    lines += [
        "",
        (
            f"Without a cache the prompt is computed again for each token: {whole:.1e} and "
            f"{whole / rate / 3600:,.1f} core-hours at {CONTEXTS[0]} tokens."
        ),
        "",
        (
            f"Keys for the server: {found['key_bytes'] / 1e9:.2f} GB, once. The client sends "
            f"{found['channels'] * found['input_bytes'] / 1e3:.0f} KB a token. It receives "
            f"{found['channels'] * found['result_bytes'] / 1e6:.0f} MB (a third of that as "
            f"it is sent) "
            f"for the last hidden state, if it computes the logits itself, and "
            f"{found['words'] * found['result_bytes'] / 1e6:,.0f} MB for all "
            f"{found['words']:,} logits."
        ),
    ]
    return lines


def _whole_prompt(found: Row, column: int, tokens: int) -> float:
    layers = found["layers"]
    times = {"attention": layers, "mlp": layers, "norm": 2 * layers + 1}
    each = (n * of_circuit(found["parts"][part], column, tokens) for part, n in times.items())
    return float(sum(each))


def _time(seconds: float) -> str:
    return f"{seconds / 60:,.0f} min" if seconds > 180 else f"{seconds:.0f} s"


def _assumptions(found: Row) -> list[str]:
    ratios = ", ".join(f"{found[m.name]['compiled']:.2f} times" for m in MODELS)
    weights = " and ".join(f"{found[m.name]['weights'] / 1e6:.0f} million" for m in MODELS)
    return [
        "## Assumptions",
        "",
        (
            "- All layers cost what the first does. Queries and keys of trained heads meet in few "
            "channels; with random weights in more, so GPT-2's attention is dear here."
        ),
        (
            "- A circuit of n rows costs a for each row and b for each pair of rows, fitted to "
            "the lengths above; 128 and 1,024 tokens lie far beyond them. For each length the "
            "compiler chooses how look-ups are read, so their number and their price jump "
            "between lengths: `without one length` is the least and the most that comes out "
            "where any one is left out."
        ),
        (
            "- Parts are lowered one by one, each with inputs as a client encrypts them. In "
            "one circuit "
            "the look-ups between them read the noise of those before, and deep accumulators are "
            "wider."
        ),
        (
            "- Complexity is predicted from the optimizer's price of a look-up; what "
            "Concrete says of "
            f"the norm that was compiled is {ratios} as much."
        ),
        (
            f"- The affine part is left out: {weights} products a token with clear weights, "
            f"each with a "
            "ciphertext of some 1,400 to 2,048 numbers. So some 10^11 multiply-adds a token."
        ),
        (
            "- A cache of keys and values holds their squares too. Look-ups of a new row are "
            "then the "
            "difference of circuits of n and n - 1 rows; that grows with the context, the "
            "rest does not."
        ),
        (
            "- Cores share the work evenly: a layer's look-ups are thousands that wait for "
            "none of each "
            "other. Moving ciphertexts between machines is not counted."
        ),
        (
            "- Accuracy is not in question here: it has been measured for single layers "
            "([accuracy](accuracy.md)), not for all layers at once."
        ),
    ]


if __name__ == "__main__":
    main()
