"""The model files for Mammoth and PyCIL, dropped into copies of checkouts and run by their main programs on digits.

``GRADMIX_MAMMOTH`` and ``GRADMIX_PYCIL`` name the checkouts::

    git clone --depth 1 https://github.com/aimagelab/mammoth && git clone --depth 1 https://github.com/LAMDA-CL/PyCIL
    GRADMIX_MAMMOTH=mammoth GRADMIX_PYCIL=PyCIL pytest tests/integrations/test_drop_ins.py
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from frameworks import framework

framework("torchvision")

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "examples"


def checkout(variable: str, tmp_path: Path) -> Path:
    """A copy of the checkout that the variable names."""
    if variable not in os.environ:
        pytest.skip(f"{variable} names no checkout (see the docstring)")
    source = Path(os.environ[variable]).resolve()
    return Path(shutil.copytree(source, tmp_path / "checkout", ignore=shutil.ignore_patterns(".git", "docs", "out")))


def run(folder: Path, code: str, *arguments: str) -> tuple[str, list[int]]:
    """Run a main program under the witness; return what it printed, and the witness's counts."""
    environment = os.environ | {"PYTHONPATH": f"{HERE}{os.pathsep}{folder}", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", f"import witness\n{code}", *arguments]
    answer = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout[-3000:] + answer.stderr[-3000:]
    counts = re.search(r"^witness (\d+) (\d+) (\d+)$", answer.stdout, re.M)
    assert counts, answer.stdout[-3000:]
    return answer.stdout + answer.stderr, [int(count) for count in counts.groups()]


MAMMOTH_DIGITS = '''
import numpy as np, torch, torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import Dataset
from datasets.utils.continual_dataset import ContinualDataset, store_masked_loaders


class Digits(Dataset):
    """Digits as images of 28 x 28 pixels, of which mnistmlp takes the numbers."""

    def __init__(self, train):
        x, y = load_digits(return_X_y=True)
        part = (np.arange(len(y)) % 4 == 0) != train
        self.data, self.targets = torch.tensor(x[part], dtype=torch.float32) / 16, y[part].astype(np.int64)
        self.train = train

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        x, y = F.pad(self.data[index], (0, 28 * 28 - 64)).reshape(1, 28, 28), self.targets[index]
        return (x, y, x) if self.train else (x, y)


class SequentialDigits(ContinualDataset):
    NAME, SETTING, SIZE, TRANSFORM = "seq-digits", "class-il", (28, 28), None
    N_CLASSES_PER_TASK, N_TASKS, N_CLASSES = 2, 5, 10

    def get_data_loaders(self):
        return store_masked_loaders(Digits(True), Digits(False), self)

    def get_class_names(self):
        return [str(digit) for digit in range(10)]

    get_backbone = staticmethod(lambda: "mnistmlp")
    get_loss = staticmethod(lambda: F.cross_entropy)
    get_transform = get_normalization_transform = get_denormalization_transform = staticmethod(lambda: None)
    get_batch_size = staticmethod(lambda: 32)
    get_epochs = staticmethod(lambda: 1)
'''

MAMMOTH = {
    "er_gradmix": [],
    "er_gradmix, mixed samples only": ["--mix_originals", "0"],
    "derpp_gradmix": ["--alpha", "0.1", "--beta", "0.5"],
}


@pytest.mark.parametrize("case", MAMMOTH)
def test_mammoth(case: str, tmp_path: Path) -> None:
    folder, model = checkout("GRADMIX_MAMMOTH", tmp_path), case.partition(",")[0]
    # All files there are imported at the start, and some of them load weights from the network.
    for file in (folder / "datasets").glob("*.py"):
        if file.name != "__init__.py":
            file.unlink()
    (folder / "datasets/seq_digits.py").write_text(MAMMOTH_DIGITS)
    for file in (folder / "models").glob("*.py"):
        if file.name not in ("__init__.py", "er.py"):
            file.unlink()
    shutil.copy(EXAMPLES / "mammoth" / f"{model}.py", folder / "models")
    arguments = ["--model", model, "--backbone", "mnistmlp", "--dataset", "seq-digits", "--buffer_size", "100"]
    arguments += ["--batch_size", "32", "--minibatch_size", "32", "--lr", "0.1", "--n_epochs", "2"]
    arguments += ["--num_workers", "0", "--seed", "0", "--base_path", str(tmp_path), *MAMMOTH[case]]
    printed, (steps, replayed, rejected) = run(folder, "import main; main.main()", *arguments)
    # From the second step on there is a buffer.
    assert replayed == steps - 1 > 80 and rejected > 0
    accuracy = re.findall(r"Accuracy for 5 task\(s\):.*?\[Class-IL\]: ([\d.]+)", printed, re.S)
    # Guessing gives 10, and the last task alone 20; Mammoth's own derpp has 50 here.
    assert accuracy and float(accuracy[-1]) > 40, printed[-3000:]


PYCIL_DIGITS = """
import sys
import numpy as np, torch
from sklearn.datasets import load_digits
from torchvision import transforms
import models.gradmix_replay as drop_in, utils.data_manager as data_manager
from utils.data import iData


class Digits(iData):
    use_path, class_order = False, list(range(10))
    train_trsf = test_trsf = []
    common_trsf = [transforms.ToTensor()]

    def download_data(self):
        x, y = load_digits(return_X_y=True)
        x, y = (x.reshape(-1, 8, 8) * 15.9).astype(np.uint8)[..., None].repeat(3, -1)[::4], y[::4]
        x, test = x.repeat(4, 1).repeat(4, 2), np.arange(len(y)) % 4 == 0
        self.train_data, self.train_targets = x[~test], y[~test]
        self.test_data, self.test_targets = x[test], y[test]


data_manager._get_idata = lambda name: Digits()
drop_in.init_epoch = drop_in.epochs = 2
import trainer
trainer.train(dict(
    prefix="", dataset="digits", memory_size=50, memory_per_class=5, fixed_memory=True, shuffle=False, init_cls=5,
    increment=5, model_name="gradmix_replay", convnet_type="resnet32", device=[-1], seed=[0],
    mix_originals=sys.argv[1] == "1",
))
"""


@pytest.mark.parametrize("originals", [True, False])
def test_pycil(originals: bool, tmp_path: Path) -> None:
    folder = checkout("GRADMIX_PYCIL", tmp_path)
    source = EXAMPLES / "pycil/gradmix_replay.py"
    shutil.copy(source, folder / "models")
    factory = folder / "utils/factory.py"
    # The lines that the file's docstring gives.
    lines = re.search(r"^ {4}elif name == .*?^ {8}return GradMixReplay\(args\)$", source.read_text(), re.M | re.S)
    assert lines and "    else:\n" in factory.read_text()
    factory.write_text(factory.read_text().replace("    else:\n", f"{lines[0]}\n    else:\n"))
    printed, (steps, replayed, rejected) = run(folder, PYCIL_DIGITS, str(int(originals)))
    # Two epochs of 2 batches in each of the tasks; in the second one 25 of some 200 samples are exemplars.
    assert steps == 8 and replayed == 4 and rejected > 0
    assert "Task 1, epoch 2/2: loss" in printed and ("training accuracy" in printed) == originals
