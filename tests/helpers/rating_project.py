"""A rating project of drawings, whose features are pixels: no model is needed. And the page's server on it, in a thread."""

import contextlib
import hashlib
import io
import random
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from examples.shapes.world import caption, draw, random_scene
from library.atomic_files import atomic_write_bytes
from library.rating.runs import Recipe, merged
from library.rating.space import LATENT_FEATURES
from library.rating.store import Project, StoredPicture

RECIPE = Recipe(model="model", prompts_file=None, scorer={}, slider={}, check={})


def drawn_project(folder: Path, count: int, seed: int = 0) -> tuple[Project, np.ndarray]:
    """A project of `count` drawings, and how bright each is, in standard deviations: its true worth, by id - 1."""
    rng, project = random.Random(seed), Project(folder)
    pictures, bright = [], []
    for number in range(count):
        scene = random_scene(rng, (64, 64))
        picture = draw(scene)
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        digest = hashlib.sha256(buffer.getvalue() + bytes([number % 256])).hexdigest()
        name = f"pictures/{number:05d}.png"
        atomic_write_bytes(folder / name, buffer.getvalue())
        small = np.asarray(picture.resize((6, 6)), dtype=np.float32) / 255
        moments = np.concatenate([small.mean((0, 1)), small.std((0, 1)), small[0, 0, :2]])
        assert len(moments) == LATENT_FEATURES
        features = np.concatenate([moments, small.flatten()])
        pictures.append(
            StoredPicture(
                hash=digest, file=name, shown=name, prompt=caption(scene, rng), seed=number, width=64, height=64, features=features
            )
        )
        bright.append(small.mean())
    project.add_pictures(pictures)
    worth = np.array(bright)
    return project, (worth - worth.mean()) / max(worth.std(), 1e-6)


def short_recipe(folder: Path, *, scorer_steps: int = 20, train_steps: int = 8, judges: tuple[str, ...] = ()) -> Recipe:
    """The page's own for the embedded model, with few steps, and a seed that is the same in every training."""
    from tools.rate import EMBEDDED, RateConfig, embedded_prompts, make_recipe

    recipe = make_recipe(
        RateConfig(scorer_steps=scorer_steps, train_steps=train_steps, judges=judges), str(EMBEDDED), embedded_prompts(folder)
    )
    few = {
        "rollout": {"max_denoising_steps": 4},
        "monitor": {"sample_every_n_steps": max(1, train_steps // 2)},
        "saving": {"save_every_n_steps": 1},
    }
    check = {"evaluation": {"num_prompts": 2, "seeds_per_prompt": 2, "num_steps": 4, "multipliers": [-1.0, 0.0, 1.0]}}
    return replace(recipe, slider=merged(recipe.slider, few, {"training": {"seed": 0}}), check=merged(recipe.check, check))


def stars_of(worth: float, rng: np.random.Generator, noise: float = 0.4) -> int:
    """What a person whose error has this standard deviation gives a picture, from 1 to 5."""
    return int(np.clip(round(1.2 * (worth + noise * rng.normal()) + 3), 1, 5))


@contextlib.contextmanager
def served(project: Project, *, token: str | None = None, recipe: Recipe = RECIPE, source: dict[str, Any] | None = None) -> Iterator[Any]:
    """The page on a free port of this machine: (address, session)."""
    import uvicorn

    from library.rating.guard import LOOPBACK
    from library.rating.server import make_app
    from library.rating.session import RatingSession
    from tools.rate import ServerConfig, listen

    own = listen(ServerConfig(port=0))
    session = RatingSession(project, recipe, source, seed=0)
    server = uvicorn.Server(uvicorn.Config(make_app(session, LOOPBACK, token), log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [own]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{own.getsockname()[1]}", session
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        session.close()


if __name__ == "__main__":  # a server that can be killed: prints its address
    with served(Project(Path(sys.argv[1]))) as (own_address, _):
        print(own_address, flush=True)
        threading.Event().wait()
