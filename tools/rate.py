"""The page on which a person rates pictures, and their opinion becomes a slider.

    python setup_and_run.py rate                                                                          # the embedded model, no download
    python tools/rate.py --pretrained_model_name_or_path my.safetensors --prompts_file prompts.txt        # pictures of your own checkpoint
    python tools/rate.py --pretrained_model_name_or_path my.safetensors --pictures folder --prompts_file prompts.txt   # pictures that exist

Opens the browser. Pictures are made in the background at a small size in few steps; every answer is in `project_dir` before the next
picture comes. Training runs train_latent_scorer.py, train_leco_score.py and tools/evaluate_slider.py with TOML files that the page shows
and keeps. docs/rating.md goes through it with pictures.
"""

import errno
import os
import secrets
import socket
import sys
import threading
import webbrowser
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy is imported: small matrices, beside a model that needs the cores

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, so that the script runs from anywhere

from library.errors import UserError
from library.rating.guard import LOOPBACK
from library.rating.runs import Recipe
from library.rating.store import Project
from library.rating.tables import import_ratings
from library.settings.cli import parse_config, run_main
from library.settings.options import check_at_least, option

ROOT = Path(__file__).resolve().parents[1]
EMBEDDED = ROOT / "examples" / "shapes" / "model"
HIGHEST_PORT = 65535


@dataclass(frozen=True, kw_only=True)
class RateConfig:
    """What is rated, where it is kept, and how training is to be set."""

    project_dir: Path = option(Path("output/rating"), help="Folder of the project: pictures, ratings, trainings.")
    opinion: str | None = option(None, help="Name of an opinion to begin, such as cosy; not set: beauty, or those that there are.")
    levels: int = option(5, help="Stars of that opinion, 5 or 10.", only_with="opinion")
    pretrained_model_name_or_path: str | None = option(None, help="Checkpoint or diffusers folder; not set: the embedded model.")
    prompts_file: Path | None = option(None, help="Prompts of the pictures and of the slider, as in train_leco_score.py.")
    pictures: Path | None = option(None, help="Rate the pictures of this folder, in place of samples.")
    import_ratings: Path | None = option(None, help="Table of answers about the project's pictures to take in, as the page writes it.")
    resolution: tuple[int, ...] = option(
        (), help="Width and height of the samples; not set: small for the model.", only_with={"pictures": ()}
    )
    num_steps: int | None = option(
        None, help="Steps of the sampler for the samples; not set: 10, or what suits a few-step model.", only_with={"pictures": ()}
    )
    guidance_scale: float | None = option(None, help="Guidance scale of the samples and the training; not set: what suits the model.")
    train_steps: int | None = option(None, help="At most so many updates of the slider; not set: what suits the model.")
    scorer_steps: int | None = option(None, help="Updates of the scorer; not set: what suits the model.")
    judges: tuple[str, ...] = option(
        (),
        help="Judges of the slider that training does not follow, as in train_leco_score.py: my.py:sharpness my.py:edges=stay.",
    )

    def __post_init__(self) -> None:
        check_at_least(self, 1, "num_steps", "guidance_scale", "train_steps", "scorer_steps")
        if self.resolution and (len(self.resolution) != 2 or any(side < 64 or side % 64 for side in self.resolution)):
            raise UserError(f"resolution is {list(self.resolution)}, but it is a width and a height in multiples of 64, such as 384 384")
        if self.pretrained_model_name_or_path and self.prompts_file is None and self.pictures is None:
            raise UserError("prompts_file is not set; give a file with what the pictures are to show, one prompt a line")
        for name in ("prompts_file", "import_ratings"):
            path = getattr(self, name)
            if path is not None and not path.is_file():
                raise UserError(f"{name} is {path}, which is no file; give a file that is there")
        if self.pictures is not None and not self.pictures.is_dir():
            raise UserError(f"pictures is {self.pictures}, which is no folder; give a folder of pictures")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Where the page is served."""

    host: str = option("127.0.0.1", help="Address to listen on; any but this machine's own asks for a token, which is printed.")
    port: int = option(7862, help="Port to listen on; 0 takes a free one.")
    host_names: tuple[str, ...] = option(
        (), help="More names by which browsers may address the page, with a host of your own.", expert=True
    )
    open_browser: bool = option(True, help="Open the page in the browser.")

    def __post_init__(self) -> None:
        if not 0 <= self.port <= HIGHEST_PORT:
            raise UserError(f"port is {self.port}, but it goes from 0 to {HIGHEST_PORT}")


@dataclass(frozen=True, kw_only=True)
class RateScriptConfig:
    rating: RateConfig
    server: ServerConfig


def embedded_prompts(folder: Path) -> Path:
    """The prompts of the shapes world, written into a project if they are not there."""
    from examples.shapes.draw_pictures import write_prompts

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "prompts.txt"
    return path if path.is_file() else write_prompts(folder, 0)[0]


def chosen_model(config: RateConfig) -> str:
    """A whole path, since the processes behind the page run in the repository; a hub id stays what it is."""
    given = config.pretrained_model_name_or_path or EMBEDDED
    return str(Path(given).absolute() if Path(given).exists() else given)


def found_judges(words: Sequence[str]) -> list[str]:
    """Judges with whole paths, since the trainings run in the repository. One that is none is reported now, not after an hour of rating."""
    from library.measuring.judges import split_role
    from library.scorers.judges import load_judge

    for word in words:
        load_judge(split_role(word)[0])
    paths = [word.rpartition(":") for word in words]
    return [f"{Path(file).absolute() if file.endswith('.py') else file}:{name}" for file, _, name in paths]


def make_recipe(config: RateConfig, model: str, prompts: Path | None) -> Recipe:
    """How the three scripts are set, beside what the project says."""
    embedded = config.pretrained_model_name_or_path is None
    guidance = config.guidance_scale or (3.0 if embedded else 5.0)
    scorer: dict[str, dict[str, Any]]
    slider: dict[str, dict[str, Any]]
    if embedded:
        scorer = {
            "buckets": {"resolution": "80", "bucket_no_upscale": True, "bucket_reso_steps": 8},
            "scorer": {"scorer_kind": "latent_resnet", "head_members": 3},
            "training": {"max_train_steps": 400, "train_batch_size": 32, "validate_every_n_steps": 40, "learning_rate": 2e-3},
        }
        slider = {
            "rollout": {"train_batch_size": 8, "max_denoising_steps": 20},
            "network": {"network_dim": 8, "network_alpha": 8},
            "optimizer": {"learning_rate": 1e-3},
            "training": {"max_train_steps": 160},
            # 1.5 is hardly one true standard deviation where the scorer is good, and 1.8 once cost captions (docs/experiments.md)
            "monitor": {"early_stop_gain": 1.8, "calibrate": 1.7, "sample_every_n_steps": 20},
        }
    else:
        scorer = {
            "buckets": {"resolution": "512", "enable_bucket": True},
            "scorer": {"scorer_kind": "unet_encoder", "scorer_args": ["tuning=lora"], "head_members": 3},
            "training": {"max_train_steps": 400, "train_batch_size": 16, "validate_every_n_steps": 50},
        }
        slider = {
            "rollout": {"train_batch_size": 4, "max_denoising_steps": 20, "resolution": [512, 512]},
            "network": {"network_dim": 8, "network_alpha": 8},
            "optimizer": {"learning_rate": 1e-4, "lr_scheduler": "constant"},
            "training": {"max_train_steps": 500},
            "monitor": {"early_stop_gain": 2.0, "calibrate": "visible", "sample_every_n_steps": 50},
        }
    scorer["training"] |= {"lr_warmup_steps": 0.1, "ema_decay": 0.98}
    slider["rollout"] |= {"leco_denoise_guidance_scale": guidance}
    slider["saving"] = {"save_every_n_steps": 40, "save_last_n_steps": 40}
    check = {
        "evaluation": {
            "num_prompts": 8,
            "seeds_per_prompt": 2,
            "multipliers": [-1.0, -0.5, 0.0, 0.5, 1.0],
            "guidance_scale": guidance,
        }
    }
    for values, name, given in ((scorer, "max_train_steps", config.scorer_steps), (slider, "max_train_steps", config.train_steps)):
        if given is not None:
            values["training"][name] = given
    if config.judges:
        slider["monitor"]["judges"] = check["evaluation"]["judges"] = found_judges(config.judges)
    return Recipe(model=model, prompts_file=None if prompts is None else str(prompts), scorer=scorer, slider=slider, check=check)


def make_source(config: RateConfig, model: str, prompts: Path | None) -> Mapping[str, Any]:
    """The settings of the process that makes pictures."""
    embedded = config.pretrained_model_name_or_path is None
    return {
        "model": model,
        "prompts_file": None if prompts is None else str(prompts),
        "pictures": None if config.pictures is None else str(config.pictures.absolute()),
        "resolution": list(config.resolution) or None,
        "num_steps": config.num_steps,
        "guidance_scale": config.guidance_scale or (3.0 if embedded else None),
        "mixed_precision": None,
    }


def listen(config: ServerConfig) -> socket.socket:
    """A socket that listens. Raises UserError where that cannot be."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    own = socket.socket(family, socket.SOCK_STREAM)
    own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        own.bind((config.host, config.port))
    except OSError as error:
        own.close()
        advice = "is the page open already? Give another --port" if error.errno == errno.EADDRINUSE else "give another --host or --port"
        raise UserError(f"{config.host}:{config.port} cannot be listened on ({error.strerror}); {advice}") from error
    own.listen()
    return own


def serve(config: RateScriptConfig) -> None:
    """Serve the page until it is interrupted. Raises UserError for settings and files that cannot be used."""
    try:
        import uvicorn

        from library.rating.server import make_app
        from library.rating.session import RatingSession
    except ModuleNotFoundError as error:
        raise UserError(f"the page needs the package {error.name}; pip install -r requirements-ui.txt -c constraints.txt") from error
    rating, server = config.rating, config.server
    project = Project(rating.project_dir)
    if rating.opinion is not None:
        project.add_opinion(rating.opinion, rating.levels)
    model = chosen_model(rating)
    prompts = rating.prompts_file and rating.prompts_file.absolute()
    if prompts is None and rating.pretrained_model_name_or_path is None:
        prompts = embedded_prompts(project.folder)
    if rating.import_ratings is not None:
        opinion = (project.opinions() or [project.add_opinion("beauty")])[0] if rating.opinion is None else project.opinion(rating.opinion)
        new, missing = import_ratings(project, opinion, rating.import_ratings)
        print(f"{new} answers taken in for {opinion.name}; {missing} rows name pictures that the project does not have", flush=True)

    own = listen(server)
    port = own.getsockname()[1]
    token = None if server.host in LOOPBACK else secrets.token_urlsafe(16)
    session = RatingSession(project, make_recipe(rating, model, prompts), dict(make_source(rating, model, prompts)))
    names = (*LOOPBACK, server.host, *server.host_names, *([socket.gethostname(), *_addresses()] if token else []))
    app = make_app(session, tuple(name.lower() for name in names), token)
    shown = server.host if server.host not in ("0.0.0.0", "::") else socket.gethostname()
    shown = f"[{shown}]" if ":" in shown else shown
    address = f"http://{shown}:{port}/" + (f"?token={token}" if token else "")
    print(f"Rate pictures at {address}\nThe project is {project.folder}. Ctrl-C ends the page; a training goes on.", flush=True)
    if server.open_browser:
        threading.Timer(0.5, webbrowser.open, [address]).start()
    try:
        uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2)).run(sockets=[own])
    finally:
        session.close()
        project.close()


def _addresses() -> list[str]:
    """Those of this machine, as far as it knows them."""
    try:
        return sorted({str(entry[4][0]) for entry in socket.getaddrinfo(socket.gethostname(), None)})
    except OSError:
        return []


def main() -> None:
    serve(parse_config(RateScriptConfig, description=__doc__))


if __name__ == "__main__":
    run_main(main)
