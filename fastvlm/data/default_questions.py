"""The questions that a model is evaluated and calibrated on where nobody names any: one place decides.

A fine-tune's own come first, which `fastvlm finetune` leaves beside what it trained.
"""

from pathlib import Path

from fastvlm.data.scenes import knows_demo

EVALUATION = "evaluation.json"  # records that were held out of the training
TRAINING = "training_pictures.json"  # some of the records that it was trained on
DEMO, DRAWN = "demo", "drawn"  # the demo set, and drawn pictures of which nobody knows the answer


def own(checkpoint: Path, adapter: Path | None, name: str) -> Path | None:
    """The file of a fine-tune's own questions, EVALUATION or TRAINING; None where there is none.

    They are beside what was trained: in the adapter's folder, or in that of a checkpoint that was trained whole.
    """
    file = (adapter or checkpoint) / name
    return file if file.is_file() and file.stat().st_size > len("[ ]\n") else None  # it may have kept none


def built_in(checkpoint: Path) -> str:
    """DEMO where the checkpoint speaks the demo's language, else DRAWN."""
    return DEMO if knows_demo(checkpoint) else DRAWN
