"""Measures what one run of GPT-2's attention sends: keys, input and result, raw and as sent.

    python benchmarks/wire.py              # one head of GPT-2's size, random weights, 6 tokens
    python benchmarks/wire.py --tokens 8
    python benchmarks/wire.py --part attention --sizes-only    # 12 heads, output projection

The result is that of one execution with keys; its decryption is compared with and without the cut.
Bytes do not depend on the machine; the execution of a head takes about two minutes on two cores,
that of the whole attention half an hour, unless only sizes are wanted.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import fhe_fx
from fhe_fx.api import encrypted_modules
from fhe_fx.export import export_region, load_client_bundle, load_server_bundle
from fhe_fx.report.machine import machine_name
from fhe_fx.runtime.region import Region
from fhe_fx.serving.keys import StoredKeys, keygen
from fhe_fx.serving.wire import (
    ResultEncoding,
    kept_bits,
    pack_inputs,
    pack_results,
    planes,
    unpack_results,
)

if TYPE_CHECKING:
    from fhe_fx.backends.concrete.parties import ConcreteClient


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("head", "attention"), default="head")
    parser.add_argument("--tokens", type=int, default=6)
    parser.add_argument("--n-bits", type=int, default=4)
    parser.add_argument(
        "--sizes-only",
        action="store_true",
        help="do not run the circuit: as what it sends count uniform words, which a ciphertext's "
        "look like to whoever has no key",
    )
    choices = parser.parse_args()
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    heads = [0] if choices.part == "head" else None
    encrypted = fhe_fx.encrypt_submodule(
        model, "h.0.attn", n_bits=choices.n_bits, heads=heads, max_tokens=choices.tokens
    )
    region = encrypted_modules(encrypted)[0].region
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        export_region(region, out, validate=False)
        found = _measured(region, out, is_run=not choices.sizes_only)
    asked = {"part": choices.part, "tokens": choices.tokens, "n_bits": choices.n_bits}
    print(json.dumps({"machine": machine_name(), **asked, **found}))


def _measured(region: Region, out: Path, *, is_run: bool) -> dict[str, Any]:
    """Make keys, encrypt, and run or draw a result."""
    from fhe_fx.backends.concrete.parties import ConcreteClient

    client = load_client_bundle(out / "client")
    stored = keygen(out / "client")
    party = ConcreteClient(client.specs)
    party.load(stored.read_secret(client.manifest["keyset"], None))
    inputs = party.encrypt(client.codec.encode(region.captured.samples[0]))
    encodings = ResultEncoding.of(client.manifest)
    if is_run:
        results = _run(out, stored, inputs)
        found = _compared(party, results, encodings)
    else:
        drawn = np.random.default_rng(0)
        words = [drawn.integers(0, 1 << 64, e.words, np.uint64) for e in encodings]
        sent = [
            sum(map(len, planes(w, kept_bits(e)))) for w, e in zip(words, encodings, strict=True)
        ]
        found = _sizes(sum(w.nbytes for w in words), sum(sent))
    return {
        "bits_kept_of_64": [kept_bits(e) for e in encodings],
        **found,
        "input_bytes": len(pack_inputs(inputs)),
        "evaluation_key_bytes_raw": client.manifest["cost"]["key_bytes"],
        "evaluation_key_bytes_sent": stored.evaluation.stat().st_size,
    }


def _run(out: Path, stored: StoredKeys, inputs: list[bytes]) -> list[bytes]:
    from fhe_fx.backends.concrete.parties import ConcreteServer, parse_evaluation_keys

    server = load_server_bundle(out / "server")
    execution = out.with_name("execution")
    execution.mkdir()
    for name, content in server.files.items():
        (execution / name).write_bytes(content)
    keys = parse_evaluation_keys(stored.evaluation.read_bytes())
    return ConcreteServer(execution).run(inputs, keys)


def _compared(
    party: ConcreteClient, results: list[bytes], encodings: tuple[ResultEncoding, ...]
) -> dict[str, Any]:
    """Decrypt results as they are and as they are sent."""
    packed = pack_results(results, encodings)
    before, after = party.decrypt(results), party.decrypt(unpack_results(packed, encodings))
    pairs = list(zip(before, after, strict=True))
    return {
        **_sizes(sum(map(len, results)), len(packed)),
        "numbers": sum(a.size for a in before),
        "numbers_changed": sum(int((a != b).sum()) for a, b in pairs),
        "largest_change": max(int(np.abs(a - b).max()) for a, b in pairs),
    }


def _sizes(raw: int, sent: int) -> dict[str, Any]:
    ratio = round(raw / sent, 2)
    return {"result_bytes_raw": raw, "result_bytes_sent": sent, "result_ratio": ratio}


if __name__ == "__main__":
    main()
