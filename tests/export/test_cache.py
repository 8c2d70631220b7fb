"""What was lowered is found again under its content, whole, within bounds, by several processes."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import multiprocessing
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import fhe_fx
from fhe_fx.api import encrypted_modules
from fhe_fx.backends.reference import ReferenceBackend
from fhe_fx.errors import ArtifactError, OptionsError
from fhe_fx.export.cache import Cache
from fhe_fx.export.lowered import lowered_from_bytes, lowered_to_bytes, lowering_key
from fhe_fx.ir import Program
from fhe_fx.ir.snapshot import snapshot
from fhe_fx.passes import Pass, Pipeline, default_pipeline
from fhe_fx.runtime.codec import Codec
from fhe_fx.runtime.region import Region
from fhe_fx.testing import program_from, seeded
from tests.models import FEW, tiny_gpt2, token_inputs


def region(weight: float = 1.0, n_bits: int = 4) -> Program:
    def attention(x: Tensor) -> Tensor:
        q, k, v = (x @ w for w in weight * torch.linspace(-1, 1, 48).sin().view(3, 4, 4))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + nn.functional.gelu(mixed * 2) / 3

    program = program_from(attention, [(x,) for x in seeded((1, 1, 3, 4))], n_bits=n_bits)
    Pipeline((fhe_fx.passes.get_pass("normalize")(),)).run(program)
    return program


@pytest.fixture(scope="module")
def captured() -> Program:
    return region()


@pytest.fixture(scope="module")
def lowered(captured: Program) -> Program:
    return run(captured)


def run(captured: Program) -> Program:
    program = copy.deepcopy(captured)
    default_pipeline().run(program)
    return program


def assert_same(found: Program, expected: Program) -> None:
    assert str(found) == str(expected)
    assert snapshot(found) == snapshot(expected)
    assert found.notes == expected.notes
    assert found.properties == expected.properties
    ours, theirs = Codec.of(found), Codec.of(expected)
    assert ours.to_entries() == theirs.to_entries()
    for n, m in zip(found.encrypted(), expected.encrypted(), strict=True):
        assert torch.equal(n.meta["type"].scale, m.meta["type"].scale)
        assert torch.equal(n.meta["type"].offset, m.meta["type"].offset)
        assert n.meta.get("function") == m.meta.get("function")
    reference = ReferenceBackend()
    for x in seeded(ours.shapes()[0], n=4, seed=7):
        encoded = ours.encode([x])
        for a, b in zip(
            reference.compile(found).clear(encoded),
            reference.compile(expected).clear(encoded),
            strict=True,
        ):
            assert (a == b).all()


def test_what_is_read_is_the_program_that_was_written(captured: Program, lowered: Program) -> None:
    assert_same(lowered_from_bytes(lowered_to_bytes(lowered), captured), lowered)


def test_the_second_lowering_runs_no_pass(
    tmp_path: Path, captured: Program, lowered: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path / "cache")
    assert_same(cache.lowered(captured, default_pipeline()), lowered)
    (entry,) = cache.entries()
    assert entry.what == captured.name
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700

    def refuse(*args: object, **more: object) -> None:
        raise AssertionError("a pass ran")

    monkeypatch.setattr(Pipeline, "run", refuse)
    found = cache.lowered(captured, default_pipeline())
    assert_same(found, lowered)
    assert found.samples is captured.samples


@dataclass(frozen=True)
class Foreign(Pass):
    """Do nothing."""

    name: ClassVar[str] = "foreign"
    times: int = 1

    def run(self, program: Program) -> bool:
        return False


def test_every_part_of_the_content_changes_the_key(captured: Program) -> None:
    def keys(program: Program) -> str | None:
        return lowering_key(program, default_pipeline())

    known = keys(captured)
    assert known == keys(region())
    assert known != keys(region(weight=1.001))
    assert known != keys(region(n_bits=5))
    fewer = dataclasses.replace(captured, samples=captured.samples[:-1])
    assert known != keys(fewer)
    assert known != lowering_key(captured, default_pipeline().drop("merge-maps"))
    once, twice = (default_pipeline().insert_after("normalize", Foreign(n)) for n in (1, 2))
    assert len({known, lowering_key(captured, once), lowering_key(captured, twice)}) == 3


def test_the_code_of_another_package_is_part_of_the_key(
    captured: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "someones_passes"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "helper.py").write_text("FACTOR = 2\n")
    (package / "idle.py").write_text(
        "from dataclasses import dataclass\nfrom fhe_fx.passes import Pass\n"
        "@dataclass(frozen=True)\nclass Idle(Pass):\n    name = 'idle'\n"
        "    def run(self, program):\n        return False\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    idle = importlib.import_module("someones_passes.idle").Idle()
    pipeline = default_pipeline().insert_after("normalize", idle)
    before = lowering_key(captured, pipeline)
    assert before == lowering_key(captured, pipeline)
    (package / "helper.py").write_text("FACTOR = 3\n")
    assert before != lowering_key(captured, pipeline)


def test_a_pass_without_a_source_is_not_kept(captured: Program, tmp_path: Path) -> None:
    known: dict[str, type[Pass]] = {}
    code = (
        "from dataclasses import dataclass\nfrom fhe_fx.passes import Pass\n"
        "@dataclass(frozen=True)\nclass Typed(Pass):\n    name = 'typed'\n"
        "    def run(self, program):\n        return False\n"
    )
    exec(code, {"__name__": "typed_by_hand", **known}, known)
    pipeline = default_pipeline().insert_after("normalize", known["Typed"]())
    assert lowering_key(captured, pipeline) is None
    cache = Cache(tmp_path)
    cache.lowered(captured, pipeline)
    assert not cache.entries()


def test_a_damaged_entry_is_computed_again(
    tmp_path: Path, captured: Program, lowered: Program
) -> None:
    cache = Cache(tmp_path)
    cache.lowered(captured, default_pipeline())
    (entry,) = cache.entries()
    content = entry.path.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    for damaged in (b"", content[:70], content[:-1], flipped):
        entry.path.write_bytes(damaged)
        assert cache._read(entry.path) is None
        assert not entry.path.exists()
    entry.path.write_bytes(flipped)
    assert_same(cache.lowered(captured, default_pipeline()), lowered)
    assert entry.path.read_bytes() == content


def test_bytes_that_are_no_program_are_refused(captured: Program, lowered: Program) -> None:
    content = lowered_to_bytes(lowered)
    wrong = [b"", b"x" * 100, content[:-1]]
    wrong += [content.replace(b"fhe_fx.lookup.default", b"aten.sigmoid.default.")]
    wrong += [content.replace(b'"dtype": "int64"', b'"dtype": "uint8"', 1)]
    for bad in wrong:
        assert bad != content
        with pytest.raises(ArtifactError, match=r"^A lowered program cannot be read \("):
            lowered_from_bytes(bad, captured)


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path, most_bytes=3000)
    paths = [cache._path(f"part {i}", f"{i:040d}") for i in range(3)]
    for number, path in enumerate(paths):
        cache._write(path, bytes(900))
        os.utime(path, (number, number))
    assert cache._read(paths[0]) == bytes(900)  # now the most recently used
    cache._write(cache._path("another", "4" * 40), bytes(900))
    assert [e.what for e in cache.entries()] == ["another", "part_0", "part_2"]
    assert sum(e.bytes for e in cache.entries()) <= 3000
    cache._write(cache._path("too large", "5" * 40), bytes(3001))
    assert len(cache.entries()) == 3
    assert cache.clear() == 3 * 964
    assert not cache.entries()


def test_a_directory_that_others_can_write_is_refused(tmp_path: Path, captured: Program) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(OptionsError, match=r"written by others .* mode 777.*chmod 700"):
        Cache(tmp_path).lowered(captured, default_pipeline())


def test_a_cache_that_cannot_be_written_costs_time_alone(
    tmp_path: Path, captured: Program, lowered: Program
) -> None:
    (tmp_path / "file").write_text("")
    assert_same(Cache(tmp_path / "file" / "cache").lowered(captured, default_pipeline()), lowered)


def _write_and_read(directory: str, seed: int) -> int:
    cache, wrong = Cache(Path(directory), most_bytes=100_000), 0
    for step in range(150):
        number = (step * 7 + seed * 3) % 10
        content = bytes([number]) * 20_000
        path = cache._path("part", f"{number:040d}")
        if (found := cache._read(path)) is None:
            cache._write(path, content)
        else:
            wrong += found != content
    return wrong


def test_several_processes_use_it_at_once(tmp_path: Path) -> None:
    """Four write, read and evict the same entries; none ever reads half of one."""
    context = multiprocessing.get_context("fork")
    with context.Pool(4) as pool:
        found = pool.starmap(_write_and_read, [(str(tmp_path), seed) for seed in range(4)])
    assert found == [0, 0, 0, 0]
    assert not list(tmp_path.glob("*.partial"))
    assert sum(e.bytes for e in Cache(tmp_path).entries()) <= 100_000


def test_a_model_is_encrypted_the_same_from_the_cache(tmp_path: Path) -> None:
    model, cache = tiny_gpt2(), Cache(tmp_path)
    made = [
        fhe_fx.encrypt_submodule(model, "h.0.attn", max_tokens=4, options=FEW, cache=cache)
        for _ in range(2)
    ]
    assert sorted(e.what for e in cache.entries()) == ["calibration", "transformer.h.0.attn"]
    first, second = (encrypted_modules(m)[0].region for m in made)
    assert_same(second.program, first.program)
    assert all(torch.equal(*pair) for pair in zip(_inputs(first), _inputs(second), strict=True))
    for m in made:
        fhe_fx.set_mode(m, "clear")
    ids = token_inputs(1)[0]
    with torch.no_grad():
        a, b = (m(ids).logits for m in made)
    assert torch.equal(a, b)


def _inputs(region: Region) -> list[Tensor]:
    return [x for sample in region.captured.samples for x in sample]


def test_other_weights_are_lowered_anew(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    for factor in (1.0, 1.01):
        model = tiny_gpt2()
        with torch.no_grad():
            model.transformer.h[0].attn.c_attn.weight.mul_(factor)
        fhe_fx.encrypt_submodule(model, "h.0.attn", max_tokens=4, options=FEW, cache=cache)
    assert [e.what for e in cache.entries()].count("transformer.h.0.attn") == 2


def test_its_directory_may_be_written_as_text(tmp_path: Path) -> None:
    assert Cache(str(tmp_path)) == Cache(tmp_path)  # type: ignore[arg-type]
