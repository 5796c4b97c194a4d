"""Adapters beside packed weights: the merged model's logits, in every kind and width, and the same bits for a row
whatever stands beside it."""

from pathlib import Path
from typing import Any

import pytest
import torch

import puna
from adapted import adapted
from puna.checkpoint.merged import open_merged
from puna.checkpoint.named import named_weights
from puna.checkpoint.peft_write import write_adapter
from puna.checkpoint.source import load_source, save
from puna.engine.adapters import put_beside
from puna.errors import PunaError
from puna.model.adapt import Lora, updates
from puna.model.packing import pack
from puna.model.quantized import plain
from tiny import CONFIGS, decoder, token_ids

CASES = {
    "llama2": Lora(rank=3, alpha=6, targets=("attention", "feed_forward", "output")),
    "llama3.1": Lora(rank=4, alpha=6, dora=True, targets=("k_proj", "up_proj", "o_proj", "output")),
    "llama3.2": Lora(rank=4, alpha=5, rslora=True, targets=("v_proj", "gate_proj", "output")),
    "scout": Lora(rank=3, alpha=6, targets=("attention", "feed_forward", "experts", "router", "output")),
    "maverick": Lora(rank=2, alpha=3, targets=("experts",)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each case KIND the base in KIND, the adapter in KIND-adapter."""
    place = tmp_path_factory.mktemp("adapters")
    for kind, lora in CASES.items():
        save(decoder(kind), CONFIGS[kind], None, place / kind)
        (place / f"{kind}-adapter").mkdir()
        write_adapter(place / f"{kind}-adapter", updates(adapted(kind, lora)), lora, CONFIGS[kind], f"../{kind}")
    return place


@pytest.mark.parametrize("kind", CASES)
def test_trained_served_and_merged_are_one(kind: str, folder: Path) -> None:
    ids = token_ids(CONFIGS[kind])[0].tolist()
    with torch.no_grad():
        trained = adapted(kind, CASES[kind])(torch.tensor([ids]))[0]
        merged = load_source(open_merged(folder / f"{kind}-adapter")).model(torch.tensor([ids]))[0]
    served = puna.load(folder / kind, adapter=folder / f"{kind}-adapter")
    torch.testing.assert_close(served.logits(ids), trained, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merged, trained, rtol=1e-4, atol=1e-4)
    assert (puna.load(folder / kind).logits(ids) - trained).abs().max() > 0.01
    by_name = puna.load(folder / f"{kind}-adapter")
    assert torch.equal(by_name.logits(ids), served.logits(ids))


@pytest.mark.parametrize("bits", ["int4", "int8"])
@pytest.mark.parametrize("kind", ["llama3.1", "scout"])
def test_an_adapter_beside_few_bits(kind: str, bits: str, folder: Path) -> None:
    """The bits stay: what is computed is their exact values with the updates added."""
    base = puna.load(folder / kind, quantize=bits, dtype="float32")
    wide = decoder(kind)
    change = updates(adapted(kind, CASES[kind]))
    for name, weight in named_weights(base.decoder):
        ones = weight if isinstance(weight, list) else [weight]
        values = [plain(one).T for one in ones] if isinstance(weight, list) else [plain(one) for one in ones]
        whole = torch.stack(values) if isinstance(weight, list) else values[0]
        wide.get_parameter(name).data = change[name].merged(whole) if name in change else whole
    ids = token_ids(CONFIGS[kind])[0].tolist()
    served = puna.load(folder / kind, adapter=folder / f"{kind}-adapter", quantize=bits, dtype="float32")
    torch.testing.assert_close(served.logits(ids), wide(torch.tensor([ids]))[0].detach(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("settings", [{"quantize": "int4"}, {"dtype": "bfloat16"}, {"dtype": "float16"}], ids=str)
def test_other_widths_take_an_adapter(settings: dict[str, Any], folder: Path) -> None:
    ids = token_ids(CONFIGS["llama2"])[0].tolist()
    base = puna.load(folder / "llama2", **settings)
    served = puna.load(folder / "llama2", adapter=folder / "llama2-adapter", **settings)
    with torch.no_grad():
        trained = adapted("llama2", CASES["llama2"])(torch.tensor([ids]))[0]
    plain_logits = decoder("llama2")(torch.tensor([ids]))[0].detach()
    without = float((base.logits(ids) - plain_logits).norm() / plain_logits.norm())  # what the bits cost the base
    assert float((served.logits(ids) - trained).norm() / trained.norm()) < 2 * without + 0.02


@pytest.mark.parametrize("kind", ["llama3.1", "scout"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_does_not_depend_on_its_neighbours(kind: str, dtype: str, folder: Path) -> None:
    model = puna.load(folder / kind, adapter=folder / f"{kind}-adapter", dtype=dtype)
    prompts = [token_ids(CONFIGS[kind], length=n, seed=n)[0].tolist() for n in (3, 17, 30)]
    alone = [model.generate(prompt, max_tokens=12, temperature=0, logprobs=1, ignore_eos=True) for prompt in prompts]
    streams = [model.stream(prompt, max_tokens=12, temperature=0, logprobs=1, ignore_eos=True) for prompt in prompts]
    for stream, reply in zip(streams, alone, strict=True):
        together = [piece.reply for piece in stream][-1]
        assert together is not None
        assert together.token_ids == reply.token_ids
        assert together.logprobs == reply.logprobs


def test_a_model_with_an_adapter_is_not_saved_as_its_base(folder: Path, tmp_path: Path) -> None:
    model = puna.load(folder / "llama2", adapter=folder / "llama2-adapter")
    with pytest.raises(PunaError, match="puna export"):
        model.save(tmp_path / "copy")
    with pytest.raises(PunaError, match="is an adapter itself"):
        puna.load(folder / "llama2-adapter", adapter=folder / "llama2-adapter")
    with pytest.raises(PunaError, match=r"does not have|another model's"):
        puna.load(folder / "llama2", adapter=folder / "scout-adapter")
    with pytest.raises(PunaError, match="no adapter"):
        puna.load(folder / "llama2", adapter=folder / "scout")


def test_an_update_that_finds_no_place_is_told() -> None:
    model = decoder("llama2")
    pack(model)
    found = {f"{name}x": update for name, update in updates(adapted("llama2", CASES["llama2"])).items()}
    with pytest.raises(PunaError, match="can't be served beside"):
        put_beside(model, found)
