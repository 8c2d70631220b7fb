"""Lets EleutherAI's lm-evaluation-harness judge a model whose attention runs on integers.

    pip install 'fhe_fx[lm-eval]'
    python examples/lm_eval/cloze.py --n-bits 4 2

The harness drives the encrypted model as any other of transformers, through its own HFLM: what
`encrypt_submodule` returns is a model of the same class. Mode "clear" computes what encryption
would without its noise, and takes a batch at once.

The task is made here, of the held-out sentences beside the small GPT-2, and needs no network:
which of four endings belongs to the beginning of a sentence? The wrong ones are endings of other
sentences.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import lm_eval
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import fhe_fx

SHIPPED = Path(__file__).parents[1] / "gpt2" / "model"
TOKENS, BEGINNING = 12, 5
"""Tokens of a circuit, and of the beginning of a sentence."""


def main() -> None:
    """Judge the float model, and the attention at each precision."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--submodule", default="h.0.attn")
    parser.add_argument("--n-bits", type=int, nargs="+", default=[4, 2])
    parser.add_argument("--sentences", type=int, default=100)
    choices = parser.parse_args()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    model = AutoModelForCausalLM.from_pretrained(SHIPPED).eval()
    sentences = (SHIPPED / "heldout.txt").read_text().splitlines()
    questions = cloze(sentences, tokenizer)[: choices.sentences]
    print(f"{len(questions)} questions, four answers each")
    print(f"float   {judge(model, tokenizer, questions)}")
    lines = (SHIPPED / "calibration.txt").read_text().splitlines()
    for n_bits in choices.n_bits:
        encrypted = fhe_fx.encrypt_submodule(
            model,
            choices.submodule,
            n_bits=n_bits,
            max_tokens=TOKENS,
            calibration=[tokenizer(line, return_tensors="pt") for line in lines],
        )
        fhe_fx.set_mode(encrypted, "clear")
        print(f"{n_bits} bits  {judge(encrypted, tokenizer, questions)}")


def cloze(sentences: list[str], tokenizer: Any) -> list[dict[str, Any]]:
    """Make a question of each sentence: its beginning, four endings, the number of its own.

    Args:
        sentences: those too short to be cut are left out.
        tokenizer: of the model; endings fill a circuit of `TOKENS` tokens at most.
    """
    ids = [tokenizer(s)["input_ids"][:TOKENS] for s in sentences]
    cut = [(i[:BEGINNING], i[BEGINNING:]) for i in ids if len(i) > BEGINNING + 2]
    texts = [(tokenizer.decode(a), tokenizer.decode(b)) for a, b in cut]
    questions = []
    for k, (beginning, ending) in enumerate(texts):
        others = [texts[(k + step) % len(texts)][1] for step in (7, 31, 53)]
        place = k % 4
        endings = [*others[:place], ending, *others[place:]]
        questions.append({"beginning": beginning, "endings": endings, "own": place})
    return questions


def judge(model: Any, tokenizer: Any, questions: list[dict[str, Any]]) -> str:
    """Return the accuracy that the harness finds, with its standard error."""
    task = ConfigurableTask(
        config={
            "task": "cloze",
            "custom_dataset": lambda **_: {"test": Dataset.from_list(questions)},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{beginning}}",
            "doc_to_choice": "{{endings}}",
            "doc_to_target": "own",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc_norm", "aggregation": "mean"}],
        }
    )
    harness = HFLM(pretrained=model, tokenizer=tokenizer, max_length=TOKENS, batch_size=16)
    found = lm_eval.simple_evaluate(harness, tasks=[task], bootstrap_iters=1000)
    result = found["results"]["cloze"]
    return f"{result['acc_norm,none']:.1%} ± {result['acc_norm_stderr,none']:.1%}"


if __name__ == "__main__":
    main()
