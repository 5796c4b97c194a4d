"""A tower beside a GGUF file."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import puna
import tiny_pictures
from puna.checkpoint import load, load_source, open_source, save
from puna.checkpoint.beside import tower_file, write_tower
from puna.checkpoint.named import named_weights
from puna.errors import PunaError
from puna.model import Decoder
from puna.model.quantized import Quantized
from tiny import randomise


def _written(folder: Path) -> tuple[Decoder, Path]:
    model = Decoder(tiny_pictures.config("llama4"))
    randomise(model)
    file = folder / "small.gguf"
    with pytest.warns(UserWarning, match="the text model alone"):
        save(model, model.config, tiny_pictures.tokenizer(), file, format="gguf", type="F32")
    write_tower(model, file, torch.float32)
    return model, file


def test_text_and_tower_come_back_as_one(tmp_path: Path) -> None:
    model, file = _written(tmp_path)
    assert tower_file(file).name == "small.vision.safetensors"
    for place in (file, tmp_path):  # a folder's one GGUF file, in spite of the tower's safetensors
        again = load(place)
        assert again.config.vision == model.config.vision
        pictures = torch.rand(1, 3, tiny_pictures.SIDE, tiny_pictures.SIDE)
        (ours,), (theirs,) = (each.look(pictures, [(1, 1)]) for each in (again.model, model))
        assert torch.equal(ours.rows_RD, theirs.rows_RD)
    for name, weight in model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], weight), name


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("name", ["small", "cria"])
def test_few_bits_answer_about_a_picture(name: str, quantize: str, tmp_path: Path) -> None:
    place: Path | str = name if name == "cria" else _written(tmp_path)[1]
    whole, few = puna.load(place), puna.load(place, quantize=quantize)
    if whole.config.vision is None:
        pytest.skip("this cria reads text only")
    chat = tiny_pictures.asked(tiny_pictures.image(1), "What is in this picture?")
    reply = few.generate(chat, max_tokens=4, temperature=0, ignore_eos=True)
    assert len(reply.token_ids) == 4
    inputs = few.prepare(chat)
    (mine,), (floats,) = (model.decoder.look(inputs.pixel_values, inputs.grids) for model in (few, whole))
    error = (mine.rows_RD.double() - floats.rows_RD.double()).norm() / floats.rows_RD.double().norm()
    assert 0 < error < 0.1
    assert any(isinstance(weight, Quantized) for part, weight in named_weights(few.decoder) if "vision." in part)


def test_the_text_alone(tmp_path: Path) -> None:
    _, file = _written(tmp_path)
    text = load_source(open_source(tmp_path, text_only=True))
    assert text.config.vision is None
    assert text.model.vision is None
    tower_file(file).unlink()
    assert load(file).config == text.config


def test_a_tower_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    _, file = _written(tmp_path)
    tower = tower_file(file)
    tensors = load_file(tower)
    shape = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 64, "tile_side": 28,
             "patch_side": 7, "adapter_size": 32, "max_tiles": 4, "image_token_id": 5}  # fmt: skip

    def refused(message: str, vision: object = shape, without: str = "") -> None:
        metadata = {} if vision is None else {"vision": vision if isinstance(vision, str) else json.dumps(vision)}
        save_file({name: tensor for name, tensor in tensors.items() if name != without}, tower, metadata)
        with pytest.raises(PunaError, match=message):
            load(file)

    refused(r"small\.vision\.safetensors: the metadata 'vision' describes no tower .*take the file away", None)
    refused("describes no tower", "not JSON")
    refused("describes no tower", shape | {"number_of_eyes": 2})
    refused("describes no tower", shape | {"patch_side": 5})
    refused("describes no tower", shape | {"tile_side": "28"})
    refused(r"image_token_id 99999 is not in the vocabulary of .*small\.gguf", shape | {"image_token_id": 99999})
    missing = "vision_model.class_embedding"
    refused("vision.class_embedding", without=missing)
    tower.write_bytes(b"\0" * 20)
    with pytest.raises(PunaError, match="small"):
        load(file)


def test_only_llama_4_towers(tmp_path: Path) -> None:
    with pytest.raises(PunaError, match="write the model as safetensors"):
        write_tower(Decoder(tiny_pictures.config("llama3.2")), tmp_path / "x.gguf")


def test_the_most_tiles_of_a_picture_survive_hugging_face(tmp_path: Path) -> None:
    model, _ = _written(tmp_path)
    save(model, model.config, None, tmp_path / "folder")
    assert load(tmp_path / "folder").config.vision == model.config.vision
    assert model.config.vision.max_tiles == 4
