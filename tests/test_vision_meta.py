"""Meta's own model code with a tower, its weights saved as Meta ships them, against our reader and our towers."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seeing
import tiny
from checkpoint_writers import write_meta
from meta_reference import one_rank
from puna.checkpoint import load_source, open_source, save
from puna.errors import PunaError
from puna.model import Decoder
from puna.model.pictures import PassPictures

pytest.importorskip("llama_models", reason="needs the package llama-models 0.3.0")


__all__ = ["one_rank"]  # the fixture


def write_ranks(folder: Path, state: dict[str, Tensor], ranks: int, axis: Callable[[str], int | None]) -> None:
    """One .pth a rank; `axis` says where a tensor is cut."""
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(ranks):
        cut = {name: tensor if axis(name) is None else tensor.chunk(ranks, axis(name))[rank].clone()
               for name, tensor in state.items()}  # fmt: skip
        torch.save(cut, folder / f"consolidated.{rank:02}.pth")


def axis_of(name: str) -> int | None:
    """Where Meta's layers are cut (llama-models `checkpoint.py`; fairscale's column, row and vocabulary layers)."""
    rows = (".wq.", ".wk.", ".wv.", "c_fc.", ".w1.", ".w3.", "conv1.", "vision_projection.", "output.", "embeddings.",
            "learnable_embedding.")  # fmt: skip
    if name.endswith((".wo.weight", ".w2.weight", "c_proj.weight")):
        return 1
    return 0 if any(part in name for part in rows) and "positional" not in name and "class_" not in name else None


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.usefixtures("one_rank")
def test_llama4_tower(ranks: int, tmp_path: Path) -> None:
    from llama_models.llama4.args import Size, VisionArgs
    from llama_models.llama4.vision.embedding import VisionEmbeddings

    args = {"image_size": {"height": 8, "width": 8}, "patch_size": {"height": 2, "width": 2}, "dim": 16, "n_layers": 2,
            "n_heads": 2, "mlp_ratio": 4.0, "output_dim": 24, "pixel_shuffle_ratio": 0.5}  # fmt: skip
    sizes = {key: Size(**args[key]) for key in ("image_size", "patch_size")}
    reference = VisionEmbeddings(VisionArgs(**args | sizes)).float()
    projection = nn.Linear(24, 32, bias=False)
    seeing.randomise(reference)
    seeing.randomise(projection)
    write_meta(tmp_path, tiny.decoder("scout"), ranks)
    tower = {f"vision_embeddings.{name}": tensor for name, tensor in reference.state_dict().items()}
    tower["vision_projection.weight"] = projection.weight.detach()
    write_ranks(tmp_path / "tower", tower, ranks, lambda name: axis_of(name.removeprefix("vision_embeddings.")))
    for path in tmp_path.glob("*.pth"):
        torch.save(torch.load(path) | torch.load(tmp_path / "tower" / path.name), path)
    params = json.loads((tmp_path / "params.json").read_text()) | {"vision_args": args}
    (tmp_path / "params.json").write_text(json.dumps(params))
    ours = load_source(open_source(tmp_path))
    pixels = seeing.pixels(3)
    with torch.no_grad():
        encoded = reference.vision_encoder(pixels.unsqueeze(1))
        theirs = projection(reference.vision_adapter(encoded))
        assert (ours.model.vision(pixels) - theirs).abs().max() < 1e-4
    assert theirs.std() > 0.1
    text = load_source(open_source(tmp_path, text_only=True))
    assert text.config == ours.config.with_(vision=None)
    assert any("vision tensors" in note for note in text.notes)


def reference32(monkeypatch: pytest.MonkeyPatch, ids: int) -> tuple[Any, dict[str, Any]]:
    """Meta's Llama 3.2 Vision of small widths (the tower's are constants in the code), and its params.json."""
    import llama_models.llama3.multimodal.model as code
    from llama_models.llama3.args import ModelArgs

    for name in ("gather_from_tensor_model_parallel_region", "reduce_from_tensor_model_parallel_region"):
        monkeypatch.setattr(code, name, lambda x: x)
    tower = partial(code.VisionEncoder, width=32, layers=32, heads=16, mlp_ratio=1.0)
    monkeypatch.setattr(code, "VisionEncoder", tower)
    params = {"dim": 32, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 96, "multiple_of": 16,
              "ffn_dim_multiplier": 0.5, "rope_theta": 500_000.0, "use_scaled_rope": True, "max_seq_len": 64,
              "vision_chunk_size": 28, "vision_max_num_chunks": 4, "vision_num_cross_attention_layers": 2,
              "norm_eps": 1e-5}  # fmt: skip
    model = code.CrossAttentionTransformer(ModelArgs(**params))
    model.vision_model.vision_projection = nn.Linear(6 * 32, 32)
    seeing.randomise(model)
    model.setup_cache(1, torch.device("cpu"), torch.float32)
    return model.eval(), params


def theirs(model: Any, ids: list[int], tiles: Tensor, grids: list[tuple[int, int]], masks: list[list[int]]) -> Tensor:
    """The reference's logits, as its `compute_vision_tokens_masks` and `forward` go from tiles on."""
    from llama_models.llama3.multimodal.model import _pad_masks

    counts = [rows * columns for rows, columns in grids]
    padded = torch.zeros(1, len(grids), 4, *tiles.shape[1:])
    for i, picture in enumerate(tiles.split(counts)):
        padded[0, i, : len(picture)] = picture
    states = model.vision_model(padded, torch.tensor([grids]))
    cache = torch.stack([layer.compute_xattn_kv_cache(states.view(1, -1, states.shape[-1]))
                         for layer in model.text_model.cross_attention_layers])  # fmt: skip
    mask = model.text_model._get_xattn_mask(
        len(ids), "cpu", torch.float32, states, _pad_masks([masks], [counts], len(ids), 4)
    )
    return model(torch.arange(len(ids)), torch.tensor([ids]), *mask, cache)[0]


def seen(model: Decoder, ids: list[int], tiles: Tensor, grids: list[tuple[int, int]]) -> Tensor:
    """Our logits."""
    share = model.place(ids, model.look(tiles, grids)).share(0, len(ids), 0)
    return model(torch.tensor([ids]), pictures=PassPictures.joined([share]))[0]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.usefixtures("one_rank")
def test_llama32(ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, params = reference32(monkeypatch, 96)
    state = {name: tensor for name, tensor in reference.state_dict().items() if "cache" not in name}
    write_ranks(tmp_path / "meta", state, ranks, axis_of)
    if ranks == 1:
        (tmp_path / "meta" / "consolidated.00.pth").rename(tmp_path / "meta" / "consolidated.pth")
    (tmp_path / "meta" / "params.json").write_text(json.dumps(params))
    ours = load_source(open_source(tmp_path / "meta"))
    assert ours.config.vision.reference == "meta"
    assert ours.config.vision.cross_attention_before == (1, 3)
    ids = [1, 2, 96, 4, 5, 96, 96, 8, 9]  # tokens before the first picture, and two side by side
    grids = [(1, 3), (2, 1), (1, 1)]
    tiles = torch.randn(6, 3, 28, 28, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = theirs(reference, ids, tiles, grids, [[2, 5], [5, 9], [6, 9]])
        assert (seen(ours.model, ids, tiles, grids) - expected).abs().max() < 1e-4
    assert expected.std() > 0.5
    save(ours.model, ours.config, None, tmp_path / "hf")
    again = load_source(open_source(tmp_path / "hf"))
    assert again.config.vision == ours.config.vision
    with torch.no_grad():
        assert torch.equal(seen(again.model, ids, tiles, grids), seen(ours.model, ids, tiles, grids))
    text = load_source(open_source(tmp_path / "meta", text_only=True))
    assert text.config == ours.config.with_(vision=None)
    with torch.no_grad():
        assert torch.equal(text.model(torch.tensor([[1, 2, 3]])), ours.model(torch.tensor([[1, 2, 3]])))


@pytest.mark.usefixtures("one_rank")
def test_a_tensor_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, params = reference32(monkeypatch, 96)
    state = {name: tensor for name, tensor in reference.state_dict().items() if "cache" not in name}
    del state["vision_model.vision_encoder.transformer.resblocks.3.ln_1.bias"]
    write_ranks(tmp_path, state, 1, axis_of)
    (tmp_path / "params.json").write_text(json.dumps(params))
    with pytest.raises(PunaError, match=r"missing vision\.transformer\.layers\.3\.input_layernorm\.bias"):
        load_source(open_source(tmp_path))
