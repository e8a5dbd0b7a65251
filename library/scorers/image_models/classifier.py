"""Image classifiers of transformers, such as NSFW detectors, and of timm: how sure they are of one class."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from library.errors import UserError
from library.scorers.image_models.base import IMAGE_MODELS, ImageModel, Loaded, take_choice, take_int, take_required
from library.scorers.image_models.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, take_preprocessing
from library.scorers.image_models.weight_files import (
    config_from_values,
    config_values,
    folder_preprocessing,
    load_transformers,
    read_state_dict,
)
from library.scorers.optional_packages import import_timm

SCORES = ("log_odds", "probability")


def class_score(logits: Tensor, index: int, score: str, *, exclusive: bool) -> Tensor:
    """Logits [N, K] to the log odds of one class against all others [N], or to its probability.

    Log odds grow on where the probability is flat, so that there is a gradient where the classifier is sure.

    Args:
        exclusive: whether the classes share one softmax; if not, or where there is but one, each has a sigmoid of its own.
    """
    odds = logits[:, index]
    if exclusive and logits.shape[1] > 1:
        others = torch.cat([logits[:, :index], logits[:, index + 1 :]], dim=1)
        odds = odds - others.logsumexp(1)
    return odds if score == "log_odds" else odds.sigmoid()


@IMAGE_MODELS.register("classifier")
class Classifier(ImageModel):
    """`AutoModelForImageClassification` of transformers.

    Args:
        config: its configuration. class_index: which class. score: one of SCORES.
    """

    example = "classifier:FOLDER?class=nsfw&score=log_odds"

    def __init__(self, *, config: Mapping[str, Any], class_index: int, score: str, preprocessing: Mapping[str, Any]) -> None:
        super().__init__(preprocessing)
        self.network = transformers.AutoModelForImageClassification.from_config(config_from_values(config))
        self.class_index, self.score = class_index, score

    @classmethod
    def read(cls, argument: str, options: dict[str, str]) -> Loaded:
        network = load_transformers(transformers.AutoModelForImageClassification, argument)
        config: Any = network.config
        names = [config.id2label[index] for index in range(config.num_labels)]
        wanted = take_required(options, "class", "NAME, one of " + ", ".join(names[:20]))
        index = find_class(wanted, names)
        score = take_choice(options, "score", SCORES)
        size = getattr(config, "image_size", 224)
        default = folder_preprocessing(argument, Preprocessing(size=size, mean=IMAGENET_MEAN, std=IMAGENET_STD))
        preprocessing = take_preprocessing(options, default)
        architecture = {"config": config_values(config), "class_index": index, "score": score, "preprocessing": preprocessing}
        return Loaded(architecture, {f"network.{name}": tensor for name, tensor in network.state_dict().items()})

    def predict(self, views: Tensor, prompts: Sequence[str] | None) -> Tensor:
        exclusive = self.network.config.problem_type != "multi_label_classification"
        return class_score(self.network(pixel_values=views).logits, self.class_index, self.score, exclusive=exclusive)


def find_class(wanted: str, names: Sequence[str]) -> int:
    """The number of a class, given its name in any case, or its number. Raises UserError if there is none."""
    lowered = [name.lower() for name in names]
    if wanted.lower() in lowered:
        return lowered.index(wanted.lower())
    if wanted.isdecimal() and int(wanted) < len(names):
        return int(wanted)
    shown = ", ".join(names[:20]) + (" ..." if len(names) > 20 else "")
    raise UserError(f"image model: there is no class {wanted!r}; it can be {shown}, or a number below {len(names)}")


@IMAGE_MODELS.register("timm")
class TimmModel(ImageModel):
    """A model of timm: one class of its classifier; or, with `score` "features", its pooled features, for training on.

    Args:
        name: of the architecture. classes: outputs of the classifier. class_index: which of them.
        score: one of SCORES, or "features".
    """

    example = "timm:resnet18.a1_in1k?class=281&score=log_odds or timm:resnet18?checkpoint=FILE&classes=2&class=1"

    def __init__(
        self,
        *,
        name: str,
        classes: int,
        class_index: int,
        score: str,
        preprocessing: Mapping[str, Any],
    ) -> None:
        super().__init__(preprocessing)
        self.network = import_timm().create_model(name, pretrained=False, num_classes=classes)
        self.class_index, self.score = class_index, score
        if score == "features":
            self.feature_width = self.network.head_hidden_size

    @classmethod
    def read(cls, argument: str, options: dict[str, str]) -> Loaded:
        timm = import_timm()
        score = take_choice(options, "score", (*SCORES, "features"))
        pretrained = take_choice(options, "weights", ("pretrained", "random")) == "pretrained"
        class_index, classes = take_int(options, "class", 0), options.pop("classes", "")
        checkpoint = options.pop("checkpoint", "")
        name = f"local-dir:{argument}" if Path(argument).is_dir() else argument
        try:
            model = timm.create_model(name, pretrained=pretrained and not checkpoint, **({"num_classes": int(classes)} if classes else {}))
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(f"image model: timm cannot make {argument!r} ({' '.join(str(error).split())[:300]})") from error
        if checkpoint:
            load_checkpoint(model, checkpoint)
        if score == "features":
            model.reset_classifier(0)
        elif class_index >= model.num_classes:
            raise UserError(f"image model: class is {class_index}, but timm's {argument} has {model.num_classes} classes, from 0 on")
        architecture = {
            "name": model.pretrained_cfg["architecture"],
            "classes": model.num_classes,
            "class_index": class_index,
            "score": score,
            "preprocessing": take_preprocessing(options, timm_preprocessing(model)),
        }
        return Loaded(architecture, {f"network.{name}": tensor for name, tensor in model.state_dict().items()})

    def predict(self, views: Tensor, prompts: Sequence[str] | None) -> Tensor:
        if self.score == "features":
            return self.network.forward_head(self.network.forward_features(views), pre_logits=True)
        return class_score(self.network(views), self.class_index, self.score, exclusive=True)


def load_checkpoint(model: Any, path: str) -> None:
    """Raises UserError if the file holds the weights of something else."""
    try:
        model.load_state_dict(read_state_dict(path))
    except RuntimeError as error:
        raise UserError(f"image model: {path} does not hold the weights of this model ({' '.join(str(error).split())[:300]})") from error


def timm_preprocessing(model: Any) -> Preprocessing:
    """What a timm model was trained with."""
    config = model.pretrained_cfg
    return Preprocessing(size=config["input_size"][-1], mean=tuple(config["mean"]), std=tuple(config["std"]))
