"""Models spread over processes (FSDP2, DeepSpeed ZeRO), and whole again to be saved, merged or measured.

    model, optimizer, loader = prepare(accelerator, model, optimizer, loader)
    ...
    whole = export_model(accelerator, model)      # on all processes
    if accelerator.is_main_process:
        whole.save_pretrained(folder)

accelerate's own way of preparing a model for FSDP2 stops at scalar parameters, at buffers, at parameters of
the root module with cpu_ram_efficient_loading, and at a second optimizer; ours places `fully_shard` itself
and leaves loops, checkpoints and clipping to accelerate.
"""

import copy
import json
import os
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.checkpointing import load_accelerator_state
from accelerate.utils import DistributedType, convert_outputs_to_fp32
from safetensors.torch import load_file
from torch import nn

from common.errors import UserError


def is_sharded(accelerator) -> bool:
    """Whether parameters are spread over the processes: FSDP2 or ZeRO stage 3."""
    deepspeed = getattr(accelerator.state, "deepspeed_plugin", None)
    return accelerator.is_fsdp2 or (deepspeed is not None and deepspeed.zero_stage == 3)


def refuse_sharding(accelerator, why: str):
    """UserError if this run spreads parameters or the optimizer's state although the script cannot, or need
    not; `why` says the way out."""
    deepspeed = getattr(accelerator.state, "deepspeed_plugin", None)
    if accelerator.is_fsdp2 or deepspeed is not None:
        kind = "FSDP2" if accelerator.is_fsdp2 else f"ZeRO stage {deepspeed.zero_stage}"
        raise UserError(f"{kind} would spread this model over the processes, but {why}")


def settle(accelerator, clip: float, accum: int):
    """Set what our scripts rely on in accelerate's plugins; called once, before any model is loaded.

    DeepSpeed clips and averages by itself: clip and accum are --clip and --accum.

    Every process loads the weights itself: a model that is empty on all but one of them could not be looked
    at, measured or extended before it is prepared.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise UserError("fsdp_version 1 is not supported; set fsdp_version: 2 in the accelerate yaml")
        if accelerator.mixed_precision == "fp16":
            raise UserError("--precision fp16 does not work with FSDP2; take --precision bf16")
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False
        accelerator.state.fsdp_plugin.set_state_dict_type("SHARDED_STATE_DICT")
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("--precision fp16 has no effect on a CPU; take --precision bf16")
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config |= {"gradient_clipping": float(clip), "gradient_accumulation_steps": accum}


def prepare(accelerator, model, *others):
    """`accelerator.prepare(model, *others)` that also holds for FSDP2. others: optimizers and loaders.

    Optimizers must stand for parameters of `model` and hold no state yet. Returns the prepared objects in
    the order given.
    """
    if accelerator.is_fsdp2 or accelerator.distributed_type == DistributedType.DEEPSPEED:
        if any(isinstance(other, torch.optim.Muon) for other in others):
            raise UserError(
                "--optimizer muon needs whole matrices, which are cut here; take --optimizer adamw"
            )
    accelerator.skeleton = _skeleton(model) if is_sharded(accelerator) else None
    if not accelerator.is_fsdp2:
        prepared = accelerator.prepare(model, *others)
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            # accelerate makes the optimizer's step within the backward pass, before the step's learning rate
            # is set; here `update` makes it.
            engine = accelerator.deepspeed_engine_wrapped.engine
            engine.own_step, engine.step = engine.step, lambda *_, **__: None
        return prepared
    before = dict(model.named_parameters())
    _shard(accelerator, model)
    after = dict(model.named_parameters())
    place = {id(parameter): after[name] for name, parameter in before.items()}
    for optimizer in others:
        if isinstance(optimizer, torch.optim.Optimizer):
            for group in optimizer.param_groups:
                group["params"] = [place[id(parameter)] for parameter in group["params"]]
    accelerator._models.append(model)
    done = [
        accelerator.prepare_optimizer(other)
        if isinstance(other, torch.optim.Optimizer)
        else accelerator.prepare_data_loader(other)
        for other in others
    ]
    return model, *done


def _skeleton(model: nn.Module) -> nn.Module:
    """A copy of `model` whose parameters have a shape and no values; `export_model` fills it."""
    memo = {}
    for parameter in model.parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO 3 may have emptied it already
        empty = torch.empty(shape, dtype=parameter.dtype, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for module in model.modules():  # what a module keeps in a list is none of its parts: a teacher, say
        memo |= {id(value): value for value in vars(module).values() if isinstance(value, list)}
    return copy.deepcopy(model, memo)


def layer_classes(model: nn.Module) -> set[str]:
    """Names of the layer classes that the model and its parts name as one piece (`_no_split_modules`)."""
    return {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}


def _shard(accelerator, model):
    """Place fully_shard on every layer and on the model. Scalars stay whole on each process: `update`
    averages their gradients."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    plugin, device = accelerator.state.fsdp_plugin, accelerator.device
    whole = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    for tensor in (*whole, *model.buffers()):
        tensor.data = tensor.data.to(device)
    policy = MixedPrecisionPolicy()
    if accelerator.mixed_precision == "bf16" and device.type != "cpu":
        # Weights are gathered as bf16, so that none of them is kept as a cast copy; autocast does the rest.
        # (Not on a CPU, whose norms refuse an input of another type than their weights.)
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    options = {
        "mesh": init_device_mesh(device.type, (accelerator.num_processes,)),
        "mp_policy": policy,
        "offload_policy": plugin.cpu_offload,
        "ignored_params": whole,
    }
    again = plugin.reshard_after_forward

    # A tensor that a layer shares with the rest of the model belongs to the model's own group.
    owners = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter, []).append(name)
    classes = layer_classes(model)
    layers = [(name, m) for name, m in model.named_modules() if name and type(m).__name__ in classes]
    for name, layer in reversed(layers):
        tensors = [parameter for parameter in layer.parameters() if parameter not in whole]
        inside = all(owner.startswith(f"{name}.") for tensor in tensors for owner in owners[tensor])
        if tensors and inside:
            fully_shard(layer, reshard_after_forward=again, **options)
    fully_shard(model, **options)

    if accelerator.mixed_precision != "no":
        forward = model.forward

        def autocast(*arguments, **keywords):
            with accelerator.autocast():
                return forward(*arguments, **keywords)

        model.forward = convert_outputs_to_fp32(autocast)


def deepspeed_step(accelerator):
    """Make the optimizer step of DeepSpeed's engine, which clips; returns the gradient's norm before that."""
    engine = accelerator.deepspeed_engine_wrapped.engine
    engine.own_step()
    return torch.as_tensor(float(engine.get_global_grad_norm()), device=accelerator.device)


def average_whole_gradients(accelerator):
    """Average over the processes the gradients of the parameters that FSDP2 left whole."""
    if not accelerator.is_fsdp2:
        return
    for model in accelerator._models:
        for parameter in model.parameters():
            if parameter.ndim == 0 and parameter.requires_grad:
                if parameter.grad is None:  # every process must take part
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)
                parameter.grad /= accelerator.num_processes


def export_state(accelerator, model) -> dict:
    """The whole weights of a prepared model as {key: CPU tensor}, on the main process; {} on the others.

    All processes must call it: the parts are gathered one tensor at a time.
    """
    if accelerator.is_fsdp2:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    else:
        state = accelerator.get_state_dict(model)
    return {key: value.cpu() for key, value in state.items()} if accelerator.is_main_process else {}


def export_model(accelerator, model):
    """The whole model without any wrapper, for the main process to save, merge or measure; None on the
    others.

    All processes must call it. Where the parameters are spread it is a copy on the CPU, else the trained
    model itself.
    """
    if not is_sharded(accelerator):
        return accelerator.unwrap_model(model) if accelerator.is_main_process else None
    state = export_state(accelerator, model)
    if not accelerator.is_main_process:
        return None
    whole, values = _skeleton(accelerator.skeleton), {}
    for name, empty in whole.named_parameters(remove_duplicate=False):  # shared tensors stay shared
        if id(empty) not in values:
            tensor = state[name].to(empty.dtype)
            values[id(empty)] = nn.Parameter(tensor, requires_grad=empty.requires_grad)
    for module in whole.modules():
        for name, empty in module._parameters.items():
            if empty is not None:
                module._parameters[name] = values[id(empty)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.cpu()
    buffers = {name: state[name] for name, _ in whole.named_buffers() if name in state}
    whole.load_state_dict(buffers, strict=False)
    return whole.eval()


# ---- checkpoints: whichever way they were written, they load into every other


FROZEN = "frozen.json"  # beside a checkpoint that leaves the frozen weights out


def keep_trained(accelerator):
    """Let checkpoints hold what trains alone, where the frozen weights are the start's own and come back with
    it. Call it after `prepare`; spread models and DeepSpeed go on saving everything.

    frozen.json holds a CRC-32 of the first values of every tensor that is left out, so that a run is not
    resumed on other start weights.
    """

    def leave_out(models, weights, folder):
        for model, state in zip(models, weights):
            frozen = _frozen(model)
            for key in frozen:
                state.pop(key, None)
            if accelerator.is_main_process:
                (Path(folder) / FROZEN).write_text(json.dumps(frozen))

    accelerator.register_save_state_pre_hook(leave_out)


def _frozen(model) -> dict[str, int]:
    """CRC-32 of the first 256 values of every tensor of a state dict that no training changes."""
    tensors = model.state_dict(keep_vars=True)
    still = {k: v for k, v in tensors.items() if isinstance(v, nn.Parameter) and not v.requires_grad}
    first = {k: v.detach().flatten()[:256].float().cpu().numpy().tobytes() for k, v in still.items()}
    return {key: zlib.crc32(value) for key, value in first.items()}


def _add_frozen(model, tensors: dict, folder: Path):
    """Add the weights that a checkpoint left out to its tensors, from the model; UserError if they differ
    from those that the run began with."""
    if not (folder / FROZEN).is_file():
        return
    own, frozen = model.state_dict(), json.loads((folder / FROZEN).read_text())
    here = _frozen(model)
    other = next((key for key, value in frozen.items() if here.get(key) != value), None)
    if other is not None:
        raise UserError(
            f"{folder}: was saved over other start weights ({other} differs); resume with the language model "
            "and the --start that the run began with"
        )
    tensors |= {key: own[key] for key in frozen if key not in tensors}


def load_state(accelerator, folder: Path):
    """Load weights, optimizer and random states that `Accelerator.save_state` wrote to `folder`.

    A sharded checkpoint loads into any number of processes, sharded or not, and so does a whole one. Only
    DeepSpeed's need the configuration that they were written under.
    """
    folder, deepspeed = Path(folder), accelerator.distributed_type == DistributedType.DEEPSPEED
    if deepspeed != (folder / "pytorch_model").is_dir():
        which = "without" if deepspeed else "with"
        raise UserError(
            f"{folder} was written {which} DeepSpeed; resume it {which} ACCELERATE_CONFIG=zero2 or zero3"
        )
    sharded = any(folder.glob("pytorch_model_fsdp*"))
    if deepspeed or sharded and accelerator.is_fsdp2:
        accelerator.load_state(str(folder))
        return
    model, optimizers = accelerator.unwrap_model(accelerator._models[0]), accelerator._optimizers
    if sharded:
        _load_parts(model, optimizers[0].optimizer, folder)
    else:
        _load_whole(accelerator, model, optimizers, folder)
    loaders, rank = accelerator._dataloaders, accelerator.process_index
    load_accelerator_state(folder, [], [], [], loaders, rank, accelerator.scaler)


def _load_parts(model, optimizer, folder: Path):
    """Load FSDP2's parts into a model that is whole on this process."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as kit

    state = {"model": kit.get_model_state_dict(model)}
    dcp.load(state, storage_reader=dcp.FileSystemReader(folder / "pytorch_model_fsdp_0"), no_dist=True)
    kit.set_model_state_dict(model, state["model"])
    state = {"optimizer": kit.get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, storage_reader=dcp.FileSystemReader(folder / "optimizer_0"), no_dist=True)
    kit.set_optimizer_state_dict(model, optimizer, state["optimizer"])


def _load_whole(accelerator, model, optimizers, folder: Path):
    """Load whole weights and optimizer states into a model that may be sharded."""
    tensors = load_file(folder / "model.safetensors")
    if not accelerator.is_fsdp2:
        _add_frozen(model, tensors, folder)
    states = [
        torch.load(folder / f"optimizer{f'_{i}' if i else ''}.bin", map_location="cpu", weights_only=True)
        for i in range(len(optimizers))
    ]
    same = {}  # tensors that share their memory are stored once, under one of their names
    for name, tensor in model.state_dict(keep_vars=True).items():
        same.setdefault(id(tensor), []).append(name)
    for names in same.values():
        known = next((name for name in names if name in tensors), None)
        tensors |= {name: tensors[known] for name in names if known}
    if not accelerator.is_fsdp2:
        model.load_state_dict(tensors)
        for optimizer, state in zip(optimizers, states):
            optimizer.load_state_dict(state)
        return
    from torch.distributed.checkpoint import state_dict as kit

    options = kit.StateDictOptions(full_state_dict=True, strict=not (folder / FROZEN).is_file())
    kit.set_model_state_dict(model, tensors, options=options)
    names = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer, state in zip(optimizers, states):
        own = [names[p] for group in optimizer.param_groups for p in group["params"]]
        groups = [{**group, "params": [own[i] for i in group["params"]]} for group in state["param_groups"]]
        named = {"state": {own[i]: value for i, value in state["state"].items()}, "param_groups": groups}
        kit.set_optimizer_state_dict(model, optimizer.optimizer, named, options=options)
