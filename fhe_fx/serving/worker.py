"""A process that parses and runs what clients sent; if it dies, one run dies with it.

    python -m fhe_fx.serving.worker '{"circuits": {...}, ...}'

It reads one JSON object a line from standard input, the job, and answers with one line: `{"ok":
true}`, or `{"ok": false, "kind": ..., "message": ...}`. Ciphertexts, keys and results are in files.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import signal
import sys
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fhe_fx.errors import FheFxError, WireError
from fhe_fx.serving.wire import ResultEncoding, check_message, pack_results, unpack_inputs

if TYPE_CHECKING:
    from fhe_fx.backends.concrete.parties import ConcreteServer, EvaluationKeys

__all__ = ["Worker", "main"]

_PR_SET_PDEATHSIG = 1
_TOO_MUCH = "The run needs more memory than a worker may use."


class Worker:
    """Holds circuits and, within a bound on memory, the evaluation keys used last."""

    def __init__(self, circuits: dict[str, dict[str, Any]], key_memory: int) -> None:
        """Prepare; a circuit is loaded when it is first run.

        Args:
            circuits: by bundle id: "folder" with its machine code, and "wire" and "key_bytes" of
                its manifest.
            key_memory: bytes of evaluation keys to keep; the key in use may exceed it.
        """
        self._circuits = circuits
        self._key_memory = key_memory
        self._keys: OrderedDict[str, tuple[int, EvaluationKeys]] = OrderedDict()
        self._servers: dict[str, ConcreteServer] = {}

    def answer(self, job: dict[str, Any]) -> dict[str, Any]:
        """Do a job: run `circuit` on the file `inputs` with the file `keys`, write `result`."""
        try:
            self._run(job)
        except MemoryError:
            return _refusal("out_of_memory", _TOO_MUCH)
        except WireError as error:
            return _refusal("malformed", str(error))
        except OSError as error:
            if error.errno == errno.ENOMEM:  # a file that cannot be mapped, say
                return _refusal("out_of_memory", _TOO_MUCH)
            return _refusal("storage", f"The server cannot read or keep a file: {error.strerror}.")
        except FheFxError as error:
            return _refusal("failed", str(error))
        return {"ok": True}

    def _run(self, job: dict[str, Any]) -> None:
        circuit = self._circuits[job["circuit"]]
        body = Path(job["inputs"]).read_bytes()
        inputs = unpack_inputs(body, int(circuit["wire"]["inputs"]))
        keys = self._evaluation_keys(Path(job["keys"]), int(circuit["key_bytes"]))
        results = self._server(job["circuit"]).run(inputs, keys)
        Path(job["result"]).write_bytes(pack_results(results, ResultEncoding.of(circuit)))

    def _server(self, bundle_id: str) -> ConcreteServer:
        if bundle_id not in self._servers:
            from fhe_fx.backends.concrete.parties import ConcreteServer

            self._servers[bundle_id] = ConcreteServer(Path(self._circuits[bundle_id]["folder"]))
        return self._servers[bundle_id]

    def _evaluation_keys(self, path: Path, size: int) -> EvaluationKeys:
        """Return the keys in a file; `size` is what they need, masks included."""
        name = str(path)
        if name in self._keys:
            self._keys.move_to_end(name)
            return self._keys[name][1]
        from fhe_fx.backends.concrete.parties import parse_evaluation_keys

        size += path.stat().st_size
        while self._keys and size + sum(n for n, _ in self._keys.values()) > self._key_memory:
            self._keys.popitem(last=False)
        keys = parse_evaluation_keys(check_message(path.read_bytes()))
        self._keys[name] = size, keys
        return keys


def _refusal(kind: str, message: str) -> dict[str, Any]:
    return {"ok": False, "kind": kind, "message": message.splitlines()[0][:500]}


def _bound(memory: int) -> None:
    """Die with the server, die first when memory is short, and use no more than `memory` bytes."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        Path("/proc/self/oom_score_adj").write_text("1000")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core would hold keys and inputs
    if memory:
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))


def main() -> None:
    """Answer jobs until standard input ends."""
    settings = json.loads(sys.argv[1])
    _bound(int(settings["memory"]))
    answers = os.fdopen(os.dup(1), "w")
    # What native code prints is no answer, and on malformed bytes it prints hundreds of megabytes.
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    worker = Worker(settings["circuits"], int(settings["key_memory"]))
    for line in sys.stdin:
        answers.write(json.dumps(worker.answer(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
