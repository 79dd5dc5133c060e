"""A comparison of two label sets, in a terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table

from ..terminal import escape


def print_comparison(facts: dict[str, Any], console: Console) -> None:
    """What the two sets are, how far they are apart, and the images that differ most."""
    for side in "ab":
        found = facts[side]
        height, width = found["grid"]
        console.print(
            f"[bold]{side.upper()}[/bold] {escape(found['folder'])}: {found['images']:,} images, "
            f"{escape(str(found['teacher']))}, {height} x {width} patches, top {found['k']}"
            + (f"; {found['only_here']:,} images only here" if found["only_here"] else ""),
            soft_wrap=True,
        )
    part = "all" if facts["sampled"] == facts["common"] else "a sample of"
    height, width = facts["grid"]
    console.print(
        f"compared: {part} {facts['sampled']:,} of {facts['common']:,} common images, "
        f"{facts['compared']:,} with both maps, on {height} x {width} patches"
    )
    if not facts["compared"]:
        return
    console.print(f"[bold]same top-1 class[/bold]: {facts['top1_agreement']:.2%} of patches")
    if facts["other_labels"]:
        console.print(f"[yellow]other ground truth[/yellow]: {facts['other_labels']:,} images")
    table = Table(box=None, pad_edge=False)
    table.add_column("nats")
    for name in ("mean", "5%", "25%", "50%", "75%", "95%"):
        table.add_column(name, justify="right", no_wrap=True)
    for title, name in (
        ("KL(A || B) of a patch", "kl_a_b"),
        ("KL(B || A) of a patch", "kl_b_a"),
        ("JS of a patch", "js"),
        ("JS of an image", "js_of_images"),
    ):
        values = facts[name]
        quantiles = (values[q] for q in ("p5", "p25", "p50", "p75", "p95"))
        table.add_row(title, f"{values['mean']:.2g}", *(f"{value:.2g}" for value in quantiles))
    console.print(table)
    if not facts["different"]:
        console.print("no image differs\n")
        return
    console.print("[bold]the images that differ most[/bold] (JS, same top-1)")
    for image in facts["different"]:
        console.print(
            f"  {image['js']:.3f} {image['top1_agreement']:>6.1%}  {escape(repr(image['key']))}: "
            f"mostly {escape(image['name_a'])} in A, {escape(image['name_b'])} in B",
            soft_wrap=True,
        )
    console.print()
