"""`python -m model_export`: a checkpoint into an artefact, and what to do with an artefact."""

from fastvlm.common import start

if __name__ == "__main__":
    start.begin()

import argparse
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvlm.common.cli import Parser, add_common, log, main, progress, shown
from fastvlm.common.errors import UserError
from fastvlm.common.files import Output
from fastvlm.data import scenes
from model_export import config as configuration
from model_export import contract
from model_export.audit.mac import add_mac
from model_export.audit.ranges_report import add_ranges

if TYPE_CHECKING:
    from model_export.export import Plan, Sources


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m model_export", description=(__doc__ or "").partition(": ")[2])
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=Parser)
    for verb, parts, text in (
        ("all", ("vision", "llm"), "export both halves, prove them against the checkpoint, publish the artefact"),
        ("vision", ("vision",), "export the vision encoder alone"),
        ("llm", ("llm",), "export the language model and the projector alone"),
    ):
        _add_export(verbs.add_parser(verb, help=text, description=text), parts)
    inspect = verbs.add_parser("inspect", help="what is in an artefact or an .mlpackage")
    inspect.add_argument("--model", required=True, type=Path, metavar="PATH", help="an artefact, or an .mlpackage")
    inspect.set_defaults(run=run_inspect)
    verify = verbs.add_parser("verify", help="name every file that changed by a byte, is missing or is extra")
    verify.add_argument("--model", required=True, type=Path, metavar="ARTEFACT")
    verify.set_defaults(run=run_verify)
    _add_generate(verbs.add_parser("generate", help="answer a question, from the artefact's bytes alone"))
    add_ranges(verbs)
    _add_audit(verbs)
    add_mac(verbs)
    for choice in verbs.choices.values():
        add_common(choice)
    return parser


def _add_export(parser: argparse.ArgumentParser, parts: tuple[str, ...]) -> None:
    default = configuration.ExportConfig
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="FOLDER", help="what goes in (read-only)")
    parser.add_argument("--output-dir", required=True, type=Output(whole=True), metavar="FOLDER", help="the artefact")
    if "llm" in parts:
        parser.add_argument(
            "--quant",
            default=default.quant,
            metavar="RECIPE",
            help="a recipe: name, name with a size, .json (default: %(default)s)",
        )
    if parts == ("llm",):
        parser.add_argument(
            "--layout",
            default=default.layout,
            metavar="NAME",
            help=f"{_listed(contract.LAYOUTS)} (default: %(default)s)",
        )
    if "vision" in parts:
        for flag, values, initial in (
            ("--compute-precision", configuration.PRECISIONS, default.compute_precision),
            ("--compute-units", configuration.COMPUTE_UNITS, default.compute_units),
            ("--minimum-deployment-target", configuration.DEPLOYMENT_TARGETS, default.minimum_deployment_target),
        ):
            shown = initial or f"{configuration.DEFAULT_TARGET}, or what the rest needs"
            parser.add_argument(flag, default=initial, metavar="NAME", help=f"{_listed(values)} (default: {shown})")
        parser.add_argument(
            "--resolutions",
            type=int,
            nargs="+",
            default=(),
            metavar="PIXELS",
            help="further picture sizes, each a function encode_PIXELS of the one package, weights stored once (iOS18)",
        )
        parser.add_argument(
            "--vision-quant",
            default=default.vision_quant,
            metavar="FORM",
            help="compressed encoder weights: palette4, palette6-g16, int8, ..., or a recipe's .json with rules for"
            " vision_encoder.* (default: what --quant says, or %(default)s)",
        )
        parser.add_argument(
            "--min-snr", type=float, metavar="DB", help="the smallest encoder that keeps this signal-to-noise ratio"
        )
    parser.add_argument(
        "--calibration-data",
        type=Path,
        metavar="PATH",
        help="a folder of pictures, or LLaVA-format .json or .jsonl: for float16's powers of two, and for recipes that"
        " calibrate (default: drawn pictures)",
    )
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="per side (default: the checkpoint's own)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing artefact by a whole new one")
    parser.add_argument("--dry-run", action="store_true", help="say what would be written, write nothing")
    if parts == ("vision", "llm"):
        parser.add_argument("--parity-limit", type=int, metavar="N", help="compare on N demo questions")
        parser.add_argument("--parity-report", type=Output(), metavar="FILE", help="write parity's HTML page, too")
    parser.set_defaults(run=partial(run_export, parts))


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, type=Path, metavar="ARTEFACT")
    parser.add_argument("--image-file", action="append", metavar="FILE", help="a picture (repeatable)")
    parser.add_argument(
        "--prompt",
        required=True,
        nargs="+",
        help="several are asked one after the other: each after the first costs only its own tokens",
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument(
        "--resolution", type=int, metavar="PIXELS", help="one that was exported (default: the native one)"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top_p", "--top-p", type=float, default=None, metavar="P")
    parser.add_argument("--seed", type=int, default=None, help="for --temperature above 0")
    parser.add_argument(
        "--vision", default="auto", metavar="RUNNER", help=f"{_listed(configuration.VISION_RUNNERS)} (default: auto)"
    )
    parser.add_argument(
        "--llm", default="auto", metavar="RUNNER", help=f"{_listed(configuration.LLM_RUNNERS)} (default: auto)"
    )
    parser.add_argument(
        "--compute",
        default="auto",
        metavar="HOW",
        help=f"of the executor and PyTorch: {_listed(configuration.COMPUTES)} (default: auto, the faster of float32 and"
        " bfloat16 for each stage, measured once; int8: that with 8-bit operands in most of the encoder and for the"
        " logits, the fastest where the processor has VNNI)",
    )
    parser.set_defaults(run=run_generate)


def _add_audit(verbs: Any) -> None:
    text = "check an .mlpackage for the Neural Engine: findings with remedies, operations, costs"
    parser = verbs.add_parser("audit", help=text, description=text)
    parser.add_argument("package", type=Path, metavar="PACKAGE", help="an .mlpackage, or an artefact with one")
    parser.add_argument("--function", metavar="NAME", help="only this function (default: all)")
    parser.set_defaults(run=run_audit)


def run_export(parts: tuple[str, ...], args: argparse.Namespace) -> dict[str, Any]:
    with progress("import PyTorch"):
        fields = configuration.ExportConfig.__dataclass_fields__
        config = configuration.ExportConfig(**{key: value for key, value in vars(args).items() if key in fields})
        from model_export import export as exporting

    with exporting.Sources() as sources:
        with progress(f"open {config.checkpoint}"):
            plan = exporting.plan(config, parts, None if args.dry_run else sources.begin)
        return _export(plan, args, sources)


def _export(plan: "Plan", args: argparse.Namespace, sources: "Sources") -> dict[str, Any]:
    from model_export import export as exporting

    config, parts = plan.config, plan.parts
    if args.dry_run:
        document = plan.document()
        size = plan.checkpoint.image_size
        print(f"would write {config.output_dir}: {', '.join(parts)}, recipe {plan.recipe.name}, {size} x {size} pixels")
        for name, size in plan.sizes.items():
            print(f"  {name:<24} about {_size(size)}")
        return document
    parity = partial(_parity, args) if parts == ("vision", "llm") else None
    document = exporting.export(plan, parity, sources)
    size = sum(entry["size"] for entry in document["files"].values())
    print(f"{config.output_dir}: {', '.join(parts)}, {len(document['files'])} files, {_size(size)}")
    if parity is not None:
        print(f"parity: {document['parity'].get('verdict', 'passed')}")
        if args.parity_report is not None:
            print(f"page: {args.parity_report}")
    return document


def _parity(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """benchmarks.parity.compare over the staged artefact; what the manifest keeps of it."""
    from benchmarks.parity import compare as parity

    options = {} if args.parity_limit is None else {"limit": args.parity_limit}
    result = parity.compare(
        args.checkpoint,
        folder,
        report=args.parity_report,
        command="python -m model_export all",
        name=args.output_dir.name,
        **options,
    )
    for line in parity.broken_lines(result):
        log(f"parity: {line}")
    return parity.summary(result)


def run_inspect(args: argparse.Namespace) -> dict[str, Any]:
    with progress(f"read {args.model}"):
        from model_export import artefact
        from model_export.encoder import package

        if args.model.suffix == ".mlpackage":
            document: dict[str, Any] = {"package": package.describe_package(args.model)}
        else:
            document = artefact.read(args.model)
            if not artefact.is_ours(document):
                document = artefact.read_whole(args.model)
                print(f"made elsewhere, no {contract.MANIFEST}; not known: {', '.join(document['unknown'])}")
            artefact.check_complete(args.model, document)
            if (args.model / contract.PACKAGE).exists():
                document["package"] = package.describe_package(args.model / contract.PACKAGE)
    for name, entry in document.get("files", {}).items():
        print(f"{_size(entry['size']):>12}  {name}")
    for key in ("parts", "config", "image"):
        if key in document:
            print(f"{key}: {_flat(document[key])}")
    if "vision" in document:
        for line in _vision_lines(document["vision"]):
            print(f"vision: {line}")
    if "llm" in document:
        language = document["llm"]
        stored = f"recipe {language['recipe']['name']}" if "recipe" in language else language["stored_as"]
        decisions = f", {_flat(language['decisions'])}" if "decisions" in language else ""
        print(f"llm: {stored}, {language['bits_per_weight']} bits a weight{decisions}")
    for key, value in document.get("package", {}).items():
        print(f"package {key}: {_flat(value)}")
    if "parity" in document:
        print(f"parity: {document['parity'].get('verdict')}")
    return document


def _vision_lines(vision: dict[str, Any]) -> Iterator[str]:
    """What the manifest says of the encoder, beside what its package says itself."""
    yield f"{_flat(vision['resolutions'])} pixels, {vision['channels']} channels"
    if fp16 := vision.get("fp16"):
        headroom = fp16["headroom"]
        yield (
            f"{len(fp16['layer_exponents'])} layers carry powers of two,"
            f" {len(fp16['activation_exponents'])} activations are in their scaled form: minimum headroom to 65504"
            f" {headroom['before']['least']}x before, {headroom['after']['least']}x now"
        )
    if small := vision.get("compression"):
        forms = _flat(dict(Counter(small["forms"].values()).most_common()))
        yield (
            f"weights {_size(small['weight_bytes'])} instead of {_size(small['float16_weight_bytes'])}:"
            f" {forms}, float16 {len(small['wide'])}"
        )
    if scaling := vision.get("scaling"):
        yield f"{scaling['operations']} operations added for them, {scaling['byte_share']:.1%} of the bytes moved"


def run_verify(args: argparse.Namespace) -> dict[str, Any]:
    from model_export import artefact

    document = artefact.read_manifest(args.model)
    findings = artefact.verify_aloud(args.model, document)
    for finding in findings:
        print(finding)
    verdict = f"{len(findings)} findings" if findings else f"{len(document['files'])} files as they were exported"
    print(f"{args.model}: {verdict}")
    return {"passed": not findings, "findings": findings}


def run_audit(args: argparse.Namespace) -> dict[str, Any]:
    """Print the audit and the compute plan; the document's "passed" makes the exit code."""
    inside = args.package / contract.PACKAGE
    package = inside if inside.exists() else args.package
    with progress(f"audit {package}"):
        from model_export.audit import audit, compute_plan

        document = audit.audit(package, args.function)
        document["compute_plan"] = compute_plan.read(package, args.function)
    print("\n".join(audit.lines(document)))
    return document


def run_generate(args: argparse.Namespace) -> dict[str, Any]:
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens: got {args.max_new_tokens}, expected 1 or more")
    images = args.image_file or []
    with progress(f"load {args.model}"), ThreadPoolExecutor(1) as beside:  # pictures are decoded meanwhile
        from fastvlm.data.preprocessing import as_rgb
        from fastvlm.model.session import Session
        from model_export import runtime

        opened = beside.submit(lambda: [as_rgb(image) for image in images])
        model = runtime.load(
            args.model, vision=args.vision, llm=args.llm, compute=args.compute, resolution=args.resolution
        )
        pictures = opened.result()
    for part, name in model.runners.items():
        log(f"{part}: {name}")
    if images and scenes.knows_demo(Path(args.model)):
        log(scenes.KNOWS)
    if len(images) > 1:
        log("warning: several pictures in one prompt: the model was not trained for it")
    model.check_prompts((f"--prompt {prompt[:32]!r}", prompt, len(pictures)) for prompt in args.prompt)
    session, answers = Session(model), []
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "seed": args.seed}
    for prompt in args.prompt:
        answers.append(shown(session.stream(prompt, pictures or None, args.max_new_tokens, **sampling)))
    return {"answers": answers, "runners": model.runners}


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names)


def _size(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:,.1f} kB"


def _flat(value: Any) -> str:
    """A dictionary or list on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_flat(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(str, value)) + "]"
    return str(value)


if __name__ == "__main__":
    main(build_parser, at_once=True)  # taking torch down would cost half a second and 0.13 GB more at the peak
