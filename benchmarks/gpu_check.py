"""All that only a GPU can show, in one command and under 10 minutes on one H100; no network, no checkpoint.

    python -m benchmarks.gpu_check

The CUDA tests; training steps of SD1.5- and SDXL-sized models with random weights in each precision, with and without gradient
checkpointing, with quantised and with swapped weights; the memory of every preset beside what is counted ahead; model FLOPs utilisation;
xformers against sdpa; the 8-bit optimizers; torch.compile; the scorer's throughput.
Every section is a process of its own with a time limit, and what it found is in the result file as soon as it ends. To see that
the command itself works where there is no GPU: --device cpu --tiny.

Exit codes: 0 every section passed or was skipped for a stated reason; 1 a section failed or ran out of time; 2 bad arguments;
3 there is no CUDA GPU, and nothing was checked.
"""

import argparse
import contextlib
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import ROOT
from benchmarks.meter import environment
from library.atomic_files import atomic_write_text
from library.settings.cli import run_main
from library.settings.shared import TrainingConfig
from library.training.runtime import create_accelerator

TIME_LIMIT = 570.0  # seconds for all sections together
NO_GPU = 3


@dataclass(frozen=True, kw_only=True)
class Section:
    """A process of its own.

    Attributes:
        arguments: of Python; --output and the path of a file are put behind them, into which it writes its result as JSON.
        timeout: seconds.
        judge: the result -> "passed", "failed" or "skipped".
    """

    name: str
    arguments: tuple[str, ...]
    timeout: float = 90.0
    judge: Callable[[Any], str]


def judge_step(result: Mapping[str, Any]) -> str:
    """A combination that does not fit into memory is a result; any other error, or a wrong count, is a failure."""
    cells = result["cells"]
    wrong = [cell for cell in cells if cell.get("error", "out of memory") != "out of memory" or cell.get("count_agrees") is False]
    return "failed" if wrong or not cells else "passed"


def judge_section(result: Mapping[str, Any]) -> str:
    return "skipped" if "skipped" in result else "passed" if result["ok"] else "failed"


def sections(tiny: bool) -> list[Section]:
    """What is checked, the most telling first: a slow machine may not reach the last."""
    patience = 4.0 if tiny else 1.0  # tiny is for a CPU, which may have other work

    def step(name: str, family: str, *arguments: str, timeout: float = 90.0) -> Section:
        words = ["-m", "benchmarks.step", "--random_weights", family, *arguments]
        if tiny:
            words += ["--tiny", "--scorer_size", "tiny", "--max_denoising_steps", "4", "--warm_up_steps", "1", "--timed_steps", "1"]
        return Section(name=name, arguments=tuple(words), timeout=patience * timeout, judge=judge_step)

    def own(name: str, timeout: float = 60.0) -> Section:
        words = ("-m", "benchmarks.gpu_sections", name, *["--tiny"] * tiny)
        return Section(name=name, arguments=words, timeout=patience * timeout, judge=judge_section)

    sizes = ("--train_batch_size", "1", "4", "8", "--gradient_checkpointing", "off", "on")
    one_size = ("--train_batch_size", "4")
    half = ("--mixed_precision", "bf16")
    return [
        own("tests", timeout=120.0),
        own("optimizers"),
        step("sd1_bf16", "sd1", *half, *sizes),
        step("sd1_fp16", "sd1", "--mixed_precision", "fp16", *one_size),
        step("sd1_fp32", "sd1", "--mixed_precision", "no", *one_size),
        step("sdxl_bf16", "sdxl", *half, *sizes, timeout=180.0),
        own("memory", timeout=120.0),
        own("mfu"),
        step("sdxl_int8", "sdxl", *half, *one_size, "--quantize_base", "int8"),
        step("sdxl_swap", "sdxl", *half, *one_size, "--blocks_to_swap", "40"),
        step("optimizer_8bit", "sd1", *half, *one_size, "--optimizer_type", "AdamW8bit"),
        own("attention"),
        own("scorer"),
        step("torch_compile", "sd1", *half, *one_size, "--torch_compile", timeout=150.0),  # without it: sd1_bf16
    ]


def run_section(section: Section, limit: float, environment_variables: Mapping[str, str]) -> dict[str, Any]:
    """Run one section, at most `limit` seconds -> its record for the result file; nothing that it does ends the check."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result"
        command = [sys.executable, *section.arguments, "--output", str(output)]
        record: dict[str, Any] = {"name": section.name, "command": ["python", *section.arguments], "result": None}
        start = time.perf_counter()
        code, text = _run(command, min(section.timeout, limit), environment_variables)
        record |= {"seconds": round(time.perf_counter() - start, 1), "exit_code": code, "status": "timed out" if code is None else "failed"}
        if output.exists():
            try:
                record["result"] = json.loads(output.read_text(encoding="utf-8"))
            except ValueError as error:
                text += f"\nits result cannot be read: {error}"
        if code == 0 and record["result"] is not None:
            record["status"] = section.judge(record["result"])
        if record["status"] not in ("passed", "skipped"):
            record["output_tail"] = text[-4000:]
        record["printed"] = text
        return record


def check(
    chosen: Sequence[Section], path: Path, where: Mapping[str, Any], environment_variables: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Run the sections one after another, and write all that is known to `path` after each."""
    records: list[dict[str, Any]] = []
    end = time.perf_counter() + TIME_LIMIT
    for number, section in enumerate(chosen, 1):
        print(f"[{number}/{len(chosen)}] {section.name} ...", flush=True)
        remaining = end - time.perf_counter()
        if remaining < 1:
            record: dict[str, Any] = {"name": section.name, "seconds": 0.0, "printed": "", "result": None, "status": "timed out"}
        else:
            record = run_section(section, remaining, environment_variables)
        print(record.pop("printed").rstrip())
        print(f"[{number}/{len(chosen)}] {section.name}: {record['status']}, {record['seconds']:.0f} s", flush=True)
        records.append(record)
        atomic_write_text(path, json.dumps({**where, "sections": records}, indent=1) + "\n")
    return records


def _run(command: Sequence[str], limit: float, environment_variables: Mapping[str, str]) -> tuple[int | None, str]:
    """Exit code (None: out of time, all of its processes are ended) and what it printed."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environment_variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that torch.compile's workers can be ended with it
    )
    try:
        text, _ = process.communicate(timeout=limit)
        return process.returncode, text
    except subprocess.TimeoutExpired:
        return None, _end(process)
    except BaseException:
        _end(process)
        raise


def _end(process: subprocess.Popen) -> str:
    with contextlib.suppress(ProcessLookupError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:  # Windows
            process.kill()
    return process.communicate()[0]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only to see that the command works")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to see that the command works")
    parser.add_argument("--sections", nargs="+", choices=[section.name for section in sections(False)], help="only these")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the result file")
    given = parser.parse_args(argv)
    if given.device == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA GPU here (torch.cuda.is_available() is false), so nothing was checked; exit code 3.")
        return NO_GPU
    variables = {"HF_HUB_OFFLINE": "1"}
    if given.device == "cpu":
        variables |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    name = torch.cuda.get_device_name() if given.device == "cuda" else "cpu"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    path = given.output_dir / f"gpu_{slug}_{datetime.datetime.now():%Y-%m-%d_%H%M%S}.json"
    where = {"device": name, "tiny": given.tiny, "environment": environment(create_accelerator(TrainingConfig()))}
    chosen = [section for section in sections(given.tiny) if given.sections is None or section.name in given.sections]
    records = check(chosen, path, where, variables)
    print("\n" + "\n".join(f"{record['name']:16} {record['status']:10} {record['seconds']:6.1f} s" for record in records))
    print(f"written to {path}")
    return 0 if all(record["status"] in ("passed", "skipped") for record in records) else 1


if __name__ == "__main__":
    run_main(lambda: sys.exit(main()))
