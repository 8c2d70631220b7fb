"""What this machine is, and how fast it runs look-ups."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

__all__ = ["USUAL_RATE", "bootstrap_rate", "machine_name", "rate_file"]

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
