"""Projections whose outputs several ranks share (torch's `ColwiseParallel`): each rank attends with its own heads.

A DTensor is there only where torch has loaded its module, so nothing here imports `torch.distributed` by itself.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from .parameters import TENSORS


def is_dtensor(tensor: object) -> bool:
    module = None if type(tensor) in TENSORS else sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def check_local(name: str, tensor: object, remedy: str = "give it use_local_output=True") -> None:
    """Whether a tensor is a plain one, of which every rank knows its own part.

    Raises:
        TypeError: it is a DTensor.
    """
    if is_dtensor(tensor):
        raise TypeError(f"{name}: expected a plain tensor, got a DTensor; {remedy}")


def mesh_of(projection: nn.Module) -> Any:
    """The one-dimensional `DeviceMesh` of the ranks that share a projection's outputs; None where none do.

    A projection may lie inside an adapter. FSDP2 keeps its weights as DTensors as well, in a dimension before.
    """
    if type(projection._parameters.get("weight")) in TENSORS and not projection._modules:
        return None  # as nearly always
    for part in projection.modules():
        weight: Any = part._parameters.get("weight")
        if getattr(part, "_distribute_module_applied", False) and is_dtensor(weight):
            mesh = weight.device_mesh
            if weight.placements[-1].is_shard(0):
                return mesh if mesh.ndim == 1 else mesh[mesh.mesh_dim_names[-1]]
    return None


def ranks_of(name: str, projection: nn.Module, heads: int) -> int:
    """How many ranks share a projection's outputs; 1 where none do.

    Raises:
        ValueError: they do not divide the heads.
    """
    mesh = mesh_of(projection)
    ranks = 1 if mesh is None else int(mesh.size())
    if heads % ranks:
        raise ValueError(f"{name}: expected ranks that divide the {heads} heads, got {ranks}")
    return ranks


def own_heads(name: str, projection: nn.Module, width: int, heads: int, size: int) -> int:
    """How many of H heads of ``size`` features a projection's output of ``width`` holds on this rank.

    Raises:
        ValueError: no whole number, or not the same on every rank.
    """
    if width == heads * size:
        return heads
    ranks_of(name, projection, heads)  # what is no whole number here may be one on another rank, which would wait
    if not width or width % size:
        raise ValueError(f"{name}: expected whole heads, a multiple of {size} features, got {width}")
    return width // size


def check_takes(name: str, projection: nn.Module, width: int) -> None:
    """Whether the features of this rank's heads are as many as a projection's weights take in.

    Raises:
        ValueError: it is a plain one of more features.
    """
    weight: Any = projection._parameters.get("weight")
    if type(weight) in TENSORS and weight.dim() == 2 and weight.shape[1] != width:
        raise ValueError(
            f"{name}: expected weights of {width} features in, those of this rank's heads (RowwiseParallel), got "
            f"{weight.shape[1]}"
        )


def whole(tensor: Tensor, mesh: Any) -> Tensor:
    """What all ranks have of the last dimension, in their order; the gradient must be whole on every rank."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    return DTensor.from_local(tensor, mesh, [Shard(tensor.dim() - 1)]).redistribute(placements=[Replicate()]).to_local()


def part_of(tensor: Tensor, dim: int, mesh: Any) -> Tensor:
    """This rank's part of what every rank has whole; so has every rank its gradient."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    return DTensor.from_local(tensor, mesh, [Replicate()]).redistribute(placements=[Shard(dim)]).to_local()
