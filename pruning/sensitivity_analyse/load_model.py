"""The model and the prompts of a scan (upstream names this file, but never published it)."""

import json
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM

sys.path.insert(
    0, str(Path(__file__).resolve().parents[2])
)  # repository root: every way of starting this file finds it
from common.errors import UserError
from common.files import reading
from dia_pangu.src.Model.pangu import load_tokenizer  # also registers openPangu's model type

PROMPTS = Path(__file__).with_name("prompts.jsonl")


def load_model(path, dtype: str | None = None, trust_remote_code: bool = False):
    """(model, tokenizer) of a folder as transformers writes it, in eval mode. dtype: "float32", ...; default as stored."""
    path = Path(path)
    if not (path / "config.json").is_file():
        raise UserError(
            f"{path}: no config.json there; give the folder of a language model, with config, weights and tokenizer"
        )
    with reading(path, "causal language model"):
        tokenizer = load_tokenizer(path, trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype or "auto", local_files_only=True, trust_remote_code=trust_remote_code
        )
    return model.eval(), tokenizer


def builtin_prompts() -> list[str]:
    """18 texts, a third each English, Chinese and radiology (three in each language)."""
    return read_prompts(PROMPTS)


def read_prompts(path) -> list[str]:
    """One prompt a line; a .jsonl file holds objects with the field `text`. Empty lines are passed over."""
    with reading(path, "UTF-8 text file"):
        lines = [line for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if Path(path).suffix == ".jsonl":
        for number, line in enumerate(lines):
            try:
                lines[number] = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}: line {number + 1} is no JSON object with the field text") from error
    if not lines:
        raise UserError(f"{path}: holds no prompts")
    return lines
