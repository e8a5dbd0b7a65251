"""LECO's form with a score in the place of words: a regression to the frozen prediction, shifted along the score's gradient."""

from typing import ClassVar

from library.objectives.prev import Prev


class Guidance(Prev):
    """eps_m -> eps_0 + m lambda g, with g the score's gradient at RMS 1 where the frozen prediction leads (x_prev).

    This is LECO's target `neutral + guidance (positive - unconditional)` (ESD, arXiv 2303.07345, eq. 7) with the difference of two
    prompts replaced by classifier guidance (arXiv 2105.05233, algorithm 2): distilled score guidance. With
    lambda = reward_weight / (2 preserve_weight),

        preserve_weight |eps_m - eps_0 - m lambda g|^2 = preserve_weight |eps_m - eps_0|^2 - reward_weight m <g, eps_m - eps_0> + const,

    which is the loss of the other estimators with g taken at the frozen model's own step. So the target does not run away with
    the LoRA, it is odd in m by construction, and the score is asked once a step. It is a first-order step: the reward's shape
    does not matter to it, and preserve_weight must be above 0.
    """

    at_frozen: ClassVar[bool] = True
