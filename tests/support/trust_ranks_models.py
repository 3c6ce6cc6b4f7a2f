"""Ways to communicate between ranks in `forward`, each as published models do it, on gloo."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.distributed.nn.functional as differentiable
from torch import Tensor

Forward = Callable[[Any, Tensor], Tensor]


def with_all_ranks(z: Tensor, gathered: Tensor) -> Tensor:
    """Statistics of the whole batch, as contrastive losses and synchronised normalisation use them."""
    return z - 0.1 * gathered.mean()


def all_reduce(model: Any, z: Tensor) -> Tensor:
    total = z.detach().mean(0)
    dist.all_reduce(total)
    return with_all_ranks(z, total)


def all_gather(model: Any, z: Tensor) -> Tensor:
    """Contrastive losses: the other ranks' rows without gradients."""
    rows = [torch.zeros_like(z) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, z.detach().contiguous())
    return with_all_ranks(z, torch.cat(rows))


def of_lightning(model: Any, z: Tensor) -> Tensor:
    return with_all_ranks(z, model.all_gather(z, sync_grads=True))


def with_gradients(model: Any, z: Tensor) -> Tensor:
    """… and with them: the backward pass communicates as well."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return with_all_ranks(z, torch.cat(differentiable.all_gather(z)))


class Reduced(torch.autograd.Function):
    """The backward pass alone communicates, as in tensor parallelism's first half."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


def in_backward(model: Any, z: Tensor) -> Tensor:
    return Reduced.apply(z)


def by_hook(model: Any, z: Tensor) -> Tensor:
    """A hook on a tensor's gradient."""
    if z.requires_grad:
        z.register_hook(lambda gradient: functional.all_reduce(gradient, "avg", dist.group.WORLD))
    return z * 1


def functional_all_reduce(model: Any, z: Tensor) -> Tensor:
    return with_all_ranks(z, functional.all_reduce(z.detach(), "sum", dist.group.WORLD) + 0)


def reduce_scatter(model: Any, z: Tensor) -> Tensor:
    mine = torch.zeros(3)
    dist.reduce_scatter(mine, [z.detach().mean(0).contiguous() for _ in range(dist.get_world_size())])
    return with_all_ranks(z, mine)


def all_to_all(model: Any, z: Tensor) -> Tensor:
    """Experts on other ranks."""
    sent, got = z.detach()[:2].contiguous(), torch.zeros(2, 3)
    dist.all_to_all_single(got, sent)
    return with_all_ranks(z, got)


def broadcast(model: Any, z: Tensor) -> Tensor:
    """A codebook that rank 0 decides."""
    code = z.detach().mean(0)
    dist.broadcast(code, 0)
    return with_all_ranks(z, code)


def gather_and_scatter(model: Any, z: Tensor) -> Tensor:
    first, mine = dist.get_rank() == 0, torch.zeros(3)
    rows = [torch.zeros(3) for _ in range(dist.get_world_size())]
    dist.gather(z.detach().mean(0).contiguous(), rows if first else None, 0)
    dist.scatter(mine, rows if first else None, 0)
    return with_all_ranks(z, mine)


def send_and_receive(model: Any, z: Tensor) -> Tensor:
    """A pipeline's neighbours."""
    got, peer = torch.zeros(3), 1 - dist.get_rank()
    sends = [dist.P2POp(dist.isend, z.detach().mean(0).contiguous(), peer), dist.P2POp(dist.irecv, got, peer)]
    for waiting in dist.batch_isend_irecv(sends):
        waiting.wait()
    return with_all_ranks(z, got)


def barrier(model: Any, z: Tensor) -> Tensor:
    dist.barrier()
    return z


def monitored_barrier(model: Any, z: Tensor) -> Tensor:
    dist.monitored_barrier()
    return z


def objects(model: Any, z: Tensor) -> Tensor:
    lengths = [0, 0]
    dist.all_gather_object(lengths, len(z))
    return z * float(lengths[0] > 0)


def own_group(model: Any, z: Tensor) -> Tensor:
    """The group is made when it is first needed."""
    if not hasattr(model.kept, "group"):
        model.kept.group = dist.new_group([0, 1], backend="gloo")
    total = z.detach().mean(0)
    dist.all_reduce(total, group=model.kept.group)
    return with_all_ranks(z, total)


def caught(model: Any, z: Tensor) -> Tensor:
    """A model that goes on by itself where communication fails would be measured as another model than it trains."""
    try:
        return all_reduce(model, z)
    except BaseException:
        return z


def of_one(model: Any, z: Tensor) -> Tensor:
    """A group of this rank alone, as where nothing is split in that direction: no other rank is asked."""
    total = functional.all_reduce(z, "sum", model.kept.one)
    dist.all_reduce(torch.ones(1), group=model.kept.one)
    return z - 0.1 * total


REFUSED: dict[str, Forward] = {
    each.__name__: each
    for each in (
        all_reduce, all_gather, of_lightning, with_gradients, in_backward, by_hook, functional_all_reduce,
        reduce_scatter, all_to_all, broadcast, gather_and_scatter, send_and_receive, barrier, monitored_barrier,
        objects, own_group, caught,
    )
}  # fmt: skip
FORWARDS: dict[str, Forward] = {"plain": lambda model, z: z, "of_one": of_one, **REFUSED}
