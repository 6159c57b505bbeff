"""Processes that share a batch get the global-batch loss and the bias of the joined batch."""

import copy
import os
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sonic.nn.routers import SigmoidRouter, SoftmaxRouter, update_balance

pytestmark = pytest.mark.skipif(
    not dist.is_available() or sys.platform == "win32", reason="needs torch.distributed"
)

H, E, K, STEPS, MICRO = 16, 12, 3, 3, 2
# Tokens of each process in one micro-batch: equal, and not.
SHARES = ((10, 10), (14, 6))


def make_routers():
    torch.manual_seed(0)
    options = {"losses": {"global_batch": 1.0}, "std": 0.5}
    routers = SigmoidRouter(H, E, K, **options), SoftmaxRouter(H, E, K, **options)
    return torch.nn.ModuleList(routers).double()


def batches(tokens):
    """One (tokens, H) batch per micro-batch of every step, the same in every process."""
    generator = torch.Generator().manual_seed(1)
    shape = (STEPS, MICRO, tokens, H)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def train(routers, data, group):
    """Losses of all passes, bias and averaged gradients after all steps."""
    for router in routers:
        router.group = group
    size = 1 if group is None else dist.get_world_size(group)
    losses, biases = [], []
    for step in data:
        for micro in step:
            for router in routers:
                loss = router(micro).aux_loss
                loss.backward()
                losses.append(loss.detach())
        update_balance(routers, rate=0.02)
        biases.append(routers[0].correction_bias.clone())
    grads = [router.weight.grad / size for router in routers]
    if group is not None:
        for grad in grads:
            dist.all_reduce(grad, group=group)
    return {"losses": torch.stack(losses), "bias": torch.stack(biases), "grads": grads}


class Loss(torch.nn.Module):
    def __init__(self, router):
        super().__init__()
        self.router = router

    def forward(self, x):
        return self.router(x).aux_loss


def check_wrapped(data):
    """DistributedDataParallel broadcasts buffers before each pass: no count is of another process."""
    alone = make_routers()[0]
    alone.group = dist.group.WORLD
    wrapped = torch.nn.parallel.DistributedDataParallel(Loss(copy.deepcopy(alone)))
    for micro in data:
        alone(micro).aux_loss.backward()
        wrapped(micro).backward()
    for name in ("step_load", "batch_load"):
        mine, expected = getattr(wrapped.module.router, name), getattr(alone, name)
        assert torch.equal(mine, expected) and mine.any(), name


def worker(rank, shares, folder):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(str(Path(folder) / "store"), len(shares))
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=len(shares), timeout=timedelta(seconds=120)
    )
    try:
        first = sum(shares[:rank])
        data = batches(sum(shares))[:, :, first : first + shares[rank]]
        routers = make_routers()
        result = train(routers, data, dist.group.WORLD)
        copied = copy.deepcopy(routers)
        assert copied[0].group is dist.group.WORLD
        if rank == 0:  # alone: a forward in eval mode must not wait for the others
            copied.eval()
            out = copied[1](data[0, 0])
            torch.testing.assert_close(out.losses["global_batch"], out.losses["switch"])
        check_wrapped(data[0])
        torch.save(result, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("shares", SHARES, ids=["even", "uneven"])
def test_two_processes_equal_one(shares, tmp_path):
    mp.spawn(worker, args=(shares, str(tmp_path)), nprocs=len(shares))
    expected = train(make_routers(), batches(sum(shares)), None)
    assert expected["bias"].any() and expected["losses"].std() > 0
    for rank in range(len(shares)):
        actual = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(actual["losses"], expected["losses"])
        assert torch.equal(actual["bias"], expected["bias"])
        for ours, theirs in zip(actual["grads"], expected["grads"], strict=True):
            assert theirs.any()
            torch.testing.assert_close(ours, theirs)


def test_without_the_exchange_they_differ():
    """The comparison above would notice a missing all-reduce."""
    whole = train(make_routers(), batches(20), None)
    half = train(make_routers(), batches(20)[:, :, :10], None)
    assert not torch.equal(half["bias"], whole["bias"])
    assert not torch.allclose(half["losses"], whole["losses"])
