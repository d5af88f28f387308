"""Write a model as one file for other programs: ONNX, or an exported PyTorch program.

    python cwt_mae/export.py --model runs/cwt_mae/beat/model.safetensors --export onnx --out beat.onnx
    python cwt_mae/export.py --model runs/cwt_mae/base/model.safetensors --export torch --out encoder.pt2

A classifier gives logits (batch, classes), a pre-trained model the tokens (batch, patches, width) of its
encoder. The input is x (batch, signal_len) float32, or (batch, leads, signal_len): whole windows, prepared as
in training (the sampling rate, the filter and the leads stand in the file's properties and are printed). The
wavelet transform is inside, as one convolution. What was written is read back and compared with the model
before the command says that it is done. ONNX needs the packages onnx, onnxscript and onnxruntime.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import torch

from common.arguments import Parser, number
from common.checkpoint import atomic_path
from common.errors import UserError, run
from cwt_mae.model_finetune import TF_MAE_Classifier, load_model
from cwt_mae.readers import extra
from cwt_mae.wavelet import plain_operations

LARGEST = 1e-4  # difference from the model, in parts of the largest output


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--model", required=True, help="model.safetensors of train.py or finetune.py")
    parser.add_argument("--export", choices=("onnx", "torch"), required=True, help="format to write")
    parser.add_argument("--out", type=Path, required=True, help="file to write: .onnx or .pt2")
    parser.add_argument("--batch-size", type=number(int, 1), default=1, help="windows of each call, fixed")
    return parser.parse_args(argv)


class Encoder(torch.nn.Module):
    """The encoder of a pre-trained model alone: x -> tokens of all patches."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.patch_tokens(x)[0]


def export(model, kind: str, path: Path, batch: int) -> float:
    """Write `model` and read it back; returns the largest difference in parts of the largest output.
    UserError, and nothing is written, where it is too large."""
    encoder = getattr(model, "encoder_model", model)
    wrapped = (model if isinstance(model, TF_MAE_Classifier) else Encoder(model)).eval()
    shape = (batch, encoder.signal_len) if encoder.leads == 1 else (batch, encoder.leads, encoder.signal_len)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).cumsum(-1) / 10
    with torch.no_grad():
        wanted = wrapped(x)
        with atomic_path(path) as temporary, plain_operations():
            if kind == "torch":
                about = {"config": json.dumps(encoder.config)}
                torch.export.save(torch.export.export(wrapped, (x,)), temporary, extra_files=about)
                found = torch.export.load(temporary).module()(x)
            else:
                found = to_onnx(wrapped, x, temporary, path, encoder.config)
            difference = float((found - wanted).abs().max() / wanted.abs().max())
            if not difference <= LARGEST:
                raise UserError(
                    f"{path}: differs from the model by {difference:.1e} of its peak; not written"
                )
    return difference


def to_onnx(wrapped, x, temporary: Path, path: Path, config: dict):
    """Write an ONNX file with the configuration in its properties; returns what onnxruntime computes."""
    onnx, runtime = extra("onnx", path), extra("onnxruntime", path)
    extra("onnxscript", path)
    program = torch.onnx.export(
        wrapped, (x,), input_names=["x"], output_names=["out"], dynamo=True, verbose=False
    )
    model = program.model_proto
    entry = model.metadata_props.add()
    entry.key, entry.value = "config", json.dumps(config)
    onnx.checker.check_model(model)
    Path(temporary).write_bytes(model.SerializeToString())
    session = runtime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def main(args):
    suffix = {"onnx": ".onnx", "torch": ".pt2"}[args.export]
    if args.out.suffix != suffix:
        raise UserError(f"--out {args.out}: expected a name that ends with {suffix}")
    model = load_model(args.model)
    if isinstance(model, TF_MAE_Classifier) and (model.num_features or model.compare):
        raise UserError(
            f"{args.model}: its head also reads the rhythm or the record's median beat; export a classifier "
            "that was fine-tuned with --no-features and without --compare"
        )
    difference = export(model, args.export, args.out, args.batch_size)
    encoder = getattr(model, "encoder_model", model)
    config, leads = encoder.config, f"{encoder.leads} leads x " if encoder.leads > 1 else ""
    print(
        f"{args.out}: x {args.batch_size} x {leads}{config['signal_len']} samples, prepared as "
        f"{json.dumps(config['preprocess'])}; read back, differs by {difference:.1e} of the largest output"
    )


if __name__ == "__main__":
    run(main, parse_args())
