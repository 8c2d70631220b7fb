"""A client that knows ONNX Runtime and numpy, and neither PyTorch nor fhe_fx.

    fhe-fx export examples/gpt2/model --submodule h.0.attn --tokens 8 --onnx onnx
    python examples/onnx_client/client.py onnx examples/gpt2/model "He had never"

`before.onnx` gives the integers that would be encrypted, `after.onnx` takes those that were
decrypted. In between stands a server; here its circuit runs on the integers themselves.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

Values = dict[str, Any]
"""Arrays by name: inputs of the model, integers of the circuit, and what the client keeps."""


class Model:
    """An ONNX model that takes its inputs out of many values, and adds its results to them."""

    def __init__(self, path: Path) -> None:
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.inputs = {i.name: i.shape for i in self.session.get_inputs()}
        self.outputs = [o.name for o in self.session.get_outputs()]

    def __call__(self, values: Values) -> Values:
        """Return `values` with the model's results."""
        found = self.session.run(self.outputs, {name: values[name] for name in self.inputs})
        return values | dict(zip(self.outputs, found, strict=True))


class Client:
    """A language model of which one part runs elsewhere."""

    def __init__(self, directory: Path) -> None:
        self.before = Model(directory / "client" / "before.onnx")
        self.circuit = Model(directory / "server" / "region.onnx")
        self.after = Model(directory / "client" / "after.onnx")
        ((self.ids, shape),) = self.before.inputs.items()
        self.length = int(shape[1])

    def scores(self, tokens: Sequence[int]) -> Any:
        """Return a score for each word to follow `tokens`, of which the last that fit are read."""
        row = list(tokens)[-self.length :]
        padded = row + [row[-1]] * (self.length - len(row))  # no token sees those behind it
        values = self.before({self.ids: np.array([padded], dtype=np.int64)})
        sent = {name: values[name] for name in self.circuit.inputs}  # encrypt these,
        received = self.circuit(sent)  # let the server compute, and decrypt what comes back
        return self.after(values | received)["output_0"][0, len(row) - 1]

    def write(self, tokens: Sequence[int], n: int) -> list[int]:
        """Append the n likeliest tokens, one after the other."""
        text = list(tokens)
        for _ in range(n):
            text.append(int(self.scores(text).argmax()))
        return text


def main() -> None:
    """Continue a prompt."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("directory", type=Path, help="what fhe-fx export --onnx wrote")
    parser.add_argument("tokenizer", type=Path, help="directory with tokenizer.json")
    parser.add_argument("prompt")
    parser.add_argument("--words", type=int, default=5, help="tokens to write")
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(arguments.tokenizer / "tokenizer.json"))
    tokens = tokenizer.encode(arguments.prompt).ids
    print(tokenizer.decode(Client(arguments.directory).write(tokens, arguments.words)))


if __name__ == "__main__":
    main()
