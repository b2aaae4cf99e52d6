"""From a checkpoint to a package: convert, pull."""

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import click

from iotd.cli.options import JSON
from iotd.cli.show import extra, progress, quality_lines

if TYPE_CHECKING:
    from iotd.convert.convert import Calibration
    from iotd.convert.shortlist import Choice
    from iotd.model.package import Manifest


RECIPE = click.option(
    "--recipe",
    type=click.Choice(["int4", "int4-64", "int4-128", "int8", "fp32"]),
    default="int4",
    show_default=True,
    help="Of the weights: bits, and how many of them share a scale. Smaller blocks are truer, and larger to read.",
)
CALIBRATE = click.option(
    "--calibrate",
    type=click.Choice(["texts", "none"]),
    help="By texts, 4-bit weights are rounded so that what the model says changes least: minutes; the default for a "
    "checkpoint. With none each goes to the nearest level: seconds, and several times as far from the original.",
)
CALIBRATION = click.option(
    "--calibration",
    "own",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Lines as the context has them, to calibrate by beside the texts that iotd brings.",
)
LANGUAGES = click.option(
    "--languages",
    metavar="CODES",
    help="Answers are made of words of these languages alone, such as en,de: less memory, faster. All by default.",
)
TEXTS = click.option(
    "--texts",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    multiple=True,
    help="A text file: answers are made of the words in it alone, or else letter by letter. Repeatable.",
)
NO_VISION = click.option("--no-vision", is_flag=True, help="Leave out the vision tower: text only.")


@click.command()
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path), metavar="[CHECKPOINT] OUT")
@RECIPE
@NO_VISION
@click.option(
    "--random",
    "size",
    metavar="SIZE",
    help="Random weights of this size (0.8b, 2b, 4b, 9b, tiny) in CHECKPOINT's place.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the random weights.")
@CALIBRATE
@CALIBRATION
@LANGUAGES
@TEXTS
@JSON
def convert(
    paths: tuple[Path, ...],
    recipe: str,
    no_vision: bool,
    size: str | None,
    seed: int,
    calibrate: str | None,
    own: Path | None,
    languages: str | None,
    texts: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Turn a checkpoint into a model package.

    CHECKPOINT is a folder as save_pretrained of transformers writes it; OUT the package's folder, for `model.path`.
    What is interrupted goes on where it was when it is started again: until then a folder beside OUT keeps it.
    """
    if len(paths) != (1 if size else 2):
        raise click.UsageError("give CHECKPOINT and OUT" if not size else "with --random give OUT alone")
    with extra("convert"):
        from iotd.convert.checkpoint import Checkpoint
        from iotd.convert.convert import convert_checkpoint, convert_random, n_steps
        from iotd.convert.random import N_PARAMETERS
    if size and size not in N_PARAMETERS:
        raise click.BadParameter(f"{size!r} is none of {', '.join(N_PARAMETERS)}", param_hint="--random")
    n_elements = N_PARAMETERS[size] if size else Checkpoint(paths[0]).n_elements
    shortlist = _shortlist(languages, texts)
    calibration = _calibration(calibrate or ("none" if size else "texts"), own)
    options = Options(recipe=recipe, vision=not no_vision, shortlist=shortlist, calibration=calibration)
    with progress("converting", n_steps(n_elements, recipe, calibration), as_json) as advance:
        if size:
            made = convert_random(size, paths[0], **options, seed=seed, progress=advance)
        else:
            made = convert_checkpoint(paths[0], paths[1], **options, progress=advance)
    _tell_package(paths[-1], made, as_json)


@click.command()
@click.argument("repo")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--revision", help="Branch, tag or commit; the newest otherwise.")
@RECIPE
@NO_VISION
@CALIBRATE
@CALIBRATION
@LANGUAGES
@TEXTS
@JSON
def pull(
    repo: str,
    out: Path,
    revision: str | None,
    recipe: str,
    no_vision: bool,
    calibrate: str | None,
    own: Path | None,
    languages: str | None,
    texts: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Fetch a checkpoint from the model hub and convert it.

    REPO is its name there, such as Qwen/Qwen3.5-0.8B; OUT the package's folder, for `model.path`.
    """
    with extra("convert"):
        from iotd.convert.checkpoint import Checkpoint
        from iotd.convert.convert import convert_checkpoint, n_steps
        from iotd.convert.hub import fetch
    shortlist, calibration = _shortlist(languages, texts), _calibration(calibrate or "texts", own)
    options = Options(recipe=recipe, vision=not no_vision, shortlist=shortlist, calibration=calibration)
    folder, source = fetch(repo, revision)
    steps = n_steps(Checkpoint(folder).n_elements, recipe, calibration)
    with progress("converting", steps, as_json) as advance:
        made = convert_checkpoint(folder, out, **options, source=source, progress=advance)
    _tell_package(out, made, as_json)


class Options(TypedDict):
    """What `convert` and `pull` have in common."""

    recipe: str
    vision: bool
    shortlist: "Choice | None"
    calibration: "Calibration | None"


def _calibration(by: str, own: Path | None) -> "Calibration | None":
    from iotd.convert.convert import Calibration
    from iotd.convert.samples import read_lines

    if by == "none":
        if own is not None:
            raise click.UsageError("--calibration needs --calibrate texts")
        return None
    return Calibration(own=tuple(read_lines(own)) if own is not None else ())


def _shortlist(languages: str | None, texts: tuple[Path, ...]) -> "Choice | None":
    from iotd.convert import shortlist

    if languages and texts:
        raise click.UsageError("give --languages or --texts: each says which words are kept")
    if languages:
        return partial(shortlist.of_languages, languages=shortlist.checked(languages.split(",")))
    if texts:
        return partial(shortlist.of_texts, texts=[path.read_text(errors="replace") for path in texts])
    return None


def _tell_package(path: Path, made: "Manifest", as_json: bool) -> None:
    nbytes = sum(entry.nbytes for entry in made.files.values())
    if as_json:
        from msgspec import to_builtins

        told = {"path": str(path), "name": made.name, "recipe": made.recipe.name, "nbytes": nbytes}
        click.echo(json.dumps(told | {"quality": [to_builtins(found) for found in made.quality]}))
        return
    click.echo(f"{path}: {made.name}, {made.recipe.name}, {nbytes / 1e6:,.1f} MB")
    for line in quality_lines(made.quality):
        click.echo(line)
    if made.poor:
        click.echo(f"This package is a poor likeness of its original: {made.poor}.", err=True)
