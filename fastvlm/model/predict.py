"""`fastvlm predict`: ask a checkpoint about pictures, in PyTorch."""

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastvlm.checkpoint.adapter_flag import add_adapter
from fastvlm.common.arguments import number, whole_number
from fastvlm.common.cli import log, progress, shown
from fastvlm.common.dtypes import DEVICES, choose_device
from fastvlm.common.errors import UserError
from fastvlm.data import scenes
from fastvlm.data.prompt import CONV_MODES, IMAGE

DTYPES = ("auto", "float32", "float16", "bfloat16")
_BATCH = 8  # questions a forward pass; bounds the KV cache


@dataclass(frozen=True)
class Job:
    """One question: the pictures it is about (indices into --image-file) and its text."""

    pictures: tuple[int, ...]
    prompt: str


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "predict",
        description="Ask every prompt about every picture; one that names <image> several times, about all of them.",
    )
    parser.add_place("--model-path", type=str, metavar="CHECKPOINT", help="a checkpoint's folder")
    add_adapter(parser)
    parser.add_argument(
        "--image-file", nargs="+", default=[], metavar="FILE", help="one picture or more; none for a text-only prompt"
    )
    parser.add_argument(
        "--prompt", nargs="+", default=["Describe the image."], help="one prompt or more (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature", type=number(0), default=0.0, help="0 (the default) always takes the likeliest token"
    )
    parser.add_argument("--top_p", "--top-p", type=number(0, 1), default=None, help="nucleus sampling, in (0, 1]")
    parser.add_argument(
        "--num_beams", "--num-beams", type=whole_number(), default=1, help="beam search (default: %(default)s)"
    )
    parser.add_argument(
        "--conv-mode", choices=CONV_MODES, default="qwen_2", help="prompt template (default: %(default)s)"
    )
    parser.add_argument("--max-new-tokens", type=whole_number(), default=256, help="(default: %(default)s)")
    parser.add_argument("--image-strategy", choices=("pad", "center_crop"), help="(default: the checkpoint's own)")
    parser.add_argument(
        "--device", choices=DEVICES, default="auto", help="auto takes cuda or mps where there is one, and says so"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="auto: float32 on the CPU; elsewhere the checkpoint's own, but float32 for an encoder in float16",
    )
    parser.add_argument(
        "--attn-implementation",
        choices=("eager", "sdpa"),
        default="sdpa",
        help="of the text decoder only; the vision backbone is eager",
    )
    parser.check(_faults)
    parser.set_defaults(run=run)


def plan(pictures: int, prompts: Sequence[str]) -> list[Job]:
    """Pictures × prompts, but a prompt with several `<image>` is one job about all pictures."""
    jobs: list[Job] = []
    for prompt in prompts:
        named = prompt.count(IMAGE)
        if named > 1 and named != pictures:
            raise UserError(f"--prompt: names {IMAGE} {named} times for {pictures} picture(s): name each picture once")
        if named > 1 or pictures == 0:
            jobs.append(Job(tuple(range(pictures)), prompt))
        else:
            jobs += [Job((picture,), prompt) for picture in range(pictures)]
    return jobs


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Answer and print; returns the document with every answer."""
    jobs = plan(len(args.image_file), args.prompt)
    started = time.monotonic()
    with progress(f"load {args.model_path}"):
        device = choose_device(args.device)

        from fastvlm.data.images import open_image
        from fastvlm.model.language import Sampler
        from fastvlm.model.torch_parts import load_checkpoint

        Sampler(args.temperature, args.top_p)  # refuses values before the model is loaded
        pictures = [open_image(path) for path in args.image_file]
        model = load_checkpoint(
            args.model_path, args.dtype, device, args.attn_implementation, args.image_strategy, adapter=args.adapter
        )
    pixels = f"{model.image_size} × {model.image_size} pixels, {model.preprocessor.image_strategy}"
    if pictures and args.adapter is None and scenes.knows_demo(Path(args.model_path)):
        log(scenes.KNOWS)
    log(f"{', '.join(dict.fromkeys(model.runners.values()))}, {pixels}; loaded in {time.monotonic() - started:.1f} s")
    if any(len(job.pictures) > 1 for job in jobs):
        log("warning: FastVLM was trained with one picture a prompt; answers about several may be poor")
    prompts = ((f"--prompt {job.prompt[:32]!r}", job.prompt, len(job.pictures)) for job in jobs)
    model.check_prompts(prompts, args.conv_mode)
    image_embeddings = []
    with progress("encode (pictures)", len(pictures)) as advance:
        for picture in pictures:
            image_embeddings.append(model.project(model.encode_image(model.preprocess(picture))))
            advance()
    embeds = [
        model.merge(job.prompt, [image_embeddings[picture] for picture in job.pictures], args.conv_mode) for job in jobs
    ]
    answers = []
    if len(jobs) == 1 and args.num_beams == 1:
        tokens = model.language.stream(embeds[0], args.max_new_tokens, args.temperature, args.top_p)
        answers = [shown(model.decode(tokens), quiet=args.json)]
    else:
        with progress("answer (prompts)", len(jobs)) as advance:
            for start in range(0, len(jobs), _BATCH):
                answers += generate_batch(model, batch := embeds[start : start + _BATCH], args)
                advance(len(batch))
        if not args.json:
            for job, answer in zip(jobs, answers):
                names = ", ".join(args.image_file[picture] for picture in job.pictures)
                print(f"{names or 'no picture'} · {job.prompt}\n{answer}")
    rows = [
        {"images": [args.image_file[picture] for picture in job.pictures], "prompt": job.prompt, "answer": answer}
        for job, answer in zip(jobs, answers)
    ]
    return {
        "model": str(args.model_path),
        "adapter": args.adapter and str(args.adapter),
        "runners": model.runners,
        "image_strategy": model.preprocessor.image_strategy,
        "answers": rows,
    }


def _faults(args: argparse.Namespace) -> Iterator[str]:
    if not args.image_file and any(IMAGE in prompt for prompt in args.prompt):
        yield f"--prompt: names {IMAGE} but there is no --image-file"


def generate_batch(model: Any, embeds: Sequence[np.ndarray], args: argparse.Namespace) -> list[str]:
    """Answer several prompts, each (1, T, H), in one left-padded batch by Transformers' `generate`.

    Prompts whose answers could reach the model's last position are answered one by one, each up to there.
    """
    import torch
    from transformers import LogitsProcessorList

    from fastvlm.common.limits import finite, stopped

    language = model.language
    positions = math.inf if language.positions is None else language.positions
    room = [positions - prompt.shape[1] + 1 for prompt in embeds]
    if len(embeds) > 1 and min(room) < args.max_new_tokens:
        return [answer for prompt in embeds for answer in generate_batch(model, [prompt], args)]
    length = max(prompt.shape[1] for prompt in embeds)
    batch = np.zeros((len(embeds), length, embeds[0].shape[2]), np.float32)
    mask = torch.zeros(len(embeds), length, dtype=torch.long)
    for row, prompt in enumerate(embeds):
        batch[row, length - prompt.shape[1] :] = prompt[0]
        mask[row, length - prompt.shape[1] :] = 1
    sampling = (
        {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
        if args.temperature > 0
        else {"do_sample": False}
    )
    ends = torch.tensor(sorted(language.eos_ids), device=language.like.device)

    def check(generated: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Check before each token that the logits of every unfinished answer are finite."""
        step = generated.shape[1]
        going = scores if not step else scores[~torch.isin(generated[:, -1], ends)]
        finite(going.cpu().numpy(), f"language model: logits of token {step + 1} of the answer", language)
        return scores

    with torch.inference_mode():
        ids = language.model.generate(
            inputs_embeds=torch.from_numpy(batch).to(language.like.device, language.like.dtype),
            attention_mask=mask.to(language.like.device),
            max_new_tokens=min(args.max_new_tokens, *room),
            num_beams=args.num_beams,
            eos_token_id=sorted(language.eos_ids),
            pad_token_id=min(language.eos_ids),
            logits_processor=LogitsProcessorList([check]),
            **sampling,
        )
    if ids.shape[1] == min(room) < args.max_new_tokens and ids[0, -1] not in ends:
        log(stopped(language.positions))
    return model.tokenizer.batch_decode(ids, skip_special_tokens=True)
