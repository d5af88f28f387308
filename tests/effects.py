"""Flag-effect tests: every option of a script does what it is for, or is refused.

A room's test names, for each option of its train script, another value and what must differ from the base
run:

    from tests.effects import RUN_BASE, RUN_FLAGS, Effect, check_effects

    def test_every_option_of_train_has_its_effect(world, tmp_path):
        check_effects(
            em_mllm.train,
            [*RUN_BASE, "--task-dir", world.folder / "data/train", "--llm-model-path", world.folder / "llm"],
            {
                **RUN_FLAGS,                                          # the shared run flags; see there
                "--eval-every": Effect(1, "refused"),                 # this base has no validation data
                "--noise-db": Effect([0, 5], "weights"),              # two values after one option
                "--roll": Effect(True, "weights"),                    # a switch; False gives --no-roll
                "--lora-r": [                                         # in another mode, and in this one
                    Effect(4, "shape", given=["--use-lora"]),         # base and variant both have --use-lora
                    Effect(4, "refused"),                             # without adapters it has no effect
                ],
                "--skip-bad": Effect(True, ("text", "same weights")), # several things at once
                "--task-dir": "the data itself: tests/test_em_mllm_data.py",  # a reason instead of an effect
            },
            tmp_path,
        )

What may differ: "weights" (values), "shape" (names or shapes of weights), "files" (names), "predictions"
(content of .csv, .json and .jsonl files but config and log), "log" (log.jsonl without speeds), "text" (what
is printed, without times). "same weights" means equal to the bit; "refused" exit status 2 and one line that
names the option. Instead of a word: a function (base, variant) that returns what is wrong, or "". An option
of the parser that is in no table fails the test, so does a table's entry that the parser does not know.

The base runs twice, because a difference says nothing where two equal runs differ. Each run is a fork of
tests/forked.py's server: it costs what its steps cost. In it nothing is synced to disk, pictures are written
but not drawn, --compile compiles nothing but says "compiled", and each loader says how many workers it has,
which "text" sees.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import MagicMock, patch

import matplotlib.pyplot as plt
import numpy as np
import torch

from common.weights import read_weights
from tests import forked


@dataclass
class Effect:
    """value: of the option; True and False for switches, a list for several values. differs: a word, a
    function, or a tuple of these.

    given: options that base and variant have in addition. over: the variant runs in a copy of the base's
    run folder. alone: options that only the variant has in addition.
    """

    value: object
    differs: object
    given: tuple = ()
    over: bool = False
    alone: tuple = ()


@dataclass
class Trial:
    """What one run left."""

    folder: Path
    code: int
    text: str

    def weights(self) -> dict:
        """{file/key: tensor} of the results; of the last checkpoint where a run leaves no other weights."""
        found = [
            p
            for p in sorted(self.folder.rglob("*"))
            if p.suffix in (".safetensors", ".pth") or p.name == "pytorch_model.bin"
        ]
        results = [p for p in found if "checkpoints" not in p.relative_to(self.folder).parts]
        last = [p for p in found if p.parent == (self.folder / "last").resolve()]
        return {
            f"{p.name if p in last else p.relative_to(self.folder)}/{key}": value
            for p in results or last
            for key, value in read_weights(p).items()
        }

    def shape(self) -> dict:
        return {key: tuple(value.shape) for key, value in self.weights().items()}

    def files(self) -> list:
        """Names below the run folder; TensorBoard's hold the time."""
        names = [p.relative_to(self.folder) for p in self.folder.rglob("*") if not p.is_dir()]
        return sorted(str(n) for n in names if n.parts[0] not in ("tb", "run.lock"))

    def predictions(self) -> dict:
        names = [n for n in self.files() if Path(n).suffix in (".csv", ".json", ".jsonl")]
        times = ("config.json", "log.jsonl", "state.json", "timing.json")
        kept = [n for n in names if Path(n).name not in times]
        return {n: (self.folder / n).read_text().replace(str(self.folder), "") for n in kept}

    def log(self) -> list:
        path = self.folder / "log.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        return [{k: v for k, v in line.items() if not k.endswith(("_per_s", "seconds"))} for line in lines]

    def printed(self) -> str:
        text = self.text.replace(str(self.folder), "OUT")
        return re.sub(
            r"\w+_per_s \S+|\b\d+(\.\d+)? (s|seconds|MB)\b|\d+:\d+(:\d+)?|[\d.]+ ?(s/it|it/s)", "", text
        )


def equal(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(
        a.shape == two[k].shape and torch.equal(a, two[k]) for k, a in one.items()
    )


def missed(base: Trial, variant: Trial, what, names) -> str:
    """What is wrong with a variant of which `what` is expected, or "". names: the option's own names."""
    if what == "refused":
        lines = [line for line in variant.text.splitlines() if line.startswith("error: ")]
        named = lines and any(re.search(rf"{re.escape(n)}(?![\w-])", lines[0]) for n in names)
        if variant.code != 2 or len(lines) != 1 or "Traceback" in variant.text:
            return f"not refused: status {variant.code}: {variant.text.strip()[-300:]}"
        return "" if named else f"refused, but {lines[0]!r} does not name it"
    if variant.code != 0:
        return f"status {variant.code}: {variant.text.strip()[-300:]}"
    if callable(what):
        return what(base, variant)
    if what == "same weights":
        if not base.weights():
            return "the base run leaves no weights"
        return "" if equal(base.weights(), variant.weights()) else "the weights differ"
    if what == "weights":
        one, two = base.weights(), variant.weights()
        both = [k for k in one if k in two and one[k].shape == two[k].shape]
        if not both:
            return 'no weights of equal name and shape in both runs; is "shape" meant?'
        return "" if any(not torch.equal(one[k], two[k]) for k in both) else "the weights are the same"
    look = {
        "shape": Trial.shape,
        "files": Trial.files,
        "predictions": Trial.predictions,
        "log": Trial.log,
        "text": Trial.printed,
    }[what]
    return "" if look(base) != look(variant) else f"{what}: nothing differs"


def resumed(base: Trial, variant: Trial) -> str:
    """For --resume over a base's run with more steps: the log goes on from where it was."""
    one, two = base.log(), variant.log()
    goes_on = [line["step"] for line in two if line["step"] > one[-1]["step"]]
    if "resumed from" not in variant.text or two[: len(one)] != one or not goes_on:
        return f"not resumed: {variant.text.strip()[-300:]}"
    return ""


def quiet(base: Trial, variant: Trial) -> str:
    """For the options of QUIET, which change no weight and leave a trace each: those that left none."""

    def traces(trial):
        return {
            "--workers": "loader with 1 workers" in trial.text,
            "--compile": "compiled" in trial.text,
            "--log-every": [line["step"] for line in trial.log() if "lr" in line] == [1, 3],
            "--save-every": any("step-00000002" in name for name in trial.files()),
            "--profile": any("profile" in name for name in trial.files()),
        }

    before, after = traces(base), traces(variant)
    return ", ".join(f"{name} leaves no trace" for name in after if before[name] or not after[name])


def bfloat16_works() -> bool:
    """False where ATEN_CPU_CAPABILITY forbids AVX-512 to a processor that has it: attention in bfloat16
    asks the processor alone, and then refuses to pack."""
    return not torch.cpu._is_avx512_supported() or "AVX512" in torch.backends.cpu.get_cpu_capability()


# What the base of RUN_FLAGS needs; a script's own options stand after it and win.
RUN_BASE = (
    "--max-steps 3 --batch-size 2 --accum 1 --warmup 0 --weight-decay 0 "
    "--log-every 1 --save-every 0 --keep 3 --seed 0"
).split()
QUIET = ("--compile", "--log-every", 3, "--save-every", 2, "--profile", "1:2")
RUN_FLAGS = {
    "--out": "the folder whose content is compared",
    "--lr": Effect(3e-3, "weights"),
    "--batch-size": Effect(3, "weights"),
    "--accum": Effect(2, "weights"),
    "--epochs": [
        Effect(2, "refused"),  # beside --max-steps
        Effect(1, "weights", given=("--max-steps", 0, "--epochs", 0.01)),
    ],
    "--max-steps": Effect(2, ("weights", "log")),
    "--warmup": Effect(2, "weights"),
    "--weight-decay": Effect(0.5, "weights"),
    "--clip": Effect(1e-3, "weights"),
    "--precision": Effect("bf16", "weights") if bfloat16_works() else "torch cannot do it here",
    "--workers": Effect(1, (quiet, "same weights"), alone=QUIET),
    **{name: "see --workers" for name in QUIET if str(name).startswith("--")},
    "--seed": Effect(1, "weights"),
    "--dry-run": Effect(True, ("files", "text")),
    "--keep": Effect(1, ("files", "same weights"), given=("--save-every", 1)),
    "--eval-every": Effect(1, ("log", "same weights")),  # needs validation data
    "--resume": [Effect(True, resumed, over=True, alone=("--max-steps", 4)), Effect(True, "refused")],
    "--overwrite": Effect(True, "same weights", over=True),
    "--log-with": "needs a tracker: tests/test_common_train.py",
}


def subplots(rows=1, columns=1, squeeze=True, **options):
    """What plt.subplots returns, drawing nothing; savefig leaves an empty file."""
    axes = np.empty((rows, columns), dtype=object)
    for place in np.ndindex(rows, columns):
        axes[place] = MagicMock()
    figure = MagicMock(savefig=lambda path, **options: Path(path).touch())
    return figure, axes.squeeze()[()] if squeeze else axes


def watch():
    """In the fork: what is slow and changes no number is left out, what leaves no trace is printed."""
    os.fsync = lambda fd: None
    plt.subplots, plt.close = subplots, lambda figure: None
    plain = torch.utils.data.DataLoader.__init__

    def loader(self, *arguments, **options):
        plain(self, *arguments, **options)
        print(f"loader with {self.num_workers} workers")

    def compiled(model=None, *arguments, **options):
        print("compiled")
        return model

    torch.utils.data.DataLoader.__init__ = loader
    torch.nn.Module.compile = torch.compile = compiled


def parser_of(script) -> argparse.ArgumentParser:
    """The parser that `script.parse_args` builds, caught before it parses."""
    if hasattr(script, "make_parser"):
        return script.make_parser()
    found = []

    def catch(parser, *arguments, **options):
        found.append(parser)
        raise SystemExit

    with patch.object(argparse.ArgumentParser, "parse_args", catch), contextlib.suppress(SystemExit):
        script.parse_args()
    assert found, f"{script.__name__}.parse_args makes no parser"
    return found[0]


def words(names, value) -> list:
    """An option and its value as they stand on a command line. names: the option's."""
    if value is True:
        return [names[0]]
    if value is False:
        return [next(n for n in names if n.startswith("--no-"))]
    return [names[0], *(value if isinstance(value, (list, tuple)) else [value])]


def check_effects(script, base, table, folder, out="--out"):
    """Run `script` with the options `base` and once more for every effect of `table`; fail with one line
    for each that is missed.

    script: imported module with main and parse_args. table: {option: Effect, a list of them, or the reason
    why there is none}. folder: empty, for the runs. out: the option that names the run folder.
    """
    actions = [a for a in parser_of(script)._actions if not isinstance(a, argparse._HelpAction)]
    names = {tuple(a.option_strings) or (a.dest,) for a in actions}
    wrong = [f"{n[0]} is in no table" for n in names if not set(n) & table.keys()]
    known = {name for n in names for name in n}
    wrong += [f"{name}: the script has no such option" for name in table if name not in known]
    bases, count = {}, 0

    def trial(options, place=None) -> Trial:
        nonlocal count
        place, count = place or folder / f"run-{count}", count + 1
        done = forked.call(script, [*base, *options, out, place], folder / "log.txt", before=watch)
        return Trial(place, done.returncode, done.text)

    def base_of(given) -> Trial:
        if given not in bases:
            bases[given] = trial(given)
            assert bases[given].code == 0, f"the base with {given} fails:\n{bases[given].text[-3000:]}"
        return bases[given]

    again = trial(())
    for what in ("weights", "files", "predictions", "log", "text"):
        if not missed(base_of(()), again, what, ()):
            wrong.append(f"two equal runs differ in {what}; no effect can be seen there")

    for name, effects in table.items():
        own = next((n for n in names if name in n), None)
        if own is None or isinstance(effects, str):
            continue
        for effect in effects if isinstance(effects, list) else [effects]:
            before, place = base_of(tuple(effect.given)), folder / "variant"
            if effect.over:
                shutil.copytree(before.folder, place, symlinks=True)
            option = words((name, *own), effect.value)
            variant = trial([*effect.given, *effect.alone, *option], place)
            kinds = effect.differs if isinstance(effect.differs, tuple) else (effect.differs,)
            for what in kinds:
                if problem := missed(before, variant, what, own):
                    wrong.append(f"{' '.join(map(str, option))}: {problem}")
            shutil.rmtree(place, ignore_errors=True)
    assert not wrong, f"{script.__name__}: {len(wrong)} of {len(table)} options\n" + "\n".join(wrong)
