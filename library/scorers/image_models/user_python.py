"""A user's own image model: a class or a function in Python."""

import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from library.errors import UserError
from library.scorers.image_models.base import IMAGE_MODELS, ImageModel, Loaded
from library.scorers.image_models.preprocessing import Preprocessing, take_preprocessing
from library.scorers.python_objects import load_object, takes_prompts, users_code

logger = logging.getLogger(__name__)


@IMAGE_MODELS.register("python")
class UserPython(ImageModel):
    """An `nn.Module` class, made without arguments, or a function; called with pixels in 0..1, and with prompts if it takes them.

    The scorer file holds the weights of the module and the name of the class; the code stays where it is and runs when the scorer is
    loaded. A class that gets its weights from elsewhere when it is made takes a file's all the same.

    Args:
        name: `package.module:Class` or `path/to/file.py:Class`.
    """

    example = "python:my_scorer.py:MyScorer"

    def __init__(self, *, name: str, preprocessing: Mapping[str, Any]) -> None:
        super().__init__(preprocessing)
        logger.info("the scorer runs the Python code of %s", name)
        found = load_object(name, "image model", classes=True)
        if inspect.isclass(found):
            if not issubclass(found, nn.Module):
                raise UserError(f"image model {name!r} is a class, but no torch.nn.Module; derive it from that, or name a function")
            with users_code(f"image model {name!r}"):
                self.network = found()
            self.uses_prompt = takes_prompts(self.network.forward, f"image model {name!r}")
        else:
            self.network = found
            self.uses_prompt = takes_prompts(found, f"image model {name!r}")
        self.name = name

    @classmethod
    def read(cls, argument: str, options: dict[str, str]) -> Loaded:
        raw = Preprocessing(mean=(0.0,) * 3, std=(1.0,) * 3)  # the picture as it is, unless the user says otherwise
        architecture = {"name": argument, "preprocessing": take_preprocessing(options, raw)}
        return Loaded(architecture, cls(**architecture).state_dict())

    def predict(self, views: Tensor, prompts: Sequence[str] | None) -> Tensor:
        with users_code(f"image model {self.name!r}"):
            scores = self.network(views, prompts) if self.uses_prompt else self.network(views)
        if not isinstance(scores, Tensor) or scores.shape[:1] != views.shape[:1] or scores.numel() != len(views):
            returned = f"shape {list(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
            raise UserError(f"image model {self.name!r} returned {returned} for {len(views)} pictures; it must return one number for each")
        return scores.reshape(-1)
