"""Command line of tokenlabel: `python cli.py COMMAND` or `tokenlabel COMMAND`.

Parses, calls, prints; the work is done in tokenlabel.annotate, tokenlabel.published and
tokenlabel.inspection, which has its commands in a cli.py of its own. Exit status 0: done; 1: done
with too many errors, or a check failed; 2: wrong usage or configuration; 130: stopped by Ctrl-C or
SIGTERM.
"""

import importlib.util
import logging
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

_HERE = Path(__file__).resolve().parent


def _use_project_environment() -> None:
    """Restart in the repository's .venv if this interpreter lacks what is needed."""
    if importlib.util.find_spec("click") and importlib.util.find_spec("tokenlabel"):
        return
    python = _HERE / ".venv" / "bin" / "python"
    if python.exists() and Path(sys.prefix) != _HERE / ".venv":
        os.execv(python, [str(python), str(_HERE / "cli.py"), *sys.argv[1:]])
    sys.exit(
        "tokenlabel is not installed for this Python. Remedy: run `make setup` in the repository, "
        "or `pip install 'tokenlabel[annotate]'`"
    )


if __name__ == "__main__":
    # Until there is something to clean up, Ctrl-C just ends the process, without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _use_project_environment()
elif not importlib.util.find_spec("click"):
    sys.exit("The command line needs more packages. Remedy: pip install 'tokenlabel[annotate]'")

import click
import yaml
from rich.logging import RichHandler

from tokenlabel import __version__
from tokenlabel.annotate.config import AnnotateConfig, load_config
from tokenlabel.dataset.storage.remote_path import as_path
from tokenlabel.errors import ConfigError, TokenLabelError, visible
from tokenlabel.inspection.cli import compare_labels, inspect_labels
from tokenlabel.terminal import VisibleFormatter, console

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from tokenlabel.annotate.report import Report

_INTERRUPTED = 130


class _UsageFailure(click.ClickException):
    exit_code = 2


class _Group(click.Group):
    """Prints errors that a user can act on without a traceback, and sets the exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # as of `… | head`: click ends the process quietly
            raise
        except (TokenLabelError, OSError) as error:
            kind = _UsageFailure if isinstance(error, ConfigError) else click.ClickException
            raise kind(visible(str(error))) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.option("-v", "--verbose", is_flag=True, help="Log more of what happens.")
def main(verbose: bool) -> None:
    """Per-patch soft labels for vision transformers: make them, inspect them."""
    handler = RichHandler(console=console(stderr=True), show_path=False, show_time=False)
    handler.setFormatter(VisibleFormatter("%(message)s"))
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, handlers=[handler])


class _Value(click.ParamType[Any]):
    """A value as it would stand in the YAML file; a list may leave out its outer brackets."""

    def __init__(self, name: str, always_list: bool = False) -> None:
        self.name = name
        self._always_list = always_list

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse the text; the configuration checks type and range."""
        text = str(value)
        whole = text.startswith("[")
        try:
            parts = yaml.safe_load(text if whole else f"[{text}]")
        except yaml.YAMLError:
            self.fail(f"{value!r} is not a value", param, ctx)
        return parts if whole or len(parts) != 1 or self._always_list else parts[0]


def _option(name: str, field: "FieldInfo") -> click.Option:
    """The command-line option of a configuration field."""
    flag, default = f"--{name.replace('_', '-')}", field.default
    shown = ",".join(map(str, default)) if isinstance(default, list) else default
    text = f"{field.description}." + ("" if default is None else f" [{shown}]")
    if field.annotation is bool:
        return click.Option([f"{flag}/--no{flag[1:]}", name], default=None, help=text)
    # The arguments of `Literal[...]`, and of `Literal[...] | None`.
    kinds = [get_args(kind) for kind in (field.annotation, *get_args(field.annotation))]
    choices = next((kind for kind in kinds if kind and isinstance(kind[0], str)), None)
    kind: Any = str
    annotation = str(field.annotation)
    if "list" in annotation:
        kind = _Value("VALUE[,VALUE]", always_list="int" not in annotation)
    elif choices:
        kind = click.Choice(choices)
    elif "int" in annotation or "float" in annotation:
        kind = _Value("NUMBER")
    return click.Option([flag, name], type=kind, help=text)


@main.command(
    params=[
        click.Option(
            ["--config"],
            metavar="FILE",
            help="YAML file with any of the options below, or the name of a shipped one.",
        ),
        *(_option(name, field) for name, field in AnnotateConfig.model_fields.items()),
    ]
)
def annotate(config: str | None, **options: Any) -> None:
    """Annotate a split with a teacher. Finished shards are kept, so a stopped job resumes.

    \b
    Examples:
      python cli.py annotate --config sample --split train
      python cli.py annotate --config nfnet_f6 --data /path/to/imagenet --split val
    """
    from tokenlabel.annotate.job import annotate as run

    given = {name: value for name, value in options.items() if value is not None}
    settings = load_config(config, given)
    _run(partial(run, settings), settings.out, "tokenlabel.annotate.job")


def _run(job: "Callable[..., Report]", out: str, *loggers: str) -> None:
    """Run a job that takes a progress function; print its report and set the exit status."""
    from tokenlabel.annotate.progress import print_report, progress_display

    for name in ("tokenlabel.annotate.plan", *loggers):
        logging.getLogger(name).setLevel(logging.INFO)
    stderr = console(stderr=True)
    try:
        with _stop_on_signals() as stopped, progress_display(stderr) as show:

            def watch(*progress: Any) -> None:
                if stopped.is_set():  # the exception was lost in some callback
                    raise KeyboardInterrupt
                show(*progress)

            report = job(progress=watch)
    except KeyboardInterrupt:
        stderr.print("Stopped. Finished shards are kept; run the same command again to resume.")
        sys.exit(_INTERRUPTED)
    print_report(report, console())
    if not report.ok:
        sys.exit(1)
    click.echo(f"Next: python cli.py inspect-labels {shlex.quote(out)}")


@contextmanager
def _stop_on_signals() -> Iterator[threading.Event]:
    """Turn SIGINT and SIGTERM into KeyboardInterrupt; the event records that one came."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # which alone sets handlers
        yield stopped
        return
    report = sys.unraisablehook

    def stop(*_: object) -> None:
        stopped.set()
        raise KeyboardInterrupt

    def unraisable(what: Any) -> None:
        # Python drops an exception that is raised during a weak reference's callback and prints
        # its stack. The event stops the job a moment later, so there is no error to print.
        if not issubclass(what.exc_type, KeyboardInterrupt):
            report(what)

    before = {which: signal.signal(which, stop) for which in (signal.SIGINT, signal.SIGTERM)}
    sys.unraisablehook = unraisable
    try:
        yield stopped
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)
        sys.unraisablehook = report


@main.command(
    "import-labels",
    params=[
        click.Argument(["labels"], type=click.Path(path_type=Path)),
        click.Option(
            ["--images"],
            required=True,
            help="The split's images: a folder such as /path/to/imagenet/train, or another source "
            "as annotate takes it in `data`.",
        ),
        click.Option(
            ["--out"],
            required=True,
            help="Folder of the new split, or a URL such as s3://bucket/labels/train.",
        ),
        click.Option(
            ["--geometry"],
            default="detect",
            metavar="NAME",
            help="What the teacher of the set was shown. centre:SIZE:CROP_PCT: the centre crop; "
            "squash: all of the image; whole: taken for that, as the published code takes it; "
            "detect: whichever of the first two fits a teacher better. SIZE and :CROP_PCT may be "
            "left out: 32 times the grid's side, and 1. [detect]",
        ),
        click.Option(
            ["--rest"],
            type=click.Choice(["zeros", "none"]),
            default="zeros",
            help="Logits of the classes that the set leaves out. zeros: 0, as the published code "
            "has it; none: these classes get no probability. [zeros]",
        ),
        click.Option(
            ["--num-classes"],
            type=click.IntRange(1),
            default=1000,
            help="Classes of the set's teacher. [1000]",
        ),
        click.Option(["--check"], type=click.IntRange(1), help="Images for detect. [48]"),
        click.Option(["--config"], metavar="FILE", help="Teacher for detect, as in annotate."),
        *(
            _option(name, AnnotateConfig.model_fields[name])
            for name in ("class_names", "numbering", "shard_size", "max_errors")
        ),
    ],
)
def import_labels(
    labels: Path,
    images: str,
    out: str,
    geometry: str,
    rest: str,
    check: int | None,
    config: str | None,
    **options: Any,
) -> None:
    """Make a split of the published label set LABELS, of TokenLabeling or ReLabel.

    LABELS is a folder, a .zip or a .tar with a file CLASS/NAME.pt for each image. It is not
    unpacked. Finished shards are kept, so an import that was stopped resumes. An image without a
    label counts against --max-errors. --geometry detect needs a teacher: --config, or the default.

    \b
    Examples:
      python cli.py import-labels label_top5_train_nfnet.zip \\
          --images /path/to/imagenet/train --out labels/train
    """
    from tokenlabel.published.importer import import_labels as run

    if geometry != "detect" and (check or config):
        raise click.UsageError("--check and --config are for --geometry detect: leave them out")
    folder = as_path(out).absolute()
    given = {name: value for name, value in options.items() if value is not None}
    settings = load_config(None, {"out": str(folder.parent), "split": folder.name, **given})
    chosen: dict[str, Any] = {"geometry": geometry, "rest": rest, "teacher": load_config(config)}
    if check:
        chosen["check"] = check
    job = partial(run, labels, images, settings, **chosen)
    _run(job, out, "tokenlabel.published.importer")


main.add_command(inspect_labels)
main.add_command(compare_labels)


if __name__ == "__main__":
    main(prog_name="python cli.py")
