"""What the U-Net of a checkpoint predicts, eps or v. Files seldom say it outright, so every sign is looked for, and the log says which."""

import logging
import re
from collections.abc import Mapping

from torch import Tensor

logger = logging.getLogger(__name__)

_V_BY_NAME = re.compile(r"(?<![a-z])v[-_. ]?pred(iction)?(?![a-z]{2})|768[-_]v(?![a-z])|v[-_]?parameterization")
_SD2_BIAS = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
_SD2_V_STD = 0.09  # ComfyUI's bound between SD2 at 512 pixels (eps) and at 768 (v)


def predicts_v(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], family: str, name: str) -> bool:
    """Whether the U-Net of a single file puts out v: by its marks (the tensor v_pred, ModelSpec), SD2 by its weights, or its name.

    Logs what was found and how to decide otherwise; where signs contradict each other or only the name speaks, as a warning.
    """
    by_tensor = (True, "its tensor v_pred says", True) if "v_pred" in tensors else None
    signs = [sign for sign in (by_tensor, _by_metadata(metadata), _by_weights(tensors, family), _by_name(name, metadata)) if sign]
    if not signs:
        logger.info("%s does not say what it predicts: eps is assumed; give --v_parameterization if it is v", name)
        return False
    is_v, why, sure = signs[0]
    others = [other for other_v, other, _ in signs[1:] if other_v != is_v]
    but = f", though {' and '.join(others)}" if others else ""
    said = (
        f"{name} is taken to predict {'v' if is_v else 'eps'}, as {why}{but}; --{'no-' if is_v else ''}v_parameterization if that is wrong"
    )
    logger.log(logging.WARNING if others or not sure else logging.INFO, "%s", said)
    return is_v


def warn_of_name(name: str, is_v: bool) -> None:
    """Of a diffusers folder, whose scheduler says what is predicted: warn if its name says v and the scheduler eps."""
    if not is_v and _by_name(name, {}):
        logger.warning("%s is taken to predict eps, as its scheduler says, though its name says v; --v_parameterization if it is v", name)


Sign = tuple[bool, str, bool]  # whether it says v, in words, whether it is to be relied on


def _by_metadata(metadata: Mapping[str, str]) -> Sign | None:
    for key in ("modelspec.prediction_type", "modelspec.predict_key"):
        value = re.sub(r"[-_ ]", "", metadata.get(key, "")).lower()
        if value in ("v", "vpred", "vprediction"):
            return True, f"its {key} says", True
        if value in ("epsilon", "eps"):
            return False, f"its {key} says", True
    architecture = metadata.get("modelspec.architecture", "").lower()
    if re.search(r"768-v(?![a-z])|v-?pred", architecture):
        return True, "its modelspec.architecture says", True
    return None


def _by_weights(tensors: Mapping[str, Tensor], family: str) -> Sign | None:
    bias = tensors.get(_SD2_BIAS)
    if family != "sd2" or bias is None or bias.is_meta:
        return None
    is_v = bool(bias.float().std(correction=0) > _SD2_V_STD)
    return is_v, f"weights of SD2 at {'768' if is_v else '512'} pixels look", True


def _by_name(name: str, metadata: Mapping[str, str]) -> Sign | None:
    for text, what in ((name, "its name says"), (metadata.get("modelspec.title", ""), "its modelspec.title says")):
        if _V_BY_NAME.search(re.sub(r"(?<=[a-z0-9])(?=[A-Z])(?<!v)", "_", text).lower()):
            return True, what, False
    return None
