"""What a fine-tune is asked for, and the defaults of what depends on it."""

import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

STAGES = ("projector", "llm", "all")
DTYPES = ("auto", "float32", "bfloat16")
Kind = Literal["projector", "adapter", "checkpoint"]
# The decoder's linear layers, by the names that they have in Transformers; lm_head and the embeddings are left alone.
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# LLaVA's own: scripts/v1_5/pretrain.sh, finetune_lora.sh (whose mm_projector_lr is a tenth) and finetune.sh.
_RATES: dict[Kind, tuple[float, float]] = {
    "projector": (1e-3, 1e-3),
    "adapter": (2e-4, 2e-5),
    "checkpoint": (2e-5, 2e-5),
}
_PLACES = ("checkpoint", "data", "image_folder", "evaluation_data", "output_dir")
_NEUTRAL = ("overwrite", "save_steps", "evaluation_limit", "max_new_tokens")  # change no weight


@dataclass(frozen=True)
class Settings:
    """The flags of `fastvlm finetune`; docs/FINETUNE.md explains them.

    `lora_alpha`, `learning_rate`, `projector_learning_rate` and `save_steps` are None for the default that depends on
    the others: see `alpha`, `rates` and `rhythm`.
    """

    checkpoint: Path
    data: Path
    output_dir: Path
    image_folder: Path | None = None
    evaluation_data: Path | None = None
    evaluation_split: float = 0.05
    evaluation_limit: int = 200
    train: str = "llm"
    full: bool = False
    lora_rank: int = 16
    lora_alpha: int | None = None
    epochs: int = 3
    batch_size: int = 8
    gradient_accumulation: int = 1
    learning_rate: float | None = None
    projector_learning_rate: float | None = None
    warmup: float = 0.03
    gradient_checkpointing: bool = False
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    max_new_tokens: int = 128
    save_steps: int | None = None
    overwrite: bool = field(default=False, compare=False)

    @property
    def kind(self) -> Kind:
        """What comes out: a projector, a LoRA adapter, or a whole checkpoint."""
        if self.train == "projector":
            return "projector"
        return "checkpoint" if self.full else "adapter"

    @property
    def alpha(self) -> int:
        """LoRA's alpha: the update is multiplied by alpha / rank."""
        return self.lora_alpha or 2 * self.lora_rank

    @property
    def rates(self) -> tuple[float, float]:
        """The peak learning rates: the projector's last."""
        rate, projector = _RATES[self.kind]
        if self.learning_rate is not None:
            projector, rate = projector / rate * self.learning_rate, self.learning_rate
        return rate, self.projector_learning_rate or projector

    def steps(self, records: int) -> int:
        """The optimizer's steps for so many training records."""
        batches = math.ceil(records / self.batch_size)
        return self.epochs * math.ceil(batches / self.gradient_accumulation)

    def rhythm(self, steps: int) -> tuple[int, int]:
        """The steps between two losses that are logged, and between two states that a killed run can go on from: a
        multiple of the former, so that no logged mean reaches over a kill."""
        logged = max(1, steps // 50)
        saved = self.save_steps or max(1, steps // 10)
        return logged, math.ceil(saved / logged) * logged

    def document(self) -> dict[str, Any]:
        """All settings, those that were left open resolved, ready for JSON."""
        rate, projector = self.rates
        resolved = {"lora_alpha": self.alpha, "learning_rate": rate, "projector_learning_rate": projector}
        document = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}
        return {key: value for key, value in (document | resolved).items() if key != "overwrite"}

    def decisive(self) -> dict[str, Any]:
        """Those that decide the weights, but for places: the same content may lie elsewhere."""
        return {key: value for key, value in self.document().items() if key not in (*_PLACES, *_NEUTRAL)}


FIELDS = tuple(entry.name for entry in fields(Settings))
