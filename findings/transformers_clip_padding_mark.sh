#!/usr/bin/env bash
# transformers 5.23.0: the CLIP tokenizers of Stable Diffusion 2 and of SDXL's second encoder pad with "!", which makes the
# exclamation mark a special token. Special tokens are cut out of the text before the byte pairs are formed. So a prompt
# that ends in an exclamation mark is read with the padding token (id 0 in CLIP's vocabulary, "!" within a word), and not
# with the mark at the end of a word (id 256, "!</w>") on which CLIP was trained.
#
# Expected: "wow!" has the same tokens whatever the padding token is; padding comes after the end of the text.
# Observed: with pad_token "!" the mark is the padding token. Output, on a vocabulary of single bytes:
#   5.23.0 padded with <|endoftext|>: ['<|startoftext|>', 'w', 'o', 'w</w>', '!</w>', '<|endoftext|>']
#   5.23.0 padded with !: ['<|startoftext|>', 'w', 'o', 'w</w>', '!', '<|endoftext|>']
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PYTHON'
import json
import os

import transformers
from transformers import CLIPTokenizer

letters = [chr(code) for code in range(33, 127)]
words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
read = {}
for mark in ("<|endoftext|>", "!"):
    folder = "tokenizer-" + ("end" if len(mark) > 1 else "mark")
    os.makedirs(folder)
    with open(f"{folder}/vocab.json", "w") as file:
        json.dump({word: index for index, word in enumerate(words)}, file)
    with open(f"{folder}/merges.txt", "w") as file:
        file.write("#version: 0.2\n")
    with open(f"{folder}/tokenizer_config.json", "w") as file:
        names = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
        json.dump({"tokenizer_class": "CLIPTokenizer", "pad_token": mark, "model_max_length": 77, **names}, file)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    read[mark] = tokenizer.convert_ids_to_tokens(tokenizer("wow!")["input_ids"])
    print(transformers.__version__, f"padded with {mark}:", read[mark])
assert "!</w>" in read["<|endoftext|>"], "the mark at the end of a word is gone"
assert "!" in read["!"] and "!</w>" not in read["!"], "the padding token is no longer cut out of prompts"
PYTHON
