"""The teacher: pictures in, the top-k logits of every patch out."""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenlabel.annotate.dense import TOLERANCE, dense_form
from tokenlabel.annotate.errors import TeacherError
from tokenlabel.annotate.model import PRETRAINED, build_model, class_names
from tokenlabel.annotate.preprocess import Images, resolve_preprocessing
from tokenlabel.annotate.weights import weights_digest

VIEWS = ("identity", "hflip")
_PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FLOAT16_MAX = float(torch.finfo(torch.float16).max)

_log = logging.getLogger(__name__)


class TeacherOutput(NamedTuple):
    """What a teacher says of a batch of B pictures: V views, an [H, W] grid, K of C classes kept.

    Attributes:
        scores: float16 [B, V, H, W, K], raw logits, descending.
        classes: int32 [B, V, H, W, K], the classes of the scores.
        rest: float16 [B, V, H, W], log-sum-exp of all other logits; -inf if there are none.
        top5: int64 [B, min(5, C)], best classes of the picture as a whole (identity view only).
        mass: float32 [B], probability of the kept classes, averaged over views and patches; NaN
            if logits are not finite (float16 can overflow inside a network).
    """

    scores: Tensor
    classes: Tensor
    rest: Tensor
    top5: Tensor
    mass: Tensor


class Teacher:
    """A timm classifier that labels every patch of a picture.

    Args:
        model: timm's name of the model, or a timm model, which then belongs to the teacher: it is
            put into eval mode, in float32 and on the device, with the weights and classes it has.
        weights: "pretrained" (timm downloads them), "sample", or the path of a checkpoint.
        num_classes: Classes of the checkpoint, if not the model's default.
        input_size: Side or (h, w) of the pictures in pixels; default: what timm tests it at.
        k: Classes kept for each patch.
        views: "identity", then perhaps "hflip" to annotate the mirrored picture too; that map is
            in the coordinates of the mirrored picture.
        precision: "float32", or "bfloat16" or "float16" for autocast of the feature extractor.
            Classifier and softmax are computed in float32 always.
        channels_last: Whether pictures and weights are laid out channels last.
        compile: Whether the feature extractor is compiled.
        device: A torch device, or "auto": CUDA where there is one.
        interpolation: How pictures are resized (Pillow's name); default: the model's own.
        mean, std: Of the colour channels, as a share of white; default: the model's own.

    Attributes:
        grid: (H, W) of the map.
        rule: How the map is derived, see `tokenlabel.annotate.dense`.
        exact: Whether the mean of the map equals the teacher's answer for the whole picture.
        weights_digest: Hex SHA-256 of the weights.
        class_names: WordNet ids of the classes, or None if they are not known.

    Raises:
        TeacherError: The teacher cannot be built as asked, or has no faithful per-patch form.
    """

    def __init__(
        self,
        model: str | nn.Module,
        *,
        weights: str = PRETRAINED,
        num_classes: int | None = None,
        input_size: int | tuple[int, int] | None = None,
        k: int = 10,
        views: Sequence[str] = VIEWS[:1],
        precision: str = "float32",
        channels_last: bool = False,
        compile: bool = False,
        device: str = "auto",
        interpolation: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        self.views = tuple(views)
        if self.views not in (VIEWS[:1], VIEWS):
            raise _wrong("views", "[identity] or [identity, hflip]", list(views), "identity first")
        if precision not in _PRECISIONS:
            raise _wrong("precision", f"one of {', '.join(_PRECISIONS)}", precision, "float32")
        self.precision, self.device = precision, _device(device)
        size = (input_size, input_size) if isinstance(input_size, int) else input_size
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise _wrong("input_size", "a side or (h, w) in pixels", input_size, "leave it out")

        self.model: Any
        if isinstance(model, str):
            self.name = model
            self.model = build_model(model, weights, num_classes, size)
            self.class_names = class_names(self.model, weights)
        elif weights != PRETRAINED or num_classes not in (None, getattr(model, "num_classes", 0)):
            rule = "those of the model that is passed in"
            raise _wrong("weights and num_classes", rule, (weights, num_classes), "leave them out")
        else:
            cfg = getattr(model, "pretrained_cfg", {})
            self.name = cfg.get("architecture") or type(model).__name__
            self.model = model
            self.class_names = class_names(self.model, None)
        self.weights_digest = weights_digest(self.model)
        self._preprocessing = resolve_preprocessing(self.model, size, interpolation, mean, std)
        self.input_size, self.interpolation, self.mean, self.std = self._preprocessing

        self._memory = torch.channels_last if channels_last else torch.contiguous_format
        self.model.eval().requires_grad_(False)
        self.model.to(self.device, torch.float32, memory_format=self._memory)
        if self.device.type == "cuda":
            # The choice of algorithm, and with it the last bits, must not hang on timings.
            torch.backends.cudnn.benchmark = False
            torch.backends.cudnn.deterministic = True
        self._dense = dense_form(self.model, self.name, self.input_size)
        self.grid, self.rule, self.exact = self._dense.grid, self._dense.rule, self._dense.exact
        self.num_classes, self.k = int(self.model.num_classes), k
        if not 1 <= k <= self.num_classes:
            raise _wrong("k", f"1 to the {self.num_classes} classes of {self.name}", k, "k: 1")
        self._extract: Callable[[Tensor], Tensor] = self.model.forward_features
        if compile:
            # A graph for each batch size. With dynamic shapes, the batches before would decide
            # which graph a batch meets, and with it the last bits.
            self._extract = torch.compile(self.model.forward_features, dynamic=False)
        _log.info("%s: %dx%d patches, %s", self.name, *self.grid, self.rule)

    def __call__(self, images: Images) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores, classes and rest of `annotate`."""
        return self.annotate(images)[:3]

    @torch.inference_mode()
    def annotate(self, images: Images) -> TeacherOutput:
        """Label every patch of a batch of whole pictures; does not wait for a GPU to finish.

        Args:
            images: uint8 [B, h, w, 3] RGB, squashed to `input_size`; read-only arrays are fine.

        Raises:
            ValueError: `images` has another dtype or shape.
        """
        pixels = self._preprocessing.normalise(images, self.device)
        features = self._features(pixels)
        top5 = self._dense.pooled(features).topk(min(5, self.num_classes)).indices
        maps = [self._top(self._dense(features))]
        if "hflip" in self.views:
            maps.append(self._top(self._dense(self._features(pixels.flip(-1)))))
        scores, classes, rest = (torch.stack(parts, 1) for parts in zip(*maps, strict=True))
        kept = scores.logsumexp(-1)
        mass = (kept - torch.logaddexp(kept, rest)).exp().mean((1, 2, 3))
        scores = scores.clamp(-_FLOAT16_MAX, _FLOAT16_MAX)
        rest = rest.clamp(max=_FLOAT16_MAX)  # but -inf stays: nothing is left
        return TeacherOutput(scores.half(), classes.int(), rest.half(), top5, mass)

    @torch.inference_mode()
    def check(self, images: Images) -> float:
        """Return how far the mean of the map is from the pooled logits, at most, on a batch.

        Raises:
            TeacherError: Logits are not finite, or the two differ although the form is exact.
        """
        features = self._features(self._preprocessing.normalise(images, self.device))
        pooled = self._dense.pooled(features)
        error = float((self._dense(features).mean((1, 2)) - pooled).abs().max())
        scale = float(pooled.abs().max())
        if not math.isfinite(error):
            raise TeacherError(
                f"Logits must be finite; those of {self.name} in {self.precision} are not. "
                "Remedy: precision: bfloat16 or float32, and weights that are not damaged."
            )
        if self.exact and error > TOLERANCE * scale:
            raise TeacherError(
                f"The mean of the patch logits must equal the pooled logits within {TOLERANCE:g} "
                f"of the largest; for {self.name} they differ by {error:g} of {scale:g}. "
                "Remedy: another teacher; please report this one."
            )
        return error

    def preprocessing(self) -> dict[str, Any]:
        """Return how pictures are made ready, as JSON-able values."""
        return self._preprocessing.as_dict()

    def _features(self, pixels: Tensor) -> Tensor:
        pixels = pixels.contiguous(memory_format=self._memory)
        dtype = _PRECISIONS[self.precision]
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            features = self._extract(pixels)
        return features.float()

    def _top(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the top-k and the log-sum-exp of the others; overwrites `logits`."""
        scores, classes = logits.topk(self.k)
        # Not as the difference of two log-sum-exps, which cancels where the top-k have it all.
        rest = logits.scatter_(-1, classes, -torch.inf).logsumexp(-1)
        return scores, classes, rest


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except Exception as error:  # torch asserts for a missing CUDA, raises for a bad name
        raise _wrong("device", f"one that is there ({error})", name, "device: auto") from error
    return device


def _wrong(option: str, rule: str, value: object, remedy: str) -> TeacherError:
    return TeacherError(f"{option} must be {rule}; got {value!r}. Remedy: {remedy}.")
