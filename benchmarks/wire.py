"""Measures what one run of GPT-2's attention sends: keys, input and result, raw and as sent.

    python benchmarks/wire.py              # one head of GPT-2's size, random weights, 6 tokens
    python benchmarks/wire.py --tokens 8
    python benchmarks/wire.py --part attention    # 12 heads and the output projection

The result is that of one execution with keys; its decryption is compared with and without the cut.
Bytes do not depend on the machine; the execution of a head takes about two minutes on two cores,
that of the whole attention half an hour.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import fhe_fx
from fhe_fx.api import encrypted_modules
from fhe_fx.export import export_region, load_client_bundle, load_server_bundle
from fhe_fx.report.machine import machine_name
from fhe_fx.serving.keys import keygen
from fhe_fx.serving.wire import ResultEncoding, kept_bits, pack_inputs, pack_results, unpack_results


def main() -> None:
    """Print one JSON object."""
    from fhe_fx.backends.concrete.parties import (
        ConcreteClient,
        ConcreteServer,
        parse_evaluation_keys,
    )

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("head", "attention"), default="head")
    parser.add_argument("--tokens", type=int, default=6)
    parser.add_argument("--n-bits", type=int, default=4)
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
        client, server = load_client_bundle(out / "client"), load_server_bundle(out / "server")
        stored = keygen(out / "client")
        party = ConcreteClient(client.specs)
        party.load(stored.read_secret(client.manifest["keyset"], None))
        execution = Path(folder) / "execution"
        execution.mkdir()
        for name, content in server.files.items():
            (execution / name).write_bytes(content)
        keys = parse_evaluation_keys(stored.evaluation.read_bytes())
        inputs = party.encrypt(client.codec.encode(region.captured.samples[0]))
        start = time.perf_counter()
        results = ConcreteServer(execution).run(inputs, keys)
        seconds = time.perf_counter() - start
        encodings = ResultEncoding.of(client.manifest)
        packed = pack_results(results, encodings)
        before, after = party.decrypt(results), party.decrypt(unpack_results(packed, encodings))
        pairs = list(zip(before, after, strict=True))
        raw = sum(map(len, results))
        print(
            json.dumps(
                {
                    "machine": machine_name(), "part": choices.part, "tokens": choices.tokens,
                    "n_bits": choices.n_bits, "bits_kept_of_64": [kept_bits(e) for e in encodings],
                    "result_bytes_raw": raw, "result_bytes_sent": len(packed),
                    "result_ratio": round(raw / len(packed), 2),
                    "input_bytes": len(pack_inputs(inputs)),
                    "evaluation_key_bytes_raw": client.manifest["cost"]["key_bytes"],
                    "evaluation_key_bytes_sent": stored.evaluation.stat().st_size,
                    "numbers": sum(a.size for a in before),
                    "numbers_changed": sum(int((a != b).sum()) for a, b in pairs),
                    "largest_change": max(int(np.abs(a - b).max()) for a, b in pairs),
                    "seconds": round(seconds, 1),
                }
            )
        )  # fmt: skip


if __name__ == "__main__":
    main()
