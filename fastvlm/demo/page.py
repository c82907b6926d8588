"""`fastvlm demo`: draw pictures, ask, and show question, answer and truth; train anew; or draw another task."""

import argparse
from pathlib import Path
from typing import Any

from fastvlm.common import page
from fastvlm.common.arguments import whole_number
from fastvlm.common.cli import log, progress
from fastvlm.common.errors import UserError
from fastvlm.common.files import Output, output_faults
from fastvlm.common.staging import write_file
from fastvlm.common.terminal import mark, print_table
from fastvlm.data import scenes

PAGE, PLACE, QUESTIONS = "index.html", Path("build/demo"), 20
TEMPLATE = Path(__file__).parent / "templates" / "demo.html.j2"
PASS_MARK = 0.95  # of the held-out questions, for a checkpoint that is trained anew


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "demo",
        description="Draw held-out pictures, ask a checkpoint, show question, answer and truth here and as a page.",
    )
    parser.add_argument(
        "--model-path", default=str(scenes.CHECKPOINT), metavar="CHECKPOINT", help="(default: the demo checkpoint)"
    )
    parser.add_argument(
        "--count",
        type=whole_number(),
        help="questions (default: 20; 500 is the whole held-out set), or records of --task (default: 4500)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the pictures, or of the training (default: %(default)s)"
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        help="folder of the page (default: build/demo), of the new checkpoint (default: build/demo_checkpoint), or of"
        " the task (default: build/TASK)",
    )
    parser.add_argument(
        "--train", action="store_true", help="train a new demo checkpoint from nothing (under two hours on 2 cores)"
    )
    text = "write records of a task that the demo checkpoint doesn't know, with pictures: for `fastvlm finetune`"
    parser.add_argument("--task", choices=("charts",), metavar="TASK", help=f"%(choices)s: {text}")
    text = "with --train or --task: replace what an earlier one wrote"
    parser.add_argument("--overwrite", action="store_true", help=text)
    parser.check(_faults)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Show the demo, or train."""
    if args.train:
        return train(args.output_dir or Path("build/demo_checkpoint"), args.seed, args.overwrite)
    if args.task:
        return draw_task(args)
    return show(args.model_path, args.count or QUESTIONS, args.seed, args.output_dir or PLACE, quiet=args.json)


def draw_task(args: argparse.Namespace) -> dict[str, Any]:
    """Write a task's records and pictures, and say how to train with them."""
    from fastvlm.demo import task

    folder = args.output_dir or Path("build") / args.task
    document = task.write_task(args.task, folder, args.count or task.RECORDS, args.seed, args.overwrite)
    training, held_out = document["files"]
    print(f"{training}: {document['training']} records, {document['replayed']} of them of the demo's own kinds")
    print(f"{held_out}: {document['held_out']} records")
    return document


def _faults(args: argparse.Namespace) -> list[str]:
    if args.train and args.task:
        return ["--task: --train needs none: leave one out"]
    if args.train or args.task:  # which read no checkpoint
        return []
    return output_faults(
        {"--output-dir": (args.output_dir or PLACE, Output(files=(PAGE,)))}, [("--model-path", Path(args.model_path))]
    )


def show(model_path: str, count: int, seed: int, folder: Path, quiet: bool) -> dict[str, Any]:
    """Ask `count` held-out questions; print a table and write `folder/index.html`."""
    with progress(f"load {model_path}"):
        from fastvlm.model.torch_parts import load_checkpoint

        model = load_checkpoint(model_path)
    rows = []
    with progress(f"asking {count} questions", count) as advance:
        for question in scenes.questions(count, seed):
            answer = model.generate(question.question, question.image, max_new_tokens=64)
            rows.append((question, answer, answer.strip() == question.answer))
            advance()
    right = sum(exact for *_, exact in rows)
    if not quiet:
        _print_table(rows, right)
    written = _write_page(rows, right, model, model_path, folder)
    log(f"page: {written}")
    kinds = {
        kind: [sum(exact for q, _, exact in rows if q.kind == kind), sum(q.kind == kind for q, *_ in rows)]
        for kind in scenes.KINDS
    }
    return {
        "model": model_path,
        "seed": seed,
        "questions": count,
        "exact": right,
        "kinds": kinds,
        "page": str(written),
        "runners": model.runners,
    }


def _print_table(rows: list, right: int) -> None:
    wrong = right < len(rows)  # otherwise the answers are the truth
    columns = ["kind", "question", "answer", *(["truth"] if wrong else []), ""]
    cells = [
        (q.kind, q.question, answer, *(["" if exact else q.answer] if wrong else []), mark(exact))
        for q, answer, exact in rows
    ]
    print_table(f"{right} of {len(rows)} exact", columns, cells)


def _write_page(rows: list, right: int, model: Any, model_path: str, folder: Path) -> Path:
    cards = [
        {
            "kind": q.kind,
            "image": page.data_url(q.image),
            "question": q.question,
            "answer": answer,
            "truth": q.answer,
            "exact": exact,
        }
        for q, answer, exact in rows
    ]
    text = page.render(TEMPLATE, cards=cards, right=right, model=model_path, runner=model.language.name)
    write_file(folder / PAGE, text.encode())
    return folder / PAGE


def train(folder: Path, seed: int, overwrite: bool) -> dict[str, Any]:
    """Train, save to `folder` by one rename, and score it on 500 held-out questions."""
    from fastvlm.demo import train as demo_train
    from fastvlm.model.torch_parts import load_checkpoint

    if folder.exists() and not overwrite:
        raise UserError(f"{folder}: exists already: give --overwrite or another --output-dir")
    ours = {path.name for path in scenes.CHECKPOINT.iterdir()}
    if folder.exists() and (others := sorted({path.name for path in folder.iterdir()} - ours)):
        raise UserError(f"{folder}: replacing it would delete what no training wrote: move away {', '.join(others)}")
    with progress("training", demo_train.STEPS) as advance:
        model, tokenizer = demo_train.train(seed, advance=advance)
    demo_train.save(model, tokenizer, folder)
    trained = load_checkpoint(folder)
    with progress("asking 500 held-out questions", 500) as advance:

        def answer(question: scenes.Question) -> str:
            advance()
            return trained.generate(question.question, question.image, max_new_tokens=64)

        score = scenes.evaluate(answer, scenes.questions(500))
    exact = sum(right for right, _ in score.values())
    for kind, (right, total) in score.items():
        log(f"{kind}: {right} of {total} exact")
    log(f"{folder}: {exact} of 500 exact")
    return {
        "checkpoint": str(folder),
        "exact": exact,
        "questions": 500,
        "kinds": score,
        "passed": exact >= PASS_MARK * 500,
    }
