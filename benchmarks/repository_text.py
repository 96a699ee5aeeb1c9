"""Text and a tokenizer for jobs whose model has random weights. Both come from the files of this repository.

Such a job shows shapes, devices and times, and what the tokens mean does not matter. So it needs no package of text and
no network.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BOS, EOS = 1, 2
N_TOKENS = 4096  # of the tokenizer
_PATTERNS = ("*.md", "docs/*.md", "*.py", "sae_toolkit/**/*.py")
_SPECIAL = ("<unk>", "<s>", "</s>")  # BOS is 1 and EOS is 2, as in Llama-2


def paragraphs() -> list[str]:
    """Returns the paragraphs of this repository's documents and code, about 2,500, always in the same order."""
    files = (file for pattern in _PATTERNS for file in sorted(ROOT.glob(pattern)))
    return [part for file in files for part in file.read_text().split("\n\n") if len(part) > 40]


def documents(n: int, seed: int = 0) -> Iterator[str]:
    """Yields n documents of six paragraphs each, drawn at random: about 600 tokens each."""
    draw, parts = random.Random(seed), paragraphs()
    for _ in range(n):
        yield "\n\n".join(draw.choices(parts, k=6))


def write_documents(file: Path, n: int, seed: int = 0) -> None:
    """Writes n documents as lines of JSON."""
    with file.open("w") as lines:
        lines.writelines(json.dumps({"text": text}) + "\n" for text in documents(n, seed))


def save_tokenizer(directory: Path) -> None:
    """Trains a byte-level BPE tokenizer of 4,096 tokens and saves it as Transformers does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token=_SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=N_TOKENS,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(paragraphs(), trainer)
    unk, bos, eos = _SPECIAL
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unk, bos_token=bos, eos_token=eos)
    fast.save_pretrained(directory)
