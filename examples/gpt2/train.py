"""Train the small GPT-2 that the example encrypts, on Jane Austen's six novels.

Nothing is downloaded here. One command fetches the corpus, a Debian package of public-domain text:

    (cd /tmp && apt-get download r-cran-janeaustenr && dpkg -x r-cran-janeaustenr_*.deb austen)

Then `nice -n 10 python examples/gpt2/train.py` writes `examples/gpt2/model/`, and
`python examples/gpt2/train.py --evaluate` only measures the model that is there. Options make a
model of another shape elsewhere; `examples/whole_model/README.md` has those of the smaller one.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import re
import struct
import sys
import time
import zlib
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

if TYPE_CHECKING:
    from collections.abc import Iterator

MODEL_DIR = Path(__file__).parent / "model"
CORPUS = Path("/tmp/austen/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")
END = "<|endoftext|>"
N_POSITIONS = 64
BATCH = 32
LEARNING_RATE = 2e-3
SEED = 0

log = logging.getLogger("train")

# A sentence ends at . ! or ? before a space, unless the full stop closes a title or an initial.
_SENTENCE_END = re.compile(r'(?<!\bMr)(?<!\bMrs)(?<!\bDr)(?<!\bSt)(?<!\b[A-Z])[.!?]"?\s+')
_CHAPTER = re.compile(r"^chapter [\divxlc]+\.?$", re.IGNORECASE)
_NOT_PROSE = re.compile(r"^(volume|vol\.|the end|finis|a note on the text|\[|\*)", re.IGNORECASE)


def read_rdb(path: Path) -> Iterator[list[str]]:
    """Yield the lines of each book of an R lazy-load database of character vectors.

    The file is a run of zlib streams, each after a length of four bytes. Each stream is one R
    object in XDR form, whose strings carry their flags and their length in front.
    """
    raw = path.read_bytes()
    while raw:
        stream = zlib.decompressobj()
        data = stream.decompress(raw[4:])
        raw = stream.unused_data
        at = 18 + int(struct.unpack_from(">I", data, 14)[0])  # past the header and encoding name
        n_lines = int(struct.unpack_from(">I", data, at + 4)[0])
        at += 8
        lines = []
        for _ in range(n_lines):
            _, length = struct.unpack_from(">Ii", data, at)
            lines.append(data[at + 8 : at + 8 + length].decode())
            at += 8 + length
        yield lines


def chapters(lines: list[str]) -> Iterator[list[str]]:
    """Yield the paragraphs of each chapter, without front matter, headings and editor's notes."""
    chapter: list[str] = []
    started = False
    for paragraph in "\n".join(line.strip() for line in lines).split("\n\n"):
        text = re.sub(r"[_*]", "", " ".join(paragraph.split()))
        if _CHAPTER.match(text):
            if chapter:
                yield chapter
            chapter, started = [], True
        elif text.lower() == "a note on the text":
            break
        elif started and text.isascii() and re.search("[a-z]", text) and not _NOT_PROSE.match(text):
            chapter.append(text)
    yield chapter


def sentence_starts(text: str) -> list[int]:
    """Return where the sentences of `text` start."""
    return [0, *(match.end() for match in _SENTENCE_END.finditer(text))]


def sentences(text: str) -> set[str]:
    """Return the different sentences of `text`."""
    bounds = [*sentence_starts(text), len(text)]
    return {text[start:end].strip() for start, end in pairwise(bounds)}


@dataclass(frozen=True)
class Shape:
    """What a model is like."""

    layers: int = 4
    heads: int = 4
    width: int = 128
    vocabulary: int = 2048
    tied: bool = True
    """Whether the head has the embeddings' weights."""


def train_tokenizer(text: str, vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, the kind that GPT-2 uses, with a small vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(re.split(f"\n|{re.escape(END)}", text), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        unk_token=END,
        model_max_length=N_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def windows(tokenizer: PreTrainedTokenizerFast, text: str) -> torch.Tensor:
    """Return one row of tokens for each sentence: the sentence and what follows it.

    Every row opens as a prompt of the demo does, so the first positions learn what they will see.
    """
    length = N_POSITIONS + 1
    starts = sentence_starts(text)
    # No token of this corpus is so long that 65 of them fill more than 1,000 characters.
    encoded = tokenizer.backend_tokenizer.encode_batch([text[at : at + 1000] for at in starts])
    return torch.tensor([row.ids[:length] for row in encoded if len(row.ids) >= length])


def short_sentences(
    tokenizer: PreTrainedTokenizerFast, text: str, exclude: set[str], rng: random.Random
) -> list[str]:
    """Choose 200 different plain sentences of 6 to 20 tokens."""
    found = sentences(text) - exclude
    plain = re.compile(r"[A-Z][^\"()\n<>]*[.!?]")
    good = sorted(s for s in found if plain.fullmatch(s))
    lengths = [len(row.ids) for row in tokenizer.backend_tokenizer.encode_batch(good)]
    return rng.sample([s for s, n in zip(good, lengths, strict=True) if 6 <= n <= 20], 200)


def loss_sum(model: GPT2LMHeadModel, rows: torch.Tensor) -> torch.Tensor:
    """Return the summed negative log-likelihood, in nats, of all tokens but each row's first."""
    logits = model(rows[:, :-1], use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")


@torch.no_grad()
def perplexity(model: GPT2LMHeadModel, rows: list[torch.Tensor]) -> float:
    """Return the perplexity per token over rows, which may differ in length."""
    total = sum(float(loss_sum(model, row[None])) for row in rows)
    return math.exp(total / sum(len(row) - 1 for row in rows))


def train(model: GPT2LMHeadModel, rows: torch.Tensor, held_out: torch.Tensor, steps: int) -> None:
    """Train with AdamW, a short warm-up and a cosine decay."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.1)

    def scale(step: int) -> float:
        return min((step + 1) / 200, 1.0) * (0.5 + 0.5 * math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    order = torch.empty(0, dtype=torch.long)
    started = time.monotonic()
    for step in range(1, steps + 1):
        if len(order) < BATCH:  # a new epoch
            order = torch.randperm(len(rows))
        batch, order = rows[order[:BATCH]], order[BATCH:]
        loss = loss_sum(model, batch) / batch[:, 1:].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 500 == 0 or step == steps:
            log.info(
                "step %5d  %4.0f s  training loss %.3f  held-out chapters' perplexity %.2f",
                step,
                time.monotonic() - started,
                loss.item(),
                perplexity(model, list(held_out[:: max(1, len(held_out) // 300)])),
            )


def build(corpus: Path, steps: int, shape: Shape, out: Path) -> None:
    """Train tokenizer and model, and write them with their sentences to `out`."""
    torch.manual_seed(SEED)
    torch.set_num_threads(2)
    rng = random.Random(SEED)
    all_chapters = ["\n".join(c) for lines in read_rdb(corpus) for c in chapters(lines)]
    held_text = END.join(all_chapters[10::20])  # a twentieth of the chapters, from every book
    train_text = END.join(c for i, c in enumerate(all_chapters) if i % 20 != 10)

    tokenizer = train_tokenizer(train_text, shape.vocabulary)
    train_rows, held_rows = windows(tokenizer, train_text), windows(tokenizer, held_text)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=shape.vocabulary,
            n_positions=N_POSITIONS,
            n_embd=shape.width,
            n_layer=shape.layers,
            n_head=shape.heads,
            tie_word_embeddings=shape.tied,
            activation_function="gelu_new",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    n_parameters = sum(p.numel() for p in model.parameters())
    log.info("%d chapters, %d characters", len(all_chapters), len(train_text) + len(held_text))
    log.info("%d parameters, %d training windows", n_parameters, len(train_rows))
    train(model, train_rows, held_rows, steps)

    out.mkdir(exist_ok=True, parents=True)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    # transformers 5 writes a class name that 4 does not know; both know this older one.
    config = out / "tokenizer_config.json"
    config.write_text(config.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    if out.resolve() != MODEL_DIR.resolve():
        return  # the sentences beside the first model do for all
    calibration = short_sentences(tokenizer, train_text, set(), rng)
    seen = {s for s in sentences(held_text) if s in train_text}
    held_out = short_sentences(tokenizer, held_text, seen, rng)
    (out / "calibration.txt").write_text("\n".join(calibration) + "\n")
    (out / "heldout.txt").write_text("\n".join(held_out) + "\n")


def evaluate(directory: Path) -> None:
    """Print a model's perplexity on `heldout.txt`, and a few greedy continuations."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = GPT2LMHeadModel.from_pretrained(directory)
    lines = (MODEL_DIR / "heldout.txt").read_text().splitlines()
    rows = [torch.tensor(tokenizer(line)["input_ids"]) for line in lines]
    n_tokens = sum(len(row) - 1 for row in rows)
    ppl = perplexity(model, rows)
    log.info("held-out perplexity %.2f (%d sentences, %d tokens)", ppl, len(rows), n_tokens)
    for prompt in ("She was not at all", "He had never seen", "The old house stood in"):
        inputs = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        log.info(
            "%s", json.dumps([prompt, tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])])
        )


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=CORPUS, help="Rdata.rdb of janeaustenr")
    parser.add_argument("--steps", type=int, default=5000, help="2,048 tokens each")
    parser.add_argument("--evaluate", action="store_true", help="only measure the shipped model")
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help="directory of the model")
    for field in fields(Shape):
        is_flag = field.type == "bool"
        kind: Any = {"action": argparse.BooleanOptionalAction} if is_flag else {"type": int}
        parser.add_argument(f"--{field.name}", default=field.default, **kind)
    args = parser.parse_args()
    if not (args.evaluate or args.corpus.exists()):
        parser.error(f"{args.corpus} does not exist; the top of {__file__} says how to fetch it")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    if not args.evaluate:
        shape = Shape(**{field.name: getattr(args, field.name) for field in fields(Shape)})
        build(args.corpus, args.steps, shape, args.out)
    evaluate(args.out)


if __name__ == "__main__":
    main()
