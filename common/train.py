"""What every training loop is made of. A train script reads top to bottom and calls these functions in its
loop:

    run = start(accelerator, args, steps, optimizers)
    for batch, share in batches(run, loader, count=lambda batch: (batch["labels"] != -100).sum()):
        with accelerator.accumulate(model):
            loss = model(**batch).loss * share
            check_finite(run, batch["name"], loss=loss)
            accelerator.backward(loss)
            grad = update(run, model, optimizers, lr_at(run.state["step"], steps, args.warmup))
        if accelerator.sync_gradients:
            finish_step(run, grad=grad)
    finish(run)

Accumulating k batches equals one batch k times as large, and P processes equal one. A checkpoint is never
written before all losses up to it, and the weights, were seen to be finite. On a CPU that is looked at before
the weights change; on a GPU the losses stay there and are looked at where the loop waits for the device
anyway: at a log line, an evaluation or a save.
"""

import itertools
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DistributedType, GradientAccumulationPlugin
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from common.arguments import refuse
from common.checkpoint import find_resume, load_step, save_step
from common.errors import UserError
from common.memory import LiveBytes, lines_of, table_of
from common.run import Log, StopSignal, describe, keep_config, loader_worker, seed_everything
from common.sharding import average_whole_gradients, deepspeed_step, settle
from common.together import from_all


def make_accelerator(args, **options) -> Accelerator:
    """Accelerator for --precision, --accum and --seed; `options` go to it as they are."""
    # the seedable sampler shuffles by (seed, epoch), so that a resumed run sees the same order;
    # sync_with_dataloader would make a smaller step of the batches that are left at an epoch's end
    accelerator = Accelerator(
        mixed_precision=args.precision,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=args.accum, sync_with_dataloader=False
        ),
        log_with=args.log_with,
        project_dir=args.out,
        **options,
    )
    settle(accelerator, args.clip, args.accum)
    return accelerator


def make_loader(dataset, args, train: bool = True, **options) -> DataLoader:
    """Loader with --batch-size and --workers. train: shuffled (unless `options` say otherwise), the
    incomplete batch dropped.

    The loader's own generator is half of an exact resume, accelerate's seedable sampler the other half.
    """
    if train:
        options = {"shuffle": True, "drop_last": True, **options}
    return DataLoader(
        dataset,
        args.batch_size,
        num_workers=args.workers,
        worker_init_fn=loader_worker,
        generator=torch.Generator(),
        **options,
    )


def parameter_groups(model, lr: float, weight_decay: float, plain=("embed", "token")) -> list[dict]:
    """AdamW groups of all trained tensors: matrices decay; vectors, and names that hold a word of `plain`, do
    not.

    Each group carries its peak learning rate as "peak", which `update` multiplies.
    """
    # decay is for matrices: it would pull the scales of norms to zero, and rows of tables that no batch uses
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            keep = parameter.ndim < 2 or any(word in name for word in plain)
            (free if keep else decayed).append(parameter)

    groups = [(decayed, weight_decay), (free, 0.0)]
    return [{"params": some, "weight_decay": decay, "lr": lr, "peak": lr} for some, decay in groups if some]


def plan_steps(args, loader) -> int:
    """Optimizer steps of the run: --max-steps, or --epochs over `loader` (prepared: its length is per
    process)."""
    per_epoch = len(loader) // args.accum
    if per_epoch < 1:
        raise UserError(
            f"{len(loader.dataset)} training samples make {len(loader)} batches of --batch-size "
            f"{args.batch_size} per process, fewer than one optimizer step of --accum {args.accum}; lower "
            "one of them or give more data"
        )

    # what stands on the command line wins over a script's own default of the other
    by_epochs = not args.max_steps or "epochs" in args._given and "max_steps" not in args._given
    if by_epochs and not args.epochs:
        raise UserError("neither --max-steps nor --epochs asks for a step; give one of them")
    if by_epochs:
        return max(1, round(args.epochs * per_epoch))
    refuse(args, ["epochs"], "beside --max-steps")
    return args.max_steps


def lr_at(step, steps, warmup, schedule="cosine", floor=0.0, ramp="next", first=1e-5) -> float:
    """Factor on the peak learning rate at optimizer step `step` (from 0) of `steps`.

    warmup: below 1 a fraction of all steps, from 1 on a number of steps W. schedule: what follows, "cosine"
    or "linear" to `floor`, or "constant". ramp: how the W steps rise: "next" is (step + 1) / W; "zero" is
    step / W, so that step 0 changes nothing (cwt_mae's upstream); "mmengine" goes from `first` to 1 at step W
    - 1 (F-LMM's upstream).
    """
    rise = round(warmup * steps) if warmup < 1 else int(warmup)
    if step < rise:
        if ramp == "mmengine":
            return first + (1 - first) * step / max(1, rise - 1)
        return (step + (ramp == "next")) / rise

    # behind the warm-up: `done` goes from 0 to nearly 1 at the last step
    if schedule == "constant":
        return 1.0
    done = min(1.0, (step - rise) / max(1, steps - rise))
    return floor + (1 - floor) * (0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done)


@dataclass
class Run:
    """What one training run carries from step to step. state is saved with every checkpoint; scripts may add
    to it."""

    accelerator: Accelerator
    args: object
    steps: int
    optimizers: list
    state: dict
    log: Log
    stop: StopSignal
    evaluate: object = None  # function of no arguments that returns the scores of an evaluation
    sums: dict = field(default_factory=dict)  # of this step's micro-batches, on the device
    names: list = field(default_factory=list)  # of this step's samples, one iterable for each micro-batch
    unread: list = field(default_factory=list)  # (step, what, names, value): not yet known to be finite
    samples: int = 0  # since the last log line, on this process
    clock: float = field(default_factory=time.monotonic)
    profiler: object = None
    live: LiveBytes | None = None  # of --dry-run

    @property
    def last(self) -> bool:
        """Whether the step just made was the last one."""
        return self.state["step"] >= self.steps


def start(accelerator, args, steps: int, optimizers, evaluate=None, **state) -> Run:
    """Begin a run in --out, or go on with it under --resume. Call it after `open_run` and `prepare`.

    optimizers: the prepared ones; their settings are those of the command line, also after a resume.
    evaluate: function without arguments that returns the scores of an evaluation; `finish_step` calls it
    where --eval-every says so. state: further counters that checkpoints keep, with their first values.
    """
    run_state = {"step": 0, "epoch": 0, "batch": 0, **state}
    # a dry run ends with its first backward pass: nothing to resume, to evaluate or to write
    if getattr(args, "dry_run", False):
        run_state.pop("owes_evaluation", None)
        return Run(accelerator, args, steps, optimizers, run_state, None, None)

    # loading brings the rates, peaks and decays of before; those of this command line are to count
    found = None
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    settings = [{name: value for name, value in group.items() if name != "params"} for group in groups]
    if getattr(args, "resume", False):
        found = find_resume(args.out, accelerator)
        if found is None:
            accelerator.print(f"{args.out} holds no whole checkpoint yet: starting at step 0")
        else:
            run_state.update(load_step(accelerator, found))
            accelerator.print(f"resumed from {found}")
            _tell_missing_random_states(accelerator, found, args.seed, run_state["step"])
        # the groups are other dictionaries after loading
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group, own in zip(groups, settings):
            group.update(own)

    # the weights are there, equal on all processes: what is drawn from here on is dropout, for other samples
    # on each; a checkpoint brings the states of each process
    if found is None and accelerator.process_index:
        seed_everything(args.seed, accelerator.process_index)

    # from here on the run is this command's: the checkpoint was seen to fit
    if accelerator.is_main_process:
        keep_config(args.out)
    _go_on_by_samples(accelerator, args, run_state)
    accelerator.step = 0  # accumulation starts anew, also where --accum is another than before

    log, stop = Log(args.out, accelerator, steps, run_state["step"]), StopSignal(accelerator)
    run = Run(accelerator, args, steps, optimizers, run_state, log, stop, evaluate)
    if args.profile and args.profile[0] >= steps:
        raise UserError(f"--profile {args.profile[0]}:{args.profile[1]}: the last step is {steps - 1}")
    # where all steps are made and saved already, a signal has nothing to wait for
    if run.last:
        stop.at_once = str(Path(args.out) / "last")
    return run


def _tell_missing_random_states(accelerator, found: Path, seed: int, step: int):
    """Seed the processes that the checkpoint has no random states for, because there were fewer, and say
    so."""
    # the rank makes the draws of dropout differ, the step keeps them from those of the run's beginning
    missing = not (found / f"random_states_{accelerator.process_index}.pkl").is_file()
    if missing:
        seed_everything(seed + step, accelerator.process_index)
    ranks = [str(rank) for rank, lacks in enumerate(from_all(missing)) if lacks]
    if ranks:
        accelerator.print(
            f"{found} holds no random states of process {', '.join(ranks)}: seeded anew with --seed and step"
        )


def _go_on_by_samples(accelerator, args, state: dict):
    """Where the step is made of other batches than before: go on in the epoch behind the samples that were
    seen.

    All processes together take whole batches from the front of the epoch's order, so what was seen is a
    front of it, however it was dealt out.
    """
    # the three numbers that make a step; checkpoints keep them from here on
    now = {"batch_size": args.batch_size, "processes": accelerator.num_processes, "accum": args.accum}
    before = state.get("world", now)
    state["world"] = now
    if before == now:
        return

    def product(of):
        return f"{of['batch_size']} x {of['processes']} x {of['accum']} = {math.prod(of.values())}"

    # rounded down to whole steps: rather a few samples twice than some never
    seen = state["batch"] * before["batch_size"] * before["processes"]
    together = now["batch_size"] * now["processes"]
    state["batch"] = seen // (together * now["accum"]) * now["accum"]
    again = seen - state["batch"] * together
    accelerator.print(
        f"samples in a step: {product(before)} before, {product(now)} now (batch size x processes x accum); "
        f"{seen} samples of epoch {state['epoch']} were seen"
        + (f", {again} of them come again" if again else "")
    )


def batches(run: Run, loader, count=None):
    """Yield (batch, share) until the last step: epochs, from the resumed batch on, without the incomplete
    step at an epoch's end.

    count: function of a batch to the number of things its mean loss is over (tokens, patches; one number or a
    tensor of several); default: its samples. share: this batch's count over the mean count of all batches of
    the optimizer step on all processes, so that `mean loss * share` weighs every token of the step alike.
    """
    state, accum = run.state, run.args.accum

    if "owes_evaluation" in state:  # the run was stopped within it, and saved
        if scores := _scores(run):
            run.log.log(state["step"], **scores)
        if run.stop():
            run.stop.leave(Path(run.args.out) / "last")

    while not run.last:
        # a data set may plan another number of rows for each epoch, so it is told first and counted then
        _set_epoch(loader, state["epoch"])
        whole = len(loader) // accum * accum
        if not whole:
            raise UserError(
                f"the data make {len(loader)} batches per process, fewer than one step of --accum {accum}; "
                "lower it"
            )

        # what a resumed run has seen is skipped in the sampler, without being read
        ready = iter(run.accelerator.skip_first_batches(loader, state["batch"]))
        for _ in range(state["batch"], whole, accum):
            # the whole step: its counts are needed before its first backward
            window = list(itertools.islice(ready, accum))
            _profile(run)

            # --dry-run counts what is made from here to the end of the backward pass, in `update`; batch and
            # weights are there already
            if getattr(run.args, "dry_run", False):
                known = [part for part in tree_leaves(window) if isinstance(part, torch.Tensor)]
                known += [t for m in run.accelerator._models for t in (*m.parameters(), *m.buffers())]
                run.live = LiveBytes(known)
                run.live.__enter__()

            # counted before the loop's body: what it saves stands behind this batch
            for batch, share in zip(window, _shares(run, window, count or _samples)):
                state["batch"] += 1
                run.samples += _samples(batch)
                yield batch, share
            if run.last:
                _profile(run)
                return
        state["epoch"], state["batch"] = state["epoch"] + 1, 0


def _set_epoch(loader, epoch: int):
    """Tell the sampler and every data set of the chain (a Subset holds another) which epoch begins."""
    loader.set_epoch(epoch)
    dataset = loader.dataset
    while dataset is not None:
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(epoch)
        dataset = getattr(dataset, "dataset", None)


def _samples(batch) -> int:
    """Samples in a batch: its length, or that of its first entry where it is a dictionary."""
    return len(next(iter(batch.values())) if isinstance(batch, Mapping) else batch)


def _shares(run: Run, window, count):
    """The share of each batch of one optimizer step; see `batches`."""
    # `backward` divides by --accum and DDP by the processes, as if all batches held equally much; with the
    # factor count / mean count the result is sum(mean loss * count) / sum(count).
    # counts: (accum,), or (accum, n) where `count` returns n
    device = run.accelerator.device
    counts = torch.stack([torch.as_tensor(count(b), dtype=torch.float32, device=device) for b in window])
    mean = run.accelerator.reduce(counts.mean(0), "mean")
    # 0 of 0: nothing of this kind in the whole step
    return counts / mean.masked_fill(mean == 0, 1.0)


def _profile(run: Run):
    """Start and end the profiler of --profile A:B around its steps; the trace opens in chrome://tracing or
    Perfetto."""
    if run.profiler is not None and (run.last or run.state["step"] >= run.args.profile[1]):
        run.profiler.stop()
        path = Path(run.args.out) / f"profile-rank{run.accelerator.process_index}.json"
        run.profiler.export_chrome_trace(str(path))
        run.accelerator.print(
            f"profile of steps {run.args.profile[0]} to {run.args.profile[1] - 1} in {path}"
        )
        run.profiler, run.args.profile = None, None
    elif (
        run.args.profile
        and run.profiler is None
        and run.args.profile[0] <= run.state["step"] < run.args.profile[1]
    ):
        run.profiler = torch.profiler.profile()
        run.profiler.start()


def check_finite(run: Run, names, loss, **parts):
    """Take note of one batch's loss before its backward pass; on a CPU, refuse it at once if it is nan or
    inf.

    names: of the batch's samples, for the message. loss, parts: scalars, already multiplied by their share;
    their means over the whole step and all processes are logged under their names.
    """
    # sums stay on the device: reading one here would make the GPU wait at every batch
    for name, value in {"loss": loss, **parts}.items():
        run.sums[name] = run.sums.get(name, 0.0) + value.detach()
    run.names.append(names)
    run.unread.append((run.state["step"] + 1, "loss", names, loss.detach()))
    if run.accelerator.device.type == "cpu":
        look(run)


def look(run: Run):
    """Wait for the device and raise UserError on all processes if any loss or gradient noted since the last
    look was not finite."""
    noted, run.unread = run.unread, []
    if not noted:
        return

    # one number for all processes, so that they end together; who stops alone leaves the others waiting
    good = torch.stack([torch.isfinite(value) for *_, value in noted])
    if bool(run.accelerator.reduce((~good).sum().float(), "sum") == 0):
        return

    # the first that was bad, with its batch, from the first process that has one
    message = None
    if not bool(good.all()):
        step, what, names, value = noted[good.tolist().index(False)]
        names = [str(name) for name in names]
        files = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        message = f"{what} is {value.item()} at step {step}; batch: {files}"
    message = next(text for text in from_all(message) if text)

    # the way on; all processes look for it together
    found = find_resume(run.args.out, run.accelerator)
    way_out = f"; last good checkpoint: {found}" if found else "; no checkpoint was saved yet"
    _refuse(
        run,
        f"{message}{way_out}; look at these inputs or lower --lr, then "
        f"{'--resume' if found else '--overwrite'}",
    )


def _refuse(run: Run, message: str):
    """End all processes; the main one says why."""
    raise UserError(message) if run.accelerator.is_main_process else SystemExit(2)


def update(run: Run, model, optimizers, factor: float):
    """Make the optimizer step where the accumulation is complete, with every group's rate at its "peak" times
    `factor`.

    Returns the gradient's norm before clipping (None between two steps) and counts run.state["step"].
    """
    accelerator, norm = run.accelerator, None
    if run.live is not None:
        _print_memory(run, accelerator.unwrap_model(model))

    if accelerator.sync_gradients:
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak"] * factor

        # DeepSpeed clips by itself. Elsewhere --clip 0 becomes an infinite limit: the log wants the norm.
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            norm = deepspeed_step(accelerator)
        else:
            average_whole_gradients(accelerator)
            norm = accelerator.clip_grad_norm_(model.parameters(), run.args.clip or math.inf)
        if hasattr(norm, "full_tensor"):  # of sharded gradients
            norm = norm.full_tensor()

        # fp16's scaler leaves out steps with inf by itself.
        if norm is not None and accelerator.scaler is None:
            names = itertools.chain.from_iterable(run.names)
            run.unread.append((run.state["step"] + 1, "gradient norm", names, norm.detach()))
            if accelerator.device.type == "cpu":
                look(run)
        run.names = []
        run.state["step"] += 1

    # between two steps these are no-ops: accelerate's optimizers look at sync_gradients themselves
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return norm


def _print_memory(run: Run, model):
    """End a --dry-run after its first backward pass with the memory of a run."""
    run.live.__exit__(None, None, None)

    # from one process the columns of several GPUs are those of a machine with eight
    processes = run.accelerator.num_processes
    table = table_of(model, run.live.peak, processes if processes > 1 else 8)
    args = run.args
    run.accelerator.print(
        f"{describe(model)}; batch size {args.batch_size}, precision {args.precision}\n"
        + "\n".join(lines_of(table))
    )
    raise SystemExit(0)


class EvaluationStopped(Exception):
    """A stop signal came within an evaluation."""


def watched(run: Run, loader, together: bool = True):
    """Yield the batches of an evaluation's loader; a stop signal ends it there, by EvaluationStopped on all
    processes.

    together: the processes have equally many batches. If not, each looks at its own signal alone, and all
    meet at the end: one without batches passes an empty list.
    """
    # run.stop() meets the other processes, signum is this one's own
    for batch in loader:
        if run.stop() if together else run.stop.signum:
            break
        yield batch
    if run.stop():
        raise EvaluationStopped


def _scores(run: Run) -> dict:
    """Scores of the evaluation that is due after this step, or that a stop kept from being made; {} if none
    is."""
    # scripts evaluate the last step themselves, behind the loop
    every = getattr(run.args, "eval_every", 0)
    owed = run.state.pop("owes_evaluation", False)
    due = bool(every) and run.state["step"] % every == 0 and not run.last
    if run.evaluate is None or not (due or owed):
        return {}

    # No evaluation of weights that went wrong, which might be written as the best. A stop signal ends it, so
    # that the checkpoint is written in time; `batches` makes up for it after --resume.
    look(run)
    _look_at_weights(run)
    began = time.monotonic()
    try:
        return run.evaluate()
    except EvaluationStopped:
        run.state["owes_evaluation"] = True
        return {}
    finally:
        run.clock += time.monotonic() - began  # the samples a second are those of training


def finish_step(run: Run, grad=None, save: bool = False, **scores) -> Path | None:
    """Evaluate where it is due, log, save and stop after an optimizer step; returns the checkpoint if one was
    written.

    grad: what `update` returned. scores: further numbers of this step, logged in any case. save: write a
    checkpoint now. Raises Interrupted, after saving, when a stop signal has arrived.
    """
    accelerator, args, state = run.accelerator, run.args, run.state

    # the losses carry their shares, so the mean over batches, and later over processes, is that of the step
    means = {name: value / args.accum for name, value in run.sums.items()}
    run.sums = {}
    scores |= _scores(run)
    asked = run.stop()

    # a log line waits for the device in any case, so the losses are looked at here. The first step has one,
    # to see at once that the run goes.
    if state["step"] % args.log_every == 0 or state["step"] == 1 or run.last or scores:
        look(run)
        means = {name: accelerator.reduce(value, "mean") for name, value in means.items()}

        rate = run.samples * accelerator.num_processes / (time.monotonic() - run.clock)
        lr = run.optimizers[0].param_groups[0]["lr"]
        own = {} if grad is None else {"grad": grad}
        run.log.log(state["step"], **means, lr=lr, **own, samples_per_s=rate, **scores)
        run.samples, run.clock = 0, time.monotonic()

    # a checkpoint: by --save-every, at the end, and when somebody wants the run to stop
    due = bool(args.save_every) and state["step"] % args.save_every == 0
    if not (save or due or run.last or asked):
        return None
    look(run)
    _look_at_weights(run)

    saved = save_step(accelerator, args.out, state, args.keep)
    if run.last:
        run.stop.at_once = str(saved)
    if asked or run.stop():  # also where the signal came within the save, which may take minutes
        run.stop.leave(saved)
    return saved


def _look_at_weights(run: Run):
    """Refuse to save weights that are nan or inf: the last step's loss was finite, but its update may not
    have been. With fp16 they stay finite, because steps with bad gradients are left out: all of them, once
    the scale is below 1."""
    scale = run.accelerator.scaler.get_scale() if run.accelerator.scaler else 1
    if scale < 1:
        _refuse(run, f"fp16 gradients are not finite at the scale {scale:g} either; lower --lr or take bf16")

    # each process looks at the part of the weights that it holds
    flags = [torch.zeros((), device=run.accelerator.device)]
    for model in run.accelerator._models:
        for parameter in model.parameters():
            if parameter.requires_grad:
                local = getattr(parameter, "ds_tensor", parameter)  # this process's part under ZeRO 3
                local = local.to_local() if hasattr(local, "to_local") else local
                flags.append((~torch.isfinite(local.detach())).any().float().to(run.accelerator.device))

    if bool(run.accelerator.reduce(torch.stack(flags).sum(), "sum") > 0):
        found = find_resume(run.args.out, run.accelerator)
        last = f"last good checkpoint: {found}" if found else "no checkpoint was saved yet"
        _refuse(
            run,
            f"the weights are not finite after step {run.state['step']}; {last}; lower --lr and start again",
        )


def finish(run: Run, **scores):
    """End a run when its evaluation and its files are done: log `scores` at the last step and give the
    signals back."""
    if scores:
        run.log.log(run.state["step"], **scores)
    run.log.close()
    run.stop.restore()
