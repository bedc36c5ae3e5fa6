"""The end of a step, rehearsed before anything starts: each rank's optimizer and learning-rate schedule, on copies.

Every rank calls the user's functions with its own parameters only. That trains what the unsplit model trains as long as
they choose by a parameter's name, attributes, shape or values. So they are called for all parameters, then for each
rank's, and what they chose must be the same for each parameter, before and after a step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from modelpar.errors import ConfigError, describe
from modelpar.run import wire
from modelpar.run.update import Settings, cannot_clip, make_optimizer

Named = Mapping[str, nn.Parameter]
"""Parameters by FQN."""

_TREATED_ALONE = "expected a function that treats each parameter by itself, since every rank calls it with its own only"


@dataclass(frozen=True)
class _Choice:
    """What the functions chose for one parameter: the optimizer, and its options before and after a step."""

    optimizer: str
    before: dict[str, Any]
    after: dict[str, Any]


def rehearse(settings: Settings, model: nn.Module, ranks: Sequence[Named], *, on_cpu: bool = True) -> Settings:
    """Returns the settings with the names of the unsplit optimizer's first group; `ranks` is what each rank trains.

    Raises ConfigError for what cannot work on ranks that each hold a part of the parameters. `on_cpu` says that this is
    where they will be, so that whatever fails here would fail there.
    """
    if settings.max_norm is not None and not settings.max_norm > 0:
        raise ConfigError(f"max_norm is {settings.max_norm}; expected a number above 0, or None")
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if settings.optimizer is None or not trainable:
        return settings
    sparse = _sparse(model)
    if settings.max_norm is not None and sparse:
        raise cannot_clip(min(sparse))
    whole = _Rehearsal(settings, "")
    of_all, writes = whole.of_stand_ins(trainable), False
    for rank, named in enumerate(ranks):
        if named:
            own = _Rehearsal(settings, f" on rank {rank}, for {_listed(named)}", whole.num_groups)
            there = on_cpu and not any(parameter.is_meta for parameter in named.values())
            found = own.of_copies(named, sparse) if there else own.of_stand_ins(named)
            writes |= own.writes
            if of_all is not None and found is not None:
                _check_same(rank, named, of_all, found)
    return replace(settings, first_group=frozenset(whole.first_group), writes=writes)


class _Rehearsal:
    """The user's functions, called once for some parameters."""

    def __init__(self, settings: Settings, where: str, expected_groups: int | None = None):
        self._settings, self._where, self._expected = settings, where, expected_groups
        self.num_groups: int | None = None
        self.first_group: list[str] = []
        self.writes = False
        """Whether the optimizer's function writes to parameters."""

    def of_copies(self, named: Named, sparse: set[str]) -> dict[str, _Choice]:
        """Returns what is chosen for parameters as a rank gets them; the gradients of some are sparse."""
        copies: Named = wire.receive(wire.ship_as("a parameter of the model", dict(named)))
        for name in sparse & set(copies):
            copies[name].grad = _no_rows(copies[name])
        try:
            return self._of(copies)
        except RuntimeError as error:
            raise self._refusal(error) from error

    def of_stand_ins(self, named: Named) -> dict[str, _Choice] | None:
        """Returns what is chosen for parameters without their values, where that can be found out without them."""
        for stand_in in (_without_memory, _of_zeros):
            try:
                return self._of(stand_in(named))
            except RuntimeError:  # whatever asks for values, or for a device
                continue
        return None

    def _of(self, named: Named) -> dict[str, _Choice]:
        """Returns what is chosen for each parameter that is trained; raises RuntimeError as the functions do."""
        assert self._settings.optimizer
        versions = [parameter._version for parameter in named.values()]
        with self._refusing():
            made = make_optimizer(self._settings.optimizer, list(named.items()), may_be_none=bool(self._where))
        self.writes = versions != [parameter._version for parameter in named.values()]
        if made is None:
            return {}
        self._check_kind(made)
        self.num_groups = len(made.param_groups)
        names = {id(parameter): name for name, parameter in named.items()}
        self.first_group = [names[id(p)] for p in made.param_groups[0]["params"] if id(p) in names]
        with self._refusing():
            schedule = self._settings.lr_schedule(made) if self._settings.lr_schedule else None
            if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
                raise ConfigError("ReduceLROnPlateau needs a metric; expected a schedule that depends on the step only")
            before = _options(made, names)
            made.step()
            if schedule is not None:  # some find out only now that their arguments are impossible
                schedule.step()
        after = _options(made, names)
        return {name: _Choice(type(made).__name__, before[name], after[name]) for name in after}

    def _check_kind(self, made: Any) -> None:
        if not isinstance(made, torch.optim.Optimizer):
            raise ConfigError(
                f"optimizer(named_parameters) returned {type(made).__name__}{self._where}; expected a "
                "torch.optim.Optimizer"
            )
        if isinstance(made, torch.optim.LBFGS):
            raise ConfigError(
                "LBFGS mixes the parameters of all stages; expected an optimizer that treats each one by itself"
            )

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except (ConfigError, RuntimeError):
            raise
        except Exception as error:
            raise self._refusal(error) from error

    def _refusal(self, error: Exception) -> ConfigError:
        what = str(error) if isinstance(error, (TypeError, ValueError, ArithmeticError)) else describe(error)
        hint = ""
        if self.num_groups is not None and self._expected not in (None, self.num_groups):
            hint = (
                f"; it makes {self.num_groups} parameter groups there and {self._expected} for the whole model; "
                "expected the same groups on every rank, those that are empty there with 'params': []"
            )
        what = " ".join(what.split())
        return ConfigError(f"the optimizer or its learning-rate schedule cannot be used{self._where}: {what}{hint}")


def _options(made: torch.optim.Optimizer, names: dict[int, str]) -> dict[str, dict[str, Any]]:
    """Returns the options of each parameter's group, as far as they can be compared."""
    return {
        names[id(parameter)]: {
            key: value.item() if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta else value
            for key, value in group.items()
            if key not in ("params", "param_names") and _is_plain(value)
        }
        for group in made.param_groups
        for parameter in group["params"]
        if id(parameter) in names
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, float, str)) or (isinstance(value, Tensor) and value.numel() == 1)


def _check_same(rank: int, named: Named, of_all: dict[str, _Choice], found: dict[str, _Choice]) -> None:
    """Raises ConfigError where a rank's optimizer treats a parameter otherwise than the whole model's would."""
    for name in named:
        ours, theirs = found.get(name), of_all.get(name)
        if ours == theirs:
            continue
        if ours is None or theirs is None:
            here, there = ("is", "is not") if ours else ("is not", "is")
            raise ConfigError(
                f"{name} {here} trained by the optimizer of rank {rank}, and {there} by the one that is made for the "
                f"whole model; {_TREATED_ALONE}"
            )
        differing: list[tuple[str, Any, Any]] = [("optimizer", ours.optimizer, theirs.optimizer)]
        for mine, other in ((ours.before, theirs.before), (ours.after, theirs.after)):
            differing += [(key, mine.get(key), other.get(key)) for key in {**mine, **other}]
        key, mine, other = next(found for found in differing if found[1] != found[2])
        raise ConfigError(
            f"the optimizer or its learning-rate schedule gives {name} {key} {mine!r} on rank {rank}, and "
            f"{other!r} when it is made for the whole model; {_TREATED_ALONE}"
        )


def _sparse(model: nn.Module) -> set[str]:
    """Returns the parameters whose gradients will be sparse: tables with sparse=True that nothing else uses."""
    names: defaultdict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    tables = [module for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))]
    known = [names[id(table.weight)] for table in tables if table.sparse and table.weight.requires_grad]
    return {found[0] for found in known if len(found) == 1}


def _no_rows(parameter: nn.Parameter) -> Tensor:
    """Returns a sparse gradient of no row."""
    rows = torch.empty((1, 0), dtype=torch.int64), parameter.new_empty((0, *parameter.shape[1:]))
    return torch.sparse_coo_tensor(*rows, parameter.shape, check_invariants=True)


def _without_memory(named: Named) -> Named:
    return {name: _like(parameter, torch.empty_like(parameter, device="meta")) for name, parameter in named.items()}


def _of_zeros(named: Named) -> Named:
    """Returns parameters of which all numbers are one 0 in memory."""
    return {
        name: _like(parameter, torch.zeros((), dtype=parameter.dtype).expand(parameter.shape))
        for name, parameter in named.items()
    }


def _like(parameter: nn.Parameter, value: Tensor) -> nn.Parameter:
    """Returns a parameter of this value, with the class and the attributes of another."""
    made: nn.Parameter = Tensor._make_subclass(type(parameter), value.detach(), parameter.requires_grad)
    vars(made).update(vars(parameter))
    return made


def _listed(named: Named) -> str:
    first, *others = named
    return f"{first} … {others[-1]}" if others else first
