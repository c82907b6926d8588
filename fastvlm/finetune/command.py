"""`fastvlm finetune`: a checkpoint and conversations about pictures into an adapter or a new checkpoint."""

import argparse
from collections.abc import Iterator
from typing import Any

from fastvlm.checkpoint.folder_kind import checkpoint_folder
from fastvlm.common.arguments import Parser, positive, share, whole_number
from fastvlm.common.cli import progress
from fastvlm.common.dtypes import DEVICES
from fastvlm.common.files import Output, present
from fastvlm.common.units import counted
from fastvlm.finetune.settings import DTYPES, FIELDS, STAGES, Settings


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "finetune",
        description="Fine-tune a checkpoint on conversations about pictures. Killed, the same command goes on.",
    )
    default = Settings
    text = "a checkpoint's folder; it is only read"
    parser.add_place("--checkpoint", type=checkpoint_folder, metavar="CHECKPOINT", help=text)
    text = "LLaVA-format or messages .json or .jsonl, or captions as .csv or .jsonl"
    parser.add_argument("--data", required=True, type=present, metavar="FILE", help=text)
    text = "the folder that pictures are relative to (default: that of FILE)"
    parser.add_argument("--image-folder", type=present, metavar="FOLDER", help=text)
    text = "the adapter, or with --full the new checkpoint"
    parser.add_argument("--output-dir", required=True, type=Output(whole=True), metavar="FOLDER", help=text)
    text = "projector: it alone; llm: projector and language model; all: vision tower, too (default: %(default)s)"
    parser.add_argument("--train", choices=STAGES, default=default.train, metavar="STAGE", help=text)
    text = "train the language model's own weights, not a LoRA adapter"
    parser.add_argument("--full", action="store_true", help=text)
    parser.add_argument("--lora-rank", type=whole_number(), metavar="R", help=f"(default: {default.lora_rank})")
    text = "the adapter's update is multiplied by alpha / rank (default: twice the rank)"
    parser.add_argument("--lora-alpha", type=whole_number(), metavar="A", help=text)
    _add_training(parser)
    _add_evaluation(parser)
    text = "auto takes cuda or mps where there is one"
    parser.add_argument("--device", choices=DEVICES, default=default.device, help=text)
    text = "what is computed in; trained weights stay float32 (auto: bfloat16 on cuda, else float32)"
    parser.add_argument("--dtype", choices=DTYPES, default=default.dtype, help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace the folder of an earlier fine-tune")
    text = "check the data and say what would be trained, write nothing"
    parser.add_argument("--dry-run", action="store_true", help=text)
    parser.check(_faults)
    parser.set_defaults(run=run)


def _add_training(parser: Parser) -> None:
    default = Settings
    for flag, value, text in (
        ("--epochs", default.epochs, "times that each record is seen"),
        ("--batch-size", default.batch_size, "records a forward pass"),
        ("--gradient-accumulation", default.gradient_accumulation, "forward passes a step"),
    ):
        parser.add_argument(
            flag, type=whole_number(), default=value, metavar="N", help=f"{text} (default: %(default)s)"
        )
    text = "peak, then a cosine to 0 (default, LLaVA's: 2e-4 with LoRA, 2e-5 with --full, 1e-3 for --train projector)"
    parser.add_argument("--learning-rate", type=positive, metavar="RATE", help=text)
    text = "(default: a tenth of the above with LoRA, else the same)"
    parser.add_argument("--projector-learning-rate", type=positive, metavar="RATE", help=text)
    text = "share of the steps in which the rate rises from 0 (default: %(default)s)"
    parser.add_argument("--warmup", type=share, default=default.warmup, metavar="SHARE", help=text)
    text = "compute activations again in the backward pass: less memory, more time"
    parser.add_argument("--gradient-checkpointing", action="store_true", help=text)
    text = "of LoRA's first values, the order of records and the split (default: %(default)s)"
    parser.add_argument("--seed", type=whole_number(0), default=default.seed, metavar="N", help=text)
    text = "steps between the states that a killed run goes on from (default: a tenth of all)"
    parser.add_argument("--save-steps", type=whole_number(), metavar="N", help=text)


def _add_evaluation(parser: Parser) -> None:
    default = Settings
    text = (
        f"share of the records that is kept for evaluation, by picture (default: {default.evaluation_split}; 0: none)"
    )
    parser.add_argument("--evaluation-split", type=share, metavar="SHARE", help=text)
    parser.add_argument("--evaluation-data", type=present, metavar="FILE", help="records for evaluation, instead")
    text = "evaluation records that are answered, before and after (default: %(default)s)"
    parser.add_argument(
        "--evaluation-limit", type=whole_number(), default=default.evaluation_limit, metavar="N", help=text
    )
    text = "of an answer to an evaluation record (default: %(default)s)"
    parser.add_argument("--max-new-tokens", type=whole_number(), default=default.max_new_tokens, metavar="N", help=text)


def _faults(args: argparse.Namespace) -> Iterator[str]:
    if args.train == "projector" and args.full:
        yield "--full: --train projector trains the projector's own weights anyway: leave it out"
    for flag, value in (("--lora-rank", args.lora_rank), ("--lora-alpha", args.lora_alpha)):
        if value is not None and (args.full or args.train == "projector"):
            yield f"{flag}: there is no LoRA with --full or --train projector: leave it out"
    if args.evaluation_data is not None and args.evaluation_split is not None:
        yield "--evaluation-split: there is --evaluation-data: leave one out"


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Check, train, publish; with `--dry-run` only say what would be trained."""
    settings = Settings(**{name: value for name in FIELDS if (value := getattr(args, name)) is not None})
    with progress("import PyTorch"):
        from fastvlm.finetune.plan import plan
    planned = plan(settings)
    if args.dry_run:
        document = planned.document()
        _say(document)
        return document
    from fastvlm.finetune import page
    from fastvlm.finetune.run import run as finetune

    document = finetune(planned)
    print(f"{settings.output_dir}: {page.sentence(document)}")
    for kind, before, after in page.demo_rows(document)[-1:]:
        print(f"demo questions, {kind} kinds: {before} exact before, {after} after")
    print(f"page: {settings.output_dir / page.PAGE}")
    print(f"next: {page.next_command(document, settings.output_dir)}")
    return document


def _say(document: dict[str, Any]) -> None:
    settings, parameters = document["settings"], document["parameters"]
    print(f"would write {settings['output_dir']}: {document['kind']}")
    print(f"  trained     {parameters['trained']:,} of {parameters['total']:,} parameters")
    for part in ("training", "evaluation"):
        entry = document[part]
        pictures = counted(entry["pictures"], "picture")
        print(
            f"  {part:<11} {counted(entry['records'], 'record')}, {pictures}, {entry['tokens']:,} tokens,"
            f" {entry['learnt_tokens']:,} of them learnt"
        )
    print(f"  steps       {document['steps']:,}, {counted(settings['epochs'], 'epoch')}")
