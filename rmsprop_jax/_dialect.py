"""What a dialect is: the arguments of a framework's optimizer, and what becomes of each of them."""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec

import jax
import optax

from . import _checks, _equality, _placement
from ._rmsprop import rmsprop


__all__ = ["DIALECTS", "Dialect", "Recipe", "dialect", "dialect_of"]
_P = ParamSpec("_P")


class Recipe(NamedTuple):
    """What a call of a dialect stands for."""

    options: dict[str, Any]  # of `rmsprop`, beside those that the dialect's arguments are by name
    before: tuple[optax.GradientTransformation, ...] = ()  # in front of it in the chain
    accumulate: int | None = None  # one update for the mean of so many gradients


class Dialect(NamedTuple):
    """What becomes of each argument: it is in one of `honoured`, `refused` and `inert`."""

    function: Callable[..., Recipe]
    signature: inspect.Signature
    framework: str  # the class, function or paper whose rule it is
    learning_rate: float | None  # the framework's default
    named: dict[str, str]  # arguments that are an option of `rmsprop`
    honoured: dict[str, tuple[str, ...]]  # these and others, with their options or fields of the recipe
    refused: dict[str, tuple[Any, str]]  # the value that asks for nothing, or the argument that has it; a way out
    inert: list[str]  # arguments that only say how to compute

    @property
    def own(self) -> str:
        """The framework's name for the learning rate."""
        return next(iter(self.signature.parameters))

    def arguments(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """All arguments of a call by name, the learning rate under the framework's name for it."""
        parameters = self.signature.parameters
        try:
            given = self.signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise TypeError(f"{error}: {self.function.__name__} takes {', '.join(parameters)}") from None
        rates = {name: given.pop(name) for name in (self.own, "learning_rate") if given.get(name) is not None}
        if len(rates) > 1:
            raise ValueError(
                f"{self.own} and learning_rate are two names of one argument: pass one of them, got {rates}"
            )
        name, rate = next(iter(rates.items()), (self.own, self.learning_rate))
        if not (rate is None or callable(rate)):
            rate = _checks.number(name, rate, lower=-math.inf)
        return {p.name: p.default for p in parameters.values()} | given | {self.own: rate}

    def recipe(self, arguments: dict[str, Any]) -> Recipe:
        """What a call with these arguments stands for, with all options of `rmsprop` that act."""
        for name, (neutral, remedy) in self.refused.items():
            other = neutral if isinstance(neutral, str) else None
            _checks.refuse(name, arguments[name], neutral if other is None else arguments[other], remedy, other)
        for name, option in self.named.items():  # here, because `rmsprop` does not know this name
            has_value = arguments[name] is not None or self.signature.parameters[name].default is not None
            if option in _RENAMED and has_value:
                _RENAMED[option](name, arguments[name])
        flags = [name for name in self.honoured if isinstance(self.signature.parameters[name].default, bool)]
        arguments = arguments | {name: _checks.flag(name, arguments[name]) for name in flags}
        recipe = self.function(**arguments)
        named = {option: arguments[name] for name, option in self.named.items()}
        return recipe._replace(options=_acting({"learning_rate": arguments[self.own]} | named | recipe.options))


# What the frameworks call the options of `rmsprop`.
_NAMES = {
    **dict.fromkeys(("decay", "alpha", "rho", "beta2", "squared_gradient_momentum"), "decay"),
    **dict.fromkeys(("eps", "epsilon", "min_squared_gradient"), "eps"),
    **dict.fromkeys(("centered", "centred"), "centered"),
    **{name: name for name in ("momentum", "lr_in_momentum", "weight_decay", "weight_decay_mask", "state_dtype")},
}
# The checks of the numbers among them that have several names.
_RENAMED = {"decay": _checks.share, "eps": _checks.number}
# All dialects by their functions, in the order of definition.
DIALECTS: dict[Callable[..., Any], Dialect] = {}


def dialect(
    framework: str, learning_rate: float | None = None, *, converted: Any = None, refused: Any = None, inert: str = ""
) -> Callable[[Callable[_P, Recipe]], Callable[_P, optax.GradientTransformationExtraArgs]]:
    """Makes a function that returns a recipe a function that returns the transformation.

    An argument that is called as in `_NAMES` is that option of `rmsprop`, and the function need not look at it.
    `converted` says of which arguments the function itself makes an option or a field of the recipe.
    """

    def decorate(function: Callable[_P, Recipe]) -> Callable[_P, optax.GradientTransformationExtraArgs]:
        @functools.wraps(function)
        def make(*args: _P.args, **kwargs: _P.kwargs) -> optax.GradientTransformationExtraArgs:
            arguments = facts.arguments(*args, **kwargs)
            if arguments[facts.own] is None:
                raise ValueError(f"{function.__name__} needs {facts.own}: {framework} has no default")
            recipe = facts.recipe(arguments)
            tx = rmsprop(**recipe.options)
            tx = optax.chain(*recipe.before, tx) if recipe.before else tx
            tx = tx if recipe.accumulate is None else _accumulated(tx, recipe.accumulate)
            return _equality.equal_by_arguments(optax.with_extra_args_support(tx), (function, *arguments.items()))

        signature = inspect.signature(function).replace(return_annotation=optax.GradientTransformationExtraArgs)
        setattr(make, "__signature__", signature)  # noqa: B010 (functions do not declare it)
        make.__annotations__ = function.__annotations__ | {"return": signature.return_annotation}

        own, *others = signature.parameters
        places: dict[str, tuple[str, ...]] = {}
        for place, names in (converted or {}).items():
            for name in names.split():
                places[name] = (*places.get(name, ()), place)
        told = {own, "learning_rate", *places, *(refused or ()), *inert.split()}
        named = {name: _NAMES[name] for name in others if name not in told}
        places |= {name: (option,) for name, option in named.items()}
        facts = Dialect(function, signature, framework, learning_rate, named, places, refused or {}, inert.split())
        DIALECTS[make] = facts
        return make

    return decorate


def dialect_of(function: Callable[..., Any]) -> Dialect:
    """What becomes of the arguments of a function of this module."""
    if function not in DIALECTS:
        raise TypeError(f"{function!r} is not a dialect: allowed are {', '.join(d.__name__ for d in DIALECTS)}")
    return DIALECTS[function]


# --- From arguments to a transformation -------------------------------------------------------------------


def _acting(options: dict[str, Any]) -> dict[str, Any]:
    """The options without those of a momentum or a weight decay that is off, by None or by 0."""
    idle: set[str] = set()
    momentum, weight_decay = options.get("momentum"), options.get("weight_decay")
    if _checks.off(momentum) is None:
        idle |= {"momentum", "lr_in_momentum", "nesterov"}
    if _checks.off(weight_decay) is None:
        # A mask beside 0 is that of a sweep. Beside None it is a mistake.
        idle |= {"weight_decay", "decoupled"} | ({"weight_decay_mask"} if weight_decay is not None else set())
    return {name: value for name, value in options.items() if name not in idle}


def _accumulated(tx: optax.GradientTransformation, k: int) -> optax.GradientTransformationExtraArgs:
    """One update for the mean of k gradients, with a state that lies where the parameters lie."""
    steps: Any = optax.MultiSteps(tx, k)

    def init(params: optax.Params) -> optax.MultiStepsState:
        # Otherwise the first update would move the state, and the second would compile again.
        state = steps.init(params)
        return state._replace(
            mini_step=_placement.zero_count(params),
            gradient_step=_placement.zero_count(params),
            acc_grads=jax.tree.map(lambda p, g: _placement.full_like(p, 0, g.dtype), params, state.acc_grads),
        )

    return optax.GradientTransformationExtraArgs(init, steps.update)
