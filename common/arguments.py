"""The command line of every script: one parser, and one set of run flags with the same names everywhere."""

import argparse
import math
import sys
from pathlib import Path

from common.errors import UserError


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keep the paragraphs of the description and show every default that says something."""

    def _get_help_string(self, action):
        value = action.default  # 0 is a value that somebody asks for, although it equals False
        if value is None or value is False or value in ("", argparse.SUPPRESS) or value in ([], ()):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` with our help, one-line errors, and dashes and underscores as equals
    (`--save_steps`, `--save-steps`).

    The parsed namespace has one name more: `_given`, the set of destinations that stand on the command line,
    for `refuse`.
    """

    def __init__(self, description=None, **options):
        options = {"formatter_class": Help, "allow_abbrev": False, **options}
        super().__init__(description=description, **options)

    def parse_known_args(self, args=None, namespace=None):
        known = {name.replace("_", "-"): name for name in self._option_string_actions}
        words, given = [], set()
        for word in sys.argv[1:] if args is None else args:
            name, sign, value = word.partition("=")
            if name.startswith("-") and name.replace("_", "-") in known:
                name = known[name.replace("_", "-")]
                given.add(self._option_string_actions[name].dest)
                word = name + sign + value
            words.append(word)
        namespace, rest = super().parse_known_args(words, namespace)
        namespace._given = given | getattr(namespace, "_given", set())
        return namespace, rest

    def error(self, message):
        """One line on stderr and exit status 2."""
        self.exit(2, f"error: {message}; {self.prog} --help explains every option\n")


def number(kind=int, low=None, high=None):
    """`type=number(float, 0, 1)`: an int or float that must lie in [low, high]; None leaves an end open."""

    def convert(text):
        value = kind(text)
        if not -math.inf < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not finite")
        if low is not None and value < low or high is not None and value > high:
            ends = [f"at least {low}"] * (low is not None) + [f"at most {high}"] * (high is not None)
            raise argparse.ArgumentTypeError(f"{text} must be {' and '.join(ends)}")
        return value

    convert.__name__ = {int: "whole number", float: "number"}[kind]
    return convert


def refuse(args, names, why: str):
    """Raise UserError if one of the destinations `names` was given on the command line although it has no
    effect `why`.

    `refuse(args, ["eval_every"], "without --val")`: "--eval-every has no effect without --val; leave it out".
    """
    for name in names:
        if name in args._given:
            raise UserError(f"--{name.replace('_', '-')} has no effect {why}; leave it out")


# {destination: (upstream's name, default, type, help)} of the two groups of flags
OPTIMISATION = {
    "lr": ("learning-rate", 1e-4, number(float, 0), "peak learning rate"),
    "batch_size": ("per-device-train-batch-size", 1, number(int, 1), "samples per process and forward pass"),
    "accum": ("gradient-accumulation-steps", 1, number(int, 1), "batches accumulated in one optimizer step"),
    "epochs": ("num-train-epochs", 1.0, number(float, 0), "passes over the data, without --max-steps"),
    "max_steps": ("steps", 0, number(int, 0), "optimizer steps; 0: --epochs decides"),
    "warmup": ("warmup-steps", 0.05, number(float, 0), "steps of linear warm-up; below 1: fraction of all"),
    "weight_decay": ("", 0.01, number(float, 0), "weight decay of AdamW"),
    "clip": ("max-grad-norm", 1.0, number(float, 0), "largest norm of the gradient; 0: no clipping"),
}
RUN = {
    "workers": ("dataloader-num-workers", 0, number(int, 0), "loader processes for each training process"),
    "seed": ("", 0, number(int, 0, 2**32 - 1), "random seed of the weights, the order and every other draw"),
    "log_every": ("logging-steps", 20, number(int, 1), "optimizer steps between log lines"),
    "save_every": ("save-steps", 1000, number(int, 0), "optimizer steps between checkpoints; 0: at the end"),
    "keep": ("save-total-limit", 3, number(int, 1), "newest checkpoints to keep"),
    "eval_every": ("eval-steps", 0, number(int, 0), "optimizer steps between evaluations; 0: at the end"),
}


def add_run_arguments(parser, omit=(), **defaults):
    """Add the flags of every training script, in the groups "optimisation" and "run"; upstream's names are
    aliases.

    omit: destinations that this script has no use for. defaults: its own values, by destination, such as
    lr=1e-3.
    """
    unknown = {*defaults, *omit} - {*OPTIMISATION, *RUN, "out", "precision", "resume"}
    assert not unknown, f"no run flag is called {unknown}"
    groups = parser.add_argument_group("optimisation"), parser.add_argument_group("run")
    for group, flags in zip(groups, (OPTIMISATION, RUN)):
        for name, (other, value, kind, text) in flags.items():
            if name not in omit:
                names = [f"--{n}" for n in (name.replace("_", "-"), other) if n]
                value = defaults.get(name, value)
                group.add_argument(*names, dest=name, type=kind, default=value, help=text)
    _add_other_arguments(parser, *groups, omit, defaults)


def _add_other_arguments(parser, optim, run, omit, defaults):
    """The flags of `add_run_arguments` that are no numbers."""
    optim.add_argument(
        "--precision",
        "--mixed-precision",
        choices=("no", "bf16", "fp16"),
        default=defaults.get("precision", "no"),
        help="number format of the forward pass (autocast); no: float32",
    )
    run.add_argument(
        "--out",
        "--output-dir",
        type=Path,
        required="out" not in defaults,
        default=defaults.get("out"),
        help="run folder: configuration, log, checkpoints, results",
    )
    if "resume" not in omit:
        run.add_argument(
            "--resume",
            nargs="?",
            const=True,
            default=False,
            choices=("auto",),
            help="go on from the newest whole checkpoint in --out; with the word auto start a new run where "
            "there is none, so that first start and requeue are one command",
        )
    run.add_argument(
        "--overwrite", action="store_true", help="delete the run that --out holds and start again"
    )
    if "--dry-run" not in parser._option_string_actions:  # dia_pangu's own loads no weights
        run.add_argument(
            "--dry-run",
            action="store_true",
            help="make one forward and backward pass, print how much memory the run takes on each GPU, and "
            "write nothing",
        )
    run.add_argument(
        "--log-with",
        metavar="NAME",
        type=_tracker,
        help="send the log to an experiment tracker too, by accelerate's name for it: wandb, mlflow, trackio "
        "and others; log.jsonl and TensorBoard are written in any case",
    )
    run.add_argument("--compile", action="store_true", help="compile the model with torch.compile")
    run.add_argument(
        "--profile",
        metavar="A:B",
        type=_span,
        help="write a PyTorch profiler trace of the steps A to B - 1 to --out",
    )


def _tracker(name: str) -> str:
    # Seconds of import that a command line without this flag need not wait for.
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = sorted(set(LOGGER_TYPE_TO_CLASS) - {"tensorboard"})
    if name not in known:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
    if name not in map(str, get_available_trackers()):
        raise argparse.ArgumentTypeError(f"the package of {name} is not installed; bring it with pip install")
    return name


def _span(text: str) -> list[int]:
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not of the form A:B with whole numbers A < B, such as 10:13"
        )
    return [int(first), int(last)]
