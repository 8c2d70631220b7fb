"""What this machine is, and how fast it runs look-ups."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = [
    "USUAL_RATE",
    "Rates",
    "installed_version",
    "machine_facts",
    "machine_name",
    "machine_rates",
    "rate_file",
    "store_rate",
]

USUAL_RATE = 3.3e9
"""Complexity units a second and core on a busy host, where `fhe-fx doctor` has not measured."""


def rate_file() -> Path:
    """Return where `fhe-fx doctor` keeps the rate that it measured."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "fhe_fx" / "rate.json"


@dataclass(frozen=True)
class Rates:
    """How fast a machine is, on all cores."""

    complexity_per_second: float
    """Of look-ups, in Concrete's unit."""
    key_bytes_per_second: float | None = None
    """Of making keys; None where it was not measured."""
    is_measured: bool = False
    """Whether `fhe-fx doctor` measured it here."""


def machine_rates() -> Rates:
    """Return what `fhe-fx doctor` measured on this machine, or what is usual."""
    try:
        kept = json.loads(rate_file().read_text())
        keygen = kept.get("key_bytes_per_second")
        return Rates(float(kept["rate"]), None if keygen is None else float(keygen), True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Rates(USUAL_RATE * (os.cpu_count() or 1))


def store_rate(rate: float, key_bytes_per_second: float | None = None) -> Path:
    """Keep measured rates for the reports of this user, and return where.

    Args:
        rate: complexity units a second on all cores.
        key_bytes_per_second: of making keys.
    """
    path = rate_file()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    kept = {
        "rate": rate, "key_bytes_per_second": key_bytes_per_second, "machine": machine_name()
    }  # fmt: skip
    partial.write_text(json.dumps(kept) + "\n")
    os.replace(partial, path)
    return path


def installed_version(package: str) -> str:
    """Return the version of an installed package, in words if it is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def machine_facts() -> dict[str, Any]:
    """Return versions, cores, memory and the look-up rate that reports reckon with."""
    packages = ("fhe_fx", "torch", "transformers", "concrete-python", "numpy")
    rates = machine_rates()
    page = os.sysconf("SC_PAGE_SIZE")
    return {
        "python": platform.python_version(),
        **{package: installed_version(package) for package in packages},
        "machine": machine_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(page * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "free_memory_gb": round(page * os.sysconf("SC_AVPHYS_PAGES") / 1e9, 1),
        "rate": rates.complexity_per_second,
        "rate_is_measured": rates.is_measured,
    }


def machine_name() -> str:
    """Return processor and cores in words."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"{model}, {os.cpu_count()} cores"
