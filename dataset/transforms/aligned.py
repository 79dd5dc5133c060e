# mypy: allow-subclassing-any
"""`aligned`: the pipelines of other libraries, for images with label maps."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import PIL.Image
from torch import Tensor, nn
from torchvision import transforms as v1
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from . import torchvision as augment
from .albumentations import Albumentations
from .kornia import Kornia
from .timm import TimmAugment

#: Classes of both of torchvision's generations, whose arguments are attributes of the older ones.
_MOVE = frozenset(
    "Resize CenterCrop Pad RandomCrop RandomResizedCrop RandomHorizontalFlip RandomVerticalFlip "
    "RandomRotation RandomAffine RandomPerspective ElasticTransform".split()
)
_NEST = frozenset("Compose RandomApply RandomChoice RandomOrder".split())
_AUTO_AUGMENT = frozenset("AutoAugment RandAugment TrivialAugmentWide".split())
#: Used as they are, on the image alone.
_IMAGE_ONLY = frozenset(
    "PILToTensor ToPILImage ConvertImageDtype Normalize LinearTransformation ColorJitter "
    "Grayscale RandomGrayscale GaussianBlur RandomInvert RandomPosterize RandomSolarize "
    "RandomAdjustSharpness RandomAutocontrast RandomEqualize RandomErasing".split()
)
_TIMM_IMAGE_ONLY = frozenset("ToTensor MaybeToTensor MaybePILToTensor RandomErasing".split())


class ImageOnly(v2.Transform):
    """Runs a function of one image in a pipeline with label maps, which stay as they are.

        blur = torchvision.transforms.GaussianBlur(5)  # of the older ones: takes an image alone
        dataset.transform = v2.Compose([v2.RandomResizedCrop(224), ImageOnly(blur), v2.ToImage()])

    It is for what moves no pixel: changes of colour, blur, noise, erasing, conversions.

    Args:
        function: from a PIL image or tensor [C, H, W] to one of the same size.

    Raises:
        ValueError: when called, if the function returns an image of another size.
    """

    _transformed_types = (PIL.Image.Image, tv_tensors.Image, F.is_pure_tensor)

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """The function of one image."""
        before, image = F.get_size(inpt), self.function(inpt)
        if (after := F.get_size(image)) != before:
            raise ValueError(
                f"ImageOnly is for functions that move no pixel; {_name(self.function)} made an "
                f"image of (h, w) = {after} from one of {before}. Remedy: use the class of "
                "torchvision.transforms.v2 that moves image and map"
            )
        return image

    def extra_repr(self) -> str:
        """The function."""
        return repr(self.function)


def aligned(transform: Any) -> Any:
    """A pipeline that moves label maps with images, from one that takes images alone.

        from timm.data import create_transform

        dataset.transform = aligned(create_transform(224, is_training=True))

    Each transform of `torchvision.transforms` (not v2) and of `timm.data` that moves pixels becomes
    its counterpart in v2, which draws from the same distribution; each that changes colours only
    runs as it is. albumentations' `Compose` and kornia's augmentations become `Albumentations` and
    `Kornia`, also as steps of a `v2.Compose`. Pipelines of v2 and functions of (image, map) are
    returned as they are, but for those of v2 that take no map, such as its `RandAugment`. An
    object that only runs a pipeline, as the presets of torchvision's training scripts, is that
    pipeline. `TokenLabelDataset` does this to its `transform`.

    Args:
        transform: a pipeline, one of its transforms, or None.

    Raises:
        TypeError: no label map can follow one of the transforms; names it and the remedy.
    """
    if isinstance(transform, v2.Compose | v2.RandomApply | v2.RandomChoice | v2.RandomOrder):
        steps = [_step(step) for step in transform.transforms]
        if all(new is old for new, old in zip(steps, transform.transforms, strict=True)):
            return transform
        return _rebuilt(transform, type(transform), steps)
    if isinstance(transform, list | tuple) or type(transform) is nn.Sequential:
        return v2.Compose([_step(step) for step in transform])
    if isinstance(transform, v2.Transform):
        name = type(transform).__name__
        if type(transform) is getattr(v2, name, None):  # a subclass may do more
            if name in _AUTO_AUGMENT:
                return _rebuilt(transform, getattr(augment, name))
            if name == "ToPureTensor":  # it would make a plain tensor of the map
                return ImageOnly(transform)
        return transform
    module = type(transform).__module__
    if module.startswith("albumentations."):
        return Albumentations(transform)
    if module.startswith("kornia."):
        return Kornia(transform)
    if module.startswith(("timm.", "torchvision.transforms.")):
        return _step(transform)
    if transform is not None and _takes(transform, 1) and not _takes(transform, 2):
        call = getattr(type(transform).__call__, "__code__", None)
        if call and call.co_code == _preset.__code__.co_code:
            return aligned(getattr(transform, call.co_names[0]))
        raise TypeError(
            f"a transform gets an image and its map; {_name(transform)} takes an image alone. "
            "Remedy: make it a function of (image, map), or pass the pipeline that it runs"
        )
    return transform


def _preset(self: Any, image: Any) -> Any:
    """What a preset's `__call__` is compiled to, if it runs an attribute of its own and no more."""
    return self.transforms(image)


def _takes(function: Any, count: int) -> bool:
    """Whether a callable has places for so many arguments and needs no more."""
    function = function.forward if isinstance(function, nn.Module) else function
    try:
        inspect.signature(function).bind(*[None] * count)
    except (TypeError, ValueError):  # the second: it does not say
        return False
    return True


def _step(op: Any) -> Any:
    """A transform of one image that takes an image and its map."""
    name, module = type(op).__name__, type(op).__module__
    is_adapter = isinstance(op, v2.Transform | Albumentations | Kornia)
    if is_adapter or module.startswith(("albumentations.", "kornia.")):
        return aligned(op)
    if type(op) is getattr(v1, name, None):
        if name in _NEST:
            return _rebuilt(op, getattr(v2, name), [_step(step) for step in op.transforms])
        if name in _MOVE:
            return _rebuilt(op, getattr(v2, name))
        if name in _AUTO_AUGMENT:
            return _rebuilt(op, getattr(augment, name))
        if name == "ToTensor":
            return ImageOnly(_to_tensor)
        if name in _IMAGE_ONLY:
            return ImageOnly(op)
    if module.startswith("timm.data."):
        if name == "RandomResizedCropAndInterpolation":
            modes = op.interpolation
            modes = modes if isinstance(modes, Sequence) else (modes,)
            crops = [v2.RandomResizedCrop(op.size, op.scale, op.ratio, mode) for mode in modes]
            return v2.RandomChoice(crops) if len(crops) > 1 else crops[0]
        if name in ("RandAugment", "AutoAugment"):
            return TimmAugment(op)
        if name == "ToNumpy":  # what the prefetcher of older versions takes
            return ImageOnly(v1.PILToTensor())
        if name in _TIMM_IMAGE_ONLY:
            return ImageOnly(op)
    if _takes(op, 2) and not _takes(op, 1):  # the image and its map
        return op
    raise TypeError(
        f"a label map must follow each transform of its image; it cannot follow {_name(op)}. "
        "Remedy: if it moves no pixel (colours, blur, noise), wrap it, "
        "tokenlabel.ImageOnly(transform); otherwise use train_transform(), or the classes of "
        "torchvision.transforms.v2"
    )


def _to_tensor(image: Any) -> Tensor:
    """v1's `ToTensor`, which refuses the tensor that a NumPy image has become."""
    array = image.permute(1, 2, 0).numpy() if isinstance(image, Tensor) else image
    tensor: Tensor = v1.functional.to_tensor(array)
    return tensor


def _rebuilt(op: Any, kind: type, steps: list[Any] | None = None) -> Any:
    """A transform of class `kind` with the arguments of `op`, which are attributes of it."""
    names = [*inspect.signature(kind.__init__).parameters][1:]  # type: ignore[misc]
    arguments = {name: getattr(op, name) for name in names if hasattr(op, name)}
    return kind(**arguments if steps is None else {**arguments, "transforms": steps})


def _name(op: Any) -> str:
    kind = op if inspect.isfunction(op) else type(op)
    return f"{kind.__module__}.{kind.__qualname__}"
