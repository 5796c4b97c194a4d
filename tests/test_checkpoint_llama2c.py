"""stories260K, a real llama2.c checkpoint, against a plain NumPy forward that follows llama2.c's run.c."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from puna.checkpoint import load_source, open_source, save
from puna.errors import PunaError

torch.set_num_threads(1)
STORIES = Path(__file__).parents[2] / "shared" / "data" / "checkpoints" / "stories260K.bin"
needs_stories = pytest.mark.skipif(not STORIES.is_file(), reason="stories260K.bin is not beside the repository")


def run_c(path: Path, tokens: list[int]) -> np.ndarray:
    """Logits [S, V] by run.c's `forward`, position by position with a growing cache, in float64."""
    header = np.fromfile(path, "<i4", 7)
    dim, hidden, layers, heads, kv_heads, vocabulary, length = (int(x) for x in header)
    shared, vocabulary = vocabulary > 0, abs(vocabulary)
    values, at = np.fromfile(path, "<f4", offset=28).astype(np.float64), 0

    def take(*shape: int) -> np.ndarray:
        nonlocal at
        at += math.prod(shape)
        return values[at - math.prod(shape) : at].reshape(shape)

    size = dim // heads
    kv_dim = size * kv_heads
    embedding, att_norm = take(vocabulary, dim), take(layers, dim)
    wq, wk, wv = take(layers, dim, dim), take(layers, kv_dim, dim), take(layers, kv_dim, dim)
    wo, ffn_norm = take(layers, dim, dim), take(layers, dim)
    w1, w2, w3 = take(layers, hidden, dim), take(layers, dim, hidden), take(layers, hidden, dim)
    final_norm, _ = take(dim), take(length * size)
    classifier = embedding if shared else take(vocabulary, dim)
    assert at == len(values)

    def rmsnorm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return weight * (x / math.sqrt(float(x @ x) / dim + 1e-5))

    keys = np.zeros((layers, len(tokens), kv_dim))
    vals = np.zeros((layers, len(tokens), kv_dim))
    out = []
    for pos, token in enumerate(tokens):
        x = embedding[token].copy()
        for n in range(layers):
            normed = rmsnorm(x, att_norm[n])
            q, k = wq[n] @ normed, wk[n] @ normed
            for i in range(0, dim, 2):
                angle = pos / 10000.0 ** (i % size / size)
                cos, sin = math.cos(angle), math.sin(angle)
                for vector in (q, k) if i < kv_dim else (q,):
                    vector[i : i + 2] = (
                        vector[i] * cos - vector[i + 1] * sin,
                        vector[i] * sin + vector[i + 1] * cos,
                    )
            keys[n, pos], vals[n, pos] = k, wv[n] @ normed
            mixed = np.zeros(dim)
            for h in range(heads):
                part = slice(h * size, (h + 1) * size)
                g = h // (heads // kv_heads)
                shared_part = slice(g * size, (g + 1) * size)
                scores = keys[n, : pos + 1, shared_part] @ q[part] / math.sqrt(size)
                weights = np.exp(scores - scores.max())
                mixed[part] = weights / weights.sum() @ vals[n, : pos + 1, shared_part]
            x += wo[n] @ mixed
            normed = rmsnorm(x, ffn_norm[n])
            gate = w1[n] @ normed
            x += w2[n] @ (gate / (1 + np.exp(-gate)) * (w3[n] @ normed))
        out.append(classifier @ rmsnorm(x, final_norm))
    return np.stack(out)


@needs_stories
def test_stories_logits_equal_run_c_in_every_format(tmp_path: Path) -> None:
    loaded = load_source(open_source(STORIES))
    assert loaded.config.num_layers == 5
    assert loaded.config.tie_word_embeddings
    # greedy continuation from BOS, as a story would run
    tokens = [1]
    with torch.no_grad():
        while len(tokens) < 96:
            tokens.append(int(loaded.model(torch.tensor([tokens]))[0, -1].argmax()))
    assert len(set(tokens)) > 20
    expected = run_c(STORIES, tokens)
    assert expected.std() > 1
    save(loaded.model, loaded.config, None, tmp_path / "out")
    save(loaded.model, loaded.config, None, tmp_path / "out.gguf", format="gguf")
    for path in (STORIES, tmp_path / "out", tmp_path / "out.gguf"):
        for dtype in (torch.float64, torch.float32):
            model = load_source(open_source(path), dtype=dtype).model
            with torch.no_grad():
                logits = model(torch.tensor([tokens]))[0].double().numpy()
            # logits reach about 20, where float32 itself is no finer: there 1e-5 is of the largest
            scale = 1.0 if dtype == torch.float64 else np.abs(expected).max()
            assert np.abs(logits - expected).max() / scale < 1e-5, (path, dtype)


@needs_stories
def test_truncated_and_padded_files(tmp_path: Path) -> None:
    data = STORIES.read_bytes()
    cases = {"short.bin": data[:-4], "long.bin": data + b"\0\0\0\0", "tiny.bin": data[:20]}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(PunaError, match=name):
            open_source(tmp_path / name)


def test_other_bin_files_are_refused(tmp_path: Path) -> None:
    for content, message in (
        (b"PK\3\4" + bytes(40), "safetensors"),
        (b"24ka" + bytes(60), "version"),
        (bytes(64), "header"),
    ):
        (tmp_path / "model.bin").write_bytes(content)
        with pytest.raises(PunaError, match=message):
            open_source(tmp_path / "model.bin")
