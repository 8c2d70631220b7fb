"""Results become three times smaller and decrypt to the same integers within the stated bound."""

from __future__ import annotations

import math

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from fhe_fx.errors import WireError
from fhe_fx.export import load_client_bundle
from fhe_fx.serving.keys import StoredKeys
from fhe_fx.serving.wire import (
    MAX_SKELETON,
    ResultEncoding,
    check_message,
    kept_bits,
    pack_inputs,
    pack_results,
    unpack_inputs,
    unpack_results,
)

N = 2048
ENCODING = ResultEncoding(words=64 * (N + 1), width=10, lwe_dimension=N)


def _message(words: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> bytes:
    """Return a message as Concrete writes it: a pointer to a list of bytes, the list, more."""
    pointer = (8 * len(words)) << 35 | 2 << 32 | 2 << 2 | 1  # two words after its own end
    segment = (3 + len(words) + 1) << 32  # one segment, of so many words
    head = np.array([segment, pointer, 5, 6], "<u8").tobytes()
    return head + words.astype("<u8").tobytes() + b"trailing"


def _lwe(seed: int, width: int = 10) -> tuple[bytes, np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    """Encrypt 64 random integers without noise; return message, key and integers."""
    rng = np.random.default_rng(seed)
    key = rng.integers(0, 2, N, np.uint64)
    masks = rng.integers(0, 2**64, (64, N), np.uint64)
    integers = rng.integers(0, 2**width, 64, np.uint64)
    bodies = (masks * key).sum(1, dtype=np.uint64) + (integers << np.uint64(63 - width))
    return _message(np.concatenate([masks, bodies[:, None]], 1).reshape(-1)), key, integers


def _phases(message: bytes, key: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    words = np.frombuffer(message, "<u8", ENCODING.words, 32).reshape(64, N + 1)
    phases: np.ndarray = words[:, -1] - (words[:, :-1] * key).sum(1, dtype=np.uint64)  # type: ignore[type-arg]
    return phases


def test_the_switch_stays_within_its_bound() -> None:
    """Errors of 6,400 numbers stay within a quarter of a slot; their deviation is as derived."""
    assert kept_bits(ENCODING) == 20
    errors = []
    for seed in range(100):
        message, key, integers = _lwe(seed)
        (found,) = unpack_results(pack_results([message], [ENCODING]), [ENCODING])
        assert (found[:32], found[-8:], len(found)) == (message[:32], b"trailing", len(message))
        error = (_phases(found, key) - (integers << np.uint64(53))).astype(np.int64)
        errors.append(error.astype(float) / 2**53)  # in slots
    largest, spread = float(np.abs(errors).max()), float(np.std(errors))
    assert largest <= 0.25
    # Half of a random key is ones; 6,400 samples estimate a deviation to one percent.
    derived = math.sqrt((N / 2 + 1) / 12) * 2.0 ** (64 - 20) / 2**53
    assert spread == pytest.approx(derived, rel=0.05)


def test_a_result_is_three_times_smaller() -> None:
    message, _, _ = _lwe(0)
    assert 3 * len(pack_results([message], [ENCODING])) <= len(message)


def test_more_bits_than_a_word_has_are_not_kept() -> None:
    wide = ResultEncoding(ENCODING.words, 60, N)
    message, _, _ = _lwe(1)
    assert kept_bits(wide) == 64
    assert unpack_results(pack_results([message], [wide]), [wide]) == [message]


def _small(n_words: int) -> bytes:
    """Return a message of one segment."""
    return (n_words << 32).to_bytes(8, "little") + b"abcdefgh" * n_words


@given(st.lists(st.integers(0, 5).map(_small), max_size=5))
def test_inputs_come_back(values: list[bytes]) -> None:
    assert unpack_inputs(pack_inputs(values), len(values)) == values


@given(st.integers(0, 5), st.binary(min_size=1, max_size=9))
def test_messages_of_another_length_are_refused(n_words: int, more: bytes) -> None:
    message = _small(n_words)
    assert check_message(message) == message
    for damaged in (message + more, message[:-1], message[: -len(more)], b""):
        with pytest.raises(WireError, match="A message "):
            check_message(damaged)
    with pytest.raises(WireError, match="states 4294967296 segments"):
        check_message(b"\xff" * 4 + message[4:])


@given(st.binary(max_size=80), st.integers(0, 3))
def test_other_bytes_are_no_inputs(tail: bytes, count: int) -> None:
    for body in (
        tail,
        pack_inputs([_small(1)] * count)[:-1],
        pack_inputs([_small(1)] * count) + b"x",
    ):
        with pytest.raises(WireError):
            unpack_inputs(body, count)


def test_inputs_are_counted() -> None:
    with pytest.raises(WireError, match=r"^The body states 2 inputs; the circuit takes 1\.$"):
        unpack_inputs(pack_inputs([_small(1)] * 2), 1)


@given(st.data())
def test_damaged_results_are_refused_or_of_the_right_size(data: st.DataObject) -> None:
    """Whatever the bytes, nothing but WireError, and no more bytes than the encoding has."""
    body = bytearray(_packed())
    at = data.draw(st.integers(0, 200))
    body[at] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.sampled_from([None, -1, 60, 200, len(body) // 2]))
    try:
        (value,) = unpack_results(bytes(body[:cut]), [ENCODING])
    except WireError:
        return
    assert len(value) <= 8 * ENCODING.words + MAX_SKELETON


_CACHE: list[bytes] = []


def _packed() -> bytes:
    if not _CACHE:
        _CACHE.append(pack_results([_lwe(2)[0]], [ENCODING]))
    return _CACHE[0]


def test_a_result_that_claims_to_be_huge_is_not_unpacked() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 24))
    line = f'[{{"before": 0, "after": 0, "planes": [{len(bomb)}, 0, 0]}}]'.encode()
    body = b"fhe_fx results 1\n" + len(line).to_bytes(4, "little") + line + bomb
    with pytest.raises(WireError, match=f"states {1 << 24} bytes; {ENCODING.words} are expected"):
        unpack_results(body, [ENCODING])


def test_a_result_without_its_words_is_refused() -> None:
    with pytest.raises(WireError, match="does not hold"):
        pack_results([bytes(8 * ENCODING.words)], [ENCODING])


@pytest.mark.fhe
def test_real_results_decrypt_to_the_same_integers(exported: object, alice: StoredKeys) -> None:
    """Concrete's own ciphertexts, with noise: no integer moves by more than one unit."""
    from pathlib import Path

    from fhe_fx.backends.concrete.parties import (
        ConcreteClient,
        ConcreteServer,
        parse_evaluation_keys,
    )
    from fhe_fx.export import load_server_bundle

    assert isinstance(exported, Path)
    bundle, server = load_client_bundle(exported / "client"), exported.with_name("execution")
    server.mkdir()
    for name, content in load_server_bundle(exported / "server").files.items():
        (server / name).write_bytes(content)
    client = ConcreteClient(bundle.specs)
    client.load(alice.read_secret(bundle.manifest["keyset"], None))
    keys = parse_evaluation_keys(alice.evaluation.read_bytes())
    encodings = ResultEncoding.of(bundle.manifest)
    circuit = ConcreteServer(server)
    inputs = [np.zeros((1, 6), np.int64) + 30]
    for _ in range(3):
        raw = circuit.run(client.encrypt(inputs), keys)
        packed = pack_results(raw, encodings)
        kept = max(map(kept_bits, encodings)) / 64
        assert len(packed) < 1.05 * kept * sum(map(len, raw))
        sent = client.decrypt(unpack_results(packed, encodings))
        for a, b in zip(client.decrypt(raw), sent, strict=True):
            assert int(np.abs(a - b).max()) <= 1
