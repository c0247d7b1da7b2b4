"""The verbs of the laboratory: `truetune lab ...`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from truetune.cli.verb import CONTEXT, Verb, open_screen
from truetune.errors import Interrupted, UsageError
from truetune.run_dir import RunDir
from truetune.system.signals import Stopped, number_of

if TYPE_CHECKING:
    from truetune.cli.screen import Screen
    from truetune.lab.experiment import Experiment

lab = typer.Typer(
    no_args_is_help=True,
    context_settings=CONTEXT,
    rich_markup_mode=None,
    help="Run experiments on the embedded base and its invented world.",
)


@lab.command(cls=Verb, short_help="Build the embedded base from a seed (about 90 minutes).")
def pretrain(
    output: Annotated[str, typer.Option("-o", "--output", help="Folder of the model.")],
    seed: Annotated[
        int, typer.Option(help="Random seed for the world, the corpus and the weights.")
    ] = 7,
    tokens: Annotated[
        int | None,
        # Fewer leave a stage of a course without a step.
        typer.Option(
            help="Size of the corpus in tokens. (default: that of the shipped base)", min=50_000
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    compile: Annotated[
        bool, typer.Option("--compile", help="Use torch.compile, which needs a C++ compiler.")
    ] = False,
) -> None:
    """Build corpus, tokenizer and weights of the embedded base from a seed (about 90 minutes)."""
    from truetune.lab.building.pretrain import Settings
    from truetune.lab.building.pretrain import pretrain as build

    screen = open_screen()

    def show(line: dict[str, Any]) -> None:
        screen.line(
            f"{line['corpus']}  step {line['step']:>5}  {line['tokens'] / 1e6:5.2f} M tokens  "
            f"loss {line['loss']:.4f}  {line['elapsed']:,.0f} s"
        )

    run = Settings(seed=seed, device=device, compile=compile)
    if tokens is not None:
        run = run.of_size(tokens)
    folder = build(output, run, save_every=400, on_progress=show)
    screen.line(f"written and measured: {folder} (its README.md has the numbers)")


@lab.command("list", cls=Verb, short_help="Show the experiments and their claims.")
def list_experiments() -> None:
    """Show each experiment: its name, the claim about fine-tuning that it tests, who makes this
    claim, the course exercises that it covers, and its CPU time in quick form and in full."""
    from truetune.lab.catalogue import every
    from truetune.lab.words import words

    screen = open_screen()
    costs = words("costs")
    for experiment in every():
        screen.line(f"{experiment.number:>2}  {experiment.name}")
        screen.line(f"    {experiment.claim}")
        screen.line(f"    source: {experiment.source}")
        screen.line(f"    exercise: {'; '.join(experiment.exercises)}")
        known = costs.get(experiment.name, {})
        times = [f"{form} {known[form][0]}" for form in ("quick", "full") if form in known]
        if times:
            screen.line(f"    CPU seconds: {', '.join(times)}")


_QUICK = typer.Option(
    "--quick",
    help="A first look: one seed, a quarter of the rows per step, only the arms that are judged.",
)
_SEEDS = typer.Option("--seeds", help="Number of seeds. (default: as declared)", min=1)
_FOLDER = typer.Option("-o", "--output", help="Folder of the trained arms and the results.")


@lab.command("run", cls=Verb, short_help="Run one experiment and judge its claim.")
def run_experiment(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name from `truetune lab list`.")],
    quick: Annotated[bool, _QUICK] = False,
    seeds: Annotated[int | None, _SEEDS] = None,
    output: Annotated[str, _FOLDER] = "runs/lab",
) -> None:
    """Train the models of an experiment (its arms), measure them, and judge its claim by bounds
    that were declared in advance. Arms that are already in the folder are not trained again."""
    from truetune.lab.catalogue import find

    _run([find(name)], quick, seeds, output)


@lab.command("all", cls=Verb, short_help="Run every experiment.")
def run_all(
    quick: Annotated[bool, _QUICK] = False,
    seeds: Annotated[int | None, _SEEDS] = None,
    output: Annotated[str, _FOLDER] = "runs/lab",
) -> None:
    """Run every experiment, one after the other, and write a page with all of them."""
    from truetune.lab.catalogue import every

    _run(every(), quick, seeds, output)


def _run(chosen: Sequence[Experiment], quick: bool, seeds: int | None, output: str) -> None:
    from truetune.lab.catalogue import every, write_page
    from truetune.lab.results import read

    if quick and seeds is not None:
        raise UsageError(
            "--quick uses one seed, which contradicts --seeds",
            fix="pass only one of the two",
            code="lab-seeds",
        )

    def require() -> None:
        """The page of all results can be written, and none is lost: told before hours of training,
        not after."""
        named = {experiment.name for experiment in chosen}
        found = read(output, every(), named)
        full = [r["name"] for r in found if r["name"] in named and not r.get("quick")]
        if quick and full:
            raise UsageError(
                f"--quick would replace the results of full runs: {', '.join(full)}",
                where=output,
                why="the quick form has one seed and fewer arms",
                fix="choose another folder with -o",
                code="lab-result-full",
            )

    screen = open_screen()
    # Two at once would remove each other's arms, or write among the files of a run.
    with RunDir(output).writing(require):
        try:
            _run_each(screen, chosen, quick, seeds, output)
        except (Interrupted, KeyboardInterrupt, Stopped) as stop:
            # Of a run that the pipeline stopped, the lab keeps nothing: an arm is trained in whole.
            number = stop.number if isinstance(stop, Interrupted) else number_of(stop)
            raise Interrupted(
                "stopped before the experiment was judged",
                where=output,
                fix="run the same command again: it keeps the arms that are finished",
                number=number,
            ) from None
        screen.line(f"all results so far: {write_page(output)}")


def _run_each(
    screen: Screen, chosen: Sequence[Experiment], quick: bool, seeds: int | None, output: str
) -> None:
    from truetune.lab.results import run, write

    for experiment in chosen:
        declared = experiment.seeds
        taken = declared[:1] if quick else declared if seeds is None else range(1, seeds + 1)
        screen.line(f"{experiment.name}: {experiment.claim}")
        screen.line(f"expected: {experiment.expected}")
        result = run(
            experiment, Path(output) / "arms", list(taken), quick=quick, on_stage=screen.stage
        )
        screen.close()
        for one in result["expectations"]:
            seen = f"{one['value']:.3f} [{one['low']:.3f}, {one['high']:.3f}]"
            screen.line(f"  {one['held']:<12} {one['label']}: {seen}, must be {one['bound']}")
        screen.line(f"{result['verdict']}: {write(result, output)}")
        screen.line()


@lab.command("evaluate", cls=Verb, short_help="Measure what a base model knows about its world.")
def evaluate_base(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A base model, or a run that started from one. (default: the embedded base)",
        ),
    ] = None,
    wordings: Annotated[
        str, typer.Option(help="Wordings of the questions: plain, development, blind or all.")
    ] = "all",
    seed: Annotated[int, typer.Option(help="Seed of the world that it was trained on.")] = 7,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure what a base model knows about its world: facts in held-out wordings, sums, and the
    loss on prose.

    The corpus contains none of these wordings. Plain ones resemble it; development ones were used
    to improve it; blind ones were written independently, in different English.
    """
    from truetune.cli.screen import side_by_side
    from truetune.lab.measure import measure

    found = measure(model, wordings=wordings, seed=seed, device=device)
    if as_json:
        typer.echo(json.dumps(found.facts(), indent=2))
        return
    screen = open_screen()
    heading, *rows = found.table()
    side_by_side(screen, heading, rows)
    screen.line()
    for line in found.lines():
        screen.line(line)
