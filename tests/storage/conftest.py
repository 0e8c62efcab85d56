"""A whole checkpoint of a tiny model."""

import shutil

import pytest
import tiny_checkpoint as tiny


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("complete") / "checkpoint")


@pytest.fixture
def copy(complete, tmp_path):
    return shutil.copytree(complete, tmp_path / "checkpoint")
