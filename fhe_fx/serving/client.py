"""The client's side: keys sent once, inputs encrypted, results decrypted; retries where safe.

Every request may be repeated: keys are named by their content, and a run by a number that the
client chooses, under which the server computes once.
"""

from __future__ import annotations

import json
import random
import re
import time
import uuid
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import httpx
from torch import Tensor, nn

from fhe_fx.backends.base import Integers
from fhe_fx.errors import InputError, RemoteError, TargetError
from fhe_fx.export.bundle import ClientBundle, load_client_bundles
from fhe_fx.export.pretrained import client_directory, load_client_model
from fhe_fx.runtime.standin import stand_ins
from fhe_fx.serving.keys import StoredKeys, key_place, stored_keys
from fhe_fx.serving.wire import ResultEncoding, kept_bits, pack_inputs, unpack_results

if TYPE_CHECKING:
    from typing_extensions import Self

    from fhe_fx.backends.concrete.parties import ConcreteClient

__all__ = ["Connection", "RemoteCircuit", "connect", "from_pretrained"]

PATIENCE = 60.0
"""Seconds for which a request is repeated while the server cannot be reached or is busy."""
PIECE = 8 << 20
"""Bytes of keys in one request, after which an upload can go on where it was cut off."""
MAX_WAIT = 20.0
_MAX_JSON = 1 << 20
_BUSY = {408, 429, 502, 503, 504}
Stage = Callable[[str], None]


def connect(
    url: str,
    *,
    client: str | Path | Sequence[str | Path],
    token: str | None = None,
    model: nn.Module | None = None,
    keys: str | Path | None = None,
    passphrase: str | None = None,
    timeout: float = 3600.0,
    on_stage: Stage = lambda stage: None,
) -> Connection:
    """Connect to a server, check that it serves the same export, and send it evaluation keys.

    Args:
        url: of a server that `fhe-fx serve` runs.
        client: the client's directory of an export, of a part or of a model; or several.
        token: the bearer token that names the tenant.
        model: gets mode "remote" for the parts that were exported; see `Connection.attach`.
        keys: directory that `fhe-fx keygen` wrote; by default `CLIENT.keys` beside the bundle.
        passphrase: of the secret keys.
        timeout: seconds that one run may take, waiting for its turn included.
        on_stage: told what is being done, in a few words.

    Raises:
        ArtifactError: if a bundle or its keys are missing, damaged, or cannot be read.
        RemoteError: if the server cannot be reached, refuses, or serves another export.
    """
    paths = [client] if isinstance(client, (str, Path)) else list(client)
    http = _Http(url, token, on_stage)
    try:
        circuits = [
            _circuit(
                http, bundle, folder, key_place(path, keys, folder, bundle), passphrase, timeout
            )
            for path in map(client_directory, paths)
            for folder, bundle in load_client_bundles(path).items()
        ]
        connection = Connection(http, circuits)
        if model is not None:
            connection.attach(model)
    except BaseException:
        http.close()
        raise
    return connection


def from_pretrained(
    directory: str | Path,
    *,
    remote: str | None = None,
    model: nn.Module | type | None = None,
    **options: Any,
) -> nn.Module:
    """Load the client's side of a model; its encrypted parts run on a server.

    Args:
        directory: `client` of what `fhe_fx.save` wrote, or the directory that holds it.
        remote: URL of a server that `fhe-fx serve` runs; the model is then in mode "remote", and
            the connection is closed when the model is no longer used. Without it, `connect` with
            `model=` gives a connection of your own.
        model: an instance of the architecture, with any weights, where it is none of transformers.
        options: `token`, `keys`, `passphrase`, `timeout` and `on_stage` of `connect`.

    Raises:
        ArtifactError: if files or keys are missing, damaged, or cannot be read.
        RemoteError: if the server cannot be reached, refuses, or serves another export.
    """
    loaded = load_client_model(directory, model)
    if remote is not None:
        connection = connect(remote, client=client_directory(directory), model=loaded, **options)
        weakref.finalize(loaded, connection.close)
        for stand_in in stand_ins(loaded):
            stand_in.mode = "remote"
    return loaded


class Connection:
    """A server, and the circuits of it that this client may use; `close` it, or use `with`."""

    def __init__(self, http: _Http, circuits: Sequence[RemoteCircuit]) -> None:
        self._http = http
        self.circuits = list(circuits)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def attach(self, model: nn.Module) -> None:
        """Let `set_mode(model, "remote")` run the exported parts of a model on the server.

        Args:
            model: loaded from the client's directory, or returned by `encrypt_submodule` as it was
                when it was exported.

        Raises:
            TargetError: if the model has no part of that name.
            RemoteError: if a part encodes its inputs or results otherwise than the export.
        """
        parts = [part.region for stand_in in stand_ins(model) for part in stand_in.parts]
        for circuit in self.circuits:
            named = [r for r in parts if r.circuit_name == circuit.name]
            if not named:
                known = ", ".join(r.circuit_name for r in parts) or "none"
                raise TargetError(
                    f"The bundle is of {circuit.name!r}; the encrypted parts of "
                    f"{type(model).__name__} are: {known}."
                )
            entries = circuit.codec.to_entries()
            same = [r for r in named if r.codec.to_entries() == entries]
            if not same:
                raise RemoteError(
                    f"{circuit.name}: the model encodes its inputs or results otherwise than "
                    f"the bundle that was exported. Encrypt it with the options, weights and "
                    f"calibration of the export, or export it again."
                )
            for region in same:
                region.remote = circuit

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Run the circuit on real inputs of its region, without a model; where there is one.

        Raises:
            InputError: if the inputs do not fit, or there are several circuits.
            RemoteError: if the server gives no result.
        """
        if len(self.circuits) != 1:
            raise InputError(f"There are {len(self.circuits)} circuits; choose: .circuits[0].run")
        return self.circuits[0].run(inputs)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()


class RemoteCircuit:
    """A circuit that another machine runs."""

    def __init__(
        self, http: _Http, bundle: ClientBundle, party: ConcreteClient, key: str, timeout: float
    ) -> None:
        self._http, self._party, self._key, self._timeout = http, party, key, timeout
        self._bundle_id = str(bundle.manifest["bundle"])
        self._encodings = ResultEncoding.of(bundle.manifest)
        self.name = str(bundle.manifest["name"])
        self.codec = bundle.codec

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Run on real inputs: quantize, encrypt, send; receive, decrypt, scale."""
        return self.codec.decode(self.execute(self.codec.encode(inputs)))

    def execute(self, inputs: Sequence[Integers]) -> list[Integers]:
        """Run on integers.

        Raises:
            RemoteError: if the server gives no result within the time.
            WireError: if what it gives cannot be one.
        """
        return self._party.decrypt(unpack_results(self._fetch(inputs), self._encodings))

    def _fetch(self, inputs: Sequence[Integers]) -> bytes:
        """Return packed results, asking again if the server forgot or gave back the run."""
        body = pack_inputs(self._party.encrypt(inputs))
        end = time.monotonic() + self._timeout
        most = 65_536 + sum(e.words * (kept_bits(e) + 8) // 8 for e in self._encodings)
        while True:
            run = uuid.uuid4().hex
            try:
                if self._ask(run, body, end):
                    result = self._http.content(f"/v1/runs/{run}/result", most)
                    if result is not None:
                        self._forget(run)
                        return result
            except BaseException:
                self._forget(run)  # do not let it compute what nobody waits for
                raise

    def _ask(self, run: str, body: bytes, end: float) -> bool:
        """Wait until a run is done; False if the server gave it back and it must be asked anew."""
        where, query = f"/v1/runs/{run}", {"circuit": self._bundle_id, "key": self._key}
        answer, start = None, time.monotonic()
        while time.monotonic() < end:
            if answer is None:  # not asked yet, or forgotten in a restart
                answer = self._http.json("PUT", where, query, body, until=end)
            state = str((answer or {}).get("state"))
            self._http.on_stage(f"{self.name}: {state}, {time.monotonic() - start:.0f} s")
            if state == "done":
                return True
            if state == "cancelled":
                time.sleep(min(2.0, max(0.0, end - time.monotonic())))
                return False
            if state == "failed":
                raise RemoteError(f"{self.name}: the server failed: {(answer or {})['message']}")
            wait = {"wait": f"{max(0.0, min(MAX_WAIT, end - time.monotonic())):.1f}"}
            answer = self._http.json("GET", where, wait, missing_ok=True)
        raise RemoteError(
            f"{self.name}: no result within {self._timeout:g} s; the run is cancelled. Give a "
            f"longer timeout, or ask when the server is less busy."
        )

    def _forget(self, run: str) -> None:
        self._http.try_once("DELETE", f"/v1/runs/{run}")


def _circuit(
    http: _Http,
    bundle: ClientBundle,
    path: Path,
    keys: Path,
    passphrase: str | None,
    timeout: float,
) -> RemoteCircuit:
    _check_served(http, bundle, path)
    stored = stored_keys(bundle, keys)
    secret = stored.read_secret(str(bundle.manifest["keyset"]), passphrase)
    _upload(http, stored)
    from fhe_fx.backends.concrete.parties import ConcreteClient

    party = ConcreteClient(bundle.specs)
    party.load(secret)
    return RemoteCircuit(http, bundle, party, stored.id, timeout)


def _check_served(http: _Http, bundle: ClientBundle, path: Path) -> None:
    served = (http.json("GET", "/v1/circuits") or {}).get("circuits", [])
    if bundle.manifest["bundle"] in [c["bundle"] for c in served]:
        return
    listed = ", ".join(f"{c['name']} (export {c['bundle'][:12]})" for c in served) or "nothing"
    raise RemoteError(
        f"{path} is {bundle.manifest['name']} of export {bundle.manifest['bundle'][:12]}, which "
        f"{http.url} does not serve. It serves: {listed}. Client and server need the two "
        f"directories of one `fhe-fx export`."
    )


def _upload(http: _Http, keys: StoredKeys) -> None:
    """Send evaluation keys unless they are there, going on where an upload was cut off."""
    where, size = f"/v1/keys/{keys.id}", keys.evaluation.stat().st_size
    end = time.monotonic() + PATIENCE
    with keys.evaluation.open("rb") as file:
        while True:
            state = http.json("GET", where) or {}
            if state.get("is_complete"):
                return
            file.seek(received := int(state["received"]))
            http.on_stage(f"sending keys, {received / 1e6:.0f} of {size / 1e6:.0f} MB")
            query = {"offset": str(received), "size": str(size)}
            answer = http.json("PATCH", where, query, file.read(PIECE), conflict_ok=True)
            if answer is not None:
                end = time.monotonic() + PATIENCE
            elif time.monotonic() > end:
                raise RemoteError(f"{http.url} does not take the rest of the keys. Try again.")
            else:
                time.sleep(1.0)


class _Http:
    """Requests that are repeated while that may help, and errors of one sentence."""

    def __init__(self, url: str, token: str | None, on_stage: Stage) -> None:
        self.url, self.on_stage = url.rstrip("/"), on_stage
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        if not re.match(r"https?://[^/]", self.url):
            raise RemoteError(f"{url!r} is not the URL of a server. Write http://HOST:PORT.")
        self._client = httpx.Client(
            base_url=self.url, headers=headers, timeout=httpx.Timeout(60.0, connect=10.0)
        )

    def close(self) -> None:
        self._client.close()

    def try_once(self, method: str, where: str) -> None:
        try:
            self._client.request(method, where, timeout=5.0)
        except httpx.HTTPError:
            return

    def json(
        self,
        method: str,
        where: str,
        query: dict[str, str] | None = None,
        body: bytes | None = None,
        *,
        missing_ok: bool = False,
        conflict_ok: bool = False,
        until: float | None = None,
    ) -> dict[str, Any] | None:
        """Return an answer; None for 404 or 409 where these are expected."""
        request = self._client.build_request(method, where, params=query, content=body)
        status, content = self._send(request, _MAX_JSON, until)
        if (status == 404 and missing_ok) or (status == 409 and conflict_ok):
            return None
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            answer = None
        if status >= 400 or not isinstance(answer, dict):
            raise RemoteError(f"{self.url} refuses: {_reason(status, answer)}")
        return answer

    def content(self, where: str, most: int) -> bytes | None:
        """Return the body of an answer, of `most` bytes at most; None if it is gone."""
        status, content = self._send(self._client.build_request("GET", where), most, None)
        if status == 404:
            return None
        if status != 200:
            raise RemoteError(f"{self.url} refuses a result, with status {status}.")
        return content

    def _send(self, request: httpx.Request, most: int, until: float | None) -> tuple[int, bytes]:
        """Send, and send again while the server is out of reach or busy."""
        end, pause = until or time.monotonic() + PATIENCE, 0.25
        while True:
            try:
                status, content = self._send_once(request, most)
            except httpx.TransportError as error:
                last = f"cannot be reached ({type(error).__name__}: {error})"
            else:
                if status not in _BUSY:
                    return status, content
                last = f"is busy (status {status})"
            if time.monotonic() + pause > end:
                raise RemoteError(f"{self.url} {last}, and was tried again until now.")
            self.on_stage(f"{self.url} {last}; trying again")
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(8.0, 2 * pause)

    def _send_once(self, request: httpx.Request, most: int) -> tuple[int, bytes]:
        response = self._client.send(request, stream=True)
        try:
            parts, size = [], 0
            for part in response.iter_bytes():
                size += len(part)
                if size > most:
                    raise RemoteError(f"{self.url} sends more than the {most} bytes expected.")
                parts.append(part)
        finally:
            response.close()
        return response.status_code, b"".join(parts)


def _reason(status: int, answer: Any) -> str:
    error = answer.get("error") if isinstance(answer, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    return f"{str(message)[:500]} (status {status})" if message else f"status {status}."
