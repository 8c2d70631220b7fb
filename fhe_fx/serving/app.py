"""The HTTP interface: keys in, runs in, results out, to each tenant its own.

Bytes are refused by their stated size before they are read, and are not parsed in this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, HTTPException, Query, Request, Response
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Route

from fhe_fx.errors import WireError
from fhe_fx.serving.engine import Engine
from fhe_fx.serving.runs import BusyError, Limits, Run, Runs
from fhe_fx.serving.store import KeyStore
from fhe_fx.serving.tokens import Tokens

__all__ = ["Settings", "create_app"]

LOG = logging.getLogger("fhe_fx.serving")
MAX_WAIT = 20.0
"""Seconds that a question for the state of a run may wait for the answer to change."""
SLOWEST = 32_000
"""Bytes a second below which a sender is cut off, after a grace of `SLOW_GRACE` seconds."""
SLOW_GRACE = 30.0
OVERHEAD = 65_536
"""Bytes that a serialized key or input may have besides its ciphertexts."""

_ID = r"^[0-9a-f]{64}$"
_RUN = r"^[0-9a-f]{32}$"
Sha = Annotated[str, InPath(pattern=_ID)]
RunId = Annotated[str, InPath(pattern=_RUN)]
_BYTES = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_BINARY = {"requestBody": {"required": True, "content": _BYTES}}
_PIECE = {"requestBody": {"required": False, "content": _BYTES}}
"""None are sent where all came before, and only the last check was cut off."""
_Answers = dict[int | str, dict[str, Any]]
_HELD: _Answers = {401: {}, 404: {}}
_UPLOAD: _Answers = {
    400: {},
    401: {},
    404: {},
    408: {},
    409: {},
    411: {},
    413: {},
    429: {},
    503: {},
    507: {},
}


@dataclass
class Settings:
    """What a server is made of."""

    manifests: Mapping[str, Mapping[str, Any]]
    """Manifests of the circuits by bundle id."""
    engine: Engine
    keys: KeyStore
    runs: Path
    """Where finished runs are kept."""
    tokens: Tokens
    limits: Limits = field(default_factory=Limits)
    grace: float = 60.0
    """Seconds that running work is given when the server shuts down."""


class _Metrics:
    """Counts and times, without names of tenants."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        here = self.registry
        self.requests = Counter(
            "fhe_fx_requests", "HTTP requests.", ["method", "route", "status"], registry=here
        )
        self.runs = Counter("fhe_fx_runs", "Finished runs.", ["state", "kind"], registry=here)
        self.seconds = Histogram(
            "fhe_fx_run_seconds", "Seconds in the engine.", registry=here,
            buckets=(0.1, 1, 3, 10, 30, 100, 300, 1000, 3000),
        )  # fmt: skip
        self.active = Gauge("fhe_fx_runs_active", "Runs that wait or are computed.", registry=here)
        self.uploaded = Counter(
            "fhe_fx_key_bytes", "Bytes of evaluation keys received.", registry=here
        )

    def finished(self, run: Run) -> None:
        """Count a run."""
        self.runs.labels(run.state, run.kind).inc()
        if run.state == "done":
            self.seconds.observe(run.seconds)
        _log("run", run=run.id, tenant=run.tenant, state=run.state, kind=run.kind,
             seconds=round(run.seconds, 3))  # fmt: skip


class _Server:
    """The state behind the routes."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.metrics = _Metrics()
        self.runs: Runs
        self.uploads: set[tuple[str, str]] = set()
        costs = [m["cost"] for m in settings.manifests.values()]
        self.max_key = max(int(c["key_bytes"]) for c in costs) + OVERHEAD

    def max_input(self, circuit: str) -> int:
        """Return the most bytes that the inputs of a circuit can have."""
        return int(self.settings.manifests[circuit]["cost"]["input_bytes"]) + OVERHEAD

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Start the engine; at the end, let running work finish."""
        self.runs = Runs(
            self.settings.runs, self.settings.engine, self.settings.limits, self.metrics.finished
        )
        await self.settings.engine.start()
        _log("started", circuits=len(self.settings.manifests))
        try:
            yield
        finally:
            await self.runs.drain(self.settings.grace)
            await self.settings.engine.close()
            _log("stopped")


def create_app(settings: Settings) -> FastAPI:
    """Return the ASGI application of a server."""
    server = _Server(settings)
    app = FastAPI(
        title="fhe_fx", version="1", docs_url=None, redoc_url=None, lifespan=server.lifespan,
        description="Runs circuits on encrypted data. Bodies are bytes, errors are JSON.",
    )  # fmt: skip
    app.state.server = server
    _add_errors(app)
    _add_observation(app, server)

    def tenant_of(authorization: Annotated[str, Header()] = "") -> str:
        tenant = settings.tokens.tenant(authorization)
        if tenant is None:
            raise HTTPException(401, "Give a token: Authorization: Bearer TOKEN.")
        return tenant

    tenant = Depends(tenant_of)
    _add_status(app, server, tenant)
    _add_keys(app, server, tenant)
    _add_runs(app, server, tenant)
    return app


# Errors and observation -----------------------------------------------------------------------


def _error(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    retry = {"Retry-After": "2"} if status in {429, 503} else {}
    challenge = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    body = {"error": {"status": status, "message": message}}
    return JSONResponse(body, status, {**retry, **challenge, **(headers or {})})


def _add_errors(app: FastAPI) -> None:
    """Answer every refusal with one JSON object that repeats nothing of the request."""

    @app.exception_handler(StarletteHTTPException)
    async def http(request: Request, error: StarletteHTTPException) -> Response:
        headers = dict(error.headers or {})
        if error.status_code == 405:  # the framework names the methods of one route only
            headers["Allow"] = ", ".join(_allowed(app, request))
        return _error(error.status_code, str(error.detail), headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        places = sorted({".".join(map(str, e["loc"])) for e in error.errors()})
        return _error(422, f"Malformed: {', '.join(places)[:200]}.")

    @app.exception_handler(BusyError)
    async def busy(request: Request, error: BusyError) -> Response:
        return _error(error.status, str(error))

    @app.exception_handler(WireError)
    async def wire(request: Request, error: WireError) -> Response:
        return _error(400, str(error))

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return _error(408, "The body was cut off.")

    @app.exception_handler(OSError)
    async def storage(request: Request, error: OSError) -> Response:
        full = error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
        _log("storage", level=logging.ERROR, errno=error.errno)
        return _error(
            507 if full else 503,
            "The server's disk is full; nothing was kept." if full
            else "The server's disk cannot be used now.",
        )  # fmt: skip


def _allowed(app: FastAPI, request: Request) -> list[str]:
    """Return the methods that the path of a request takes."""
    path = request.scope["path"]
    routes = [r for r in app.routes if isinstance(r, Route) and r.path_regex.match(path)]
    return sorted({method for route in routes for method in route.methods or ()})


def _add_observation(app: FastAPI, server: _Server) -> None:
    @app.middleware("http")
    async def observe(request: Request, call_next: _Next) -> Response:
        start, status = time.monotonic(), 500
        try:
            response = await call_next(request)
            status = response.status_code
        except Exception as error:  # whatever it is, the client learns nothing of it
            _log("fault", level=logging.ERROR, error=type(error).__name__)
            response = _error(500, "The server failed; this is a fault of it.")
        route = getattr(request.scope.get("route"), "path", "unknown")
        method = request.method if request.method in _METHODS else "other"
        server.metrics.requests.labels(method, route, str(status)).inc()
        _log("request", method=method, route=route, status=status,
             bytes=request.headers.get("content-length", "0")[:20],
             sent=response.headers.get("content-length", "0"),
             seconds=round(time.monotonic() - start, 4))  # fmt: skip
        return response


_Next = Callable[[Request], Awaitable[Response]]
_METHODS = {"GET", "PUT", "PATCH", "DELETE", "POST", "HEAD", "OPTIONS"}


def _log(event: str, *, level: int = logging.INFO, **fields: object) -> None:
    """Log one JSON object: what happened to whom, never what was in it."""
    LOG.log(level, "%s", json.dumps({"time": round(time.time(), 3), "event": event, **fields}))


# Reading bytes --------------------------------------------------------------------------------


def _length(request: Request, most: int, what: str) -> int:
    """Return the stated size of a body that may be read."""
    stated = request.headers.get("content-length", "")
    if not re.fullmatch(r"[0-9]{1,15}", stated):
        raise HTTPException(411, "State the size of the body: Content-Length.")
    if (size := int(stated)) > most:
        raise HTTPException(413, f"{what} has {size} bytes; at most {most} are taken.")
    return size


async def _chunks(request: Request, size: int) -> AsyncIterator[bytes]:
    """Yield a body, cutting off a sender that is too slow or sends more than it stated."""
    end = time.monotonic() + SLOW_GRACE + size / SLOWEST
    stream, received = request.stream().__aiter__(), 0
    while True:
        try:
            chunk = await asyncio.wait_for(anext(stream), max(0.0, end - time.monotonic()))
        except StopAsyncIteration:
            return
        except asyncio.TimeoutError:
            raise HTTPException(408, "The body came too slowly.") from None
        received += len(chunk)
        if received > size:
            raise HTTPException(413, "The body is longer than it stated.")
        if chunk:
            yield chunk


# Routes ---------------------------------------------------------------------------------------


def _add_status(app: FastAPI, server: _Server, tenant: Any) -> None:
    @app.get("/health", responses={503: {}})
    async def health() -> Response:
        """Say whether runs are taken."""
        if server.runs.is_draining:
            return _error(503, "The server is shutting down.")
        return JSONResponse({"status": "ok"})

    @app.get("/metrics", responses={401: {}}, response_class=PlainTextResponse)
    async def metrics(who: str = tenant) -> PlainTextResponse:
        """Counts and times for Prometheus, without tenants."""
        server.metrics.active.set(server.runs.active())
        return PlainTextResponse(generate_latest(server.metrics.registry))

    @app.get("/v1/circuits", responses={401: {}})
    async def circuits(who: str = tenant) -> dict[str, Any]:
        """List the circuits that are served, by bundle id."""
        shown = ("bundle", "name", "keyset", "versions", "cost")
        return {
            "circuits": [{k: m[k] for k in shown} for m in server.settings.manifests.values()],
            "max_key_bytes": server.max_key,
        }


def _add_keys(app: FastAPI, server: _Server, tenant: Any) -> None:
    store = server.settings.keys

    def state(who: str, key: str) -> dict[str, Any]:
        found = store.state(who, key)
        return {"key": key, "received": found.received, "is_complete": found.is_complete}

    @app.get("/v1/keys/{key}", responses=_HELD)
    async def key_state(key: Sha, who: str = tenant) -> dict[str, Any]:
        """Say how many bytes of evaluation keys came, so that an upload can go on."""
        return state(who, key)

    @app.patch("/v1/keys/{key}", responses=_UPLOAD, openapi_extra=_PIECE)
    async def upload(
        request: Request,
        key: Sha,
        offset: Annotated[int, Query(ge=0)],
        size: Annotated[int, Query(ge=1)],
        who: str = tenant,
    ) -> dict[str, Any]:
        """Append to evaluation keys of `size` bytes in all, named by their sha256."""
        if size > server.max_key:
            raise HTTPException(413, f"Keys of {size} bytes; at most {server.max_key} are taken.")
        length = _length(request, size, "The body")
        if (who, key) in server.uploads:
            raise HTTPException(409, "These keys are being uploaded by another request.")
        server.uploads.add((who, key))
        try:
            return await receive(request, who, key, offset, size, length)
        finally:
            server.uploads.discard((who, key))

    async def receive(
        request: Request, who: str, key: str, offset: int, size: int, length: int
    ) -> dict[str, Any]:
        found = store.state(who, key)
        if found.is_complete:
            return state(who, key)
        if found.received != offset or offset + length > size:
            raise HTTPException(
                409, f"{found.received} bytes are here; go on from there, up to {size}."
            )
        if not found.received and len(store.keys(who)) >= server.settings.limits.keys:
            raise HTTPException(
                429, f"You have {server.settings.limits.keys} keys here; delete one first."
            )
        async for chunk in _chunks(request, length):
            store.append(who, key, chunk)
            server.metrics.uploaded.inc(len(chunk))
        if store.state(who, key).received == size:
            await asyncio.to_thread(store.finish, who, key)
        return state(who, key)

    @app.delete("/v1/keys/{key}", responses={**_HELD, 409: {}}, status_code=204)
    async def delete_key(key: Sha, who: str = tenant) -> Response:
        """Delete evaluation keys."""
        if (who, key) in server.uploads:
            raise HTTPException(409, "These keys are being uploaded by another request.")
        store.delete(who, key)
        return Response(status_code=204)


def _add_runs(app: FastAPI, server: _Server, tenant: Any) -> None:
    def found(who: str, run: str) -> Run:
        if (known := server.runs.get(who, run)) is None:
            raise HTTPException(404, "There is no such run; ask for it again.")
        return known

    @app.put("/v1/runs/{run}", responses=_UPLOAD, openapi_extra=_BINARY, status_code=202)
    async def submit(
        request: Request,
        run: RunId,
        circuit: Annotated[str, Query(pattern=_ID)],
        key: Annotated[str, Query(pattern=_ID)],
        who: str = tenant,
    ) -> dict[str, Any]:
        """Ask for a run; the body is a frame of encrypted inputs. Asking twice runs it once."""
        if circuit not in server.settings.manifests:
            raise HTTPException(404, "This server does not serve that circuit.")
        length = _length(request, server.max_input(circuit), "The input")
        if server.runs.get(who, run) is None:
            server.runs.check_room(who)
        if (keys := server.settings.keys.fetch(who, key)) is None:
            raise HTTPException(409, "These evaluation keys are not here; upload them first.")
        body = b"".join([chunk async for chunk in _chunks(request, length)])
        digest = hashlib.sha256(f"{circuit} {key} ".encode() + body).hexdigest()
        known = server.runs.get(who, run)
        if known is None:
            known = server.runs.submit(who, run, circuit, keys, digest, body)
        elif known.digest != digest:
            raise HTTPException(409, "This run id is taken by another request.")
        return _described(known)

    @app.get("/v1/runs/{run}", responses=_HELD)
    async def run_state(
        run: RunId,
        wait: Annotated[float, Query(ge=0, le=MAX_WAIT)] = 0,
        who: str = tenant,
    ) -> dict[str, Any]:
        """Say how a run stands, at once or when it is finished within `wait` seconds."""
        known = found(who, run)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(known.changed.wait(), wait)
        return _described(known)

    @app.get(
        "/v1/runs/{run}/result", responses={**_HELD, 409: {}}, response_class=FileResponse
    )  # fmt: skip
    async def result(run: RunId, who: str = tenant) -> FileResponse:
        """Return the packed results of a run that is done."""
        known = found(who, run)
        if known.state != "done":
            raise HTTPException(409, f"The run is {known.state}; there is no result.")
        return FileResponse(known.result, media_type="application/octet-stream")

    @app.delete("/v1/runs/{run}", responses=_HELD, status_code=204)
    async def drop(run: RunId, who: str = tenant) -> Response:
        """Cancel a run, and delete its result."""
        await server.runs.drop(found(who, run))
        return Response(status_code=204)


def _described(run: Run) -> dict[str, Any]:
    return {
        "run": run.id, "state": run.state, "kind": run.kind, "message": run.message,
        "seconds": run.seconds,
    }  # fmt: skip
