"""Packaging: one import name, light imports, a complete wheel, a CLI that finds .venv."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from tokenlabel.cli import main

ROOT = Path(__file__).parents[1]


def python(code: str, *arguments: str, cwd: Path | None = None) -> str:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("tokenlabel.dataset", ["ray", "timm", "click", "pydantic", "rich"]),
        ("tokenlabel.dataset.transforms.recipe", ["ray", "timm", "click", "pydantic", "rich"]),
        ("tokenlabel.supervise", ["ray", "timm", "click", "pydantic", "rich", "transformers"]),
        ("tokenlabel.annotate.images", ["torch", "ray", "timm", "pydantic", "h5py"]),
        ("tokenlabel.annotate.cluster.pool", ["torch", "timm"]),
        ("tokenlabel.annotate.job", ["torch", "timm"]),
        ("tokenlabel.cli", ["torch", "timm", "ray"]),
    ],
)
def test_imports_are_light(module: str, unwanted: list[str], tmp_path: Path) -> None:
    code = f"import sys, {module}; print([name for name in {unwanted} if name in sys.modules])"
    assert python(code, cwd=tmp_path).strip() == "[]"


def test_public_names(tmp_path: Path) -> None:
    python("from tokenlabel.annotate import AnnotateConfig, Teacher, annotate", cwd=tmp_path)
    python("from tokenlabel import LabelStore, ScoreMap, FormatError", cwd=tmp_path)
    with pytest.raises(AssertionError, match="has no attribute 'nope'"):
        python("import tokenlabel.annotate as a; a.nope", cwd=tmp_path)


def test_wheel_and_sdist_hold_what_they_must(tmp_path: Path) -> None:
    build = ["-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run([sys.executable, *build], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    assert {
        "tokenlabel/cli.py",
        "tokenlabel/py.typed",
        "tokenlabel/configs/sample.yaml",
        "tokenlabel/configs/nfnet_f6.yaml",
        "tokenlabel/dataset/store.py",
        "tokenlabel/annotate/job.py",
        "tokenlabel/inspection/page/assets/page.html",
    } <= names
    assert wheel.name.endswith("-py3-none-any.whl"), "nothing to compile"
    assert not [name for name in names if "test" in name or name.startswith(("dataset", "cli"))]
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert {"configs/sample.yaml", "cli.py", "docs/format.md", "tests/test_shard.py"} <= packed
    # The wheel alone, in an empty folder, reads its own configurations.
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import tokenlabel.cli as c; assert c.__file__.startswith(sys.argv[1]), c.__file__\n"
        "from tokenlabel.annotate.config import load_config; print(load_config('nfnet_f6').model)"
    )
    assert python(code, str(tmp_path / "installed"), cwd=tmp_path).strip() == "dm_nfnet_f6.dm_in1k"


def test_the_script_goes_on_in_the_projects_environment(tmp_path: Path) -> None:
    """As after `make annotate`: the interpreter at hand has none of what the CLI needs."""
    (tmp_path / "cli.py").symlink_to(ROOT / "cli.py")  # resolved: finds ROOT's .venv
    bare = Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}"
    command = [str(bare), "-S", str(ROOT / "cli.py"), "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})
    if (ROOT / ".venv").exists():
        assert done.returncode == 0 and "version" in done.stdout, done.stderr
    else:
        assert "Remedy: run `make setup`" in done.stderr


def test_every_command_is_documented() -> None:
    readme = (ROOT / "README.md").read_text()
    for name in main.commands:
        assert f"cli.py {name}" in readme, name
        text = CliRunner().invoke(main, [name, "--help"]).output
        assert "Examples:" in text and f"python cli.py {name}" in text
