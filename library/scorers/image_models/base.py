"""What a network that looks at pictures is, and how a user names one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from library.errors import UserError
from library.scorers.image_models.preprocessing import Preprocessing
from library.settings.registry import Registry


@dataclass(frozen=True)
class Loaded:
    """What a family made of the user's files: the keyword arguments of its class, as JSON values, and the weights."""

    architecture: dict[str, Any]
    weights: dict[str, Tensor]


class ImageModel(nn.Module):
    """Pictures to features, or to one score in its own units. It is built from JSON values by keyword; weights are loaded over it.

    Attributes:
        preprocessing: what is done to the pictures first.
        feature_width: numbers that it puts out for a picture; 1 for a score.
        uses_prompt: whether they depend on the prompt.
    """

    feature_width: int = 1
    uses_prompt: bool = False
    example: ClassVar[str]  # how a user writes it

    def __init__(self, preprocessing: Mapping[str, Any]) -> None:
        super().__init__()
        self.preprocessing = Preprocessing.from_dict(preprocessing)

    @classmethod
    def read(cls, argument: str, options: dict[str, str]) -> Loaded:
        """Read the user's files.

        Args:
            argument: what stands behind the colon.
            options: what stands behind the question mark; those that are understood are taken out.

        Raises:
            UserError: a file is missing or holds something else, or an option has no such value.
        """
        raise NotImplementedError

    def forward(self, pixels: Tensor, prompts: Sequence[str] | None = None) -> Tensor:
        """Pixels [B, 3, H, W] in 0..1, and the B prompts if it uses them, to [B, feature_width]. Differentiable in the pixels."""
        assert pixels.ndim == 4 and pixels.shape[1] == 3, f"pixels are [B, 3, H, W], not {list(pixels.shape)}"
        views = self.preprocessing(pixels)  # [B, V, 3, h, w]
        rows, count = views.shape[:2]
        repeated = [prompt for prompt in prompts for _ in range(count)] if self.uses_prompt and prompts is not None else None
        return self.predict(views.flatten(0, 1), repeated).reshape(rows, count, self.feature_width).mean(1)

    def predict(self, views: Tensor, prompts: Sequence[str] | None) -> Tensor:
        """Prepared pictures [N, 3, h, w] to [N, feature_width], or [N] where that is 1."""
        raise NotImplementedError


IMAGE_MODELS: Registry[type[ImageModel]] = Registry("image_model", "library.scorers.image_models", "family of image models")


def parse_specification(text: str) -> tuple[str, str, dict[str, str]]:
    """Family, argument and options of an image model as a user names it: `family:argument?key=value&key=value`. Raises UserError."""
    named, _, rest = text.partition("?")
    family, colon, argument = named.partition(":")
    options: dict[str, str] = {}
    for part in filter(None, rest.split("&")):
        key, equals, value = part.partition("=")
        if not equals or not key or key in options:
            raise UserError(f"image model {text!r}: {part!r} is not a key=value of its own")
        options[key] = value
    if not (family and colon and argument):
        raise UserError(f"image model {text!r} is not of the form family:argument?key=value&key=value")
    return family, argument, options


def read_image_model(text: str) -> Loaded:
    """What the user's files hold, for `family:argument?options`. The architecture has the family in it.

    Raises:
        UserError: no such family, a file that is missing or another than it should be, or an option that the family does not have.
    """
    name, argument, options = parse_specification(text)
    family = IMAGE_MODELS[name]
    loaded = family.read(argument, options)
    if options:
        raise UserError(f"image model {text!r} has no option {', '.join(options)}; it is written like {family.example}")
    return Loaded({"family": name, **loaded.architecture}, loaded.weights)


def build_image_model(architecture: Mapping[str, Any]) -> ImageModel:
    """The image model of an architecture, with random weights."""
    values = dict(architecture)
    return IMAGE_MODELS[values.pop("family")](**values)


# -- options of a family -------------------------------------------------------------------------------------------------


def take_choice(options: dict[str, str], key: str, choices: Sequence[str]) -> str:
    """Take an option out; the first choice is the default. Raises UserError when it is none of the choices."""
    value = options.pop(key, choices[0])
    if value not in choices:
        raise UserError(f"image model: {key} is {value!r}; it can be {', '.join(choices)}")
    return value


def take_int(options: dict[str, str], key: str, default: int) -> int:
    """Take an option out. Raises UserError when it is no whole number, or below 0."""
    value = options.pop(key, str(default))
    if not value.isdecimal():
        raise UserError(f"image model: {key} is {value!r}; it must be a whole number")
    return int(value)


def take_required(options: dict[str, str], key: str, what: str) -> str:
    """Take an option out. Raises UserError when it is not there."""
    if key not in options:
        raise UserError(f"image model: {key} is not given; add {key}={what}")
    return options.pop(key)
