"""GRPO: groups of answers by puna's own engine, rewarded by a rule, each pushed by how much it beats its group.

Formulas are the paper's (arXiv 2402.03300) as TRL has them (`grpo_trainer.py`, loss_type "grpo", one update a batch):
advantage = (reward - mean) / (std + 1e-4) within the group, loss = -advantage * p / p.detach(), averaged over an
answer's tokens and then over answers, plus beta times the estimate r - log r - 1 of the distance to the base.
Legend: N predictions of a pass.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from puna.checkpoint.named import weight_of
from puna.engine.adapters import put_beside
from puna.engine.model import Model
from puna.engine.sizes import cache_size
from puna.errors import PunaError
from puna.model import Decoder
from puna.model.adapt import switched_off, updates
from puna.model.feedforward import Experts
from puna.model.lora import LoRAExperts, LoRALinear
from puna.model.packing import Packer
from puna.model.quantized import Weight
from puna.text.tokenizer import Tokenizer
from puna.train.config import TrainConfig
from puna.train.examples import document, prompt_ids
from puna.train.lora import AdapterOptions, checked_options, what_trains
from puna.train.loss import token_losses
from puna.train.method import Batch, Example, Finished, Loss, Packing, Row
from puna.train.rewards import checked_answer, numeric_reward

EPSILON = 1e-4  # TRL's, beside the group's standard deviation


class GRPOOptions(AdapterOptions):
    """`options` of grpo (docs/tuning.md)."""

    group: int = Field(8, ge=2)  # answers to each prompt
    max_tokens: int = Field(256, ge=1)  # of an answer
    temperature: float = Field(1.0, gt=0)
    beta: float = Field(0.0, ge=0)  # of the distance to the base
    adapter: bool = True  # False trains all weights


@dataclass(frozen=True)
class Answer:
    """One that the engine gave: its tokens, their log-probabilities there, and what it was worth."""

    tokens: list[int]
    logprobs: list[float]
    reward: float


class GRPO:
    """From prompts with an answer that can be checked."""

    name: ClassVar[str] = "grpo"
    metrics: ClassVar[tuple[str, ...]] = ("reward", "tokens_answered", "gap")
    packing: ClassVar[Packing] = "whole"
    optimizer: ClassVar[Literal["muon", "adamw"]] = "adamw"

    def __init__(self, config: TrainConfig) -> None:
        self.options = checked_options(GRPOOptions, config)
        if self.options.beta and not self.options.adapter:
            raise PunaError("options.beta: the base is there to compare with only beside adapters; take one out")
        self.rate = 1e-5 if self.options.adapter else 1e-6
        self.trains = what_trains(self.options, self.options.adapter, config.seed)
        self.seed = config.seed

    def prepare(self, model: Decoder, seed: int) -> None:
        """Adapters, or all weights."""
        self.trains.prepare(model, seed)

    def example(self, row: Row, tokenizer: Tokenizer) -> Example:
        """`messages` (what the assistant says at the end is left out) or `prompt`, and `answer`."""
        if "answer" not in row:
            raise PunaError("answer: missing; a row is a prompt and the number that its answer should end with")
        ids = prompt_ids(row, tokenizer)
        marks = [False] * (len(ids) - 1) + [True]  # where the answer goes on; readers refuse rows that teach nothing
        return Example((document(ids, marks),), {"answer": checked_answer(row["answer"])})

    def expand(self, model: Decoder, tokenizer: Tokenizer, examples: list[Example], step: int) -> list[Example]:
        """Each prompt's answers, as examples of their own with their advantages."""
        self.trains.begin_step(step)
        found: list[Example] = []
        for example, answers in zip(examples, self._answer(model, tokenizer, examples, step), strict=True):
            prompt = example.documents[0].tokens.tolist()
            for answer, advantage in zip(answers, advantages([each.reward for each in answers]), strict=True):
                marks = [False] * len(prompt) + [True] * len(answer.tokens)
                extra = {"advantage": advantage, "reward": answer.reward, "logprobs": answer.logprobs}
                found.append(Example((document([*prompt, *answer.tokens], marks),), extra))
        return found

    def count(self, batch: Batch) -> int:
        """Answers."""
        return len(batch.examples)

    def loss(self, model: Decoder, batch: Batch) -> Loss:
        """Summed over answers."""
        self.trains.begin_pass(model, batch.number)
        logprobs_N = self._logprobs(model, batch)
        base_N = None
        if self.options.beta:
            with torch.no_grad(), switched_off(model):
                base_N = self._logprobs(model, batch)
        total = logprobs_N.new_zeros(())
        sums = dict.fromkeys(self.metrics, 0.0)
        start = 0
        for example, length in zip(batch.examples, batch.lengths, strict=True):
            taken = slice(start + length - len(example.extra["logprobs"]), start + length)
            start += length
            logprobs = logprobs_N[taken]
            each = -example.extra["advantage"] * (logprobs - logprobs.detach()).exp()
            if base_N is not None:
                ratio = base_N[taken] - logprobs
                each = each + self.options.beta * (ratio.exp() - ratio - 1)
            total = total + each.mean()
            engine = torch.tensor(example.extra["logprobs"], device=logprobs.device)
            sums["reward"] += example.extra["reward"]
            sums["tokens_answered"] += len(engine)
            sums["gap"] += float((logprobs.detach() - engine).abs().mean())
        return Loss(total, sums)

    def save(self, finished: Finished, folder: Path) -> None:
        """An adapter, or weights."""
        self.trains.save(finished, folder)

    @staticmethod
    def _logprobs(model: Decoder, batch: Batch) -> Tensor:
        return -token_losses(batch.states(model), model.head_weight, batch.targets_N, model.vocabulary)

    def _answer(self, model: Decoder, tokenizer: Tokenizer, examples: list[Example],
                step: int) -> list[list[Answer]]:  # fmt: skip
        """Of each prompt a group of answers by the engine, all prompts together; the seeds say which."""
        options = self.options
        longest = max(len(example.documents[0].tokens) for example in examples) + options.max_tokens
        if longest > model.config.context_length:
            raise PunaError(f"options.max_tokens: a prompt and its answer are up to {longest} tokens, but the model's "
                            f"context is {model.config.context_length}; lower it")  # fmt: skip
        packed = packed_copy(model)
        size = cache_size(packed.config, packed.dtype, context=longest, device=packed.device)
        llama = Model(packed, tokenizer, cache=size, context=longest)
        asked: list[list[Any]] = []
        for at, example in enumerate(examples):
            prompt = example.documents[0].tokens.tolist()
            seeds = [((self.seed * 1_000_003 + step) * 100_003 + at) * 1_009 + i for i in range(options.group)]
            how: dict[str, Any] = {"max_tokens": options.max_tokens, "temperature": options.temperature, "logprobs": 0}
            asked.append([llama.stream(prompt, seed=seed % 2**63, **how) for seed in seeds])
        return [[self._read(stream, example) for stream in streams]
                for streams, example in zip(asked, examples, strict=True)]  # fmt: skip

    @staticmethod
    def _read(stream: Any, example: Example) -> Answer:
        reply = [piece.reply for piece in stream][-1]
        assert reply is not None
        assert reply.logprobs is not None
        reward = numeric_reward(reply.text, example.extra["answer"])
        return Answer(reply.token_ids, [each.logprob for each in reply.logprobs], reward)


def advantages(rewards: list[float]) -> list[float]:
    """Each reward less the group's mean, over its standard deviation (of a sample)."""
    given = torch.tensor(rewards, dtype=torch.float64)
    scaled: list[float] = ((given - given.mean()) / (given.std() + EPSILON)).tolist()
    return scaled


def packed_copy(model: Decoder) -> Decoder:
    """A trainer's model as it would be served: weights packed, updates beside them."""
    with torch.device("meta"):
        packed = Decoder(model.config)

    def read(name: str) -> Weight | list[Weight]:
        owner, _, last = name.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(module, LoRALinear | LoRAExperts):
            module = module.base
        if not owner.endswith(".experts"):
            return weight_of(module)
        if isinstance(module, Experts):
            return module.get_parameter(last).detach()
        return [weight_of(layer) for layer in module.get_submodule(last.removesuffix("_proj")).children()]

    Packer(packed, read, None, model.dtype, model.device).fill()
    put_beside(packed, updates(model))
    return packed.requires_grad_(False).eval()

