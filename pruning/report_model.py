"""dia_pangu's report model in the hands of the pruning tools: loading pruned checkpoints, task prompts, scoring.

Reads what upstream's tools and ours write: a merged checkpoint with fewer language-model layers, its prune map, and the LoRA
alpha from adapter_config.json.
"""

import json
import math
import sys
import time
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # repository root: every way of starting this file finds it
from common.errors import UserError
from common.files import check, read_json
from dia_pangu.evaluate.evidence import locate_all
from dia_pangu.src.Dataset.CTRG_dataset import CTRGDataset, collate
from dia_pangu.src.Model.build import CONFIG, PUBLISHED, make_embedding, make_grid, make_text, to_our_keys
from dia_pangu.src.Model.multimodality_model import MultiPanguForCausalLM, add_lora
from dia_pangu.src.Model.pangu import load_tokenizer
from pruning.layers import shorter_config
from pruning.pruning_tools.prune_llm import find_language_model, find_lora
from pruning.pruning_tools.shards import open_checkpoint


def read_map(path) -> dict:
    """A prune map of upstream's tool or ours."""
    prune_map = read_json(
        path, {"new_layers": int, "layer_id_map": dict, "old_layers?": int, "lora_alpha?": float, "tag?": str}
    )
    check(
        prune_map["layer_id_map"],
        {str(new): int for new in range(prune_map["new_layers"])},
        path,
        "layer_id_map",
    )
    return prune_map


def check_map(path, layers: int, old_layers: int) -> dict:
    """`read_map`, checked against the checkpoint (`layers`) and the config it was made from (`old_layers`)."""
    prune_map = read_map(path)
    keep = list(prune_map["layer_id_map"].values())
    if len(keep) != layers:
        raise UserError(
            f"{path}: leaves {len(keep)} layers, the checkpoint has {layers}; this map is of another model"
        )
    if old_layers != layers and (
        prune_map.get("old_layers", old_layers) != old_layers or max(keep) >= old_layers
    ):
        raise UserError(
            f"{path}: is of a model with {prune_map.get('old_layers')} layers, the config says {old_layers}; this "
            f"map is of another model"
        )
    return prune_map


def map_alpha(prune_map: dict):
    """The map's LoRA alpha, unless upstream guessed it: its tool writes 2 r when no adapter_config.json was there."""
    known = (
        prune_map.get("adapter_config_used") or "parameters_after" in prune_map
    )  # a field that only our maps have
    return prune_map.get("lora_alpha") if known else None


def load_report_model(ckpt, lang_model_path, prune_map=None, lora_alpha=None):
    """(model in eval mode, text, config) of a checkpoint, pruned or not.

    lang_model_path: folder with config and tokenizer of the language model, before or after pruning; its weights are not
    read, because the checkpoint holds them. Every tensor must be there and fit; nothing stays random.
    """
    checkpoint = open_checkpoint(ckpt)
    llm = find_language_model(checkpoint.entries)
    if not (Path(lang_model_path) / "config.json").is_file():
        raise UserError(
            f"{lang_model_path}: no config.json there; --lang-model-path takes the folder of the language model"
        )
    llm_config = AutoConfig.from_pretrained(lang_model_path)
    old_layers = llm_config.num_hidden_layers
    pruned = check_map(prune_map, llm.layers, old_layers) if prune_map else None
    lora = find_lora(
        checkpoint, llm, lora_alpha if lora_alpha is not None else map_alpha(pruned) if pruned else None
    )
    if lora and lora.alpha is None:
        raise UserError(
            f"{ckpt} holds LoRA weights of rank {lora.r} and nothing says their alpha; pass --lora-alpha (Dia-Pangu "
            f"was trained with 16)"
        )
    if old_layers != llm.layers:
        if pruned is None:
            raise UserError(
                f"{ckpt} has {llm.layers} layers, {lang_model_path} {old_layers}; name the prune map with "
                f"--prune_map_path"
            )
        shorter = shorter_config(
            llm_config.to_dict(), [pruned["layer_id_map"][str(i)] for i in range(llm.layers)]
        )
        llm_config = type(llm_config).from_dict(shorter)

    file = checkpoint.folder / "dia_config.json"
    config = json.loads(json.dumps(PUBLISHED)) | (read_json(file, CONFIG) if file.is_file() else {})
    if not file.is_file():
        config["grid"]["preprocess"] = "upstream"
        print(
            f"{checkpoint.folder}: no dia_config.json; taking the published sizes and upstream's preprocessing"
        )
    config["lora"] = (
        {"r": lora.r, "alpha": lora.alpha, "dropout": 0.0, "targets": lora.target_modules} if lora else None
    )
    table = next(
        e
        for k, e in checkpoint.entries.items()
        if k.startswith(llm.root) and k.endswith("embed_tokens.weight")
    )
    with init_empty_weights(
        include_buffers=False
    ):  # upstream initialised 7 B values at random, to overwrite them
        lang_model = AutoModelForCausalLM.from_config(llm_config, dtype=table.dtype)
        if lora:
            lang_model = add_lora(lang_model, lora.r, lora.alpha, 0.0, lora.target_modules)
        model = MultiPanguForCausalLM(lang_model, make_embedding(config, *table.shape))
    tensors = to_our_keys(
        model,
        {k: e.read() for k, e in checkpoint.entries.items() if not k.endswith("rotary_emb.inv_freq")},
        "all",
    )
    wanted = model.state_dict()
    wrong = [f"{k} is missing" for k in wanted if k not in tensors]
    wrong += [f"{k} is not part of the model" for k in tensors if k not in wanted]
    wrong += [
        f"{k} is {tuple(tensors[k].shape)}, not {tuple(v.shape)}"
        for k, v in wanted.items()
        if k in tensors and tensors[k].shape != v.shape
    ]
    if wrong:
        raise UserError(
            f"{ckpt}: does not fit {lang_model_path}: {wrong[0]}"
            + (f", and {len(wrong) - 1} more" if wrong[1:] else "")
        )
    model.load_state_dict(tensors, assign=True)
    model.embedding_layer.weight = (
        model.lang_model.get_input_embeddings().weight
    )  # assigning two keys untied them
    model.lang_model.tie_weights()
    print(
        f"{ckpt}: {llm.layers} layers, all {len(tensors)} tensors loaded"
        + (f", LoRA r {lora.r} alpha {lora.alpha:g}" if lora else "")
    )
    return model.eval(), make_text(load_tokenizer(lang_model_path), config, table.shape[0]), config


class Encoded(Dataset):
    """Samples whose volumes went through the frozen vision encoder once, with the model's own diagnosis and, where it has an
    evidence head, the side and place that it sees.

    Items as CTRGDataset's, with tokens (1, n_tok, vis_dim) instead of vision_x. Memory: one set of patch tokens a sample,
    so it is for calibration, evaluation and short healing runs; long runs read the volumes.
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
        thresholds = torch.tensor(config["thresholds"])
        device = next(model.parameters()).device
        with torch.no_grad():
            for first in range(0, len(self.source), batch):
                volumes = torch.stack(
                    [
                        self.source.sample(i)["vision_x"]
                        for i in range(first, min(first + batch, len(self.source)))
                    ]
                )
                tokens = model.encode(volumes.to(device))
                self.tokens += list(tokens.cpu())
                self.places += locate_all(
                    model.embedding_layer, tokens, volumes, config["grid"]["preprocess"]
                )[1]
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


@torch.no_grad()
def task_prompts(model, text, samples: Encoded):
    """Prompts of the scan: the volume's embeddings, the model's own statuses, the guide and the true report, whose tokens are scored."""
    device = next(model.parameters()).device
    for i in range(len(samples)):
        sample = samples[i]
        row = text.pad(
            [text.sample(sample["own_statuses"], sample["report"], sample["id"], sample["own_places"])]
        )
        embeds = model.embedding_layer(
            text_input=row["lang_x"].to(device), tokens=sample["tokens"][None].to(device)
        )
        yield {
            "name": sample["id"],
            "inputs_embeds": embeds.to(model.lang_model.dtype),
            "labels": row["labels"],
        }


@torch.no_grad()
def report_losses(model, text, samples: Encoded, batch: int = 16) -> torch.Tensor:
    """(N, 2) float64: summed loss and count of the report's tokens for each sample, after the model's own statuses."""
    device, rows = next(model.parameters()).device, []
    for first in range(0, len(samples), batch):
        some = [samples[i] for i in range(first, min(first + batch, len(samples)))]
        padded = text.pad(
            [text.sample(s["own_statuses"], s["report"], s["id"], s["own_places"]) for s in some]
        )
        padded = {key: value.to(device) for key, value in padded.items()}
        embeds = model.embedding_layer(
            text_input=padded["lang_x"], tokens=torch.stack([s["tokens"] for s in some]).to(device)
        )
        logits = model.lang_model(
            inputs_embeds=embeds.to(model.lang_model.dtype), attention_mask=padded["attention_mask"]
        ).logits
        labels = padded["labels"][:, 1:]
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="none"
        )
        rows.append(
            torch.stack([loss.view_as(labels).double().sum(1), (labels != -100).double().sum(1)], 1).cpu()
        )
    return torch.cat(rows)


def perplexity(losses: torch.Tensor) -> float:
    total, tokens = losses.sum(0).tolist()
    return math.exp(min(total / tokens, 50))


@torch.no_grad()
def write_reports(
    model, text, samples: Encoded, max_new_tokens: int = 120, batch: int = 16, **generation
) -> dict:
    """Greedy reports of all samples: {"reports": [str], "questions": [str], "milliseconds": [float per sample]}."""
    out, device = {"reports": [], "questions": [], "milliseconds": []}, next(model.parameters()).device
    for first in range(0, len(samples), batch):
        some = [samples[i] for i in range(first, min(first + batch, len(samples)))]
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
