"""CLIP's tokenizer without the hub, from the byte-pair merges in clip_bpe/ (OpenAI's file as open_clip ships it; MIT)."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

BPE_FILE = Path(__file__).with_name("clip_bpe") / "bpe_simple_vocab_16e6.txt.gz"
VOCAB_SIZE = 49408
MAX_LENGTH = 77


def byte_symbols() -> list[str]:
    """A printable character for each byte, in the order of CLIP's ids: printable Latin-1 bytes stand for themselves (GPT-2's encoding)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]


def build_clip_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """The tokenizer of SD1, SD2 and SDXL; SD2 and SDXL's second pad with "!"."""
    from transformers import CLIPTokenizer

    symbols = byte_symbols()
    num_merges = VOCAB_SIZE - 2 * len(symbols) - 2
    lines = gzip.decompress(BPE_FILE.read_bytes()).decode("utf-8").split("\n")[1 : 1 + num_merges]  # after the version line
    merges = [(first, second) for first, second in (line.split() for line in lines)]
    tokens = [
        *symbols,
        *(symbol + "</w>" for symbol in symbols),
        *(first + second for first, second in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    vocab = {token: index for index, token in enumerate(tokens)}
    assert len(vocab) == VOCAB_SIZE
    # transformers' annotation says list[str]; it takes pairs
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=MAX_LENGTH)  # pyright: ignore[reportArgumentType]
    assert len(tokenizer) == VOCAB_SIZE
    return tokenizer
