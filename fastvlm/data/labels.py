"""Records as token ids and labels, equal to apple/ml-fastvlm's `preprocess_qwen_2`, and batches of them."""

from array import array
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from fastvlm.common.errors import UserError
from fastvlm.common.findings import several
from fastvlm.data.prompt import ANSWER, SYSTEM, encode_text, render_turn
from fastvlm.data.records import Record, Turn

NOT_LEARNT = -100  # the label that PyTorch's cross entropy leaves out
Encoded = tuple[Sequence[int], Sequence[int]]  # ids and labels


def encode_record(record: Record, tokenizer: Any, image_token: int, image_tokens: int) -> tuple[list[int], list[int]]:
    """A conversation's token ids and labels: answers are learnt, with the `<|im_end|>` and the newline behind each.

    A record without a system turn gets the default one. Nothing is cut off: `encode_records` refuses what is too long.

    Args:
        tokenizer: the checkpoint's tokenizer, of Transformers.
        image_token: the id that stands for a picture.
        image_tokens: how often it is repeated for each picture.

    Returns:
        The ids, and as many labels: the id where it is learnt, else `NOT_LEARNT`. They are not shifted: a model of
        Transformers does that itself.
    """
    turns = record.turns if record.turns[0].role == "system" else (Turn("system", SYSTEM), *record.turns)
    prefix = encode_text(tokenizer, ANSWER, image_token, image_tokens)
    ids: list[int] = []
    labels: list[int] = []
    for turn in turns:  # each ends with a special token and a newline, so that no token reaches over two
        spoken = encode_text(tokenizer, render_turn(turn.role, turn.text), image_token, image_tokens)
        ids += spoken
        if turn.role != "assistant":
            labels += [NOT_LEARNT] * len(spoken)
            continue
        # an answer that begins with a newline may share a token with the one in front of it, which is learnt then
        same = next((at for at, token in enumerate(prefix) if spoken[at] != token), len(prefix))
        labels += [NOT_LEARNT] * same
        labels += [NOT_LEARNT if token == image_token else token for token in spoken[same:]]
    return ids, labels


def encode_records(
    records: Sequence[Record],
    tokenizer: Any,
    image_token: int,
    image_tokens: int,
    longest: int,
    advance: Callable[[], Any] | None = None,
) -> list[Encoded]:
    """`encode_record` of each, in 8 bytes a token; UserError that names every record of more than `longest` tokens.

    The original implementation cuts such a record off at the tokenizer's `model_max_length`, its answer included.
    `advance` is called after each.
    """
    encoded: list[Encoded] = []
    faults = []
    for record in records:
        ids, labels = encode_record(record, tokenizer, image_token, image_tokens)
        encoded.append((array("i", ids), array("i", labels)))
        if len(ids) > longest:
            faults.append(f"{record.name}: {len(ids)} tokens")
        if advance is not None:
            advance()
    if faults:
        raise UserError(f"records too long, expected at most {longest} tokens: {several(faults)}")
    return encoded


def collate(
    encoded: Sequence[Encoded],
    pad_token: int,
    side: Literal["left", "right"] = "right",
    pixel_values: Sequence[np.ndarray] = (),
) -> dict[str, np.ndarray]:
    """Encoded records as one batch.

    Args:
        encoded: B of them, T tokens the longest.
        pad_token: the id in the places that are filled up.
        side: where these are: "right" for training, as in the original implementation, "left" for generation, where
            the prompts' ends stand together.
        pixel_values: of all the records' pictures in their order, each (3, S, S) or (1, 3, S, S) float32.

    Returns:
        `input_ids`, `labels` and `attention_mask`, each (B, T) int64, and `pixel_values` (pictures, 3, S, S) float32
        where there are any.
    """
    longest = max(len(ids) for ids, _ in encoded)
    batch = {
        "input_ids": np.full((len(encoded), longest), pad_token, np.int64),
        "labels": np.full((len(encoded), longest), NOT_LEARNT, np.int64),
        "attention_mask": np.zeros((len(encoded), longest), np.int64),
    }
    for row, (ids, labels) in enumerate(encoded):
        real = slice(longest - len(ids), None) if side == "left" else slice(len(ids))
        batch["input_ids"][row, real], batch["labels"][row, real], batch["attention_mask"][row, real] = ids, labels, 1
    if len(pixel_values):
        batch["pixel_values"] = np.concatenate([pixels.reshape(-1, *pixels.shape[-3:]) for pixels in pixel_values])
    return batch
