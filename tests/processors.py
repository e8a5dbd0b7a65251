"""The numeric tests with the kernels that other processors would take, and with two threads: python -m tests.processors [pytest's words].

Prints a row of a table for each setting; the words of one that fails follow it. A setting above what this processor has is its best.
"""

import itertools
import os
import subprocess
import sys
import time

FILES = [
    *("solvers", "noise_schedule", "flow_model", "flow_families", "latent_spaces", "models", "sampling", "rollout", "noised_pictures"),
    *("lora", "lora_gradients", "lora_saving", "estimators", "score_objective", "score_term", "rewards", "reward_shapes", "goals"),
    *("leco_term", "image_terms", "anchors", "train_leco_score_resume", "golden_runs", "scorers", "unet_encoder", "scorer_training"),
]
# ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA, threads
SETTINGS = list(itertools.product(("default", "avx2", "avx512"), ("SSE41", "AVX2", ""), (1, 2)))


def main() -> int:
    failed = 0
    print("| ATEN_CPU_CAPABILITY | ONEDNN_MAX_CPU_ISA | threads | result | seconds |\n|---|---|---|---|---|", flush=True)
    for aten, onednn, threads in SETTINGS:
        environment = os.environ | {"ATEN_CPU_CAPABILITY": aten, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
        environment |= {"ONEDNN_MAX_CPU_ISA": onednn} if onednn else {}
        begun = time.monotonic()
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            *(f"tests/test_{name}.py" for name in FILES),
            *sys.argv[1:],
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        last = done.stdout.strip().splitlines()[-1].split(" in ")[0]
        print(f"| {aten} | {onednn or 'not set'} | {threads} | {last} | {time.monotonic() - begun:.0f} |", flush=True)
        if done.returncode:
            failed = 1
            print(done.stdout, flush=True)
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
