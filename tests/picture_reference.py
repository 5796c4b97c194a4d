"""transformers' image processors for Llama 4 and Llama 3.2 Vision on a machine without torchvision.

There is no build of torchvision for torch's CPU wheels, so the three functions of torchvision 0.28 that the processors
call (`transforms/v2/functional`) are restated here. Meta's own code resizes with Pillow, transformers' with PyTorch,
whose rounding differs a little: both can be had.
"""

import importlib
import sys
from enum import Enum
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


class InterpolationMode(Enum):
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    LANCZOS = "lanczos"


def resize_with_pillow(image: Any, size: Any, interpolation: Any = None, antialias: bool = True) -> Any:
    assert interpolation is InterpolationMode.BILINEAR
    height, width = size
    images = [Image.fromarray(one.permute(1, 2, 0).numpy()).resize((width, height), Image.Resampling.BILINEAR)
              for one in image]
    return torch.from_numpy(np.stack([np.asarray(one) for one in images])).permute(0, 3, 1, 2)


def resize(image: Any, size: Any, interpolation: Any = InterpolationMode.BILINEAR, antialias: bool = True) -> Any:
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    return torch.nn.functional.interpolate(image, size=list(size), mode=interpolation.value, align_corners=False,
                                           antialias=antialias)


def pad(image: Any, padding: Any, fill: Any = 0, padding_mode: str = "constant") -> Any:
    left, top, right, bottom = padding
    assert not any(fill if isinstance(fill, list) else [fill])
    return torch.nn.functional.pad(image, (left, right, top, bottom))


def normalize(image: Any, mean: Any, std: Any, inplace: bool = False) -> Any:
    mean, std = (torch.as_tensor(values, dtype=image.dtype).view(-1, 1, 1) for values in (mean, std))
    return image.sub(mean).div_(std)


def processors(monkeypatch: pytest.MonkeyPatch, pillow: bool = False) -> tuple[ModuleType, ModuleType]:
    """The modules of Llama 4's and Llama 3.2's image processors."""
    names = ["torchvision", "torchvision.transforms", "torchvision.transforms.v2"]
    names.append(f"{names[-1]}.functional")
    modules = [ModuleType(name) for name in names]
    for name, module in zip(names, modules, strict=True):
        monkeypatch.setitem(sys.modules, name, module)
    functional: Any = modules[-1]
    functional.InterpolationMode, functional.pad, functional.normalize = InterpolationMode, pad, normalize
    functional.resize = resize_with_pillow if pillow else resize
    setattr(modules[-2], "functional", functional)  # noqa: B010
    backends = importlib.import_module("transformers.image_processing_backends")
    monkeypatch.setattr(backends, "tvF", functional, raising=False)
    monkeypatch.setattr(backends, "pil_torch_interpolation_mapping", {2: InterpolationMode.BILINEAR})
    llama4, mllama = (importlib.import_module(f"transformers.models.{name}.image_processing_{name}")
                      for name in ("llama4", "mllama"))
    for module in (llama4, mllama):  # imported earlier, they would keep an earlier test's functions
        monkeypatch.setattr(module, "tvF", functional)
    return llama4, mllama
