"""What a script does before it imports torch."""

import gc
import os


def before_torch() -> None:
    """Make torch's threads wait quietly, and import without looking for garbage; a script calls it where it is the program.

    OpenMP's threads spin by default while they wait, which takes the cores of other processes; a user's own choice is kept. Importing makes
    objects that stay, so the collector, which run_main turns on again, finds nothing among them in an eighth of torch's time to import.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    gc.disable()
