"""The command line: parse, call one function, print, map errors to exit codes.

Results go to standard output, everything else to standard error. What a verb needs is imported inside it, so that
``trtbuild --help`` answers at once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from trtbuild import __version__
from trtbuild.cli_speculate import speculate
from trtbuild.errors import TrtbuildError
from trtbuild.weight_formats import WEIGHT_FORMATS

_RECIPE = click.argument("recipe", type=click.Path(path_type=Path))
_SET = click.option("--set", "overrides", multiple=True, metavar="A.B=C", help="Change one value of the recipe.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_VERSION = click.option(
    "--version", metavar="V", help="TensorRT-LLM's version or a container's tag [default: the newest container]."
)
_PORT = click.IntRange(0, 65535)
_HOST, _INTERRUPTED = 6, 130


class _Group(click.Group):
    """Maps our errors to one sentence on standard error and the exit code of their class."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run one verb."""
        try:
            return super().invoke(ctx)
        except TrtbuildError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_code)
        except PermissionError as error:
            click.echo(
                f"error: {error.filename}: {error.strerror}; run as a user who may, or change its mode", err=True
            )
            ctx.exit(_HOST)
        except OSError as error:
            if error.filename is None:
                raise
            click.echo(f"error: {error.filename}: {error.strerror}; check this path, and its disk", err=True)
            ctx.exit(_HOST)
        except KeyboardInterrupt:
            click.echo("interrupted; the same command goes on from the last finished step", err=True)
            ctx.exit(_INTERRUPTED)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="trtbuild")
def main() -> None:
    """From a Hugging Face checkpoint to a proven Triton deployment.

    \b
      trtbuild init ~/models/SmolLM2 -o recipe.yaml
      trtbuild build recipe.yaml -o package
      trtbuild serve package

    Exit codes: 0 done, 2 recipe or usage, 3 incompatible, 4 a tool failed, 5 artifact damaged, 6 host lacks something,
    7 a quality gate failed.
    """  # noqa: D301 - click reads the backspace itself, so that the examples keep their lines


@main.command()
@click.argument("model", metavar="MODEL_DIR", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("recipe.yaml"), show_default=True)
@click.option(
    "--format", "weight_format", type=click.Choice(["none", *WEIGHT_FORMATS]), default="fp8", show_default=True
)
@click.option(
    "--runtime", type=click.Choice(["embedded", "trtllm", "trtllm-engine"]), default="embedded", show_default=True
)
@_VERSION
@click.option("--gpu", metavar="GPU", help="The GPU that will serve, for example H100; trtllm-engine needs one.")
def init(model: Path, output: Path, **choices: Any) -> None:
    """Write a commented recipe that fits the model and the runtime, and builds as it is."""
    from trtbuild.init_recipe import Choices, write_recipe

    write_recipe(model, output, Choices(**choices))
    click.echo(output)


@main.command()
@click.argument("recipe", type=click.Path(path_type=Path), required=False)
@_SET
@click.option("--schema", is_flag=True, help="Print the recipe's JSON Schema, for editors, and end.")
def check(recipe: Path | None, overrides: tuple[str, ...], *, schema: bool) -> None:
    """Report everything that is wrong with a recipe; builds nothing."""
    if schema:
        from trtbuild.recipe import json_schema

        click.echo(json.dumps(json_schema(), indent=2))
        return
    if recipe is None:
        raise click.UsageError("name a recipe, or ask for --schema")
    from trtbuild.pipeline import prepare

    prepared = prepare(recipe, overrides)
    for warning in prepared.plan.warnings:
        click.echo(f"warning: {warning}", err=True)
    click.echo(f"{recipe}: no problems")


@main.command()
@_RECIPE
@_SET
@_JSON
def plan(recipe: Path, overrides: tuple[str, ...], *, as_json: bool) -> None:
    """Show every step and value, and where each value came from; builds nothing."""
    from trtbuild.console import plan_text
    from trtbuild.manifest import canonical_json
    from trtbuild.pipeline import prepare

    prepared = prepare(recipe, overrides)
    click.echo(canonical_json(prepared.plan.to_json()) if as_json else plan_text(prepared.plan), nl=not as_json)


@main.command()
@_RECIPE
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Directory of the package [default: RECIPE without .yaml]."
)
@_SET
@click.option("--until", "last", metavar="STEP", help="Stop after this step and print its artifact.")
def build(recipe: Path, output: Path | None, overrides: tuple[str, ...], last: str | None) -> None:
    """Execute a recipe: reuse what is there, build the rest, measure, and write the package."""
    from trtbuild.console import ConsoleReporter
    from trtbuild.pipeline import build as run
    from trtbuild.pipeline import prepare

    out = output if output is not None else Path(recipe.stem)
    _refuse_below_file(out)
    prepared = prepare(recipe, overrides)
    reporter = ConsoleReporter()
    for warning in prepared.plan.warnings:
        reporter.note(f"warning: {warning}")
    built = run(prepared, out, reporter, last=last)
    if built.digest is not None:
        reporter.note(f"package digest {built.digest}")
    click.echo(built.path)


def _refuse_below_file(out: Path) -> None:
    """Refuse an output that could never be made, before hours of work and not after."""
    from trtbuild.errors import Problem, RecipeError

    nearest = next(folder for folder in out.absolute().parents if folder.exists())
    if not nearest.is_dir():
        raise RecipeError([Problem("-o", f"{nearest} is a file, {out} cannot be made below it", "name another place")])


@main.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@_JSON
def inspect(directory: Path, *, as_json: bool) -> None:
    """Print the facts of a checkpoint, an engine or a package."""
    from trtbuild.console import table
    from trtbuild.inspection import flatten, inspect_directory

    found = inspect_directory(directory)
    click.echo(json.dumps(found, indent=2) if as_json else table(flatten(found)))


_PACKAGE = click.argument("package", type=click.Path(path_type=Path))


@main.command()
@_PACKAGE
@click.option("--http-port", type=_PORT, default=8000, show_default=True, help="0 takes a free port.")
@click.option("--grpc-port", type=_PORT, default=8001, show_default=True, help="0 takes a free port.")
@click.option("--metrics-port", type=_PORT, default=8002, show_default=True, help="0 takes a free port.")
@click.option("--address", default="127.0.0.1", show_default=True, help="Where to listen.")
@click.option("--startup-timeout", default=180.0, show_default=True, help="Seconds to wait for the models.")
@click.option("--log", type=click.Path(path_type=Path), help="The server's log [default: PACKAGE-serve.log beside it].")
def serve(package: Path, log: Path | None, startup_timeout: float, **where: Any) -> None:
    """Serve a package with the real Triton, in the foreground, until Ctrl-C."""
    from trtbuild.package import read_manifest, refuse_to_serve_here
    from trtbuild.serving.foreground import serve_package
    from trtbuild.serving.server import TritonServer

    read_manifest(package)
    refuse_to_serve_here(package)
    file = log if log is not None else _log_beside(package, "serve")

    def on_ready(server: TritonServer) -> None:
        click.echo(f"ready: {server.http_url} (HTTP), {server.grpc_url} (gRPC), {server.metrics_url} (metrics)")

    serve_package(package, log=file, on_ready=on_ready, startup_timeout_s=startup_timeout, **where)


@main.command()
@click.argument("prompt")
@click.option(
    "--url", default="127.0.0.1:8001", show_default=True, help="host:port for gRPC, http://host:port for HTTP."
)
@click.option("--model", default="tensorrt_llm", show_default=True, help="The model's name on the server.")
@click.option("--max-tokens", type=int, help="Length of the answer at most.")
@click.option("--temperature", type=float, help="Sample at this temperature; greedy without one.")
@click.option("--seed", type=click.IntRange(min=0), help="Seed of the sampling.")
@click.option("--raw", is_flag=True, help="Send the text as it is, without the chat template.")
@click.option("--no-stream", is_flag=True, help="Wait for the whole answer.")
@_JSON
def ask(prompt: str, url: str, *, raw: bool, no_stream: bool, as_json: bool, **inputs: Any) -> None:
    """Ask a served model one question and show the answer as it comes."""
    from dataclasses import asdict

    from trtbuild.serving.client import ask as send
    from trtbuild.serving.discovery import find_layout

    question = prompt if raw else [{"role": "user", "content": prompt}]
    show = None if as_json else (lambda piece: click.echo(piece, nl=False))
    model, layout = find_layout(url, inputs.pop("model"))
    answer = send(url, question, model=model, layout=layout, streaming=not no_stream, on_text=show, **inputs)
    if as_json:
        described = asdict(answer)
        del described["outputs"]  # the same once more, as it came over the wire
        click.echo(json.dumps(described, indent=2, ensure_ascii=False))
        return
    rate = f"{answer.num_output_tokens} tokens, {answer.tokens_per_second:.1f} tok/s"
    click.echo()
    reason = f"{answer.finish_reason}; " if answer.finish_reason else ""  # layout ensemble does not report one
    click.echo(f"({reason}{rate}, first token after {answer.seconds_to_first_token:.2f} s)", err=True)


@main.command()
@_PACKAGE
@click.option("--served", is_flag=True, help="Also start the server and check its answers and gates.")
@_JSON
def verify(package: Path, *, served: bool, as_json: bool) -> None:
    """Check a package: every byte, its lock, its engine, its model repository, and with --served its answers."""
    from trtbuild.console import ConsoleReporter
    from trtbuild.errors import ArtifactError, GateError
    from trtbuild.verification import checks_json, checks_text, verify_answers, verify_files

    checks = verify_files(package)
    if served and all(check.passed for check in checks):
        reporter = ConsoleReporter()
        checks += verify_answers(package, log=_log_beside(package, "verify"), on_progress=reporter.progress)
        reporter.done()
    click.echo(json.dumps(checks_json(checks), indent=2) if as_json else checks_text(checks))
    failed = [check for check in checks if not check.passed]
    if failed:
        kind = GateError if all(check.gate for check in failed) else ArtifactError
        raise kind(f"{package}: {', '.join(check.name for check in failed)} did not pass", "build the package again")


def _log_beside(package: Path, verb: str) -> Path:
    """A log next to a package: inside, it would change what the manifest covers."""
    whole = package.resolve()
    return whole.with_name(f"{whole.name}-{verb}.log")


@main.command()
@click.argument("source", metavar="SOURCE")
@click.option(
    "--to", "kind", type=click.Choice(["trtllm", "trtllm-engine", "embedded"]), default="trtllm", show_default=True
)
@_VERSION
@click.option("--model", metavar="MODEL", help="The original checkpoint, where SOURCE does not say it.")
@click.option("--gpu", metavar="GPU", help="The GPU that will serve, for example H100.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("recipe.yaml"), show_default=True)
@click.option("--repository", type=click.Path(path_type=Path), help="Write the new model repository there as well.")
@_JSON
def migrate(source: str, output: Path, repository: Path | None, *, as_json: bool, **wanted: Any) -> None:
    """Write a recipe for an older deployment of TensorRT-LLM, and say what becomes of each of its settings.

    SOURCE is a Triton model repository, an engine directory, a model.yaml, or a text (- reads one) with the arguments
    of fill_template or trtllm-build.
    """
    from trtbuild.console import migration_text
    from trtbuild.migrate import new_repository, run

    new_repository.refuse_place(repository)
    done = run.migrate(source, **wanted)
    run.write_recipe(done, output)
    if as_json:
        click.echo(json.dumps(done.to_json() | {"path": str(output)}, indent=2, ensure_ascii=False))
    else:
        click.echo(migration_text(done.rows, done.unset))
    for note in done.notes:
        click.echo(f"note: {note}", err=True)
    for problem in run.remaining_problems(done, output):
        click.echo(f"to mend in {output}: {problem}", err=True)
    click.echo(f"{output}: {done.summary()}", err=True)
    new_repository.write_repository(output, repository, run.open_fields(done))
    click.echo(f"next: {run.next_command(done, output)}", err=True)


@main.command()
@click.option("--versions", is_flag=True, help="Print the tables of TensorRT-LLM's containers and releases instead.")
@_JSON
def doctor(*, versions: bool, as_json: bool) -> None:
    """Compare this host with what each part of trtbuild needs."""
    if versions:
        from trtbuild.versions import versions_json, versions_text

        click.echo(json.dumps(versions_json(), indent=2) if as_json else versions_text())
        return
    from dataclasses import asdict

    from trtbuild.console import table
    from trtbuild.doctor import examine
    from trtbuild.errors import HostError

    findings = examine()
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        click.echo(table((finding.name, finding.status, finding.detail) for finding in findings))
    if missing := [finding.name for finding in findings if finding.status == "missing"]:
        raise HostError(f"this host lacks {', '.join(missing)}", "the table above says what to do")


main.add_command(speculate)
