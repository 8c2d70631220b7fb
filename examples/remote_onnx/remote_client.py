"""Writes on with ONNX Runtime, Concrete and a server; neither PyTorch nor fhe_fx is imported.

    python client.py --circuit out/client/circuits/PART --models onnx/client \
        --server http://127.0.0.1:8080 --prompt "5 6 7" --new-tokens 1

`before.onnx` turns token numbers into integers, these are encrypted and run by the server, and
`after.onnx` turns what is decrypted into logits. The prompt is filled up on the right to the length
that the models take, which is right where a row does not depend on later ones.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import struct
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import zstandard

# Concrete's compiled half: its frontend, concrete.fhe, imports PyTorch.
from concrete.compiler import ClientProgram, Keyset, ProgramInfo, TransportValue, Value

Numbers = npt.NDArray[Any]
PIECE = 8 << 20
PATIENCE = 3600.0


def main() -> None:
    """Print the numbers of the new tokens."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--circuit", type=Path, required=True, help="holds client.zip")
    parser.add_argument("--models", type=Path, required=True, help="holds before.onnx, after.onnx")
    parser.add_argument("--server", required=True)
    parser.add_argument("--token", default="", help="bearer token")
    parser.add_argument("--keys", type=Path, default=Path("remote_onnx.keys"))
    parser.add_argument("--prompt", required=True, help="token numbers")
    parser.add_argument("--new-tokens", type=int, default=1)
    choices = parser.parse_args()
    circuit = Circuit(choices.circuit, choices.keys, Server(choices.server, choices.token))
    model = Model(choices.models, circuit)
    tokens = [int(n) for n in choices.prompt.split()]
    for _ in range(choices.new_tokens):
        tokens.append(int(model.logits(tokens).argmax()))
        print(tokens[-1], flush=True)


class Model:
    """The float remainder, around a circuit."""

    def __init__(self, directory: Path, circuit: Circuit) -> None:
        self._circuit = circuit
        self._before, self._after = (
            onnxruntime.InferenceSession(
                directory / f"{name}.onnx", providers=["CPUExecutionProvider"]
            )
            for name in ("before", "after")
        )

    def logits(self, tokens: Sequence[int]) -> Numbers:
        """Return the scores of the next token."""
        (ids,) = self._before.get_inputs()
        length = int(ids.shape[1])
        if not 0 < len(tokens) <= length:
            raise SystemExit(f"There are {len(tokens)} tokens; the models take 1 to {length}.")
        filled = [*tokens, *[tokens[-1]] * (length - len(tokens))]
        values: dict[str, Numbers] = {ids.name: np.array([filled], np.int64)}
        values |= _run(self._before, values)
        encoded = [values[f"encoded_{k}"] for k in range(self._circuit.n_inputs)]
        for number, result in enumerate(self._circuit.run(encoded)):
            values[f"result_{number}"] = result
        logits: Numbers = next(iter(_run(self._after, values).values()))
        return logits[0, len(tokens) - 1]  # type: ignore[no-any-return]


def _run(session: onnxruntime.InferenceSession, values: dict[str, Numbers]) -> dict[str, Numbers]:
    names = [output.name for output in session.get_outputs()]
    given = {i.name: values[i.name] for i in session.get_inputs()}
    return dict(zip(names, session.run(names, given), strict=True))


class Circuit:
    """What a server runs, by the client's half of an export: no weight is in it."""

    def __init__(self, directory: Path, keys: Path, server: Server) -> None:
        self._manifest = json.loads((directory / "manifest.json").read_bytes())
        content = (directory / "client.zip").read_bytes()
        if hashlib.sha256(content).hexdigest() != self._manifest["files"]["client.zip"]["sha256"]:
            raise SystemExit(f"{directory}/client.zip was altered.")
        with zipfile.ZipFile(directory / "client.zip") as archive:
            specs = json.loads(archive.read("client.specs.json"))
        specs.pop("tfhers_specs", None)
        info = ProgramInfo.deserialize(json.dumps(specs).encode())
        keyset = _keyset(info, keys)
        program = ClientProgram.create_encrypted(info, keyset)
        self._client, self._server = (
            program.get_client_circuit(specs["circuits"][0]["name"]),
            server,
        )
        self._inputs = specs["circuits"][0]["inputs"]
        self._key = server.keep_keys(bytes(keyset.get_server_keys().serialize()))

    @property
    def n_inputs(self) -> int:
        """How many tensors of integers it takes."""
        return len(self._inputs)

    def run(self, inputs: Sequence[Numbers]) -> list[Numbers]:
        """Encrypt, have it run, decrypt."""
        body = pack_inputs([self._encrypted(x, k) for k, x in enumerate(inputs)])
        packed = self._server.run(str(self._manifest["bundle"]), self._key, body)
        results = unpack_results(packed, self._manifest["wire"]["results"])
        return [
            np.asarray(
                self._client.process_output(TransportValue.deserialize(result), k).to_py_val(),
                np.int64,
            )
            for k, result in enumerate(results)
        ]

    def _encrypted(self, x: Numbers, number: int) -> bytes:
        kind = self._inputs[number]["typeInfo"]["lweCiphertext"]
        if list(x.shape) != kind["abstractShape"]["dimensions"]:
            raise SystemExit(f"Input {number} has another shape than the circuit takes.")
        return bytes(self._client.prepare_input(Value(x.astype(np.int64)), number).serialize())


def _keyset(info: ProgramInfo, path: Path) -> Keyset:
    """Read secret keys, or make some and write them to a file that only its owner can read."""
    if path.exists():
        return Keyset.deserialize(path.read_bytes())
    keyset = Keyset(info, None, 0, 0, 0, 0, None)  # seeds of zero: of the system's randomness
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(keyset.serialize())
    return keyset


# The server ------------------------------------------------------------------------------------


class Server:
    """The HTTP interface; /openapi.json describes it."""

    def __init__(self, url: str, token: str) -> None:
        self._url, self._headers = url.rstrip("/"), {"Authorization": f"Bearer {token}"}

    def keep_keys(self, content: bytes) -> str:
        """Upload evaluation keys, going on where an upload was cut off; return their name."""
        key = hashlib.sha256(content).hexdigest()
        while not (state := self._json("GET", f"/v1/keys/{key}"))["is_complete"]:
            offset = int(state["received"])
            query = {"offset": offset, "size": len(content)}
            self._json("PATCH", f"/v1/keys/{key}", query, content[offset : offset + PIECE])
        return key

    def run(self, circuit: str, key: str, body: bytes) -> bytes:
        """Have a circuit run, wait, and take the result."""
        where, end = f"/v1/runs/{uuid.uuid4().hex}", time.monotonic() + PATIENCE
        state = self._json("PUT", where, {"circuit": circuit, "key": key}, body)
        while state["state"] in {"queued", "running"} and time.monotonic() < end:
            state = self._json("GET", where, {"wait": 20})
        if state["state"] != "done":
            raise SystemExit(f"The run is {state['state']}: {state['message']}")
        result = self._ask("GET", f"{where}/result", {}, None)
        self._ask("DELETE", where, {}, None)
        return result

    def _json(
        self, method: str, path: str, query: dict[str, Any] | None = None, body: bytes | None = None
    ) -> dict[str, Any]:
        return dict(json.loads(self._ask(method, path, query or {}, body)))

    def _ask(self, method: str, path: str, query: dict[str, Any], body: bytes | None) -> bytes:
        url = f"{self._url}{path}?{urllib.parse.urlencode(query)}"
        request = urllib.request.Request(url, body, self._headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError as error:
            raise SystemExit(f"{self._url} refuses: {error.read().decode()[:500]}") from error


# The wire (docs/security.md, "The wire") ----------------------------------------------------------


def pack_inputs(values: Sequence[bytes]) -> bytes:
    """Frame ciphertexts: their number, their sizes, themselves."""
    sizes = struct.pack(f"<I{len(values)}Q", len(values), *map(len, values))
    return b"".join((b"fhe_fx inputs 1\n", sizes, *values))


def unpack_results(body: bytes, encodings: Sequence[dict[str, int]]) -> list[bytes]:
    """Put the words of ciphertexts together from their planes of bytes, the highest first."""
    start = len(b"fhe_fx results 1\n")
    (length,) = struct.unpack_from("<I", body, start)
    headers = json.loads(body[start + 4 : start + 4 + length])
    at, values = start + 4 + length, []
    for header, encoding in zip(headers, encodings, strict=True):
        parts = []
        for size in (header["before"], header["after"], *header["planes"]):
            parts.append(body[at : at + size])
            at += size
        before, after, *planes = parts
        if len(planes) != math.ceil(kept_bits(encoding) / 8):
            raise SystemExit("The result has not as many planes as it needs.")
        octets = np.zeros((encoding["words"], 8), np.uint8)
        for number, plane in enumerate(planes):
            held = zstandard.ZstdDecompressor().decompress(plane, encoding["words"])
            octets[:, number] = np.frombuffer(held, np.uint8)
        values.append(before + octets.view(">u8").astype("<u8").tobytes() + after)
    return values


def kept_bits(encoding: dict[str, int]) -> int:
    """Return how many bits of each word are sent: six deviations stay in a quarter of a slot."""
    deviation = math.sqrt((encoding["lwe_dimension"] + 1) / 12)
    return min(64, encoding["width"] + math.ceil(math.log2(6 * deviation * 2 / 0.25)))


if __name__ == "__main__":
    main()
