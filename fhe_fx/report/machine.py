"""What this machine is, and how fast it runs look-ups."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = [
    "USUAL_RATE",
    "bootstrap_rate",
    "installed_version",
    "machine_facts",
    "machine_name",
    "rate_file",
    "store_rate",
]

USUAL_RATE = 3.3e9
"""Complexity units a second and core on a busy host, where `fhe-fx doctor` has not measured."""


def rate_file() -> Path:
    """Return where `fhe-fx doctor` keeps the rate that it measured."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "fhe_fx" / "rate.json"


def bootstrap_rate() -> tuple[float, bool]:
    """Return complexity units a second on all cores, and whether they were measured here."""
    try:
        return float(json.loads(rate_file().read_text())["rate"]), True
    except (OSError, ValueError, KeyError, TypeError):
        return USUAL_RATE * (os.cpu_count() or 1), False


def store_rate(rate: float) -> Path:
    """Keep a measured rate for the reports of this user, and return where.

    Args:
        rate: complexity units a second on all cores.
    """
    path = rate_file()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(json.dumps({"rate": rate, "machine": machine_name()}) + "\n")
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
    rate, is_measured = bootstrap_rate()
    page = os.sysconf("SC_PAGE_SIZE")
    return {
        "python": platform.python_version(),
        **{package: installed_version(package) for package in packages},
        "machine": machine_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(page * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "free_memory_gb": round(page * os.sysconf("SC_AVPHYS_PAGES") / 1e9, 1),
        "rate": rate,
        "rate_is_measured": is_measured,
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
