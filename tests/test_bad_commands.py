"""Bad command lines, settings and files over both scripts and every tool: one sentence, exit 2, and nothing is written.

BAD_COMMANDS=1 python -m pytest tests/test_bad_commands.py      # about 80 s of CPU
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import train_latent_scorer
import train_leco_score
from tests.helpers.scorer_headers import SPEC, edited, file_with
from tests.helpers.tiny_leco_run import make_workplace
from tools import cache_latents, evaluate_slider, make_pixel_scorer, score_images, train_image_prompt_adapter

pytestmark = pytest.mark.skipif("BAD_COMMANDS" not in os.environ, reason="takes long: set BAD_COMMANDS=1")

MAINS: dict[str, Callable[[], None]] = {
    "slider": train_leco_score.main,
    "scorer": train_latent_scorer.main,
    "cache": cache_latents.main,
    "evaluate": evaluate_slider.main,
    "make": make_pixel_scorer.main,
    "score": score_images.main,
    "adapter": train_image_prompt_adapter.main,
}
# Enough for a run; what a case gives again takes the place of it.
WHOLE = {
    "slider": "--pretrained_model_name_or_path model --scorer scorer.safetensors --prompts_file prompts.txt --output_dir out "
    "--max_train_steps 1 --measure off",
    "scorer": "--pretrained_model_name_or_path model --train_data_file ratings.csv --output_dir out --max_train_steps 1",
    "cache": "--pretrained_model_name_or_path model --train_data_file ratings.csv --output_dir out",
    "evaluate": "--pretrained_model_name_or_path model --network_weights lora.safetensors --scorer scorer.safetensors "
    "--prompts_file prompts.txt --output_dir out",
    "make": "--pretrained_model_name_or_path model --image_model python:judge.py:score --output out.safetensors",
    "score": "--pretrained_model_name_or_path model --scorer scorer.safetensors --images pictures --output_dir out",
    "adapter": "--pretrained_model_name_or_path model --prompts_file prompts.txt --clip_model clip --output out.safetensors",
}
# Parted by " | ".
EVERY_SCRIPT = """
        --no_such_option 1 | --pretrained_model_name_or_path | --pretrained_model_name_or_path= | --pretrained_model_name_or_path nowhere |
        --config_file nowhere.toml | --config_file folder.toml | --config_file deep.toml | --config_file broken.toml |
        --config_file list.toml | --config_file bytes.toml | a_word | --num_threads 0 | --num_threads 1e9999 | --num_threads ٣x |
        --output_config ratings.toml
"""
OF_ONE = {
    "slider": """
        --network_dim 0 | --network_dim -1 | --network_dim 1.5 | --network_dim 100000000 | --network_alpha nan | --network_alpha -1 |
        --learning_rate nan | --learning_rate -1 | --learning_rate inf | --max_train_steps 0 | --max_train_steps 1e30 |
        --train_batch_size 0 | --seed 1e99 | --seed -1 | --seed 9223372036854775808000 | --resolution 0 | --resolution 100000000 |
        --resolution 65 | --resolution 64,64,64 | --sampler none | --optimizer_type none.None | --optimizer_type os.system |
        --optimizer_args x | --optimizer_args lr=__import__('os') | --lr_scheduler nope | --scorer nowhere.safetensors |
        --scorer prompts.txt | --scorer pictures | --scorer deep.safetensors | --scorer std0.safetensors | --scorer lora.safetensors |
        --scorer scorer.safetensors scorer.safetensors | --scorer_weights 1 2 | --scorer_weights 0 | --scorer_weights nan |
        --scorer_limits hold=0 | --scorer_limits max=nan | --scorer_limits soft=1 | --prompts_file nowhere.txt | --prompts_file empty.txt |
        --prompts_file pictures | --prompts_file bad_option.txt | --prompts_file broken.toml | --prompts_file wide.txt |
        --network_weights nowhere.safetensors | --network_weights scalar.safetensors | --network_weights scorer.safetensors |
        --network_weights empty.txt | --network_weights pictures | --network_args conv_dim=x | --network_args x | --network_args rank=3 |
        --network_args exclude_patterns=['('] | --resume nowhere | --resume pictures | --resume empty_state | --output_name a/b |
        --output_name .. | --output_name= | --output_name LONG | --output_dir empty.txt | --output_dir empty.txt/below | --log_with none |
        --log_args wandb_api_key | --mixed_precision fp8 | --judges nowhere.py:x | --judges judge.py:nothing | --judges judge.py |
        --judge_scorers nowhere.safetensors | --calibrate -1 | --calibrate nan | --early_stop_gain -1 | --save_last_n_steps 5 |
        --measure maybe | --wildcards_dir nowhere | --eval_prompts_file nowhere.txt | --score_estimator none |
        --min_timestep 900 --max_timestep 100 | --pretrained_model_name_or_path list_model |
        --pretrained_model_name_or_path empty.safetensors | --objective nothing | --pretrained_model_name_or_path pictures |
        --pretrained_model_name_or_path prompts.txt | --vae nowhere | --clip_skip 99 | --base_weights nowhere.safetensors |
        --max_denoising_steps 0 | --max_denoising_steps 100000
    """,
    "scorer": """
        --train_data_file nowhere.csv | --train_data_file empty.csv | --train_data_file quote.csv | --train_data_file deep.jsonl |
        --train_data_file prompts.txt | --train_data_file bytes.parquet | --train_data_file no_pictures.csv | --scorer_kind none |
        --scorer_size huge | --scorer_args x=1 | --criterion nope | --criterion emd | --max_train_steps 0 | --train_batch_size 0 |
        --learning_rate nan | --validation_split 1 | --validation_split -1 | --backbone_weights nowhere | --resolution 100000000 |
        --data_reader nope | --output_name folder | --cache_dir empty.txt | --image_dir nowhere | --score_column nothing
    """,
    "cache": """
        --train_data_file nowhere.csv | --picture_folder nowhere | --picture_folder empty.txt
    """,
    "evaluate": """
        --network_weights nowhere.safetensors | --network_weights scorer.safetensors | --multipliers x | --multipliers nan |
        --scorer nowhere.safetensors | --prompts_file nowhere.txt | --output_dir empty.txt | --seeds_per_prompt 0 | --judges x
    """,
    "make": """
        --image_model nothing:x | --image_model python:nowhere.py:x | --output x.pt | --output folder.safetensors | --reference_dir empty |
        --image_model python:numpy_judge.py:score | --image_model classifier:nowhere | --resolution 1
    """,
    "score": """
        --images nowhere | --images empty.txt | --scorer nowhere.safetensors | --output_dir empty.txt | --judge judge.py:nothing
    """,
    "adapter": """
        --clip_model nowhere | --prompts_file nowhere.txt | --clip_model pictures | --output x.bin | --resolution 3
    """,
}
CASES = [(script, case) for script, cases in OF_ONE.items() for case in " ".join(f"{EVERY_SCRIPT} | {cases}".split()).split(" | ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_workplace(tmp_path_factory.mktemp("commands"))
    for name in ("pictures", "folder.toml", "folder.safetensors", "empty_state", "empty", "list_model"):
        (folder / name).mkdir()
    for number in range(8):
        Image.new("RGB", (64, 64), (30 * number,) * 3).save(folder / "pictures" / f"{number}.png")
    texts = {
        "ratings.csv": "path,score\n" + "".join(f"pictures/{number}.png,{number}\n" for number in range(8)),
        "deep.toml": "x = " + "[" * 2000,
        "broken.toml": "seed = [1,\n",
        "list.toml": "[[seed]]\nx = 1\n",
        "ratings.toml": "",
        "empty.txt": "",
        "empty.csv": "",
        "bad_option.txt": "a cat --w 513 --q x\n",
        "wide.txt": "a cat --w 80000000\n",
        "quote.csv": '"path"x,score\na,1\n',
        "deep.jsonl": "[" * 100_000,
        "no_pictures.csv": "path,score\nnowhere.png,1\n",
        "judge.py": "def score(pixels): return pixels.mean((1, 2, 3))\n",
        "numpy_judge.py": "import torch\ndef score(pixels): return torch.tensor(pixels.detach().numpy().mean((1, 2, 3)))\n",
        "list_model/model_index.json": "[]",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    for name in ("bytes.toml", "bytes.parquet"):
        (folder / name).write_bytes(b"\xff\xfe\x00PAR1\x80")
    module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    factors = {f"{module}.lora_down.weight": torch.ones(2, 32), f"{module}.lora_up.weight": torch.zeros(32, 2)}
    save_file(factors, folder / "lora.safetensors")
    save_file({name: torch.tensor(1.0) for name in factors}, folder / "scalar.safetensors")
    save_file({"a": torch.zeros(1)}, folder / "empty.safetensors")
    file_with(folder / "deep.safetensors", SPEC.to_json()[:-1] + ', "training": ' + '{"a":' * 100_000)
    file_with(folder / "std0.safetensors", edited(std=0))
    (folder / "folder.json").mkdir()
    return folder


def tree(folder: Path) -> list[str]:
    """All that is there, but for a latent cache, which is made before its pictures are looked for."""
    cache = folder / "out" / "latent_cache"
    return sorted(str(path) for path in folder.rglob("*") if path != cache.parent and not path.is_relative_to(cache))


@pytest.mark.parametrize(("script", "case"), CASES, ids=lambda value: str(value)[:60])
def test_a_bad_command_is_one_sentence(
    script: str, case: str, folder: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    monkeypatch.chdir(folder)
    before = tree(folder)
    assert "unexpected" not in refused(MAINS[script], *WHOLE[script].split(), *case.replace("LONG", "n" * 245).split())
    assert tree(folder) == before
