"""The verb `speculate`; `cli` adds it to the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option(
    "--prompts", type=click.Path(path_type=Path), required=True, help="A .txt (one a line), .jsonl or .parquet."
)
@click.option("--draft", type=click.Path(path_type=Path), help="A draft's directory [default: what the recipe names].")
@click.option("--count", type=click.IntRange(min=1), default=64, show_default=True, help="Prompts at most.")
@click.option("--time-limit", type=click.IntRange(min=1), default=600, show_default=True, help="Seconds for all runs.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The picture [default: RECIPE-speculation.svg].")
@click.option("--write", is_flag=True, help="Write the best setting into the recipe.")
@click.option("--set", "overrides", multiple=True, metavar="A.B=C", help="Change one value of the recipe.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def speculate(*, as_json: bool, **asked: Any) -> None:
    """Measure what speculative decoding brings on your prompts, and say which setting is best, or that none helps."""
    from trtbuild.console import ConsoleReporter
    from trtbuild.speculation_study import Asked, study
    from trtbuild.speculation_text import study_text

    wanted, reporter = Asked(**asked), ConsoleReporter()
    found = study(wanted, reporter)
    reporter.done()
    described = found.to_json() | {"picture": str(wanted.picture)}
    click.echo(json.dumps(described, indent=2, ensure_ascii=False) if as_json else study_text(found))
    click.echo(f"picture: {wanted.picture}", err=True)
