"""Checks the types of what a user of the API writes: the tutorial's pass, and the plugin.

make lint
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TUTORIAL = ROOT / "docs" / "writing_a_pass.md"
PLUGIN = ROOT / "examples" / "custom_pass" / "src"


def main() -> None:
    """Run `mypy --strict` on copies, which see fhe_fx as an installed package is seen."""
    with tempfile.TemporaryDirectory(prefix="fhe_fx-") as name:
        home = Path(name)
        first = re.search(r"^```python\n(.*?)^```$", TUTORIAL.read_text(), re.M | re.S)
        assert first is not None
        (home / "local_attention.py").write_text(first[1])
        shutil.copytree(PLUGIN, home, dirs_exist_ok=True)
        options = ["--strict", "--config-file", ROOT / "pyproject.toml"]
        cache = ["--cache-dir", ROOT / ".mypy_cache"]
        files = sorted(home.rglob("*.py"))
        done = subprocess.run(
            [sys.executable, "-m", "mypy", *options, *cache, *files],
            cwd=home,
            env={**os.environ, "PYTHONPATH": str(ROOT)},  # mypy does not follow editable installs
            check=False,
        )
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
