"""How a run fits into a card's memory: its settings, and what the size of a card stands for."""

from dataclasses import dataclass

from library.settings.options import check_at_least, option

PRESETS = {
    "6gb": {"train_batch_size": 1, "gradient_accumulation_steps": 8, "gradient_checkpointing": True, "quantize_base": "int8"},
    "8gb": {"train_batch_size": 2, "gradient_accumulation_steps": 4, "gradient_checkpointing": True, "quantize_base": "int8"},
    "12gb": {"train_batch_size": 4, "gradient_accumulation_steps": 2, "gradient_checkpointing": True},
    "24gb": {"gradient_checkpointing": True},
}


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """How little of the graphics card's memory is enough."""

    preset: str | None = option(
        None,
        choices=PRESETS,
        stands_for=PRESETS,
        help="Settings for a card of this memory, SDXL at 1024 pixels included; what you set yourself comes before them.",
    )
    quantize_base: str | None = option(
        None,
        choices=("fp8", "int8", "nf4"),
        help="Keep the frozen U-Net's weights in 8 or 4 bits; int8 is nearer to the whole weights than fp8, at the same size.",
    )
    blocks_to_swap: int = option(
        0, help="Residual and transformer blocks of the U-Net whose frozen weights stay in the computer's memory: slower.", expert=True
    )

    def __post_init__(self) -> None:
        check_at_least(self, 0, "blocks_to_swap")

    @property
    def packs(self) -> bool:
        """Whether the U-Net's weights are not held as they are."""
        return self.quantize_base is not None or self.blocks_to_swap > 0
