"""Reading by worker processes: the same rows in the same order as without, damage by choice, and no process left."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from patience import PATIENCE

import gradmix
from gradmix.training.data.batch_reader import BatchReader
from gradmix.training.data.image_files import DamagedImageError
from gradmix.training.data.image_layouts import image_folder

WORKERS = [0, 1, 2]


class Items:
    """Row k is k, everywhere; some are damaged, some kill their process, some are slow or odd."""

    def __init__(self, n=100, shape=(3,), dtype=torch.float32, damaged=(), deadly=(), slow=(), odd=None):
        self.n, self.shape, self.dtype = n, shape, dtype
        self.damaged, self.deadly, self.slow, self.odd = damaged, deadly, slow, odd or {}

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        if index in self.slow:
            time.sleep(0.1)
        if index in self.deadly:
            time.sleep(0.3)  # until the reader waits
            os.kill(os.getpid(), signal.SIGKILL)
        if index in self.damaged:
            raise DamagedImageError(f"/images/{index}.jpg: cut short")
        return self.odd.get(index, torch.full(self.shape, index, dtype=self.dtype))


def plans(*rows):
    return iter([torch.tensor(row, dtype=torch.int64) for row in rows])


def first_column(reader):
    return [batch.samples[:, 0].tolist() for batch in reader]


@pytest.fixture(autouse=True)
def no_process_is_left():
    assert multiprocessing.active_children() == []
    yield
    assert multiprocessing.active_children() == []


# ---------------------------------------------------------------------------------------------------------------- rows

PLANS = {
    "some": [[3, 1, 2], [0], [99, 98], [5, 5, 5], [7, 1], [2], [4, 6]],
    "one": [[1, 2, 3]],
    "none": [],
    "one of no sample after others": [[1], [], [2]],
}


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("case", PLANS)
def test_batches_come_in_the_order_of_the_plans(case, workers):
    # The first rows take longest, so that a second worker is through before the first.
    reader = BatchReader(Items(slow=(3, 1)), plans(*PLANS[case]), workers=workers)
    batches = list(reader)
    assert [batch.samples[:, 0].tolist() for batch in batches] == PLANS[case]
    assert all(batch.samples.shape == (len(plan), 3) for batch, plan in zip(batches, PLANS[case], strict=True))
    assert all(batch.kept is None for batch in batches) and reader.damaged == {}


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("items", [Items(shape=(3, 5, 4), dtype=torch.uint8), Items(shape=(), dtype=torch.float64)])
def test_shapes_and_dtypes_are_the_rows_own(items, workers):
    (batch,) = BatchReader(items, plans([4, 2]), workers=workers)
    assert torch.equal(batch.samples, torch.stack([items[4], items[2]])) and batch.samples.dtype == items.dtype
    batch.samples.add_(1)  # the caller's own


def test_a_tensor_is_a_data_set():
    x = torch.randn(10, 2)
    (batch,) = BatchReader(x, plans([9, 0]))
    assert torch.equal(batch.samples, x[[9, 0]])


@pytest.mark.parametrize("prefetch", [1, 3])
@pytest.mark.parametrize("workers", WORKERS)
def test_plans_are_pulled_when_they_are_needed(workers, prefetch):
    pulled = []

    def endless():
        while True:
            pulled.append(len(pulled))
            yield torch.tensor([len(pulled) - 1])

    reader = BatchReader(Items(), endless(), workers=workers, prefetch=prefetch)
    assert pulled == []
    for k, batch in enumerate(reader):
        assert batch.samples[0, 0] == k
        assert len(pulled) <= k + 1 + workers * prefetch
        if k == 6:
            break
    assert len(pulled) >= 7


@pytest.mark.parametrize("workers", WORKERS)
def test_global_generators_are_left_alone(workers):
    before = torch.get_rng_state(), random.getstate(), pickle.dumps(np.random.get_state())
    assert len(list(BatchReader(Items(), plans([1], [2]), workers=workers))) == 2
    after = torch.get_rng_state(), random.getstate(), pickle.dumps(np.random.get_state())
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


@pytest.mark.parametrize("workers", [0, 1])
def test_waiting_is_measured(workers):
    reader = BatchReader(Items(slow=(1,)), plans([1, 1], [2], [3]), workers=workers)
    batches = iter(reader)
    next(batches)
    waited = reader.seconds_waiting
    assert waited >= 0.2
    time.sleep(0.2)  # not waiting, but computing
    assert reader.seconds_waiting == waited
    assert len(list(batches)) == 2
    assert waited < reader.seconds_waiting


# -------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("workers", WORKERS)
def test_damage_stops_the_reading_by_name(workers):
    reader = BatchReader(Items(damaged=(5,)), plans([1], [2], [4, 5, 6], [7]), workers=workers)
    seen = []
    with pytest.raises(DamagedImageError, match=r"^/images/5.jpg: cut short$"):
        for batch in reader:
            seen += batch.samples[:, 0].tolist()
    assert seen == [1, 2]
    with pytest.raises(DamagedImageError, match="5.jpg"):
        list(reader)


@pytest.mark.parametrize("workers", WORKERS)
def test_damaged_rows_are_left_out_and_named_once(workers):
    items = Items(shape=(2,), damaged=(5, 6, 8))
    rows = [1, 5, 2], [6, 5, 6], [3], [5, 4], [8, 9]
    reader = BatchReader(items, plans(*rows), workers=workers, on_damage="skip")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        batches = list(reader)
    assert [batch.samples[:, 0].tolist() for batch in batches] == [[1, 2], [], [3], [4], [9]]
    assert batches[1].samples.shape == (0, 2) and batches[1].samples.dtype == torch.float32
    kept = [None if batch.kept is None else batch.kept.tolist() for batch in batches]
    assert kept == [[True, False, True], [False] * 3, None, [False, True], [False, True]]
    assert reader.damaged == {k: f"/images/{k}.jpg: cut short" for k in (5, 6, 8)}
    assert [str(each.message) for each in caught] == [
        f"sample {k} is left out: /images/{k}.jpg: cut short" for k in (5, 6, 8)
    ]
    assert Path(caught[0].filename).name == "test_batch_reader.py"


@pytest.mark.filterwarnings("ignore:sample")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_first_batch_without_any_row_has_no_shape(workers):
    reader = BatchReader(Items(damaged=(1, 2)), plans([1, 2], [3]), workers=workers, on_damage="skip")
    with pytest.raises(
        DamagedImageError, match="the first batch has 2 samples, and none that can be read; the last one: .*2.jpg"
    ):
        list(reader)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_first_batch_of_nothing_has_the_shape_of_a_row_that_can_be_read(workers):
    reader = BatchReader(Items(shape=(2,), damaged=(0, 1)), plans([], [3], []), workers=workers)
    batches = list(reader)
    assert [batch.samples.tolist() for batch in batches] == [[], [[3, 3]], []]
    assert all(batch.samples.shape[1:] == (2,) and batch.kept is None for batch in batches) and reader.damaged == {}


@pytest.mark.parametrize("workers", WORKERS)
def test_images_of_an_image_folder(workers, tmp_path):
    image_module = pytest.importorskip("PIL.Image", reason="images are decoded by Pillow, which is not installed")
    for part in ("train", "val"):
        for label, name in enumerate(("a", "b")):
            (tmp_path / part / name).mkdir(parents=True)
            for k in range(4):
                target = io.BytesIO()
                pixels = np.full((20, 30, 3), 100 * label + 10 * k, np.uint8)
                image_module.fromarray(pixels).save(target, "JPEG")
                content = target.getvalue()[: 200 if (part, name, k) == ("train", "b", 2) else None]
                (tmp_path / part / name / f"{k}.jpg").write_bytes(content)
    train, _ = image_folder(tmp_path, 16)
    rows = [0, 5, 3], [6, 7, 1]
    reader = BatchReader(train, plans(*rows), workers=workers, on_damage="skip")
    with pytest.warns(UserWarning, match=r"sample 6 is left out: .*/train/b/2.jpg: (is no image|cannot be decoded)"):
        first, second = reader
    assert first.samples.shape == (3, 3, 16, 16) and first.samples.dtype == torch.uint8
    assert torch.equal(first.samples, torch.stack([train[k] for k in rows[0]])) and first.kept is None
    assert torch.equal(second.samples, torch.stack([train[7], train[1]])) and second.kept.tolist() == [
        False,
        True,
        True,
    ]
    with pytest.raises(DamagedImageError, match="/train/b/2.jpg"):
        list(BatchReader(train, plans(*rows), workers=workers))


# ------------------------------------------------------------------------------------------------------ ends and errors


@pytest.mark.parametrize("workers", WORKERS)
def test_the_next_iteration_goes_on_where_the_last_was_left(workers):
    reader = BatchReader(Items(), plans(*([k] for k in range(12))), workers=workers, prefetch=2)
    seen = []
    for batch in reader:
        seen += batch.samples[:, 0].tolist()
        if len(seen) == 2:
            break
    assert multiprocessing.active_children() == []
    batches = iter(reader)
    seen += next(batches).samples[:, 0].tolist()
    assert len(multiprocessing.active_children()) == workers
    again = iter(reader)  # closes the one before
    assert next(batches, None) is None
    seen += next(again).samples[:, 0].tolist()
    reader.close()
    assert multiprocessing.active_children() == [] and next(again, None) is None
    seen += [value for column in first_column(reader) for value in column]
    assert seen == list(range(12))
    assert list(reader) == []


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_exception_in_the_loop_stops_the_workers(error, workers):
    reader = BatchReader(Items(), plans([1], [2], [3]), workers=workers)
    with pytest.raises(error):
        for _ in reader:
            raise error
    assert multiprocessing.active_children() == []
    with pytest.raises(error), BatchReader(Items(), plans([1], [2]), workers=workers) as other:
        batches = iter(other)
        next(batches)
        raise error
    assert multiprocessing.active_children() == []
    assert first_column(reader) == [[2], [3]]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_interrupt_while_waiting_stops_the_workers(workers):
    reader = BatchReader(Items(slow=range(100)), plans(range(10), [3]), workers=workers)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)  # as Ctrl-C would, but for this process alone
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            list(reader)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_worker_is_a_clear_error(workers):
    reader = BatchReader(Items(deadly=(7,)), plans([1], [2], [7], [3]), workers=workers, prefetch=3)
    message = (
        r"a worker .* died \(DataLoader worker .*\). If it was killed, .* try fewer workers \(now .*prefetch \(now 3\)"
    )
    with pytest.raises(RuntimeError, match=message):
        list(reader)


BAD_PLANS = {
    "index too high": (torch.tensor([1, 100]), ValueError, "plans: got index 100, expected 0 to 99"),
    "index below zero": (torch.tensor([-1]), ValueError, "plans: got index -1, expected 0 to 99"),
    "two dimensions": (
        torch.tensor([[1]]),
        ValueError,
        r"plans: got a tensor of shape \(1, 1\), expected one dimension",
    ),
    "floats": (torch.tensor([1.0]), TypeError, "plans: got torch.float32, expected tensors of torch.int64"),
    "list": ([1, 2], TypeError, "plans: got list, expected tensors of torch.int64"),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("case", BAD_PLANS)
def test_bad_plans_are_told_in_their_turn(case, workers):
    bad, error, message = BAD_PLANS[case]
    seen = []
    with pytest.raises(error, match=message):
        for batch in BatchReader(Items(), iter([torch.tensor([3]), bad, torch.tensor([4])]), workers=workers):
            seen += batch.samples[:, 0].tolist()
    assert seen == [3]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_the_plans_raise_is_raised(workers):
    def failing():
        yield torch.tensor([1])
        raise ZeroDivisionError("a plan's own")

    batches = iter(BatchReader(Items(), failing(), workers=workers))
    assert next(batches).samples[0, 0] == 1
    with pytest.raises(ZeroDivisionError, match="a plan's own"):
        next(batches)


ODD_ROWS = {
    "number": (7.0, TypeError, "items: got float as sample 2, expected a tensor"),
    "other shape": (
        torch.zeros(4),
        ValueError,
        r"items: got sample 2 of shape \(4,\) and torch.float32, expected \(3,\)",
    ),
    "other dtype": (
        torch.zeros(3).long(),
        ValueError,
        r"items: got sample 2 of shape \(3,\) and torch.int64, expected \(3,\)",
    ),
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("case", ODD_ROWS)
def test_odd_rows(case, workers):
    row, error, message = ODD_ROWS[case]
    with pytest.raises(error, match=message):
        list(BatchReader(Items(odd={2: row}), plans([1, 2]), workers=workers))


BAD_CALLS = {
    "workers": (lambda: BatchReader(Items(), plans(), workers=-1), ValueError, "workers: got -1, expected at least 0"),
    "prefetch": (lambda: BatchReader(Items(), plans(), prefetch=0), ValueError, "prefetch: got 0, expected at least 1"),
    "on_damage": (
        lambda: BatchReader(Items(), plans(), on_damage="ignore"),
        ValueError,
        "on_damage: got 'ignore', expected 'stop' or 'skip'",
    ),
    "items": (
        lambda: BatchReader(iter([]), plans()),
        TypeError,
        "items: got list_iterator, expected a map-style data set",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls(case):
    call, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=message):
        call()


KILLED = """
import multiprocessing, os, signal, torch
from gradmix.training.data.batch_reader import BatchReader
multiprocessing.set_start_method("spawn")
batches = iter(BatchReader(torch.arange(9.0), (torch.tensor([3, 1]) for _ in range(100)), workers=1))
print(next(batches).samples.tolist(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_workers_started_afresh_read_and_die_with_their_parent(tmp_path):
    path = str(Path(gradmix.__file__).parent.parent)
    # Workers inherit the pipe, so that its end is reached when the last of them is gone.
    with subprocess.Popen(
        [sys.executable, "-c", KILLED],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
    ) as process:
        output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == -signal.SIGKILL and output == b"[3.0, 1.0]\n"


KILLED_EARLY = """
import os, signal, time, torch
from gradmix.training.data import batch_reader
begin = batch_reader._apart
def late(parent, worker):
    while os.getppid() == parent:
        time.sleep(0.01)
    begin(parent, worker)
batch_reader._apart = late
def plans():
    os.kill(os.getpid(), signal.SIGKILL)  # asked for when the workers have been started
    yield
next(iter(batch_reader.BatchReader(torch.arange(9.0), plans(), workers=2)))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="workers are to be forked")
def test_workers_end_whose_parent_was_killed_before_they_began(tmp_path):
    path = str(Path(gradmix.__file__).parent.parent)
    # Workers inherit the pipe, so that its end is reached when the last of them is gone.
    with subprocess.Popen(
        [sys.executable, "-c", KILLED_EARLY],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
    ) as process:
        process.communicate(timeout=600)
    assert process.returncode == -signal.SIGKILL


SIGNALLED = """
import os, signal, torch
from gradmix.training.data.batch_reader import BatchReader
arrived = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: arrived.append(number))
batches = iter(BatchReader(torch.arange(9.0), (torch.tensor([3, 1]) for _ in range(100)), workers=2))
next(batches)
for number in (signal.SIGINT, signal.SIGTERM):
    os.killpg(0, number)
print(sum(len(batch.samples) for batch in batches), len(arrived))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="the system has no process groups")
def test_signals_to_all_processes_of_a_command_do_not_reach_the_workers(tmp_path):
    path = str(Path(gradmix.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        start_new_session=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.stdout.split() == ["198", "2"], done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
@pytest.mark.parametrize("workers", [0, 1])
def test_without_cuda_nothing_is_pinned(workers):
    (batch,) = BatchReader(Items(), plans([1]), workers=workers, pin_memory=True)
    assert not batch.samples.is_pinned()


@pytest.mark.gpu
@pytest.mark.parametrize("workers", WORKERS)
def test_rows_are_pinned_beside_a_gpu_in_use(workers):
    on_device = torch.ones(1, device="cuda")
    items = Items(damaged=(2,), shape=(3, 8, 8), dtype=torch.uint8)
    with pytest.warns(UserWarning, match="sample 2 is left out"):
        first, second = BatchReader(items, plans([1, 2], [3]), workers=workers, pin_memory=True, on_damage="skip")
    assert first.samples.is_pinned() and second.samples.is_pinned()
    assert first.kept.tolist() == [True, False] and second.kept is None
    assert (second.samples.to("cuda", non_blocking=True) * on_device).sum().item() == 3 * 3 * 64
