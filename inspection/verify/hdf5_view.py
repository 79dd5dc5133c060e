"""What HDF5 reads in a shard: `python -m tokenlabel.inspection.verify.hdf5_view SHARD` prints JSON.

In a process of its own, since HDF5 can be crashed, hung or made to fill the memory by a file.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ...dataset.format.shard import COLUMNS, ContentDigest, Shard

_BLOCK = 256
_SECONDS = 600


def view_difference(shard: Shard) -> str | None:
    """How HDF5's view of a shard differs from that of its directory; None where it does not."""
    command = [sys.executable, "-m", __name__, str(shard.path)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"HDF5 does not read it within {_SECONDS} s"
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        return f"HDF5 cannot read it: {last or f'it ends with status {done.returncode}'}"
    seen = json.loads(done.stdout)
    for name, value in shard.attrs.items():
        # As text, for NaN is not equal to itself.
        if repr(seen["attrs"].get(name)) != repr(value):
            return f"the attribute {name} is {value!r}, to HDF5 {seen['attrs'].get(name)!r}"
    if seen["sha256"] != shard.attrs["sha256"]:
        return f"HDF5 reads arrays with the sha256 {seen['sha256']}, not {shard.attrs['sha256']}"
    return None


def _seen(path: Path) -> dict[str, Any]:
    digest = ContentDigest()
    with Shard(path) as shard, h5py.File(path, "r", locking=False) as file:
        planes = shard.layout.planes()
        for name in (*planes, *(name for name in COLUMNS if name in shard)):
            dataset = file[name]
            # Of HDF5's own word nothing is taken for which room would be made.
            column = shard.columns.get(name)
            dtype, tail = planes[name] if column is None else (column.dtype, COLUMNS[name][1])
            if (dataset.dtype, dataset.shape) != (dtype, (shard.rows, *tail)):
                raise ValueError(f"{name} is {dataset.dtype} {dataset.shape} to HDF5")
            for start in range(0, shard.rows, _BLOCK if name in planes else shard.rows):
                stop = start + _BLOCK if name in planes else shard.rows
                digest.update(name, dataset[start:stop])
        attrs = {name: _plain(file.attrs[name]) for name in shard.attrs if name in file.attrs}
    return {"attrs": attrs, "sha256": digest.hexdigest()}


def _plain(value: Any) -> Any:
    value = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return value.decode() if isinstance(value, bytes) else value


if __name__ == "__main__":
    print(json.dumps(_seen(Path(sys.argv[1]))))
