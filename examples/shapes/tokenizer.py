"""Tokenizers for the shapes world, CLIP's and Qwen's: their own byte-level BPE, its merges learned from the world's few words.

Any text can be tokenised, as with theirs (unknown words fall apart into bytes), but the vocabularies have under a thousand
entries in place of 49,408 and 151,669, which keeps the embedded models small.
"""

import json

from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer, Qwen2Tokenizer

from examples.shapes.world import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, SIZES, TEXTURES

START, END = "<|startoftext|>", "<|endoftext|>"
TURN, TURN_END = "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    r"{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endfor %}"
    r"{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)


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


def build_chat_tokenizer() -> Qwen2Tokenizer:
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=10_000, min_frequency=1, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    words = [*world_words(), "user", "assistant"]
    learner.train_from_iterator([*words, *(f" {word}" for word in words)], trainer)
    learned = json.loads(learner.to_str())["model"]
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=learned["vocab"], merges=merges, model_max_length=512)
    tokenizer.add_special_tokens({"additional_special_tokens": [TURN, TURN_END]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
