"""Train the tokenizer: byte-level BPE of 4096 tokens on a balanced sample of all domains, digits one by one."""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tools.demo_model.corpus import SPECIAL_TOKENS, corpus_file, read_documents
from tools.demo_model.domains import NAMES

VOCABULARY = 4096
SPLIT = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\n+|[^\S\n]+(?!\S)|[^\S\n]+"
TEMPLATE = (
    "{%- set ns = namespace(system='') -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{%- set ns.system = ns.system + message['content'] + '\\n' -%}"
    "{%- elif message['role'] == 'user' -%}"
    "{{- '<|user|>' + ns.system + message['content'] + '<|end|>' -}}{%- set ns.system = '' -%}"
    "{%- else -%}{{- '<|assistant|>' + message['content'] + '<|end|>' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `tokenizer`."""
    parser.add_argument("--sample-bytes", type=int, default=2_500_000, help="text of each domain to learn from")
    parser.add_argument("--seed", type=int, default=3)


def run(arguments: argparse.Namespace) -> None:
    """Train and write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=16,
    )
    tokenizer.train_from_iterator(_sample(arguments.work, arguments.sample_bytes, arguments.seed), trainer)
    write(tokenizer, arguments.work / "tokenizer")


def write(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files from which `AutoTokenizer` loads."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": ["<|user|>", "<|assistant|>"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def _sample(work: Path, budget: int, seed: int) -> Iterator[str]:
    for domain in NAMES:
        path = corpus_file(work, domain, "train")
        if not path.exists():
            continue
        documents = list(read_documents(path))
        random.Random(seed).shuffle(documents)
        room = budget
        for document in documents:
            yield document
            room -= len(document.encode())
            if room < 0:
                break
