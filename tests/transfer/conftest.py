"""The tiny network for every test of this room."""

import pytest
import tiny as tiny_network


@pytest.fixture
def tiny():
    """(model, variables), fresh for every test."""
    return tiny_network.MODEL, tiny_network.random_variables()
