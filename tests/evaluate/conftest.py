"""One small evaluation that several tests read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fhe_fx import Options
from fhe_fx.evaluate import Evaluation, Texts, evaluate_submodule
from tests.models import shipped_gpt2, shipped_sentences

TOKENS = 4


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep sampled texts away from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(path))
        yield path


@pytest.fixture(scope="session")
def held_out() -> Texts:
    """Return sentences that neither training nor calibration has seen, some of them short."""
    rows = [row[0, : TOKENS - (i % 3 == 0)] for i, row in enumerate(shipped_sentences()[:24])]
    return Texts(tuple(rows), "held-out sentences")


@pytest.fixture(scope="session")
def evaluation(cache: Path, held_out: Texts) -> Evaluation:
    """Evaluate one head of the shipped model at two settings."""
    return evaluate_submodule(
        shipped_gpt2(1),
        "h.0.attn",
        n_bits=(2, 6),
        tokens=TOKENS,
        heads=[0],
        data=held_out,
        options=Options(seed=0),
    )
