"""What a job does: options, their rules, and where they come from (YAML file, command line)."""

import difflib
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .. import configs
from ..dataset.format.score_map import MapLayout
from ..dataset.format.shard import VIEWS
from ..errors import ConfigError

#: `data: sample` and `weights: sample` name what the extra `sample` installs.
SAMPLE = "sample"
MAX_FILE_BYTES = 1 << 14
MAX_BRACKETS = 64
_MOST_SHOWN = 200  # characters of a wrong value

Count = Annotated[int, Field(ge=1, le=1 << 24)]
Side = Annotated[int, Field(ge=1, le=8192)]
#: What `compact` and `precise` stand for, where an option is not given itself.
_PRESETS: dict[str, dict[str, float]] = {
    "compact": {"floor": 0.01},
    "precise": {"step": 0.0, "floor": 0.0},
}
#: The last code of 8 bits times a step must be as improbable as what is not stored at all.
_LEAST_STEP = 1 / 16


class AnnotateConfig(BaseModel):
    """Options of an annotation job; the same names in YAML files and on the command line.

    The descriptions are the command line's help texts. Options after `seed of the content` change
    how a job runs, not what it writes.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True)

    data: str = Field(
        SAMPLE,
        description='folder that holds a folder a split; "sample": the embedded 20 photographs',
    )
    split: str = Field("train", description="which folder of `data` to annotate")
    out: str = Field("labels", description="folder to write to; shards go to OUT/SPLIT")

    model: str = Field(
        "tf_efficientnet_lite0",
        description="teacher: a timm classification model, or FILE.py:FUNCTION of your own",
    )
    weights: str = Field(
        "pretrained",
        description='"pretrained" (timm downloads them), a checkpoint file, or "sample"',
    )
    num_classes: Count | None = Field(
        None, description="classes of the checkpoint, where not those of the timm model"
    )
    class_names: str | None = Field(
        None,
        description="text file, a class name a line in order of the ids; ground truth of an image "
        "is the class its folder is named after (default: WordNet ids for ImageNet teachers)",
    )
    input_size: Side | list[Side | list[Side]] | None = Field(
        None,
        description="side of the teacher's input in pixels, to which the whole image is squashed; "
        "a list of sides for several passes, whose logits are averaged on the grid of the first; "
        "a pair in the list is [height, width] (default: the model's own)",
    )
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = Field(
        None, description="how images are resized (default: the model's own)"
    )
    k: Count = Field(16, description="classes to store a patch, at most all")
    step: Annotated[float, Field(ge=0, le=1)] = Field(
        0.25,
        description="nats a code: -log of a probability is rounded to it; 0: stored as float16",
        strict=False,
    )
    floor: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.003,
        description="classes less probable than this in a patch are not stored there",
        strict=False,
    )
    residual: Annotated[int, Field(ge=0, le=1 << 16)] = Field(
        64, description="classes an image by which the mass that is not stored is spread; 0: evenly"
    )
    level: bool = Field(
        True, description="store the log-sum-exp of the logits, which gives raw logits back"
    )
    compact: bool = Field(False, description="a third fewer bytes: floor 0.01")
    precise: bool = Field(False, description="nothing rounded or dropped: step 0, floor 0")
    views: list[Literal["identity", "hflip"]] = Field(
        ["identity"],
        description="add hflip to annotate the mirrored image too (for transformers as teachers)",
    )
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="the teacher's autocast precision"
    )
    batch_size: Annotated[int, Field(ge=1, le=4096)] = Field(32, description="images a batch")
    shard_size: Annotated[int, Field(ge=1, le=1 << 20)] = Field(
        4096, description="images a shard: the unit of work, retry and resume"
    )
    channels_last: bool = Field(False, description="NHWC memory format: faster on GPUs for CNNs")
    compile: bool = Field(False, description="torch.compile the teacher: slow start, then faster")

    teachers: Annotated[int, Field(ge=0)] = Field(
        0, description="teacher actors; 0: one a GPU, or one a machine without any"
    )
    gpus_per_teacher: Annotated[float, Field(gt=0, le=64)] = Field(
        1.0, description="GPUs an actor reserves; 0.5 lets two share one", strict=False
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: GPUs where the cluster has any"
    )
    threads: Annotated[int, Field(ge=0)] = Field(
        0,
        description="CPU threads an actor; 0: the machine's cores shared among its actors (another "
        "number changes a code by one here and there)",
    )
    window: Annotated[int, Field(ge=1, le=64)] = Field(
        3, description="batches decoded ahead of each actor"
    )
    retries: Annotated[int, Field(ge=0, le=100)] = Field(
        3, description="how often a lost shard is tried again"
    )
    max_errors: Annotated[float, Field(ge=0)] = Field(
        0.01,
        description="images without a map that are still a success: a fraction below 1, or a "
        "number",
        strict=False,
    )
    ray_address: str | None = Field(
        None, description="cluster to run on, host:port or auto (default: this machine alone)"
    )
    rescan: bool = Field(
        True, description="look for changed image lists when resuming; off trusts the manifest"
    )

    @field_validator("data", "split", "out", "model", "weights")
    @classmethod
    def _not_empty(cls, value: str) -> str:
        if not value or "\0" in value:
            raise ValueError("must not be empty")
        return value

    @field_validator("split")
    @classmethod
    def _one_folder(cls, value: str) -> str:
        if Path(value).is_absolute() or ".." in Path(value).parts or not Path(value).parts:
            raise ValueError("must be a folder inside `data`, such as train")
        return value

    @field_validator("input_size")
    @classmethod
    def _sides_or_pairs(cls, value: Any) -> Any:
        pairs = (
            [side for side in value if isinstance(side, list)] if isinstance(value, list) else []
        )
        if value == [] or any(len(pair) != 2 for pair in pairs):
            raise ValueError("must be a side, or a list of sides and pairs [height, width]")
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
        """Shapes and dtypes of what is stored of a teacher's maps.

        Args:
            grid: (H, W) of the maps in cells.
            num_classes: of the teacher; no more of them can be stored.
        """
        k, residual = min(self.k, num_classes), min(self.residual, num_classes)
        views = tuple(self.views)
        return MapLayout(views, grid, k, num_classes, residual, self.step, self.level)

    @property
    def folder(self) -> Path:
        """Folder of the split's shards."""
        return Path(self.out) / self.split


def load_config(source: str | None, overrides: dict[str, Any] | None = None) -> AnnotateConfig:
    """Read a YAML file and lay the command line's options over it.

    Args:
        source: path of a YAML file, or the name of a shipped one (`nfnet_f6`); None for defaults.
        overrides: options that win over the file.

    Raises:
        ConfigError: naming file, key, value and remedy of every fault.
    """
    values = _read_yaml(*_find(source)) if source else {}
    merged = {**values, **(overrides or {})}
    try:
        return AnnotateConfig(**merged)
    except ValidationError as error:
        given = overrides or {}
        lines = [_explain(dict(fault), source, given) for fault in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def _find(source: str) -> tuple[str, str]:
    """(name, text) of a configuration file."""
    path = Path(source)
    try:
        if path.is_file():
            if path.stat().st_size > MAX_FILE_BYTES:
                raise ConfigError(f"{source}: a configuration has at most {MAX_FILE_BYTES} bytes")
            return source, path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source}: cannot be read: {error}") from error
    shipped = resources.files(configs)
    names = sorted(entry.name for entry in shipped.iterdir() if entry.name.endswith(".yaml"))
    name = f"{source.removesuffix('.yaml')}.yaml"
    if name in names:
        return name, (shipped / name).read_text(encoding="utf-8")
    raise ConfigError(
        f"no configuration {source!r}: neither a file nor one of the shipped ones "
        f"({', '.join(name.removesuffix('.yaml') for name in names)})"
    )


def _read_yaml(name: str, text: str) -> dict[str, Any]:
    try:
        _refuse_bombs(name, text)
        values = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        where = " ".join(str(error).split())
        raise ConfigError(f"{name}: not valid YAML: {where}. Remedy: write `key: value`") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{name}: must be `key: value` lines, got a {type(values).__name__}")
    return values


def _refuse_bombs(name: str, text: str) -> None:
    """Refuse what makes a small YAML file expand, or take minutes to read."""
    if text.count("[") + text.count("{") > MAX_BRACKETS:
        raise ConfigError(f"{name}: more than {MAX_BRACKETS} brackets. Remedy: write plain lists")
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
        raise ConfigError(f"{name}: YAML aliases (*name) are not used. Remedy: write values out")
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    keys = [key.value for key, _ in root.value] if isinstance(root, yaml.MappingNode) else []
    if twice := sorted({str(key) for key in keys if keys.count(key) > 1}):
        raise ConfigError(f"{name}: given twice: {', '.join(twice)}. Remedy: keep one of them")


def _explain(fault: dict[str, Any], source: str | None, given: dict[str, Any]) -> str:
    path = fault["loc"]
    key = str(path[0]) if path else ""
    where = f"{source}: {key}" if source and key not in given else f"option {key}"
    fields = AnnotateConfig.model_fields
    rule = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, fields, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"one of {', '.join(fields)}"
        return f"{where}: unknown key (value {_shown(fault['input'])}). Remedy: {hint}"
    if not key:
        return f"{source or 'options'}: {rule}"
    got = _shown(fault["input"])
    return f"{where}: {rule}, got {got}. Remedy: set {key}: {fields[key].description}"


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python does not write out a number of thousands of digits
        return "a number too long to show"
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}…"
