"""dia_pangu's report model in a study: its samples, and what it loses without some layers, healed or not."""

import tempfile

import numpy as np
import torch

from dia_pangu.evaluate.labeler import positives
from pruning import report_model, train
from pruning.layers import without_layers
from pruning.sensitivity_analyse.eval_metric import perplexity
from studies.pruning.tables import counts
from studies.recipe import options


class ReportTask:
    """A dia_pangu model: prompts with volumes, report losses, and the findings that its reports state."""

    def __init__(self, args, device):
        loaded = report_model.load_report_model(args.model, args.lang_model_path)
        self.model, self.text, self.config = loaded
        self.model = self.model.to(device)
        if not self.config["lora"]:
            self.model.lang_model, _ = train.new_lora(self.model.lang_model)
        self.lang_model, self.max_new_tokens = self.model.lang_model, args.max_new_tokens
        self.train_set = self.encoded(args, "train", args.train_samples, flip=0.02)
        self.test_set = self.encoded(args, "test", args.test_samples)
        prompts = report_model.task_prompts(self.model, self.text, self.train_set)
        self.prompts = [prompt for prompt, _ in zip(prompts, range(args.calibration))]
        labels = [self.test_set[i]["cls_labels"].tolist() for i in range(len(self.test_set))]
        self.labels = np.array(labels, bool)

    def encoded(self, args, split: str, limit: int, flip: float = 0.0):
        return report_model.Encoded(
            self.model, self.text, self.config, args.data, split, limit, args.cache, flip, args.seed
        )

    def measure(self) -> dict:
        """Losses and finding counts of every test sample, with the model as it is now."""
        losses = report_model.report_losses(self.model, self.text, self.test_set)
        made = report_model.write_reports(self.model, self.text, self.test_set, self.max_new_tokens, batch=40)
        found = counts(self.labels, np.array(positives(made["reports"]), bool))
        return {"losses": losses.tolist(), "counts": found.tolist(), "perplexity": perplexity(losses)}


def healing_settings(args, folder):
    """The arguments of pruning/train.py for healing one set of layers; `folder` is thrown away afterwards."""
    flags = {"pruned_model_path": args.model, "out": folder, "max_steps": args.heal_steps}
    flags |= {"batch_size": args.heal_batch, "accum": 1, "lr": args.heal_lr, "seed": args.seed}
    flags |= {"lr_scheduler_type": "cosine", "warmup": min(5, args.heal_steps)}
    flags |= {"log_every": args.heal_steps, "keep": 1}
    return train.parse_args(options(flags))


def evaluate_set(task, drop, args, accelerator) -> dict:
    """Return {"before", "after"}: what `task` measures without the layers `drop`, before and after healing.

    The model is as it was afterwards: the layers are put back, and LoRA's matrices get their old values.
    """
    lora = {name: p.detach().clone() for name, p in task.model.named_parameters() if "lora_" in name}
    with without_layers(task.lang_model, drop), tempfile.TemporaryDirectory(dir=args.out) as folder:
        before = task.measure()
        train.set_trained(task.model, full=False)
        settings = healing_settings(args, folder)
        train.heal(task.model, task.train_set, report_model.collate_encoded, settings, accelerator)
        after = task.measure()
    accelerator.free_memory()
    with torch.no_grad():
        for name, parameter in task.model.named_parameters():
            if name in lora:
                parameter.copy_(lora[name])
    return {"before": before, "after": after}
