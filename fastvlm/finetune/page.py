"""A fine-tune's page and its plot: settings, losses, answers before and after, and what to do next."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastvlm.common import page, plots
from fastvlm.common.units import counted, format_duration
from fastvlm.data.images import open_image
from fastvlm.data.records import evenly
from fastvlm.finetune.answers import Asked

TEMPLATE = Path(__file__).parent / "templates" / "finetune.html.j2"
PAGE, PLOT = "page.html", "loss.png"
_CARDS = 24  # answers that are shown, those that are wrong afterwards first
_PIXELS = 320  # of a picture on the page


def write(
    folder: Path,
    document: Mapping[str, Any],
    asked: Sequence[Asked],
    before: Sequence[str],
    after: Sequence[str],
    place: Path,
) -> None:
    """Write the page and the plot of a finished fine-tune into `folder`, which will be found at `place`."""
    with plots.figure(7.2, 3.6, "finetune") as figure:
        _draw(figure, document, plots.FILE)
        plots.write(figure, folder / PLOT)
    colours = plots.page_colours("info")
    with plots.figure(7.2, 3.2, "finetune") as figure:
        _draw(figure, document, colours)
        svg = plots.page_svg(figure, colours)
    rows = list(zip(asked, before, after))
    wrong = [row for row in rows if not row[0].right(row[2])][: _CARDS // 2]
    right = evenly([row for row in rows if row[0].right(row[2])], _CARDS - len(wrong))
    text = page.render(
        TEMPLATE,
        document=document,
        sentence=sentence(document),
        cards=[_card(*row) for row in [*wrong, *right]],
        demo=demo_rows(document),
        settings=_settings(document),
        command=next_command(document, place),
        plot=svg,
        took=format_duration(document["seconds"]),
    )
    (folder / PAGE).write_text(text, encoding="utf-8")


def sentence(document: Mapping[str, Any]) -> str:
    """What came of it, in one sentence."""
    accuracy = document["accuracy"]
    if not accuracy["records"]:
        return f"Trained for {counted(document['steps'], 'step')}; there were no evaluation records"
    return (
        f"{accuracy['after']} of {accuracy['records']} evaluation answers are exact after training,"
        f" {accuracy['before']} before"
    )


def next_command(document: Mapping[str, Any], place: Path) -> str:
    """The command that exports what came out."""
    checkpoint, adapter = (shlex.quote(str(path)) for path in (document["settings"]["checkpoint"], place))
    out = shlex.quote(f"{place}-fp16")
    if document["kind"] == "checkpoint":
        return f"fastvlm export {adapter} --output-dir {out}"
    return f"fastvlm export {checkpoint} --adapter {adapter} --output-dir {out}"


def demo_rows(document: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What the demo checkpoint knew before: each kind of question, exact answers before and after."""
    demo = document["accuracy"].get("demo")
    if demo is None:
        return []
    kinds = [*demo["before"]]
    columns = {when: [*demo[when].values()] for when in ("before", "after")}
    sums = {when: [sum(numbers) for numbers in zip(*column)] for when, column in columns.items()}
    told = [[f"{right} of {total}" for right, total in [*columns[when], sums[when]]] for when in columns]
    return list(zip([*kinds, "all"], *told))


def _settings(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The rows of the page's table of settings."""
    settings, parameters = document["settings"], document["parameters"]
    share = 100 * parameters["trained"] / parameters["total"]
    training, evaluation = document["training"], document["evaluation"]
    how = {
        "projector": "the projector",
        "adapter": f"LoRA of rank {settings['lora_rank']}, alpha {settings['lora_alpha']}, on the language model; in"
        f" full: {'projector and vision tower' if settings['train'] == 'all' else 'the projector'}",
        "checkpoint": "all weights" if settings["train"] == "all" else "projector and language model, all weights",
    }[document["kind"]]
    accumulated = settings["gradient_accumulation"]
    batches = f"{counted(settings['epochs'], 'epoch')} of batches of {settings['batch_size']}"
    return [
        ("checkpoint", settings["checkpoint"]),
        ("trained", how),
        ("parameters", f"{parameters['trained']:,} of {parameters['total']:,} ({share:.1f} %)"),
        ("training records", f"{training['records']:,}; {counted(training['pictures'], 'picture')}"),
        ("tokens an epoch", f"{training['tokens']:,}, of which {training['learnt_tokens']:,} are learnt"),
        ("evaluation records", f"{evaluation['records']:,}; {counted(evaluation['pictures'], 'picture')}"),
        ("steps", f"{document['steps']:,}: {batches}" + (f" × {accumulated}" if accumulated > 1 else "")),
        ("learning rate", f"{settings['learning_rate']:g}, projector {settings['projector_learning_rate']:g}"),
        ("computed in", f"{document['dtype']} on {document['device']}, seed {settings['seed']}"),
    ]  # fmt: skip


def _card(asked: Asked, before: str, after: str) -> dict[str, Any]:
    picture = None
    if asked.record.images:
        picture = open_image(asked.record.images[0])
        picture.thumbnail((_PIXELS, _PIXELS))
    return {
        "name": asked.record.name,
        "image": page.data_url(picture) if picture is not None else "",
        "question": asked.question,
        "truth": asked.truth.strip(),
        "before": before.strip(),
        "was": asked.right(before),
        "after": after.strip(),
        "exact": asked.right(after),
    }


def _draw(figure: Any, document: Mapping[str, Any], colours: Mapping[str, str]) -> None:
    axes = figure.add_axes((0.09, 0.15, 0.89, 0.74))
    ink = colours.get("blue") or colours["info"]
    for key, label, colour, style in (
        ("losses", "training", ink, {"linewidth": 1.6}),
        ("evaluation_losses", "evaluation", colours["good"], {"linewidth": 1.2, "marker": "o", "markersize": 4}),
    ):
        if points := document[key]:
            axes.plot([p["step"] for p in points], [p["loss"] for p in points], color=colour, label=label, **style)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, place: f"{value:g}")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (cross entropy a token)")
    plots.dress(axes, colours, legend=2)
