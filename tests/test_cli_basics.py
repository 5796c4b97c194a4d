"""The command line's base: help, errors, exit codes, `puna list`, `puna show`."""

import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import puna
from puna.cli import main as cli
from puna.errors import PunaError

SOURCE = str(Path(puna.__file__).parents[1])


def run(*arguments: str, code: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    program = ["-c", code] if code else ["-m", "puna"]
    path = os.pathsep.join([SOURCE, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *program, *arguments], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "100", **environment},
    )  # fmt: skip


def test_help_is_quick_and_lists_every_command() -> None:
    times: list[float] = []
    while len(times) < 10 and min(times, default=1) >= 0.4:  # a busy machine may need more than one try
        start = time.perf_counter()
        done = run("--help")
        times.append(time.perf_counter() - start)
        assert done.returncode == 0
    for name, (_, help_line) in cli.COMMANDS.items():
        assert name in done.stdout
        assert help_line in done.stdout
    assert min(times) < 0.4, f"best of ten: {min(times):.2f} s"


def test_help_imports_no_heavy_package() -> None:
    code = (
        "import sys, puna.cli.main as m\n"
        "try: m.main()\n"
        "except SystemExit: pass\n"
        "print([x for x in ('torch', 'numpy', 'pydantic', 'fastapi', 'huggingface_hub', 'tokenizers', 'puna.engine') "
        "if x in sys.modules])"
    )
    done = run("--help", code=code)
    assert done.stdout.rstrip().endswith("[]")


def test_version() -> None:
    assert run("--version").stdout == f"puna {puna.__version__}\n"


def test_unknown_command_suggests_and_exits_2() -> None:
    done = run("lst")
    assert done.returncode == 2
    assert "Did you mean 'list'" in done.stderr
    assert done.stdout == ""


def test_wrong_option_exits_2() -> None:
    done = run("list", "--colour")
    assert done.returncode == 2
    assert "--colour" in done.stderr


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def command() -> None:
        raise error

    module = type(sys)("a_command")
    module.command = command
    monkeypatch.setitem(sys.modules, "a_command", module)
    monkeypatch.setitem(cli.COMMANDS, "list", ("a_command:command", "Fails."))
    monkeypatch.setattr(sys, "argv", ["puna", "list"])


def test_a_users_mistake_is_one_line_without_traceback(monkeypatch, capfd) -> None:
    fail_with(monkeypatch, PunaError("config.json has no hidden_size. Add it."))
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    out, err = capfd.readouterr()
    assert (out, err) == ("", "Error: config.json has no hidden_size. Add it.\n")


def test_a_name_that_is_too_long_for_a_file_is_no_traceback(monkeypatch, capfd) -> None:
    monkeypatch.setattr(sys, "argv", ["puna", "show", "a" * 5000])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    assert capfd.readouterr().err == f"Error: {'a' * 5000}: File name too long\n"


def test_standard_input_that_is_not_utf8_is_no_traceback(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Gr\xfc\xdfe"), encoding="utf-8"))
    monkeypatch.setattr(sys, "argv", ["puna", "generate", "./nowhere"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 1
    assert "is no file or folder here" in capsys.readouterr().err


def test_ctrl_c_exits_130(monkeypatch, capfd) -> None:
    fail_with(monkeypatch, KeyboardInterrupt())
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 130
    assert "Traceback" not in capfd.readouterr().err


def test_a_closed_pipe_is_quiet() -> None:
    path = os.pathsep.join([SOURCE, *filter(None, [os.environ.get("PYTHONPATH")])])
    reader = subprocess.Popen(
        [sys.executable, "-m", "puna", "show", "scout", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert reader.stdout is not None
    assert reader.stderr is not None
    reader.stdout.close()
    assert reader.stderr.read() == b""
    assert reader.wait(timeout=60) == 1


def test_list_json() -> None:
    done = run("list", "--json")
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert len(rows) == 24
    assert rows["llama-3.1-8b"]["parameters"] == 8_030_261_248
    assert rows["llama-4-scout"]["active_text_parameters"] == 17_172_894_720
    assert rows["llama-4-behemoth"]["parameters"] is None


def test_list_table() -> None:
    done = run("list")
    assert done.returncode == 0
    line = next(line for line in done.stdout.splitlines() if "llama-4-maverick" in line)
    for cell in ("401.58B", "17.18B", "803.2 GB", "1M", "llama4", "2025-04"):
        assert cell in line
    assert "not published" in done.stdout
    assert "…" not in done.stdout, "a cell is cut off"


def test_show_json() -> None:
    facts = json.loads(run("show", "meta-llama/Llama-4-Scout-17B-16E-Instruct", "--json").stdout)
    assert facts["name"] == "llama-4-scout"
    assert facts["parameters"]["total"] == 108_641_793_536
    assert facts["weight_bytes"]["bfloat16"] == 217_283_587_072
    assert facts["kv_cache"]["naive_bytes_per_token"] == 196_608
    assert facts["kv_cache"]["growing_bytes_per_token"] == 49_152
    assert facts["licence"]["eu_multimodal_exclusion"] is True
    assert {claim["status"] for claim in facts["claims"]} == {"verified"}


def test_show_table() -> None:
    text = run("show", "scout").stdout
    for part in ("107,769,861,120", "17,172,894,720", "12 of 48: 3, 7, ..., 47", "196,608", "49,152", "[verified]"):
        assert part in text, part


def test_show_says_not_published() -> None:
    text = run("show", "behemoth").stdout
    assert text.count("not published") >= 5
    assert "secondary" in text


def test_show_unknown_name_suggests() -> None:
    done = run("show", "lama-3.1-8b")
    assert done.returncode == 1
    assert done.stderr.startswith("Error: there is no member 'lama-3.1-8b'")
    assert "llama-3.1-8b" in done.stderr
    assert "Traceback" not in done.stderr


def test_show_of_a_hub_id_outside_the_family_says_how() -> None:
    done = run("show", "someone/other-model")
    assert done.returncode == 1
    assert "puna pull someone/other-model" in done.stderr


def test_show_reads_a_checkpoint(tmp_path: Path) -> None:
    import torch

    from puna.checkpoint import save
    from puna.family import ModelConfig
    from puna.model import Decoder

    config = ModelConfig(
        architecture="llama", vocab_size=32, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
        intermediate_size=24, context_length=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Decoder(config)
    save(model, config, None, tmp_path / "tiny")
    facts = json.loads(run("show", str(tmp_path / "tiny"), "--json").stdout)
    assert facts["format"] == "safetensors"
    assert facts["shape"]["hidden_size"] == 16
    assert facts["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert "safetensors" in run("show", str(tmp_path / "tiny")).stdout


def test_show_tells_the_tower_of_a_checkpoint_that_sees() -> None:
    from puna.checkpoint.safetensors_read import SafetensorsFile

    facts = json.loads(run("show", "cria", "--json").stdout)
    assert (facts["vision"]["tile_side"], facts["vision"]["patch_side"]) == (96, 12)
    assert "vision" not in facts["shape"]
    tower = SafetensorsFile(Path(puna.__file__).parent / "data" / "cria" / "cria.vision.safetensors").entries.values()
    assert facts["parameters"]["vision"] == sum(math.prod(each.shape) for each in tower)
    assert facts["parameters"]["total"] == facts["parameters"]["text"] + facts["parameters"]["vision"]
    shown = _cells(run("show", "cria").stdout, "Vision")
    assert shown["Tiles"] == "96 x 96 pixels, up to 3 and one of the whole"
    assert shown["Patches"] == "12 x 12 pixels, 64 a tile"
    assert (shown["Layers"], shown["Width"], shown["Heads"]) == ("4", "128", "4, 32 wide")
    assert shown["Adapter"] == "2 x 2 patches become one token of 384: 16 tokens a tile"


def test_show_tells_a_tower_that_is_read_by_cross_attention() -> None:
    shown = _cells(run("show", "llama-3.2-11b-vision").stdout, "Vision")
    assert shown["Tiles"] == "560 x 560 pixels, up to 4"
    assert shown["Layers"] == "32 and 8 global"
    assert shown["Output"] == "7,680 wide: the last layer's and those of layers 3, 7, 15, 23, 30"
    assert shown["Adapter"].startswith("8 cross-attention layers, before layers 3, 7, 11, ")
    assert shown["Computed as by"] == "Meta's code"


def _cells(shown: str, title: str) -> dict[str, str]:
    """Names and values of the table under a title."""
    lines = [line.strip() for line in shown.splitlines()]
    rows = itertools.takewhile(bool, lines[lines.index(title) + 2 :])
    return {name: value for name, _, value in (re.split(r"( {2,})", row, maxsplit=1) for row in rows)}


def test_show_of_a_missing_path_is_an_error(tmp_path: Path) -> None:
    done = run("show", str(tmp_path / "absent"))
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert "absent" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_every_command_loads_and_its_help_has_an_example(command: str) -> None:
    done = run(command, "--help")
    assert done.returncode == 0, done.stderr
    assert f"puna {command}" in done.stdout.split("Usage:", 1)[1].split("\n", 1)[1]
