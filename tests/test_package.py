"""Packaging: light imports, no circles, a complete wheel, a command that finds .venv."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner

import tokenlabel
from tokenlabel.cli import main

ROOT = Path(__file__).parents[1]
ROOMS = ("annotate", "configs", "dataset", "inspection", "published", "supervise")


def python(code: str, *arguments: object, cwd: Path, **variables: str) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, **variables},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("modules", "unwanted"),
    [
        ("tokenlabel", ["torch", "numpy"]),
        (
            "tokenlabel.dataset, tokenlabel.dataset.transforms.recipe, tokenlabel.supervise",
            ["ray", "timm", "click", "pydantic", "rich", "transformers"],
        ),
        ("tokenlabel.annotate.images", ["torch", "ray", "timm", "pydantic", "h5py"]),
        ("tokenlabel.annotate.job, tokenlabel.annotate.cluster.pool", ["torch", "timm"]),
        ("tokenlabel.cli", ["torch", "timm", "ray"]),
    ],
)
def test_imports_are_light(modules: str, unwanted: list[str], tmp_path: Path) -> None:
    code = f"import sys, {modules}; print([name for name in {unwanted} if name in sys.modules])"
    assert python(code, cwd=tmp_path) == "[]"


def test_public_names() -> None:
    for name in tokenlabel.__all__:
        assert getattr(tokenlabel, name).__module__.startswith("tokenlabel."), name
    assert {*tokenlabel.__all__} < {*dir(tokenlabel)}
    with pytest.raises(AttributeError, match="'tokenlabel' has no attribute 'nope'"):
        tokenlabel.nope  # noqa: B018


def test_a_plain_checkout_shows_its_structure_and_no_circle(tmp_path: Path) -> None:
    """Grimp reads the imports of a folder called tokenlabel; nothing is installed or imported."""
    (tmp_path / "tokenlabel").symlink_to(ROOT)
    code = (
        "import graphlib, grimp, sys\n"
        "graph = grimp.build_graph('tokenlabel', exclude_type_checking_imports=True)\n"
        "imports = {m: graph.find_modules_directly_imported_by(m) for m in graph.modules}\n"
        "graphlib.TopologicalSorter(imports).prepare()  # raises CycleError\n"
        "assert 'tokenlabel' not in sys.modules and 'torch' not in sys.modules\n"
        "print(*imports)"
    )
    seen = python(code, cwd=tmp_path, PYTHONPATH=str(tmp_path)).split()
    assert {"tokenlabel.dataset.store", "tokenlabel.annotate.job"} <= {*seen}


def test_wheel_and_sdist_hold_what_they_must(tmp_path: Path) -> None:
    build = ["-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run([sys.executable, *build], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl"), "nothing to compile"
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if name.startswith("tokenlabel/")}
        assert {name.partition("/")[0] for name in archive.namelist()} == {
            "tokenlabel",
            wheel.name.rsplit("-", 3)[0] + ".dist-info",
        }
        archive.extractall(tmp_path / "installed")
    kept = [path for room in ROOMS for path in (ROOT / room).rglob("*") if path.is_file()]
    kept += [*ROOT.glob("*.py"), ROOT / "py.typed"]
    assert names == {
        f"tokenlabel/{path.relative_to(ROOT).as_posix()}"
        for path in kept
        if "__pycache__" not in path.parts
    }
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
    assert python(code, tmp_path / "installed", cwd=tmp_path) == "dm_nfnet_f6.dm_in1k"


def test_the_script_uses_the_environment_of_the_project(tmp_path: Path) -> None:
    """As after `make annotate`: the interpreter at hand has none of what the CLI needs."""
    (tmp_path / "cli.py").symlink_to(ROOT / "cli.py")  # resolved: finds ROOT's .venv
    bare = Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}"
    command = [str(bare), "-S", str(ROOT / "cli.py"), "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
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
