"""Make a small checkpoint and questions for it, to try scale/ on a laptop without a download.

    python -m scale.make_small small           # a minute; small/model and small/sums.jsonl

The questions are the 4,096 sums of six numbers from zero to three in words, more than a short run
can learn by heart. The model is a Qwen3-MoE with a tokenizer and a chat template of its own, warmed
up on worked answers some of whose sums are off by one, so that RL has something to sharpen.
"""

import argparse
import itertools
import json
import tempfile
from pathlib import Path

import tokenizers
import torch
import transformers
from torch import Tensor

import train_toy
from pr2_mini import AdditionTask, ModelConfig, MoETransformer
from scale import checkpoints
from scale.questions import Questions
from scale.train import Settings

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SPECIAL = ["<pad>", "<eos>", "<user>", "<bot>", "<bos>", "<end>"]  # ids 0 to 5
OTHERS = ["<unk>", "What", "is", "plus", "?", "\\boxed{", "}", " "]
WORDS = [*SPECIAL, *OTHERS, *NUMBERS, *"0123456789"]
TEMPLATE = (
    "<bos>{% for m in messages %}{{ '<user>' if m['role'] == 'user' else '<bot>' }}"
    "{{ m['content'] }}<end>{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of whole words and single digits, with a chat template."""
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    pattern = tokenizers.Regex(r"\\boxed\{|[A-Za-z]+|.")
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(pattern, behavior="isolated")
    inner.decoder = tokenizers.decoders.Fuse()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


class Sums(Questions):
    """The questions as train_toy.warm_up wants a task, with worked solutions of which some slip:
    to "What is two plus three plus one?" the response is "5 \\boxed{6}"."""

    def __init__(self, settings: Settings, hf_config):
        super().__init__(settings, hf_config)
        self.prompt_length = self.longest  # of all: each question has as many words
        self.response_length = 2 * self.longest

    def solutions(self, problems: list, slip: float, generator: torch.Generator) -> Tensor:
        """(Q, response_length) int64 ids, padded on the right; each sum is off by one with
        probability `slip`, and is carried on."""
        questions = []
        for problem in problems:
            words = problem.text.removeprefix("What is ").removesuffix("?").split(" plus ")
            questions.append("+".join(str(NUMBERS.index(word)) for word in words))
        toy = AdditionTask(operands=len(words))
        worked = toy.decode(toy.solutions(questions, slip, generator))  # "5,6."
        solutions = torch.full((len(problems), self.response_length), self.pad)
        for row, running in enumerate(worked):
            *sums, total = running.rstrip(".").split(",")
            text = " ".join([*sums, f"\\boxed{{{total}}}<end>"])
            ids = self.tokenizer.encode(text, add_special_tokens=False)
            solutions[row, : len(ids)] = torch.tensor(ids)
        return solutions


def make(folder: Path, numbers: int = 6, largest: int = 3, slip: float = 0.1, steps: int = 400):
    """Writes folder/sums.jsonl and folder/model, which `steps` of warm-up have taught to add."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "sums.jsonl", "w") as file:
        for addends in itertools.product(range(largest + 1), repeat=numbers):
            question = f"What is {' plus '.join(NUMBERS[number] for number in addends)}?"
            row = {"question": question, "answer": f"We add them up.\n#### {sum(addends)}"}
            file.write(json.dumps(row) + "\n")
    # vLLM on CPUs takes no head_dim of 16.
    config = ModelConfig(len(WORDS), num_attention_heads=2, head_dim=32)
    hf_config = transformers.Qwen3MoeConfig(
        **vars(config),
        architectures=["Qwen3MoeForCausalLM"],
        max_position_embeddings=256,
        eos_token_id=[1, 5],  # <eos> and what the template ends a turn with
        pad_token_id=0,
    )
    with tempfile.TemporaryDirectory() as untrained:
        hf_config.save_pretrained(untrained)
        save_tokenizer(Path(untrained))
        settings = Settings(checkpoint=untrained, data=str(folder / "sums.jsonl"))
        torch.manual_seed(0)
        model = MoETransformer(config)
        toy = train_toy.Settings(warm_up=steps, slip=slip, device="cpu")
        train_toy.warm_up(model, Sums(settings, hf_config), toy)
        checkpoints.save(model, untrained, folder / "model")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m scale.make_small")
    parser.add_argument("folder", type=Path, help="where sums.jsonl and model are written")
    chosen = parser.parse_args().folder
    if (chosen / "model").exists():
        parser.error(f"{chosen / 'model'} exists; choose another folder")
    make(chosen)
