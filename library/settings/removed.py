"""Settings that were removed, each with what does its work now, so that an older config file says what to change in it."""

from collections.abc import Mapping

_WEIGHTS = 'use objective_weights = ["{}=..."]'
REMOVED: Mapping[str, str] = {
    "num_tag_variants": "it is 4",
    "prompt_categories": "take the rows out of the .tsv",
    "prompt_weighting": r"write \( and \) where brackets are text",
    "image_prompt_share": "all trajectories begin from pictures",
    "image_prompt_limit": "it is 1000",
    "image_prompt_copies": "it is 1",
    "image_prompt_noise": "it is 0",
    "image_prompt_center": "it is the adapter's mean of pictures",
    "train_multipliers": "they are 1 and -1",
    "image_pairs_multiplier": "it is 1",
    "image_pairs_prompt": "use images_prompt",
    "images_multiplier": "it is 1",
    "image_pairs_weight": _WEIGHTS.format("image_pairs"),
    "images_weight": _WEIGHTS.format("images"),
    "leco_weight": _WEIGHTS.format("leco"),
    "anchor_weight": _WEIGHTS.format("anchors"),
    "reward_weight": "use preserve_weight, or " + _WEIGHTS.format("score").removeprefix("use "),
    "anchor_batch_size": "it is 2",
    "score_pictures": "use images_dir",
    "hinge_margin": "it is 5",
    "reward_target": "it is 3",
    "normalize_gradient": "it always is",
    "num_views": "it is 4",
    "view_abar": "it is 0.9",
    "num_renoisings": "it is 4",
    "scorer_pessimism": "it is 1",
}
