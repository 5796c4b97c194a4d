"""Checkpoints with a tower: written and read again by us and by transformers, without it, in few bits, damaged."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import seeing
from puna.checkpoint import load_source, open_source, save
from puna.checkpoint.convert import convert_to_safetensors
from puna.checkpoint.named import named_weights
from puna.checkpoint.ready import load_ready
from puna.checkpoint.rehearsal import rehearse
from puna.checkpoint.safetensors_write import write_safetensors
from puna.errors import PunaError
from puna.family.llama23 import LLAMA_31_8B, VISION_11B
from puna.family.vision import LLAMA_4_VISION, Llama4Vision, Llama32Vision
from puna.model import Decoder
from puna.model.on_demand import held_bytes
from puna.model.pictures import PassPictures
from puna.model.quantized import Quantized, Weight
from puna.model.unpacked import BlockwiseLinear

pytest.importorskip("transformers")
MAKERS = {"llama4": seeing.llama4, "llama32": seeing.llama32}


@pytest.fixture(scope="module", params=MAKERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seeing.saved(MAKERS[request.param](), tmp_path_factory.mktemp(request.param))


def prompt(model: Decoder) -> list[int]:
    """A prompt with two pictures, of grids (1, 2) and (1, 1)."""
    if model.cross_layers is not None:
        return [1, seeing.LLAMA32_IMAGE, 3, seeing.LLAMA32_IMAGE, 5]
    return [1, *seeing.patch_tokens((1, 2)), 4, *seeing.patch_tokens((1, 1)), 5]


def says(model: Decoder) -> torch.Tensor:
    """Logits after the prompt."""
    ids, tiles = prompt(model), 3 if model.cross_layers is not None else 4
    with torch.no_grad():
        share = model.place(ids, model.look(seeing.pixels(tiles), [(1, 2), (1, 1)])).share(0, len(ids), 0)
        return model(torch.tensor([ids]), pictures=PassPictures.joined([share]))[0]


def test_round_trip(folder: Path, tmp_path: Path) -> None:
    """Also in shards, from the packed model, and without a model between."""
    loaded = load_source(open_source(folder))
    expected = says(loaded.model)
    save(loaded.model, loaded.config, None, tmp_path / "plain")
    write_safetensors(loaded.model, loaded.config, None, tmp_path / "sharded", max_shard_bytes=20_000)
    packed = load_ready(open_source(folder), dtype=torch.float32)
    save(packed.model, packed.config, None, tmp_path / "packed")
    convert_to_safetensors(open_source(folder), tmp_path / "converted")
    for name in ("plain", "sharded", "packed", "converted"):
        again = load_source(open_source(tmp_path / name))
        assert again.config == loaded.config
        assert torch.equal(says(again.model), expected), name
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1


def test_transformers_loads_what_we_write(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    loaded = load_source(open_source(folder))
    save(loaded.model, loaded.config, None, tmp_path / "out")
    ours, theirs = (AutoModelForImageTextToText.from_pretrained(path) for path in (tmp_path / "out", folder))
    state = theirs.state_dict()
    assert ours.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())
    for section in ("text_config", "vision_config"):
        mine, other = (getattr(model.config, section).to_dict() for model in (ours, theirs))
        same = other.keys() - {"dtype", "transformers_version", "_name_or_path", "rope_parameters", "layer_types"}
        odd = {key: (mine.get(key), other[key]) for key in same if mine.get(key) != other[key]}
        assert not odd


def test_text_alone(folder: Path, tmp_path: Path) -> None:
    whole = load_source(open_source(folder)).model
    text = load_source(open_source(folder, text_only=True))
    assert text.config == whole.config.with_(vision=None)
    assert "vision tensors" in text.notes[0]
    assert "this load is text only" in text.notes[0]
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        assert torch.equal(text.model(ids), whole(ids))
    with pytest.raises(PunaError, match="without a vision tower"):
        text.model.look(seeing.pixels(1), [(1, 1)])
    with pytest.warns(UserWarning, match="the text model alone"):
        save(whole, whole.config, None, tmp_path / "text.gguf", format="gguf")
    again = load_source(open_source(tmp_path / "text.gguf"))
    with torch.no_grad():
        assert torch.allclose(again.model(ids), whole(ids), atol=1e-5)


def features(model: Decoder) -> list[torch.Tensor]:
    """What the tower makes of a picture."""
    assert model.vision is not None
    with torch.no_grad():
        return list(model.vision(seeing.pixels(1), *([[(1, 1)]] if model.cross_layers is not None else [])))


def held(model: Decoder) -> dict[str, Weight | list[Weight]]:
    """The tower's weights as they lie in memory."""
    return {name: weight for name, weight in named_weights(model) if name.startswith("vision.")}


def off(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The relative error of features."""
    one, other = (torch.cat([row.flatten().double() for row in rows]) for rows in (found, expected))
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize(("quantize", "most"), [("int8", 0.5), ("int4", 3.0)])
def test_few_bits(folder: Path, quantize: str, most: float, tmp_path: Path) -> None:
    """The tower's matrices get 8, all but the patch embedding; what is saved comes back the same."""
    plain = load_source(open_source(folder)).model
    loaded = load_ready(open_source(folder), dtype=torch.float32, quantize=quantize).model
    few = {name: weight for name, weight in held(loaded).items() if isinstance(weight, Quantized)}
    assert {weight.bits for weight in few.values()} == {8}
    assert plain.vision is not None
    linear = {f"vision.{name}.weight" for name, module in plain.vision.named_modules() if isinstance(module, nn.Linear)}
    assert few.keys() == linear - {"vision.patch_embedding.linear.weight"}
    assert 0 < off(features(loaded), features(plain)) < 0.03
    assert off(features(load_ready(open_source(folder), quantize=quantize).model), features(plain)) < 0.06  # bfloat16
    assert 0 < (says(loaded) - says(plain)).abs().max() < most
    save(loaded, loaded.config, None, tmp_path / "out")
    again = load_ready(open_source(tmp_path / "out"), dtype=None).model
    assert [*map(torch.equal, features(again), features(loaded))] == [True] * len(features(loaded))
    assert (says(again) - says(loaded)).abs().max() < 0.05


@pytest.mark.parametrize("tower", [True, False])
def test_transformers_computes_few_bits(tower: bool, tmp_path: Path) -> None:
    """Saved with 8 bits for the tower, and exported with a tower in floats, whose module names others prefix."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForImageTextToText

    folder = seeing.saved(seeing.llama32(64, intermediate_size=32), tmp_path / "plain")  # widths in whole groups
    if tower:
        loaded = load_ready(open_source(folder), dtype=torch.float32, quantize="int4")
        save(loaded.model, loaded.config, None, tmp_path / "few")
    else:
        convert_to_safetensors(open_source(folder), tmp_path / "few", torch.float32, "int4")
    ours = load_ready(open_source(tmp_path / "few")).model
    assert any(isinstance(weight, Quantized) for weight in held(ours).values()) is tower
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "few", dtype=torch.float32).eval()
    inputs = seeing.llama32_inputs([prompt(ours)], seeing.pixels(3), [[(1, 2), (1, 1)]])
    with torch.no_grad():
        assert torch.allclose(theirs(**inputs).logits[0], says(ours), atol=1e-4)


def test_where_the_kernels_are_not(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = load_source(open_source(folder)).model
    monkeypatch.setattr("puna.model.packed.kernels", lambda: None)
    loaded = load_ready(open_source(folder), dtype=torch.float32, quantize="int8").model
    assert any(isinstance(module, BlockwiseLinear) for module in loaded.vision.modules())
    assert 0 < off(features(loaded), features(plain)) < 0.03
    assert sum(isinstance(weight, Quantized) for weight in held(loaded).values()) > 0


def test_a_file_keeps_the_bits_of_its_tower(folder: Path, tmp_path: Path) -> None:
    """An export quantises the text alone, as official releases do; loading gives its tower few bits when asked to."""
    convert_to_safetensors(open_source(folder), tmp_path / "out", torch.float32, "int8")
    loaded, plain = load_ready(open_source(tmp_path / "out")).model, load_source(open_source(folder)).model
    kept = held(plain)
    assert all(torch.equal(weight, kept[name]) for name, weight in held(loaded).items())
    assert (says(loaded) - says(plain)).abs().max() < 0.5
    asked, whole = (load_ready(open_source(path), quantize="int8").model for path in (tmp_path / "out", folder))
    assert any(isinstance(weight, Quantized) for weight in held(asked).values())
    assert [*map(torch.equal, features(asked), features(whole))] == [True] * len(features(whole))


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_a_rehearsal_counts_what_is_held(folder: Path, quantize: str | None, tmp_path: Path) -> None:
    convert_to_safetensors(open_source(folder), tmp_path / "few", None, "int4")
    for path in (folder, tmp_path / "few"):
        found = rehearse(open_source(path), torch.bfloat16 if quantize is None else None, quantize).weights
        given = load_ready(open_source(path), "cpu", torch.bfloat16 if quantize is None else None, quantize)
        assert found == held_bytes(given.model)


def test_a_rehearsal_counts_the_tower(folder: Path) -> None:
    whole, text = (rehearse(open_source(folder, text_only=alone)).weights for alone in (False, True))
    model = load_source(open_source(folder)).model
    tower = sum(p.nbytes for name, p in model.named_parameters() if name.startswith(("vision.", "cross_layers.")))
    assert 0.95 * tower < whole - text < 1.3 * tower


def change_config(folder: Path, target: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The same weights beside a changed config.json."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(("change", "message"), [
    (lambda c: c["vision_config"].update(hidden_act="relu"), r"vision_config\.hidden_act is 'relu'"),
    (lambda c: c["vision_config"].update(num_channels=1), r"vision_config\.num_channels is 1"),
    (lambda c: c["vision_config"].update(image_size=[8, 9]), r"vision_config\.image_size must be an integer"),
    (lambda c: c["vision_config"].update(patch_size=3), "don't divide into patches of 3"),
    (lambda c: c["vision_config"].update(hidden_size=0), "(width|hidden_size)"),
    (lambda c: c["vision_config"].update(num_hidden_layers=1), "(not part of this architecture|intermediate layers)"),
    (lambda c: c["vision_config"].update(image_size=12), r"misshapen: .*model\.safetensors, tensor .*embedding"),
    (lambda c: c.update(vision_config=3), "vision_config must be an object"),
])  # fmt: skip
def test_wrong_vision_config(
    change: Callable[[dict[str, Any]], Any], message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(PunaError, match=message) as raised:
        load_source(open_source(change_config(folder, tmp_path / "bad", change)))
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize(("kind", "change", "message"), [
    ("llama4", {"vision_output_dim": 16}, "vision_output_dim is 16"),
    ("llama4", {"pixel_shuffle_ratio": 0.4}, "pixel_shuffle_ratio is 0.4"),
    ("llama4", {"intermediate_size": 32}, "intermediate_size is 32"),
    ("llama4", {"norm_eps": 1e-3}, "norm_eps is 0.001"),
    ("llama32", {"supported_aspect_ratios": [[1, 1]]}, "supported_aspect_ratios"),
    ("llama32", {"vision_output_dim": 16}, "vision_output_dim is 16"),
    ("llama32", {"intermediate_layers_indices": [1, 9]}, "intermediate layers"),
    ("llama32", {"puna_reference": "mine"}, "puna_reference is 'mine'"),
])  # fmt: skip
def test_impossible_towers(kind: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = seeing.saved(MAKERS[kind](), tmp_path / "good")
    with pytest.raises(PunaError, match=message):
        open_source(change_config(folder, tmp_path / "bad", lambda config: config["vision_config"].update(change)))


@pytest.mark.parametrize("places", [[1, 1], [6], [0, 1, 2, 3, 4, 5]])
def test_impossible_cross_attention_layers(places: list[int], tmp_path: Path) -> None:
    folder = seeing.saved(seeing.llama32(), tmp_path / "good")
    bad = change_config(folder, tmp_path / "bad", lambda c: c["text_config"].update(cross_attention_layers=places))
    with pytest.raises(PunaError, match="cross_attention_layers must name some of the 6 layers"):
        open_source(bad)


def test_whose_arithmetic(tmp_path: Path) -> None:
    """A release of Meta's weights was written by transformers 4.45, and is computed as Meta's code does it."""
    folder = seeing.saved(seeing.llama32(), tmp_path / "new")
    assert vision_of(folder).reference == "transformers"
    for version, reference in (("4.45.0.dev0", "meta"), ("4.57.1", "transformers"), (None, "meta")):
        changed = change_config(folder, tmp_path / f"{version}", lambda c, v=version: c.update(transformers_version=v))
        assert vision_of(changed).reference == reference
    old = load_source(open_source(seeing.as_meta(tmp_path / "new")))
    save(old.model, old.config, None, tmp_path / "saved")
    assert vision_of(tmp_path / "saved").reference == "meta"


def vision_of(folder: Path) -> Llama32Vision:
    vision = open_source(folder).config.vision
    assert isinstance(vision, Llama32Vision)
    return vision


def test_published_shapes(tmp_path: Path) -> None:
    """config.json of the releases, as far as they differ from transformers' defaults."""
    from puna.checkpoint.hf_config import read_config

    llama32 = {"architectures": ["MllamaForConditionalGeneration"], "transformers_version": "4.45.0.dev0",
               "text_config": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}},
               "vision_config": {"image_size": 560}}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(llama32))
    config = read_config(tmp_path / "config.json")
    assert config.vision == VISION_11B
    assert config.with_(vision=None, eos_token_ids=LLAMA_31_8B.eos_token_ids) == LLAMA_31_8B
    assert config.input_vocab_size == 128_264
    scout = {"architectures": ["Llama4ForConditionalGeneration"],
             "text_config": {"vocab_size": 202_048, "hidden_size": 5120, "num_hidden_layers": 48,
                             "num_attention_heads": 40, "max_position_embeddings": 1024, "intermediate_size": 8192},
             "vision_config": {"hidden_size": 1408, "image_size": 336, "vision_output_dim": 4096,
                               "rope_theta": 10000}}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(scout))
    vision = read_config(tmp_path / "config.json").vision
    assert isinstance(vision, Llama4Vision)
    assert vision == LLAMA_4_VISION


def test_weights_without_a_tower(folder: Path, tmp_path: Path) -> None:
    """What a text fine-tune leaves behind beside the old config.json."""
    source = open_source(folder, text_only=True)
    text = load_source(source)
    save(text.model, text.config, None, tmp_path / "text")
    (tmp_path / "text" / "config.json").write_text((folder / "config.json").read_text())
    if "mllama" in (folder / "config.json").read_text():
        with pytest.raises(PunaError, match=r"missing"):  # its layers are numbered otherwise
            load_source(open_source(tmp_path / "text"))
        return
    again = load_source(open_source(tmp_path / "text"))
    assert "no vision tower" in again.notes[0]
    assert again.config.vision is None


def test_wrong_pictures(folder: Path) -> None:
    model = load_source(open_source(folder)).model
    with pytest.raises(PunaError, match=r"picture 1 has a grid of 5 x 5 tiles"):
        model.look(seeing.pixels(26), [(1, 1), (5, 5)])
    with pytest.raises(PunaError, match=r"pixel_values has shape \[2, 3, 8, 8\]"):
        model.look(seeing.pixels(2), [(1, 1)])
    with pytest.raises(PunaError, match="pixel_values has shape"):
        model.look(torch.zeros(1, 3, 8, 9), [(1, 1)])
    items = model.look(seeing.pixels(1), [(1, 1)])
    for ids in ([1, 2, 3], prompt(model)):
        with pytest.raises(PunaError, match="places for"):
            model.place(ids, items)
