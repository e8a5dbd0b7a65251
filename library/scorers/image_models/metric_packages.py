"""Scores of the packages pyiqa and imscore, where the user has installed them. A scorer file holds their name, not their weights.

Licences: pyiqa is under PolyForm Noncommercial 1.0.0 and the S-Lab licence; imscore under MIT. The weights that they fetch have their own.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from library.errors import UserError
from library.scorers.image_models.base import IMAGE_MODELS, ImageModel, Loaded, take_int
from library.scorers.image_models.preprocessing import Preprocessing, take_preprocessing
from library.scorers.optional_packages import import_optional, import_torchvision

RAW = Preprocessing(mean=(0.0,) * 3, std=(1.0,) * 3)


@IMAGE_MODELS.register("pyiqa")
class PyiqaMetric(ImageModel):
    """A no-reference metric of pyiqa, its sign turned where lower is better.

    Args:
        metric: one of `pyiqa.list_models(metric_mode="NR")`.
    """

    example = "pyiqa:topiq_iaa"

    def __init__(self, *, metric: str, preprocessing: Mapping[str, Any]) -> None:
        super().__init__(preprocessing)
        import_torchvision()
        pyiqa = import_optional("pyiqa", "pyiqa")
        known = pyiqa.list_models(metric_mode="NR")
        if metric not in known:
            raise UserError(f"image model: pyiqa has no metric {metric!r} that judges a picture alone; it has {', '.join(known)}")
        self._network: list[nn.Module] = [pyiqa.create_metric(metric, as_loss=True, device="cpu")]  # a list: not ours to save
        self.sign = -1.0 if self._network[0].lower_better else 1.0

    @classmethod
    def read(cls, argument: str, options: dict[str, str]) -> Loaded:
        return Loaded({"metric": argument, "preprocessing": take_preprocessing(options, RAW)}, {})

    def predict(self, views: Tensor, prompts: Sequence[str] | None) -> Tensor:
        return self.sign * self._network[0].to(views.device)(views).reshape(len(views))


@IMAGE_MODELS.register("imscore")
class ImscoreModel(ImageModel):
    """A scorer of imscore.

    Args:
        name: `module.Class` within imscore, such as `pickscore.PickScorer`.
        source: what its `from_pretrained` takes, a folder or a repository; empty to make it without.
        class_index: which number, where it puts out several.
    """

    example = "imscore:imreward.ImageReward?from=RE-N-Y/ImageReward"

    def __init__(self, *, name: str, source: str, class_index: int, preprocessing: Mapping[str, Any]) -> None:
        super().__init__(preprocessing)
        import_torchvision()
        module_name, _, class_name = name.partition(".")
        module = import_optional(f"imscore.{module_name}.model", "imscore")
        scorer_class: Any = getattr(module, class_name, None)
        if not hasattr(scorer_class, "score"):
            scorers = [key for key, value in vars(module).items() if hasattr(value, "score") and value.__module__ == module.__name__]
            raise UserError(f"image model: imscore.{module_name} has no scorer {class_name!r}; it has {', '.join(scorers)}")
        network = scorer_class.from_pretrained(source) if source else scorer_class()
        self._network: list[Any] = [network.eval().requires_grad_(False)]
        parameter = inspect.signature(network.score).parameters.get("prompts")
        self.uses_prompt = parameter is not None and parameter.default is parameter.empty
        self.class_index = class_index

    @classmethod
    def read(cls, argument: str, options: dict[str, str]) -> Loaded:
        source, class_index = options.pop("from", ""), take_int(options, "class", 0)
        architecture = {"name": argument, "source": source, "class_index": class_index, "preprocessing": take_preprocessing(options, RAW)}
        return Loaded(architecture, {})

    def predict(self, views: Tensor, prompts: Sequence[str] | None) -> Tensor:
        scores = self._network[0].to(views.device).score(views, list(prompts) if prompts is not None else [""] * len(views))
        return scores.reshape(len(views), -1)[:, self.class_index]
