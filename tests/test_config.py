"""Options: files, defaults, and errors that name file, key, value and remedy."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from tokenlabel.annotate.config import AnnotateConfig, load_config
from tokenlabel.cli import main
from tokenlabel.dataset.format.score_map import MapLayout
from tokenlabel.errors import ConfigError

SHIPPED = ["sample", "nfnet_f6", "efficientnetv2_l"]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_load_by_name_and_path(name: str) -> None:
    path = Path(__file__).parents[1] / "configs" / f"{name}.yaml"
    assert load_config(name) == load_config(f"{name}.yaml") == load_config(str(path))
    header = path.read_text().split("\nmodel:")[0]
    for word in ("teacher" if name != "efficientnetv2_l" else "paper", "result", "command"):
        assert f"# {word}" in header
    assert f"# command  make annotate SPLIT=train{'' if name == 'sample' else ' DATA='}" in header


def test_options_win_over_the_file() -> None:
    config = load_config("nfnet_f6", {"k": 5, "input_size": 288})
    assert (config.model, config.k, config.batch_size) == ("dm_nfnet_f6.dm_in1k", 5, 32)
    assert config.input_size == 288
    assert load_config(None).folder == Path("labels/train")


def test_what_is_stored() -> None:
    views = ("identity",)
    assert load_config(None).layout((2, 3), 1000) == MapLayout(views, (2, 3), 16, 1000, 64, 0.25)
    assert load_config(None).floor == 0.003
    few = load_config(None, {"level": False}).layout((2, 3), 10)
    assert few == MapLayout(views, (2, 3), 10, 10, 10, 0.25, False)
    compact, precise = (load_config(None, {name: True}) for name in ("compact", "precise"))
    assert (compact.step, compact.floor) == (0.25, 0.01)
    assert (precise.step, precise.floor) == (0, 0)
    assert load_config(None, {"compact": True, "floor": 0.02}).floor == 0.02
    with pytest.raises(ConfigError, match="compact and precise exclude each other"):
        load_config(None, {"compact": True, "precise": True})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kk: 5", "kk: unknown key (value 5). Remedy: did you mean 'k'?"),
        ("k: ten", "k: Input should be a valid integer, got 'ten'. Remedy: set k: classes to"),
        ("k: 0", "k: Input should be greater than or equal to 1, got 0. Remedy: set k: "),
        ("precision: fp8", "precision: Input should be 'float32', 'bfloat16' or 'float16'"),
        ("input_size: [[1, 2, 3]]", "input_size: must be a side, or a list of sides and pairs"),
        ("step: 0.01", "step: must be 0 or from 0.0625 to 1, got 0.01. Remedy: set step: -log"),
        ("views: [hflip]", "views: must be [identity] or [identity, hflip], got ['hflip']"),
        ("split: ../x", "split: must be a folder inside `data`, such as train, got '../x'"),
        ("model: ''", "model: String should have at least 1 character, got ''. Remedy: set model"),
        ("device: cpu\nprecision: float16", "precision float16 needs a GPU"),
        ("- k", "must be `key: value` lines, got a list"),
        ("k: [1", "not valid YAML: while parsing a flow sequence"),
        ("k: 5\nseed: 1\nk: 7", "given twice: k. Remedy: keep one"),
        ("? [a, b]\n: 1", "not valid YAML: while constructing a mapping"),
        ("7: 1", "7: unknown key (value 7). Remedy: one of data, split"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML: could not determine"),
    ],
)
def test_faults_name_file_key_value_and_remedy(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(str(path))
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)


def test_all_faults_are_reported_at_once(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("k: 0\nmodle: x")
    with pytest.raises(ConfigError, match=r"(?s)k: .*modle: .*did you mean 'model'"):
        load_config(str(tmp_path / "mine.yaml"))


def test_a_fault_of_an_option_is_not_blamed_on_the_file() -> None:
    with pytest.raises(ConfigError, match=r"^option k: .* got 0"):
        load_config("sample", {"k": 0})


def test_unknown_unreadable_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither a file nor a shipped one .*nfnet_f6.*sample"):
        load_config("nope")
    (tmp_path / "latin.yaml").write_bytes(b"model: \xff")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(str(tmp_path / "latin.yaml"))
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_config(str(tmp_path / "empty.yaml")) == AnnotateConfig()


def test_every_option_is_on_the_command_line() -> None:
    text = CliRunner().invoke(main, ["annotate", "--help"], terminal_width=200).output
    for name, field in AnnotateConfig.model_fields.items():
        assert f"--{name.replace('_', '-')} " in text
        assert field.description, name


@pytest.mark.parametrize(
    ("text", "value"),
    [("64", 64), ("64,96", [64, 96]), ("[64, 96]", [64, 96]), ("[[64, 96]]", [[64, 96]])],
)
def test_sizes_on_the_command_line_are_those_of_the_file(
    tmp_path: Path, text: str, value: object
) -> None:
    (tmp_path / "mine.yaml").write_text(f"input_size: {value}")
    option = next(
        option for option in main.commands["annotate"].params if option.name == "input_size"
    )
    given = option.type.convert(text, option, None)
    assert load_config(None, {"input_size": given}) == load_config(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--k", "many"], "option k: Input should be a valid integer, got 'many'"),
        (["--input-size", "[[1,2,3]]"], "option input_size: must be a side, or a list"),
        (["--input-size", "[1"], "'[1' is not a value"),
        (["--precision", "int4"], "'int4' is not one of 'float32', 'bfloat16', 'float16'"),
        (
            ["--data", "/nowhere"],
            "no images of the split 'train' in /nowhere: it must hold a folder of that name",
        ),
    ],
)
def test_bad_options_end_with_status_2_and_no_traceback(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = CliRunner().invoke(main, ["annotate", "--out", str(tmp_path), *arguments])
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir())
