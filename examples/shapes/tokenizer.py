"""A CLIP tokenizer for the shapes world: CLIP's own byte-level BPE, its merges learned from the world's few words.

Any text can be tokenised, as with CLIP (unknown words fall apart into bytes), but the vocabulary has under a thousand
entries in place of 49,408, which keeps the embedded model small.
"""

import json

from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from examples.shapes.world import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, SIZES, TEXTURES

START, END = "<|startoftext|>", "<|endoftext|>"


def world_words() -> list[str]:
    """Every word that a caption can hold."""
    phrases = [*SHAPES, *COLOURS, *SIZES, *POSITIONS, *TEXTURES, *BACKGROUNDS, "a", "an", "background"]
    return sorted({word for phrase in phrases for word in phrase.split()})


def build_tokenizer() -> CLIPTokenizer:
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trainer = trainers.BpeTrainer(vocab_size=10_000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    learner.train_from_iterator(world_words(), trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]

    letters = sorted(ByteLevel.alphabet())
    joined = dict.fromkeys(left + right for left, right in merges)
    tokens = [*letters, *(letter + "</w>" for letter in letters), *joined, START, END]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=END, model_max_length=77)
