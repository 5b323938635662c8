"""What an estimator is, and how it is found by name."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

from jaxtyping import Array, Float

from gptoss_jax.quant.cells import Cells


@runtime_checkable
class Estimator(Protocol):
    """What `fake_quant` needs of an estimator: a frozen dataclass whose fields are its hyperparameters, a static argument of the program.

    Attributes:
      name: of the registry, in configs and checkpoints.
      needs_input: False: nothing is kept for the backward pass, and `backward` gets None for the cells and the gradient as it is. True: the input
        is kept, cells and gradient come as float32 blocks [*batch, C, Q].
      linear: the backward pass is linear in the gradient, so that forward mode exists too (`fake_quant(..., mode="jvp")`).
    """

    name: ClassVar[str]
    needs_input: ClassVar[bool]
    linear: ClassVar[bool]

    def backward(self, cells: Cells | None, grad: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """dL/dx from dL/dw, in the shape of `grad`."""


_ESTIMATORS: dict[str, type] = {}
_Class = TypeVar("_Class", bound=type)


def register_estimator(cls: _Class) -> _Class:
    """Class decorator: makes a frozen dataclass known by its `name`, to `get_estimator`, configs and checkpoints.

    Raises:
      TypeError: no frozen dataclass, or a part of the protocol is missing.
      ValueError: the name is taken by another class.
    """
    parts = ("name", "needs_input", "linear", "backward")
    missing = [part for part in parts if not hasattr(cls, part)]
    if missing or not dataclasses.is_dataclass(cls) or not cls.__dataclass_params__.frozen:
        raise TypeError(f"{cls.__name__} is no estimator: {'it lacks ' + ', '.join(missing) if missing else 'it must be a frozen dataclass'}")
    taken = _ESTIMATORS.get(cls.name)
    # a cell of a notebook that is run again defines the same class anew
    if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"estimator name {cls.name!r} is taken by {taken.__module__}.{taken.__qualname__}")
    _ESTIMATORS[cls.name] = cls
    return cls


def estimator_names() -> tuple[str, ...]:
    """All registered names."""
    return tuple(_ESTIMATORS)


def get_estimator(estimator: str | Estimator, **hyperparameters: float) -> Estimator:
    """The estimator itself, or the one of a name with these hyperparameters: `get_estimator("dge", k=5, c=3)`.

    Raises:
      ValueError: unknown name or hyperparameter, or a bad value.
      TypeError: neither a name nor an estimator, or hyperparameters for an object that has them.
    """
    if isinstance(estimator, str):
        return estimator_from_dict({"name": estimator, **hyperparameters})
    if not isinstance(estimator, Estimator):
        raise TypeError(f"an estimator is a name or an Estimator object, not {estimator!r}")
    if hyperparameters:
        raise TypeError(f"{estimator!r} has its hyperparameters already")
    return estimator


def estimator_to_dict(estimator: Estimator) -> dict[str, Any]:
    """Plain values from which `estimator_from_dict` makes an equal object."""
    return {"name": estimator.name, **dataclasses.asdict(estimator)}


def estimator_from_dict(raw: Mapping[str, Any]) -> Estimator:
    """Inverse of `estimator_to_dict`; missing hyperparameters take their defaults.

    Raises:
      ValueError: no or unknown name, unknown hyperparameter or bad value.
    """
    fields = dict(raw)
    name = fields.pop("name", None)
    if name not in _ESTIMATORS:
        near = difflib.get_close_matches(str(name), _ESTIMATORS, n=1, cutoff=0.0)
        raise ValueError(f"unknown estimator {name!r}; nearest is {near[0]!r}, known are {', '.join(_ESTIMATORS)}")
    known = [f.name for f in dataclasses.fields(_ESTIMATORS[name])]
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise ValueError(f"estimator {name!r} has no hyperparameter {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    for key, value in fields.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"estimator {name!r}: {key} must be a number, not {value!r}")
    return _ESTIMATORS[name](**fields)


def require(estimator: Any, **ranges: tuple[float, float]) -> None:
    """Checks hyperparameters against [low, high], for `__post_init__`.

    Raises:
      ValueError: naming the estimator, the field and the range.
    """
    for field, (low, high) in ranges.items():
        value = getattr(estimator, field)
        if not low <= value <= high:
            raise ValueError(f"estimator {estimator.name!r}: {field} must lie in [{low:g}, {high:g}], not {value!r}")
