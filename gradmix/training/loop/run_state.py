"""The state from which a run goes on: all that the rest of it depends on, checked before any of it is taken up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from gradmix.training.data.samples import StoredSamples, TensorSamples
from gradmix.training.loop.random_state import restore_rng, rng_state
from gradmix.training.loop.state_checks import require_like, require_number, require_order, require_tensor

if TYPE_CHECKING:
    from gradmix.training.loop.run import Run


def state_dict(run: Run) -> dict[str, Any]:
    """Everything the rest of the run depends on, between two steps."""
    assert run.optimiser is not None
    schedule = run.schedule.state_dict()
    return {
        **run.position.state_dict(),
        "diverged": run.losses.has_diverged(),
        "width": run.width,
        "model": run.model.state_dict(),
        "optimiser": run.optimiser.state_dict(),
        # A Counter is no plain dictionary.
        "schedule": {**schedule, "milestones": dict(schedule["milestones"])},
        "scaler": run.scaler.state_dict(),
        "buffer": run.buffer.state_dict(),
        "sampler": run.sampler.state_dict(),
        "method": run.method.state_dict(),
        "generators": _generators(run),
        "global_generators": rng_state(run.device),
        **run.records.state_dict(),
        "clock": run.clock.state_dict(),
        "step_times": run.clock.steps.state_dict(),
        "seconds_total": run.seconds_total(),
        "peak_memory": run.peak_memory(),
    }


def _generators(run: Run) -> dict[str, Tensor]:
    """Return the state of each generator, by purpose."""
    return {purpose: generator.get_state() for purpose, generator in run.generators.items()}


def _check(run: Run, state: Mapping[str, Any]) -> None:
    """Refuse a state that cannot be this run's, as far as that is known before any of it is taken up."""
    run.position.check(state, tasks=len(run.stream.tasks), epochs=run.epochs)
    require_number(state["width"], run.width, run.stream.num_classes, "width")
    require_number(state["peak_memory"], 0, torch.iinfo(torch.int64).max, "peak_memory")
    require_like(state["seconds_total"], 0.0, "seconds_total")
    require_like(state["clock"], {str(section): 0.0 for section in state["clock"]}, "clock")
    if "step_times" in state:
        run.clock.steps.check(state["step_times"])
    require_like(state["generators"], _generators(run), "generators")
    known = rng_state(run.device)
    require_like(state["global_generators"]["numpy"], known["numpy"], "global_generators.numpy")
    require_like(state["global_generators"]["torch"], known["torch"], "global_generators.torch")
    run.records.check(state, num_classes=run.stream.num_classes)


def _check_optimiser(run: Run, state: Mapping[str, Any]) -> None:
    """The same of the model's width, and what belongs to the optimiser, which have to be there for it."""
    assert run.optimiser is not None
    require_like(state["model"], dict(run.model.state_dict()), "model")
    known = run.optimiser.state_dict()
    groups = state["optimiser"]["param_groups"]
    require_like(groups, known["param_groups"], "optimiser.param_groups")
    # All but the rate, which has its course, is as configured.
    if [{**group, "lr": 0.0} for group in groups] != [{**group, "lr": 0.0} for group in known["param_groups"]]:
        raise ValueError("optimiser.param_groups: got other settings than this run's")
    parameters = [p for group in run.optimiser.param_groups for p in group["params"]]
    for number, kept in state["optimiser"]["state"].items():
        require_number(number, 0, len(parameters) - 1, "optimiser.state")
        buffer = kept["momentum_buffer"]
        if buffer is not None:
            require_like(buffer, parameters[number].detach(), f"optimiser.state.{number}")
    schedule = run.schedule.state_dict()
    require_like(state["schedule"], {**schedule, "milestones": dict(schedule["milestones"])}, "schedule")
    require_like(state["scaler"], run.scaler.state_dict(), "scaler")


def _check_buffer(run: Run) -> None:
    """The same of the buffer that has been loaded, and of what counts its samples: the order of an epoch."""
    train, num_classes = run.stream.tasks[run.position.task].train, run.stream.num_classes
    held = len(run.buffer)
    if held:
        samples, labels = run.buffer.part(0, 1)[0], run.buffer.y
        if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
            raise ValueError(f"buffer: got labels that are none of the stream's {num_classes} classes")
        if run.keeps_numbers:
            require_tensor(samples, torch.int64, (1,), "buffer.x")
            highest = len(cast(StoredSamples, train).items) - 1
            if int(run.buffer.x.min()) < 0 or int(run.buffer.x.max()) > highest:
                raise ValueError("buffer.x: got samples that the data set does not have")
        elif isinstance(train, TensorSamples):
            require_tensor(samples, train.x.dtype, (1, *train.shape), "buffer.x")
        if run.method.needs.extras:
            for name, like in run.extras(*run.buffer.part(0, 1)).items():
                shape = (held, *like.shape[1:])
                require_tensor(run.buffer.extras.get(name), like.dtype, shape, f"buffer.extras.{name}")
    mingled = held if run.config.replay.stream == "shuffled" and run.method.needs.replayed else 0
    require_order(run.position.order, len(train) + mingled, "order")
    assert run.position.order is not None and run.config.optim.batch is not None
    require_number(run.position.batches_done, 0, -(-len(run.position.order) // run.config.optim.batch), "batches_done")


def load_state_dict(run: Run, state: Mapping[str, Any]) -> None:
    """Continue a run from a state of :func:`state_dict`; after an error, the run is not to be continued."""
    _check(run, state)
    run.position.load_state_dict(state)
    # Earlier versions did not look.
    run.losses.restore(state.get("diverged", False))
    if state["width"] != run.width:
        run.grow_to(state["width"])
    run.model.load_state_dict(state["model"])
    run.start_optimiser()
    assert run.optimiser is not None
    _check_optimiser(run, state)
    run.optimiser.load_state_dict(state["optimiser"])
    milestones = type(run.schedule.milestones)(state["schedule"]["milestones"])
    run.schedule.load_state_dict({**state["schedule"], "milestones": milestones})
    run.scaler.load_state_dict(state["scaler"])
    run.buffer.load_state_dict(state["buffer"])
    run.sampler.load_state_dict(state["sampler"])
    run.method.load_state_dict(_to_device(state["method"], run.device))
    for purpose, generator in run.generators.items():
        generator.set_state(state["generators"][purpose])
    restore_rng(state["global_generators"], run.device)
    run.records.load_state_dict(state)
    _check_buffer(run)
    run.clock.load_state_dict(state["clock"])
    # Earlier versions did not keep them: then they are those of the steps to come.
    if "step_times" in state:
        run.clock.steps.load_state_dict(state["step_times"])
    run.seconds_before, run.peak_before = state["seconds_total"], state["peak_memory"]


def _to_device(value: Any, device: torch.device) -> Any:
    """A state with its tensors on a device; generators' states, which are bytes, belong on the CPU."""
    if isinstance(value, Tensor):
        return value if value.dtype == torch.uint8 else value.to(device)
    if isinstance(value, dict):
        return {k: _to_device(v, device) for k, v in value.items()}
    return [_to_device(v, device) for v in value] if isinstance(value, list) else value
