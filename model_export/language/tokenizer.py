"""An artefact's tokenizer and preprocessing files, as swift-transformers, Transformers and the demo app read them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastvlm.checkpoint.checkpoint import Checkpoint
from fastvlm.common.documents import dump
from fastvlm.data.prompt import CHAT_TEMPLATE, END_OF_TURN
from model_export import contract

_BICUBIC = 3  # PIL.Image.Resampling.BICUBIC, by number as Transformers' image processors store it


def write_tokenizer(checkpoint: Checkpoint, folder: Path, template: str | None = None) -> None:
    """Write tokenizer.json and tokenizer_config.json. `<image>` is a special token at the checkpoint's image token id.

    `template` is the chat template; None: the checkpoint's own, or the project's where it has none.

    `eos_token` is what ends a turn in the chat template, whatever the checkpoint names (base models: <|endoftext|>):
    the app stops at it, and nowhere else.

    swift-transformers picks its class by `tokenizer_class` and takes the chat template from tokenizer_config.json (not
    from a .jinja file, where Transformers 5 would put it); paths and settings of this machine stay out.
    """
    tokenizer: Any = checkpoint.tokenizer()
    text = checkpoint.model_config.text
    template = template or tokenizer.chat_template or CHAT_TEMPLATE
    ends = END_OF_TURN in template and END_OF_TURN in tokenizer.get_vocab()
    (folder / contract.TOKENIZER).write_text(tokenizer.backend_tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    added = {
        str(token): {
            "content": entry.content,
            "lstrip": entry.lstrip,
            "normalized": entry.normalized,
            "rstrip": entry.rstrip,
            "single_word": entry.single_word,
            "special": entry.special,
        }
        for token, entry in sorted(tokenizer.added_tokens_decoder.items())
    }
    document = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": added,
        "additional_special_tokens": [entry["content"] for entry in added.values() if entry["special"]],
        "add_prefix_space": False,
        "bos_token": tokenizer.bos_token,
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
        "eos_token": END_OF_TURN if ends else tokenizer.eos_token,
        "errors": "replace",
        "model_max_length": min(tokenizer.model_max_length, text.max_position_embeddings),
        "pad_token": tokenizer.pad_token,
        "split_special_tokens": False,
        "unk_token": tokenizer.unk_token,
    }
    dump(folder / contract.TOKENIZER_CONFIG, document)


def write_processors(
    folder: Path,
    image_size: int,
    image_strategy: str,
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
) -> None:
    """Write preprocessor_config.json and processor_config.json for pictures of `image_size` pixels per side.

    `do_center_crop`, `do_pad` and `image_strategy` say the same thing, to Transformers and to this project. The demo
    app crops whatever they say.
    """
    pad = image_strategy == "pad"
    dump(
        folder / contract.PREPROCESSOR_CONFIG,
        {
            "crop_size": {"height": image_size, "width": image_size},
            "do_center_crop": not pad,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_pad": pad,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": list(mean),
            "image_processor_type": "CLIPImageProcessor",
            "image_std": list(std),
            "image_strategy": image_strategy,
            "processor_class": contract.PROCESSOR_CLASS,
            "resample": _BICUBIC,
            "rescale_factor": 1 / 255,
            "size": {"shortest_edge": image_size},
        },
    )
    dump(
        folder / contract.PROCESSOR_CONFIG,
        {
            "image_token": contract.IMAGE_TOKEN,
            "num_additional_image_tokens": 0,
            "patch_size": contract.PATCH_SIZE,
            "processor_class": contract.PROCESSOR_CLASS,
        },
    )
