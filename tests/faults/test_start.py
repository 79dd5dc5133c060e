"""Ray that cannot start: its servers come too late, or its sockets' path is too long."""

from pathlib import Path

import pytest

from tests.jobs import arguments, run

#: Runs when Python starts, as Ray's servers do: this one is late as often as the file has bytes.
LATE = """
import os, sys, time
late = os.environ["LATE"]
if any("agent" in word and word.endswith(".py") for word in sys.argv) and os.path.getsize(late):
    os.truncate(late, os.path.getsize(late) - 1)
    time.sleep(100)
"""


@pytest.mark.parametrize("times", [1, 9], ids=["once", "always"])
def test_a_start_that_times_out_is_tried_again_then_reported_with_its_cause(
    sample: Path, tmp_path: Path, times: int
) -> None:
    (tmp_path / "sitecustomize.py").write_text(LATE)
    (tmp_path / "late").write_bytes(b"x" * times)
    variables = {"PYTHONPATH": str(tmp_path), "LATE": str(tmp_path / "late")}
    done = run(*arguments(sample, tmp_path / "labels"), variables=variables)
    said = " ".join(done.stderr.split())
    assert "Ray did not start (The current node timed out during startup" in said
    assert "Traceback" not in said
    assert done.returncode == (0 if times == 1 else 1), said
    if times > 1:
        end = said.partition("Error: ")[2]
        assert "raylet.err says: " in end and "Timed out waiting for file" in end
        assert "Remedy: stop other work" in end and "StackTrace" not in end


def test_a_temporary_folder_too_long_for_a_socket_has_its_own_remedy(
    sample: Path, tmp_path: Path
) -> None:
    long = tmp_path / ("x" * 90)
    long.mkdir()
    done = run(*arguments(sample, tmp_path / "labels"), variables={"TMPDIR": str(long)})
    said = " ".join(done.stderr.split())
    assert done.returncode == 1 and "trying once more" not in said
    assert (
        f"need a short path for temporary files (107 bytes with Ray's own 70); got {long}" in said
    )
    again = {"TMPDIR": str(long), "RAY_TMPDIR": "/tmp"}
    assert run(*arguments(sample, tmp_path / "labels"), variables=again).returncode == 0
