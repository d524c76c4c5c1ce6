"""A look-up knows the architectures that the trainer knows, and does not wait for PyTorch to learn their names."""

from __future__ import annotations

import json
import subprocess
import sys

from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from worker.base_models import KNOWS

TELL = """
torch = [name for name, module in sys.modules.items() if name.partition(".")[0] == "torch" and module is not None]
print(json.dumps([sorted(CONFIG_MAPPING_NAMES), torch]))
"""


def test_names_of_architectures_are_read_without_pytorch_and_are_those_of_the_trainer() -> None:
    done = subprocess.run([sys.executable, "-c", KNOWS + TELL], capture_output=True, text=True, check=True)

    names, torch = json.loads(done.stdout)
    assert names == sorted(CONFIG_MAPPING_NAMES)
    assert torch == []
    assert done.stderr == "", "a look-up that goes well says nothing"
