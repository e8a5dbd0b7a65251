"""Draw the pictures of the shapes world and write their captions.

A `Scene` says all that is in a picture; `draw` turns it into pixels and `caption` into words. The caption names the
shape and its colour and, at random, some of the other attributes. What it leaves out (and the exact hue, shade, size
and place, which it never says) is what differs between two pictures of one prompt: the room in which a slider moves.
"""

import colorsys
import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
HUES = {"red": 0.0, "yellow": 55.0, "green": 120.0, "cyan": 182.0, "blue": 228.0, "purple": 290.0}  # degrees
COLOURS = tuple(HUES)
SIZES = {"small": (12.0, 14.5), "medium": (14.5, 18.0), "large": (18.0, 23.0)}  # radius in pixels
POSITIONS = {"in the centre": (0, 0), "on the left": (-1, 0), "on the right": (1, 0), "at the top": (0, -1), "at the bottom": (0, 1)}
TEXTURES = ("plain", "striped")
BACKGROUNDS = {"dark": (0.04, 0.32), "grey": (0.36, 0.62), "light": (0.68, 0.98)}  # HSV value
RESOLUTIONS = ((64, 64), (96, 64), (64, 96))  # width, height; the first is the commonest
SUPERSAMPLING = 4  # pictures are drawn this many times larger and reduced, which smooths the edges


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One picture. Lengths are in pixels, colours are RGB in 0..1."""

    width: int
    height: int
    shape: str
    colour: str
    size: str
    position: str
    texture: str
    background: str
    radius: float
    centre: tuple[float, float]
    fill: tuple[float, float, float]
    shade: tuple[float, float, float]
    backdrop: tuple[float, float, float]


def random_scene(rng: random.Random, resolution: tuple[int, int] | None = None, **fixed: str) -> Scene:
    """Draw a scene at random; `fixed` pins attributes by name, for example `shape="star"`.

    Raises:
        ValueError: if a pinned attribute has no such value.
    """
    choices = {
        "shape": SHAPES,
        "colour": COLOURS,
        "size": tuple(SIZES),
        "position": tuple(POSITIONS),
        "texture": TEXTURES,
        "background": tuple(BACKGROUNDS),
    }
    for name, value in fixed.items():
        if value not in choices.get(name, ()):
            raise ValueError(f"a scene has no {name} {value!r}; it can be {', '.join(choices.get(name, choices))}")
    picked = {name: fixed.get(name) or rng.choice(values) for name, values in choices.items()}
    width, height = resolution or rng.choices(RESOLUTIONS, weights=(0.6, 0.2, 0.2))[0]

    radius = rng.uniform(*SIZES[picked["size"]])
    room_x, room_y = width / 2 - radius - 2, height / 2 - radius - 2
    towards_x, towards_y = POSITIONS[picked["position"]]
    offset_x = towards_x * rng.uniform(0.6, 1.0) + (not towards_x) * rng.uniform(-0.25, 0.25)
    offset_y = towards_y * rng.uniform(0.6, 1.0) + (not towards_y) * rng.uniform(-0.25, 0.25)

    hue = (HUES[picked["colour"]] + rng.uniform(-8, 8)) / 360 % 1.0
    saturation, value = rng.uniform(0.55, 1.0), rng.uniform(0.6, 1.0)
    return Scene(
        width=width,
        height=height,
        radius=radius,
        centre=(width / 2 + offset_x * room_x, height / 2 + offset_y * room_y),
        fill=colorsys.hsv_to_rgb(hue, saturation, value),
        shade=colorsys.hsv_to_rgb(hue, saturation, value * 0.55),
        backdrop=colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.0, 0.25), rng.uniform(*BACKGROUNDS[picked["background"]])),
        **picked,
    )


def _outline(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Corners of a shape with corners, around (x, y)."""

    def at(turn: float, r: float) -> tuple[float, float]:
        return x + r * math.sin(2 * math.pi * turn), y - r * math.cos(2 * math.pi * turn)

    if shape == "square":
        half = 0.82 * radius
        return [(x - half, y - half), (x + half, y - half), (x + half, y + half), (x - half, y + half)]
    if shape == "triangle":
        return [at(turn / 3, 1.1 * radius) for turn in range(3)]
    if shape == "star":
        return [at(turn / 10, radius * (1.1 if turn % 2 == 0 else 0.45)) for turn in range(10)]
    if shape == "cross":
        a, b = radius, 0.34 * radius
        corners = [(-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b), (b, a), (-b, a), (-b, b), (-a, b), (-a, -b), (-b, -b)]
        return [(x + dx, y + dy) for dx, dy in corners]
    raise ValueError(f"no outline for shape {shape!r}")


def draw(scene: Scene) -> Image.Image:
    """Draw a scene as an RGB image of `scene.width` x `scene.height` pixels."""
    k = SUPERSAMPLING
    size = (scene.width * k, scene.height * k)
    x, y, radius = scene.centre[0] * k, scene.centre[1] * k, scene.radius * k

    def rgb(colour: tuple[float, float, float]) -> tuple[int, int, int]:
        red, green, blue = (round(255 * channel) for channel in colour)
        return red, green, blue

    mask = Image.new("L", size, 0)
    pen = ImageDraw.Draw(mask)
    if scene.shape in ("circle", "ring"):
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        if scene.shape == "ring":
            hole = 0.52 * radius
            pen.ellipse((x - hole, y - hole, x + hole, y + hole), fill=0)
    else:
        pen.polygon(_outline(scene.shape, x, y, radius), fill=255)

    surface = Image.new("RGB", size, rgb(scene.fill))
    pen = ImageDraw.Draw(surface)
    if scene.texture == "striped":
        step = 8 * k
        for start in range(-size[1], size[0] + size[1], step):
            pen.line((start, 0, start + size[1], size[1]), fill=rgb(scene.shade), width=3 * k)

    picture = Image.new("RGB", size, rgb(scene.backdrop))
    picture.paste(surface, mask=mask)
    return picture.resize((scene.width, scene.height), Image.Resampling.BOX)


def caption(scene: Scene, rng: random.Random, detail: float = 0.4) -> str:
    """Describe a scene: always its colour and shape, and each other attribute with probability `detail`."""

    def said(words: str) -> str:
        return words if rng.random() < detail else ""

    noun = " ".join(word for word in (said(scene.size), said(scene.texture), scene.colour, scene.shape) if word)
    article = "an" if noun[0] in "aeiou" else "a"
    where, backdrop = said(scene.position), said(f"on a {scene.background} background")
    return " ".join(part for part in (article, noun, where, backdrop) if part)
