"""What a summary of a huge split costs: time and memory of `inspect-labels`, the process's own.

    python benchmarks/summary.py --labels labels/train

Makes splits of 40,960 and of 1,281,167 rows, ImageNet's training split, from the maps of `--labels`
over and over, with ImageNet's keys, and summarises each, sampled. `--work` keeps them for the next
time; with maps of 10 x 10 patches they take 4 GB and ten minutes.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import IMAGENET_ROWS, SHARD, imagenet_keys, write_split

from tokenlabel.dataset import LabelStore

ROWS = (10 * SHARD, IMAGENET_ROWS)
#: Its own account of its memory: what the system reports to a parent includes the parent's.
CODE = """
import sys
from tokenlabel.cli import main
main(sys.argv[1:], standalone_mode=False)
(line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(line, file=sys.stderr)
"""


def measure(root: Path) -> tuple[float, float]:
    """Seconds, and MB at the most, of a process that prints the summary."""
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", CODE, "inspect-labels", str(root)],
        capture_output=True,
        text=True,
        check=True,
    )
    return time.perf_counter() - begin, int(done.stderr.split()[-2]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--labels", type=Path, default=Path("labels/train"))
    parser.add_argument("--work", type=Path, help="folder for the splits (default: a temporary)")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = options.work or Path(name)
        store = LabelStore(options.labels)
        roots = {count: work / f"{count}-rows" for count in ROWS}
        for count, root in roots.items():
            if not root.exists():
                write_split(root, store, imagenet_keys(count))
        print(f"maps of {store.grid[0]} x {store.grid[1]} patches, k = {store.k}\n")
        print("| rows | seconds, median | MB, most |\n|---|---|---|")
        found: dict[int, list[tuple[float, float]]] = {count: [] for count in ROWS}
        for _ in range(options.rounds):
            for count, root in roots.items():
                found[count].append(measure(root))
        for count, runs in found.items():
            seconds, memory = np.median(runs, 0)[0], max(run[1] for run in runs)
            print(f"| {count:,} | {seconds:.1f} | {memory:.0f} |")


if __name__ == "__main__":
    main()
