"""What the tensors of LyCORIS, of full differences and of DoRA add to a weight: one change, that a low-rank branch can hold exactly."""

from collections.abc import Mapping

import torch
from torch import Tensor

from library.errors import UserError

# The last part of a key, dots as they are, and what the function is called.
KINDS = {
    r"(dora_scale|lora_magnitude_vector.*)": "DoRA",
    r"hada_(w[12]_[ab]|t[12])": "LoHa",
    r"lokr_(w[12](_[ab])?|t2)": "LoKr",
    r"lora_mid\.weight": "a LoCon with a CP (Tucker) decomposition",
    r"diff": "a full difference of weights",
}


def change_of(part: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    """What a module's tensors add to its weight [out, in] or [out, in, kh, kw] at multiplier 1, in float32.

    Args:
        part: by the last part of their keys (`KINDS`), "down", "up" and "alpha".

    Raises:
        UserError: the tensors are incomplete, or not of this weight's shape.
    """
    shape = tuple(weight.shape)
    part = {name: tensor.float() for name, tensor in part.items()}
    try:
        change = _change(part).reshape(shape)
    except (KeyError, RuntimeError) as error:
        given = {name: tuple(tensor.shape) for name, tensor in part.items()}
        raise UserError(f"its tensors {given} do not make a change of a weight of shape {shape}; the file is malformed") from error
    magnitude = next((tensor for name, tensor in part.items() if name.startswith(("dora_scale", "lora_magnitude_vector"))), None)
    return change if magnitude is None else _decomposed(change, magnitude, weight.detach().float().to(change.device))


def factors_of(change: Tensor) -> tuple[Tensor, Tensor]:
    """down and up whose product is the change: itself and an identity, on the smaller side."""
    if change.ndim == 2 and change.shape[1] <= change.shape[0]:
        return torch.eye(change.shape[1]), change
    return change, torch.eye(len(change)).reshape(len(change), len(change), *[1] * (change.ndim - 2))


def _change(part: Mapping[str, Tensor]) -> Tensor:
    if "diff" in part:
        return part["diff"]
    if "hada_w1_a" in part:  # the element-wise product of two low-rank matrices (FedPara, arXiv 2108.06098)
        change = _product(part, "hada_w1", "hada_t1") * _product(part, "hada_w2", "hada_t2")
        rank = len(part["hada_w1_b"])
    elif "lokr_w1" in part or "lokr_w1_a" in part:  # a Kronecker product (arXiv 2212.10650), scaled only where a factor is low-rank
        first, second = (part[name] if name in part else _product(part, name, "lokr_t2") for name in ("lokr_w1", "lokr_w2"))
        change = torch.kron(first.reshape(*first.shape, *[1] * (second.ndim - first.ndim)), second)
        rank = next((len(part[name]) for name in ("lokr_w2_b", "lokr_w1_b") if name in part), None)
    else:
        down, up = part["down"], part["up"]
        rank = len(down)
        if "lora_mid.weight" in part:
            change = torch.einsum("or,rqhw,qi->oihw", up.flatten(1), part["lora_mid.weight"], down.flatten(1))
        else:
            change = up.flatten(1) @ down.flatten(1)
    return change * (part["alpha"].item() / rank if "alpha" in part and rank else 1.0)


def _product(part: Mapping[str, Tensor], name: str, core: str) -> Tensor:
    """a @ b, or with a core [r, r, kh, kw] between them, whose first factor is then transposed, as LyCORIS has it."""
    first, second = part[f"{name}_a"], part[f"{name}_b"]
    if core in part and not name.endswith("lokr_w1"):
        return torch.einsum("ijkl,jr,ip->prkl", part[core], second, first)
    return first @ second


def _decomposed(change: Tensor, magnitude: Tensor, weight: Tensor) -> Tensor:
    """Of DoRA (arXiv 2402.09353): the changed weight is given this norm, by output or by input as the magnitude's shape says."""
    changed = weight + change
    of_outputs = magnitude.ndim == 1 or magnitude.shape[0] == len(changed) != 1
    dims = [dim for dim in range(changed.ndim) if dim != (0 if of_outputs else 1)]
    norm = torch.linalg.vector_norm(changed, dim=dims, keepdim=True) + torch.finfo(torch.float32).eps
    return changed * (magnitude.reshape(norm.shape) / norm) - weight
