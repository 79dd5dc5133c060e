"""What a job does: options, their rules, and where they come from (YAML file, command line)."""

import difflib
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from .. import configs
from ..dataset.format.score_map import MapLayout
from ..dataset.format.shard import VIEWS
from ..dataset.storage.remote_path import AnyPath, as_path
from ..errors import ConfigError

#: `data: sample` and `weights: sample` name what the extra `sample` installs.
SAMPLE = "sample"

Name = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1, le=1 << 24)]
Side = Annotated[int, Field(ge=1, le=8192)]
#: What `compact` and `precise` stand for. An option that is given itself wins over them.
_PRESETS: dict[str, dict[str, float]] = {
    "compact": {"floor": 0.01},
    "precise": {"step": 0.0, "floor": 0.0},
}
#: The largest 8-bit code times the step must be as improbable as what is not stored at all.
_LEAST_STEP = 1 / 16


class AnnotateConfig(BaseModel):
    """Options of an annotation job; the same names in YAML files and on the command line.

        config = AnnotateConfig(data="/path/to/imagenet", split="val", model="dm_nfnet_f6", k=10)

    The text below each option is the command line's help. Options up to `compile`, and `device`,
    decide what a job writes; the others, how it runs.
    """

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        validate_default=True,
        use_attribute_docstrings=True,
    )

    data: Name = SAMPLE
    """where the splits are: a folder or URL with a folder for each, of class folders, tars, Parquet
    or Arrow files, or with files as downloaded (ILSVRC2012_img_train.tar, train-*.parquet); or
    files of a split: a tar, a pattern such as s3://bucket/train-{0000..1023}.tar, a list of paths
    (.csv, .jsonl, .parquet); "sample": the embedded 20 photographs"""
    split: Name = "train"
    """which split of `data` to annotate; `{split}` in `data` stands for it"""
    ground_truth: str | None = None
    """file that names the class of each image of a tar without folders: ILSVRC2012's devkit (found
    by itself beside the tar), or a line with name and class for each"""
    out: Name = "labels"
    """folder to write to, or a URL such as s3://bucket/labels; shards go to OUT/SPLIT"""

    model: Name = "tf_efficientnet_lite0"
    """teacher: a timm classification model, or FILE.py:FUNCTION of your own"""
    weights: Name = "pretrained"
    """a checkpoint file, "pretrained" (timm downloads it) or "sample" (the sample's teacher)"""
    num_classes: Count | None = None
    """classes of the checkpoint, if not those of the timm model"""
    class_names: str | None = None
    """text file with one class name per line, in the order of the class ids; an image's ground
    truth is the class that its folder is named after (default: WordNet ids for ImageNet teachers)
    """
    numbering: Literal["auto", "names", "numeric", "string", "natural", "folders"] = "auto"
    """which class a folder is. names: the one it is called like; numeric: its name is the id;
    string, natural: the teacher was trained on as many folders, in this order; folders: none of the
    teacher's, the folders are numbered; auto: the first that is possible but the last"""
    input_size: Side | list[Side | list[Side]] | None = None
    """side of the teacher's input in pixels, to which the whole image is squashed; a list of sides
    for several passes, whose logits are averaged on the grid of the first; a pair in the list is
    [height, width] (default: the checkpoint's or the model's own)"""
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = None
    """how images are resized (default: the checkpoint's or the model's own)"""
    mean: list[float] | None = None
    """of the colour channels R, G, B that images are normalised by, as fractions of white (default:
    the checkpoint's or the model's own)"""
    std: list[float] | None = None
    """likewise, their standard deviation"""
    k: Count = 16
    """classes to store per patch, at most all"""
    step: Annotated[float, Field(ge=0, le=1, strict=False)] = 0.25
    """-log(probability) is rounded to multiples of this; 0 stores float16"""
    floor: Annotated[float, Field(ge=0, lt=1, strict=False)] = 0.003
    """classes less probable than this in a patch are not stored there"""
    residual: Annotated[int, Field(ge=0, le=1 << 16)] = 64
    """classes per image over which the mass that is not stored is spread; 0: evenly over all"""
    level: bool = True
    """store the log-sum-exp of the logits, which gives raw logits back"""
    compact: bool = False
    """a third fewer bytes: floor 0.01"""
    precise: bool = False
    """nothing rounded or dropped: step 0, floor 0"""
    views: list[Literal["identity", "hflip"]] = ["identity"]
    """add hflip to annotate the mirrored image too (for transformers as teachers)"""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """the teacher's autocast precision"""
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 32
    """images per batch"""
    shard_size: Annotated[int, Field(ge=1, le=1 << 20)] = 4096
    """images per shard: the unit of work, retry and resume"""
    channels_last: bool = False
    """NHWC memory format: faster on GPUs for CNNs"""
    compile: bool = False
    """torch.compile the teacher: slow start, then faster"""

    teachers: Annotated[int, Field(ge=0)] = 0
    """teacher actors; 0: one per GPU, or one per machine on a cluster without GPUs"""
    gpus_per_teacher: Annotated[float, Field(gt=0, le=64, strict=False)] = 1.0
    """GPUs that an actor reserves; 0.5 lets two share one"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: GPUs if the cluster has any"""
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads per actor; 0: the machine's cores divided among its actors (another number
    changes a code by one here and there)"""
    window: Annotated[int, Field(ge=1, le=64)] = 3
    """batches decoded ahead of each actor"""
    retries: Annotated[int, Field(ge=0, le=100)] = 3
    """how often a failed shard is retried"""
    max_errors: Annotated[float, Field(ge=0, strict=False)] = 0.01
    """images without a map up to which the job succeeds: a fraction below 1, or a number"""
    ray_address: str | None = None
    """cluster to run on, host:port or auto (default: this machine alone)"""
    rescan: bool = True
    """check for changed image lists when resuming; off trusts the manifest"""

    @field_validator("split")
    @classmethod
    def _one_folder(cls, value: str) -> str:
        if Path(value).is_absolute() or ".." in Path(value).parts or not Path(value).parts:
            raise ValueError("must be a folder inside `data`, such as train")
        return value

    @field_validator("input_size")
    @classmethod
    def _sides_or_pairs(cls, value: Any) -> Any:
        sides = value if isinstance(value, list) else [value]
        if not sides or any(isinstance(side, list) and len(side) != 2 for side in sides):
            raise ValueError("must be a side, or a list of sides and pairs [height, width]")
        return value

    @field_validator("mean", "std")
    @classmethod
    def _three_channels(cls, value: list[float] | None, info: ValidationInfo) -> Any:
        if value is not None and (
            len(value) != 3
            or not all(0 <= one < 256 for one in value)
            or (info.field_name == "std" and not all(value))
        ):
            least = "above 0" if info.field_name == "std" else "of 0 or more"
            raise ValueError(f"must be three numbers {least}")
        return value

    @field_validator("step")
    @classmethod
    def _step_reaches_far_enough(cls, value: float) -> float:
        if 0 < value < _LEAST_STEP:
            raise ValueError(f"must be 0 or from {_LEAST_STEP} to 1")
        return value

    @model_validator(mode="before")
    @classmethod
    def _presets(cls, values: Any) -> Any:
        chosen = [name for name in _PRESETS if values.get(name) is True]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} exclude each other. Remedy: choose one")
        return {**_PRESETS[chosen[0]], **values} if chosen else values

    @field_validator("views")
    @classmethod
    def _ordered_views(cls, value: list[str]) -> list[str]:
        if tuple(value) not in (VIEWS[:1], VIEWS):
            raise ValueError("must be [identity] or [identity, hflip]")
        return value

    @model_validator(mode="after")
    def _precision_of_the_device(self) -> Self:
        if self.device == "cpu" and self.precision == "float16":
            raise ValueError("precision float16 needs a GPU; on a CPU use bfloat16 or float32")
        return self

    def layout(self, grid: tuple[int, int], num_classes: int) -> MapLayout:
        """Shapes and dtypes of what is stored of a teacher's maps, of `grid` (H, W) in cells."""
        k, residual = min(self.k, num_classes), min(self.residual, num_classes)
        views = tuple(self.views)
        return MapLayout(views, grid, k, num_classes, residual, self.step, self.level)

    @property
    def folder(self) -> AnyPath:
        """Folder of the split's shards."""
        return as_path(self.out) / self.split


def load_config(source: str | None, overrides: dict[str, Any] | None = None) -> AnnotateConfig:
    """Read a YAML file and lay the command line's options over it.

    Args:
        source: path of a YAML file, or the name of a shipped one (`nfnet_f6`); None for defaults.
        overrides: options that win over the file.

    Raises:
        ConfigError: naming file, key, value and remedy of every fault.
    """
    given = overrides or {}
    values = _read(source) if source else {}
    try:
        return AnnotateConfig.model_validate({**values, **given})
    except ValidationError as error:
        lines = [_explain(dict(fault), source, given) for fault in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def _read(source: str) -> dict[str, Any]:
    files = resources.files(configs).iterdir()
    shipped = {f.name.removesuffix(".yaml"): f for f in files if f.name.endswith(".yaml")}
    file = Path(source) if Path(source).is_file() else shipped.get(source.removesuffix(".yaml"))
    if file is None:
        raise ConfigError(
            f"no configuration {source!r}: neither a file nor a shipped one "
            f"({', '.join(sorted(shipped))})"
        )
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source}: cannot be read: {error}") from error
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        where = " ".join(str(error).split())
        raise ConfigError(
            f"{source}: not valid YAML: {where}. Remedy: write `key: value`"
        ) from error
    if root is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: must be `key: value` lines, got a {type(values).__name__}")
    # YAML itself takes the last of equal keys without a word.
    keys = [key.value for key, _ in root.value]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ConfigError(f"{source}: given twice: {', '.join(twice)}. Remedy: keep one of them")
    return values


def _explain(fault: dict[str, Any], source: str | None, given: dict[str, Any]) -> str:
    key, got = str(next(iter(fault["loc"]), "")), repr(fault["input"])
    where = f"{source}: {key}" if source and key not in given else f"option {key}"
    fields = AnnotateConfig.model_fields
    rule = fault["msg"].removeprefix("Value error, ")
    if key and key not in fields:
        near = difflib.get_close_matches(key, fields, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"one of {', '.join(fields)}"
        return f"{where}: unknown key (value {got}). Remedy: {hint}"
    if not key:  # a rule on several options
        return f"{source or 'options'}: {rule}"
    text = " ".join(str(fields[key].description).split())
    return f"{where}: {rule}, got {got}. Remedy: set {key}: {text}"
