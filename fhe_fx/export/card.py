"""The model card of what a client gets: what is encrypted, what it costs, how accurate it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["model_card"]

_CARD = """\
---
library_name: fhe_fx
tags:
- fully-homomorphic-encryption
- tfhe
---

# {name}, with encrypted parts

The client's side of a model{origin}: everything but the parts below, in float. The weights of
these parts are with a server, which runs them on ciphertexts and sees neither inputs nor results.
No secret key is in this directory; you make yours.

{circuits}

All parameters are of {security} bits of security. The error is root mean square, relative, on
calibration samples: of the integers against float, and of what encryption's noise adds to them.
A look-up reads a neighbouring entry of its table with probability `p_error`; that is noise, not a
failure.
{accuracy}
## How to run it

```bash
pip install 'fhe_fx[client]'
fhe-fx keygen {directory}
```

```python
import fhe_fx

{load}
```

Give `token="..."` where the server asks for one. Without `remote` the model loads and refuses to
run its encrypted parts. A prompt may have as many tokens as a circuit has rows, or fewer where
rows do not depend on later ones.

## What is in it

`model.safetensors` (or its shards) and `config.json` hold the float remainder, `circuits/` the
encodings of what is encrypted and decrypted and the specification of the keys. `manifest.json`
states the SHA-256 of every file, which is checked when the model is loaded. Nothing is pickled.
The licence of the weights is that of the model that they come from.
"""

_HEADER = (
    "| part | inputs | n_bits | look-ups | bits of a look-up | p_error | complexity | "
    "evaluation keys | error, integers | error, noise |\n|---|---|---|---|---|---|---|---|---|---|"
)


def model_card(
    name: str,
    manifests: Sequence[Mapping[str, Any]],
    accuracy: Mapping[str, float],
    origin: str,
    load: str,
) -> str:
    """Write README.md.

    Args:
        name: the model's class.
        manifests: of the artefact of each part.
        accuracy: figures of the whole model by what they are; may be empty.
        origin: where the model comes from; may be empty.
        load: the statements that load it.
    """
    rows = "\n".join([_HEADER, *map(_row, manifests)])
    measured = "".join(f"| {what} | {value:.4g} |\n" for what, value in accuracy.items())
    table = f"\n## Accuracy\n\n| of the whole model | |\n|---|---|\n{measured}"
    return _CARD.format(
        name=name,
        origin=f" (`{origin}`)" if origin else "",
        circuits=rows,
        security=min(int(m["security_bits"]) for m in manifests),
        accuracy=table if accuracy else "",
        directory="client",
        load=load,
    )


def _row(manifest: Mapping[str, Any]) -> str:
    cost, checked = manifest["cost"], manifest["validation"] or {}
    shapes = " and ".join(str(i["shape"]) for i in manifest["inputs"])
    cells = [
        f"`{manifest['name']}`",
        shapes,
        manifest["options"]["n_bits"],
        f"{cost['look_ups']:,}",
        cost["max_lookup_bits"],
        f"{cost['p_error']:.3g}",
        f"{cost['complexity']:.2e}",
        f"{cost['key_bytes'] / 1e6:.0f} MB{'' if cost['has_own_keys'] else ', shared'}",
        _error(checked.get("clear_error_to_float")),
        _error(checked.get("simulated_error_to_clear")),
    ]
    return f"| {' | '.join(map(str, cells))} |"


def _error(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"
