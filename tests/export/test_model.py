"""A client's directory holds the float remainder and nothing of what is encrypted, and loads."""

from __future__ import annotations

import copy
import json
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import torch as safetensors
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fhe_fx
from fhe_fx.api import encrypted_modules
from fhe_fx.backends.base import Integers
from fhe_fx.backends.reference import ReferenceBackend
from fhe_fx.errors import ArtifactError, InputError, OptionsError, TargetError
from fhe_fx.export import (
    load_artifact,
    load_client_bundles,
    load_client_model,
    load_server_bundle,
    read_manifest,
    save,
)
from fhe_fx.ir import dialect as d
from fhe_fx.runtime import ClientModule, EncryptedModule, Region
from tests.export.conftest import Net, make_inputs, make_net
from tests.models import FEW, tiny_gpt2, tiny_llama, token_inputs

ACCURACY = {"same next token": 0.953}


@dataclass
class Saved:
    """A model with encrypted parts, and where it was saved."""

    model: nn.Module
    directory: Path
    skeleton: nn.Module | None

    @property
    def client(self) -> Path:
        return self.directory / "client"

    def load(self) -> Any:
        """Return the client's model, whose server is the integers of the model that was saved."""
        loaded = load_client_model(self.client, self.skeleton)
        pairs = zip(encrypted_modules(self.model), encrypted_modules(loaded), strict=True)
        for ours, theirs in pairs:
            theirs.region.remote = InTheClear(ours.region)
            theirs.mode = "remote"
        return loaded


class InTheClear:
    """A server that computes what a circuit means."""

    def __init__(self, region: Region) -> None:
        self.circuit = ReferenceBackend().compile(region.program)

    def execute(self, inputs: Sequence[Integers]) -> list[Integers]:
        return self.circuit.clear(inputs)


def two_parts() -> nn.Module:
    targets = ["body.0", "body.2"]
    return fhe_fx.encrypt_submodule(make_net(), targets, n_bits=4, calibration=make_inputs())


def one_head() -> Any:
    return fhe_fx.encrypt_submodule(
        tiny_gpt2(n_head=4), "h.0.attn", n_bits=3, max_tokens=3, heads=[0], options=FEW
    )


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Return a module that transformers does not know, with two encrypted parts; read only."""
    model, directory = two_parts(), tmp_path_factory.mktemp("net") / "out"
    save(model, directory, accuracy=ACCURACY, origin="net")
    return Saved(model, directory, Net())


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Return a GPT-2 of whose first attention one head is encrypted; read only."""
    model, directory = one_head(), tmp_path_factory.mktemp("gpt2") / "out"
    model.save_pretrained(directory, validate=False)
    return Saved(model, directory, None)


@pytest.fixture(params=["net", "gpt2"])
def saved(request: pytest.FixtureRequest) -> Saved:
    found: Saved = request.getfixturevalue(request.param)
    return found


# What each party gets --------------------------------------------------------------------------


def contents(directory: Path) -> dict[str, bytes]:
    """Return every file below a directory; of archives, every entry besides."""
    found = {}
    for path in directory.rglob("*"):
        name = path.relative_to(directory).as_posix()
        if path.is_file():
            found[name] = path.read_bytes()
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                found |= {f"{name}/{n}": archive.read(n) for n in archive.namelist()}
    return found


FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
WHOLES = (torch.int8, torch.int16, torch.int32, torch.int64)


def needles(values: Tensor, n: int = 8) -> Iterator[bytes]:
    """Return runs of `n` neighbours, along each axis, in every type that could hold them.

    Runs that hold fewer than four different numbers say nothing, and are left out.
    """
    values = values.detach().double()
    for axis in range(values.dim()):
        lines = values.movedim(axis, -1).reshape(-1, values.shape[axis])
        for line in lines[:: max(1, len(lines) // 16)]:
            for start in range(0, max(1, len(line) - n + 1), max(1, n // 2)):
                run = line[start : start + n]
                if len(run.unique()) >= 4:
                    yield from _encodings(run)


def _encodings(run: Tensor) -> Iterator[bytes]:
    for kind in FLOATS:
        yield _bytes(run.to(kind))
    for kind in WHOLES:
        if torch.equal(run.to(kind).double(), run):
            yield _bytes(run.to(kind))


def _bytes(run: Tensor) -> bytes:
    return run.contiguous().view(torch.uint8).numpy().tobytes()


def hits(tensors: Sequence[Tensor], files: dict[str, bytes], n: int = 8) -> tuple[int, list[str]]:
    """Return how many needles were looked for, and the files that hold one."""
    wanted = {needle for t in tensors for needle in needles(t, n)}
    return len(wanted), [name for name, held in files.items() if any(w in held for w in wanted)]


def own_weights(module: EncryptedModule) -> list[Tensor]:
    """Return the weights of the encrypted region alone, in float and in integers."""
    region = module.region
    integers = [d.constant(n) for n in region.program.graph.nodes if n.op == "get_attr"]
    return [*region.captured.module.buffers(), *integers]


def test_the_client_gets_no_weight_in_any_precision(saved: Saved) -> None:
    held = contents(saved.client)
    secrets = [w for m in encrypted_modules(saved.model) for w in own_weights(m)]
    n_searched, found = hits(secrets, held, n=4)
    assert n_searched > 100
    assert not found
    # The search finds what is there: the integers, in the server's own file.
    found = hits(secrets, contents(saved.directory / "server"), n=4)[1]
    assert any(name.endswith("server.zip/program.safetensors") for name in found)
    # And the client's own weights, in the client's file.
    own = saved.load().state_dict().values()
    assert "model.safetensors" in hits(list(own), held)[1]


def test_quantized_weights_of_any_scale_are_not_there_either(saved: Saved) -> None:
    """Float weights, rounded to 4 to 8 bits by their largest value, in each integer type."""
    held = contents(saved.client)
    for module in encrypted_modules(saved.model):
        for weight in module.region.captured.module.buffers():
            if not weight.is_floating_point() or weight.dim() < 2:
                continue
            for bits in range(4, 9):
                scale = weight.abs().max() / (2 ** (bits - 1) - 1)
                _, found = hits([(weight / scale).round()], held, n=6)
                assert not found, bits


def test_the_client_gets_no_tensor_of_the_part_by_structure(saved: Saved) -> None:
    """Every tensor file is known, and no tensor in it is named after, or shaped as, the part's."""
    paths = [m.region.name for m in encrypted_modules(saved.model)]
    remainder = safetensors.load_file(saved.client / "model.safetensors")
    assert remainder
    assert not [name for name in remainder for path in paths if name.startswith(path)]
    for module in encrypted_modules(saved.model):
        slug = module.region.circuit_name.replace(" ", "-")
        folder = saved.client / "circuits" / slug
        assert {p.name for p in folder.iterdir()} == {
            "client.zip", "manifest.json", "stand_in.json", "stand_in.safetensors",
        }  # fmt: skip
        own = safetensors.load_file(folder / "stand_in.safetensors")
        region = module.region.captured.module
        secret = {tuple(b.shape) for b in region.buffers() if b.dim() > 1 and b.numel() > 8}
        masks = {tuple(b.shape) for b in region.buffers() if b.dtype == torch.bool}
        assert not (secret - masks) & {tuple(t.shape) for t in own.values()}
        written = json.loads((folder / "stand_in.json").read_text())
        assert "encrypted" not in written["composed"]["modules"]
        # Recorded results are shapes.
        leaves = [written["output"]["leaves"][k] for k in written["results"]]
        assert all(set(leaf) == {"shape"} for leaf in leaves)


def test_recorded_results_are_not_written(saved: Saved) -> None:
    outputs = [m.signature.output for m in encrypted_modules(saved.model)]
    recorded = [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor)]
    n_searched, found = hits(recorded, contents(saved.client), n=4)
    assert n_searched
    assert not found


def test_the_server_gets_no_client_weight_and_no_key(saved: Saved) -> None:
    held = contents(saved.directory / "server")
    n_searched, found = hits(list(saved.load().state_dict().values()), held)
    assert n_searched > 10
    assert not found
    assert not [name for name in held if "key" in name.lower()]
    suffixes = {name.rpartition("/")[2] for name in held}
    assert {"server.zip", "graph.txt", "manifest.json"} <= suffixes
    assert "model.safetensors" not in suffixes
    assert "stand_in.safetensors" not in suffixes


def test_no_pickle_anywhere(saved: Saved) -> None:
    for name, held in contents(saved.directory).items():
        assert not name.endswith((".bin", ".pt", ".pth", ".pkl", ".pickle")), name
        assert not held.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")), name


def test_each_party_can_load_its_own(saved: Saved) -> None:
    clients = load_client_bundles(saved.client)
    servers = [load_server_bundle(p) for p in (saved.directory / "server").iterdir()]
    assert {b.manifest["bundle"] for b in clients.values()} == {
        s.manifest["bundle"] for s in servers
    }
    assert len(clients) == len(encrypted_modules(saved.model))


def test_the_card_states_what_is_known(net: Saved) -> None:
    card = (net.client / "README.md").read_text()
    for module in encrypted_modules(net.model):
        facts = module.region.facts
        assert facts is not None
        (row,) = [r for r in card.splitlines() if r.startswith(f"| `{module.region.name}`")]
        cells = [c.strip() for c in row.strip("|").split("|")]
        assert cells[1:3] == [str(list(module.region.input_shapes[0])), "4"]
        assert cells[3] == f"{facts.look_ups:,}"
        assert float(cells[5]) == pytest.approx(facts.p_error, rel=0.01)
        assert 0 < float(cells[8]) < 0.5
    assert "of 128 bits of security" in card
    assert "| same next token | 0.953 |" in card
    assert "model (`net`)" in card
    assert 'from_pretrained("client", model=Net(...), remote=' in card


def test_one_part_is_an_artefact_that_runs_alone(gpt2: Saved) -> None:
    (module,) = encrypted_modules(gpt2.model)
    sample = module.region.captured.samples[0]
    with load_artifact(gpt2.directory) as artifact:
        assert torch.equal(artifact.clear(sample)[0], module.region.run_circuit(sample, "clear")[0])


def test_of_several_parts_each_is_an_artefact_that_runs_alone(net: Saved) -> None:
    manifest = read_manifest(net.directory, format="fhe_fx model")
    assert [part["name"] for part in manifest["circuits"]] == ["body.0", "body.2"]
    for part, module in zip(manifest["circuits"], encrypted_modules(net.model), strict=True):
        sample = module.region.captured.samples[0]
        with load_artifact(net.directory / part["directory"]) as artifact:
            clear = module.region.run_circuit(sample, "clear")[0]
            assert torch.equal(artifact.clear(sample)[0], clear)


# Loading and running ---------------------------------------------------------------------------


def test_the_remainder_is_the_model_s(saved: Saved) -> None:
    ours, theirs = saved.model.state_dict(), saved.load().state_dict()
    paths = tuple(f"{m.region.name}." for m in encrypted_modules(saved.model))
    assert set(theirs) == {name for name in ours if not name.startswith(paths)}
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_net_computes_the_same(net: Saved) -> None:
    fhe_fx.set_mode(net.model, "clear")
    loaded = net.load()
    batch = torch.cat(make_inputs()[:3])
    assert torch.equal(loaded(batch), net.model(batch))
    assert torch.equal(copy.deepcopy(loaded)(batch), net.model(batch))
    assert isinstance(net.skeleton, Net)
    assert not isinstance(net.skeleton.body[0], ClientModule), "the skeleton was changed"


def test_a_language_model_generates_the_same(gpt2: Saved) -> None:
    """Shorter prompts, batches and prefix and suffix of the other heads included."""
    fhe_fx.set_mode(gpt2.model, "clear")
    loaded, model = gpt2.load(), gpt2.model
    for prompt in (torch.tensor([[5]]), torch.tensor([[5, 6], [7, 8]])):
        asked = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
        asked["max_new_tokens"] = 4 - prompt.shape[1]
        expected = model.generate(prompt, **asked)  # type: ignore[operator]
        assert torch.equal(loaded.generate(prompt, **asked), expected)
        assert torch.equal(loaded(prompt).logits, model(prompt).logits)


def test_rotary_embeddings_and_other_structures(tmp_path: Path) -> None:
    """A Llama: position tables as arguments, a dictionary-like output, non-persistent buffers."""
    model = fhe_fx.encrypt_submodule(
        tiny_llama(), "layers.0.self_attn", n_bits=4, max_tokens=3, heads=[1], options=FEW
    )
    save(model, tmp_path / "out", validate=False)
    loaded = Saved(model, tmp_path / "out", None).load()
    fhe_fx.set_mode(model, "clear")
    (prompt,) = token_inputs(1, 3)
    ours, theirs = (m(prompt).last_hidden_state for m in (model, loaded))
    # Constants lie in memory in another order, so that sums of floats round otherwise.
    torch.testing.assert_close(theirs, ours)
    loaded(prompt, output_attentions=False)


def test_several_lengths_of_one_part(tmp_path: Path) -> None:
    """A ladder: a circuit for each length, and one set of keys for all."""
    gpt2 = tiny_gpt2(n_embd=4, n_head=1, n_inner=4)
    model = fhe_fx.encrypt_submodule(gpt2, "h.0.mlp", n_bits=4, max_tokens=(2, 3), options=FEW)
    save(model, tmp_path / "out", validate=False)
    keysets = {b.manifest["keyset"] for b in load_client_bundles(tmp_path / "out/client").values()}
    assert len(keysets) == 1
    names = {p.name for p in (tmp_path / "out/server").iterdir()}
    assert names == {"transformer.h.0.mlp-2", "transformer.h.0.mlp-3"}
    assert (tmp_path / "out/client/README.md").read_text().count(" MB, shared |") == 1
    saved = Saved(model, tmp_path / "out", None)
    loaded = saved.load()
    fhe_fx.set_mode(model, "clear")
    for prompt in ([[5]], [[5, 6]], [[5, 6, 7], [1, 2, 3]]):
        ids = torch.tensor(prompt)
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    with pytest.raises(InputError, match="the weights of this part are with the server"):
        load_client_model(saved.client)(torch.tensor([[5]]))


def test_without_a_server_it_says_where_the_weights_are(gpt2: Saved) -> None:
    loaded: Any = load_client_model(gpt2.directory)  # the directory that holds client/ will do
    prompt = torch.tensor([[1, 2]])
    with pytest.raises(InputError) as caught:
        loaded(prompt)
    assert str(caught.value) == (
        "transformer.h.0.attn: the weights of this part are with the server, so it cannot run in "
        "float. Connect to one: fhe_fx.connect(url, client=DIR, model=model), then "
        "fhe_fx.set_mode(model, 'remote')."
    )
    with pytest.raises(OptionsError, match=r"has no server\. Connect to one first"):
        fhe_fx.set_mode(loaded, "remote")
    with pytest.raises(
        OptionsError, match=r"mode='clear': the weights of transformer\.h\.0\.attn are"
    ):
        fhe_fx.set_mode(loaded, "clear")
    with pytest.raises(ArtifactError, match="the circuit and its weights are with the server"):
        fhe_fx.report(loaded)
    with pytest.raises(ArtifactError, match="the circuit and its weights are with the server"):
        fhe_fx.compile(loaded)
    with pytest.raises(ArtifactError, match="Copy that directory instead"):
        loaded.save_pretrained(gpt2.directory.parent / "again")
    assert not (gpt2.directory.parent / "again").exists()
    assert "weights with the server" in str(loaded)


def test_other_arguments_are_refused_without_the_weights(gpt2: Saved) -> None:
    loaded = gpt2.load()
    ids = torch.tensor([[1, 2, 3]])
    loaded(ids, attention_mask=torch.ones_like(ids))
    with pytest.raises(InputError, match=r"kwargs\['attention_mask'\] is not what the circuit was"):
        loaded(ids, attention_mask=torch.tensor([[0, 1, 1]]))


# Refusals --------------------------------------------------------------------------------------


class Tied(nn.Module):
    """An encrypted layer that shares its weight with one of the client's."""

    def __init__(self, *, is_copy: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head, self.body = nn.Linear(6, 6), nn.Linear(6, 6)
        self.head.weight = nn.Parameter(self.body.weight.T.clone()) if is_copy else self.body.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(self.head(x))
        return y


@pytest.mark.parametrize("is_copy", [False, True], ids=["tied", "transposed copy"])
def test_a_weight_that_the_client_has_too_is_refused(tmp_path: Path, is_copy: bool) -> None:
    model = fhe_fx.encrypt_submodule(
        Tied(is_copy=is_copy), "body", calibration=make_inputs(), n_bits=4
    )
    with pytest.raises(ArtifactError) as caught:
        save(model, tmp_path / "out")
    assert str(caught.value) == (
        "body.weight is encrypted, and the client's part holds the same numbers as head.weight: "
        "whoever has the one has the other. Encrypt the part that owns head.weight too, untie the "
        "two, or encrypt another part."
    )
    assert not (tmp_path / "out").exists()


def test_a_copy_saves_itself(gpt2: Saved) -> None:
    for model in (gpt2.model, load_client_model(gpt2.client)):
        twin: Any = copy.deepcopy(model)
        assert twin.save_pretrained.__self__ is twin


def test_models_without_two_sides_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="Net has no encrypted part"):
        save(make_net(), tmp_path / "out")


@pytest.fixture
def damaged(net: Saved, tmp_path: Path) -> Path:
    """Return a copy of a client's directory, to be damaged."""
    return Path(shutil.copytree(net.client, tmp_path / "client"))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "README.md", "circuits/body.0/stand_in.json",
             "circuits/body.0/client.zip", "circuits/body.2/manifest.json"],
)  # fmt: skip
def test_damage_is_found(damaged: Path, name: str) -> None:
    content = (damaged / name).read_bytes()
    (damaged / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for load in (load_client_bundles, lambda path: load_client_model(path, Net())):
        with pytest.raises(ArtifactError, match="was altered: its sha256 is not the one in"):
            load(damaged)
    (damaged / name).unlink()
    with pytest.raises(ArtifactError, match=r"is missing\. Export the region again"):
        load_client_model(damaged, Net())


def test_another_schema_is_refused(damaged: Path) -> None:
    path = damaged / "manifest.json"
    path.write_text(path.read_text().replace('"schema": 2', '"schema": 9'))
    with pytest.raises(ArtifactError, match="schema version 9; this fhe_fx reads version 2"):
        load_client_model(damaged, Net())


def test_another_architecture_is_refused(net: Saved, gpt2: Saved) -> None:
    with pytest.raises(ArtifactError, match=r"architecture cannot be made from files\. Give an"):
        load_client_model(net.client)
    with pytest.raises(ArtifactError, match="which Linear does not have"):
        load_client_model(net.client, nn.Linear(6, 6))
    smaller = Net()
    smaller.body[2] = nn.Identity()
    smaller.more = nn.Linear(2, 2)
    with pytest.raises(ArtifactError, match=r"holds no more\.weight, which Net has"):
        load_client_model(net.client, smaller)


def test_stand_ins_call_no_operator_that_is_not_known(damaged: Path) -> None:
    from fhe_fx.export.stand_in import STAND_IN_FILES, client_module

    folder = damaged / "circuits" / "body.0"
    files = {name: (folder / name).read_bytes() for name in STAND_IN_FILES}
    codec = load_client_bundles(damaged)[folder].codec
    written = json.loads(files["stand_in.json"])
    for op in ("aten.from_file.default", "os.system", "aten.add_.Tensor", "prims.rand.default"):
        written["composed"]["nodes"][1] |= {"op": op, "args": []}
        files["stand_in.json"] = json.dumps(written).encode()
        with pytest.raises(ArtifactError, match=r"stand_in\.json cannot be read"):
            client_module(nn.Linear(1, 1), files, codec)


def test_only_an_export_is_replaced(tmp_path: Path) -> None:
    model, out = two_parts(), tmp_path / "out"
    for _ in range(2):
        save(model, out, validate=False)
    one = fhe_fx.encrypt_submodule(make_net(), "body", calibration=make_inputs())
    save(one, out, validate=False)  # of another layout
    (out / "client" / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"holds 'client/notes.txt', which no export wrote"):
        save(one, out, validate=False)
    assert (out / "client" / "notes.txt").exists()
