"""What train.py measures beside its loss: validation losses, what trivial predictors reach, and a linear
probe."""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import numpy as np
import torch
from torch.utils.data import DataLoader

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

    mean: predicts 0, the mean of what is normalised. line: see `line_predictions`. out: as `forward_losses`
    returns it.
    """
    imgs, signal, mask = out["imgs"].float(), out["signal"].float(), out["mask"]
    real = real.flatten(0, 1) if real is not None and real.ndim == 3 else real
    lines, straight = line_predictions(model, imgs, mask, real)
    return {
        "spec_mean": model.forward_loss_spec(imgs, model.patchify(torch.zeros_like(imgs)), mask, real),
        "spec_line": model.forward_loss_spec(imgs, model.patchify(lines), mask, real),
        "time_mean": model.forward_loss_time(signal, torch.zeros_like(signal), mask, real),
        "time_line": model.forward_loss_time(signal, straight, mask, real),
    }


def line_predictions(model, imgs, mask, real=None):
    """(images (B, 3, S, L), signal (B, L)) guessed from the visible patches alone, which is what the model
    reads.

    Images: straight lines in time between the visible patches of the same scales. Signal: the sum of the rows
    of these images that rebuilds a random walk best (`rebuilding_weights`), less its mean and over its
    deviation, as the target is.
    """
    (height, width), rows = model.grid_size, model.patch_size_freq
    grid = mask.bool().reshape(-1, height, width)
    hidden = grid.repeat_interleave(model.patch_size_time, 2).cpu().numpy()  # (B, H, L)
    lines = imgs.float().cpu().numpy().copy()
    for i in range(len(lines)):
        for h in range(height):
            band = lines[i, :, h * rows : (h + 1) * rows]
            bridged = bridge(band.reshape(-1, band.shape[-1]), hidden[i, h])
            lines[i, :, h * rows : (h + 1) * rows] = bridged.reshape(band.shape)
    lines = torch.from_numpy(lines).to(imgs.device)
    straight = torch.einsum("bcsl,cs->bl", lines, rebuilding_weights(model).to(lines))
    weights = torch.ones_like(straight) if real is None else real.to(straight)
    count = weights.sum(1, keepdim=True).clamp(min=2)  # a missing lead has none
    straight = (straight - (straight * weights).sum(1, keepdim=True) / count) * weights
    return lines, straight / (straight.square().sum(1, keepdim=True) / (count - 1)).clamp(min=1e-10).sqrt()


@torch.no_grad()
def rebuilding_weights(model) -> torch.Tensor:
    """Weights (3, S) with which the rows of whole images give the signal back, by least squares on random
    walks drawn from a fixed seed."""
    if not hasattr(model, "_rebuilding"):
        noise = torch.randn(8, model.signal_len, generator=torch.Generator().manual_seed(0))
        device = model.pos_embed.device
        walk = (noise.cumsum(1) + noise).to(device)
        imgs, signal, _ = model.images(
            walk if model.leads == 1 else walk[:, None].expand(-1, model.leads, -1)
        )
        table = imgs.double().permute(0, 3, 1, 2).flatten(0, 1).flatten(1).cpu()  # (B * L, 3 S)
        square = table.T @ table
        square += 1e-6 * square.diagonal().mean() * torch.eye(len(square), dtype=square.dtype)
        found = torch.linalg.solve(square, table.T @ signal.double().flatten().cpu())
        model._rebuilding = found.view(3, -1).float()
    return model._rebuilding


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
    """Mean and standard deviation of the frozen encoder's patch tokens, without those of padding and without
    the class token: (windows, 2 D)."""
    model.eval()
    rows = []
    for batch in DataLoader(dataset, min(256, model.windows_at_once()), generator=torch.Generator()):
        real = only_padded(batch["real"])
        tokens, there = model.patch_tokens(batch["x"].to(device), None if real is None else real.to(device))
        tokens = tokens.float()
        mean, spread = tokens.mean(1), tokens.std(1)
        if there is not None:
            there, count = there[..., None], there.sum(1, keepdim=True)
            mean = (tokens * there).sum(1) / count
            squares = ((tokens - mean[:, None]) * there).square().sum(1)
            spread = (squares / (count - 1).clamp(min=1)).sqrt()
        rows.append(torch.cat([mean, spread], 1).cpu().numpy())
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
