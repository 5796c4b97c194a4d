"""The benchmark scripts on tiny shapes: they run, and what they print follows from what they time."""

import importlib.util
import json
import lzma
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from puna.model import Decoder
from puna.model.native import kernels
from puna.model.packing import pack

FOLDER = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(FOLDER))  # last: tests/ has a serving.py too

import roof  # noqa: E402
import rows  # noqa: E402
import services  # noqa: E402
import shapes  # noqa: E402
import single  # noqa: E402
from contenders import Entry, decoder_bytes  # noqa: E402
from services import Answered, Asked  # noqa: E402


def script(name: str) -> ModuleType:
    """A script as a module, by its file."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


serving = script("serving")


@pytest.fixture(autouse=True, scope="module")
def folder(tmp_path_factory):
    """Checkpoints in a folder of this run's own."""
    kept, shapes.FOLDER = shapes.FOLDER, tmp_path_factory.mktemp("benchmarks")
    yield
    shapes.FOLDER = kept


@pytest.fixture(autouse=True)
def small_roof(monkeypatch):
    """A read roof of no meaning, but at once."""
    monkeypatch.setattr(roof, "READ_BYTES", 1 << 23)


class Here:
    """A contender without a process of its own, which test_single tries."""

    def __init__(self, entry: Entry, _: int) -> None:
        self.answer = entry.make(*entry.arguments).answer

    def close(self) -> None:
        """Nothing to end."""


def run(module: ModuleType, document: Path, monkeypatch, options: str) -> str:
    """A script's section of the document that it writes."""
    monkeypatch.setattr(sys, "argv", ["x.py", *options.split(), "--threads", "1", "--document", str(document)])
    module.main()
    return document.read_text()


def test_single(tmp_path, monkeypatch):
    options = "--shape tiny --bits bf16 --prompt 64 --answer 4 --repeats 1"
    text = run(single, tmp_path / "b.md", monkeypatch, options)
    for row in ("| prefill of 64, bf16 |", "| decode of 4, bf16 ", "transformers bf16", "% of read roof"):
        assert row in text
    assert f"`python benchmarks/single.py {options} --threads 1`" in text


def test_serving(tmp_path, monkeypatch):
    text = run(serving, tmp_path / "b.md", monkeypatch, "--shape tiny --bits bf16 --requests 3 --short 8 --long 40 "
               "--answer 4 --prefix 64 --peers transformers")  # fmt: skip
    for row in ("| burst, bf16 |", "| tbt p99 of 8 requests while 4 prompts of 40 arrive, bf16 |",
                "| ttft with a shared prefix of 64, bf16 |"):  # fmt: skip
        assert row in text


def test_moe(tmp_path, monkeypatch):
    moe = script("moe")
    monkeypatch.setattr(moe, "Contender", Here)
    text = run(moe, tmp_path / "b.md", monkeypatch, "--experts tiny-experts --dense tiny-dense --bits int4 "
               "--prompt 32 --answer 3 --repeats 1")  # fmt: skip
    assert "| decode, experts against dense, int4 |" in text
    assert "transformers' Llama 4" in text


def test_start(tmp_path, monkeypatch):
    start = script("start")
    monkeypatch.setattr(start, "PEERS", {})
    text = run(start, tmp_path / "b.md", monkeypatch, "--shape tiny --bits bf16 --repeats 1")
    assert "| puna bf16 |" in text


def test_quality(tmp_path, monkeypatch):
    quality, texts = script("quality"), tmp_path / "t.jsonl.xz"
    with lzma.open(texts, "wt") as file:
        file.write(json.dumps({"text": "The llama walks over the high grassland. " * 20}))
    monkeypatch.setattr(quality, "llama_cpp_forms", lambda *_: iter(()))
    text = run(quality, tmp_path / "b.md", monkeypatch, f"--text {texts} --bits int4 --windows 2 --length 32")
    plain, few = (re.search(rf"\| puna {bits} \| ([\d.]+) \| ([\d.]+) \|", text) for bits in ("bf16", "int4"))
    assert float(plain[2]) == 0 < float(few[2]) < 1
    assert float(plain[1]) == pytest.approx(float(few[1]), rel=0.5)


def test_a_start_that_fails_is_no_figure():
    start = script("start")
    with pytest.raises(RuntimeError, match="no such thing"):
        start.seconds_to_output([sys.executable, "-c", "raise SystemExit('no such thing')"])


def test_dense_has_the_active_parameters():
    from puna.family.arithmetic import count_parameters

    for sparse, dense in (("experts", "dense"), ("tiny-experts", "tiny-dense")):
        routers = shapes.SHAPES[sparse].num_layers * shapes.SHAPES[sparse].hidden_size * 16
        active = count_parameters(shapes.SHAPES[sparse]).active
        assert active - routers == count_parameters(shapes.SHAPES[dense]).total


def test_bytes_of_a_token():
    """A tied embedding is read as the head, once; one of its own isn't read at all."""
    tied = shapes.TINY
    both = Decoder(tied.with_(tie_word_embeddings=False)).bfloat16()
    table = tied.vocab_size * tied.hidden_size * 2
    assert decoder_bytes(Decoder(tied).bfloat16()) == decoder_bytes(both)
    assert decoder_bytes(both) == sum(p.numel() * 2 for p in both.parameters()) - table
    if kernels() is not None:  # packed: 4 bits and their scales, tables in 6
        few = Decoder(tied).bfloat16()
        pack(few, 4)
        linear = sum(p.numel() for p in both.parameters() if p.dim() == 2) - table
        six = table / 2 * 6 / 8
        assert 0.5 * linear + six < decoder_bytes(few) < 0.65 * linear + 1.2 * six


def test_summary():
    """Two requests, from the first one's sending at 1 s to the last token at 7 s."""
    found = serving.Summary.of([Answered(1.0, [3.0, 4.0, 5.0]), Answered(2.0, [6.0, 6.5, 7.0])])
    assert found == serving.Summary(6 / 6.0, 3.0, 0.75, 1.0)


def test_burst_is_spread_and_the_same_each_time():
    asked = serving.burst("tiny", 16, 128, 1024, 5)
    assert sorted(len(one.ids) for one in asked)[:: 15] == [128, 1024]
    assert asked == serving.burst("tiny", 16, 128, 1024, 5)
    assert [len(one.ids) for one in asked] != sorted(len(one.ids) for one in asked)


def test_short_answers_are_errors():
    with pytest.raises(RuntimeError, match="request 1 got 3 tokens, not 4"):
        services.together(lambda _, count: iter([1] * min(count, 3)), [Asked([1], 3), Asked([1], 4)])


def test_decode_share():
    """1 GB a token at 8 tokens a second of 10 GB/s is 80 %, apart from the cache; of 20 GB/s at best, 40 %."""
    figures = {"int4": [single.Figures("puna int4", 10**9, 100.0, 8.0, 8e-10),
                        single.Figures("peer", 10**9, 50.0, 4.0, 4e-10)]}  # fmt: skip
    table = "\n".join(single.table(figures, shapes.TINY, 8, 2, 2e10, 1e12))
    assert "| 8.0 tok/s | peer (1.00 GB) 4.0 | 2.00x | 80% of read roof (peer 40%), 40% of its best |" in table
    assert "| 100 tok/s | peer 50 | 2.00x |" in table


def test_sections_are_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x.py", "--document", "/secret/place", "--bits", "int4"])
    document = tmp_path / "b.md"
    for value in ("old", "new"):
        rows.write_rows(Path("x.py"), "X", [f"| {value} |"], "here", columns=("a",), document=document)
        rows.write_rows(Path("y.py"), "Y", ["| other |"], "here", columns=("a",), document=document)
    text = document.read_text()
    assert "old" not in text
    assert text.count("| new |") == text.count("| other |") == 1
    assert "`python benchmarks/x.py --bits int4`" in text


def test_roof_is_positive():
    assert roof.read_bandwidth(1) > 0
    assert roof.matrix_rate(torch.bfloat16, 4, 32, 64, 1) > 0


def test_invariance(tmp_path, monkeypatch):
    """Every way really happens to some case, and a batch that is known already is not computed again."""
    invariance = script("invariance")
    options = f"--cases 1 --batch 8 --bits int4 --resume {tmp_path / 'counts.json'}"
    monkeypatch.setattr(invariance, "TOGETHER", 4)
    with pytest.raises(SystemExit) as ended:
        run(invariance, tmp_path / "b.md", monkeypatch, options)
    assert ended.value.code == 0
    text = (tmp_path / "b.md").read_text()
    for way in ("4 at once", "prefix cached, one by one", "preempted", "n-gram guesses", "a draft model's guesses"):
        assert re.search(rf"\| int4 \| {way}.* \| [1-9]\d* of \d+ \| 0 \|", text), way
    monkeypatch.setattr(invariance, "run", None)
    with pytest.raises(SystemExit):
        run(invariance, tmp_path / "b.md", monkeypatch, options)
    assert (tmp_path / "b.md").read_text() == text


def test_a_difference_is_counted():
    invariance = script("invariance")
    outcomes = [invariance.Outcome([1, 2], "a"), invariance.Outcome([1, 2], "b")]
    counts = invariance.Counts()
    assert counts.add(outcomes, [outcomes[0], outcomes[0]], lambda outcome: outcome.beside == 0) == [1]
    assert (counts.cases, counts.happened, counts.differing) == (2, 2, 1)
