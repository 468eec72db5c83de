"""From the command line to a `Config`: every mistake at once, each with the nearest valid choice.

tyro makes the parser and the help of the dataclasses; what it would refuse one mistake at a time is looked for first.
"""

import dataclasses
import difflib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro

from vishwamai_eqx import gemma_names, saved_config
from vishwamai_eqx.config import PRESETS, Config, ProcessesConfig, nearest, to_dict

Settings = TypeVar("Settings")
# Peak learning rate where weights are trained already: a preset's own would undo them.
FINE_TUNING_RATE = 2e-5


def parse(
    argv: Sequence[str],
    description: str | None = None,
    problems: Callable[[Config], list[str]] = lambda config: [],
) -> Config:
    """The configuration that the arguments ask for.

    Settings that are not given come from the run that is resumed, if there is one, and else from the preset. Raises
    ValueError with a line for each mistake: arguments that mean nothing, settings that the resumed run has otherwise,
    and else `problems` of the configuration that the other arguments make.
    """
    argv, mistakes = _without_mistakes(argv, flags(Config))
    preset = _value(argv, "--preset")
    if preset is not None and preset not in PRESETS:
        # What the other settings should fit is not known.
        mistakes.append(f"preset={preset!r} must be one of {', '.join(PRESETS)}; take {nearest(preset)}.")
        raise ValueError("\n".join(mistakes))
    try:
        init = _value(argv, "--init")
        run_dir = _run_dir(_value(argv, "--run-dir"), Path(init).resolve().name if init else preset or "tiny")
        saved = saved_config.read(run_dir)
        fresh = saved is None or preset is not None
        base = PRESETS[preset or "tiny"] if fresh else saved
        base = _fine_tuning(base, Path(init)) if init and fresh else base
    except ValueError as error:
        raise ValueError("\n".join([*mistakes, str(error)])) from None
    once = {"dry_run": False, "topology": None, "plan": False, "json": False, "replay": None}
    base = dataclasses.replace(base, **once, processes=ProcessesConfig())
    config = tyro.cli(Config, default=base, args=_joined(argv), description=description)
    config = dataclasses.replace(config, run_dir=run_dir)
    # Of another preset most settings differ, which its name says.
    held = {} if saved is None else to_dict(saved) if saved.preset == config.preset else {"preset": saved.preset}
    differences = [
        f"{run_dir} is a run of another configuration: {name}={here!r} must be {then!r} as it was saved; "
        "leave it out to resume, or take another --run-dir."
        for name, then, here in saved_config.differences(held, to_dict(config))
    ]
    if mistakes := [*mistakes, *(differences or problems(config))]:
        raise ValueError("\n".join(mistakes))
    return config


def parse_settings(kind: type[Settings], argv: Sequence[str], default: Settings, description: str | None) -> Settings:
    """The settings of a dataclass that the arguments ask for; ValueError with a line for each mistake."""
    argv, mistakes = _without_mistakes(argv, flags(kind))
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return tyro.cli(kind, default=default, args=_joined(argv), description=description)


def _fine_tuning(base: Config, folder: Path) -> Config:
    """What fine-tunes the Gemma of a folder where nothing else is said; ValueError if there is none."""
    gemma = gemma_names.configuration(folder)
    length = min(base.model.max_seq_len, gemma.max_position_embeddings)
    model = dataclasses.replace(base.model, **gemma.model_settings, max_seq_len=length, remat="full")
    optim = dataclasses.replace(base.optim, learning_rate=FINE_TUNING_RATE)
    return dataclasses.replace(base, init=folder, gemma=gemma, tokenizer=folder, model=model, optim=optim)


def _run_dir(given: str | None, name: str) -> Path:
    """Where a run is to live, under that name if no place is given; ValueError where no run can."""
    run_dir = Path("runs") / name if given is None else Path(given)
    occupied = next((place for place in (run_dir, *run_dir.parents) if place.exists()), Path("/"))
    if given == "" or not occupied.is_dir():
        why = "a folder's name" if given == "" else f"a folder's or a new one's, and {occupied} is a file"
        raise ValueError(f"run_dir={given!r} must be {why}; take --run-dir runs/{name}.")
    if "?" in str(run_dir.absolute()):
        raise ValueError(
            f"run_dir={given!r}: no folder of its path may have ? in its name, after which DuckDB looks for options; "
            "take another --run-dir."
        )
    return run_dir


def flags(kind: type) -> dict[str, Any]:
    """The type of each flag's value, for the settings of a dataclass."""
    found: dict[str, Any] = {"--help": bool, "-h": bool}

    def visit(section: type, prefix: str) -> None:
        for name, hint in get_type_hints(section, include_extras=True).items():
            aliases: tuple[str, ...] = ()
            if get_origin(hint) is Annotated:
                hint, *extras = get_args(hint)
                if tyro.conf.Suppress in extras:
                    continue
                aliases = tuple(alias for extra in extras for alias in getattr(extra, "aliases", None) or ())
            if dataclasses.is_dataclass(hint):
                visit(hint, f"{prefix}{name}.")  # pyright: ignore[reportArgumentType]
                continue
            flag = f"{prefix}{name}".replace("_", "-")
            for alias in (f"--{flag}", *aliases):
                found[alias] = hint
            if hint is bool:
                head, _, tail = flag.rpartition(".")
                found[f"--{head}{'.' if head else ''}no-{tail}"] = hint

    visit(kind, "")
    return found


def _without_mistakes(argv: Sequence[str], known: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The arguments that have a meaning, and a sentence for each that is no flag, or no value of its flag."""
    good, mistakes, several = [], [], set()
    for arguments in _each(argv):
        flag = arguments[0].partition("=")[0].replace("_", "-")
        if found := list(_mistakes(arguments, known)):
            mistakes += found
        elif flag in several:
            # Of a flag with one value the last one counts; of these the first ones would be lost.
            mistakes.append(f"{flag} is given twice; give all its values after one of them.")
        else:
            good += arguments
            if get_origin(known.get(flag)) is tuple:
                several.add(flag)
    return good, mistakes


def _each(argv: Sequence[str]) -> Iterator[list[str]]:
    """Each flag with its values, or what stands where a flag should."""
    at = 0
    while at < len(argv):
        begin = at
        at += 1
        # No flag takes another's name for a value, so that a lost value does not swallow the next flag.
        while at < len(argv) and "=" not in argv[begin] and (not argv[at].startswith("-") or _is_number(argv[at])):
            at += 1
        yield list(argv[begin:at])


def _mistakes(arguments: list[str], known: dict[str, Any]) -> Iterator[str]:
    """A sentence for each thing that is wrong with a flag and its values."""
    flag, equals, value = arguments[0].partition("=")
    flag = flag.replace("_", "-") if flag.startswith("--") else flag
    values = [value] if equals else arguments[1:]
    if flag not in known:
        guess = next(iter(difflib.get_close_matches(flag, known, 1, 0.7)), "--help for all of them")
        yield f"{arguments[0]} is not a setting; take {guess}."
        return
    hint = known[flag]
    several = get_origin(hint) is tuple
    hint = next(iter(set(get_args(hint)) - {type(None)}), hint) if isinstance(hint, UnionType) else hint
    if hint is bool:
        if values:
            yield f"{flag} takes no value and got {values[0]!r}; leave the value out."
    elif not values:
        yield f"{flag} needs a value; give one after it."
    elif len(values) > 1 and not several:
        yield f"{flag} takes one value and got {len(values)}: {' '.join(values)!r}; quote a value with spaces."
    else:
        for item in values:
            if (wrong := _wrong(get_args(hint)[0] if several else hint, item)) is not None:
                yield f"{flag.lstrip('-').replace('-', '_')}={item!r} must be {wrong}."


def _wrong(hint: Any, value: str) -> str | None:
    """What a value of that type must be, if this is none."""
    if get_origin(hint) is Literal:
        choices = [str(choice) for choice in get_args(hint)]
        if value not in choices:
            guess = difflib.get_close_matches(value, choices, 1, 0)[0]
            return f"one of {', '.join(choices)}; take {guess}"
    if hint is int:
        try:
            int(value)
        except ValueError:
            guess = (
                f"; take {float(value):.0f}" if _is_number(value) and abs(float(value)) < 1e18 else "; take a number"
            )
            return f"a whole number{guess}"
    if hint is float and not _is_number(value):
        return "a number; take one such as 0.1"
    return None


def _joined(argv: Sequence[str]) -> list[str]:
    """The arguments with `--flag -1e-3` written as `--flag=-1e-3`: the parser takes few negative numbers for values."""
    joined: list[str] = []
    for argument in argv:
        if argument.startswith("-") and _is_number(argument) and joined and joined[-1].startswith("--"):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def _value(argv: Sequence[str], flag: str) -> str | None:
    """The value of a flag, last given wins."""
    found = None
    for at, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") == flag:
            found = value if equals else next(iter(argv[at + 1 :]), None)
    return found
