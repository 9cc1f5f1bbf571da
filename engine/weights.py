"""
weights.py: official safetensors files into a module that was built on the meta device.
"""

import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from engine.run import sum_over_ranks

# The weights come from a file. To initialize them first, even on the meta device, would import 800
# modules (sympy …): 1.3 s.
Linear, Embedding, Conv1d, LayerNorm = (
    type(c.__name__, (c,), {"reset_parameters": lambda self: None})
    for c in (nn.Linear, nn.Embedding, nn.Conv1d, nn.LayerNorm)
)

# Byte-level BPE files write each byte as one visible character: itself if printable in Latin-1,
# else the next one from U+0100 on.
VISIBLE = [
    *range(ord("!"), ord("~") + 1),
    *range(ord("¡"), ord("¬") + 1),
    *range(ord("®"), ord("ÿ") + 1),
]
BYTE_OF = {chr(byte): byte for byte in VISIBLE}
BYTE_OF |= {chr(256 + i): byte for i, byte in enumerate(b for b in range(256) if b not in VISIBLE)}

MAKE_OR_FETCH = "make the demo's with `python demo/prepare.py`, or download a Hugging Face folder"


def read_json(path):
    """One JSON file. Errors name it: FileNotFoundError with the remedy, ValueError when it is
    broken.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {MAKE_OR_FETCH}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON ({error}): download it again") from None


def check_fit(what, found, wanted):
    """ValueError that lists every missing, unknown and misshapen tensor. found, wanted: {name:
    shape}
    """
    misshapen = [
        f"{name} {list(shape)}, expected {list(wanted[name])}"
        for name, shape in found.items()
        if name in wanted and list(wanted[name]) != list(shape)
    ]
    problems = {
        "missing": sorted(wanted.keys() - found),
        "unknown": sorted(found.keys() - wanted),
        "wrong shape": misshapen,
    }
    lists = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names)
    if lists:
        raise ValueError(f"{what}. {lists}")


def load_weights(module, folder, dtype, device, prefix="", tied=()):
    """Fill `module`, which is on the meta device, from folder/model*.safetensors.

    Tensor by tensor, so nothing exists twice. prefix: what the files put before the module's names.
    tied: names in the files of tensors that repeat another one.
    Errors: FileNotFoundError; ValueError that names a damaged file, or all tensors that do not fit.
    """
    folder = Path(folder)
    index, files = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.exists():
        files = sorted(set(read_json(index)["weight_map"].values()))
    parameters = {prefix + name: p for name, p in module.named_parameters(remove_duplicate=False)}
    wanted = {name: p.shape for name, p in parameters.items() if name not in tied}
    found, loaded = {}, {}
    for file in (folder / name for name in files):
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: {MAKE_OR_FETCH}")
        try:
            with safe_open(file, framework="pt", device=str(device)) as tensors:
                for name in set(tensors.keys()) - set(tied):
                    found[name] = tensors.get_slice(name).get_shape()
                    if name in wanted and list(wanted[name]) == found[name]:
                        tensor = tensors.get_tensor(name).to(dtype)
                        loaded[name.removeprefix(prefix)] = own_shard(parameters[name], tensor)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}): download or make it again") from None
    check_fit(f"{folder}: the weights do not fit config.json", found, wanted)
    module.load_state_dict(loaded, strict=False, assign=True)


# -- one LLM shared out among GPUs -----------------------------------------------------------------


def shard_blocks(llm, device):
    """FSDP2: each process keeps its part of every block; all gather a block when its turn comes.

    So all processes must run hidden_states, and its backward pass, equally often. Embeddings and
    head stay whole. Every node holds all blocks, so that they are gathered over its own fast links
    and not over the network.
    """
    # here: it takes half as long to import as torch
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    world = dist.get_world_size()
    on_node = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if world % on_node:
        raise ValueError(f"--shard_llm: {world} processes are not so many nodes of {on_node}")
    names = "nodes", "processes"
    mesh = init_device_mesh(
        torch.device(device).type, (world // on_node, on_node), mesh_dim_names=names
    )
    if world == on_node:
        mesh = mesh["processes"]
    for block in llm.model.layers:
        fully_shard(block, mesh=mesh)
    whole = {llm.model.embed_tokens.weight, llm.model.norm.weight, llm.lm_head.weight}
    fully_shard(llm, mesh=mesh, ignored_params=whole)
    # the root's: the next block is gathered while this one computes
    register_fsdp_forward_method(llm, "hidden_states")
    llm.sharded = True


def own_shard(parameter, tensor):
    """What this process keeps of a whole tensor: all of it, where the parameter is not sharded."""
    if not hasattr(parameter, "placements"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


# -- the same weights on all ranks -----------------------------------------------------------------


def check_same_weights(module):
    """ValueError that names tensors of a module which differ among the ranks, in one bit or more.

    Compared are sums of the bits read as integers: exact, in whatever order a GPU adds them up.
    Parts of a sharded LLM differ by nature and are left out.
    """
    if not dist.is_initialized():
        return
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    tensors = {name: t for name, t in tensors.items() if not hasattr(t, "placements")}
    device = next(iter(tensors.values())).device
    sums = torch.stack([sum_of_bits(tensor).to(device) for tensor in tensors.values()])
    least = sum_over_ranks(sums.clone(), dist.ReduceOp.MIN)
    most = sum_over_ranks(sums.clone(), dist.ReduceOp.MAX)
    differing = [name for name, same in zip(tensors, (least == most).tolist()) if not same]
    if differing:
        names = ", ".join(differing[:3]) + ", …" * (len(differing) > 3)
        remedy = "all nodes need the same files of --llm, --whisper and --init_from"
        raise ValueError(
            f"{len(differing)} weights are not the same on all ranks: {names}: {remedy}"
        )


def sum_of_bits(tensor):
    integers = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    parts = tensor.detach().view(integers).flatten().split(1 << 24)  # CPUs convert before adding
    return torch.stack([part.sum(dtype=torch.int64) for part in parts]).sum()
