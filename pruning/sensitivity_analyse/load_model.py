"""The model and the prompts of a scan (upstream names this file, but never published it)."""

import itertools
import json
import sys
from pathlib import Path

# repository root: every way of starting this file finds it
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import llm
from common.errors import UserError
from common.files import read_json, reading
from pruning.pruning_tools.read_back import general_class

PROMPTS = Path(__file__).with_name("prompts.jsonl")


def add_pruned_arguments(group):
    """Add a pruned model and what belongs to it; the same for healing and testing."""
    group.add_argument(
        "--pruned-model-path",
        "--pruned-merged-ckpt",
        "--ckpt-path",
        type=Path,
        required=True,
        help="a merged checkpoint of prune_llm.py, a run folder of train.py, or a language model's folder",
    )
    group.add_argument(
        "--prune-map-path",
        "--prune-map",
        type=Path,
        help="prune_layer_map_*.json, for an unpruned config.json",
    )
    group.add_argument("--lang-model-path", type=Path, help="folder with config.json and tokenizer")
    llm.add_trust_argument(group)


def check_kind(args):
    """UserError unless the options name one kind of model, with what it needs."""
    if bool(args.data) == bool(args.texts):
        raise UserError("give --data (a report model on a CTRG folder) or --texts (a plain language model)")
    if args.data and not args.lang_model_path:
        raise UserError("--data needs --lang-model-path, the language model's folder")


def load_model(path, dtype: str | None = None, trust_remote_code: bool = False):
    """Return (language model in eval mode, which may see pictures too, tokenizer) of transformers' folder.

    dtype: "float32", "bfloat16" or "float16"; None: as stored.
    """
    if is_pangu(path) and not trust_remote_code:
        # openPangu under its own names needs dia_pangu's classes; the import registers them with transformers
        from pruning.report_model import load_tokenizer
    else:
        load_tokenizer = llm.load_tokenizer
    llm.check_llm(path, trust_remote_code)
    kind = general_class(read_json(Path(path) / "config.json", dict))
    options = {"dtype": dtype or "auto", "local_files_only": True, "trust_remote_code": trust_remote_code}
    with reading(path, "language model"):
        model = kind.from_pretrained(path, **options).eval()
    tokenizer = load_tokenizer(path, trust_remote_code)
    # the end of text of the tokenizer's class, not of this model
    if (tokenizer.eos_token_id or 0) >= table_rows(model):
        tokenizer.eos_token = None
    return model, tokenizer


def table_rows(model) -> int:
    """How many words the model has an embedding of."""
    return len(model.get_input_embeddings().weight)


def check_words(model, tokenizer, texts: dict[str, str]):
    """UserError naming the first of `read_texts` that holds a word which the model has no embedding of.

    transformers adds the special words of a tokenizer's class where the folder has none such.
    """
    rows = table_rows(model)
    if max(tokenizer.get_vocab().values()) < rows:
        return
    for place, text in texts.items():
        if beyond := [number for number in tokenizer(text).input_ids if number >= rows]:
            word = tokenizer.convert_ids_to_tokens(beyond[0])
            raise UserError(
                f"{place}: the word {word!r} is number {beyond[0]}, the model's table has {rows} rows; take "
                "it out of the text"
            )


def scorable(ids: dict) -> dict:
    """Those of {place: token ids} with the two tokens that predict something; the others are told.

    UserError, which names the file, where none has.
    """
    kept = {place: some for place, some in ids.items() if len(some) > 1}
    first = next((place for place in ids if place not in kept), None)
    if not kept:
        raise UserError(f"{first.rpartition(', ')[0]}: no text has two tokens; give longer ones")
    if first:
        count = f"{len(ids) - len(kept)} of {len(ids)} texts"
        print(f"{count} have fewer than two tokens and are left out, first {first}")
    return kept


def is_pangu(path) -> bool:
    """Whether a folder's model or tokenizer is openPangu's own class, which is not part of transformers."""
    marks = {"config.json": ("model_type", "PanguEmbedded")}
    marks |= {"tokenizer_config.json": ("tokenizer_class", "PanguTokenizer")}
    files = {Path(path) / name: mark for name, mark in marks.items()}
    return any(
        read_json(file, {f"{field}?": str}).get(field) == name
        for file, (field, name) in files.items()
        if file.is_file()
    )


def builtin_prompts() -> list[str]:
    """18 texts, a third each English, Chinese and radiology (three in each language)."""
    return read_prompts(PROMPTS)


def read_prompts(path) -> list[str]:
    """The texts of `read_texts`."""
    return list(read_texts(path).values())


def read_texts(path, count: int | None = None) -> dict[str, str]:
    """{place: text} of the first `count` texts (None: all) of a file: one a line, or objects with the field
    `text` in a .jsonl file.

    Empty ones are passed over. UserError names a line that cannot be read.
    """
    with reading(path, "UTF-8 text file"):
        # Unicode knows further ends of lines, which may stand inside a text
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    texts = {}
    for number, line in enumerate(lines, 1):
        if line.strip() and Path(path).suffix.lower() in (".json", ".jsonl"):
            try:
                line = json.loads(line)["text"]
                line.encode()  # half a pair of surrogates is no text
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{path}: line {number} is no JSON object with a text in the field text"
                ) from error
        if line.strip():
            texts[f"{path}, line {number}"] = line
    if not texts:
        raise UserError(f"{path}: holds no prompts")
    return dict(itertools.islice(texts.items(), count))
