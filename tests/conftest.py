"""One thread a test process: the models are tiny, and the machine has few cores."""

import torch

torch.set_num_threads(1)

pytest_plugins = ["serving_fixtures"]
