"""What crosses the wire: inputs in a frame, results cut to the bits that they need.

A result is a ciphertext of N + 1 words of 64 bits for each number, of which decryption needs the
sum b - <a, s> to a fraction of a slot. Words are rounded to their top bits (a modulus switch), so
that the rest is zeros, and the bytes are put in planes, which zstandard then shrinks.

How many bits (`kept_bits`): rounding to the top k bits adds to the sum an error of standard
deviation sqrt((N + 1) / 12) 2^(64 - k) at most, for any binary key. A slot of a w-bit encoding is
2^(63 - w). With k the least for which six deviations stay within a quarter of a slot, a decrypted
integer changes by 1 at most, and not at all unless it lay within a quarter slot of a boundary. The
probability of more is below 2e-9 a number. See docs/security.md, "The wire".
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from fhe_fx.errors import WireError

__all__ = [
    "MAX_SKELETON",
    "ResultEncoding",
    "check_message",
    "kept_bits",
    "pack_inputs",
    "pack_results",
    "planes",
    "unpack_inputs",
    "unpack_results",
]

Words = npt.NDArray[np.uint64]

MAX_SKELETON = 4096
"""Most bytes that a serialized result may have besides the words of its ciphertexts."""
DEVIATIONS, SLOTS = 6, 0.25
"""So many standard deviations of the switch stay within this fraction of a slot."""
LEVEL = 3
_INPUTS, _RESULTS = b"fhe_fx inputs 1\n", b"fhe_fx results 1\n"
_MAX_VALUES = 64
_MAX_SEGMENTS = 512


@dataclass(frozen=True)
class ResultEncoding:
    """The numbers of one result that decide how it is sent."""

    words: int
    """64-bit words of its ciphertexts."""
    width: int
    """Bits of its integers, beside one bit of padding."""
    lwe_dimension: int
    """Words of one ciphertext, less one."""

    @staticmethod
    def of(manifest: Mapping[str, Any]) -> tuple[ResultEncoding, ...]:
        """Read the encodings of a circuit from its manifest.

        Raises:
            WireError: if they are not there.
        """
        try:
            return tuple(
                ResultEncoding(*(int(r[k]) for k in ("words", "width", "lwe_dimension")))
                for r in manifest["wire"]["results"]
            )
        except (KeyError, TypeError, ValueError) as error:
            raise WireError("The manifest does not say how results are sent.") from error


def kept_bits(encoding: ResultEncoding) -> int:
    """Return how many top bits of a word decryption needs, margin included; at most 64."""
    deviation = math.sqrt((encoding.lwe_dimension + 1) / 12)
    # DEVIATIONS * deviation * 2^(64 - k) <= SLOTS * 2^(63 - width)
    margin = math.ceil(math.log2(DEVIATIONS * deviation * 2 / SLOTS))
    return min(64, encoding.width + margin)


def check_message(message: bytes) -> bytes:
    """Return a Cap'n Proto message if its segments are as long as it states.

    A native parser finds out too, but a truncated key keeps it busy for a quarter of a minute.

    Raises:
        WireError: if the message is truncated, or more follows it.
    """
    if len(message) < 8:
        raise WireError(f"A message has {len(message)} bytes; that is not even its header.")
    segments = int.from_bytes(message[:4], "little") + 1
    header = 4 + 4 * segments
    header += -header % 8
    if segments > _MAX_SEGMENTS or len(message) < header:
        raise WireError(f"A message states {segments} segments, which it does not have.")
    stated = header + 8 * sum(struct.unpack_from(f"<{segments}I", message, 4))
    if stated != len(message):
        raise WireError(f"A message has {len(message)} bytes; its header states {stated}.")
    return message


# Inputs ---------------------------------------------------------------------------------------


def pack_inputs(values: Sequence[bytes]) -> bytes:
    """Frame serialized ciphertexts; they are seeded, so nothing shrinks them further."""
    sizes = struct.pack(f"<I{len(values)}Q", len(values), *map(len, values))
    return b"".join((_INPUTS, sizes, *values))


def unpack_inputs(body: bytes, count: int) -> list[bytes]:
    """Read what `pack_inputs` wrote.

    Raises:
        WireError: if it is malformed, or does not hold `count` values.
    """
    start = len(_INPUTS) + 4
    if len(body) < start or not body.startswith(_INPUTS):
        raise WireError("The body is not a frame of inputs.")
    (stated,) = struct.unpack_from("<I", body, len(_INPUTS))
    if stated != count:
        raise WireError(f"The body states {stated} inputs; the circuit takes {count}.")
    first = start + 8 * count
    if len(body) < first:
        raise WireError("The body ends within its list of sizes.")
    sizes = struct.unpack_from(f"<{count}Q", body, start)
    if first + sum(sizes) != len(body):
        raise WireError(f"The body has {len(body)} bytes; its sizes add up to another number.")
    values = []
    for size in sizes:
        values.append(check_message(body[first : first + size]))
        first += size
    return values


# Results --------------------------------------------------------------------------------------


def pack_results(values: Sequence[bytes], encodings: Sequence[ResultEncoding]) -> bytes:
    """Cut serialized results to the bits that they need, and compress them.

    Raises:
        WireError: if a value does not hold the words that its encoding states.
    """
    packed, headers = [], []
    for value, encoding in zip(values, encodings, strict=True):
        at, bits = _words_at(value, encoding.words), kept_bits(encoding)
        end = at + 8 * encoding.words
        parts = planes(np.frombuffer(value, "<u8", encoding.words, at), bits)
        packed += [value[:at], value[end:], *parts]
        headers.append({"before": at, "after": len(value) - end, "planes": [len(p) for p in parts]})
    line = json.dumps(headers).encode()
    return b"".join((_RESULTS, struct.pack("<I", len(line)), line, *packed))


def unpack_results(body: bytes, encodings: Sequence[ResultEncoding]) -> list[bytes]:
    """Read what `pack_results` wrote, for a client's decryption.

    Nothing larger than the encodings state is allocated, whatever the body claims.

    Raises:
        WireError: if it is malformed or does not fit the encodings.
    """
    try:
        headers, at = _headers(body)
        if len(headers) != len(encodings):
            raise WireError(f"{len(headers)} results came; the circuit has {len(encodings)}.")
        values = []
        for header, encoding in zip(headers, encodings, strict=True):
            before, after, *octets = _parts(body, at, header)
            values.append(check_message(before + _words(octets, encoding) + after))
            at += sum(len(part) for part in (before, after, *octets))
    except (KeyError, TypeError, ValueError, RecursionError, zstandard.ZstdError) as error:
        raise WireError(f"The results cannot be read: {error}.") from error
    if at != len(body):
        raise WireError(f"{len(body) - at} bytes follow the results.")
    return values


def _rounded(words: Words, bits: int) -> Words:
    """Round to the nearest multiple of 2^(64 - bits), modulo 2^64."""
    if bits >= 64:
        return np.ascontiguousarray(words)
    drop = np.uint64(64 - bits)
    half = np.uint64(1) << (drop - np.uint64(1))
    return ((words + half) >> drop) << drop


def _words_at(value: bytes, count: int) -> int:
    """Return where the words of a ciphertext begin in its Cap'n Proto message.

    They are a list of bytes; the pointer to it, the first of its length in the message, has kind
    1, element size 2, and its offset in words from its own end.
    """
    stream = np.frombuffer(value, "<u8", min(len(value), MAX_SKELETON) // 8)
    upper = np.uint64((8 * count) << 3 | 2)
    for index in np.flatnonzero((stream >> np.uint64(32) == upper) & (stream & np.uint64(3) == 1)):
        at = 8 * (int(index) + 1 + ((int(stream[index]) & 0xFFFFFFFF) >> 2))
        if at + 8 * count <= len(value) <= 8 * count + MAX_SKELETON:
            return at
    raise WireError(f"A result does not hold {count} words of ciphertext.")


def _headers(body: bytes) -> tuple[list[dict[str, Any]], int]:
    start = len(_RESULTS) + 4
    if len(body) < start or not body.startswith(_RESULTS):
        raise WireError("The body is not a frame of results.")
    (length,) = struct.unpack_from("<I", body, len(_RESULTS))
    if length > 256 * _MAX_VALUES or start + length > len(body):
        raise WireError("The header of the results is cut off.")
    headers = json.loads(body[start : start + length])
    if not isinstance(headers, list):
        raise WireError("The header of the results is no list.")
    return headers, start + length


def _parts(body: bytes, at: int, header: Mapping[str, Any]) -> list[bytes]:
    """Return what stands before the words, what after, and each plane of them, compressed."""
    sizes = [int(header["before"]), int(header["after"]), *map(int, header["planes"])]
    if min(sizes) < 0 or sizes[0] + sizes[1] > MAX_SKELETON or at + sum(sizes) > len(body):
        raise WireError("A result states sizes that its body has not.")
    parts = []
    for size in sizes:
        parts.append(body[at : at + size])
        at += size
    return parts


def planes(words: Words, bits: int) -> list[bytes]:
    """Round words, and compress their bytes by significance, the highest first, zeros left out.

    Args:
        words: of a ciphertext, `[count]`.
        bits: top bits of each that are kept.
    """
    octets = _rounded(words, bits).astype(">u8").view(np.uint8).reshape(-1, 8)
    compress = zstandard.ZstdCompressor(level=LEVEL).compress
    return [compress(octets[:, k].tobytes()) for k in range(_n_planes(bits))]


def _words(parts: Sequence[bytes], encoding: ResultEncoding) -> bytes:
    count, expected = encoding.words, _n_planes(kept_bits(encoding))
    if len(parts) != expected:
        raise WireError(f"A result has {len(parts)} planes of bytes; {expected} are expected.")
    octets = np.zeros((count, 8), np.uint8)
    for k, plane in enumerate(parts):
        if (stated := zstandard.frame_content_size(plane)) != count:
            raise WireError(f"A plane states {stated} bytes; {count} are expected.")
        octets[:, k] = np.frombuffer(zstandard.ZstdDecompressor().decompress(plane), np.uint8)
    return octets.view(">u8").astype("<u8").tobytes()


def _n_planes(bits: int) -> int:
    return -(-bits // 8)
