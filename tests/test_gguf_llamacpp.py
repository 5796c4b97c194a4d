"""llama.cpp itself on the files that we write: same logits, same greedy tokens, same token ids; and its K-quants."""

from pathlib import Path

import numpy as np
import pytest
import torch

from puna.checkpoint import load
from puna.checkpoint.gguf_read import GGUFSource
from puna.checkpoint.gguf_write import write_gguf
from puna.text.train import train_tokenizer
from test_gguf import CONFIGS, LLAMA4, random_model, tiny, write

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

LENGTH = 40
SAME = ("llama2", "llama3.1", "llama3.2", "scout", "maverick", "two experts a token")
LINES = (
    "The llama walked over the high grassland, and 12,345 others followed.\n",
    "¿Qué tal? Ça va, Müller! 你好 世界",
    "def f(x):\n    return x ** 2  # don't\n",
    "They'LL see: it's 3.14 o'clock ...   yes\n\n\n",
)
F32_CACHE = {"type_k": 0, "type_v": 0}  # GGML_TYPE_F32: otherwise its key/value cache rounds to float16


def runtime(path: Path) -> "llama_cpp.Llama":
    return llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False, n_threads=1, **F32_CACHE)


def theirs(path: Path, ids: list[int]) -> torch.Tensor:
    model = runtime(path)
    model.eval(ids)
    logits = torch.from_numpy(np.array(model.scores[: len(ids)]))
    model.close()
    return logits


def ours(path: Path, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return load(path, dtype=torch.float32).model(torch.tensor([ids]))[0]


def some_ids(config) -> list[int]:
    return torch.randint(0, config.vocab_size, (LENGTH,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.mark.parametrize("name", SAME)
def test_logits_agree(name, tmp_path):
    path, ids = write(CONFIGS[name], tmp_path / "m.gguf"), some_ids(CONFIGS[name])
    assert (ours(path, ids) - theirs(path, ids)).abs().max() < 1e-4


@pytest.mark.parametrize("type", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_quantised_logits_agree(type, tmp_path):
    """llama.cpp also rounds activations (to 8 bits for Q8_0 and Q4_0), so agreement is of that order; ours is exact."""
    path, ids = write(CONFIGS["llama3.1"], tmp_path / "m.gguf", type), some_ids(CONFIGS["llama3.1"])
    logits = ours(path, ids)
    distance = (logits - theirs(path, ids)).abs().mean() / logits.abs().mean()
    assert distance < {"F16": 0.002, "BF16": 0.02, "Q8_0": 0.06, "Q4_0": 0.06}[type]


def test_greedy_tokens_agree(tmp_path):
    for name in ("llama3.1", "scout"):
        path, ids = write(CONFIGS[name], tmp_path / f"{name}.gguf"), [5, 17, 60]
        model, chosen = runtime(path), []
        for _ in range(24):
            model.eval(ids[-1:] if chosen else ids)
            chosen.append(int(np.argmax(model.scores[model.n_tokens - 1])))
            ids.append(chosen[-1])
        mine = load(path).model
        again = [5, 17, 60]
        with torch.no_grad():
            for _ in range(24):
                again.append(int(mine(torch.tensor([again]))[0, -1].argmax()))
        assert again == ids


def test_what_the_export_warns_of_is_what_happens(tmp_path):
    """A chunk of 16: the same answers inside the first chunk, others after it."""
    config = tiny(**{**LLAMA4, "attention_chunk_size": 16}, num_experts=4, moe_layers=(1, 3), qk_norm=True)
    path, ids = write(config, tmp_path / "m.gguf"), some_ids(config)
    distance = (ours(path, ids) - theirs(path, ids)).abs().amax(-1)
    assert distance[:16].max() < 1e-4
    assert distance[16:].max() > 1e-2


def _converted(source: Path, target: Path, file_type: int) -> Path:
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread, parameters.allow_requantize = file_type, 1, True
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), parameters) == 0
    return target


@pytest.mark.parametrize(("type", "kinds"), [("Q4_K_M", {"F32", "Q4_K", "Q6_K"}), ("Q4_0", {"F32", "Q4_0", "Q6_K"}),
                                             ("Q8_0", {"F32", "Q8_0"})])  # fmt: skip
def test_dequantisation_equals_llama_cpps_to_the_bit(type, kinds, tmp_path):
    """llama.cpp quantises our file and writes its own file out as F32 again."""
    config = tiny(hidden_size=256, num_heads=4, num_kv_heads=4, head_dim=64, intermediate_size=256, vocab_size=256)
    full = write(config, tmp_path / "f32.gguf")
    quantised = _converted(full, tmp_path / "q.gguf", getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{type}"))
    assert {info.type.name for info in GGUFSource(quantised)._tensors.values()} == kinds
    plain = load(_converted(quantised, tmp_path / "back.gguf", llama_cpp.LLAMA_FTYPE_ALL_F32)).model.state_dict()
    weights = load(quantised).model.state_dict()
    for name, original in random_model(config).state_dict().items():
        assert torch.equal(weights[name], plain[name]), name
        assert (weights[name] - original).abs().max() <= original.abs().max() / 7


def test_a_tokenizer_without_merges_loads(tmp_path):
    """Bytes alone are the smallest byte-level tokenizer there is."""
    tokenizer = train_tokenizer(["a"], 304)
    fields = tokenizer.gguf_fields()
    assert fields["tokenizer.ggml.merges"] == []
    config = tiny(vocab_size=tokenizer.vocab_size, tie_word_embeddings=True)
    path = write_gguf(random_model(config), config, tokenizer, tmp_path / "m.gguf", "F32")
    model, back = runtime(path), load(path).tokenizer
    assert back is not None
    assert model.tokenize(b"hay?", add_bos=False, special=False) == back.encode("hay?") == tokenizer.encode("hay?")


def test_its_tokenizer_gives_our_ids(tmp_path):
    tokenizer = train_tokenizer(LINES * 20, 600)
    config = tiny(vocab_size=640, tie_word_embeddings=True)
    path = write_gguf(random_model(config), config, tokenizer, tmp_path / "m.gguf", "F32")
    assert GGUFSource(path).fields["tokenizer.ggml.tokens"][-1] == "[PAD639]"
    model, back = runtime(path), load(path).tokenizer
    for text in LINES:
        ids = tokenizer.encode(text)
        assert back is not None
        assert back.encode(text) == ids
        assert model.tokenize(text.encode(), add_bos=False, special=False) == ids
        assert model.detokenize(ids).decode() == text
