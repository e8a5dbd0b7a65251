"""DRaFT-LV: finished pictures, noised anew to the last step, and finished again with gradient."""

from typing import ClassVar

from library.objectives.x0 import X0


class DraftLV(X0):
    """The last step's own x0, several fresh noisings of one finished picture; DRaFT-LV (arXiv 2309.17400, section 4).

    The lowest variance of all at the last step, and only there: colour and texture, hardly composition.
    """

    rollout: ClassVar[str | None] = "noised_last"
