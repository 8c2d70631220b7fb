"""The `fhe-fx` command: one object on stdout, one message on stderr, exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from fhe_fx.cli import app
from fhe_fx.cli.talk import interruptibly
from fhe_fx.passes import default_pipeline

ROOT = Path(__file__).parents[1]
SHIPPED = str(ROOT / "examples" / "gpt2" / "model")
PART = ["--submodule", "h.0.attn", "--heads", "0", "--tokens", "3"]


def invoke(*args: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])


def refused(*args: object) -> str:
    """Run a command that must fail with one message, and return it."""
    result = invoke(*args)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr.strip()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("cli") / "attn"
    text = out.with_name("sentences.txt")
    sentences = (Path(SHIPPED) / "calibration.txt").read_text().splitlines()
    text.write_text("\n".join(sentences[:16]))
    result = invoke("export", SHIPPED, *PART, "--calibration", text, "--out", out, "--json")
    assert result.exit_code == 0, result.stderr
    before, after = result.stderr.strip().splitlines()
    assert before.endswith("not compiled yet")
    assert "complexity" in after
    return out, json.loads(result.stdout)


@pytest.fixture
def x(exported: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    shape = exported[1]["inputs"][0]["shape"]
    path = tmp_path / "x.npy"
    np.save(path, np.sin(np.arange(np.prod(shape))).reshape(shape))
    return path


def test_export_json_has_the_promised_keys(exported: tuple[Path, dict[str, Any]]) -> None:
    out, summary = exported
    wanted = {
        "look_ups", "complexity", "max_lookup_bits", "p_error", "key_bytes", "compile_seconds",
        "input_bytes", "output_bytes", "nodes", "validation", "out",
    }  # fmt: skip
    assert wanted <= set(summary)
    assert summary["out"] == str(out)
    assert summary["module_path"] == "transformer.h.0.attn"
    assert summary["heads"] == [0]
    assert 0 < summary["validation"]["simulated_error_to_clear"] < 0.6
    assert sum(n["share"] for n in summary["nodes"]) == pytest.approx(1)
    names = {p.name for p in (out / "client").iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "README.md", "circuits"}
    assert [p.name for p in (out / "server").iterdir()] == ["transformer.h.0.attn-heads-0"]


def test_report_of_an_artefact(exported: tuple[Path, dict[str, Any]]) -> None:
    out, summary = exported
    found = json.loads(invoke("report", out, "--json").stdout)
    assert found["look_ups"] == summary["look_ups"]
    assert found["complexity"] == summary["complexity"]
    text = invoke("report", out).stdout
    assert text.startswith("transformer.h.0.attn heads 0: look-ups of at most")
    assert "module path" in text


def test_report_of_a_model() -> None:
    model = "random:gpt2,n_layer=1,n_embd=16,n_head=2,vocab_size=50"
    result = invoke("report", model, *PART, "--json")
    assert result.exit_code == 0, result.stderr
    region = json.loads(result.stdout)["regions"][0]
    assert region["name"] == "transformer.h.0.attn heads 0"
    assert region["complexity"] > 0


def test_run_clear_and_simulate(
    exported: tuple[Path, dict[str, Any]], x: Path, tmp_path: Path
) -> None:
    out, summary = exported
    results = []
    for mode in ("clear", "simulate"):
        y = tmp_path / f"{mode}.npy"
        run = invoke("run", out, "--mode", mode, "--input", x, "--output", y)
        assert run.exit_code == 0, run.stderr
        assert run.stdout == ""
        results.append(np.load(y))
        assert list(results[-1].shape) == summary["results"][0]["shape"]
    assert np.linalg.norm(results[0] - results[1]) < 0.8 * np.linalg.norm(results[0])
    assert invoke("run", out, "--mode", "clear", "--input", x).stdout.startswith("[[[[")


@pytest.mark.fhe
def test_run_execute(tmp_path: Path) -> None:
    from fhe_fx.export import export_region
    from tests.export.conftest import make_region

    region, out, x, y = make_region(), tmp_path / "out", tmp_path / "x.npy", tmp_path / "y.npy"
    export_region(region, out, validate=False)
    sample = region.captured.samples[5]
    np.save(x, sample[0].numpy())
    keys = tmp_path / "keys"
    for _ in range(2):  # makes the keys, then reads them
        args = ["--mode", "execute", "--input", x, "--output", y, "--keys", keys]
        result = invoke("run", out, *args)
        assert result.exit_code == 0, result.stderr
        assert keys.stat().st_mode & 0o777 == 0o600
        clear = region.run_circuit(sample, "clear")[0].numpy()
        assert np.linalg.norm(np.load(y) - clear) < 0.5 * np.linalg.norm(clear)
    keys.chmod(0o644)
    assert "others can read it (mode 0644)" in refused("run", out, *args)


def test_export_of_the_circuit_alone_and_figures_for_the_card(tmp_path: Path) -> None:
    model = "random:gpt2,n_layer=1,n_embd=4,n_head=1,n_inner=4,vocab_size=50"
    part = ["--submodule", "h.0.mlp", "--tokens", "2", "--n-bits", "2", "--no-validate"]
    figures = tmp_path / "evaluation.json"
    stages = [{"stage": "clear", "metrics": {"top1": {"value": 0.875}}}]
    settings = [{"n_bits": 2, "stages": stages}]
    figures.write_text(json.dumps({"sentences": 40, "settings": settings}))
    given = ["export", model, *part, "--evaluation", figures, "--out", tmp_path / "out"]
    assert invoke(*given).exit_code == 0
    card = (tmp_path / "out/client/README.md").read_text()
    assert "| same next token as in float, clear, on 40 sentences | 0.875 |" in card
    assert invoke(*given, "--circuit-only").exit_code == 0
    assert {p.name for p in (tmp_path / "out/client").iterdir()} == {"client.zip", "manifest.json"}
    assert refused(*given, "--n-bits", 3) == (
        f"error: {figures} holds no setting of 3 bits; it holds: 2."
    )
    figures.write_text("{}")
    assert "cannot be read as an evaluation (KeyError: 'settings')" in refused(*given)


def test_several_parts_and_lengths_are_one_export_with_one_set_of_keys(tmp_path: Path) -> None:
    model = "random:gpt2,n_layer=2,n_embd=4,n_head=1,n_inner=4,vocab_size=50"
    parts = ["--submodule", "h.0.mlp", "--submodule", "h.1.mlp", "--tokens", "2,3", "--n-bits", "2"]
    out = tmp_path / "out"
    result = invoke("export", model, *parts, "--out", out, "--no-validate", "--json")
    assert result.exit_code == 0, result.stderr
    circuits = json.loads(result.stdout)["circuits"]
    names = [f"transformer.h.{layer}.mlp" for layer in (0, 1)]
    assert [(c["name"], c["tokens"]) for c in circuits] == [(n, k) for n in names for k in (2, 3)]
    assert sorted(c["has_own_keys"] for c in circuits) == [False, False, False, True]
    assert len({c["key_bytes"] for c in circuits}) == 1
    assert "transformer.h.1.mlp at 3 tokens: look-ups" in result.stderr
    made = invoke("keygen", out / "client")
    assert made.exit_code == 0, made.stderr
    assert len(list((tmp_path / "out" / "client.keys").iterdir())) == 1
    report = invoke("report", out)
    assert report.stdout.count("transformer.h.0.mlp at 2 tokens: look-ups") == 1
    assert refused("export", model, *parts, "--onnx", tmp_path / "onnx") == (
        "error: --submodule names 2 parts: transformer.h.0.mlp, transformer.h.1.mlp. Give one here."
    )
    again = [*parts[2:], "--circuit-only", "--out", tmp_path / "circuit"]
    assert refused("export", model, *again) == "error: --tokens 2,3: give one length."
    assert refused("report", model, "--submodule", "h.0.mlp", "--tokens", "4,x") == (
        "error: --tokens '4,x' is not a list of lengths. Write 8, or 4,8,16."
    )


def test_run_refuses(exported: tuple[Path, dict[str, Any]], x: Path, tmp_path: Path) -> None:
    out = exported[0]
    assert refused("run", tmp_path / "none", "--input", x) == (
        f"error: There is no directory {tmp_path}/none."
    )
    assert refused("run", out, "--mode", "simulat", "--input", x) == (
        "error: --mode 'simulat' is not one of clear, simulate, execute, remote. "
        "Did you mean 'simulate'?"
    )
    assert refused("run", out, "--input", tmp_path / "x") == (
        f"error: There is no input file {tmp_path}/x."
    )
    assert "--keys is for --mode execute or remote" in refused(
        "run", out, "--input", x, "--keys", "k"
    )
    assert refused("run", out, "--mode", "remote", "--input", x) == (
        "error: --mode remote and --server URL go together."
    )
    assert refused("run", out, "--prompt", "He") == (
        "error: Give --input X.npy; or, with --mode remote, --prompt TEXT."
    )
    np.save(tmp_path / "bad.npy", np.zeros(3))
    assert "Input 0 has shape [3]" in refused("run", out, "--input", tmp_path / "bad.npy")
    assert "there is no directory none." in refused("run", out, "--input", x, "--output", "none/y")
    two = ["--output", "a", "--output", "b"]
    assert "2 --output given; the circuit has 1." in refused("run", out, "--input", x, *two)


def test_export_refuses_before_it_loads(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("")
    assert refused("export", "./none", *PART, "--out", tmp_path) == (
        f"error: {tmp_path} holds 'mine.txt', which no export wrote, so it is not replaced. "
        f"Give another directory."
    )


def test_bad_model_submodule_and_numbers(tmp_path: Path) -> None:
    out = ["--out", tmp_path / "out"]
    tiny = "random:gpt2,n_layer=2,n_embd=16,n_head=2,vocab_size=50"
    assert refused("export", "./none", *PART, *out).startswith("error: ./none does not exist.")
    assert refused("export", tiny, *out) == (
        "error: Give the part to encrypt: --submodule h.0.attn"
    )
    assert refused("export", tiny, "--submodule", "h.0.atn", *out) == (
        "error: GPT2LMHeadModel has no submodule 'h.0.atn'. "
        "Did you mean 'h.0.attn' or 'h.1.attn' or '0.attn'?"
    )
    assert refused("export", tiny, "--submodule", "h.*.attn", "--circuit-only", *out) == (
        "error: --submodule names 2 parts: transformer.h.0.attn, transformer.h.1.attn. "
        "Give one here."
    )
    assert "n_bits=40 is outside" in refused("export", tiny, *PART, "--n-bits", 40, *out)
    heads = ["--submodule", "h.0.attn", "--heads", "a"]
    assert refused("export", tiny, *heads, *out) == (
        "error: --heads 'a' is not a list of numbers. Write 0, or 0,3."
    )
    assert "is read as a MODEL" in refused("report", tmp_path)
    assert not (tmp_path / "out").exists()


def test_exported_program(tmp_path: Path) -> None:
    import torch

    from tests.export.conftest import make_inputs, make_net

    program = torch.export.export(make_net(), (make_inputs()[0],))
    torch.export.save(program, tmp_path / "net.pt2")
    np.save(tmp_path / "x.npy", torch.cat(make_inputs()).numpy())
    part = [tmp_path / "net.pt2", "--submodule", "body", "--calibration", tmp_path / "x.npy"]
    result = invoke("export", *part, "--out", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["validation"]["is_clear_equal"]
    assert {p.name for p in (tmp_path / "out/client").iterdir()} == {"client.zip", "manifest.json"}
    assert "shapes are fixed in a .pt2" in refused("report", *part, "--tokens", 9)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_onnx_model(tmp_path: Path) -> None:
    import torch

    from tests.export.conftest import make_inputs, make_net

    path = tmp_path / "net.onnx"
    torch.onnx.export(make_net(), (make_inputs()[0],), path, dynamo=True, verbose=False)
    np.save(tmp_path / "x.npy", torch.cat(make_inputs()).numpy())
    part = [path, "--submodule", "body", "--calibration", tmp_path / "x.npy"]
    result = invoke("export", *part, "--circuit-only", "--out", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["validation"]["is_clear_equal"]
    assert "no submodule 'bdy'" in refused("report", path, "--submodule", "bdy")


def test_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fhe_fx.export.models.load_model", interrupt)
    result = invoke("report", "random:gpt2", *PART)
    assert result.exit_code == 130
    assert result.stderr.strip() == "interrupted"


def test_interruption_of_native_code(request: pytest.FixtureRequest) -> None:
    # A shell's background job ignores interrupts, and its children inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    start = time.monotonic()
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        interruptibly(lambda: time.sleep(5))
    assert time.monotonic() - start < 3


def test_passes() -> None:
    rows = json.loads(invoke("passes", "--json").stdout)["passes"]
    assert [r["name"] for r in rows] == [p.name for p in default_pipeline()]
    assert all(r["law"] for r in rows)
    assert invoke("passes").stdout.startswith(" 1  normalize\n")


def test_doctor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    facts = json.loads(invoke("doctor", "--no-measure", "--json").stdout)
    assert facts["cores"] >= 1
    assert facts["concrete-python"].startswith("2.")
    assert facts["rate_is_measured"] is False
    assert "transformers" in invoke("doctor", "--no-measure").stdout


@pytest.mark.fhe
def test_doctor_measures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from fhe_fx.report.machine import machine_rates

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    facts = json.loads(invoke("doctor", "--json").stdout)
    assert facts["rate"] > 1e8
    rates = machine_rates()
    assert (rates.complexity_per_second, rates.is_measured) == (facts["rate"], True)
    assert (tmp_path / "cache" / "fhe_fx").stat().st_mode & 0o077 == 0


def test_module_is_the_command() -> None:
    run = [sys.executable, "-m", "fhe_fx", "passes"]
    found = subprocess.run(run, capture_output=True, text=True, check=True, cwd=ROOT, timeout=120)
    assert found.stdout.startswith(" 1  normalize\n")
    assert found.stderr == ""


def test_import_is_light() -> None:
    code = (
        "import sys, fhe_fx; print([m for m in ('typer', 'rich', 'concrete') if m in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert found.stdout.strip() == "[]"


# evaluate -------------------------------------------------------------------------------------


def test_evaluate_prints_a_table_and_writes_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = tmp_path / "sentences.txt"
    lines = (Path(SHIPPED) / "heldout.txt").read_text().splitlines()[:6]
    data.write_text("\n".join(lines))
    out = tmp_path / "found"
    given = ["evaluate", SHIPPED, *PART, "--n-bits", "2,3", "--data", data, "--out", out]
    table = invoke(*given)
    assert table.exit_code == 0, table.stderr
    rows = [line.split() for line in table.stdout.splitlines()]
    assert [row[:2] for row in rows[3:]] == [
        [bits, stage] for bits in "23" for stage in ("fake_quantized", "clear", "simulated")
    ]
    assert "note: 6 of 6 lines have more than 3 tokens" in table.stderr
    found = json.loads(invoke(*given, "--json").stdout)
    assert [s["n_bits"] for s in found["settings"]] == [2, 3]
    assert found["positions"] == 18
    names = {p.name for p in out.iterdir()}
    assert names >= {"evaluation.json", "evaluation.csv", "settings"}


def test_evaluate_refuses_bad_words(tmp_path: Path) -> None:
    def evaluate(*words: object) -> str:
        return refused("evaluate", SHIPPED, "--out", tmp_path / "new", *words)

    assert evaluate() == "error: Give the part to encrypt: --submodule h.0.attn"
    assert "runs backwards" in evaluate(*PART, "--n-bits", "8..2")
    assert "There is no file" in evaluate(*PART, "--data", tmp_path / "none.txt")
    assert "has no submodule 'h.9.attn'" in evaluate("--submodule", "h.9.attn")
    assert not (tmp_path / "new").exists()
    (tmp_path / "new").write_text("a file")
    message = f"error: {tmp_path / 'new'} is no directory, and cannot be made one: File exists."
    assert evaluate(*PART, "--data", SHIPPED + "/heldout.txt").startswith(message)


def test_generate_streams_tokens_and_says_before_what_runs() -> None:
    given = [SHIPPED, "--submodule", "h.0.attn", "--heads", "0", "--prompt", "He had"]
    result = invoke("generate", *given, "--max-new-tokens", 3)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("He had ")
    assert result.stderr == "3 new tokens: 3 runs of 4 tokens\n"
    found = json.loads(invoke("generate", *given, "--max-new-tokens", 3, "--json").stdout)
    assert result.stdout == f"He had{found['text']}\n"
    assert [t["rows"] for t in found["tokens"]] == [2, 3, 4]
    assert found["report"]["regions"][0]["complexity"] is None


def test_generate_refuses_before_it_lowers() -> None:
    given = ["generate", SHIPPED, "--submodule", "h.0.attn", "--prompt", "He had never seen"]
    assert refused(*given, "--mode", "clean").startswith("error: --mode 'clean' is not one of")
    assert refused(*given, "--tokens", "4,x") == (
        "error: --tokens '4,x' is not a list of lengths. Write 8, or 4,8,16."
    )
    assert "and 30 new ones make a model read 33 tokens; the longest circuit takes 16. Ask for" in (
        refused(*given, "--max-new-tokens", 30)
    )
    assert refused(*given, "--top-k", 5).startswith("error: top_k=5 has no effect at temperature 0")
    assert refused("generate", SHIPPED, "--prompt", "He") == (
        "error: Give the part to encrypt: --submodule h.0.attn"
    )
    assert "This model has no tokenizer." in refused(
        "generate", "random:gpt2,n_layer=1", "--submodule", "h.0.attn", "--prompt", "He"
    )


def test_inspect_prints_data_and_writes_a_page(tmp_path: Path) -> None:
    given = ["inspect", SHIPPED, *PART, "--data", Path(SHIPPED) / "heldout.txt"]
    page, graph = tmp_path / "page.html", tmp_path / "graph.html"
    result = invoke(*given, "--json", "--html", page, "--graph", graph)
    assert result.exit_code == 0, result.stderr
    (region,) = json.loads(result.stdout)["regions"]
    assert region["name"] == "transformer.h.0.attn heads 0"
    assert region["tokens"] == 3
    assert 0 < region["result_errors"][0] < 0.5
    assert result.stderr.splitlines()[-2:] == [f"wrote {page}", f"wrote {graph}"]
    drawn = graph.read_text().partition('<script type="application/json"')[2]
    data, _ = json.JSONDecoder().raw_decode(drawn[drawn.index("{") :])
    errors, outside = data["measures"]
    assert (errors["name"], outside["name"]) == ("relative error", "out of range")
    names = {n["name"] for n in data["steps"][-1]["nodes"]}
    assert set(errors["values"]) <= names
    # Every look-up has an error but those that encrypt a zero, whose table is a constant.
    read = [n for n in data["steps"][-1]["nodes"] if n["look_ups"]]
    values = {n["name"] for n in read if len(set(n["table"])) > 2}
    assert values <= set(errors["values"])
    assert len(values) > len(read) / 2
    assert page.read_text().startswith("<!doctype html>")
    nowhere = tmp_path / "nowhere" / "page.html"
    assert refused(*given, "--html", nowhere) == (
        f"error: --html {nowhere}: there is no directory {nowhere.parent}."
    )


def test_a_tied_model_as_a_whole_is_refused_before_it_is_compiled(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fhe_fx.runtime.region.Region.circuit", lambda _: pytest.fail("compiled"))
    given = ["export", small, "--submodule", "", "--tokens", 2, "--out", tmp_path / "out"]
    result = invoke(*given)
    assert result.exit_code == 2
    assert "GPT2LMHeadModel.transformer.wte.weight is encrypted, and the client's part holds" in (
        result.stderr
    )


def test_every_submodule_that_is_named_is_encrypted(tmp_path: Path) -> None:
    """Not the last one alone."""
    parts = ["--submodule", "h.0.mlp", "--submodule", "h.1.mlp", "--tokens", "2"]
    given = ["inspect", SHIPPED, *parts, "--data", Path(SHIPPED) / "heldout.txt"]
    regions = json.loads(invoke(*given, "--json").stdout)["regions"]
    assert [r["name"] for r in regions] == ["transformer.h.0.mlp", "transformer.h.1.mlp"]
    assert refused(*given, "--graph", tmp_path / "graph.html") == (
        "error: --submodule names 2 parts: transformer.h.0.mlp, transformer.h.1.mlp. Give one here."
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model that is cheap to encrypt as a whole."""
    from transformers import AutoTokenizer

    from tests.models import tiny_gpt2

    place = tmp_path_factory.mktemp("small")
    AutoTokenizer.from_pretrained(ROOT / "examples/whole_model/model").save_pretrained(place)
    sizes: dict[str, Any] = {"n_layer": 1, "n_embd": 8, "n_head": 1, "n_inner": 8}
    tiny_gpt2(vocab_size=512, **sizes).save_pretrained(place)
    return place


@pytest.mark.parametrize("command", ["generate", "inspect", "evaluate", "report"])
def test_commands_take_a_model_as_a_whole(
    command: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    given: dict[str, list[Any]] = {
        "generate": ["--prompt", "I", "--max-new-tokens", 2],
        "inspect": ["--sentences", 4],
        "evaluate": ["--sentences", 4, "--modes", "clear", "--out", tmp_path / "out"],
        "report": ["--backend", "reference"],
    }
    result = invoke(command, small, "--submodule", "", "--tokens", 2, *given[command], "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    if command == "evaluate":
        assert found["targets"] == [""]
        assert found["settings"][0]["stages"][0]["metrics"]["top1"]["value"] > 0.5
        return
    (region,) = found.get("report", found)["regions"]
    assert region["name"] == "GPT2LMHeadModel"


def test_what_a_command_lowered_is_kept_shown_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FHE_FX_CACHE", str(tmp_path / "kept"))
    monkeypatch.setenv("FHE_FX_CACHE_GB", "0.5")
    runs = [json.loads(invoke("report", SHIPPED, *PART, "--json").stdout) for _ in range(2)]
    first, second = (run["regions"][0] for run in runs)
    assert first["nodes"] == second["nodes"]
    assert first["complexity"] == second["complexity"]
    shown = json.loads(invoke("cache", "--json").stdout)
    assert shown["bound"] == 500_000_000
    assert shown["directory"] == str(tmp_path / "kept")
    assert {e["what"] for e in shown["entries"]} == {"transformer.h.0.attn_heads_0", "calibration"}
    assert shown["bytes"] == sum(p.stat().st_size for p in (tmp_path / "kept").iterdir())
    listed = invoke("cache").stdout
    assert "of 500.0 MB" in listed
    assert listed.count("\n") == 3
    assert invoke("cache", "path").stdout.strip() == str(tmp_path / "kept")
    assert invoke("cache", "clear").stderr.startswith("removed 2 entries, ")
    assert not list((tmp_path / "kept").iterdir())


def test_a_cache_that_is_off_or_has_no_size_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FHE_FX_CACHE", "off")
    assert invoke("cache").stderr.strip() == "Nothing is kept: FHE_FX_CACHE=off."
    monkeypatch.setenv("FHE_FX_CACHE", "")
    monkeypatch.setenv("FHE_FX_CACHE_GB", "much")
    assert refused("cache") == (
        "error: FHE_FX_CACHE_GB='much' is not a size in GB. Try FHE_FX_CACHE_GB=1."
    )
