"""A tuned model says the same in every form: as the trainer has it, as an adapter beside the weights, merged, as GGUF.

python benchmarks/tuned.py cria runs/calls --rows work/calls/heldout.jsonl
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch

import puna
from puna.checkpoint import load, open_source
from puna.checkpoint.hub import resolve
from puna.checkpoint.merged import checked
from puna.cli.export import Format, export
from puna.model.adapt import Lora, attach, kinds, set_updates

Answer = Callable[[list[int]], list[int]]


def trainer(base: str, adapter: Path, tokens: int) -> Answer:
    """The trainer's own modules in float32, by PyTorch's kernels."""
    source = open_source(resolve(base))
    found = checked(adapter, source).updates
    loaded = load(base, dtype=torch.float32)
    facts = json.loads((adapter / "adapter_config.json").read_text())
    targets = tuple(kinds(list(found)))
    lora = Lora(facts["r"], facts["lora_alpha"], facts["use_rslora"], facts["use_dora"], targets=targets)
    attach(loaded.model, lora, 0)
    set_updates(loaded.model, found)

    @torch.no_grad()
    def answer(ids: list[int]) -> list[int]:
        cache = loaded.model.new_cache()
        drawn = [int(loaded.model(torch.tensor([ids]), cache)[0, -1].argmax())]
        while len(drawn) < tokens:
            drawn.append(int(loaded.model(torch.tensor([drawn[-1:]]), cache)[0, -1].argmax()))
        return drawn

    return answer


def served(llama: puna.Model, tokens: int) -> Answer:
    """By the engine."""
    return lambda ids: llama.generate(ids, max_tokens=tokens, temperature=0.0, ignore_eos=True).token_ids


def llama_cpp(file: Path, tokens: int, context: int) -> Answer:
    """By llama.cpp, one token at a time on token ids."""
    from llama_cpp import Llama

    model = Llama(str(file), n_ctx=context, verbose=False, logits_all=False)

    def answer(ids: list[int]) -> list[int]:
        model.reset()
        model.eval(ids)
        drawn: list[int] = []
        while len(drawn) < tokens:
            drawn.append(int(model.sample(temp=0.0)))
            model.eval(drawn[-1:])
        return drawn

    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--rows", type=Path, required=True, help="JSON lines of chats: prompts without the last answer")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=16)
    arguments = parser.parse_args()
    adapter, tokens = arguments.adapter, arguments.tokens
    context = min(1024, open_source(resolve(arguments.base)).config.context_length)
    beside = puna.load(arguments.base, adapter=adapter, dtype="float32", context=context)
    lines = arguments.rows.read_text(encoding="utf-8").splitlines()[: arguments.prompts]
    prompts = [list(beside.prepare(json.loads(line)["messages"][:-1]).token_ids) for line in lines]
    with tempfile.TemporaryDirectory() as folder:
        merged, file = Path(folder) / "merged", Path(folder) / "merged.gguf"
        export(str(adapter), out=merged, format=Format.safetensors, type="F32", quantize=None, revision=None)
        export(str(adapter), out=file, format=Format.gguf, type="F32", quantize=None, revision=None)
        forms: dict[str, Answer] = {
            "trainer": trainer(arguments.base, adapter, tokens),
            "adapter beside the weights": served(beside, tokens),
            "merged safetensors": served(puna.load(merged, context=context), tokens),
            "merged GGUF": served(puna.load(file, context=context), tokens),
        }
        if beside.config.architecture == "llama" and find_spec("llama_cpp") is None:
            print("llama.cpp is left out: pip install llama-cpp-python brings it")
        elif beside.config.architecture == "llama":
            forms["merged GGUF by llama.cpp"] = llama_cpp(file, tokens, context)
        expected = [forms["trainer"](ids) for ids in prompts]
        for name, answer in forms.items():
            same = sum(answer(ids) == wanted for ids, wanted in zip(prompts, expected, strict=True))
            print(f"{name}: {same} of {len(prompts)} prompts give the trainer's {tokens} tokens")
        plain = served(puna.load(arguments.base, dtype="float32", context=context), tokens)
        same = sum(plain(ids) == wanted for ids, wanted in zip(prompts, expected, strict=True))
        print(f"the base without the adapter: {same}")


if __name__ == "__main__":
    main()
