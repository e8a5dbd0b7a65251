"""Whole networks in a file: TorchScript and ONNX. The file itself becomes a part of the scorer's file."""

import io
import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from library.errors import UserError
from library.scorers.image_models.base import IMAGE_MODELS, ImageModel, Loaded, take_choice, take_int
from library.scorers.image_models.preprocessing import Preprocessing, take_preprocessing
from library.scorers.image_models.weight_files import read_bytes
from library.scorers.optional_packages import import_onnx2torch, import_optional

SCORES = ("value", "log_odds")
EXTERNAL = b"\n\x08location"  # in the bytes that protobuf writes: the key by which a tensor of ONNX names another file
LAYOUTS = ("nchw", "nhwc")


class NetworkFile(ImageModel):
    """A network that is a file, and one of the numbers that it puts out.

    Args:
        size_in_bytes: of the file.
        output: which of its outputs, when it has several; class_index: which of that output's numbers.
        score: "value" takes the number as it is; "log_odds" is for a network that puts out a probability p, log p - log (1 - p).
        layout: "nchw", or "nhwc" for a network that takes the channels last.
    """

    def __init__(
        self, *, size_in_bytes: int, output: int, class_index: int, score: str, layout: str, preprocessing: Mapping[str, Any]
    ) -> None:
        super().__init__(preprocessing)
        self.register_buffer("file", torch.zeros(size_in_bytes, dtype=torch.uint8))
        self.output, self.class_index, self.score, self.layout = output, class_index, score, layout
        self._network: list[nn.Module] = []  # a list: its weights are in `file`, and not to be saved again

    @classmethod
    def read(cls, argument: str, options: dict[str, str]) -> Loaded:
        content = read_bytes(argument)
        cls.build(content)  # to say now what is wrong with it
        raw = Preprocessing(mean=(0.0,) * 3, std=(1.0,) * 3)
        architecture = {
            "size_in_bytes": len(content),
            "output": take_int(options, "output", 0),
            "class_index": take_int(options, "class", 0),
            "score": take_choice(options, "score", SCORES),
            "layout": take_choice(options, "layout", LAYOUTS),
            "preprocessing": take_preprocessing(options, raw),
        }
        return Loaded(architecture, {"file": torch.from_numpy(np.frombuffer(content, dtype=np.uint8).copy())})

    @staticmethod
    @abstractmethod
    def build(content: bytes) -> nn.Module:
        """The network. Raises UserError if the file holds something else."""

    def predict(self, views: Tensor, prompts: Sequence[str] | None) -> Tensor:
        if not self._network:
            file: Any = self.file
            self._network.append(self.build(file.cpu().numpy().tobytes()).eval())
            for parameter in self._network[0].parameters():
                parameter.requires_grad_(False)  # one by one: a ScriptModule does not take it whole
        network = self._network[0].to(views.device, views.dtype)
        outputs = network(views.permute(0, 2, 3, 1) if self.layout == "nhwc" else views)
        numbers = (outputs if isinstance(outputs, Tensor) else list(outputs)[self.output]).reshape(len(views), -1)
        if self.class_index >= numbers.shape[1]:
            raise UserError(f"image model: class is {self.class_index}, but the network puts out {numbers.shape[1]} numbers, from 0 on")
        value = numbers[:, self.class_index]
        return torch.logit(value, eps=1e-6) if self.score == "log_odds" else value


@IMAGE_MODELS.register("torchscript")
class TorchScript(NetworkFile):
    """A file that torch.jit.save wrote."""

    example = "torchscript:FILE?size=224&class=1"

    @staticmethod
    def build(content: bytes) -> nn.Module:
        try:
            with warnings.catch_warnings(action="ignore"):  # TorchScript is deprecated; files of it are not gone
                return torch.jit.load(io.BytesIO(content), map_location="cpu")
        except (RuntimeError, ValueError) as error:
            raise UserError(f"image model: this is no TorchScript file ({str(error).splitlines()[0]})") from error


@IMAGE_MODELS.register("onnx")
class Onnx(NetworkFile):
    """An ONNX file, made into a network of torch by onnx2torch."""

    example = "onnx:open_nsfw.onnx?size=224&layout=nhwc&bgr=true&mean=0.482,0.459,0.408&std=1&multiply=255&class=1&score=log_odds"

    @staticmethod
    def build(content: bytes) -> nn.Module:
        onnx2torch = import_onnx2torch()
        try:
            model = import_optional("onnx", "onnx").load_from_string(content)
            if EXTERNAL in model.SerializeToString():
                raise UserError("image model: this ONNX file keeps its weights in other files; save it with its weights inside")
            return onnx2torch.convert(model)
        except UserError:
            raise
        except NotImplementedError as error:
            raise UserError(f"image model: onnx2torch does not know an operation of this network ({error})") from error
        except Exception as error:  # protobuf's DecodeError, and whatever onnx makes of a file that is none
            raise UserError(f"image model: this is no ONNX file ({' '.join(str(error).split())[:200]})") from error
