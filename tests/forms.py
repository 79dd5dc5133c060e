"""The same images in every form in which data sets are stored."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import datasets
import webdataset


def pack(path: Path, files: dict[str, bytes], kind: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def folder_form(at: Path, images: dict[str, bytes]) -> str:
    for name, data in images.items():
        path = at / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return str(at)


def tar_of_tars(at: Path, images: dict[str, bytes]) -> str:
    inner: dict[str, bytes] = {}
    for wnid in dict.fromkeys(name.partition("/")[0] for name in images):
        own = {n.partition("/")[2]: data for n, data in images.items() if n.startswith(wnid)}
        inner[f"{wnid}.tar"] = pack(at / "inner.tar", own).read_bytes()
    pack(at / "ILSVRC2012_img_train.tar", inner)
    return str(at)


def webdataset_form(at: Path, images: dict[str, bytes]) -> str:
    """Written by WebDataset itself, with the class in a .cls and a .json."""
    classes = sorted({name.partition("/")[0] for name in images})
    at.mkdir(parents=True, exist_ok=True)
    with webdataset.ShardWriter(f"file:{at}/wds-train-%04d.tar", maxcount=5, verbose=0) as sink:
        for name, data in images.items():
            wnid, _, rest = name.partition("/")
            meta = {"label": wnid, "index": classes.index(wnid)}
            sink.write({"__key__": rest.removesuffix(".JPEG"), "jpg": data, "json": meta})
    return f"{at}/wds-train-{{0000..{(len(images) - 1) // 5:04d}}}.tar"


def parquet_form(at: Path, images: dict[str, bytes]) -> str:
    """As Hugging Face has ImageNet: the class behind each name, and words for classes."""
    wnids = [name.partition("/")[0] for name in images]
    names = [f"{Path(n).stem}_{w}.JPEG" for n, w in zip(images, wnids, strict=True)]
    rows = [{"bytes": d, "path": n} for n, d in zip(names, images.values(), strict=True)]
    label = datasets.ClassLabel(names=sorted(set(wnids)))
    features = datasets.Features({"image": datasets.Image(), "label": label})
    table = datasets.Dataset.from_dict({"image": rows, "label": wnids}, features=features)
    (at / "data").mkdir(parents=True)
    for part in range(2):
        path = at / "data" / f"train-{part:05d}-of-00002.parquet"
        table.shard(2, part, contiguous=True).to_parquet(path, batch_size=3)
    return str(at)


def list_form(at: Path, images: dict[str, bytes]) -> str:
    folder_form(at / "files", images)
    lines = (f"files/train/{name},{name.partition('/')[0]}" for name in images)
    (at / "train.csv").write_text("\n".join(["path,label", *lines]) + "\n")
    return str(at / "{split}.csv")


FORMS: dict[str, Callable[[Path, dict[str, bytes]], str]] = {
    "folder": folder_form,
    "tar of tars": tar_of_tars,
    "webdataset": webdataset_form,
    "parquet": parquet_form,
    "list": list_form,
}
