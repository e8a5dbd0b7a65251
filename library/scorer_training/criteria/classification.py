"""Criteria that learn which class a picture is of, or which tags it has."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from library.errors import UserError
from library.scorer_training.criteria.base import CRITERIA, Criterion
from library.scorer_training.criteria.metrics import balanced_accuracy, mean_average_precision, micro_f1, top_k_accuracy
from library.scorers.heads import HeadSpec
from library.settings.option_values import did_you_mean

LABEL_SMOOTHING = 0.1  # Szegedy et al., arXiv 1512.00567
ASL_POSITIVE_GAMMA, ASL_NEGATIVE_GAMMA, ASL_MARGIN = 1, 4, 0.05
SHOWN_CLASSES = 8


def choose_target_class(name: str, classes: tuple[str, ...], options: Mapping[str, Any]) -> str:
    """The class or tag whose log odds are the score: as asked for, or the first.

    Raises:
        UserError: there is no such class.
    """
    chosen = options.get("target_class") or classes[0]
    if chosen not in classes:
        some = ", ".join(classes[:SHOWN_CLASSES]) + (f" and {len(classes) - SHOWN_CLASSES} more" if len(classes) > SHOWN_CLASSES else "")
        raise UserError(f"dataset {name} has no target_class {chosen!r}{did_you_mean(chosen, classes)}; it has {some}")
    return chosen


@CRITERIA.register("classification")
class Classification(Criterion):
    """Cross entropy against the class, of which a tenth is spread over all classes (label smoothing, arXiv 1512.00567).

    Metrics: `top1` and `top5`, the share of pictures whose class is the likeliest or among the five likeliest; `balanced`, the mean of
    top1 over classes, which tells more where classes are uneven.
    """

    target = "label"
    selection = "top1"

    def make_head(self, name: str, targets: Tensor, classes: tuple[str, ...], options: Mapping[str, Any]) -> HeadSpec:
        if len(classes) < 2 or len(targets.unique()) < 2:
            only = classes[int(targets[0])] if classes else ""
            raise UserError(f"all {len(targets)} training pictures of dataset {name} are of class {only!r}; take pictures of two at least")
        target_class = choose_target_class(name, classes, options)
        return self._head(name, options, readout="class", outputs=len(classes), classes=classes, target_class=target_class)

    def losses(self, outputs: Tensor, targets: Tensor, head: HeadSpec) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="none", label_smoothing=LABEL_SMOOTHING)

    def metrics(self, outputs: Tensor, targets: Tensor, head: HeadSpec) -> dict[str, float]:
        return {
            "top1": top_k_accuracy(outputs, targets, 1),
            "top5": top_k_accuracy(outputs, targets, 5),
            "balanced": balanced_accuracy(outputs, targets),
        }


@CRITERIA.register("multilabel")
class Multilabel(Criterion):
    """Binary cross entropy of every tag, averaged over the tags.

    Metrics: `map`, the average precision averaged over the tags that occur, and `f1` over all pictures and tags at even odds.
    """

    target = "tags"
    selection = "map"

    def make_head(self, name: str, targets: Tensor, classes: tuple[str, ...], options: Mapping[str, Any]) -> HeadSpec:
        if not classes:
            raise UserError(f"dataset {name} has no tags that are frequent enough to learn; give more pictures with tags")
        target_class = choose_target_class(name, classes, options)
        if (targets == targets[:1]).all():
            raise UserError(f"all {len(targets)} training pictures of dataset {name} have the same tags; take pictures that differ")
        return self._head(name, options, readout="tag", outputs=len(classes), classes=classes, target_class=target_class)

    def losses(self, outputs: Tensor, targets: Tensor, head: HeadSpec) -> Tensor:
        return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").mean(-1)

    def metrics(self, outputs: Tensor, targets: Tensor, head: HeadSpec) -> dict[str, float]:
        return {"map": mean_average_precision(outputs, targets), "f1": micro_f1(outputs, targets)}


@CRITERIA.register("multilabel_asl")
class AsymmetricMultilabel(Multilabel):
    """The asymmetric loss (Ridnik et al., arXiv 2009.14119) of every tag, averaged over the tags, for many rare and forgotten tags.

    -y (1 - p) log p - (1 - y) q^4 log(1 - q), where q = max(p - 0.05, 0): absent tags that are easy count for little, those
    below 5 % for nothing, and so do those at nearly 100 %, which were probably forgotten by whoever tagged.
    """

    def losses(self, outputs: Tensor, targets: Tensor, head: HeadSpec) -> Tensor:
        present = outputs.sigmoid()
        shifted = (present - ASL_MARGIN).clamp_min(0)
        positive = (-outputs).sigmoid() ** ASL_POSITIVE_GAMMA * F.logsigmoid(outputs)
        negative = shifted**ASL_NEGATIVE_GAMMA * (-shifted).log1p()
        return -(targets * positive + (1 - targets) * negative).mean(-1)
