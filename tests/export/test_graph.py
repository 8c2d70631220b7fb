"""An integer program survives being written and read; malformed files are refused."""

from __future__ import annotations

import json

import pytest
import torch

from fhe_fx.errors import ArtifactError
from fhe_fx.export.graph import graph_from_entries, graph_to_entries
from fhe_fx.runtime.codec import Codec
from fhe_fx.runtime.region import Region


def test_graph_round_trip(region: Region) -> None:
    again = graph_from_entries(graph_to_entries(region.program))
    assert again.name == "body"
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        inputs = [
            torch.randint(-300, 300, n.meta["val"].shape, generator=generator)
            for n in region.program.placeholders
        ]
        expected = region.program.module(*inputs)
        assert all(torch.equal(a, b) for a, b in zip(again.module(*inputs), expected, strict=True))


def test_codec_round_trip(region: Region) -> None:
    codec = Codec.of(region.program)
    again = Codec.from_entries(codec.to_entries())
    for sample in region.captured.samples:
        ours, theirs = again.encode(sample), codec.encode(sample)
        assert all((a == b).all() for a, b in zip(ours, theirs, strict=True))
    results = [torch.arange(3)[None].numpy()]
    assert torch.equal(again.decode(results)[0], codec.decode(results)[0])


@pytest.mark.parametrize(
    ("op", "fault"),
    [("aten.add.Tensor_mode", "KeyError"), ("os.system", "KeyError"), ("call_module", "KeyError")],
)
def test_unknown_operators_are_refused(region: Region, op: str, fault: str) -> None:
    entries = graph_to_entries(region.program)
    written = json.loads(entries["program.json"])
    written["nodes"][1]["op"] = op
    entries["program.json"] = json.dumps(written).encode()
    with pytest.raises(ArtifactError, match=rf"program that cannot be read \({fault}"):
        graph_from_entries(entries)


def test_malformed_codec_is_refused(region: Region) -> None:
    entries = Codec.of(region.program).to_entries()
    with pytest.raises(ArtifactError, match="codec that cannot be read"):
        Codec.from_entries({**entries, "codec.json": b"{}"})
    with pytest.raises(ArtifactError, match="codec that cannot be read"):
        Codec.from_entries({**entries, "codec.safetensors": b"short"})
