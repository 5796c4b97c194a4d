"""What the benchmarks measure: checkpoints with seeded random weights, made once and kept in the temporary folder.

Speed doesn't depend on what the weights say, only on their shapes and bits, so nothing is downloaded. `SHAPES` has
"1b", which is Llama-3.2-1B, "experts" and "dense", a Scout-like mixture of experts and the dense model with as many
active parameters, and a tiny form of each for tests.
"""

import ctypes
import tempfile
from pathlib import Path

import torch

from puna.checkpoint import open_source, save
from puna.checkpoint.gguf_write import write_tensors
from puna.family.config import AttentionTemperature, ModelConfig
from puna.family.llama23 import LLAMA_32_1B
from puna.model import Decoder
from puna.text.train import train_tokenizer

SEED, SPREAD = 0, 0.02  # standard deviation of transformers' `initializer_range`
FOLDER = Path(tempfile.gettempdir()) / "puna-benchmarks"

EXPERTS = ModelConfig(
    architecture="llama4", vocab_size=32_000, hidden_size=1024, num_layers=16, num_heads=16, num_kv_heads=8,
    head_dim=64, intermediate_size=4096, context_length=8192, num_experts=16, expert_intermediate_size=2048,
    moe_layers=tuple(range(16)), nope_layers=(3, 7, 11, 15), attention_chunk_size=512,
    attention_temperature=AttentionTemperature(), qk_norm=True, tie_word_embeddings=True,
)  # fmt: skip
TINY = LLAMA_32_1B.with_(vocab_size=512, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32,
                         intermediate_size=128, context_length=4096, bos_token_id=None, eos_token_ids=(),
                         pad_token_id=None)  # fmt: skip
TINY_EXPERTS = EXPERTS.with_(vocab_size=512, hidden_size=64, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32,
                             intermediate_size=256, expert_intermediate_size=128, moe_layers=(0, 1, 2, 3),
                             nope_layers=(3,), attention_chunk_size=16)  # fmt: skip


def dense(config: ModelConfig) -> ModelConfig:
    """The model without experts that has as many active parameters: one routed and the shared expert in one."""
    return config.with_(num_experts=0, expert_intermediate_size=0, moe_layers=(),
                        intermediate_size=2 * config.expert_intermediate_size)  # fmt: skip


SHAPES = {
    "1b": LLAMA_32_1B, "experts": EXPERTS, "dense": dense(EXPERTS),
    "tiny": TINY, "tiny-experts": TINY_EXPERTS, "tiny-dense": dense(TINY_EXPERTS),
}  # fmt: skip


def checkpoint(shape: str) -> Path:
    """A safetensors folder in bfloat16 with the weights of `SHAPES[shape]`, without a tokenizer."""
    path = FOLDER / f"{shape}-bf16"
    if not path.exists():
        config = SHAPES[shape]
        save(random_decoder(config), config, None, path)
    return path


def random_decoder(config: ModelConfig) -> Decoder:
    """The decoder in bfloat16: norms at 1, everything else normal with deviation `SPREAD`."""
    with torch.device("meta"):
        decoder = Decoder(config)
    generator = torch.Generator().manual_seed(SEED)
    weights = {}
    for name, tensor in decoder.state_dict().items():
        plain = torch.ones(tensor.shape) if tensor.dim() == 1 else torch.randn(tensor.shape, generator=generator)
        weights[name] = (plain if tensor.dim() == 1 else plain.mul_(SPREAD)).bfloat16()
    decoder.load_state_dict(weights, assign=True)
    return decoder.eval()


def gguf(shape: str, type: str) -> Path:
    """The same weights for llama.cpp: "BF16" by our writer, "Q8_0" and "Q4_0" from it by llama.cpp's own quantiser.

    Its Q4_0 keeps the output matrix in Q6_K, as every Q4_0 file that it makes. The tokenizer is a stand-in, which
    llama.cpp's server needs to start.
    """
    path = FOLDER / f"{shape}-{type}.gguf"
    if path.exists():
        return path
    if type == "BF16":
        source = open_source(checkpoint(shape))
        tokenizer = train_tokenizer(["the llama walks over the high grassland"] * 2, 320)
        write_tensors(source.read, source.config, tokenizer, path, "BF16")
        return path
    return quantise_gguf(gguf(shape, "BF16"), path, type)


def quantise_gguf(source: Path, path: Path, type: str) -> Path:
    """A file in llama.cpp's "Q8_0" or "Q4_0" from one in BF16, by its own quantiser. RuntimeError where that fails."""
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = {"Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}[type]
    part = path.with_suffix(".part")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(part).encode(), ctypes.byref(options)):
        raise RuntimeError(f"llama.cpp could not quantise {source}")
    return part.rename(path)


def gguf_bytes(path: Path) -> int:
    """Bytes of all tensors of a GGUF file."""
    from gguf import GGUFReader

    return sum(int(tensor.n_bytes) for tensor in GGUFReader(path).tensors)


def random_ids(shape: str, count: int, seed: int = SEED) -> list[int]:
    """A prompt of `count` random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, SHAPES[shape].vocab_size, (count,), generator=generator).tolist()
