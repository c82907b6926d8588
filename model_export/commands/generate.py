"""`generate`: answers of an artefact, from its bytes alone."""

import argparse
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastvlm.common.arguments import number, whole_number
from fastvlm.common.cli import log, progress, shown
from fastvlm.data import scenes
from model_export import config as configuration


def add_generate(verbs: Any) -> None:
    """Add `generate`."""
    parser = verbs.add_parser(
        "generate", description="Answer questions about pictures, from the artefact's bytes alone."
    )
    parser.add_place("--model", metavar="ARTEFACT", help="an artefact's folder")
    parser.add_argument("--image-file", nargs="+", metavar="FILE", help="pictures, all of them for every prompt")
    parser.add_argument(
        "--prompt",
        required=True,
        nargs="+",
        help="several are asked one after the other: each after the first costs only its own tokens",
    )
    parser.add_argument("--max-new-tokens", type=whole_number(), default=256, metavar="N")
    parser.add_argument(
        "--resolution", type=int, metavar="PIXELS", help="one that was exported (default: the native one)"
    )
    parser.add_argument("--temperature", type=number(0), default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top_p", "--top-p", type=number(0, 1), default=None, metavar="P")
    parser.add_argument("--seed", type=int, default=None, help="for --temperature above 0")
    parser.add_argument(
        "--vision", default="auto", metavar="RUNNER", help=f"{', '.join(configuration.VISION_RUNNERS)} (default: auto)"
    )
    parser.add_argument(
        "--llm", default="auto", metavar="RUNNER", help=f"{', '.join(configuration.LLM_RUNNERS)} (default: auto)"
    )
    parser.add_argument(
        "--compute-units",
        choices=(*configuration.COMPUTE_UNITS, *configuration.COREAI_UNITS[:-1]),
        metavar="UNITS",
        help=f"of Core ML: {', '.join(configuration.COMPUTE_UNITS)}; of a Core AI bundle:"
        f" {', '.join(configuration.COREAI_UNITS)} (default: as exported; of a bundle: all on macOS 27)",
    )
    parser.add_argument(
        "--compute",
        default="auto",
        metavar="HOW",
        help=f"of the executor and PyTorch: {', '.join(configuration.COMPUTES)} (default: auto, the faster of float32"
        " and bfloat16 for each stage; int8: like auto, but with 8-bit operands in most of the encoder and for the"
        " logits, the fastest where the processor has VNNI)",
    )
    parser.set_defaults(run=run_generate)


def run_generate(args: argparse.Namespace) -> dict[str, Any]:
    """Answer the prompts one after the other, and print the answers as they come."""
    images = args.image_file or []
    with progress(f"load {args.model}"), ThreadPoolExecutor(1) as beside:  # pictures are decoded meanwhile
        from fastvlm.data.images import as_rgb
        from fastvlm.model.session import Session
        from model_export import runtime

        opened = beside.submit(lambda: [as_rgb(image) for image in images])
        model = runtime.load(
            args.model,
            vision=args.vision,
            llm=args.llm,
            compute=args.compute,
            resolution=args.resolution,
            units=args.compute_units,
        )
        pictures = opened.result()
    for part, name in model.runners.items():
        log(f"{part}: {name}")
    if images and scenes.knows_demo(args.model):
        log(scenes.KNOWS)
    if len(images) > 1:
        log("warning: several pictures in one prompt: the model was not trained for it")
    model.check_prompts((f"--prompt {prompt[:32]!r}", prompt, len(pictures)) for prompt in args.prompt)
    session, answers = Session(model), []
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "seed": args.seed}
    for prompt in args.prompt:
        answers.append(shown(session.stream(prompt, pictures or None, args.max_new_tokens, **sampling)))
    return {"answers": answers, "runners": model.runners}
