"""FSDP2 on CPU processes, which accelerate offers on GPUs alone, and scripts on several processes."""

import os
import socket

import torch
from accelerate import state

from tests import forked


def fsdp2_on_cpu():
    """In a fork: accelerate takes this process for one of an FSDP2 run, as common/accelerate/fsdp2.yaml would
    have it."""
    os.environ.update(
        ACCELERATE_CONFIG="fsdp2",
        ACCELERATE_USE_FSDP="true",
        ACCELERATE_USE_CPU="true",
        FSDP_VERSION="2",
        FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
        FSDP_RESHARD_AFTER_FORWARD="true",
        FSDP_OFFLOAD_PARAMS="false",
        FSDP_CPU_RAM_EFFICIENT_LOADING="true",
        FSDP_STATE_DICT_TYPE="SHARDED_STATE_DICT",
    )
    before = state.PartialState.__init__

    def init(self, *arguments, **options):
        before(self, *arguments, **options)
        shared = state.PartialState._shared_state
        if shared.get("distributed_type") == state.DistributedType.MULTI_CPU:
            shared["distributed_type"] = state.DistributedType.MULTI_GPU

    state.PartialState.__init__ = init


def zero(stage):
    """What deepspeed_2_on_cpu and deepspeed_3_on_cpu do."""
    os.environ.update(
        DS_ACCELERATOR="cpu",
        ACCELERATE_USE_DEEPSPEED="true",
        ACCELERATE_USE_CPU="false",
        ACCELERATE_DEEPSPEED_ZERO_STAGE=str(stage),
        ACCELERATE_DEEPSPEED_ZERO3_INIT="false",
        ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL="true",
    )
    before = state.PartialState.__init__

    def init(self, *arguments, **options):
        before(self, *arguments, **options)
        shared = state.PartialState._shared_state
        if shared.get("num_processes") == 1:  # what accelerate makes of a DeepSpeed run without a GPU
            rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            shared.update(num_processes=processes, process_index=rank, local_process_index=rank)
            shared.update(distributed_type=state.DistributedType.DEEPSPEED, device=torch.device("cpu"))

    state.PartialState.__init__ = init


def deepspeed_2_on_cpu():
    """In a fork: accelerate takes this process for one of a DeepSpeed run with ZeRO 2."""
    zero(2)


def deepspeed_3_on_cpu():
    """In a fork: accelerate takes this process for one of a DeepSpeed run with ZeRO 3."""
    zero(3)


def world(script, arguments, log, processes=2, before=None, environment=()) -> forked.Done:
    """Run a script's main on several processes of this machine; the status of the first that failed, and all
    output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **dict(environment)}
    logs = [log.with_name(f"{log.name}-{rank}") for rank in range(processes)]
    started = []
    for rank, file in enumerate(logs):
        place = {name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
        place = place if processes > 1 or before else {}
        started.append(forked.start(script, arguments, file, before=before, environment=place))
    codes = [forked.finish(process) for process in started]
    text = "".join(file.read_text(errors="replace") for file in logs)
    return forked.Done(next((code for code in codes if code), 0), text)


def checkpoint_weights(folder) -> dict:
    """{key: tensor} of a checkpoint, whole or sharded."""
    from safetensors.torch import load_file
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    if (folder / "model.safetensors").is_file():
        found = load_file(folder / "model.safetensors")
    else:
        dcp_to_torch_save(folder / "pytorch_model_fsdp_0", folder.parent / "whole.pt")
        found = torch.load(folder.parent / "whole.pt", weights_only=True)["model"]
    return {key.removeprefix("module."): value for key, value in found.items()}
