"""Tests run on the CPU, without network and on one thread, or as many as OMP_NUM_THREADS says."""

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

gc.disable()  # until all tests are collected: imports make objects that stay, and looking for garbage among them took a fifth of the suite

import pytest  # noqa: E402
import torch  # noqa: E402


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True, scope="session")
def signals_arrive() -> None:
    """Begun in the background of a shell or by nohup, a process ignores some, and so would the processes that tests start and stop."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if os.name == "posix" else ():
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@pytest.fixture(autouse=True, scope="session")
def threads() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(autouse=True, scope="session")
def attention_of_the_named_kernels() -> None:
    """ATEN_CPU_CAPABILITY hides AVX-512 from torch's kernels and not AMX, which no processor has without it: torch 2.13's fused attention
    in bfloat16 then packs for AMX and ends in "pack_vnni2 is only supported when avx512 is supported"."""
    if torch.cpu._is_amx_tile_supported() and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
        torch.backends.cuda.enable_flash_sdp(False)


@pytest.fixture(autouse=True, scope="session")
def tokenizers_are_read_once() -> Iterator[None]:
    """CLIP's 49408 tokens take longer to read than all the weights of a tiny model, and nearly every model has the same."""
    import transformers  # not before tests/optional/conftest.py has seen to torchvision

    read = transformers.CLIPTokenizer.from_pretrained
    made: dict[frozenset[tuple[str, bytes]], Any] = {}

    def from_pretrained(folder: Path, **options: Any) -> Any:
        key = frozenset((path.name, path.read_bytes()) for path in Path(folder).iterdir())
        if key not in made:
            made[key] = read(folder, **options)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.CLIPTokenizer, "from_pretrained", from_pretrained)
        yield


@pytest.fixture(autouse=True)
def accelerate_forgets() -> Iterator[None]:
    """Accelerate keeps the first run's precision for the whole process."""
    yield
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's folder, a scorer and prompts for train_leco_score.py; nothing writes into it."""
    from tests.helpers.tiny_leco_run import make_workplace

    return make_workplace(tmp_path_factory.mktemp("leco"))


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a script's main as a command that has to fail -> its one sentence, without the "error: "."""
    from library.settings.cli import run_main

    def refused(main: Callable[[], object], *words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            run_main(main)
        said = capsys.readouterr().err
        assert ended.value.code == 2, said
        [sentence] = [line for line in said.splitlines() if line.startswith("error: ")]
        return sentence.removeprefix("error: ")

    return refused


LONGEST_ID = 60  # characters; a hostile prompt has 100,000


def pytest_make_parametrize_id(val: Any) -> str | None:
    """Long texts are cut in a test's name; pytest numbers those that become alike."""
    return f"{ascii(val[:LONGEST_ID])}..." if isinstance(val, str | bytes) and len(val) > LONGEST_ID else None
