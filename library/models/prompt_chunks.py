"""Prompts of any length as chunks of 75 tokens, each with its own beginning and end, and with a weight for every token."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from library.models.prompt_syntax import parse_weights

LEAST_MEAN = 0.01  # of hidden states, as a share of their standard deviation
Chunk = list[tuple[int, float]]  # at most 75 tokens, each with its weight


def tokenize(prompts: Sequence[str], tokenizer: Any, length: int, *, weighting: bool, min_chunks: int = 1) -> tuple[Tensor, Tensor]:
    """Token ids and weights of B prompts, both [N, B, length]: N chunks each, as many as the longest needs and at least `min_chunks`.

    Shorter prompts end in empty chunks, as in A1111. A chunk is full after length - 2 tokens, and ends at BREAK.

    Args:
        length: the text encoder's number of positions, 77.
        weighting: whether brackets and BREAK mean what they mean in A1111, or are characters.
    """
    room = length - 2
    rows = [_chunks(prompt, tokenizer, room, weighting) for prompt in prompts]
    count = max([min_chunks, *map(len, rows)])
    rows = [row + [[]] * (count - len(row)) for row in rows]
    ids = torch.full((count, len(rows), length), tokenizer.pad_token_id)
    weights = torch.ones(count, len(rows), length)
    for place, row in enumerate(rows):
        for number, chunk in enumerate(row):
            tokens = [token for token, _ in chunk]
            ids[number, place, : len(tokens) + 2] = torch.tensor([tokenizer.bos_token_id, *tokens, tokenizer.eos_token_id])
            weights[number, place, 1 : len(tokens) + 1] = torch.tensor([weight for _, weight in chunk])
    return ids, weights


def _chunks(prompt: str, tokenizer: Any, room: int, weighting: bool) -> list[Chunk]:
    chunks = []
    for section in parse_weights(prompt) if weighting else [[(prompt, 1.0)]]:
        # `verbose` would warn of more than 77 tokens
        pieces = [(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, weight) for text, weight in section]
        tokens = [(token, weight) for ids, weight in pieces for token in ids]
        chunks += [tokens[start : start + room] for start in range(0, max(len(tokens), 1), room)]
    return chunks


def apply_weights(hidden: Tensor, weights: Tensor) -> Tensor:
    """A1111's emphasis: multiply each token's hidden state with its weight, then scale the chunk so that its mean is what it was.

    A mean below a hundredth of the spread is noise, by which A1111 would scale all the same; here such a chunk is not scaled (A1111's
    setting "No norm").

    Args:
        hidden: of B chunks [B, T, D].
        weights: [B, T]; a chunk whose weights are all 1 stays as it is, to the bit.
    """
    weights = weights.to(hidden.device)
    plain = (weights == 1).all(dim=1)[:, None, None]
    if bool(plain.all()):
        return hidden
    before = hidden.float()
    after = before * weights[:, :, None]
    mean, new_mean = before.mean((1, 2), keepdim=True), after.mean((1, 2), keepdim=True)
    has_mean = (mean.abs() > LEAST_MEAN * before.std((1, 2), keepdim=True)) & (new_mean != 0)
    scale = torch.where(has_mean, mean / torch.where(has_mean, new_mean, 1.0), 1.0)
    return torch.where(plain, hidden, (after * scale).to(hidden.dtype))
