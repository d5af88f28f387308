"""dia_pangu's report model in the hands of the pruning tools: the only file here that knows dia_pangu.

Loads what upstream's tools and ours write (a merged checkpoint with fewer language-model layers, its prune
map, and the alpha of LoRA from adapter_config.json), makes prompts of volumes and reports, scores reports.
Scripts import it only where they are given a report model: a plain language model needs no dia_pangu.
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import numpy as np
import torch
from accelerate import init_empty_weights
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM

from common.errors import UserError
from common.files import read_json
from common.intervals import bootstrap
from common.llm import add_lora
from dia_pangu.evaluate.evidence import locate_all
from dia_pangu.evaluate.findings import finding_scores, micro_f1
from dia_pangu.evaluate.labeler import positives
from dia_pangu.evaluate.nlg_eval import published_scores
from dia_pangu.src.Dataset.CTRG_dataset import CTRGDataset, collate, read_places
from dia_pangu.src.Model.build import (
    CONFIG,
    PUBLISHED,
    make_embedding,
    make_grid,
    make_text,
    save_model,
    to_our_keys,
)
from dia_pangu.src.Model.multimodality_model import MultiPanguForCausalLM
from dia_pangu.src.Model.pangu import load_tokenizer  # also registers openPangu's model type
from pruning.pruning_tools.language_model import find_language_model, known_lora, read_map
from pruning.pruning_tools.shards import open_checkpoint
from pruning.sensitivity_analyse.eval_metric import perplexity
from pruning.shorter import shorter_config

__all__ = ["collate", "load_tokenizer", "save_model"]  # for the other files of this room


def check_map(path, layers: int, old_layers: int) -> dict:
    """Return `read_map`, checked against the checkpoint (`layers`) and the unpruned config (`old_layers`)."""
    prune_map = read_map(path)
    keep = list(prune_map["layer_id_map"].values())
    if len(keep) != layers:
        raise UserError(
            f"{path}: leaves {len(keep)} layers, the checkpoint has {layers}; this map is of another model"
        )
    before = prune_map.get("old_layers", old_layers)
    if old_layers != layers and (before != old_layers or max(keep) >= old_layers):
        raise UserError(
            f"{path}: is of a model with {prune_map.get('old_layers')} layers, the config says {old_layers}; "
            "this map is of another model"
        )
    return prune_map


def map_alpha(prune_map: dict):
    """The map's alpha of LoRA, unless upstream guessed it: its tool writes 2 r without
    adapter_config.json."""
    ours = "parameters_after" in prune_map  # a field that only our maps have
    return prune_map.get("lora_alpha") if ours or prune_map.get("adapter_config_used") else None


def read_settings(folder: Path, lora: dict | None) -> dict:
    """dia_config.json of a checkpoint's folder, or the published sizes where there is none, with `lora`."""
    file = folder / "dia_config.json"
    config = json.loads(json.dumps(PUBLISHED))
    if file.is_file():
        config |= read_json(file, CONFIG)
    else:
        config["grid"]["preprocess"] = "upstream"
        print(f"{folder}: no dia_config.json; taking the published sizes and upstream's preprocessing")
    return config | {"lora": lora}


def load_complete(model, tensors: dict, ckpt, lang_model_path):
    """Put `tensors` into `model`, which is still empty; UserError unless all are there and fit."""
    wanted = model.state_dict()
    wrong = [f"{k} is missing" for k in wanted if k not in tensors]
    wrong += [f"{k} is not part of the model" for k in tensors if k not in wanted]
    wrong += [
        f"{k} is {tuple(tensors[k].shape)}, not {tuple(v.shape)}"
        for k, v in wanted.items()
        if k in tensors and tensors[k].shape != v.shape
    ]
    if wrong:
        more = f", and {len(wrong) - 1} more" if wrong[1:] else ""
        raise UserError(f"{ckpt}: does not fit {lang_model_path}: {wrong[0]}{more}")
    model.load_state_dict(tensors, assign=True)
    # assigning two keys untied them
    model.embedding_layer.weight = model.lang_model.get_input_embeddings().weight
    model.lang_model.tie_weights()


def load_report_model(ckpt, lang_model_path, prune_map=None, lora_alpha=None, lora_dropout: float = 0.0):
    """Return (model in eval mode, text, config) of a checkpoint, pruned or not.

    lang_model_path: folder with config.json and tokenizer of the language model, before or after pruning; its
    weights are not read, because the checkpoint holds them. lora_alpha: where nothing beside the checkpoint
    says it. lora_dropout: of the checkpoint's LoRA, in training. Every tensor must be there and fit.
    """
    # what the checkpoint and the folder of the language model hold
    checkpoint = open_checkpoint(ckpt)
    llm = find_language_model(checkpoint.entries)
    if not (Path(lang_model_path) / "config.json").is_file():
        raise UserError(
            f"{lang_model_path}: no config.json there; --lang-model-path takes the language model's folder"
        )
    llm_config = AutoConfig.from_pretrained(lang_model_path)
    old_layers = llm_config.num_hidden_layers
    pruned = check_map(prune_map, llm.layers, old_layers) if prune_map else None
    alpha = map_alpha(pruned) if lora_alpha is None and pruned else lora_alpha
    found = known_lora(checkpoint, llm, alpha)
    lora = found.settings(lora_dropout) if found else None
    if old_layers != llm.layers:
        if pruned is None:
            raise UserError(
                f"{ckpt} has {llm.layers} layers, {lang_model_path} {old_layers}; name the prune map with "
                "--prune-map-path"
            )
        keep = [pruned["layer_id_map"][str(i)] for i in range(llm.layers)]
        llm_config = type(llm_config).from_dict(shorter_config(llm_config.to_dict(), keep))

    # an empty model of that shape (upstream initialised 7 B values at random, to overwrite them)
    config = read_settings(checkpoint.folder, lora)
    table = next(
        e
        for k, e in checkpoint.entries.items()
        if k.startswith(llm.root) and k.endswith("embed_tokens.weight")
    )
    with init_empty_weights(include_buffers=False):
        lang_model = AutoModelForCausalLM.from_config(llm_config, dtype=table.dtype)
        if lora:
            lang_model = add_lora(lang_model, lora["r"], lora["alpha"], lora_dropout, lora["targets"])
        model = MultiPanguForCausalLM(lang_model, make_embedding(config, *table.shape))

    # its tensors
    entries = {k: e.read() for k, e in checkpoint.entries.items() if not k.endswith("rotary_emb.inv_freq")}
    tensors = to_our_keys(model, entries, "all")
    load_complete(model, tensors, ckpt, lang_model_path)
    about = f", LoRA r {lora['r']} alpha {lora['alpha']:g}" if lora else ""
    print(f"{ckpt}: {llm.layers} layers, all {len(tensors)} tensors loaded{about}")
    return model.eval(), make_text(load_tokenizer(lang_model_path), config, table.shape[0]), config


def training_set(model, text, config, args) -> CTRGDataset:
    """The training partition of args.data with prompts as this model was trained on; see pruning/train.py."""
    train_set = CTRGDataset(
        args.data,
        "train",
        make_grid(config),
        text,
        config["language"],
        args.cache,
        args.flip,
        args.seed,
        limit=args.limit,
        places=read_places(args.places) if args.places else None,
    )
    names_places = model.embedding_layer.evidence_head is not None
    if names_places != bool(args.places):
        what = "name side and place; give the places.json of dia_pangu/pretrain_vit.py"
        raise UserError(
            f"--places: the prompts of {args.pruned_model_path} "
            + (what if names_places else "do not name side and place; leave it out")
        )
    return train_set


class Encoded(Dataset):
    """Samples whose volumes went through the frozen vision encoder once.

    Items are CTRGDataset's, with tokens (1, n_tok, vis_dim) instead of vision_x, own_statuses (the model's
    own diagnosis) and own_places (side and place that it sees, where it has an evidence head, else None). All
    patch tokens stay in memory: long runs of healing read the volumes instead.
    """

    def __init__(
        self,
        model,
        text,
        config,
        data,
        split: str,
        limit: int,
        cache=None,
        flip: float = 0.0,
        seed: int = 0,
        batch: int = 16,
    ):
        self.source = CTRGDataset(
            data,
            split,
            make_grid(config),
            language=config["language"],
            cache=cache,
            limit=limit,
            flip=flip,
            seed=seed,
        )
        self.tokens, self.statuses, self.places = [], [], []
        thresholds, preprocess = torch.tensor(config["thresholds"]), config["grid"]["preprocess"]
        device = next(model.parameters()).device
        with torch.no_grad():
            for first in range(0, len(self.source), batch):
                some = range(first, min(first + batch, len(self.source)))
                volumes = torch.stack([self.source.sample(i)["vision_x"] for i in some])
                tokens = model.encode(volumes.to(device))
                self.tokens += list(tokens.cpu())
                _, places = locate_all(model.embedding_layer, tokens, volumes, preprocess)
                self.places += places
                self.statuses += (model.diagnose(tokens).float().cpu() >= thresholds).long().tolist()
        if model.embedding_layer.evidence_head is None:
            self.places = [None] * len(self.source)
        else:
            self.source.places = {item["id"]: places for item, places in zip(self.source.items, self.places)}
        self.source.vision, self.source.text = False, text

    def __len__(self):
        return len(self.tokens)

    def set_epoch(self, epoch: int):
        self.source.set_epoch(epoch)

    def __getitem__(self, index: int) -> dict:
        return {
            **self.source.sample(index),
            "tokens": self.tokens[index],
            "own_statuses": self.statuses[index],
            "own_places": self.places[index],
        }


def collate_encoded(samples: list[dict]) -> dict:
    """As dia_pangu's collate, with the tokens."""
    return {**collate(samples), "tokens": torch.stack([s["tokens"] for s in samples])}


def batched(samples: Encoded, size: int):
    """Lists of `size` samples, one after the other."""
    for first in range(0, len(samples), size):
        yield [samples[i] for i in range(first, min(first + size, len(samples)))]


def embedded(model, text, some: list[dict]) -> tuple:
    """(embeddings (B, N, d), {labels, attention_mask, ...} of the same size) of samples with their volume,
    the model's own statuses, the guide and the true report, whose tokens are scored."""
    device = next(model.parameters()).device
    rows = [text.sample(s["own_statuses"], s["report"], s["id"], s["own_places"]) for s in some]
    padded = {key: value.to(device) for key, value in text.pad(rows).items()}
    tokens = torch.stack([s["tokens"] for s in some]).to(device)
    embeds = model.embedding_layer(text_input=padded["lang_x"], tokens=tokens)
    return embeds.to(model.lang_model.dtype), padded


@torch.no_grad()
def task_prompts(model, text, samples: Encoded):
    """Yield a prompt of the scan for each sample: name, inputs_embeds (1, N, d) and labels (1, N)."""
    for some in batched(samples, 1):
        embeds, padded = embedded(model, text, some)
        yield {"name": some[0]["id"], "inputs_embeds": embeds, "labels": padded["labels"]}


@torch.no_grad()
def report_losses(model, text, samples: Encoded, batch: int = 16) -> torch.Tensor:
    """(N, 2) float64: summed loss and number of the true report's tokens, after the model's own statuses."""
    rows = []
    for some in batched(samples, batch):
        embeds, padded = embedded(model, text, some)
        logits = model.lang_model(inputs_embeds=embeds, attention_mask=padded["attention_mask"]).logits
        labels = padded["labels"][:, 1:]
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="none"
        ).view_as(labels)
        rows.append(torch.stack([losses.double().sum(1), (labels != -100).double().sum(1)], 1).cpu())
    return torch.cat(rows)


@torch.no_grad()
def write_reports(
    model, text, samples: Encoded, max_new_tokens: int = 120, batch: int = 16, **generation
) -> dict:
    """Let the model write a report of each sample, greedily unless `generation` says otherwise.

    Returns {"reports": N texts, "questions": N prompts, "milliseconds": N times}; a batch's time is shared
    equally among its samples.
    """
    out, device = {"reports": [], "questions": [], "milliseconds": []}, next(model.parameters()).device
    for some in batched(samples, batch):
        start = time.perf_counter()
        prompts = text.pad([text.sample(s["own_statuses"], places=s["own_places"]) for s in some], left=True)
        prompts = {key: value.to(device) for key, value in prompts.items()}
        ids = model.generate(
            prompts["lang_x"],
            prompts["attention_mask"],
            torch.stack([s["tokens"] for s in some]).to(device),
            pad_token_id=text.pad_id,
            eos_token_id=text.tokenizer.eos_token_id,
            **{"do_sample": False, "max_new_tokens": max_new_tokens, **generation},
        )
        out["reports"] += [text.decode(row) for row in ids]
        out["questions"] += [text.prompt(s["own_statuses"], s["own_places"]) for s in some]
        out["milliseconds"] += [1000 * (time.perf_counter() - start) / len(some)] * len(some)
    return out


def report_scores(truths, reports, labels, losses) -> dict:
    """Scores of written reports.

    truths, reports: N texts. labels: (N, 14), findings that are present. losses: (N, 2) of `report_losses`.
    Returns micro- and macro-F1 of the findings that the rule-based labeller reads in the reports, with a 95 %
    bootstrap interval over reports, the text scores that upstream publishes, and the perplexity.
    """
    labels, reported = np.asarray(labels).astype(bool), np.asarray(positives(reports)).astype(bool)
    published = published_scores(truths, reports, with_meteor=False)[0]
    return {
        "reports": len(reports),
        "finding_micro_f1": micro_f1(labels, reported),
        "finding_micro_f1_interval": bootstrap(micro_f1, labels, reported),
        "finding_macro_f1": finding_scores(labels, reported)["macro"]["F1"],
        "perplexity": perplexity(losses),
        **{name: value for name, value in published.items() if value is not None},
    }
