"""What tests on a GPU do on the CPU, their references, they do with one thread."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    # The products are tiny: more threads only wait for each other, minutes where cores are shared.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
