"""One process of a sharded model, started by test_parallel_ranks.py with torchrun's environment.

Reads cases from a JSON file, runs each through the public face, and writes what it saw for the parent to compare.
"""

import json
import sys
from pathlib import Path

import torch

import puna
from puna.errors import PunaError

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4]


def answers(llama: "puna.Model") -> dict[str, list[int]]:
    """Greedy and seeded answers, past several chunks."""
    return {
        "greedy": llama.generate(PROMPT, max_tokens=16, temperature=0).token_ids,
        "seeded": llama.generate(PROMPT, max_tokens=16, temperature=1.0, seed=7).token_ids,
    }


def held(decoder: torch.nn.Module) -> int:
    """Bytes of weights, packed or not."""
    packed = (module.packed.bytes() for module in decoder.modules() if hasattr(module, "packed"))
    return sum(weight.nbytes for weight in decoder.parameters()) + sum(packed)


def refusal(call) -> str:
    """The message of the PunaError that `call` raises, or what happened instead."""
    try:
        call()
    except PunaError as error:
        return str(error)
    return "no error"


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    results = {}
    for case in json.loads((folder / "cases.json").read_text()):
        llama = puna.load(
            case["checkpoint"], dtype=case["dtype"], quantize=case["quantize"],
            expert_parallel=case["expert_parallel"],
        )  # fmt: skip
        rank, mesh = llama.share.rank, llama.share.sharding.mesh
        results[case["id"]] = {
            **answers(llama),
            "mesh": [mesh.tensor, mesh.expert],
            "heads": [llama.config.num_heads, llama.config.num_kv_heads],
            "unseeded": llama.generate(PROMPT, max_tokens=6, temperature=1.0).token_ids,
            "held": held(llama.decoder),
            "save": refusal(lambda llama=llama: llama.save(folder / "saved")),
        }
        logits = llama.logits(PROMPT)
        if rank == 0:
            torch.save(logits, folder / f"{case['id']}.pt")
    results["out of step"] = refusal(lambda: llama.logits([1, 2, 3 + rank]))
    results["other lengths"] = refusal(lambda: llama.logits([1] * (rank + 1)))
    (folder / f"rank{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
