"""Conversion of BatchNorm layers for `--sync-bn`; its arithmetic is tested in test_distributed.py."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import nn

from engine.devices.distributed import World
from engine.devices.sync_bn import CpuSyncBatchNorm, convert_sync_batchnorm
from utils.errors import ConfigError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
IMAGES = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    norms = nn.BatchNorm2d(4), BatchNormAct2d(4, act_layer=nn.SiLU)
    return nn.Sequential(nn.Conv2d(3, 4, 1), norms[0], nn.Conv2d(4, 4, 1), norms[1])


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_conversion_keeps_state_and_outputs(device) -> None:
    """timm's BatchNormAct2d lost its activation, so EfficientNet and others trained another network."""
    model = network().eval()
    converted = copy.deepcopy(model)
    convert_sync_batchnorm(converted, World(), device)
    kind = CpuSyncBatchNorm if device == CPU else nn.SyncBatchNorm
    assert [isinstance(module, kind) for module in converted] == [False, True, False, True]
    assert converted.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(converted(IMAGES), model(IMAGES), rtol=0, atol=0)


@pytest.mark.usefixtures("alone")
def test_training_of_one_process_is_that_of_the_original() -> None:
    model = network()
    converted = copy.deepcopy(model)
    convert_sync_batchnorm(converted, World(), CPU)
    torch.testing.assert_close(converted(IMAGES), model(IMAGES))
    for key, value in model.state_dict().items():
        torch.testing.assert_close(converted.state_dict()[key], value, msg=key)


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_norm_with_its_own_forward_is_refused(device) -> None:
    class Shifted(nn.BatchNorm2d):
        def forward(self, input):
            return super().forward(input) + 1

    with pytest.raises(ConfigError, match="--sync-bn: Shifted is a BatchNorm with a forward of its own"):
        convert_sync_batchnorm(nn.Sequential(Shifted(3)), World(), device)
