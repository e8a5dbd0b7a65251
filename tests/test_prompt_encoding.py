"""Weighted and long prompts as conditioning: against the text encoders called by hand."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from library.errors import UserError
from library.models.base import DiffusionModel
from library.models.prompt_syntax import apply_weights
from library.models.textual_inversion import load_embeddings
from library.rollouts import prompt_encoder
from library.rollouts.prompt_encoder import PromptEncoder, time_ids_of
from library.rollouts.sample import SamplingConfig, sample
from library.types import Conditioning, PromptSpec
from networks.lora import LoRANetwork, create_network
from tests.helpers.tiny_models import FAMILY_NAMES, tiny_model

CLOSE = {"rtol": 0, "atol": 1e-5}  # a row alone and in a batch
WORDS = ["cat", "dog", "red", "blue", "tree"]  # a token each
LONG = " ".join(WORDS * 16)  # 80 tokens


def hidden_states(model: DiffusionModel, texts: list[str]) -> list[Tensor]:
    """What the U-Net reads of each text encoder [B, 77, D], by way of the tokenizer's own padding, without any syntax."""
    found = []
    for text_encoder, tokenizer in zip(model.text_encoders, model.tokenizers, strict=True):
        encoder: Any = text_encoder
        output = encoder(tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids, output_hidden_states=True)
        if model.spec.family == "sdxl":
            found.append(output.hidden_states[-2])
        elif model.clip_skip is not None:
            found.append(getattr(encoder, "text_model", encoder).final_layer_norm(output.hidden_states[-model.clip_skip]))
        else:
            found.append(output.last_hidden_state)
    return found


def by_hand(model: DiffusionModel, texts: list[str]) -> Tensor:
    return torch.cat(hidden_states(model, texts), dim=-1)


@pytest.fixture(params=[*FAMILY_NAMES, "sd1 clip_skip 2"])
def model(request: pytest.FixtureRequest) -> DiffusionModel:
    model = tiny_model(request.param.split()[0])
    if "clip_skip" in request.param:
        model.set_clip_skip(2)
    return model


@torch.no_grad()
def test_plain_prompts_keep_their_bits(model: DiffusionModel) -> None:
    texts = ["a red circle", "", "Größe 例 🙂, a b: {c|d} -- e", "cat " * 75]
    assert torch.equal(model.encode_prompts(texts).text, by_hand(model, texts))
    assert torch.equal(model.encode_prompts(["a (red:1.0) [(circle)]"]).text, by_hand(model, ["a red circle"]))


@torch.no_grad()
@pytest.mark.parametrize("kind", FAMILY_NAMES)
def test_words_of_textual_inversion_are_their_vectors(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model(kind)
    plain = model.encode_prompts(["a (red blue:1.3) cat", "red blue"])
    ids = model.tokenizers[0]("red blue", add_special_tokens=False).input_ids
    vectors = [encoder.get_input_embeddings().weight[ids].clone() for encoder in model.text_encoders]
    if kind == "sdxl":
        save_file(dict(zip(("clip_l", "clip_g"), vectors, strict=True)), tmp_path / "My-Word.safetensors")
    else:
        torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": vectors[0]}, "name": "x"}, tmp_path / "My-Word.pt")
    load_embeddings(model, [tmp_path])
    found = model.encode_prompts(["a (my-word:1.3) cat", "embedding:My-Word"])
    assert torch.equal(found.text, plain.text)
    if plain.pooled is not None and found.pooled is not None:
        assert torch.equal(found.pooled, plain.pooled)
    model.expect_prompts(["embedding:my-word"])
    assert caplog.text == ""
    model.expect_prompts(["not-my-word AND", "embedding:other"])
    assert "AND is read as text, in 'not-my-word AND'" in caplog.text and "textual inversion is read as text" in caplog.text


def test_embeddings_that_do_not_fit(tmp_path: Path) -> None:
    save_file({"emb_params": torch.zeros(2, 5)}, tmp_path / "other.safetensors")
    save_file({"x": torch.zeros(2, 5, 3)}, tmp_path / "none.safetensors")
    save_file({"emb_params": torch.tensor([[0.0] * 31 + [math.nan]])}, tmp_path / "nan.safetensors")
    (tmp_path / "broken.pt").write_bytes(b"PK")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("other.safetensors", "is 5 wide .* made for another family"),
        ("none.safetensors", "is no textual-inversion embedding"),
        ("nan.safetensors", "values that are not finite"),
        ("broken.pt", "is no embedding of plain tensors"),
        ("gone.pt", "there is no such file"),
        ("empty", "a folder without embeddings"),
    ):
        with pytest.raises(UserError, match=message):
            load_embeddings(tiny_model("sd1"), [tmp_path / name])


@torch.no_grad()
def test_a_long_prompt_is_two_prompts_side_by_side(model: DiffusionModel) -> None:
    words = LONG.split()
    long = model.encode_prompts([LONG])
    first, second = (model.encode_prompts([" ".join(part)]) for part in (words[:75], words[75:]))
    torch.testing.assert_close(long.text, torch.cat([first.text, second.text], dim=1), **CLOSE)
    assert long.text.shape[1] == 154
    if first.pooled is not None:
        torch.testing.assert_close(long.pooled, first.pooled, **CLOSE)


@torch.no_grad()
def test_short_prompts_end_in_empty_chunks(model: DiffusionModel) -> None:
    both = model.encode_prompts([LONG, "a cat"])
    assert both.text.shape[:2] == (2, 154) and len(both) == 2
    torch.testing.assert_close(both.text[:1], model.encode_prompts([LONG]).text, **CLOSE)
    torch.testing.assert_close(both.text[1:], torch.cat([by_hand(model, ["a cat"]), by_hand(model, [""])], dim=1), **CLOSE)
    if both.pooled is not None:
        torch.testing.assert_close(both.pooled[1:], model.encode_prompts(["a cat"]).pooled, **CLOSE)


@torch.no_grad()
def test_break_begins_a_chunk(model: DiffusionModel) -> None:
    broken = model.encode_prompts(["a cat BREAK a dog"]).text
    torch.testing.assert_close(broken, torch.cat([by_hand(model, ["a cat"]), by_hand(model, ["a dog"])], dim=1), **CLOSE)


@torch.no_grad()
def test_weights_multiply_hidden_states_and_their_mean_stays(model: DiffusionModel) -> None:
    for text_encoder in model.text_encoders:  # random ones have no mean
        for name, parameter in text_encoder.named_parameters():
            if "position_embedding" in name or name.endswith("final_layer_norm.bias"):
                parameter += 0.3
    weighted = model.encode_prompts(["a (red:1.5) [cat]", "a dog"])
    weights = torch.ones(77)
    weights[2], weights[3] = 1.5, 1 / 1.1  # after the beginning and "a"
    expected = []
    for hidden in hidden_states(model, ["a red cat"]):  # each text encoder by itself
        changed = hidden * weights[:, None]
        expected.append(changed * hidden.mean() / changed.mean())
    torch.testing.assert_close(weighted.text[:1], torch.cat(expected, dim=-1), rtol=1e-4, atol=1e-4)
    assert (weighted.text[:1] - by_hand(model, ["a red cat"])).abs().max() > 0.01
    torch.testing.assert_close(weighted.text[1:], by_hand(model, ["a dog"]), **CLOSE)
    if weighted.pooled is not None:
        torch.testing.assert_close(weighted.pooled, model.encode_prompts(["a red cat", "a dog"]).pooled, **CLOSE)


def test_a_mean_that_is_noise_is_not_restored() -> None:
    hidden = torch.randn(3, 77, 8, generator=torch.Generator().manual_seed(0))
    hidden -= hidden.mean((1, 2), keepdim=True)
    hidden[1] += 0.5
    hidden[2] += 0.5
    weights = torch.ones(3, 77)
    weights[:2, 5] = 1.5
    found = apply_weights(hidden, weights)
    multiplied = hidden * weights[:, :, None]
    assert torch.equal(found[0], multiplied[0])
    torch.testing.assert_close(found[1].mean(), hidden[1].mean())
    torch.testing.assert_close(found[1] / found[1, 5, 0], multiplied[1] / multiplied[1, 5, 0])
    assert torch.equal(found[2], hidden[2])


@torch.no_grad()
def test_a_weight_in_the_second_chunk_leaves_the_first_alone() -> None:
    model = tiny_model("sd1")
    words = LONG.split()
    plain, weighted = model.encode_prompts([LONG]).text, model.encode_prompts([" ".join([*words[:-1], f"({words[-1]}:1.5)"])]).text
    assert torch.equal(plain[:, :77], weighted[:, :77]) and (plain[:, 77:] - weighted[:, 77:]).abs().max() > 0.01


@torch.no_grad()
def test_weighted_prompts_keep_the_type_of_half_precision() -> None:
    model = tiny_model("sd1").to(dtype=torch.bfloat16)
    exact = tiny_model("sd1").encode_prompts(["a (red:1.5) cat"]).text
    found = model.encode_prompts(["a (red:1.5) cat"]).text
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, rtol=0, atol=0.1)


PROMPTS = [PromptSpec(prompt="a cat"), PromptSpec(prompt="a dog", negative_prompt=LONG), PromptSpec(prompt="a (red:1.2) circle")]


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_conditionings_of_an_encoder_can_be_joined(family: str) -> None:
    model = tiny_model(family)
    encoder = PromptEncoder(model)
    cond, uncond = encoder.cond(PROMPTS, (64, 64)), encoder.uncond(PROMPTS, (64, 64))
    both = Conditioning.cat([uncond, cond])
    assert both.text.shape[:2] == (6, 154)
    expected = model.encode_prompts(["", LONG, "", "a cat", "a dog", "a (red:1.2) circle"], (64, 64))
    torch.testing.assert_close(both.text, expected.text, **CLOSE)
    if family == "sdxl":
        torch.testing.assert_close(both.pooled, expected.pooled, **CLOSE)
        torch.testing.assert_close(both.time_ids, expected.time_ids, rtol=0, atol=0)


def test_what_was_encoded_before_a_longer_prompt_is_lengthened_without_the_text_encoders() -> None:
    model = tiny_model("sd1")
    encoder = PromptEncoder(model)
    encoder.encode_ahead(PROMPTS[:1], (64, 64))
    assert encoder.cond(PROMPTS[:1], (64, 64)).text.shape[1] == 77
    encoder.encode_ahead(PROMPTS[1:], (64, 64))
    expected = model.encode_prompts(["a cat", LONG]).text
    model.free_text_encoders()
    torch.testing.assert_close(encoder.cond(PROMPTS[:1], (64, 64)).text, expected[:1], **CLOSE)
    torch.testing.assert_close(encoder.uncond(PROMPTS[1:2], (64, 128)).text, expected[1:], **CLOSE)


def test_texts_are_encoded_once_for_all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = tiny_model("sdxl"), []
    encode = model.encode_prompts
    monkeypatch.setattr(model, "encode_prompts", lambda texts, size=None: (seen.extend(texts), encode(texts, size))[1])
    encoder = PromptEncoder(model)
    prompts = [PromptSpec(prompt="a cat", width=width) for width in (64, 96, 128)]
    encoder.encode_ahead(prompts, (64, 64))
    assert sorted(seen) == ["", "a cat"]
    time_ids = encoder.cond(prompts[1:2], (64, 96)).time_ids
    assert time_ids is not None and time_ids.tolist() == [[64, 96, 0, 0, 64, 96]]


def test_sdxl_is_told_a_prompts_size_and_crop() -> None:
    model = tiny_model("sdxl")
    prompts = [PromptSpec(prompt="a", original_width=512, original_height=384, crop_top=8, crop_left=16), PromptSpec(prompt="b")]
    expected = [[384, 512, 8, 16, 64, 96], [64, 96, 0, 0, 64, 96]]
    encoder = PromptEncoder(model)
    for cond in (encoder.cond(prompts, (64, 96)), encoder.uncond(prompts, (64, 96))):
        assert cond.time_ids is not None and cond.time_ids.tolist() == expected
    direct = model.encode_prompts(["a", "b"], time_ids=[time_ids_of(prompt, (64, 96)) for prompt in prompts]).time_ids
    assert direct is not None and direct.tolist() == expected


def test_other_families_warn_once_of_size_and_crop(caplog: pytest.LogCaptureFixture) -> None:
    encoder = PromptEncoder(tiny_model("sd1"))
    plain, told = PromptSpec(prompt="a"), PromptSpec(prompt="a", crop_top=8)
    encoder.cond([plain], (64, 64))
    assert not caplog.records
    assert encoder.cond([told], (64, 64)).time_ids is None and encoder.uncond([told], (64, 64)).time_ids is None
    assert caplog.text.count("only SDXL is told") == 1


def text_encoder_network(model: DiffusionModel) -> LoRANetwork:
    network = create_network(1.0, 4, 4.0, model.vae, model.text_encoders, model.unet, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_up" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    network.apply_to(model.text_encoders, model.unet)
    return network


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_text_encoder_lora_has_each_prompts_multiplier_in_every_chunk(family: str) -> None:
    model = tiny_model(family)
    network = text_encoder_network(model)
    texts, multipliers = [LONG, "a (red:1.3) cat"], [1.0, -1.0]
    network.set_multiplier(torch.tensor(multipliers))
    together = model.encode_prompts(texts)
    assert together.text.requires_grad
    for row, (text, multiplier) in enumerate(zip(texts, multipliers, strict=True)):
        network.set_multiplier(multiplier)
        model.expect_prompts(texts)
        torch.testing.assert_close(model.encode_prompts([text]).text[0], together.text[row], **CLOSE)
    encoder = PromptEncoder(model, network)
    prompts = [PromptSpec(prompt=text) for text in texts]
    with torch.no_grad():
        torch.testing.assert_close(encoder.cond(prompts, (64, 64), multipliers).text, together.text, **CLOSE)
    assert encoder.uncond(prompts, (64, 64), multipliers).text.shape == together.text.shape
    encoder.encode_ahead(prompts, (64, 64))
    assert (encoder.encode(texts, (64, 64), [0.0, 0.0]).text - together.text).abs().max() > 1e-3


def test_pictures_of_long_prompts_are_sampled_with_short_negatives() -> None:
    model = tiny_model("sd1")
    run = SamplingConfig(num_steps=2, guidance_scale=4.0, size=(64, 64), batch_size=2)
    pictures = sample(model, None, [PromptSpec(prompt=LONG), PromptSpec(prompt="a cat")], [0, 0], sampling=run)
    cut = sample(model, None, [PromptSpec(prompt=" ".join(LONG.split()[:75]))], [0], sampling=run)
    assert pictures.shape[0] == 2 and (pictures[:1] - cut).abs().max() > 1e-4


def test_more_texts_than_are_kept_are_encoded_when_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_encoder, "MOST_KEPT", 3)
    model = tiny_model("sd1")
    plain, encoder = PromptEncoder(model), PromptEncoder(model)
    prompts = [PromptSpec(prompt=f"{WORDS[number]} {LONG if number == 4 else ''}") for number in range(5)]
    calls: list[str] = []
    encode = model.encode_prompts
    monkeypatch.setattr(model, "encode_prompts", lambda texts, *rest: calls.extend(texts) or encode(texts, *rest))
    encoder.encode_ahead(prompts, (64, 64))
    assert encoder.encodes_late and not calls
    encoder.encode_ahead(prompts[:1], (64, 64))  # nor is a part of them
    assert not calls
    for batch in ([0, 1], [0, 2], [0, 3], [1, 4], [3, 0]):
        chosen = [prompts[index] for index in batch]
        assert torch.equal(encoder.cond(chosen, (64, 64)).text, plain.cond(chosen, (64, 64)).text)
        assert len(encoder._rows) <= 3
    own = [text for text in calls if text]  # without the empty chunk
    assert own.count(prompts[0].prompt) < 4 * 2
    some = PromptEncoder(model)
    some.encode_ahead(prompts[:2], (64, 64))  # and the empty negative: three
    assert not some.encodes_late
