"""What train.py measures beside its loss: validation losses, what trivial predictors reach, and a linear
probe."""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

# repository root: every way of starting a script of this folder finds it
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cwt_mae.dataset_finetune import DownstreamClassificationDataset, fold_of, load_task, training_part
from cwt_mae.metrics import confusion, linear_probe, macro_f1


def only_padded(real):
    """The padding mask (B, L), or None if the batch has no padding: the model is then faster."""
    return None if bool(real.all()) else real


def bridge(image: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Image (C, L) whose hidden columns (L,) are replaced by straight lines between the visible ones; 0 if
    none is."""
    seen, time = np.flatnonzero(~hidden), np.arange(len(hidden))
    if not len(seen):
        return np.zeros_like(image)
    return np.stack([np.interp(time, seen, row[seen]) for row in image]).astype(image.dtype)


def trivial_losses(model, out: dict, real) -> dict:
    """Losses of two trivial predictors on the same hidden patches: {"spec_mean", "spec_line", "time_mean",
    "time_line"}.

    mean: predicts 0, the mean of what is normalised. line: straight lines in time between the visible patches
    of the same scales; for the signal, between the columns of which anything is visible. out: as
    `forward_losses` returns it.
    """
    imgs, signal, mask = out["imgs"].float(), out["signal"].float(), out["mask"]
    (height, width), rows = model.grid_size, model.patch_size_freq
    grid = mask.bool().reshape(-1, height, width)
    hidden = grid.repeat_interleave(model.patch_size_time, 2).cpu().numpy()  # (B, H, L)
    lines, straight = imgs.cpu().numpy().copy(), signal.cpu().numpy().copy()
    for i in range(len(lines)):
        for h in range(height):
            band = lines[i, :, h * rows : (h + 1) * rows]
            bridged = bridge(band.reshape(-1, band.shape[-1]), hidden[i, h])
            lines[i, :, h * rows : (h + 1) * rows] = bridged.reshape(band.shape)
        straight[i] = bridge(straight[i][None], hidden[i].all(0))[0]
    lines, straight = torch.from_numpy(lines).to(imgs), torch.from_numpy(straight).to(signal)
    return {
        "spec_mean": model.forward_loss_spec(imgs, model.patchify(torch.zeros_like(imgs)), mask, real),
        "spec_line": model.forward_loss_spec(imgs, model.patchify(lines), mask, real),
        "time_mean": model.forward_loss_time(signal, torch.zeros_like(signal), mask, real),
        "time_line": model.forward_loss_time(signal, straight, mask, real),
    }


@torch.no_grad()
def validate(model, loader, device) -> tuple[dict, dict]:
    """Mean losses over the windows of `loader`, with the trivial predictors' beside them; and the first
    batch."""
    model.eval()
    sums, count, first = {}, 0, None
    for batch in loader:
        real = only_padded(batch["real"])
        real = None if real is None else real.to(device)
        out = model(batch["x"].to(device), batch["noise"].to(device), real, details=True)
        losses = {"spec": out["loss_spec"], "time": out["loss_time"], **trivial_losses(model, out, real)}
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + float(value) * len(batch["x"])
        count += len(batch["x"])
        first = first or batch
    model.train()
    return {name: value / count for name, value in sums.items()}, first


@torch.no_grad()
def probe_features(model, dataset, device) -> np.ndarray:
    """Mean and standard deviation of the frozen encoder's patch tokens, class token left out: (windows, 2
    D)."""
    model.eval()
    rows = []
    for batch in DataLoader(dataset, 256, generator=torch.Generator()):
        real = only_padded(batch["real"])
        imgs, signal, real = model.images(batch["x"].to(device), None if real is None else real.to(device))
        tokens = model.forward_encoder(imgs, signal, model.real_patches(real))[:, 1:].float()
        rows.append(torch.cat([tokens.mean(1), tokens.std(1)], 1).cpu().numpy())
    model.train()
    return np.concatenate(rows)


@dataclass
class Probe:
    """Labelled windows of training records for a linear probe: fitted to `fitted`, scored on `scored`, other
    subjects."""

    fitted: DownstreamClassificationDataset
    scored: DownstreamClassificationDataset


def make_probe(store, parts, task_name: str, signal_len: int, seed: int, at_most: int = 1500) -> Probe:
    """A probe on at most `at_most` windows of the training records; a third of their subjects is for its
    score."""
    task = training_part(load_task(store, task_name, signal_len, skip_bad=True), parts)
    scored = fold_of(store, task, 3) == 0
    chosen = np.random.default_rng(seed).permutation(len(task.items))[:at_most]
    task = task.select(np.sort(chosen))
    held_out = scored[task.items["record"]]
    return Probe(
        DownstreamClassificationDataset(store, task.select(~held_out), signal_len),
        DownstreamClassificationDataset(store, task.select(held_out), signal_len),
    )


def probe_score(model, probe: Probe, device) -> float:
    """Macro-F1 of a logistic regression on frozen features, on subjects that it was not fitted to."""
    fitted_to, truth = probe.fitted.task.items["label"], probe.scored.task.items["label"]
    found = np.zeros((len(truth), len(probe.scored.task.classes)))
    x = [probe_features(model, part, device) for part in (probe.fitted, probe.scored)]
    found[:, np.unique(fitted_to)] = linear_probe(x[0], fitted_to, x[1])
    return macro_f1(confusion(truth, found.argmax(1), found.shape[1]))
