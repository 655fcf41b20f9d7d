"""Training steps of a module and an optimizer as functions that can be differentiated."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from bilevel.spaces.tree import leaves
from bilevel_torch.training.calls import Caller, Tensors, modes, modes_of
from bilevel_torch.training.check import Update, check_unchanged, check_update
from bilevel_torch.training.clipping import clipped, limits_of
from bilevel_torch.training.gradients import gradients, micro_batches
from bilevel_torch.training.groups import OptionsFunction, flags_of, numbers_of, replaced
from bilevel_torch.training.names import check_modules, trained_names
from bilevel_torch.training.recomputation import check_graph
from bilevel_torch.training.recording import recording
from bilevel_torch.training.rules import Options, Slots, rule_of
from bilevel_torch.training.schedule import Schedule
from bilevel_torch.training.state import TrainingState, slots_of, to_torch

T = TypeVar("T")
Loss = Callable[[Any, Any, Any], torch.Tensor]


class TrainingStep:
    """One step of a training loop as a function (state, hparams, batch) → state.

    A step computes a loss and its gradient, clips the gradient, and updates the weights as the optimizer does. The
    values equal the values of the ordinary loop, to rounding. Derivatives by the state and hparams are right for
    momentum, clipping, running statistics, and gradients of exactly zero. The model, the optimizer and the scheduler
    do not change.

    The training mode of each module, its frozen parameters and the options of the optimizer are those at the
    construction. Hooks of parameters and of the optimizer do not run. A derivative repeats steps, so the loss may
    depend only on its arguments and on the random state of torch.

    Args:
        model: the module. Its mode, ``train()`` or ``eval()``, is the mode of each step.
        optimizer: SGD, ASGD, Rprop, Adam, AdamW, NAdam, RAdam, Adamax, Adadelta, Adagrad or RMSprop of `torch.optim`.
            Each parameter that it trains must belong to the model.
        loss: (model, hparams, batch) → a scalar. It may call any method of the model that it is given.
        scheduler: a scheduler of the optimizer, stepped once after each step.
        clip_norm: the largest norm of the gradients of all trained weights, as in `torch.nn.utils.clip_grad_norm_`.
        clip_value: the largest entry of a gradient, as in `torch.nn.utils.clip_grad_value_`.
        accumulate: the number k of micro-batches of a step. If k > 1, a batch is a list of k micro-batches, and the
            loss is the mean of their losses.
        options: (hparams, t, group) → a dict of options that replace the group's: numbers, or 0-d tensors with a graph
            to hparams. t is the number of the step. ``group`` has the ``index`` of the group and its numeric options
            in this step, for example ``lr`` of the scheduler, ``betas`` as a tuple, ``clip_norm`` or ``clip_value``.

    Raises:
        TypeError: for another optimizer, a scheduler that needs a metric, complex weights, SyncBatchNorm, or
            DistributedDataParallel.
        ValueError: for a trained parameter that is not in the model, a wrong limit or number of micro-batches, or an
            option that is a tensor with a gradient.

    >>> import torch, bilevel_torch
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.zeros_(model.weight)
    >>> loss = lambda model, hparams, batch: ((model(batch) - 1) ** 2).mean()
    >>> lr = lambda hparams, t, group: {"lr": hparams["lr"]}
    >>> step = bilevel_torch.TrainingStep(model, torch.optim.SGD(model.parameters(), 0.1), loss, options=lr)
    >>> state = step(step.init(), {"lr": torch.tensor(0.25)}, torch.ones(4, 1))
    >>> state.params["weight"], state.step
    (tensor([[0.5000]]), 1)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Loss,
        *,
        scheduler: LRScheduler | None = None,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        accumulate: int = 1,
        options: OptionsFunction | None = None,
    ) -> None:
        self._rule = rule_of(optimizer)
        check_modules(model)
        self._limits = limits_of(clip_norm=clip_norm, clip_value=clip_value)
        if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
            raise ValueError(f"accumulate: expected a number of micro-batches >= 1, got {accumulate!r}.")
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self._loss, self._accumulate, self._options = loss, accumulate, options
        self._names = trained_names(model, optimizer)
        self._flags, self._schedule = flags_of(optimizer), Schedule(optimizer, scheduler)
        self._caller, self._training = Caller(model), modes_of(model)
        self._loaded = 0  # the step at which the model, the optimizer and the scheduler are
        self._checked = self._graph_checked = False

    def init(self) -> TrainingState:
        """Return the state from the present values of the model and the optimizer, as copies.

        Raises:
            ValueError: if the optimizer's options or the scheduler have changed since the construction or the last
                `load`.
        """
        numbers = self._schedule.at(self._loaded)
        if (now := numbers_of(self.optimizer)) != numbers:
            raise ValueError(
                f"optimizer: its options have changed since this TrainingStep was constructed: {numbers} before, {now} "
                "now. Construct a new TrainingStep."
            )
        if self.scheduler is not None and not self._schedule.is_at(self._loaded, self.scheduler):
            raise ValueError(
                "scheduler: it has moved since this TrainingStep was constructed. Construct a new TrainingStep."
            )
        params = dict(self.model.named_parameters())
        slots = {
            name: slots_of(
                self._rule, params[name], {**self._flags[i], **numbers[i]}, self.optimizer.state.get(params[name], {})
            )
            for i, names in enumerate(self._names)
            for name in names
        }
        return TrainingState(
            {name: params[name].detach().clone() for name in slots},
            {name: buffer.detach().clone() for name, buffer in self.model.named_buffers()},
            slots,
            self._loaded,
        )

    def load(self, state: TrainingState) -> None:
        """Write a state into the model, the optimizer and the scheduler.

        The optimizer receives the options of the scheduler, not the ones from the function ``options``.
        """
        params = dict(self.model.named_parameters())
        buffers = dict(self.model.named_buffers())
        with torch.no_grad():
            for name, tensor in state.params.items():
                params[name].copy_(tensor)
            for name, tensor in state.buffers.items():
                buffers[name].copy_(tensor)
        slots = {id(params[name]): to_torch(self.optimizer, kept) for name, kept in state.optimizer.items()}
        given = self.optimizer.state_dict()
        kept: dict[int, Slots] = {}
        for saved, group, numbers in zip(
            given["param_groups"], self.optimizer.param_groups, self._schedule.at(state.step), strict=True
        ):
            saved.update(numbers)
            kept |= {i: slots[id(p)] for i, p in zip(saved["params"], group["params"], strict=True) if slots.get(id(p))}
        self.optimizer.load_state_dict({"state": kept, "param_groups": given["param_groups"]})
        if self.scheduler is not None and (scheduled := self._schedule.state_dict(state.step)) is not None:
            self.scheduler.load_state_dict(scheduled)
        self._loaded = state.step

    def evaluate(self, state: TrainingState, function: Callable[..., T], *args: Any) -> T:
        """Return ``function(model, *args)`` for the weights and buffers in a state, in evaluation mode.

        The result carries a graph to the state, also through running statistics. Use it for outer objectives. The model
        and the state do not change.

        Raises:
            RuntimeError: for a result that carries a graph, if the function uses `torch.utils.checkpoint`.
        """
        record = torch.is_grad_enabled() and any(buffer.requires_grad for buffer in state.buffers.values())
        with modes(dict.fromkeys(self._training, False)):
            result = self._caller.call(state.params, state.buffers, function, args, record)[0]
            outputs = [leaf for leaf in leaves(result) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
            check_graph("function", self._caller, state.params, state.buffers, outputs)
        return result

    def __call__(self, state: TrainingState, hparams: Any, batch: Any) -> TrainingState:
        """Return the state after one step, with a graph to the tensors in the arguments that require gradients.

        Raises:
            TypeError, ValueError: for a loss, a batch or options that do not fit; for a buffer that changes without a
            graph.
            RuntimeError: in the first call, if the optimizer of torch makes another step from the same gradient. In
                the first call with a graph, if the gradient has no derivative, or if the loss uses
                `torch.utils.checkpoint`.
        """
        if not isinstance(state, TrainingState):
            raise TypeError(f"state: expected the result of TrainingStep.init, got {type(state).__name__}.")
        # Most often, the weights tell. To list all leaves takes longer.
        recorded = any(param.requires_grad for param in state.params.values()) or _recorded([state, hparams])
        record = recorded and recording() and torch.is_grad_enabled()
        check = record and not self._graph_checked
        batches = micro_batches(batch, self._accumulate)
        before = None if self._checked else {name: param.detach().clone() for name, param in state.params.items()}
        with torch.enable_grad(), modes(self._training):
            params = {name: _input(param, record) for name, param in state.params.items()}
            grads, buffers = gradients(self._caller, params, state.buffers, self._loss, hparams, batches, record, check)
            if check:
                check_graph("loss", self._caller, params, state.buffers, [g for g in grads.values() if g.requires_grad])
                self._graph_checked = True
        with torch.set_grad_enabled(record):
            options = self._options_at(hparams, state.step)
            of_groups = [{name: grads[name] for name in names if name in grads} for names in self._names]
            of_groups = clipped(of_groups, options)
            after, slots = self._updated(params, state.optimizer, of_groups, options)
        if not record:
            after, buffers = ({name: t.detach() for name, t in tensors.items()} for tensors in (after, buffers))
        if before is not None:
            check_unchanged(before, state.params)
            updates = [
                [Update(params[name], grads_.get(name), state.optimizer[name], after[name]) for name in names]
                for names, grads_ in zip(self._names, of_groups, strict=True)
            ]
            check_update(self.optimizer, updates, options)
            self._checked = True
        return TrainingState(after, buffers, slots, state.step + 1)

    def _updated(
        self, params: Tensors, slots: dict[str, Slots], grads: list[Tensors], options: list[Options]
    ) -> tuple[Tensors, dict[str, Slots]]:
        """Return the weights and slots after the update. A weight without a gradient keeps both."""
        params, slots = dict(params), dict(slots)
        for of_group, numbers in zip(grads, options, strict=True):
            for name, grad in of_group.items():
                param, kept = self._rule.update(params[name], grad, slots[name], numbers)
                params[name] = _like(params[name], param)
                slots[name] = {key: _like(slots[name][key], slot) for key, slot in kept.items()}
        return params, slots

    def _options_at(self, hparams: Any, t: int) -> list[Options]:
        """Return all options of each group at a step."""
        groups = []
        for i, (flags, numbers) in enumerate(zip(self._flags, self._schedule.at(t), strict=True)):
            numbers = {**numbers, **self._limits}
            if self._options is not None:
                numbers = replaced(i, numbers, self._options(hparams, t, {"index": i, **numbers}))
            groups.append({**flags, **numbers})
        return groups


def _recorded(tree: Any) -> bool:
    """Return whether a tree has a tensor with a graph."""
    return any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves(tree))


def _input(param: torch.Tensor, record: bool) -> torch.Tensor:
    """Return a weight that the loss can be differentiated by, with its graph only if a graph is recorded."""
    return param if record and param.requires_grad else param.detach().requires_grad_()


def _like(before: Any, after: Any) -> Any:
    """Return a weight or slot in the dtype that it had: options may be tensors of a wider one."""
    return after.to(before.dtype) if isinstance(after, torch.Tensor) and after.dtype != before.dtype else after
