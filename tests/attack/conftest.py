"""Settings for attacks on tiny networks, which take longer to compile than to run."""

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def one_thread(quick_to_compile):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
