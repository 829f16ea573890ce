"""Folders with models; no test asks the network for one."""

import os

import pytest
import torch

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    from tests.integrations import tiny

    path = tmp_path_factory.mktemp("model")
    tiny.build(path)
    return str(path)


@pytest.fixture(scope="session", params=["tied", "untied", "biased", "softcapped", "scaled"])
def any_folder(request, tmp_path_factory):
    """Every kind of head."""
    from tests.integrations import tiny

    path = tmp_path_factory.mktemp("any")
    torch.manual_seed(0)
    tiny.build(path, model=None if request.param == "tied" else getattr(tiny, request.param)())
    return str(path)
